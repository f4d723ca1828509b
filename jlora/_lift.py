"""lift: a function of params becomes one that also reads adapted leaves.

The function is traced on the base arrays, and its jaxpr is evaluated equation by
equation.  Where an input is an adapted leaf, the rule for that primitive computes with
(w, a, b); where none is, the equation is bound as it stands.  Control flow is rebuilt
with JAX's own functions, through which adapted leaves travel as the pytrees that they
are.  A use without a rule materialises the weight, and says so.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _compat, _ops
from jlora._leaf import Adapted, Full, LoRA, is_adapted
from jlora._paths import flatten

# ------------------------------------------------------------------------ the report


@dataclasses.dataclass(frozen=True)
class Entry:
    """How the lift treats one adapted leaf.

    Attributes:
      path: of the leaf in its tree.
      status: "factored" (never formed; a `Full` leaf is read as it is), "materialised"
        (W + scale·a·b is formed at least once) or "unused".
      where: the primitives that use it, in order of use.
    """

    path: str
    status: str
    where: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What `explain` found: iterates over one `Entry` per adapted leaf; printable."""

    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        width = max([len(e.path) for e in self], default=0)
        rows = [
            f"{e.path:{width}}  {e.status:12}  {', '.join(e.where)}".rstrip()
            for e in self
        ]
        counts = collections.Counter(e.status for e in self)
        return "\n".join([*rows, ", ".join(f"{n} {s}" for s, n in counts.items())])


# ------------------------------------------------------------- values in the evaluation


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["path"]
)
@dataclasses.dataclass(frozen=True)
class _Tracked:
    """An adapted leaf on its way through the jaxpr, with its path for messages."""

    leaf: Any
    path: str


@jax.tree_util.register_pytree_node_class
class _Static:
    """What is no array: a pytree without leaves, so JAX's trace cache compares it."""

    def __init__(self, value: Any):
        self.value = value
        try:
            self._hash = hash(value)
        except TypeError:
            self._hash = None

    def tree_flatten(self) -> tuple[tuple[()], _Static]:
        return (), self

    @classmethod
    def tree_unflatten(cls, aux: _Static, _: Any) -> _Static:
        return aux

    def __hash__(self) -> int:
        return id(self.value) if self._hash is None else self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        if self._hash is None or other._hash is None:
            return self.value is other.value
        return bool(self.value == other.value)


def _is_array(x: Any) -> bool:
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind not in "OSUMm"
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct))


def hide(tree: Any) -> Any:
    """The tree with everything but arrays made static."""
    return jax.tree.map(lambda x: x if _is_array(x) else _Static(x), tree)


def show(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: x.value if isinstance(x, _Static) else x,
        tree,
        is_leaf=lambda x: isinstance(x, _Static),
    )


# --------------------------------------------------------------------- the evaluation


