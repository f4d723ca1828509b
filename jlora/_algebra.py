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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._leaf import Blocks, Full, Kernel, LoRA
from jlora._product import product

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


def bias_labels(axes: str) -> list[int]:
    """The labels of c: batch, then out."""
    return [k for k in labels_of(axes)[1] if k != RANK]


def scaled_b(leaf: LoRA) -> jax.Array:
    """scale * b.  Scaling the factor costs nothing per token and rounds once."""
    return _scaled(leaf, leaf.b)


def scaled_c(leaf: LoRA) -> jax.Array:
    """scale * c, of a leaf that has one."""
    return _scaled(leaf, leaf.c)


def _scaled(leaf: LoRA, field: jax.Array) -> jax.Array:
    """scale * field.  The scale is data that does not train."""
    scale = lax.stop_gradient(leaf.scale)
    if scale.ndim:  # of a stack; a scalar needs no axes
        scale = lax.expand_dims(scale, range(scale.ndim, field.ndim))
    wide = wider(field, scale)
    return field.astype(wide) * scale.astype(wide)


def of_base(leaf: LoRA, fn: Callable[[Any], Any]) -> Any:
    """fn of the base array; of one that was dropped, the result's shape and dtype."""
    if leaf.w is not None:
        return fn(leaf.w)
    return jax.eval_shape(fn, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def plus(base: Any, h: jax.Array) -> jax.Array:
    """The base's product, of which `of_base` may only know the shape, and the delta's.

    A base that was dropped is zero.
    """
    h = h.astype(base.dtype)
    return h if isinstance(base, jax.ShapeDtypeStruct) else base + h


def with_output_bias(
    leaf: LoRA, h: jax.Array, hl: list[int], factor: jax.Array, fl: list[int]
) -> tuple[jax.Array, jax.Array]:
    """x·a with a one beside its ranks, and scale * b with scale * c as one more row.

    So the output bias goes wherever the second product goes, and needs none of its own.
    """
    if leaf.c is None:
        return h, factor
    at = hl.index(RANK)
    one = jnp.ones_like(lax.slice_in_dim(h, 0, 1, axis=at))
    row = lax.expand_dims(scaled_c(leaf), [fl.index(RANK)]).astype(factor.dtype)
    return (
        lax.concatenate([h, one], at),
        lax.concatenate([factor, row], fl.index(RANK)),
    )


def spread(
    x: jax.Array, labels: Sequence[int], shape: Sequence[int], out: Sequence[int]
) -> jax.Array:
    """x broadcast to an array of this shape whose axes are ``out``."""
    wanted = [k for k in out if k in labels]
    x = order(x, labels, wanted)
    return lax.broadcast_in_dim(x, shape, [list(out).index(k) for k in wanted])


def dot(
    x: jax.Array,
    xl: Sequence[int],
    y: jax.Array,
    yl: Sequence[int],
    keep: set[int],
    sharding: tuple[Any, Sequence[int]] = (None, ()),
    **params: Any,
) -> tuple[jax.Array, list[int]]:
    """dot_general on labels: what x and y share outside ``keep`` is summed over.

    ``sharding`` is one that was asked for, and the labels of the array that it is for;
    of the product those axes get it that it has, too.

    Returns the product and its labels, in dot_general's own order.
    """
    batch = [k for k in xl if k in yl and k in keep]
    summed = [k for k in xl if k in yl and k not in keep]
    dims = (
        (tuple(map(xl.index, summed)), tuple(map(yl.index, summed))),
        (tuple(map(xl.index, batch)), tuple(map(yl.index, batch))),
    )
    rest = [k for k in [*xl, *yl] if k not in batch and k not in summed]
    labels, (wanted, places) = [*batch, *rest], sharding
    if wanted is not None:
        names = dict(zip(places, wanted.spec, strict=False))
        spec = jax.sharding.PartitionSpec(*map(names.get, labels))
        params["out_sharding"] = jax.NamedSharding(wanted.mesh, spec)
    params["dimension_numbers"] = dims
    return product(x, y, tuple(params.items())), labels


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
        sizes, n = leaf.shape[-4:], len(batch)
        ab = jnp.matmul(leaf.a, scaled_b(leaf), precision="highest")
        oihw = ab.mT.reshape(*ab.shape[:n], sizes[3], sizes[2], *sizes[:2])
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
        return leaf.value.astype(leaf.dtype)
    d = delta(leaf)
    if leaf.w is None:
        return d.astype(leaf.dtype)
    wide = wider(leaf.w, d)
    return (leaf.w.astype(wide) + d.astype(wide)).astype(leaf.w.dtype)


# ------------------------------------------------- structure: a leaf in, a leaf out


def _fields(
    leaf: LoRA, base: Callable[[Any], Any], axes: str, fn: Callable[..., Any]
) -> LoRA:
    """The leaf of roles ``axes``: base(w), and fn(field, labels) of the rest."""
    la, lb, ls = labels_of(leaf.axes)

    def optional(x: Any, labels: list[int]) -> Any:
        return None if x is None else fn(x, labels)

    return dataclasses.replace(
        leaf,
        w=None if leaf.w is None else base(leaf.w),
        a=fn(leaf.a, la),
        b=fn(leaf.b, lb),
        scale=fn(leaf.scale, ls),
        c=optional(leaf.c, bias_labels(leaf.axes)),
        key=optional(leaf.key, ls),
        roles=axes.lstrip("b"),
    )


def _refit(leaf: LoRA, shape: Sequence[int], axes: str) -> LoRA:
    """The leaf reshaped, where no role's axes changed their order."""
    size = dict(enumerate(shape)) | {RANK: leaf.rank}

    def fit(x: Any, labels: Sequence[int]) -> Any:
        return None if x is None else x.reshape([size[k] for k in labels])

    la, lb, ls = labels_of(axes)
    return dataclasses.replace(
        leaf,
        w=None if leaf.w is None else lax.reshape(leaf.w, shape),
        a=fit(leaf.a, la),
        b=fit(leaf.b, lb),
        scale=fit(leaf.scale, ls),
        c=fit(leaf.c, bias_labels(axes)),
        key=fit(leaf.key, ls),
        roles=axes.lstrip("b"),
    )


def with_units(leaf: LoRA, wanted: str) -> LoRA:
    """The same leaf with the wanted roles where an axis is of size one."""
    triples = zip(leaf.shape, leaf.axes, wanted, strict=True)
    return _refit(leaf, leaf.shape, "".join(v if n == 1 else r for n, r, v in triples))


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
        fields = (*labels_of(axes), bias_labels(axes))
        wanted = next(ls for ls in fields if sorted(ls) == sorted(new))
        return order(x, new, wanted)

    return _fields(leaf, lambda w: lax.transpose(w, permutation), axes, move)


@in_low_rank
def reshape(leaf: LoRA, shape: Sequence[int]) -> LoRA:
    """lax.reshape, where it mixes no axes of different roles.

    An axis of size one becomes a batch axis, which any use takes as it needs.
    """
    axes = ["b"] * len(shape)
    if 0 in shape:
        raise NotFactored
    for left, right in blocks(leaf.shape, shape):
        roles = {leaf.axes[k] for k in left}
        if len(roles) > 1:
            raise NotFactored
        for k in right:
            (axes[k],) = roles
    return _refit(leaf, shape, "".join(axes))


@in_low_rank
def squeeze(leaf: LoRA, dimensions: Sequence[int]) -> LoRA:
    """lax.squeeze; the axes that stay keep their roles."""
    kept = [k for k in range(leaf.ndim) if k not in dimensions]
    axes = "".join(leaf.axes[k] for k in kept)
    return _refit(leaf, [leaf.shape[k] for k in kept], axes)


@in_low_rank
def broadcast(leaf: LoRA, shape: Sequence[int], dimensions: Sequence[int]) -> LoRA:
    """lax.broadcast_in_dim; an axis that is new, or that grows, is a batch axis."""
    old = list(zip(leaf.shape, leaf.axes, dimensions, strict=True))
    leaf = with_units(leaf, "".join(c if n == shape[k] else "b" for n, c, k in old))
    units, axes = [1] * len(shape), ["b"] * len(shape)
    for n, c, k in zip(leaf.shape, leaf.axes, dimensions, strict=True):
        units[k], axes[k] = n, c
    leaf = _refit(leaf, units, "".join(axes))

    def grow(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        sizes = [leaf.rank if k == RANK else shape[k] for k in labels]
        return lax.broadcast_in_dim(x, sizes, range(len(sizes)))

    leaf = _fields(leaf, lambda w: grow(w, range(len(shape))), leaf.axes, grow)
    return dataclasses.replace(leaf, key=_fold_in(leaf.key, None))


@in_low_rank
def per_axis(leaf: LoRA, fn: Callable[..., Any]) -> LoRA:
    """An operation that acts on each axis by itself: slice, rev, dynamic_slice.

    fn(field, labels) is called on every field, base included.

    Raises:
      NotFactored: it cuts an in axis of a weight with an output bias, which belongs to
        the whole product.
    """
    part = _fields(leaf, lambda w: fn(w, range(leaf.ndim)), leaf.axes, fn)
    if leaf.c is not None:
        ins = [k for k, c in enumerate(leaf.axes) if c == "i"]
        if any(part.shape[k] < leaf.shape[k] for k in ins):
            raise NotFactored
    return part


def specs(leaf: LoRA | Full, spec: Iterable[Any]) -> Any:
    """The leaf with the PartitionSpec of each field, where its weight has ``spec``.

    A field's axes are those of the weight, sharded alike; the rank is whole.  Factors
    of another form are small, and whole on every device.
    """
    whole = jax.sharding.PartitionSpec(*spec)
    if isinstance(leaf, Full):
        return Full(None if leaf.w is None else whole, whole)
    names = dict(enumerate(spec))

    def own(field: Any, labels: Sequence[int]) -> Any:
        if field is None:
            return None
        return jax.sharding.PartitionSpec(*(names.get(k) for k in labels))

    la, lb, ls = labels_of(leaf.axes)
    lc, plain = bias_labels(leaf.axes), leaf.form is None
    each = leaf.mean is not None and leaf.mean.ndim > len(ls)  # of the outputs
    return dataclasses.replace(
        leaf,
        w=None if leaf.w is None else whole,
        a=own(leaf.a, la if plain else []),
        b=own(leaf.b, lb if plain else []),
        scale=own(leaf.scale, ls),
        c=own(leaf.c, lc),
        key=own(leaf.key, ls),
        mean=own(leaf.mean, lc if each else ls),
        std=own(leaf.std, lc if each else ls),
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
        roles = [p.axes[k] for p in adapted if p.shape[k] != 1]
        return min(roles or [p.axes[k] for p in adapted], key="iob".index)

    axes = "".join(map(role, range(model.ndim)))
    leaves = [with_units(_as_leaf(p, axes), axes) for p in parts]
    model = dataclasses.replace(model, roles=axes.lstrip("b"))
    dropouts = {(p.rate, p.key is None) for p in leaves if p.rank}
    if any(p.axes != axes for p in leaves) or len(dropouts) > 1:
        raise NotFactored
    if all(p.w is None for p in leaves):
        w = None
    else:
        bases = [jnp.zeros(p.shape, p.dtype) if p.w is None else p.w for p in leaves]
        w = lax.concatenate(bases, axis)
        model = dataclasses.replace(model, dropped=None)
    # A mask of its own for each part of a stack, and for a product of several weights.
    keys = [_fold_in(p.key, i) for i, p in enumerate(leaves) if p.key is not None]
    dtype = max((p.a.dtype for p in leaves), key=lambda dtype: dtype.itemsize)
    leaves = [
        dataclasses.replace(p, a=p.a.astype(dtype), b=p.b.astype(dtype)) for p in leaves
    ]
    la, lb, ls = labels_of(axes)
    lc = bias_labels(axes)
    ranks = [p.rank for p in leaves]

    def output_biases(field: Callable[[LoRA], jax.Array]) -> list[jax.Array] | None:
        """c of every part, zero where it has none; None where no part has one."""
        if all(p.c is None for p in leaves):
            return None
        return [
            jnp.zeros([p.shape[k] for k in lc], dtype) if p.c is None else field(p)
            for p in leaves
        ]

    def pad(x: jax.Array, labels: list[int], before: int, after: int) -> jax.Array:
        pads = [(before, after, 0) if k == RANK else (0, 0, 0) for k in labels]
        return lax.pad(x, jnp.zeros((), x.dtype), pads)

    if axes[axis] == "b":
        top = max(ranks)
        pairs = [
            (pad(p.a, la, 0, top - p.rank), pad(p.b, lb, 0, top - p.rank))
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
        cs = output_biases(lambda p: p.c)
        c = None if cs is None else lax.concatenate(cs, lc.index(axis))
        return dataclasses.replace(model, w=w, a=a, b=b, scale=scale, c=c, key=key)

    def diagonal(fields: list[jax.Array], labels: list[int]) -> jax.Array:
        ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
        padded = [
            pad(f, labels, end - r, ends[-1] - end)
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
    c, cs = None, output_biases(scaled_c)
    if cs is not None:  # along in axes the products are summed
        c = lax.concatenate(cs, lc.index(axis)) if axis in lc else sum(cs[1:], cs[0])
    one = jnp.ones_like(leaves[0].scale)
    return dataclasses.replace(
        model, w=w, a=a, b=b, scale=one, c=c, key=keys[0] if keys else None
    )


def _as_leaf(x: LoRA | jax.Array, axes: str) -> LoRA:
    """A plain array as a leaf of rank zero, of these roles."""
    if isinstance(x, LoRA):
        return low_rank(x)
    size = dict(enumerate(x.shape)) | {RANK: 0}
    la, lb, ls = ([size[k] for k in labels] for labels in labels_of(axes))
    zeros, one = jnp.zeros, jnp.ones(ls, jnp.float32)
    return LoRA(x, zeros(la), zeros(lb), one, roles=axes.lstrip("b"))
