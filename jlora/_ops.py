"""Low-rank algebra: what a weight's uses become on (w, a, b).

Every function takes a leaf whose weight is W = w + scale * a·b and gives what the
operation of the same name gives on W, without forming it.  Layers, the lift and merge
have no other implementation.

Everything is written on labels: axis k of the weight is the label k, the axis that a
and b share is RANK, and axes that an activation brings count on from the weight's
ndim.  A field's labels say which axis of the weight each of its own axes is.

The other forms of a leaf (loralib's) have their own `delta`; what else has no code for
them uses `low_rank`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
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


def _labels(axes: str) -> tuple[list[int], list[int], list[int]]:
    """The labels of a, of b and of scale."""
    batch, in_, out = ([k for k, c in enumerate(axes) if c == role] for role in "bio")
    return [*batch, *in_, RANK], [*batch, RANK, *out], batch


def _scaled_b(leaf: LoRA) -> jax.Array:
    """scale * b.  Scaling the factor costs nothing per token and rounds once.

    The scale is data that does not train.
    """
    missing = range(leaf.scale.ndim, leaf.b.ndim)
    scale = lax.expand_dims(lax.stop_gradient(leaf.scale), missing)
    wide = _wider(leaf.b, scale)
    return leaf.b.astype(wide) * scale.astype(wide)


def _dot(
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


def _order(x: jax.Array, labels: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """x with its axes in the wanted order."""
    if list(labels) == list(wanted):
        return x
    return lax.transpose(x, [labels.index(k) for k in wanted])


def _wider(x: Any, y: Any) -> Any:
    """The dtype of x or y that has more bits."""
    return max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)


def _compute_dtype(x: jax.Array, w: jax.Array) -> Any:
    """What the factors are cast to: the activation's dtype.

    Where a product mixes dtypes, the base is read in its own, so the wider one;
    integers have no say.
    """
    return _wider(x, w) if jnp.issubdtype(x.dtype, jnp.inexact) else w.dtype


# --------------------------------------------------------------------------- merging


def delta(leaf: LoRA) -> jax.Array:
    """scale * a·b in the weight's shape and the factors' dtype, at full precision."""
    la, lb, batch = _labels(leaf.axes)
    weight = range(leaf.ndim)
    if isinstance(leaf.form, Kernel):
        sizes, n = leaf.w.shape[-4:], len(batch)
        product = jnp.matmul(leaf.a, _scaled_b(leaf), precision="highest")
        oihw = product.mT.reshape(*product.shape[:n], sizes[3], sizes[2], *sizes[:2])
        return jnp.moveaxis(oihw, (n, n + 1), (n + 3, n + 2))
    if isinstance(leaf.form, Blocks):
        la, lb = _block_labels(la, batch), _block_labels(lb, batch)
    out, labels = _dot(
        leaf.a, la, _scaled_b(leaf), lb, {*weight, BLOCK}, precision="highest"
    )
    if isinstance(leaf.form, Blocks):
        return _placed(leaf, out, labels, weight)
    return _order(out, labels, weight)


def _block_labels(labels: list[int], batch: list[int]) -> list[int]:
    return [*labels[: len(batch)], BLOCK, *labels[len(batch) :]]


def _placed(
    leaf: LoRA, d: jax.Array, labels: Sequence[int], out: Sequence[int]
) -> jax.Array:
    """The products of the blocks in their slices of the first out axis, else zeros."""
    assert isinstance(leaf.form, Blocks)
    first = leaf.axes.index("o")
    at = list(out).index(first)
    d = _order(d, labels, [*out[:at], BLOCK, *out[at:]])
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
    la, lb, batch = _labels(leaf.axes)
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


def _in_low_rank(fn: Callable[..., Any]) -> Callable[..., Any]:
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
    wide = _wider(leaf.w, d)
    return (leaf.w.astype(wide) + d.astype(wide)).astype(leaf.w.dtype)


# ------------------------------------------------------------------ uses of a weight


def _drop(leaf: LoRA, x: jax.Array, use: int) -> jax.Array:
    """Inverted dropout on the activation (arXiv:1207.0580), with a mask per use."""
    if leaf.key is None or not leaf.rate:
        return x
    key = jax.random.fold_in(leaf.key.reshape(-1)[0], use)
    keep = jax.random.bernoulli(key, 1 - leaf.rate, x.shape)
    return jnp.where(keep, x / (1 - leaf.rate), 0).astype(x.dtype)


# A use is traced once for its shapes and inlined wherever it recurs, with its
# derivatives, so a deep model costs one trace for each kind of layer.
_inlined = functools.partial(jax.jit, inline=True)
Params = tuple[tuple[str, Any], ...]  # a primitive's parameters as items: hashable


@functools.partial(_inlined, static_argnames=("params", "weight_first", "use"))
def contract(
    leaf: LoRA, x: jax.Array, params: Params, *, weight_first: bool, use: int = 0
) -> jax.Array:
    """dot_general of x and the weight, on either side.

    The factor that holds the contracted axes goes first: (x·a)·b, or (x·b)·a where the
    weight is used transposed (a tied head).  An axis of size one may have any role.

    Raises:
      RolesError: the contracted axes mix in and out axes, or hold a batch axis.
      NotFactored: nothing is contracted.
    """
    n, axes, rest = leaf.ndim, leaf.axes, dict(params)
    dimension_numbers = rest.pop("dimension_numbers")
    # Only the base product has the shape that a requested sharding is for.
    out_sharding = rest.pop("out_sharding", None)
    (lc, rc), (lb, rb) = dimension_numbers
    wc, wb, xc, xb = (lc, lb, rc, rb) if weight_first else (rc, rb, lc, lb)
    roles = {axes[k] for k in wc if leaf.w.shape[k] != 1}
    if "b" in roles or len(roles) > 1:
        raise RolesError(
            f"contracts axes {tuple(map(int, wc))} of a weight of shape "
            f"{tuple(leaf.w.shape)} and roles {axes!r}: expected in axes (i) only, or "
            "out axes (o) only"
        )
    if not wc:
        raise NotFactored
    xl = list(range(n, n + x.ndim))
    for kw, kx in zip((*wc, *wb), (*xc, *xb), strict=True):
        xl[kx] = kw
    kept = [k for k in range(n) if k not in wc and k not in wb]
    new = [k for k in xl if k >= n]
    out = [*wb, *kept, *new] if weight_first else [*wb, *new, *kept]

    left, right = (leaf.w, x) if weight_first else (x, leaf.w)
    base = lax.dot_general(
        left, right, dimension_numbers, out_sharding=out_sharding, **rest
    )
    if "o" in roles:
        leaf = low_rank(leaf)
    elif isinstance(leaf.form, Kernel):
        raise NotFactored
    la, lb, batch = _labels(axes)
    if isinstance(leaf.form, Blocks):
        la, lb = _block_labels(la, batch), _block_labels(lb, batch)
    first, second = (leaf.a, la), (_scaled_b(leaf), lb)
    if "o" in roles:
        first, second = second, first
    dtype = _compute_dtype(x, leaf.w)
    h, hl = _drop(leaf, x.astype(dtype), use), xl
    for (factor, fl), keep in ((first, {*out, *second[1]}), (second, {*out, BLOCK})):
        h, factor = h.astype(dtype), factor.astype(dtype)
        if weight_first:
            h, hl = _dot(factor, fl, h, hl, keep, **rest)
        else:
            h, hl = _dot(h, hl, factor, fl, keep, **rest)
    h = (
        _placed(leaf, h, hl, out)
        if isinstance(leaf.form, Blocks)
        else _order(h, hl, out)
    )
    return base + h.astype(base.dtype)


@functools.partial(_inlined, static_argnames=("params", "use"))
@_in_low_rank
def ragged(
    leaf: LoRA, x: jax.Array, sizes: jax.Array, params: Params, *, use: int = 0
) -> jax.Array:
    """ragged_dot_general of x and the weight: a stack of experts, each on its rows.

    Args:
      leaf: its group axis is a batch axis.
      x: the activation, of which ``sizes`` says how many rows belong to each expert.
      sizes: as ragged_dot_general takes them.
      params: of the primitive.
      use: how many uses came before, for the dropout.

    Raises:
      RolesError: the contracted axes mix in and out axes, or the groups are no batch.
      NotFactored: no group axis in the weight (the gradient of a ragged product).
    """
    n, axes, rest = leaf.ndim, leaf.axes, dict(params)
    numbers = rest.pop("ragged_dot_dimension_numbers")
    sharding, offset = rest.pop("out_sharding", None), rest.get("group_offset")
    (xc, wc), (xb, wb) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    if not groups or offset is not None or sharding is not None:
        raise NotFactored
    roles = {axes[k] for k in wc if leaf.w.shape[k] != 1}
    stacked = {axes[k] for k in (*wb, *groups) if leaf.w.shape[k] != 1}
    if not stacked <= {"b"} or "b" in roles or len(roles) > 1:
        raise RolesError(
            f"groups axes {tuple(map(int, groups))} and contracts axes "
            f"{tuple(map(int, wc))} of a weight of shape {tuple(leaf.w.shape)} and "
            f"roles {axes!r}: expected batch axes (b), and in axes (i) or out axes (o)"
        )
    wanted = "".join("b" if k in (*wb, *groups) else c for k, c in enumerate(axes))
    leaf = _with_units(leaf, wanted)
    xl = list(range(n, n + x.ndim))
    for kw, kx in zip((*wc, *wb), (*xc, *xb), strict=True):
        xl[kx] = kw
    (row,) = (xl[k] for k in numbers.lhs_ragged_dimensions)
    kept = [k for k in range(n) if k not in (*wc, *wb, *groups)]
    out = [*wb, *(k for k in xl if k >= n), *kept]

    base = lax.ragged_dot_general(x, leaf.w, sizes, numbers, **rest)
    la, lb, _ = _labels(leaf.axes)
    first, second = (leaf.a, la), (_scaled_b(leaf), lb)
    if "o" in roles:
        first, second = second, first
    dtype = _compute_dtype(x, leaf.w)
    h, hl = _drop(leaf, x.astype(dtype), use), xl
    for (factor, fl), keep in ((first, {*out, *second[1]}), (second, {*out})):
        batch = [k for k in hl if k in fl and k in keep]
        summed = [k for k in hl if k in fl and k not in keep]
        dims = (
            ([hl.index(k) for k in summed], [fl.index(k) for k in summed]),
            ([hl.index(k) for k in batch], [fl.index(k) for k in batch]),
        )
        own = lax.RaggedDotDimensionNumbers(
            dims, [hl.index(row)], [fl.index(k) for k in groups]
        )
        h = lax.ragged_dot_general(
            h.astype(dtype), factor.astype(dtype), sizes, own, **rest
        )
        left = [k for k in hl if k not in batch and k not in summed]
        right = [k for k in fl if k not in (*batch, *summed, *groups)]
        hl = [*batch, *left, *right]
    return base + _order(h, hl, out).astype(base.dtype)


@functools.partial(_inlined, static_argnames=("params", "use"))
def conv(leaf: LoRA, x: jax.Array, params: Params, *, use: int = 0) -> jax.Array:
    """Convolution of x with the weight as its kernel.

    x is convolved with a to r features (the same strides, padding and dilations), and
    b takes these to the outputs as a 1x1 convolution.  With groups, a is shared: each
    group of inputs is convolved with it and reads its own columns of b, which is the
    low-rank form of the kernel array itself.  Where the kernel is used from its outputs
    to its inputs, as in a gradient, b goes first.

    Raises:
      RolesError: the convolved axes are not all in axes, or the outputs no out axis.
      NotFactored: a batch-grouped convolution (the gradient of a grouped one).
    """
    rest = dict(params)
    if rest["batch_group_count"] != 1:
        raise NotFactored
    spec, groups = rest["dimension_numbers"], rest["feature_group_count"]
    out_axis, in_axis, *_ = spec.rhs_spec
    forward, backward = (
        "".join("o" if k == at else "i" for k in range(leaf.ndim))
        for at in (out_axis, in_axis)
    )
    run: Callable[..., jax.Array] = functools.partial(
        cast(Any, lax.conv_general_dilated), **rest
    )
    dtype = _compute_dtype(x, leaf.w)
    if isinstance(leaf.form, Kernel):
        if leaf.key is None or not leaf.rate:
            return run(x, dense(leaf))
        base, x = run(x, leaf.w), _drop(leaf, x, use).astype(dtype)
        return base + run(x, delta(leaf).astype(dtype)).astype(base.dtype)

    leaf = low_rank(leaf)
    units = (_with_units(leaf, wanted) for wanted in (forward, backward))
    fitting = [u for u in units if u.axes in (forward, backward)]
    if not fitting:
        raise RolesError(
            f"convolves axes {tuple(k for k, c in enumerate(forward) if c == 'i')} of "
            f"a weight of shape {tuple(leaf.w.shape)} and roles {leaf.axes!r}: "
            f"expected {forward!r}, or {backward!r} from its outputs to its inputs"
        )
    leaf = fitting[0]
    transposed = leaf.axes != forward
    if transposed and groups != 1:
        raise NotFactored

    base = run(x, leaf.w)
    x = _drop(leaf, x, use).astype(dtype)
    b = _scaled_b(leaf).astype(dtype)
    at = leaf.axes.index("o")
    kernel_axes = [RANK if k == at else k for k in range(leaf.ndim)]
    a = _order(leaf.a.astype(dtype), _labels(leaf.axes)[0], kernel_axes)
    products = {name: rest[name] for name in ("precision", "preferred_element_type")}
    free = list(range(x.ndim))
    if transposed:
        k = free.pop(spec.lhs_spec[1])
        xl = [*free[:k], IN, *free[k:]]
        h, hl = _dot(x, xl, b, [RANK, IN], {*free}, **products)
        h = _order(h, hl, [*free[:k], RANK, *free[k:]])
        return base + run(h.astype(dtype), a).astype(base.dtype)
    h = run(x, jnp.concatenate([a] * groups, axis=at))
    k = free.pop(spec.out_spec[1])
    h = lax.reshape(
        h.astype(dtype), (*h.shape[:k], groups, leaf.rank, *h.shape[k + 1 :])
    )
    b = b.reshape(leaf.rank, groups, -1)
    hl = [*free[:k], GROUP, RANK, *free[k:]]
    d, dl = _dot(h, hl, b, [RANK, GROUP, OUT], {*free, GROUP}, **products)
    d = _order(d, dl, [*free[:k], GROUP, OUT, *free[k:]])
    return base + lax.reshape(d, base.shape).astype(base.dtype)


def indexed_axes(
    shape: Sequence[int], dimension_numbers: Any, slice_sizes: Sequence[int]
) -> tuple[int, ...]:
    """The axes that a gather really indexes: those that it does not take whole.

    An index into an axis that is taken whole can only be zero; vmap of ``w[i]`` makes
    such gathers.
    """
    axes = tuple(dimension_numbers.start_index_map)
    return tuple(k for k in axes if slice_sizes[k] != shape[k]) or axes


class _Gather:
    """A gather of whole rows, on labels; those of index axes go on from the weight's.

    Attributes:
      base: what the primitive gives on the weight.
      out: its labels.
      roles: of the axes that are indexed.
      dropped: the axes of size one that are gone without being indexed.

    Raises:
      NotFactored: it cuts a row, or its axes have several roles.
    """

    def __init__(self, leaf: LoRA, indices: jax.Array, params: Params):
        rest = dict(params)
        self.numbers = dn = rest["dimension_numbers"]
        self.sizes, self.rank = rest["slice_sizes"], leaf.rank
        self.indexed = indexed_axes(leaf.w.shape, dn, self.sizes)
        self.roles = {leaf.axes[k] for k in self.indexed}
        self.indices, self.rest = indices, rest
        n, batched = leaf.ndim, dn.operand_batching_dims
        cut = {k for k in range(n) if self.sizes[k] != leaf.w.shape[k]}
        fills = rest["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        if (
            len(self.roles) != 1
            or not cut <= {*self.indexed, *batched}
            or any(leaf.axes[k] != "b" for k in batched)
            or (fills and len(self.indexed) != len(dn.start_index_map))
        ):
            raise NotFactored
        self.base = lax.gather(leaf.w, indices, **rest)
        self.index = [n + k for k in range(indices.ndim - 1)]
        for k, at in zip(batched, dn.start_indices_batching_dims, strict=True):
            self.index[at] = k
        self.gone = {*dn.collapsed_slice_dims, *batched}
        self.dropped = self.gone - {*self.indexed, *batched}
        rows, free = iter([k for k in range(n) if k not in self.gone]), iter(self.index)
        self.out = [
            next(rows if k in dn.offset_dims else free) for k in range(self.base.ndim)
        ]
        if len(self.indexed) != len(dn.start_index_map):
            columns = [dn.start_index_map.index(k) for k in self.indexed]
            self.indices = indices[..., np.array(columns)]

    def __call__(self, field: Any, labels: list[int]) -> tuple[Any, list[int]]:
        """The same gather of a field with all of the indexed axes, its rank whole."""
        dn, rest = self.numbers, dict(self.rest)
        field, labels = self.drop(field, labels)
        kept = [k for k in labels if k not in self.gone]

        def own(ks: Sequence[int]) -> tuple[int, ...]:
            return tuple(labels.index(k) for k in ks)

        first = len(self.index)
        rest["dimension_numbers"] = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(first, first + len(kept))),
            collapsed_slice_dims=own(
                sorted({*dn.collapsed_slice_dims} - self.dropped, key=labels.index)
            ),
            start_index_map=own(self.indexed),
            operand_batching_dims=own(dn.operand_batching_dims),
            start_indices_batching_dims=dn.start_indices_batching_dims,
        )
        rest["slice_sizes"] = tuple(
            self.rank if k == RANK else self.sizes[k] for k in labels
        )
        # Out of bounds is a delta of zero; a key has no zero, and any one will do.
        rest["fill_value"] = None if rest["fill_value"] is None else 0
        if not jnp.issubdtype(field.dtype, jnp.floating):
            rest |= {"mode": "clip", "fill_value": None}
        return lax.gather(field, self.indices, **rest), [*self.index, *kept]

    def drop(self, field: Any, labels: list[int]) -> tuple[Any, list[int]]:
        """The field without the axes of `dropped`."""
        at = [i for i, k in enumerate(labels) if k in self.dropped]
        field = lax.squeeze(field, at) if at else field
        return field, [k for k in labels if k not in self.dropped]


@functools.partial(_inlined, static_argnames=("params",))
@_in_low_rank
def lookup(leaf: LoRA, indices: jax.Array, params: Params) -> jax.Array:
    """gather of whole rows of the weight: rows of one factor times the other one.

    An index out of bounds reads what the base's mode gives, and a delta of zero.

    Raises:
      NotFactored: the gather indexes in and out axes at once, or cuts a row.
    """
    gather = _Gather(leaf, indices, params)
    base, out = gather.base, gather.out
    la, lb, _ = _labels(leaf.axes)
    first, second = (leaf.a, la), (_scaled_b(leaf), lb)
    if gather.roles == {"o"}:
        first, second = second, first
    elif gather.roles != {"i"}:
        raise NotFactored
    h, hl = gather(*first)
    factor, fl = gather.drop(*second)
    h, hl = _dot(h.astype(base.dtype), hl, factor.astype(base.dtype), fl, {*out})
    return base + _order(h, hl, out).astype(base.dtype)


# ------------------------------------------------- structure: a leaf in, a leaf out


def _fields(leaf: LoRA, w: Any, axes: str, fn: Callable[..., Any]) -> LoRA:
    """The leaf of weight w and roles ``axes``, with fn(field, labels) for the rest."""
    la, lb, ls = _labels(leaf.axes)
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
    la, lb, ls = ([size[k] for k in labels] for labels in _labels(axes))
    return dataclasses.replace(
        leaf,
        w=w,
        a=leaf.a.reshape(la),
        b=leaf.b.reshape(lb),
        scale=leaf.scale.reshape(ls),
        key=None if leaf.key is None else leaf.key.reshape(ls),
        roles=axes.lstrip("b"),
    )


def _with_units(leaf: LoRA, wanted: str) -> LoRA:
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


@_in_low_rank
def transpose(leaf: LoRA, permutation: Sequence[int]) -> LoRA:
    """lax.transpose."""
    axes = "".join(leaf.axes[k] for k in permutation)
    place = {k: at for at, k in enumerate(permutation)} | {RANK: RANK}

    def move(x: jax.Array, labels: list[int]) -> jax.Array:
        new = [place[k] for k in labels]
        wanted = next(ls for ls in _labels(axes) if sorted(ls) == sorted(new))
        return _order(x, new, wanted)

    return _fields(leaf, lax.transpose(leaf.w, permutation), axes, move)


@_in_low_rank
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


@_in_low_rank
def squeeze(leaf: LoRA, dimensions: Sequence[int]) -> LoRA:
    """lax.squeeze; the axes that stay keep their roles."""
    axes = "".join(c for k, c in enumerate(leaf.axes) if k not in dimensions)
    return _refit(leaf, lax.squeeze(leaf.w, dimensions), axes)


@_in_low_rank
def broadcast(leaf: LoRA, shape: Sequence[int], dimensions: Sequence[int]) -> LoRA:
    """lax.broadcast_in_dim; an axis that is new, or that grows, is a batch axis."""
    old = list(zip(leaf.w.shape, leaf.axes, dimensions, strict=True))
    leaf = _with_units(leaf, "".join(c if n == shape[k] else "b" for n, c, k in old))
    units, axes = [1] * len(shape), ["b"] * len(shape)
    for n, c, k in zip(leaf.w.shape, leaf.axes, dimensions, strict=True):
        units[k], axes[k] = n, c
    leaf = _refit(leaf, lax.reshape(leaf.w, units), "".join(axes))

    def grow(x: jax.Array, labels: Sequence[int]) -> jax.Array:
        sizes = [leaf.rank if k == RANK else shape[k] for k in labels]
        return lax.broadcast_in_dim(x, sizes, range(len(sizes)))

    leaf = _fields(leaf, grow(leaf.w, range(len(shape))), leaf.axes, grow)
    return dataclasses.replace(leaf, key=_fold_in(leaf.key, None))


@_in_low_rank
def take(leaf: LoRA, indices: jax.Array, params: Params) -> LoRA:
    """gather along batch axes, as of each token's expert; index axes are batch axes.

    Raises:
      NotFactored: it indexes other axes.
    """
    gather = _Gather(leaf, indices, params)
    if gather.roles != {"b"}:
        raise NotFactored
    axes = "".join("b" if k >= leaf.ndim else leaf.axes[k] for k in gather.out)
    place = {k: at for at, k in enumerate(gather.out)} | {RANK: RANK}
    la, lb, ls = _labels(axes)

    def pick(field: Any, labels: list[int], wanted: list[int]) -> Any:
        field, found = gather(field, labels)
        return _order(field, [place[k] for k in found], wanted)

    old = _labels(leaf.axes)
    return dataclasses.replace(
        leaf,
        w=gather.base,
        a=pick(leaf.a, old[0], la),
        b=pick(leaf.b, old[1], lb),
        scale=pick(leaf.scale, old[2], ls),
        key=None if leaf.key is None else pick(leaf.key, old[2], ls),
        roles=axes.lstrip("b"),
    )


@_in_low_rank
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

    la, lb, ls = _labels(leaf.axes)
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
    leaves = [_with_units(_as_leaf(p, axes), axes) for p in parts]
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
    la, lb, ls = _labels(axes)
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

    fields_a, fields_b = [p.a for p in leaves], [_scaled_b(p) for p in leaves]
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
    la, lb, ls = ([size[k] for k in labels] for labels in _labels(axes))
    zeros, one = jnp.zeros, jnp.ones(ls, jnp.float32)
    return LoRA(x, zeros(la), zeros(lb), one, roles=axes.lstrip("b"))