class _Evaluation:
    """One evaluation of a jaxpr: the policy and what has been seen so far."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.seen: dict[str, list[tuple[str, bool]]] = {}
        self.uses: collections.Counter[str] = collections.Counter()

    def run(self, jaxpr: Any, args: Sequence[Any], consts: Sequence[Any] = ()) -> list:
        """Evaluates a jaxpr on arrays and `_Tracked` leaves."""
        jaxpr, own = _compat.jaxpr_and_consts(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts or own, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        formed: dict[int, jax.Array] = {}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, _compat.Literal) else env[v]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            if any(isinstance(v, _Tracked) for v in values):
                outs = self.apply(eqn, values, formed)
            else:
                outs = _compat.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def apply(self, eqn: Any, values: list[Any], formed: dict[int, Any]) -> list[Any]:
        """Evaluates an equation that reads at least one adapted leaf."""
        name = eqn.primitive.name
        for i, v in enumerate(values):
            if isinstance(v, _Tracked) and isinstance(v.leaf, Full):
                self.note(v, name)
                values[i] = _ops.dense(v.leaf)
        if any(isinstance(v, _Tracked) for v in values) and name in _RULES:
            try:
                out = _RULES[name](self, eqn, *values)
                return list(out) if isinstance(out, (list, tuple)) else [out]
            except _ops.NotFactored:
                pass
        for i, v in enumerate(values):
            if isinstance(v, _Tracked):
                if id(v) not in formed:
                    formed[id(v)] = self.materialise(v, name)
                else:
                    self.note(v, name, formed=True)
                values[i] = formed[id(v)]
        return _compat.bind(eqn, values)

    def note(self, x: _Tracked, name: str, *, formed: bool = False) -> int:
        """Records a use; returns how many uses of the path came before."""
        self.seen.setdefault(x.path, []).append((name, formed))
        self.uses[x.path] += 1
        return self.uses[x.path] - 1

    def materialise(self, x: Any, name: str) -> Any:
        """The merged array of an adapted leaf, with the warning that it is formed."""
        if not isinstance(x, _Tracked):
            return x
        if isinstance(x.leaf, LoRA):
            text = f"{x.path!r} is used by {name!r}, which has no low-rank form"
            if self.strict:
                raise ValueError(
                    f"{text}, and strict=True: exclude this path from the plan, use "
                    "the weight in a product, or lift without strict to have "
                    "W + scale·a·b formed for it."
                )
            warnings.warn(
                f"{text}: W + scale·a·b is formed for it, and its gradient with it. "
                "Exclude the path, or pass strict=True to make this an error.",
                stacklevel=2,
            )
        self.note(x, name, formed=isinstance(x.leaf, LoRA))
        return _ops.dense(x.leaf)


# ---------------------------------------------------------------------- the rule table

_RULES: dict[str, Callable[..., Any]] = {}


def _rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def _compute(fn: Callable[..., jax.Array], ev: _Evaluation, x: _Tracked, name: str,
             *args: Any, **params: Any) -> jax.Array:
    """A use of a weight, with the path in the error where it contradicts its roles."""
    try:
        out = fn(x.leaf, *args, **params)
    except _ops.RolesError as e:
        raise ValueError(
            f"{x.path!r} was planned otherwise than it is used: {name} {e}. Plan it "
            "from the function that uses it, jlora.plan(fn, params, *args), or exclude "
            "the path."
        ) from None
    ev.note(x, name)
    return out


@_rule("dot_general")
def _dot_general(ev: _Evaluation, eqn: Any, lhs: Any, rhs: Any) -> Any:
    first = isinstance(lhs, _Tracked)
    if first and isinstance(rhs, _Tracked):
        rhs = ev.materialise(rhs, "dot_general (with another adapted weight)")
    leaf, x = (lhs, rhs) if first else (rhs, lhs)
    return _compute(
        _ops.contract, ev, leaf, "dot_general", x,
        weight_first=first, use=ev.uses[leaf.path], **eqn.params,
    )


@_rule("conv_general_dilated")
def _conv(ev: _Evaluation, eqn: Any, x: Any, kernel: Any) -> Any:
    if isinstance(x, _Tracked):
        raise _ops.NotFactored
    return _compute(
        _ops.conv, ev, kernel, "conv_general_dilated", x,
        use=ev.uses[kernel.path], **eqn.params,
    )


@_rule("gather")
def _gather(ev: _Evaluation, eqn: Any, w: Any, indices: Any) -> Any:
    return _compute(_ops.lookup, ev, w, "gather", indices, **eqn.params)


# Structure: the leaf goes on as a leaf.


def _structural(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A rule of the form fn(leaf, **params), for a weight that is the only operand."""

    def register(fn: Callable[..., LoRA]) -> Callable[..., LoRA]:
        def rule(ev: _Evaluation, eqn: Any, x: _Tracked) -> _Tracked:
            return _Tracked(fn(x.leaf, **eqn.params), x.path)

        _rule(*names)(rule)
        return fn

    return register


@_rule("convert_element_type", "reduce_precision", "copy", "copy_p", "name",
       "sharding_constraint", "device_put")
def _base_only(ev: _Evaluation, eqn: Any, x: _Tracked) -> Any:
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        raise _ops.NotFactored
    leaf = _ops.cast(x.leaf, lambda w: _compat.bind(eqn, [w])[0])
    return _Tracked(leaf, x.path)


