"""The algebra of a leaf: labels, forms, merging, and what an array's structure becomes.

Everything is written on labels: axis k of the weight is the label k, the axis that a
and b share is RANK, and axes that an activation brings count on from the weight's
ndim.  A field's labels say which axis of the weight each of its own axes is.

The other forms of a leaf (loralib's) have their own `delta`; what else has no code for
them uses `low_rank`.  What a weight's uses become is in `_ops`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._leaf import Blocks, Full, Kernel, LoRA

# Besides the weight's axes: what a and b share, the blocks of a fused weight, and the
# input features, groups and output features of a group of a convolution.
RANK, BLOCK, IN, GROUP, OUT = -1, -2, -3, -4, -5


class NotFactored(Exception):
    """This use has no low-rank form; the weight has to be materialised."""


class RolesError(ValueError):
    """This use contradicts the roles that the weight's axes were given."""


# ---------------------------------------------------------------------------- labels


def labels_of(axes: str) -> tuple[list[int], list[int], list[int]]:
    """The labels of a, of b and of scale."""
    batch, in_, out = ([k for k, c in enumerate(axes) if c == role] for role in "bio")
    return [*batch, *in_, RANK], [*batch, RANK, *out], batch


def scaled_b(leaf: LoRA) -> jax.Array:
    """scale * b.  Scaling the factor costs nothing per token and rounds once.

    The scale is data that does not train.
    """
    missing = range(leaf.scale.ndim, leaf.b.ndim)
    scale = lax.expand_dims(lax.stop_gradient(leaf.scale), missing)
    wide = wider(leaf.b, scale)
    return leaf.b.astype(wide) * scale.astype(wide)


def dot(
    x: jax.Array,
    xl: Sequence[int],
    y: jax.Array,
    yl: Sequence[int],
    keep: set[int],
    **params: Any,
) -> tuple[jax.Array, list[int]]:
    """dot_general on labels: what x and y share outside ``keep`` is summed over.

    Returns the product and its labels, in dot_general's own order.
    """
    batch = [k for k in xl if k in yl and k in keep]
    summed = [k for k in xl if k in yl and k not in keep]
    dims = (
        ([xl.index(k) for k in summed], [yl.index(k) for k in summed]),
        ([xl.index(k) for k in batch], [yl.index(k) for k in batch]),
    )
    rest = [k for k in [*xl, *yl] if k not in batch and k not in summed]
    return lax.dot_general(x, y, dims, **params), [*batch, *rest]


def order(x: jax.Array, labels: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """x with its axes in the wanted order."""
    if list(labels) == list(wanted):
        return x
    return lax.transpose(x, [labels.index(k) for k in wanted])


def wider(x: Any, y: Any) -> Any:
    """The dtype of x or y that has more bits."""
    return max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)


# --------------------------------------------------------------------------- merging


def delta(leaf: LoRA) -> jax.Array:
    """scale * a·b in the weight's shape and the factors' dtype, at full precision."""
    la, lb, batch = labels_of(leaf.axes)
    weight = range(leaf.ndim)
    if isinstance(leaf.form, Kernel):
        sizes, n = leaf.w.shape[-4:], len(batch)
        product = jnp.matmul(leaf.a, scaled_b(leaf), precision="highest")
        oihw = product.mT.reshape(*product.shape[:n], sizes[3], sizes[2], *sizes[:2])
        return jnp.moveaxis(oihw, (n, n + 1), (n + 3, n + 2))
    if isinstance(leaf.form, Blocks):
        la, lb = block_labels(la, batch), block_labels(lb, batch)
    out, labels = dot(
        leaf.a, la, scaled_b(leaf), lb, {*weight, BLOCK}, precision="highest"
    )
    if isinstance(leaf.form, Blocks):
        return placed(leaf, out, labels, weight)
    return order(out, labels, weight)


def block_labels(labels: list[int], batch: list[int]) -> list[int]:
    return [*labels[: len(batch)], BLOCK, *labels[len(batch) :]]


