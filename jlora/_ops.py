"""Low-rank uses of a weight: products, convolutions, lookups.

Every function takes a leaf whose weight is W = w + scale * a·b and gives what the
operation of the same name gives on W, without forming it.  Layers and the lift have no
other implementation.  It is written on labels, as `_algebra` says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _algebra, _compat
from jlora._algebra import (
    BLOCK,
    GROUP,
    IN,
    OUT,
    RANK,
    NotFactored,
    RolesError,
)
from jlora._leaf import Blocks, Kernel, LoRA


def _compute_dtype(x: jax.Array, w: Any) -> Any:
    """What the factors are cast to: the activation's dtype.

    Where a product mixes dtypes, the base is read in its own, so the wider one;
    integers have no say.
    """
    return _algebra.wider(x, w) if jnp.issubdtype(x.dtype, jnp.inexact) else w.dtype


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
    leaf: LoRA,
    x: jax.Array,
    params: Params,
    *,
    weight_first: bool,
    aside: jax.Array | None = None,
    h: jax.Array | None = None,
    use: int = 0,
) -> jax.Array:
    """dot_general of x and the weight, on either side.

    Here and below ``aside`` is x for the low-rank branch; of a product ``h`` is x·a, if
    that is known already (see `Evaluation.first_product`).

    The factor that holds the contracted axes goes first: (x·a)·b, or (x·b)·a where the
    weight is used transposed (a tied head).  An axis of size one may have any role.

    Raises:
      RolesError: the contracted axes mix in and out axes, or hold a batch axis.
      NotFactored: nothing is contracted.
    """
    n, axes, rest = leaf.ndim, leaf.axes, dict(params)
    dimension_numbers = rest.pop("dimension_numbers")
    out_sharding = rest.pop("out_sharding", None)
    (lc, rc), (lb, rb) = dimension_numbers
    wc, wb, xc, xb = (lc, lb, rc, rb) if weight_first else (rc, rb, lc, lb)
    roles = {axes[k] for k in wc if leaf.shape[k] != 1}
    if "b" in roles or len(roles) > 1:
        raise RolesError(
            f"contracts axes {tuple(map(int, wc))} of a weight of shape "
            f"{leaf.shape} and roles {axes!r}: expected in axes (i) only, or "
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

    def of_base(w: Any) -> Any:
        left, right = (w, x) if weight_first else (x, w)
        return lax.dot_general(
            left, right, dimension_numbers, out_sharding=out_sharding, **rest
        )

    base = _algebra.of_base(leaf, of_base)
    if "o" in roles or leaf.c is not None:
        leaf = _algebra.low_rank(leaf)
    elif isinstance(leaf.form, Kernel):
        raise NotFactored
    la, lb, batch = _algebra.labels_of(axes)
    if isinstance(leaf.form, Blocks):
        la, lb = _algebra.block_labels(la, batch), _algebra.block_labels(lb, batch)
    first, second = (leaf.a, la), (_algebra.scaled_b(leaf), lb)
    if "o" in roles:
        first, second = second, first
    dtype = _compute_dtype(x, leaf)
    rest["sharding"] = out_sharding, out
    steps = [(first, {*out, *second[1]}), (second, {*out, BLOCK})]
    if h is None:
        assert aside is not None
        h, hl = _drop(leaf, aside.astype(dtype), use), xl
    else:
        hl = [*new, RANK]
        del steps[0]
    for (factor, fl), keep in steps:
        h, factor = h.astype(dtype), factor.astype(dtype)
        if fl is second[1]:
            h, factor = _output_bias(leaf, wc, h, hl, factor, fl)
        if weight_first:
            h, hl = _algebra.dot(factor, fl, h, hl, keep, **rest)
        else:
            h, hl = _algebra.dot(h, hl, factor, fl, keep, **rest)
    h = (
        _algebra.placed(leaf, h, hl, out)
        if isinstance(leaf.form, Blocks)
        else _algebra.order(h, hl, out)
    )
    return _algebra.plus(base, h)


@dataclasses.dataclass(frozen=True)
class Share:
    """A product's part in a product that several weights share; see `joint`.

    Attributes:
      order: the axes of a: in, in the order of the activation's that they meet; rank.
      kind: what has to be the same for all: the activation's axes, dtype, parameters.
    """

    order: tuple[int, ...]
    kind: tuple[Any, ...]


def share(leaf: Any, x: Any, params: Any, weight_first: bool) -> Share | None:
    """The part of a dot_general in such a product; None where it has to be its own.

    It can be shared where x meets all in axes and nothing else, without dropout.
    """
    if not isinstance(leaf, LoRA) or leaf.form is not None or leaf.rate:
        return None
    (lc, rc), (lb, _) = params["dimension_numbers"]
    wc, xc = (lc, rc) if weight_first else (rc, lc)
    ins = {k for k, role in enumerate(leaf.axes) if role == "i"}
    if lb or {*wc} != ins or "b" in leaf.axes or params.get("out_sharding") is not None:
        return None
    pairs = sorted(zip(xc, wc, strict=True))
    own = tuple((k, v) for k, v in params.items() if k != "dimension_numbers")
    axes = tuple(k for k, _ in pairs)
    kind = axes, _compute_dtype(x, leaf), leaf.a.dtype, own, _compat.varying(leaf.a)
    labels = _algebra.labels_of(leaf.axes)[0]
    order = tuple(labels.index(k) for k in (*(k for _, k in pairs), RANK))
    return Share(order, kind)


@functools.partial(_inlined, static_argnames=("shares",))
def joint(
    factors: Sequence[jax.Array], x: jax.Array, shares: Sequence[Share]
) -> Sequence[jax.Array]:
    """x·a for the a of several weights by one product: (*the rest of x, r) each."""
    axes, dtype, _, params, _ = shares[0].kind
    a = [
        _algebra.order(a, range(a.ndim), own.order)
        for a, own in zip(factors, shares, strict=True)
    ]
    wide = lax.concatenate([f.astype(dtype) for f in a], len(axes))
    dims = ((axes, tuple(range(len(axes)))), ((), ()))
    h = lax.dot_general(x.astype(dtype), wide, dims, **dict(params))
    return lax.split(h, [f.shape[-1] for f in a], axis=h.ndim - 1)


def _output_bias(
    leaf: LoRA,
    used: Sequence[int],
    h: jax.Array,
    hl: list[int],
    factor: jax.Array,
    fl: list[int],
) -> tuple[jax.Array, jax.Array]:
    """`_algebra.with_output_bias`, where the weight is used from its inputs on.

    Raises:
      NotFactored: some of its in axes are left, over which the bias would be summed.
    """
    sized = {role: {k for k, c in enumerate(leaf.axes) if c == role} for role in "io"}
    if leaf.c is None or sized["o"] & {*used}:
        return h, factor
    if any(leaf.shape[k] != 1 for k in sized["i"] - {*used}):
        raise NotFactored
    return _algebra.with_output_bias(leaf, h, hl, factor, fl)


@functools.partial(_inlined, static_argnames=("params", "use"))
@_algebra.in_low_rank
def ragged(
    leaf: LoRA,
    x: jax.Array,
    sizes: jax.Array,
    params: Params,
    *,
    aside: jax.Array,
    use: int = 0,
) -> jax.Array:
    """ragged_dot_general of x and the weight: a stack of experts, each on its rows.

    Args:
      leaf: its group axis is a batch axis.
      x: the activation, of which ``sizes`` says how many rows belong to each expert.
      aside: x for the low-rank branch.
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
    roles = {axes[k] for k in wc if leaf.shape[k] != 1}
    stacked = {axes[k] for k in (*wb, *groups) if leaf.shape[k] != 1}
    if not stacked <= {"b"} or "b" in roles or len(roles) > 1:
        raise RolesError(
            f"groups axes {tuple(map(int, groups))} and contracts axes "
            f"{tuple(map(int, wc))} of a weight of shape {leaf.shape} and "
            f"roles {axes!r}: expected batch axes (b), and in axes (i) or out axes (o)"
        )
    wanted = "".join("b" if k in (*wb, *groups) else c for k, c in enumerate(axes))
    leaf = _algebra.with_units(leaf, wanted)
    xl = list(range(n, n + x.ndim))
    for kw, kx in zip((*wc, *wb), (*xc, *xb), strict=True):
        xl[kx] = kw
    (row,) = (xl[k] for k in numbers.lhs_ragged_dimensions)
    kept = [k for k in range(n) if k not in (*wc, *wb, *groups)]
    out = [*wb, *(k for k in xl if k >= n), *kept]

    base = _algebra.of_base(
        leaf, lambda w: lax.ragged_dot_general(x, w, sizes, numbers, **rest)
    )
    la, lb, _ = _algebra.labels_of(leaf.axes)
    first, second = (leaf.a, la), (_algebra.scaled_b(leaf), lb)
    if "o" in roles:
        first, second = second, first
    dtype = _compute_dtype(x, leaf)
    h, hl = _drop(leaf, aside.astype(dtype), use), xl
    for (factor, fl), keep in ((first, {*out, *second[1]}), (second, {*out})):
        if fl is second[1]:
            h, factor = _output_bias(leaf, wc, h, hl, factor, fl)
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
    return _algebra.plus(base, _algebra.order(h, hl, out))


