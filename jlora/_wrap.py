"""Wrap: adapted leaves at the planned paths of a params tree."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._init.keys import typed
from jlora._init.make import Initialiser, initialiser, make
from jlora._init.rows import chosen, make_rows
from jlora._leaf import Full, base
from jlora._plan.from_tree import from_tree
from jlora._plan.plan import Plan, check
from jlora._plan.select import Wanted
from jlora._plan.spec import RANK, Rule, Spec, check_rank
from jlora._tree import by_path, sharding
from jlora._tree.patterns import Pattern, as_patterns, check_matched, matches
from jlora._tree.variables import opened, refuse_layers


def wrap(
    params: Any,
    rank: int = RANK,
    *,
    alpha: float | None = None,
    targets: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] = (),
    rules: Iterable[Rule] = (),
    plan: Plan | None = None,
    train: Pattern | Iterable[Pattern] = (),
    train_rows: Mapping[Pattern, Sequence[int]] | None = None,
    bias: str = "none",
    init: str | Initialiser = "kaiming",
    rslora: bool = False,
    dora: bool = False,
    lora_bias: bool = False,
    dtype: Any = jnp.float32,
    key: jax.Array | None = None,
) -> Any:
    """The params tree with adapted leaves at the planned paths (arXiv:2106.09685).

    The base arrays are the objects that were passed, never copies, unless ``init``
    changes the base, as "pissa" and "olora" do.  With the default ``init`` the delta
    starts at exactly zero.

    Args:
      params: any pytree of arrays, or of ``jax.ShapeDtypeStruct``s; or a built model of
        Keras, of which the result has the trainable variables by path.
      rank: r of every adapter for which no rule gives another.
      alpha: the delta is alpha / rank * a·b; None for alpha = rank.
      targets: patterns of the paths to adapt, as in `plan`.  Without a plan, the roles
        of a kernel's axes are told by its layer's class (NNX, Equinox, Keras), else by
        the shape of the bias beside it and by names that libraries share.  The first
        lifted trace compares them with the use, and raises where they differ.
      exclude: patterns of paths that are not adapted.
      rules: `Rule`s for ranks, alphas and forms of single leaves; the first match wins.
      plan: a `Plan` made for this tree, which replaces all arguments above.  Only a
        rank or alpha may be given with it: it then replaces the plan's, which must be
        the same for all leaves.
      train: patterns of leaves that train whole (`Full`), such as a new head.
      train_rows: the rows of embeddings that train as replacements, by pattern: the
        indices along the table's first axis, as of new tokens.  Lookups and tied heads
        use the new rows, and the table is not copied.
      bias: "none"; "all" to train every bias: of adapted weights, and what is named as
        one (bias, b, fc1.bias, attn_b, ...); "lora_only" to train those of adapted
        weights.
      init: "kaiming": a ~ U(±1/√fan_in) and b = 0; for embeddings a = 0, b ~ N(0, 1).
        Or one of `jlora.initializers`, or a function (key, w, spec) -> (w, a, b).
      rslora: whether the delta is alpha / √rank * a·b (arXiv:2312.03732, theorem 3.2),
        which does not grow weaker with the rank.
      dora: whether every adapter gets a trainable magnitude m (arXiv:2402.09353): the
        weight is then m * V / ‖V‖ for V = W + scale * a·b, with the norm over the in
        axes, and m = ‖V‖ at the start.  The norm has no gradient (section 4.3).
      lora_bias: whether every adapter gets a trainable output bias c, zero at the
        start, as in peft.  The layer's bias gets scale * c added.  If the layer has no
        bias of that shape, the weight's products get it, and the tree cannot be merged.
      dtype: the dtype of a, b, c, m and `Full` values.  They are small, and cast to the
        activation's dtype in each product, so float32 costs little.  In bfloat16 a step
        below 2^-8 of a number is lost.  In float16 the eps of Adam, 1e-8, is zero, so
        its first steps give NaN.
      key: the PRNG key for the factors; None for ``jax.random.key(0)``.  Each leaf's
        path is folded into it, so no leaf's factors depend on the other leaves.

    Returns:
      A tree of the same structure, with `LoRA` and `Full` leaves in place of arrays.

    Raises:
      ValueError: a bad rank; an adapted tree; a pattern that matches nothing; a kernel
        whose name does not give its roles; a plan made for another tree; a target or
        train leaf that is not floating-point; a ``bias`` for which there is none; an
        index of a row that is negative, too large or there twice.
      TypeError: a flag that is no boolean; a key that is no PRNG key; an
        initialiser that does not give a tuple (w, a, b).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
      >>> jlora.wrap(params, rank=2)["dense"]["kernel"].a.shape
      (3, 2)
    """
    said = check_rank(rank, "wrap")
    refuse_layers(params, "wrap")
    options = {"rslora": rslora, "dora": dora, "lora_bias": lora_bias}
    for name, flag in options.items():
        if not isinstance(flag, bool):
            raise TypeError(f"wrap: {name} {flag!r}: expected True or False.")
    _check_dtype(dtype)
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias {bias!r}: expected 'none', 'all' or 'lora_only'.")
    key, init = typed(key), initialiser(init)
    module, params = params, opened(params)
    leaves = by_path.arrays(params)
    if plan is not None:
        plan = _checked_plan(plan, leaves, said, alpha, targets, exclude, rules)
    elif _adapts_none(targets):
        plan = Plan({}, {})
    else:
        asked = Wanted.of(rank, alpha, targets, exclude, rules)
        plan = from_tree(module, leaves, asked)
    trains = _training(params, plan, train, bias)
    rows = chosen(train_rows, leaves)

    def leaf(path: str, x: Any) -> Any:
        if path in rows:
            _check_only_rows(path, plan, trains(path, x))
            return make_rows(x, rows[path], dtype)
        if trains(path, x):
            return _full(path, x, dtype)
        if path not in plan:
            return x
        spec = plan[path].with_options({"init": init, **options})
        return make(x, path, spec, init=spec.init, dtype=dtype, key=key)

    return by_path.map_leaves(leaf, params)


def _check_only_rows(path: str, plan: Plan, trains: bool) -> None:
    """Raises if a table whose rows train is to be adapted otherwise as well."""
    if path in plan or trains:
        how = "trains whole" if trains else "is adapted, by a target, a rule or a plan"
        cure = "Leave it out of train=" if trains else f"Exclude {path!r}"
        raise ValueError(
            f"wrap: {path!r} {how}, and rows of it are to train: expected one of the "
            f"two. {cure}, or leave it out of train_rows."
        )


def _check_dtype(dtype: Any) -> None:
    """Raises for a dtype that cannot train; warns of one that Adam cannot train in."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"wrap: dtype {dtype!r}: expected a floating-point one.")
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    if smallest > _EPS:
        name = jnp.dtype(dtype).name
        warnings.warn(
            f"wrap: dtype={name}: what trains is kept in {name}, whose smallest number "
            f"is {smallest:.1g}. There Adam's eps of {_EPS:g} is zero, and its steps "
            "give NaN. Leave dtype out: float32 factors are cast to the activation's "
            "dtype in each product. Or give the optimizer a larger eps.",
            stacklevel=3,
        )