def placed(
    leaf: LoRA, d: jax.Array, labels: Sequence[int], out: Sequence[int]
) -> jax.Array:
    """The products of the blocks in their slices of the first out axis, else zeros."""
    assert isinstance(leaf.form, Blocks)
    first = leaf.axes.index("o")
    at = list(out).index(first)
    d = order(d, labels, [*out[:at], BLOCK, *out[at:]])
    blocks = iter(jnp.split(d, d.shape[at], axis=at))
    zeros = jnp.zeros_like(d[(slice(None),) * at + (slice(1),)])
    flags = leaf.form.enabled
    d = lax.concatenate([next(blocks) if f else zeros for f in flags], at)
    return d.reshape(*d.shape[:at], -1, *d.shape[at + 2 :])


def low_rank(leaf: LoRA) -> LoRA:
    """The leaf in the form that everything here is written for: a is (*batch, *in, r).

    Blocks become one pair of factors, the second of them block-diagonal.

    Raises:
      NotFactored: the form has none.
    """
    if leaf.form is None:
        return leaf
    if isinstance(leaf.form, Kernel):
        raise NotFactored
    la, lb, batch = labels_of(leaf.axes)
    n, flags, rank = len(batch), leaf.form.enabled, leaf.rank
    slots = [slot for slot, flag in enumerate(flags) if flag]
    a = jnp.moveaxis(leaf.a, n, -2)
    a = a.reshape(*a.shape[:-2], len(slots) * rank)
    columns = n + 1  # where b has the first out axis, once a block is taken out
    size = leaf.b.shape[columns + 1]
    padded = []
    for i, slot in enumerate(slots):
        block = lax.index_in_dim(leaf.b, i, n, keepdims=False)
        pads = [(0, 0, 0)] * block.ndim
        pads[columns] = (slot * size, (len(flags) - 1 - slot) * size, 0)
        padded.append(lax.pad(block, jnp.zeros((), block.dtype), pads))
    return dataclasses.replace(leaf, a=a, b=jnp.concatenate(padded, n), form=None)