@functools.partial(_inlined, static_argnames=("params", "use"))
def conv(
    leaf: LoRA, x: jax.Array, params: Params, *, aside: jax.Array, use: int = 0
) -> jax.Array:
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
    dtype = _compute_dtype(x, leaf)
    if isinstance(leaf.form, Kernel):
        if leaf.form.groups != groups:
            raise RolesError(
                f"convolves in {groups} groups with a leaf of {leaf.form}: expected "
                f"groups={groups} in its form"
            )
        if leaf.key is None or not leaf.rate:
            y = run(x, _algebra.dense(leaf))
        else:
            base = _algebra.of_base(leaf, functools.partial(run, x))
            x = _drop(leaf, aside, use).astype(dtype)
            y = _algebra.plus(base, run(x, _algebra.delta(leaf).astype(dtype)))
        if leaf.c is None:
            return y
        labels = [out_axis if k == spec.out_spec[1] else -1 for k in range(y.ndim)]
        c = _algebra.scaled_c(leaf).astype(dtype)
        return y + _algebra.spread(c, [out_axis], y.shape, labels).astype(y.dtype)

    leaf = _algebra.low_rank(leaf)
    units = (_algebra.with_units(leaf, wanted) for wanted in (forward, backward))
    fitting = [u for u in units if u.axes in (forward, backward)]
    if not fitting:
        raise RolesError(
            f"convolves axes {tuple(k for k, c in enumerate(forward) if c == 'i')} of "
            f"a weight of shape {leaf.shape} and roles {leaf.axes!r}: "
            f"expected {forward!r}, or {backward!r} from its outputs to its inputs"
        )
    leaf = fitting[0]
    transposed = leaf.axes != forward
    if transposed and groups != 1:
        raise NotFactored

    base = _algebra.of_base(leaf, functools.partial(run, x))
    x = _drop(leaf, aside, use).astype(dtype)
    b = _algebra.scaled_b(leaf).astype(dtype)
    at = leaf.axes.index("o")
    kernel_axes = [RANK if k == at else k for k in range(leaf.ndim)]
    a = _algebra.order(
        leaf.a.astype(dtype), _algebra.labels_of(leaf.axes)[0], kernel_axes
    )
    products = {name: rest[name] for name in ("precision", "preferred_element_type")}
    free = list(range(x.ndim))
    if transposed:
        k = free.pop(spec.lhs_spec[1])
        xl = [*free[:k], IN, *free[k:]]
        h, hl = _algebra.dot(x, xl, b, [RANK, IN], {*free}, **products)
        h = _algebra.order(h, hl, [*free[:k], RANK, *free[k:]])
        return _algebra.plus(base, run(h.astype(dtype), a))
    h = run(x, jnp.concatenate([a] * groups, axis=at))
    k = free.pop(spec.out_spec[1])
    h = lax.reshape(
        h.astype(dtype), (*h.shape[:k], groups, leaf.rank, *h.shape[k + 1 :])
    )
    hl = [*free[:k], GROUP, RANK, *free[k:]]
    h, b = _algebra.with_output_bias(leaf, h, hl, b, [RANK, at])
    b = b.reshape(b.shape[0], groups, -1)
    d, dl = _algebra.dot(h, hl, b, [RANK, GROUP, OUT], {*free, GROUP}, **products)
    d = _algebra.order(d, dl, [*free[:k], GROUP, OUT, *free[k:]])
    return _algebra.plus(base, lax.reshape(d, base.shape))


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
        self.indexed = indexed_axes(leaf.shape, dn, self.sizes)
        self.roles = {leaf.axes[k] for k in self.indexed}
        self.indices, self.rest = indices, rest
        n, batched = leaf.ndim, dn.operand_batching_dims
        cut = {k for k in range(n) if self.sizes[k] != leaf.shape[k]}
        fills = rest["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        if (
            len(self.roles) != 1
            or not cut <= {*self.indexed, *batched}
            or any(leaf.axes[k] != "b" for k in batched)
            or (fills and len(self.indexed) != len(dn.start_index_map))
        ):
            raise NotFactored
        self.base = _algebra.of_base(leaf, lambda w: lax.gather(w, indices, **rest))
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
@_algebra.in_low_rank
def lookup(leaf: LoRA, indices: jax.Array, params: Params) -> jax.Array:
    """gather of whole rows of the weight: rows of one factor times the other one.

    An index out of bounds reads what the base's mode gives, and a delta of zero.  One
    that breaks a promise to be in bounds reads the last row, as JAX does; in the
    gradient of the factor that is not indexed it counts as that row.

    Raises:
      NotFactored: the gather indexes in and out axes at once, or cuts a row.
    """
    gather = _Gather(leaf, indices, params)
    base, out = gather.base, gather.out
    la, lb, _ = _algebra.labels_of(leaf.axes)
    first, second = (leaf.a, la), (_algebra.scaled_b(leaf), lb)
    if gather.roles == {"o"}:
        if leaf.c is not None:
            raise NotFactored
        first, second = second, first
    elif gather.roles != {"i"}:
        raise NotFactored
    h, hl = gather(*first)
    h, factor = _output_bias(leaf, gather.indexed, h, hl, *second)
    factor, fl = gather.drop(factor, second[1])
    h, hl = _algebra.dot(
        h.astype(base.dtype), hl, factor.astype(base.dtype), fl, {*out}
    )
    return _algebra.plus(base, _algebra.order(h, hl, out))


@_algebra.in_low_rank
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
    la, lb, ls = _algebra.labels_of(axes)

    def pick(field: Any, labels: list[int], wanted: list[int]) -> Any:
        field, found = gather(field, labels)
        return _algebra.order(field, [place[k] for k in found], wanted)

    old = _algebra.labels_of(leaf.axes)
    lc, old_c = (_algebra.bias_labels(roles) for roles in (axes, leaf.axes))
    return dataclasses.replace(
        leaf,
        w=None if leaf.w is None else gather.base,
        a=pick(leaf.a, old[0], la),
        b=pick(leaf.b, old[1], lb),
        scale=pick(leaf.scale, old[2], ls),
        c=None if leaf.c is None else pick(leaf.c, old_c, lc),
        key=None if leaf.key is None else pick(leaf.key, old[2], ls),
        roles=axes.lstrip("b"),
    )