@_rule("stop_gradient")
def _stop_gradient(ev: _Evaluation, eqn: Any, x: _Tracked) -> _Tracked:
    return _Tracked(jax.tree.map(lax.stop_gradient, x.leaf), x.path)


@_structural("transpose")
def _transpose(leaf: LoRA, permutation: Any) -> LoRA:
    return _ops.transpose(leaf, permutation)


@_rule("reshape", "squeeze", "expand_dims")
def _reshape(ev: _Evaluation, eqn: Any, x: _Tracked) -> _Tracked:
    return _Tracked(_ops.reshape(x.leaf, eqn.outvars[0].aval.shape), x.path)


@_rule("broadcast_in_dim")
def _broadcast(ev: _Evaluation, eqn: Any, x: _Tracked, *_: Any) -> _Tracked:
    shape = eqn.outvars[0].aval.shape
    dims = eqn.params["broadcast_dimensions"]
    return _Tracked(_ops.broadcast(x.leaf, shape, dims), x.path)


def _cut(leaf: LoRA, start: Any, limit: Any, strides: Any = None) -> LoRA:
    def cut(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        at = [(0, leaf.rank, 1) if k == _ops.RANK else
              (start[k], limit[k], strides[k] if strides else 1) for k in labels]
        return lax.slice(x, *zip(*at, strict=True)) if at else x

    return _ops.per_axis(leaf, cut)


@_structural("slice")
def _slice(leaf: LoRA, start_indices: Any, limit_indices: Any, strides: Any) -> LoRA:
    return _cut(leaf, start_indices, limit_indices, strides)


@_rule("split")
def _split(ev: _Evaluation, eqn: Any, x: _Tracked) -> list[_Tracked]:
    axis, outs, at = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        start = [at if k == axis else 0 for k in range(x.leaf.ndim)]
        limit = list(x.leaf.w.shape)
        limit[axis] = at = at + size
        outs.append(_Tracked(_cut(x.leaf, start, limit), x.path))
    return outs


@_rule("dynamic_slice")
def _dynamic_slice(ev: _Evaluation, eqn: Any, x: Any, *starts: Any) -> _Tracked:
    sizes = eqn.params["slice_sizes"]

    def cut(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        if not labels:
            return x
        at = [0 if k == _ops.RANK else starts[k] for k in labels]
        size = [x.shape[i] if k == _ops.RANK else sizes[k] for i, k in enumerate(labels)]
        return lax.dynamic_slice(x, [jnp.asarray(s, jnp.int32) for s in at], size)

    return _Tracked(_ops.per_axis(x.leaf, cut), x.path)


@_structural("rev")
def _rev(leaf: LoRA, dimensions: Any) -> LoRA:
    return _ops.per_axis(
        leaf, lambda x, ls: lax.rev(x, [i for i, k in enumerate(ls) if k in dimensions])
    )


@_rule("concatenate")
def _concatenate(ev: _Evaluation, eqn: Any, *parts: Any) -> _Tracked:
    return _joined(parts, eqn.params["dimension"])


@_rule("stack")
def _stack(ev: _Evaluation, eqn: Any, *parts: Any) -> _Tracked:
    axis = eqn.params.get("axis", 0)
    shape = eqn.outvars[0].aval.shape
    unit = (*shape[:axis], 1, *shape[axis + 1 :])
    expanded = [
        _Tracked(_ops.reshape(p.leaf, unit), p.path)
        if isinstance(p, _Tracked)
        else lax.reshape(p, unit)
        for p in parts
    ]
    return _joined(expanded, axis)


def _joined(parts: Sequence[Any], axis: int) -> _Tracked:
    paths = dict.fromkeys(p.path for p in parts if isinstance(p, _Tracked))
    leaf = _ops.concatenate(
        [p.leaf if isinstance(p, _Tracked) else p for p in parts], axis
    )
    return _Tracked(leaf, " + ".join(paths))


@_rule("mul", "div", "neg")
def _times_scalar(ev: _Evaluation, eqn: Any, *args: Any) -> _Tracked:
    """A weight times a number; anything larger is the fallback's."""
    x, rest = args[0], args[1:]
    if eqn.primitive.name == "mul" and not isinstance(x, _Tracked):
        x, rest = args[1], args[:1]
    if not isinstance(x, _Tracked) or any(
        isinstance(c, _Tracked) or np.ndim(c) for c in rest
    ):
        raise _ops.NotFactored
    w = _compat.bind(eqn, [v.leaf.w if v is x else v for v in args])[0]
    scale = x.leaf.scale
    by = [jnp.asarray(c, scale.dtype) for c in rest]
    scale = {"mul": jnp.multiply, "div": jnp.divide, "neg": jnp.negative}[
        eqn.primitive.name
    ](scale, *by)
    return _Tracked(dataclasses.replace(x.leaf, w=w, scale=scale), x.path)


# Higher order: rebuilt with JAX's own functions.


@_rule("jit", "pjit")
def _jit(ev: _Evaluation, eqn: Any, *args: Any) -> list[Any]:
    def fn(*args: Any) -> list[Any]:
        return ev.run(eqn.params["jaxpr"], args)

    fn.__name__ = eqn.params["name"]
    return jax.jit(fn, inline=eqn.params["inline"])(*args)


@_rule("closed_call", "core_call")
def _call(ev: _Evaluation, eqn: Any, *args: Any) -> list[Any]:
    return ev.run(eqn.params["call_jaxpr"], args)


@_rule("checkpoint", "remat2", "remat")
def _remat(ev: _Evaluation, eqn: Any, *args: Any) -> list[Any]:
    def fn(*args: Any) -> list[Any]:
        return ev.run(eqn.params["jaxpr"], args)

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(fn, policy=policy, prevent_cse=prevent_cse)(*args)


def _per_step(xs: Sequence[Any], step: Any) -> list[Any]:
    """The leaves that every step of a loop shares, with dropout keys of their own."""

    def fold(x: Any) -> Any:
        if not isinstance(x, _Tracked) or x.leaf.key is None:
            return x
        fold_in = jnp.vectorize(jax.random.fold_in, excluded={1})
        key = fold_in(x.leaf.key, step)
        return _Tracked(dataclasses.replace(x.leaf, key=key), x.path)

    return [fold(x) for x in xs]


class _Carry:
    """Splits a loop's carry: leaves that come back unchanged are constants of it."""

    def __init__(self, ev: _Evaluation, name: str, init: Sequence[Any], same: list[bool]):
        self.ev, self.name = ev, name
        self.fixed = {
            i: x
            for i, x in enumerate(init)
            if isinstance(x, _Tracked) and same[i]
        }
        self.init = self.moving(init)

    def moving(self, values: Sequence[Any]) -> list[Any]:
        return [
            self.ev.materialise(x, f"{self.name} (as a carry that changes)")
            for i, x in enumerate(values)
            if i not in self.fixed
        ]

    def whole(self, moving: Sequence[Any], fixed: Sequence[Any] | None = None) -> list:
        values, kept = iter(moving), iter(fixed or self.fixed.values())
        n = len(self.fixed) + len(moving)
        return [next(kept) if i in self.fixed else next(values) for i in range(n)]


@_rule("scan")
def _scan(ev: _Evaluation, eqn: Any, *args: Any) -> list[Any]:
    jaxpr, _ = _compat.jaxpr_and_consts(eqn.params["jaxpr"])
    n, m = _compat.scan_counts(eqn.params)
    consts, init, xs = args[:n], args[n : n + m], args[n + m :]
    ins = jaxpr.invars[n : n + m]
    carry = _Carry(
        ev, "scan", init, [i is o for i, o in zip(ins, jaxpr.outvars[:m], strict=True)]
    )
    xs = [
        ev.materialise(x, "scan (over an axis that is not a batch axis)")
        if isinstance(x, _Tracked) and x.leaf.axes[0] != "b"
        else x
        for x in xs
    ]

    def body(moving: Any, x: Any) -> tuple[Any, Any]:
        step, sliced = x
        fixed = _per_step(list(carry.fixed.values()), step)
        values = [*_per_step(consts, step), *carry.whole(moving, fixed), *sliced]
        outs = ev.run(eqn.params["jaxpr"], values)
        return carry.moving(outs[:m]), outs[m:]

    length = eqn.params["length"]
    moving, ys = lax.scan(
        body, carry.init, (jnp.arange(length), xs), length,
        reverse=eqn.params["reverse"], unroll=eqn.params["unroll"],
    )
    return [*carry.whole(moving), *ys]


@_rule("while")
def _while(ev: _Evaluation, eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = args[:n], args[n : n + m], args[n + m :]
    jaxpr, _ = _compat.jaxpr_and_consts(p["body_jaxpr"])
    carry = _Carry(
        ev, "while", init,
        [i is o for i, o in zip(jaxpr.invars[m:], jaxpr.outvars, strict=True)],
    )

    def values(consts: Sequence[Any], state: Any) -> list[Any]:
        step, moving = state
        fixed = _per_step(list(carry.fixed.values()), step)
        return [*_per_step(consts, step), *carry.whole(moving, fixed)]

    def cond(state: Any) -> Any:
        return ev.run(p["cond_jaxpr"], values(cond_consts, state))[0]

    def body(state: Any) -> Any:
        outs = ev.run(p["body_jaxpr"], values(body_consts, state))
        return state[0] + 1, carry.moving(outs)

    _, moving = lax.while_loop(cond, body, (0, carry.init))
    return carry.whole(moving)


@_rule("cond")
def _cond(ev: _Evaluation, eqn: Any, index: Any, *args: Any) -> list[Any]:
    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        def fn(*args: Any) -> list[Any]:
            outs = ev.run(jaxpr, args)
            return [ev.materialise(x, "cond (as an output)") for x in outs]

        return fn

    return lax.switch(index, [branch(j) for j in eqn.params["branches"]], *args)


# ------------------------------------------------------------------------- the surface


def _frozen(x: Any) -> Any:
    """stop_gradient on everything that does not train; see design invariant 4."""
    stop = lambda v: lax.stop_gradient(v) if jnp.issubdtype(v.dtype, jnp.inexact) else v
    if isinstance(x, LoRA):
        return dataclasses.replace(x, w=stop(x.w), scale=stop(x.scale))
    if isinstance(x, Full):
        return dataclasses.replace(x, w=stop(x.w))
    return stop(x)


def _lifted(
    fn: Callable[..., Any],
    ev: _Evaluation,
    args: Any,
    kwargs: Any,
    *,
    freeze: bool = True,
    must_use: bool = True,
) -> Any:
    """fn(*args, **kwargs) on hidden arguments, evaluated with the low-rank rules."""
    values: list[Any] = []

    def swap(tree: Any) -> Any:
        leaves, treedef = flatten(tree)
        adapted = freeze and any(is_adapted(x) for _, x in leaves)
        for path, x in leaves:
            x = _frozen(x) if adapted else x
            values.append(_Tracked(x, path) if is_adapted(x) else x)
        return jax.tree.unflatten(treedef, [
            x.w if is_adapted(x) else x for _, x in leaves
        ])

    args = [swap(a) for a in args]
    kwargs = {k: swap(v) for k, v in sorted(kwargs.items())}

    def plain(args: Any, kwargs: Any) -> Any:
        return hide(fn(*show(args), **show(kwargs)))

    jaxpr, out = jax.make_jaxpr(plain, return_shape=True)(args, kwargs)
    outs = ev.run(jaxpr, values)
    returned = [x for x in outs if isinstance(x, _Tracked)]
    unused = [v.path for v in values if isinstance(v, _Tracked)]
    if must_use and not ev.seen and not returned:
        raise ValueError(
            f"none of the {len(unused)} adapted leaves (the first is {unused[0]!r}) is "
            f"used by {_name(fn)}: expected it to read its weights from its arguments, "
            "found that it does not; it probably captured them by closure. Pass the "
            "tree to a function that takes the params as an argument."
        )
    outs = [x.leaf if isinstance(x, _Tracked) else x for x in outs]
    return jax.tree.unflatten(jax.tree.structure(out), outs)


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def _check(args: Any, kwargs: Any) -> bool:
    """Whether there is an adapted leaf; raises for one that is not whole."""
    found = False
    for arg in [*args, *kwargs.values()]:
        for path, x in flatten(arg)[0]:
            if not is_adapted(x):
                continue
            found = True
            missing = [
                f.name for f in dataclasses.fields(x)
                if f.name != "key" and getattr(x, f.name) is None
            ]
            if missing == ["w"]:
                raise ValueError(
                    f"{path!r} is an adapter without its base (w=None): put it back "
                    "with jlora.attach(params, adapter), or, if it is half of a "
                    "partition, with jlora.combine(trainable, frozen)."
                )
            if missing:
                raise ValueError(
                    f"{path!r} lacks {', '.join(missing)}: it is half of a partition; "
                    "put the halves together with jlora.combine(trainable, frozen)."
                )
    return found


def _lift(fn: Callable[..., Any], *, strict: bool = False, freeze: bool = True) -> Any:
    def hidden(args: Any, kwargs: Any) -> Any:
        return _lifted(fn, _Evaluation(strict), args, kwargs, freeze=freeze)

    # JAX's own trace cache: keyed by structure, avals, shardings and trace context.
    stage = jax.make_jaxpr(hidden, return_shape=True)

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        if not _check(args, kwargs):
            return fn(*args, **kwargs)
        args, kwargs = hide((args, kwargs))
        jaxpr, out = stage(args, kwargs)
        outs = _compat.evaluate(jaxpr, jax.tree.leaves((args, kwargs)))
        return show(jax.tree.unflatten(jax.tree.structure(out), outs))

    return lifted


def lift(fn: Callable[..., Any], *, strict: bool = False) -> Callable[..., Any]:
    """The same function, now also reading adapted leaves.

    lift(f)(t, x) equals f(merge(t), x), without forming W + scale·a·b: a product of x
    with a weight becomes x·w + (x·a)·(scale·b) (arXiv:2106.09685, eq. 3).

    The result is called exactly as ``fn`` is.  Only arrays and adapted leaves are
    traced, so ``fn`` may not branch on their values; everything else reaches it as it
    is.  In an argument that holds adapted leaves everything that does not train is
    under stop_gradient.  Without an adapted leaf among the arguments it is ``fn``.

    Args:
      fn: any function of pytrees, such as a Flax module's ``apply``.
      strict: raise where a weight would have to be materialised, instead of warning.

    Returns:
      A function with the signature of ``fn``.  Products keep the dtype that they had:
      a and b are cast to the activation's dtype and accumulated as the base product.

    Raises (when called):
      ValueError: a weight is used otherwise than planned; a leaf has no base; none of
        the adapted leaves is used; or, with strict, one would be materialised.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> lora = jlora.wrap(params, rank=2)
      >>> jlora.lift(f)(lora, jnp.ones((5, 3))).shape
      (5, 4)
    """
    return _lift(fn, strict=strict)


def lift_layer(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`lift` for a layer's own code: what trains is the caller's to say."""
    return _lift(fn, freeze=False)


def explain(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Report:
    """How ``lift(fn)(tree, *args, **kwargs)`` treats each adapted leaf of the tree.

    Nothing is computed: the arguments may be arrays or ``jax.ShapeDtypeStruct``s.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda params, x: x @ params["kernel"]
      >>> lora = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> print(jlora.explain(f, lora, jnp.ones((5, 3))))
      kernel  factored      dot_general
      1 factored
    """
    _check((tree, *args), kwargs)
    ev = _Evaluation(strict=False)
    hidden_args, hidden_kwargs = hide(((tree, *args), kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.make_jaxpr(functools.partial(_lifted, fn, ev, must_use=False))(
            hidden_args, hidden_kwargs
        )
    entries = []
    for path, x in flatten(tree)[0]:
        if is_adapted(x):
            # A leaf made of several (a fused qkv) is noted under all their paths.
            uses = [u for p, us in ev.seen.items() if path in p.split(" + ") for u in us]
            status = "unused" if not uses else (
                "materialised" if any(formed for _, formed in uses) else "factored"
            )
            entries.append(Entry(path, status, tuple(name for name, _ in uses)))
    return Report(tuple(entries))