def in_low_rank(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Calls fn with its leaf in the plain form."""

    @functools.wraps(fn)
    def call(leaf: LoRA, *args: Any, **kwargs: Any) -> Any:
        return fn(low_rank(leaf), *args, **kwargs)

    return call


def dense(leaf: LoRA | Full) -> jax.Array:
    """The merged weight, computed in float32 (or wider) and rounded once."""
    if isinstance(leaf, Full):
        return leaf.value.astype(leaf.w.dtype)
    d = delta(leaf)
    wide = wider(leaf.w, d)
    return (leaf.w.astype(wide) + d.astype(wide)).astype(leaf.w.dtype)


# ------------------------------------------------- structure: a leaf in, a leaf out


def _fields(leaf: LoRA, w: Any, axes: str, fn: Callable[..., Any]) -> LoRA:
    """The leaf of weight w and roles ``axes``, with fn(field, labels) for the rest."""
    la, lb, ls = labels_of(leaf.axes)
    return dataclasses.replace(
        leaf,
        w=w,
        a=fn(leaf.a, la),
        b=fn(leaf.b, lb),
        scale=fn(leaf.scale, ls),
        key=None if leaf.key is None else fn(leaf.key, ls),
        roles=axes.lstrip("b"),
    )


def _refit(leaf: LoRA, w: jax.Array, axes: str) -> LoRA:
    """The leaf of a reshaped w, where no role's axes changed their order."""
    size = dict(enumerate(w.shape)) | {RANK: leaf.rank}
    la, lb, ls = ([size[k] for k in labels] for labels in labels_of(axes))
    return dataclasses.replace(
        leaf,
        w=w,
        a=leaf.a.reshape(la),
        b=leaf.b.reshape(lb),
        scale=leaf.scale.reshape(ls),
        key=None if leaf.key is None else leaf.key.reshape(ls),
        roles=axes.lstrip("b"),
    )


def with_units(leaf: LoRA, wanted: str) -> LoRA:
    """The same leaf with the wanted roles where an axis is of size one."""
    triples = zip(leaf.w.shape, leaf.axes, wanted, strict=True)
    return _refit(leaf, leaf.w, "".join(v if n == 1 else r for n, r, v in triples))


def blocks(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest pairs of runs of axes that a reshape turns into each other.

    Axes of size one are in no block.

    Example:
      >>> blocks((6, 1, 35), (2, 3, 5, 7))
      [((0,), (0, 1)), ((2,), (2, 3))]
    """
    todo = [[k for k, n in enumerate(s) if n != 1] for s in (old, new)]
    out = []
    while todo[0] and todo[1]:
        left, right = [todo[0].pop(0)], [todo[1].pop(0)]
        while (p := math.prod(old[k] for k in left)) != (
            q := math.prod(new[k] for k in right)
        ):
            if p < q:
                left.append(todo[0].pop(0))
            else:
                right.append(todo[1].pop(0))
        out.append((tuple(left), tuple(right)))
    return out


@in_low_rank
def transpose(leaf: LoRA, permutation: Sequence[int]) -> LoRA:
    """lax.transpose."""
    axes = "".join(leaf.axes[k] for k in permutation)
    place = {k: at for at, k in enumerate(permutation)} | {RANK: RANK}

    def move(x: jax.Array, labels: list[int]) -> jax.Array:
        new = [place[k] for k in labels]
        wanted = next(ls for ls in labels_of(axes) if sorted(ls) == sorted(new))
        return order(x, new, wanted)

    return _fields(leaf, lax.transpose(leaf.w, permutation), axes, move)


@in_low_rank
def reshape(leaf: LoRA, shape: Sequence[int]) -> LoRA:
    """lax.reshape, where it mixes no axes of different roles.

    An axis of size one becomes a batch axis, which any use takes as it needs.
    """
    axes = ["b"] * len(shape)
    if 0 in shape:
        raise NotFactored
    for left, right in blocks(leaf.w.shape, shape):
        roles = {leaf.axes[k] for k in left}
        if len(roles) > 1:
            raise NotFactored
        for k in right:
            (axes[k],) = roles
    return _refit(leaf, lax.reshape(leaf.w, shape), "".join(axes))


@in_low_rank
def squeeze(leaf: LoRA, dimensions: Sequence[int]) -> LoRA:
    """lax.squeeze; the axes that stay keep their roles."""
    axes = "".join(c for k, c in enumerate(leaf.axes) if k not in dimensions)
    return _refit(leaf, lax.squeeze(leaf.w, dimensions), axes)


@in_low_rank
def broadcast(leaf: LoRA, shape: Sequence[int], dimensions: Sequence[int]) -> LoRA:
    """lax.broadcast_in_dim; an axis that is new, or that grows, is a batch axis."""
    old = list(zip(leaf.w.shape, leaf.axes, dimensions, strict=True))
    leaf = with_units(leaf, "".join(c if n == shape[k] else "b" for n, c, k in old))
    units, axes = [1] * len(shape), ["b"] * len(shape)
    for n, c, k in zip(leaf.w.shape, leaf.axes, dimensions, strict=True):
        units[k], axes[k] = n, c
    leaf = _refit(leaf, lax.reshape(leaf.w, units), "".join(axes))

    def grow(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        sizes = [leaf.rank if k == RANK else shape[k] for k in labels]
        return lax.broadcast_in_dim(x, sizes, range(len(sizes)))

    leaf = _fields(leaf, grow(leaf.w, range(len(shape))), leaf.axes, grow)
    return dataclasses.replace(leaf, key=_fold_in(leaf.key, None))


@in_low_rank
def per_axis(leaf: LoRA, fn: Callable[..., Any]) -> LoRA:
    """An operation that acts on each axis by itself: slice, rev, dynamic_slice.

    fn(field, labels) is called on every field, base included.
    """
    return _fields(leaf, fn(leaf.w, range(leaf.ndim)), leaf.axes, fn)


def specs(leaf: LoRA | Full, spec: Any) -> Any:
    """The leaf with the PartitionSpec of each field, where its weight has ``spec``.

    A field's axes are those of the weight, sharded alike; the rank is whole.
    """
    if isinstance(leaf, Full):
        return dataclasses.replace(leaf, w=spec, value=spec)
    names = dict(enumerate(spec))

    def own(labels: Sequence[int]) -> Any:
        return jax.sharding.PartitionSpec(*(names.get(k) for k in labels))

    la, lb, ls = labels_of(leaf.axes)
    if leaf.form is not None:  # small, and whole on every device
        if any(names.values()):
            raise NotFactored
        la = lb = []
    return dataclasses.replace(
        leaf,
        w=spec,
        a=own(la),
        b=own(lb),
        scale=own(ls),
        key=None if leaf.key is None else own(ls),
    )


def _fold_in(key: Any, data: int | None) -> Any:
    """Every key of a leaf's stack folded with ``data``, or with its own position."""
    if key is None:
        return None
    at = jnp.arange(key.size) if data is None else jnp.full(key.size, data)
    return jax.vmap(jax.random.fold_in)(key.reshape(-1), at).reshape(key.shape)


def concatenate(parts: Sequence[LoRA | jax.Array], axis: int) -> LoRA:
    """lax.concatenate of weights, some of them adapted.

    Along a batch axis the factors are concatenated.  Along an in or out axis the ranks
    add up: one factor is concatenated along the rank, the other is block-diagonal.
    """
    adapted = [low_rank(p) for p in parts if isinstance(p, LoRA)]
    model = adapted[0]

    def role(k: int) -> str:
        """What the parts make of an axis: one of size one has no say."""
        roles = [p.axes[k] for p in adapted if p.w.shape[k] != 1]
        return min(roles or [p.axes[k] for p in adapted], key="iob".index)

    axes = "".join(map(role, range(model.ndim)))
    leaves = [with_units(_as_leaf(p, axes), axes) for p in parts]
    model = dataclasses.replace(model, roles=axes.lstrip("b"))
    dropouts = {(p.rate, p.key is None) for p in leaves if p.rank}
    if any(p.axes != axes for p in leaves) or len(dropouts) > 1:
        raise NotFactored
    w = lax.concatenate([p.w for p in leaves], axis)
    # A mask of its own for each part of a stack, and for a product of several weights.
    keys = [_fold_in(p.key, i) for i, p in enumerate(leaves) if p.key is not None]
    dtype = max((p.a.dtype for p in leaves), key=lambda dtype: dtype.itemsize)
    leaves = [
        dataclasses.replace(p, a=p.a.astype(dtype), b=p.b.astype(dtype)) for p in leaves
    ]
    la, lb, ls = labels_of(axes)
    ranks = [p.rank for p in leaves]

    def spread(x: jax.Array, labels: list[int], before: int, after: int) -> jax.Array:
        pads = [(before, after, 0) if k == RANK else (0, 0, 0) for k in labels]
        return lax.pad(x, jnp.zeros((), x.dtype), pads)

    if axes[axis] == "b":
        top = max(ranks)
        pairs = [
            (spread(p.a, la, 0, top - p.rank), spread(p.b, lb, 0, top - p.rank))
            for p in leaves
        ]
        a = lax.concatenate([a for a, _ in pairs], la.index(axis))
        b = lax.concatenate([b for _, b in pairs], lb.index(axis))
        scale = lax.concatenate([p.scale for p in leaves], ls.index(axis))
        key = None
        if keys:
            if len(keys) < len(leaves):
                raise NotFactored
            key = jnp.concatenate(keys, ls.index(axis))
        return dataclasses.replace(model, w=w, a=a, b=b, scale=scale, key=key)

    def diagonal(fields: list[jax.Array], labels: list[int]) -> jax.Array:
        ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
        padded = [
            spread(f, labels, end - r, ends[-1] - end)
            for f, r, end in zip(fields, ranks, ends, strict=True)
        ]
        return lax.concatenate(padded, labels.index(axis))

    fields_a, fields_b = [p.a for p in leaves], [scaled_b(p) for p in leaves]
    if axes[axis] == "o":
        a = lax.concatenate(fields_a, la.index(RANK))
        b = diagonal(fields_b, lb)
    else:
        a = diagonal(fields_a, la)
        b = lax.concatenate(fields_b, lb.index(RANK))
    one = jnp.ones_like(leaves[0].scale)
    return dataclasses.replace(
        model, w=w, a=a, b=b, scale=one, key=keys[0] if keys else None
    )


def _as_leaf(x: LoRA | jax.Array, axes: str) -> LoRA:
    """A plain array as a leaf of rank zero, of these roles."""
    if isinstance(x, LoRA):
        return low_rank(x)
    size = dict(enumerate(x.shape)) | {RANK: 0}
    la, lb, ls = ([size[k] for k in labels] for labels in labels_of(axes))
    zeros, one = jnp.zeros, jnp.ones(ls, jnp.float32)
    return LoRA(x, zeros(la), zeros(lb), one, roles=axes.lstrip("b"))
