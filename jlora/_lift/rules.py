"""The rules for single primitives: uses of an adapted leaf, and structure.

A rule computes with (w, a, b) through `_algebra`.  Loops and calls are in `control`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._algebra import rows, slots, structure
from jlora._algebra.concatenate import concatenate
from jlora._algebra.conv import conv
from jlora._algebra.delta import scaled
from jlora._algebra.dot import contract
from jlora._algebra.gather import indexed_axes, lookup, take
from jlora._algebra.ragged import ragged
from jlora._algebra.use import RolesError, TokensError
from jlora._algebra.weight import dense
from jlora._labels import RANK, spread
from jlora._leaf import Bare, LoRA, base, fields, forms
from jlora._leaf.forms import NotFactored
from jlora._lift.evaluate import Evaluation, Tracked, rule
from jlora._tree import sharding

# ---------------------------------------------------------------------------- uses


def _compute(
    fn: Callable[..., jax.Array],
    ev: Evaluation,
    eqn: Any,
    x: Tracked,
    *others: jax.Array,
    **options: Any,
) -> jax.Array:
    """A use of a weight; if the use contradicts its roles, the error names the path."""
    name = eqn.primitive.name
    if x.bare:
        raise NotFactored
    if ev.gate is not None:
        if fn not in (contract, lookup) or not ev.whole(x):
            raise NotFactored
        options["gate"] = ev.gate
    if fn is not lookup:
        options |= ev.first_product(eqn, others[0])
        if x.leaf.dropout is not None:
            options["nth"] = ev.uses[x.paths]  # another mask for each use
    try:
        out = fn(x.leaf, *others, tuple(eqn.params.items()), **options)
    except TokensError as e:
        raise ValueError(f"{x.name!r} is used by {name!r} {e}") from None
    except RolesError as e:
        raise ValueError(
            f"{x.name!r} was planned otherwise than it is used: {name} {e}. Plan it "
            "from the function that uses it, jlora.plan(fn, params, *args), or exclude "
            "the path."
        ) from None
    joins = fn in (contract, lookup) and ev.whole(x)
    rows = _met(eqn, others[0]) if joins else math.inf
    ev.note(x, name, formed=forms.of(x.leaf.form).formed, rows=rows)
    return out


def _met(eqn: Any, x: Any) -> float:
    """How many rows of an activation, or how many indices, meet a weight."""
    if not all(isinstance(n, int) for n in x.shape):  # symbolic, in an export
        return math.inf
    if eqn.primitive.name != "dot_general":
        return x.size
    (own, _), _ = eqn.params["dimension_numbers"]
    return x.size / math.prod(eqn.invars[0].aval.shape[k] for k in own)


@rule("dot_general")
def _dot_general(ev: Evaluation, eqn: Any, lhs: Any, rhs: Any) -> Any:
    if isinstance(lhs, Tracked) and isinstance(rhs, Tracked):
        other = "dot_general (with another adapted weight)"
        if lhs.bare:
            lhs = ev.materialise(lhs, other)
        else:
            rhs = ev.materialise(rhs, other)
    first = isinstance(lhs, Tracked)
    leaf, x = (lhs, rhs) if first else (rhs, lhs)
    if (slot := _slot(ev, eqn, leaf, x, first)) is not None:
        ev.note(leaf, "dot_general", rows=_met(eqn, x))
        return slots.contract(leaf.leaf, x, tuple(eqn.params.items()), slot)
    return _compute(contract, ev, eqn, leaf, x, weight_first=first, mixes=leaf.taken)


def _slot(ev: Evaluation, eqn: Any, w: Tracked, x: Any, first: bool) -> Any:
    """Where the factors of an untouched leaf are in a bank; None if it is not asked."""
    if w.at is None or w.coded or w.paths[0] not in ev.slots:
        return None
    params, slot = tuple(eqn.params.items()), ev.slots[w.paths[0]]
    return slot if slots.readable(w.leaf, x, params, first, slot) else None


@rule("conv_general_dilated")
def _conv(ev: Evaluation, eqn: Any, x: Any, kernel: Any) -> Any:
    if isinstance(x, Tracked):
        raise NotFactored
    return _compute(conv, ev, eqn, kernel, x)


@rule("ragged_dot_general")
def _ragged_dot(ev: Evaluation, eqn: Any, x: Any, w: Any, sizes: Any) -> Any:
    if isinstance(x, Tracked):
        raise NotFactored
    return _compute(ragged, ev, eqn, w, x, sizes)


@rule("gather")
def _gather(ev: Evaluation, eqn: Any, w: Any, indices: Any) -> Any:
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    at = indexed_axes(shape, eqn.params["dimension_numbers"], sizes)
    if all(w.leaf.axes[k] == "b" for k in at):
        if ev.gate is not None and not w.bare:
            raise NotFactored
        taken = take(w.leaf, indices, tuple(eqn.params.items()))
        if w.bare and len(eqn.params["dimension_numbers"].offset_dims) < 2:
            return base.array(taken.base)  # rows of a table are an activation
        return dataclasses.replace(w.now(taken), taken=True)
    return _compute(lookup, ev, eqn, w, indices)


# --------------------------------------------- structure: the result is a leaf again


@rule("convert_element_type", "reduce_precision", "name", *_compat.COPY)
def _base_only(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    """The value stays the same, so only the base changes."""
    w = base.valued(x.leaf.base, _compat.operation(eqn))
    if not jnp.issubdtype(w.dtype, jnp.inexact) and not x.coded:
        raise NotFactored
    return x.now(dataclasses.replace(x.leaf, w=w))


@rule("device_put")
def _device_put(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    """device_put of several operands: each parameter has an entry for each operand."""
    outs = []
    for i, x in enumerate(args):
        params = {k: (v[i],) for k, v in eqn.params.items()}
        (device,) = params["devices"]

        def put(x: Any, device: Any, params: Any = params) -> Any:
            return _compat.operation(eqn, params | {"devices": (device,)})(x)

        if isinstance(x, Tracked):
            w = base.placed(x.leaf.base, device, put)
            outs.append(x.now(dataclasses.replace(x.leaf, w=w)))
        else:
            outs.append(put(x, device))
    return outs


@rule("optimization_barrier")
def _barrier(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    """The arrays of the bases go through the barrier; the factors do not."""
    bases = [v.leaf.base if isinstance(v, Tracked) else v for v in args]
    arrays, treedef = jax.tree.flatten(bases)
    held = jax.tree.unflatten(treedef, _compat.rebind(eqn, arrays))
    return [
        v.now(dataclasses.replace(v.leaf, w=w)) if isinstance(v, Tracked) else w
        for v, w in zip(args, held, strict=True)
    ]


@rule(*_compat.RESHARD)
def _reshard(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    """A weight gets a new sharding, and so do its factors."""
    target = _compat.target_sharding(eqn)
    same = _compat.operation(eqn)

    def place(field: Any, own: Any) -> Any:
        if own is target:
            return same(field)
        if eqn.primitive.name == "reshard":  # it may change the axis types, too
            return eqn.primitive.bind(field, **{**eqn.params, "dst_sharding": own})
        return lax.with_sharding_constraint(field, own)

    w = base.placed(x.leaf.base, target, place)
    leaf = dataclasses.replace(x.leaf, w=w)
    return x.now(with_factors(leaf, target, place))


def with_factors(leaf: Any, wanted: Any, place: Callable[[Any, Any], Any]) -> Any:
    """The leaf with its fields placed to fit the sharding of its base.

    Args:
      leaf: a leaf whose base is placed already.
      wanted: the sharding of the base; without a mesh there is nothing to do.
      place: place(array, sharding) puts an array under a sharding.
    """
    if not isinstance(wanted, jax.sharding.NamedSharding):
        return leaf
    own = sharding.of_fields(leaf, wanted)
    placed = {
        name: jax.tree.map(place, getattr(leaf, name), getattr(own, name))
        for name in leaf.fields
    }
    return dataclasses.replace(leaf, **placed)


@rule(*_compat.VARY)
def _vary(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    """A weight is marked as varying between devices, and so are its factors."""

    def vary(field: jax.Array, labels: Sequence[int]) -> jax.Array:
        axes = {*eqn.params["axes"]} - _compat.varying(field)
        return lax.pcast(field, tuple(axes), to="varying") if axes else field

    return x.now(structure.per_axis(x.leaf, vary, of_base=base.fieldwise))


@rule("stop_gradient")
def _stop_gradient(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    return x.now(jax.tree.map(lax.stop_gradient, x.leaf))


@rule("transpose")
def _transpose(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    return x.now(structure.transpose(x.leaf, eqn.params["permutation"]))


@rule("squeeze")
def _squeeze(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    return x.now(structure.squeeze(x.leaf, eqn.params["dimensions"]))


@rule("reshape", "expand_dims")
def _reshape(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    leaf, order = x.leaf, eqn.params.get("dimensions")
    if eqn.primitive.name == "reshape" and order is not None:
        leaf = structure.transpose(leaf, order)
    return x.now(structure.reshape(leaf, eqn.outvars[0].aval.shape))


@rule("broadcast_in_dim")
def _broadcast(ev: Evaluation, eqn: Any, x: Tracked, *_: Any) -> Tracked:
    shape = eqn.outvars[0].aval.shape
    dims = eqn.params["broadcast_dimensions"]
    return x.now(structure.broadcast(x.leaf, shape, dims))


@rule("slice")
def _slice(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    p = eqn.params
    return x.now(_cut(x.leaf, p["start_indices"], p["limit_indices"], p["strides"]))


def _cut(leaf: LoRA, start: Any, limit: Any, strides: Any = None) -> LoRA:
    def cut(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        at = [
            (0, x.shape[i], 1)
            if k == RANK
            else (start[k], limit[k], strides[k] if strides else 1)
            for i, k in enumerate(labels)
        ]
        return lax.slice(x, *zip(*at, strict=True)) if at else x

    return structure.per_axis(leaf, cut)


@rule("split")
def _split(ev: Evaluation, eqn: Any, x: Tracked) -> list[Tracked]:
    axis, outs, at = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        start = [at if k == axis else 0 for k in range(x.leaf.ndim)]
        limit = list(x.leaf.shape)
        limit[axis] = at = at + size
        outs.append(x.now(_cut(x.leaf, start, limit)))
    return outs


@rule("unstack")
def _unstack(ev: Evaluation, eqn: Any, x: Tracked) -> list[Tracked]:
    axis, shape, outs = eqn.params["axis"], x.leaf.shape, []
    for at in range(shape[axis]):
        start = [at if k == axis else 0 for k in range(len(shape))]
        limit = [at + 1 if k == axis else n for k, n in enumerate(shape)]
        outs.append(x.now(structure.squeeze(_cut(x.leaf, start, limit), [axis])))
    return outs


@rule("dynamic_slice")
def _dynamic_slice(ev: Evaluation, eqn: Any, x: Any, *starts: Any) -> Any:
    sizes, leaf = eqn.params["slice_sizes"], x.leaf

    def cut(x: jax.Array, labels: Sequence[int], *starts: Any) -> jax.Array:
        if not labels:
            return x
        zero = jnp.zeros_like(starts[0])
        at = [zero if k == RANK else starts[k] for k in labels]
        size = [x.shape[i] if k == RANK else sizes[k] for i, k in enumerate(labels)]
        # Negative starts are wrapped already when they get here.  lax.dynamic_slice
        # would wrap them again; the primitive only clamps.
        return eqn.primitive.bind(x, *at, slice_sizes=tuple(size))

    if rows.replaces(leaf):
        return _rows(ev, eqn, x, starts)
    full = list(zip(leaf.axes, sizes, leaf.shape, strict=True))
    roles = {role for role, size, n in full if role != "b" and size < n}
    if len(roles) != 1 or any(size != 1 for role, size, _ in full if role in roles):
        return x.now(structure.per_axis(leaf, cut, *starts))
    if leaf.c is not None and roles == {"o"}:
        raise NotFactored
    if ev.gate is not None:
        raise NotFactored
    # A lookup of one row is cheap to merge.
    ev.note(x, "dynamic_slice")
    row = dense(structure.per_axis(dataclasses.replace(leaf, c=None), cut, *starts))
    if leaf.c is None:
        return row
    labels = fields.labels("c", leaf.axes)
    c = cut(scaled(leaf, "c"), labels, *starts)
    return row + spread(c, labels, sizes, range(leaf.ndim)).astype(row.dtype)


def _rows(ev: Evaluation, eqn: Any, x: Tracked, starts: Sequence[Any]) -> Any:
    """A slice of one row of a table, as a lookup."""
    sizes, shape, at = eqn.params["slice_sizes"], x.leaf.shape, x.leaf.axes.index("i")
    if any(n != (1 if k == at else shape[k]) for k, n in enumerate(sizes)):
        raise NotFactored
    numbers = lax.GatherDimensionNumbers(tuple(range(len(shape))), (), (at,))
    params = {
        "dimension_numbers": numbers,
        "slice_sizes": sizes,
        "indices_are_sorted": True,
        "unique_indices": True,
        "mode": lax.GatherScatterMode.CLIP,
        "fill_value": None,
    }
    ev.note(x, "dynamic_slice")
    return lookup(x.leaf, jnp.reshape(starts[at], 1), tuple(params.items()))


@rule(*_compat.ALL_GATHER)
def _all_gather(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    """A sharded weight is gathered (manual FSDP); so are its base and its factors."""
    axis = eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        raise NotFactored

    def gather(field: jax.Array, labels: Sequence[int]) -> jax.Array:
        if axis not in labels:
            return field
        at = {"all_gather_dimension": list(labels).index(axis)}
        return eqn.primitive.bind(field, **{**eqn.params, **at})

    return x.now(structure.per_axis(x.leaf, gather, of_base=base.fieldwise))


@rule("rev")
def _rev(ev: Evaluation, eqn: Any, x: Tracked) -> Tracked:
    dimensions = eqn.params["dimensions"]

    def rev(field: jax.Array, labels: Sequence[int]) -> jax.Array:
        return lax.rev(field, [i for i, k in enumerate(labels) if k in dimensions])

    return x.now(structure.per_axis(x.leaf, rev, of_base=base.along))


@rule("concatenate")
def _concatenate(ev: Evaluation, eqn: Any, *parts: Any) -> Tracked:
    return _joined(parts, eqn.params["dimension"])


@rule("stack")
def _stack(ev: Evaluation, eqn: Any, *parts: Any) -> Tracked:
    axis = eqn.params.get("axis", 0)
    shape = eqn.outvars[0].aval.shape
    unit = (*shape[:axis], 1, *shape[axis + 1 :])
    expanded = [
        p.now(structure.reshape(p.leaf, unit))
        if isinstance(p, Tracked)
        else lax.reshape(p, unit)
        for p in parts
    ]
    return _joined(expanded, axis)


def _joined(parts: Sequence[Any], axis: int) -> Tracked:
    paths = dict.fromkeys(
        path for p in parts if isinstance(p, Tracked) for path in p.paths
    )
    leaves = [p.leaf if isinstance(p, Tracked) else p for p in parts]
    leaves = [x.w if isinstance(x, Bare) else x for x in leaves]
    return Tracked(concatenate(leaves, axis), tuple(paths))


_TIMES: dict[str, Callable[..., jax.Array]] = {
    "mul": jnp.multiply,
    "div": jnp.divide,
    "neg": jnp.negative,
}


@rule("add", "sub")
def _decoded(ev: Evaluation, eqn: Any, *args: Any) -> Tracked:
    """What the user's function makes of codes, such as (w - zero) * scale.

    Raises:
      NotFactored: the weight is no array of codes.
    """
    (at, *more) = (i for i, v in enumerate(args) if isinstance(v, Tracked))
    x, op = args[at], _compat.operation(eqn)
    if more or not x.coded or eqn.outvars[0].aval.shape != x.leaf.shape:
        raise NotFactored

    def own(w: Any, *others: Any) -> Any:
        return op(*others[:at], w, *others[at:])

    others = [v for v in args if v is not x]
    w = base.then(x.leaf.base, own, *others)
    return x.now(dataclasses.replace(x.leaf, w=w))


@rule(*_TIMES)
def _times(ev: Evaluation, eqn: Any, *args: Any) -> Tracked:
    """A weight times or divided by a number, or by one for each of its ins or outs.

    The numbers go into one of the factors: into a if they differ along in axes, else
    into b.  They do not go into the scale, which has no gradient, since they may train.

    Raises:
      NotFactored: the numbers differ along in axes and along out axes, or a number is
        divided by a weight.
    """
    leaves = [i for i, v in enumerate(args) if isinstance(v, Tracked)]
    if leaves != [0] and (eqn.primitive.name != "mul" or len(leaves) > 1):
        raise NotFactored
    x = args[leaves[0]]
    leaf, others = x.leaf, [v for v in args if v is not x]
    if eqn.outvars[0].aval.shape != leaf.shape:  # an axis of size one was broadcast
        raise NotFactored
    w = base.then(leaf.base, _compat.operation(eqn), *others)
    if not jnp.issubdtype(w.dtype, jnp.floating) and not x.coded:
        raise NotFactored
    if x.bare or x.coded:
        return x.now(dataclasses.replace(leaf, w=w))
    found = [ev.unbroadcast(v) for i, v in enumerate(eqn.invars) if i not in leaves]
    varying = [k for _, axes in found for k in axes]
    roles = {leaf.axes[k] for k in varying}
    if {"i", "o"} <= roles or (varying and not forms.of(leaf.form).plain):
        raise NotFactored
    name = "a" if "i" in roles else "b"
    own = fields.labels(name, leaf.axes)
    shape = [leaf.shape[k] if k in varying else 1 for k in own]
    numbers = [spread(v, axes, shape, own) if axes else v for v, axes in found]
    factor = getattr(leaf, name)
    dtypes = (w.dtype, factor.dtype, jnp.dtype(jnp.float32))
    wide = max(dtypes, key=lambda dtype: dtype.itemsize)
    operands = (jnp.asarray(v, wide) for v in (factor, *numbers))
    factor = _TIMES[eqn.primitive.name](*operands)
    return x.now(dataclasses.replace(leaf, **{name: factor}, w=w))
