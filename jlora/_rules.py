"""How each primitive is evaluated where an operand is an adapted leaf.

A rule computes with (w, a, b).  Control flow is rebuilt with JAX's own functions,
through which adapted leaves travel as the pytrees that they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _algebra, _compat, _ops, _sharding
from jlora._evaluate import Evaluation, Tracked
from jlora._evaluate import rule as _rule
from jlora._leaf import Kernel, LoRA


def _compute(
    fn: Callable[..., jax.Array],
    ev: Evaluation,
    eqn: Any,
    x: Tracked,
    *others: jax.Array,
    **options: Any,
) -> jax.Array:
    """A use of a weight, with the path in the error where it contradicts its roles."""
    name = eqn.primitive.name
    if fn is not _ops.lookup:
        options |= ev.first_product(eqn, others[0])
        if x.leaf.rate:
            options["use"] = ev.uses[x.path]  # a mask of its own
    try:
        out = fn(x.leaf, *others, tuple(eqn.params.items()), **options)
    except _algebra.RolesError as e:
        raise ValueError(
            f"{x.path!r} was planned otherwise than it is used: {name} {e}. Plan it "
            "from the function that uses it, jlora.plan(fn, params, *args), or exclude "
            "the path."
        ) from None
    # A form without a low-rank use has its delta formed, as is its nature.
    ev.note(x, name, formed=isinstance(x.leaf.form, Kernel))
    return out


@_rule("dot_general")
def _dot_general(ev: Evaluation, eqn: Any, lhs: Any, rhs: Any) -> Any:
    first = isinstance(lhs, Tracked)
    if first and isinstance(rhs, Tracked):
        rhs = ev.materialise(rhs, "dot_general (with another adapted weight)")
    leaf, x = (lhs, rhs) if first else (rhs, lhs)
    return _compute(_ops.contract, ev, eqn, leaf, x, weight_first=first)


@_rule("conv_general_dilated")
def _conv(ev: Evaluation, eqn: Any, x: Any, kernel: Any) -> Any:
    if isinstance(x, Tracked):
        raise _algebra.NotFactored
    return _compute(_ops.conv, ev, eqn, kernel, x)


@_rule("ragged_dot_general")
def _ragged_dot(ev: Evaluation, eqn: Any, x: Any, w: Any, sizes: Any) -> Any:
    if isinstance(x, Tracked):
        raise _algebra.NotFactored
    return _compute(_ops.ragged, ev, eqn, w, x, sizes)


@_rule("gather")
def _gather(ev: Evaluation, eqn: Any, w: Any, indices: Any) -> Any:
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    at = _ops.indexed_axes(shape, eqn.params["dimension_numbers"], sizes)
    if all(w.leaf.axes[k] == "b" for k in at):
        return Tracked(_ops.take(w.leaf, indices, tuple(eqn.params.items())), w.path)
    return _compute(_ops.lookup, ev, eqn, w, indices)


# Structure: the leaf goes on as a leaf.


def _structural(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A rule of the form fn(leaf, **params), for a weight that is the only operand."""

    def register(fn: Callable[..., LoRA]) -> Callable[..., LoRA]:
        def rule(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
            return Tracked(fn(x.leaf, **eqn.params), x.path)

        _rule(*names)(rule)
        return fn

    return register


@_rule(
    "convert_element_type",
    "reduce_precision",
    "copy",
    "copy_p",
    "name",
    "device_put",
    "optimization_barrier",
)
def _base_only(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    """One output an operand, of the same value: it is the base that changes."""
    real = [not isinstance(v, Tracked) or v.leaf.w is not None for v in args]
    if len(args) == 1:
        outs = _bind(eqn, args)
    else:  # a barrier, which dropped bases need not wait at
        bound = iter(_bind(eqn, [v for v, r in zip(args, real, strict=True) if r]))
        outs = [next(bound) if r else v.leaf for v, r in zip(args, real, strict=True)]
    if not all(jnp.issubdtype(w.dtype, jnp.inexact) for w in outs):
        raise _algebra.NotFactored
    return [
        Tracked(_based(x.leaf, w), x.path) if isinstance(x, Tracked) else w
        for x, w in zip(args, outs, strict=True)
    ]


def _bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """The equation on the bases; where one was dropped, the shapes of what it gives."""
    values = [v.leaf.w if isinstance(v, Tracked) else v for v in args]
    for i, v in enumerate(args):
        if isinstance(v, Tracked) and v.leaf.w is None:

            def fn(w: Any, i: int = i) -> list[Any]:
                return _compat.bind(eqn, [*values[:i], w, *values[i + 1 :]])

            return _algebra.of_base(v.leaf, fn)
    return _compat.bind(eqn, values)


def _based(leaf: LoRA, w: Any) -> LoRA:
    """The leaf on another base; one that was dropped stays so, of w's dtype."""
    if leaf.w is None:
        return dataclasses.replace(leaf, dropped=w.dtype)
    return dataclasses.replace(leaf, w=w)


@_rule("sharding_constraint", "reshard")
def _reshard(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    """A weight that is to be sharded otherwise: its factors are to be as well."""
    w, sharding = _bind(eqn, [x])[0], _compat.target_sharding(eqn)

    def place(field: Any, own: Any) -> Any:
        if eqn.primitive.name == "reshard":  # perhaps into a mesh of other axis types
            return eqn.primitive.bind(field, **{**eqn.params, "dst_sharding": own})
        return lax.with_sharding_constraint(field, own)

    return Tracked(_placed(_based(x.leaf, w), sharding, place), x.path)


def _placed(leaf: Any, sharding: Any, place: Callable[[Any, Any], Any]) -> Any:
    """The leaf on a base that has this sharding; its factors get theirs of it."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return leaf
    own = _sharding.of_fields(leaf, sharding)
    fields = {
        name: place(x, getattr(own, name))
        for name in ("a", "b", "scale", "c", "value")
        if (x := getattr(leaf, name, None)) is not None
    }
    return dataclasses.replace(leaf, **fields)


@_rule("pvary", "pcast")
def _vary(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    """A weight that is to differ between devices: its factors are to as well."""

    def vary(field: jax.Array, labels: Sequence[int]) -> jax.Array:
        axes = {*eqn.params["axes"]} - _compat.varying(field)
        return lax.pcast(field, tuple(axes), to="varying") if axes else field

    return Tracked(_algebra.per_axis(x.leaf, vary), x.path)


@_rule("stop_gradient")
def _stop_gradient(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    return Tracked(jax.tree.map(lax.stop_gradient, x.leaf), x.path)


@_structural("transpose")
def _transpose(leaf: LoRA, permutation: Any) -> LoRA:
    return _algebra.transpose(leaf, permutation)


@_structural("squeeze")
def _squeeze(leaf: LoRA, dimensions: Any) -> LoRA:
    return _algebra.squeeze(leaf, dimensions)


@_rule("reshape", "expand_dims")
def _reshape(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    leaf, order = x.leaf, eqn.params.get("dimensions")
    if eqn.primitive.name == "reshape" and order is not None:
        leaf = _algebra.transpose(leaf, order)
    return Tracked(_algebra.reshape(leaf, eqn.outvars[0].aval.shape), x.path)


@_rule("broadcast_in_dim")
def _broadcast(ev: Evaluation, eqn: Any, x: Tracked, *_: Any) -> Tracked:
    shape = eqn.outvars[0].aval.shape
    dims = eqn.params["broadcast_dimensions"]
    return Tracked(_algebra.broadcast(x.leaf, shape, dims), x.path)


def _cut(leaf: LoRA, start: Any, limit: Any, strides: Any = None) -> LoRA:
    def cut(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        at = [
            (0, x.shape[i], 1)
            if k == _algebra.RANK
            else (start[k], limit[k], strides[k] if strides else 1)
            for i, k in enumerate(labels)
        ]
        return lax.slice(x, *zip(*at, strict=True)) if at else x

    return _algebra.per_axis(leaf, cut)


@_structural("slice")
def _slice(leaf: LoRA, start_indices: Any, limit_indices: Any, strides: Any) -> LoRA:
    return _cut(leaf, start_indices, limit_indices, strides)


@_rule("split")
def _split(ev: Evaluation, eqn: Any, x: Tracked) -> list[Tracked]:
    axis, outs, at = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        start = [at if k == axis else 0 for k in range(x.leaf.ndim)]
        limit = list(x.leaf.shape)
        limit[axis] = at = at + size
        outs.append(Tracked(_cut(x.leaf, start, limit), x.path))
    return outs


@_rule("unstack")
def _unstack(ev: Evaluation, eqn: Any, x: Tracked) -> list[Tracked]:
    axis, shape, outs = eqn.params["axis"], x.leaf.shape, []
    for at in range(shape[axis]):
        start = [at if k == axis else 0 for k in range(len(shape))]
        limit = [at + 1 if k == axis else n for k, n in enumerate(shape)]
        piece = _cut(x.leaf, start, limit)
        outs.append(Tracked(_algebra.squeeze(piece, [axis]), x.path))
    return outs


@_rule("dynamic_slice")
def _dynamic_slice(ev: Evaluation, eqn: Any, x: Any, *starts: Any) -> Any:
    sizes = eqn.params["slice_sizes"]

    def cut(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        if not labels:
            return x
        zero = jnp.zeros_like(starts[0])
        at = [zero if k == _algebra.RANK else starts[k] for k in labels]
        size = [
            x.shape[i] if k == _algebra.RANK else sizes[k] for i, k in enumerate(labels)
        ]
        # The primitive clamps; lax.dynamic_slice would wrap a negative start again.
        return eqn.primitive.bind(x, *at, slice_sizes=tuple(size))

    leaf = x.leaf
    full = zip(leaf.axes, sizes, leaf.shape, strict=True)
    roles = {role for role, size, n in full if role != "b" and size < n}
    whole = [size for role, size in zip(leaf.axes, sizes, strict=True) if role in roles]
    if len(roles) != 1 or any(size != 1 for size in whole):
        return Tracked(_algebra.per_axis(leaf, cut), x.path)
    if leaf.c is not None and roles == {"o"}:
        raise _algebra.NotFactored
    ev.note(x, "dynamic_slice")  # a lookup of one row
    row = _algebra.dense(_algebra.per_axis(dataclasses.replace(leaf, c=None), cut))
    if leaf.c is None:
        return row
    labels = _algebra.bias_labels(leaf.axes)
    c = cut(_algebra.scaled_c(leaf), labels)
    return row + _algebra.spread(c, labels, sizes, range(leaf.ndim)).astype(row.dtype)


@_rule("all_gather", "all_gather_invariant")
def _all_gather(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    """A sharded weight made whole (FSDP by hand): its factors are gathered instead."""
    axis = eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        raise _algebra.NotFactored

    def gather(field: jax.Array, labels: Sequence[int]) -> jax.Array:
        if axis not in labels:
            return field
        at = {"all_gather_dimension": list(labels).index(axis)}
        return eqn.primitive.bind(field, **{**eqn.params, **at})

    return Tracked(_algebra.per_axis(x.leaf, gather), x.path)


@_structural("rev")
def _rev(leaf: LoRA, dimensions: Any) -> LoRA:
    return _algebra.per_axis(
        leaf, lambda x, ls: lax.rev(x, [i for i, k in enumerate(ls) if k in dimensions])
    )


@_rule("concatenate")
def _concatenate(ev: Evaluation, eqn: Any, *parts: Any) -> Tracked:
    return _joined(parts, eqn.params["dimension"])


@_rule("stack")
def _stack(ev: Evaluation, eqn: Any, *parts: Any) -> Tracked:
    axis = eqn.params.get("axis", 0)
    shape = eqn.outvars[0].aval.shape
    unit = (*shape[:axis], 1, *shape[axis + 1 :])
    expanded = [
        Tracked(_algebra.reshape(p.leaf, unit), p.path)
        if isinstance(p, Tracked)
        else lax.reshape(p, unit)
        for p in parts
    ]
    return _joined(expanded, axis)


def _joined(parts: Sequence[Any], axis: int) -> Tracked:
    paths = dict.fromkeys(p.path for p in parts if isinstance(p, Tracked))
    leaf = _algebra.concatenate(
        [p.leaf if isinstance(p, Tracked) else p for p in parts], axis
    )
    return Tracked(leaf, " + ".join(paths))


_SCALAR: dict[str, Callable[..., jax.Array]] = {
    "mul": jnp.multiply,
    "div": jnp.divide,
    "neg": jnp.negative,
}


@_rule(*_SCALAR)
def _times_scalar(ev: Evaluation, eqn: Any, *args: Any) -> Tracked:
    """A weight times a number; anything larger is the fallback's."""
    x, rest = args[0], args[1:]
    if eqn.primitive.name == "mul" and not isinstance(x, Tracked):
        x, rest = args[1], args[:1]
    if not isinstance(x, Tracked) or any(
        isinstance(c, Tracked) or np.ndim(c) for c in rest
    ):
        raise _algebra.NotFactored
    w = _bind(eqn, args)[0]
    # The number goes into b and not into scale, which has no gradient: it may train.
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise _algebra.NotFactored
    dtypes = (w.dtype, x.leaf.b.dtype, jnp.dtype(jnp.float32))
    wide = max(dtypes, key=lambda dtype: dtype.itemsize)
    b = _SCALAR[eqn.primitive.name](
        *(jnp.asarray(x.leaf.b if v is x else v, wide) for v in args)
    )
    return Tracked(_based(dataclasses.replace(x.leaf, b=b), w), x.path)


# Higher order: rebuilt with JAX's own functions.


def _constrained(x: Any, sharding: Any) -> Any:
    """x under a sharding that an inner jit was given; of a leaf it is the base's."""
    place = _compat.place(sharding)
    if place is None:
        return x
    if not isinstance(x, Tracked):
        return place(x, sharding)
    leaf = x.leaf
    if leaf.w is not None:
        leaf = dataclasses.replace(leaf, w=place(leaf.w, sharding))
    return Tracked(_placed(leaf, sharding, place), x.path)


@_rule("jit", "pjit")
def _jit(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params

    def fn(*args: Any) -> list[Any]:
        args = tuple(map(_constrained, args, p["in_shardings"]))
        return list(map(_constrained, ev.run(p["jaxpr"], args), p["out_shardings"]))

    fn.__name__ = eqn.params["name"]
    return jax.jit(fn, inline=eqn.params["inline"])(*args)


@_rule("closed_call", "core_call")
def _call(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    return ev.run(eqn.params["call_jaxpr"], args)


@_rule("checkpoint", "remat2", "remat")
def _remat(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    def fn(*args: Any) -> list[Any]:
        return ev.run(eqn.params["jaxpr"], args)

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(fn, policy=policy, prevent_cse=prevent_cse)(*args)


def _per_step(xs: Sequence[Any], step: Any) -> list[Any]:
    """The leaves that every step of a loop shares, with dropout keys of their own."""

    def fold(x: Any) -> Any:
        if not isinstance(x, Tracked) or x.leaf.key is None:
            return x
        fold_in = jnp.vectorize(jax.random.fold_in, excluded={1})
        key = fold_in(x.leaf.key, step)
        return Tracked(dataclasses.replace(x.leaf, key=key), x.path)

    return [fold(x) for x in xs]


class _Carry:
    """Splits a loop's carry: leaves that come back unchanged are constants of it."""

    def __init__(
        self, ev: Evaluation, name: str, init: Sequence[Any], same: list[bool]
    ):
        self.ev, self.name = ev, name
        self.fixed = {
            i: x for i, x in enumerate(init) if isinstance(x, Tracked) and same[i]
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
def _scan(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    jaxpr, _ = _compat.jaxpr_and_consts(eqn.params["jaxpr"])
    n, m = _compat.scan_counts(eqn.params)
    consts, init, xs = args[:n], args[n : n + m], args[n + m :]
    ins = jaxpr.invars[n : n + m]
    carry = _Carry(
        ev, "scan", init, [i is o for i, o in zip(ins, jaxpr.outvars[:m], strict=True)]
    )
    xs = [
        ev.materialise(x, "scan (over an axis that is not a batch axis)")
        if isinstance(x, Tracked) and x.leaf.axes[0] != "b"
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
        body,
        carry.init,
        (jnp.arange(length), xs),
        length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry.whole(moving), *ys]


@_rule("while")
def _while(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = args[:n], args[n : n + m], args[n + m :]
    jaxpr, _ = _compat.jaxpr_and_consts(p["body_jaxpr"])
    carry = _Carry(
        ev,
        "while",
        init,
        [i is o for i, o in zip(jaxpr.invars[m:], jaxpr.outvars, strict=True)],
    )

    def values(consts: Sequence[Any], state: Any) -> list[Any]:
        step, moving = state
        fixed = _per_step(list(carry.fixed.values()), step)
        return [*_per_step(consts, step), *carry.whole(moving, fixed)]

    def going(state: Any) -> Any:
        return ev.run(p["cond_jaxpr"], values(cond_consts, state))[0]

    def cond(state: Any) -> Any:
        return jnp.any(going(state))

    def body(state: Any) -> Any:
        step, old = state
        new = carry.moving(ev.run(p["body_jaxpr"], values(body_consts, state)))
        # Under vmap there is a loop for each slice, and those that ended stay.
        if batched:
            on = going(state)
            new = [
                jnp.where(on.reshape(on.shape + (1,) * (x.ndim - on.ndim)), x, y)
                for x, y in zip(new, old, strict=True)
            ]
        return step + 1, new

    batched = _compat.jaxpr_and_consts(p["cond_jaxpr"])[0].outvars[0].aval.shape

    _, moving = lax.while_loop(cond, body, (0, carry.init))
    return carry.whole(moving)


@_rule("cond")
def _cond(ev: Evaluation, eqn: Any, index: Any, *args: Any) -> list[Any]:
    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        def fn(*args: Any) -> list[Any]:
            outs = ev.run(jaxpr, args)
            return [ev.materialise(x, "cond (as an output)") for x in outs]

        return fn

    return lax.switch(index, [branch(j) for j in eqn.params["branches"]], *args)


@_rule("shard_map")
def _shard_map(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    """Every device evaluates the body on its own shard of the weight and factors."""
    p = eqn.params

    def spec(x: Any, own: Any) -> Any:
        if not isinstance(x, Tracked):
            return own
        leaf, names = x.leaf, dict(enumerate(own))
        if isinstance(leaf, LoRA):
            cut = {role for k, role in enumerate(leaf.axes) if names.get(k)}
            # Factors of another form are whole; and of a sum over in axes every device
            # would add the output bias to its part.
            if (leaf.form and cut) or (leaf.c is not None and "i" in cut):
                raise _algebra.NotFactored
        return Tracked(_algebra.specs(leaf, own), x.path)

    def body(*args: Any) -> tuple[Any, ...]:
        outs = ev.run(p["jaxpr"], args)
        return tuple(ev.materialise(x, "shard_map (as an output)") for x in outs)

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(map(spec, args, p["in_specs"])),
        out_specs=tuple(p["out_specs"]),
        axis_names=_compat.manual_axes(p),
        check_vma=p["check_vma"],
    )
    return list(mapped(*args))
