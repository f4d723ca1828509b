"""Trees: wrap, merge, unwrap, adapter, attach, partition and what else maps over them.

Every function is a tree_map: nothing here knows about layers, and nothing is written
in place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _algebra, _init, _output_bias, _paths
from jlora._leaf import (
    Adapted,
    Full,
    LoRA,
    bias_shape,
    factor_shapes,
    is_adapted,
    missing,
    trained,
)
from jlora._paths import Pattern
from jlora._plan import (
    RANK,
    Plan,
    Rule,
    check_rank,
    leaves_of,
    plan_from_names,
    sibling_bias,
    table,
)
from jlora._trace import is_array

Adapter = dict[str, Adapted]


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
    bias: str = "none",
    init: str = "kaiming",
    lora_bias: bool = False,
    dtype: Any = jnp.float32,
    key: jax.Array | None = None,
) -> Any:
    """The params tree with adapted leaves at the planned paths (arXiv:2106.09685).

    The base arrays are the objects that were passed, never copies.  At the start the
    delta is exactly zero.

    Args:
      params: any pytree of arrays, or of ``jax.ShapeDtypeStruct``s.
      rank: r of every adapter that no rule names.
      alpha: the delta is alpha / rank * a·b; None for alpha = rank.
      targets: patterns of the paths that are adapted, as in `plan`.  Without a plan
        Flax's names say what a kernel's axes are, where they leave no doubt.
      exclude: patterns of paths that stay as they are.
      rules: `Rule`s for ranks and alphas of their own, the first match wins.
      plan: a `Plan` made for this very tree; it then decides all of the above, but a
        rank or alpha given here too replaces the plan's where the plan has only one.
      train: patterns of leaves that train whole (`Full`), such as a new head.
      bias: "none"; "all" trains every bias; "lora_only" those of adapted weights.
      init: "kaiming": a ~ U(±1/√fan_in) and b = 0; for embeddings a = 0, b ~ N(0, 1).
      lora_bias: give every adapter a trainable output bias, zero at the start, which
        adds scale * c to the layer's own bias; where there is none of that shape, to
        the weight's products, and then it cannot be merged.  peft's option.
      dtype: of a, b, c and of `Full` values.
      key: for the factors; None is ``jax.random.key(0)``.  Each leaf's key is folded
        from its path, so the result does not depend on which other leaves there are.

    Returns:
      A tree of the same structure, `LoRA` and `Full` leaves in place of arrays.

    Raises:
      ValueError: a bad rank; an adapted tree; a pattern that matches nothing; a kernel
        whose roles its name does not tell; a plan made for another tree; a target or
        train leaf that is not floating-point.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
      >>> jlora.wrap(params, rank=2)["dense"]["kernel"].a.shape
      (3, 2)
    """
    check_rank(rank, "wrap")
    _refuse_layers(params, "wrap")
    if not isinstance(lora_bias, bool):
        raise TypeError(f"wrap: lora_bias {lora_bias!r}: expected True or False.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"wrap: dtype {dtype!r}: expected a floating-point one.")
    leaves = leaves_of(params)
    if plan is None:
        plan = (
            plan_from_names(
                params,
                rank=rank,
                alpha=alpha,
                targets=targets,
                exclude=exclude,
                rules=rules,
            )
            if not _only_full(targets)
            else Plan({}, {})
        )
    else:
        plan = _checked_plan(plan, leaves, rank, alpha, targets, exclude, rules)
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias {bias!r}: expected 'none', 'all' or 'lora_only'.")
    patterns = _paths.as_patterns(train)
    _paths.check_matched("train", patterns, _paths.flatten(params)[0])
    adapted_biases = {s.bias for s in plan.values()}

    def trains(path: str, x: Any) -> bool:
        is_bias = path.rpartition("/")[2] in ("bias", "b") and path not in plan
        return (
            any(_paths.matches(p, path, x) for p in patterns)
            or (bias == "all" and is_bias)
            or (bias == "lora_only" and path in adapted_biases)
        )

    def leaf(path: str, x: Any) -> Any:
        if trains(path, x):
            return _full(path, x, dtype)
        if path not in plan:
            return x
        spec = plan[path]
        if spec.lora_bias is None:
            spec = dataclasses.replace(spec, lora_bias=lora_bias)
        return _init.make(x, path, spec, init=init, dtype=dtype, key=key)

    return _paths.map_leaves(leaf, params)


def _only_full(targets: Any) -> bool:
    """targets=[] adapts nothing: only `train` and `bias` leaves train."""
    return isinstance(targets, (list, tuple)) and not targets


def _full(path: str, x: Any, dtype: Any) -> Full:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{path!r} is to be trained, but its dtype is {x.dtype}: expected a "
            "floating-point array. Leave the path out of train."
        )
    if isinstance(x, jax.ShapeDtypeStruct):
        return Full(x, jax.ShapeDtypeStruct(x.shape, dtype))
    # A buffer of its own, also where the dtype is the same: base and value are both
    # in the state, and one buffer cannot be donated twice.
    return Full(x, jnp.array(x, dtype, copy=True))


def _checked_plan(
    plan: Plan,
    leaves: dict[str, Any],
    rank: int,
    alpha: Any,
    targets: Any,
    exclude: Any,
    rules: Any,
) -> Plan:
    """The plan, if it is one of this very tree; with the rank and alpha given."""
    if targets is not None or exclude or rules:
        raise ValueError(
            "targets, exclude and rules are said to jlora.plan(...), which decides "
            "them: expected none beside plan=."
        )
    for path in plan:
        if path not in leaves:
            raise ValueError(
                f"the plan is of another tree: it has {path!r}, params has "
                f"{_paths.near(path, leaves)}. Pass wrap the same tree as plan "
                "(model.apply takes {'params': params}: wrap that too)."
            )
        if (found := tuple(leaves[path].shape)) != plan.shapes[path]:
            raise ValueError(
                f"the plan is of another tree: {path!r} has shape "
                f"{plan.shapes[path]} in the plan and {found} in params. Plan the tree "
                "that is wrapped."
            )
    changes: dict[str, Any] = {}
    for name, value, default in (("rank", rank, RANK), ("alpha", alpha, None)):
        planned = {getattr(s, name) for s in plan.values()}
        if value is default or planned == {value}:
            continue
        if len(planned) > 1:
            raise ValueError(
                f"{name}={value} beside a plan with several ({sorted(planned)}): say "
                "it in jlora.plan(...)."
            )
        changes[name] = value
    specs = {}
    for path, spec in plan.items():
        specs[path] = dataclasses.replace(spec, **changes)
        if alpha is None and path in plan.unsaid:  # alpha = rank stays so
            specs[path] = dataclasses.replace(
                specs[path], alpha=float(specs[path].rank)
            )
    return dataclasses.replace(plan, specs=specs)


def merge(tree: Any) -> Any:
    """Plain params with the deltas in: w + scale * a·b, rounded once to w's dtype.

    Computed in float32 (float64 where a base or factor is).  A `Full` leaf gives its
    value in the base's dtype.  An output bias goes into the bias of the weight's layer.
    A base that was dropped counts as zero.

    Raises:
      ValueError: a leaf without its base; one with an output bias whose layer has no
        bias to take it, or one of another shape.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> lora = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.merge(lora)["kernel"].shape
      (3, 4)
    """

    def dense(leaf: Adapted) -> jax.Array:
        # A Full value has a buffer of its own, which a later step may donate.
        merged = _algebra.dense(leaf)
        return jnp.array(merged, copy=True) if isinstance(leaf, Full) else merged

    return _with_output_biases(_map_adapted(dense, tree, "merge"), tree, "merge")


def _with_output_biases(params: Any, adapter: Any, what: str, sign: int = 1) -> Any:
    """The params with the output biases of an adapter in those of the layers."""
    leaves, old = (dict(_paths.flatten(tree)[0]) for tree in (params, adapter))
    weights = {path: x for path, x in old.items() if isinstance(x, LoRA)}
    found, homeless = _output_bias.homes({**leaves, **weights})
    for path, why in homeless.items():
        raise ValueError(
            f"{what}: {path!r} has an output bias (lora_bias), but {why}, to take it. "
            "Give the layer a bias of zeros, or lift the tree as it is."
        )

    def leaf(path: str, x: Any) -> Any:
        if path not in found:
            return x
        was = old.get(path)  # so that what trained whole is rounded once, too
        whole = was if isinstance(was, Full) else x
        return _output_bias.plus(whole, [weights[p] for p in found[path]], sign)

    return _paths.map_leaves(leaf, params) if found else params


def unwrap(tree: Any) -> Any:
    """Plain params without the deltas: the same base arrays that were wrapped.

    A base that was dropped is a ``jax.ShapeDtypeStruct``: what `attach` and
    ``checkpoint.restore`` need to know of it.

    Raises:
      ValueError: a leaf without its base.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> jlora.unwrap(jlora.wrap(params, rank=2))["kernel"] is params["kernel"]
      True
    """

    def base(leaf: Adapted) -> Any:
        if leaf.w is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return leaf.w

    return _map_adapted(base, tree, "unwrap")


def _map_adapted(fn: Any, tree: Any, what: str) -> Any:
    _refuse_layers(tree, what)

    def leaf(path: str, x: Any) -> Any:
        if not is_adapted(x):
            return x
        if lacks := missing(x):
            raise ValueError(
                f"{what}: {path!r} has {', '.join(f'{name}=None' for name in lacks)}: "
                "expected a whole adapted tree. Put the base (w) back with "
                "jlora.attach(params, adapter), the halves of a partition together "
                "with jlora.combine(trainable, frozen); "
                "the variables of jlora.linen layers keep it apart: "
                "jlora.attach({'params': variables['params']}, "
                "jlora.linen.adapter(variables))."
            )
        return fn(x)

    return _paths.map_leaves(leaf, tree)


def adapter(tree: Any) -> Adapter:
    """Only what was adapted, without the base: a flat dict from path to leaf.

    One format for every framework: for checkpoints, arithmetic and interchange.  Its
    leaves have ``w=None``; dropout keys are not part of it.

    Raises:
      ValueError: no adapted leaf, or two with the same path.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> list(jlora.adapter(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)))
      ['kernel']
    """
    out: Adapter = {}
    for path, x in _paths.flatten(tree)[0]:
        if not is_adapted(x):
            continue
        if path in out:
            raise ValueError(
                f"two adapted leaves have the path {path!r}: an adapter could not tell "
                "them apart. Rename one of them (a key may not hold '/')."
            )
        bare: dict[str, Any] = {"w": None}
        if isinstance(x, LoRA):
            bare |= {"key": None, "rate": 0.0, "mean": None, "std": None}
        out[path] = dataclasses.replace(x, **bare)
    if not out:
        _refuse_layers(tree, "adapter")
        raise ValueError(
            "adapter: the tree has no adapted leaf: expected the result of jlora.wrap."
        )
    return out


def attach(params: Any, adapter: Adapter) -> Any:
    """Plain params with an adapter's leaves on them; the inverse of `adapter`.

    The adapter must fit: every path in the tree, every shape the base's.

    Raises:
      ValueError: a path that the tree has not (with the paths near it, and the renaming
        where it was made on ``{"params": …}`` or on a bare tree); a leaf that lacks
        a, b or scale; a weight of another shape; a tree that is adapted already.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> t = jlora.attach(params, jlora.adapter(jlora.wrap(params, rank=2)))
      >>> t["kernel"].rank
      2
    """
    _fitting("attach", params, adapter)

    leaves = dict(_paths.flatten(params)[0])
    gone = {
        _paths.resolve(x.bias, path)
        for path, x in adapter.items()
        if isinstance(x, LoRA) and x.dropped is not None and x.bias is not None
    }

    def leaf(path: str, x: Any) -> Any:
        if path not in adapter:  # a bias faded with the base, and was dropped as zero
            return jnp.zeros_like(x) if path in gone and is_array(x) else x
        new = adapter[path]
        if not isinstance(new, LoRA):
            return dataclasses.replace(new, w=x)
        bias = new.bias
        if bias is None and (beside := sibling_bias(path, leaves)) is not None:
            bias = _paths.relative(beside, path)
        w = x if new.dropped is None else None
        return dataclasses.replace(new, w=w, bias=bias)

    return _paths.map_leaves(leaf, params)


def unmerge(params: Any, adapter: Adapter) -> Any:
    """Merged params with an adapter's delta subtracted: w - scale * a·b.

    Inexact: merging rounded w + delta to w's dtype, and so does this.  The result is
    off by about one unit in the last place of the larger of the two (2^-8 of it in
    bfloat16, 2^-24 in float32); further cycles of merging and unmerging the same
    adapter add nothing to it.  `unwrap` gives the very base instead.

    Raises:
      ValueError: as `attach`; or a `Full` leaf, whose base cannot be had back.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> float(jlora.unmerge(jlora.merge(t), jlora.adapter(t))["kernel"].max())
      1.0
    """
    _fitting("unmerge", params, adapter)

    def leaf(path: str, x: Any) -> Any:
        found = adapter.get(path)
        if isinstance(found, Full):
            raise ValueError(
                f"unmerge: {path!r} was trained whole, so its base cannot be had back "
                "by subtraction: expected low-rank leaves only. Keep the base params, "
                "or use jlora.unwrap on the adapted tree."
            )
        if found is None:
            return x
        return _algebra.dense(dataclasses.replace(found, w=x, scale=-found.scale))

    merged = _paths.map_leaves(leaf, params)
    # The leaves of an adapter stand under their whole paths, as those of a tree do.
    return _with_output_biases(merged, adapter, "unmerge", sign=-1)


def _fitting(what: str, params: Any, adapter: Adapter) -> None:
    """Raises unless every leaf of the adapter fits an array of params."""
    if not isinstance(adapter, dict) or not all(map(is_adapted, adapter.values())):
        found = type(adapter).__name__
        if isinstance(adapter, dict):
            other = next(x for x in adapter.values() if not is_adapted(x))
            found += f" of {type(other).__name__}"
        raise ValueError(
            f"{what}: expected an adapter (a flat dict from path to adapted leaf, as "
            f"jlora.adapter gives), found {found}. A checkpoint restored without a "
            "template has plain dicts: give Orbax jax.eval_shape(lambda: "
            "jlora.adapter(tree)), as in StandardRestore(template)."
        )
    leaves = dict(_paths.flatten(params)[0])
    for path, y in leaves.items():
        if is_adapted(y):
            raise ValueError(
                f"{what}: {path!r} is adapted already: expected plain params. Merge or "
                "unwrap the tree first (jlora.merge, jlora.unwrap); of variables of "
                "jlora.linen layers pass {'params': variables['params']}."
            )
    for path, x in adapter.items():
        if path not in leaves:
            raise ValueError(
                f"{what}: the adapter has {path!r}, which the tree has not; near "
                f"paths: {_paths.near(path, leaves)}.{_renaming(adapter, leaves)}"
            )
        y = leaves[path]
        if lacks := [name for name in missing(x) if name != "w"]:
            raise ValueError(
                f"{what}: {path!r} of the adapter lacks {', '.join(lacks)}: expected "
                "a whole adapter; if it is half of a partition, combine it first."
            )
        if not (hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.floating)):
            found = getattr(y, "dtype", type(y).__name__)
            raise ValueError(
                f"{what}: {path!r} is {found} in the tree: expected a floating-point "
                "weight, as an adapter is made for."
            )
        if x.shape != tuple(y.shape):
            raise ValueError(
                f"{what}: {path!r} is an adapter for a weight of shape {x.shape}, "
                f"found {tuple(y.shape)}: it was made for another model."
            )
        if isinstance(x, LoRA):
            _check_factors(what, path, x)


def _check_factors(what: str, path: str, x: LoRA) -> None:
    """Raises unless a, b, c and scale are of one rank and one stack."""
    a, b = factor_shapes(x.shape, x.axes, x.rank, x.form)
    batch = tuple(n for n, role in zip(x.shape, x.axes, strict=True) if role == "b")
    shapes = {"a": a, "b": b, "scale": batch}
    if x.c is not None:
        shapes["c"] = bias_shape(x.shape, x.axes)
    for name, want in shapes.items():
        if (found := tuple(getattr(x, name).shape)) != want:
            raise ValueError(
                f"{what}: {path!r} has {name} of shape {found}: expected {want}, by "
                f"its roles {x.axes!r} and rank {x.rank}."
            )


def _renaming(adapter: Adapter, leaves: Any) -> str:
    """The line that renames an adapter between ``{"params": …}`` and a bare tree."""
    for new, line in (
        (lambda p: f"params/{p}", '{f"params/{k}": v for k, v in adapter.items()}'),
        (
            lambda p: p.removeprefix("params/"),
            '{k.removeprefix("params/"): v for k, v in adapter.items()}',
        ),
    ):
        if all(new(p) in leaves for p in adapter):
            return f" It fits after adapter = {line}."
    return ""


def partition(tree: Any) -> tuple[Any, Any]:
    """(trainable, frozen): two trees of the same structure with None in the holes.

    Trainable are a, b, c and `Full` values; everything else is frozen.  Differentiate
    with respect to the first half and `combine` inside the loss: the base then goes
    into the step and never out of it.

    Raises:
      ValueError: the tree has no adapted leaf.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> [x.shape for x in jax.tree.leaves(jlora.partition(t)[0])]
      [(3, 2), (2, 4)]
    """
    found = labels(tree)
    _require_adapted(tree, "partition")

    def half(frozen: bool) -> Any:
        return jax.tree.map(
            lambda x, label: x if (label == "frozen") is frozen else None, tree, found
        )

    return half(False), half(True)


def combine(trainable: Any, frozen: Any) -> Any:
    """The whole tree from the halves of `partition`.

    Raises:
      ValueError: the halves are of different trees.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.combine(*jlora.partition(t))["kernel"].w is t["kernel"].w
      True
    """
    try:
        return jax.tree.map(
            lambda x, y: y if x is None else x,
            trainable,
            frozen,
            is_leaf=lambda x: x is None,
        )
    except ValueError as e:
        raise ValueError(
            f"combine: expected the two halves of one jlora.partition, found {e}"
        ) from None


def scaled(tree: Any, s: Any) -> Any:
    """The tree with every adapter's scale multiplied by s; 0 turns adapters off.

    The scale is data: a jitted function is not recompiled.  `Full` leaves are as they
    were.  Works on an adapter as well.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> float(jlora.scaled(t, 0.5)["kernel"].scale)
      0.5
    """
    _require_adapted(tree, "scaled")

    def leaf(_: str, x: Any) -> Any:
        if not isinstance(x, LoRA):
            return x
        return dataclasses.replace(x, scale=(x.scale * s).astype(jnp.float32))

    return _paths.map_leaves(leaf, tree, share=True)


def labels(tree: Any) -> Any:
    """The tree with "lora" (a, b, c), "full" (`Full` values) or "frozen" for an array.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> (x := jlora.labels(t)["kernel"]).w, x.a, x.scale
      ('frozen', 'lora', 'frozen')
    """

    def leaf(_: str, x: Any) -> Any:
        all_frozen = jax.tree.map(lambda _: "frozen", x)
        if not is_adapted(x):
            return all_frozen
        label = "lora" if isinstance(x, LoRA) else "full"
        return dataclasses.replace(all_frozen, **dict.fromkeys(trained(x), label))

    return _paths.map_leaves(leaf, tree)


def _refuse_layers(tree: Any, what: str) -> None:
    """Raises for a module of jlora.nnx layers, whose factors are variables."""
    if _paths.of_adapters(tree):
        raise ValueError(
            f"{what}: the module has layers with factors of their own (nnx.LoRAParam): "
            "expected a tree of jlora.wrap. Carry them to the plain twin: "
            "jlora.attach(twin, jlora.nnx.adapter(module))."
        )


def _require_adapted(tree: Any, what: str, advice: str = "") -> None:
    if not any(is_adapted(x) for _, x in _paths.flatten(tree)[0]):
        if not advice:
            _refuse_layers(tree, what)
        raise ValueError(
            f"{what}: the tree has no adapted leaf: expected the result of "
            f"jlora.wrap(params, ...), found plain params. {advice}".rstrip()
        )


def dropout(tree: Any, rate: float, key: jax.Array) -> Any:
    """The tree with dropout on the activation that enters each low-rank branch.

    Call it inside the loss, with a new key each step; `lift` then computes
    x·w + (drop(x)·a)·b.  Masks are independent per leaf, per use and per scan step.
    Lookups have no activation, and no dropout.

    Args:
      tree: an adapted tree.
      rate: the probability of a zero, a Python float in [0, 1); 0 for none.
      key: a PRNG key; each leaf's is folded from its path.

    Raises:
      ValueError: a rate outside [0, 1), or one that is traced; no adapted leaf.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.dropout(t, 0.1, jax.random.key(0))["kernel"].rate
      0.1
    """
    if isinstance(rate, jax.core.Tracer) or not 0 <= rate < 1:
        raise ValueError(
            f"dropout: rate {rate!r}: expected a Python number in [0, 1), since it is "
            "part of the compiled function."
        )
    _require_adapted(tree, "dropout")
    key = _init.typed(key)

    def leaf(path: str, x: Any) -> Any:
        if not isinstance(x, LoRA):
            return x
        if rate == 0:
            return dataclasses.replace(x, key=None, rate=0.0)
        own = _init.path_key(key, path)
        keys = jax.random.split(own, x.scale.shape) if x.scale.shape else own
        return dataclasses.replace(x, key=keys, rate=float(rate))

    return _paths.map_leaves(leaf, tree, share=True)


def count(tree: Any) -> tuple[int, int]:
    """(trainable, total) numbers of parameters: adapters, and base plus adapters.

    Scales and dropout keys are no parameters.  A `Full` leaf has its base and its
    value.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2))
      (14, 26)
    """
    sizes = [_sizes(x) for _, x in _paths.flatten(tree)[0]]
    trainable = sum(t for t, _ in sizes)
    return trainable, trainable + sum(base for _, base in sizes)


def _size(x: Any) -> int:
    return math.prod(x.shape) if hasattr(x, "shape") else 0


def _sizes(x: Any) -> tuple[int, int]:
    """(trainable, base) parameters of a leaf."""
    if not is_adapted(x):
        return 0, _size(x)
    return sum(_size(getattr(x, name)) for name in trained(x)), _size(x.w)


def _dtype(x: Adapted) -> str:
    if isinstance(x, LoRA) and x.dropped is not None:
        return "dropped"
    return "" if x.w is None else str(x.dtype)


class Summary(str):
    """A table that prints as it is, also at the interpreter's prompt."""

    def __repr__(self) -> str:
        return str(self)


def summary(tree: Any) -> Summary:
    """A printable table of the adapted leaves, with the totals of `count`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> print(jlora.summary(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)))
      path    shape  dtype    adapted  rank  trainable
      ------------------------------------------------
      kernel  3×4    float32  io          2         14
      1 adapted leaf: 14 trainable of 26 parameters (53.8 %)
    """
    rows = []
    for path, x in _paths.flatten(tree)[0]:
        if is_adapted(x):
            low = isinstance(x, LoRA)
            rows.append(
                (
                    path,
                    "×".join(map(str, x.shape)),
                    _dtype(x),
                    (x.axes + (f", {x.form}" if x.form else "")) if low else "full",
                    str(x.rank) if low else "",
                    f"{_sizes(x)[0]:,}",
                )
            )
    trainable, total = count(tree)
    leaves = f"{len(rows)} adapted lea{'f' if len(rows) == 1 else 'ves'}"
    head = ("path", "shape", "dtype", "adapted", "rank", "trainable")
    share = 100 * trainable / max(total, 1)
    return Summary(
        f"{table(head, rows)}\n"
        f"{leaves}: {trainable:,} trainable of {total:,} parameters ({share:.3g} %)"
    )