_EPS = 1e-8  # the default of optax.adam, and of PyTorch's


def _training(
    params: Any, plan: Plan, train: Any, bias: str
) -> Callable[[str, Any], bool]:
    """A function that says whether a leaf trains whole, by ``train`` or by ``bias``."""
    patterns = as_patterns(train)
    check_matched("train", patterns, by_path.flatten(params)[0])
    biases = _biases(params, plan, bias)
    return lambda path, x: path in biases or any(matches(p, path, x) for p in patterns)


def _biases(params: Any, plan: Plan, bias: str) -> set[str]:
    """The paths of the biases to train; raises if there are none, but some should."""
    if bias == "none":
        return set()
    leaves, rest = dict(by_path.flatten(params)[0]), by_path.others(params)
    found = {s.bias for s in plan.values() if s.bias is not None}
    if bias == "all":
        found |= {
            path
            for path, x in leaves.items()
            if by_path.is_bias(path)
            and path not in plan
            and path not in rest
            and jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating)
        }
    if not found:
        raise ValueError(_no_bias(leaves, bias))
    return found


def _no_bias(leaves: Mapping[str, Any], bias: str) -> str:
    vectors = [repr(p) for p, x in leaves.items() if getattr(x, "ndim", 0) == 1]
    some = f" (the tree's vectors: {', '.join(vectors[:5])})" if vectors else ""
    names = "bias, b, fc1.bias or attn_b"
    return (
        f"wrap: bias={bias!r}: expected biases to train, found none: no adapted weight "
        "is known to have one"
        + (f", and no leaf has a name such as {names}" if bias == "all" else "")
        + f"{some}. Plan from the function, which shows what is added to a product: "
        "plan=jlora.plan(fn, params, *args); or name them, train=[...]; or leave bias "
        "out."
    )


def _adapts_none(targets: Any) -> bool:
    """Whether targets is empty: only train, train_rows and bias count."""
    return isinstance(targets, (list, tuple)) and not targets


def _full(path: str, x: Any, dtype: Any) -> Full:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{path!r} is to be trained, but its dtype is {x.dtype}: expected a "
            "floating-point array. Leave the path out of train."
        )
    own = sharding.of_fields(Full(x, x), sharding.of_array(x)).value
    if base.is_abstract(x):
        return Full(x, jax.ShapeDtypeStruct(x.shape, dtype, sharding=own))
    if base.is_base(x):
        return Full(x, base.array(x).astype(dtype))
    here = x
    if own is not None and not isinstance(x, jax.core.Tracer):
        here = jax.device_put(x, own)  # a base may be in host memory, a value not
    # A copy even if the dtype is the same: base and value are both in the train state,
    # and one buffer cannot be donated twice.
    return Full(x, jnp.array(here, dtype, copy=True))


def _checked_plan(
    plan: Plan,
    leaves: dict[str, Any],
    rank: int | None,
    alpha: Any,
    targets: Any,
    exclude: Any,
    rules: Any,
) -> Plan:
    """The plan with this rank and alpha; raises if it was made for another tree."""
    check(plan, leaves, "wrap", targets, exclude, rules)
    said = {"rank": rank, "alpha": alpha}
    for name, value in said.items():
        planned = {getattr(s, name) for s in plan.values()}
        if value is not None and len(planned) > 1:
            raise ValueError(
                f"{name}={value} beside a plan with several ({sorted(planned)}): pass "
                "it to jlora.plan(...)."
            )

    def with_said(spec: Spec) -> Spec:
        return spec.with_scale(
            spec.rank if rank is None else rank, spec.alpha if alpha is None else alpha
        )

    specs = {path: with_said(spec) for path, spec in plan.specs.items()}
    return dataclasses.replace(plan, specs=specs)
