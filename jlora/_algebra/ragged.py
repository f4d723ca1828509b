"""ragged_dot_general: a stack of experts, each on its own rows of an activation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax

from jlora._algebra.delta import in_low_rank, scaled
from jlora._algebra.structure import with_units
from jlora._algebra.use import (
    Params,
    RolesError,
    compute_dtype,
    drop,
    inlined,
    with_output_bias_of,
)
from jlora._labels import dot, order
from jlora._leaf import LoRA, base
from jlora._leaf.fields import labels
from jlora._leaf.forms import NotFactored


@dataclasses.dataclass(frozen=True)
class _Product:
    """The dimension numbers of a ragged product, seen from the weight.

    Attributes:
      contracted: the weight's axes that are summed over.
      groups: the weight's axes of experts.
      axes: the weight's roles, with b for every axis that is batched or of experts.
      xl: the labels of the activation: the weight's for axes that meet one of the
        weight's, else new ones.
      row: the label of the activation's axis of rows.
      out: the labels of the result.
      transposed: whether the weight's out axes are contracted.
    """

    contracted: tuple[int, ...]
    groups: tuple[int, ...]
    axes: str
    xl: list[int]
    row: int
    out: list[int]
    transposed: bool

    @classmethod
    def of(cls, leaf: LoRA, x: Any, numbers: Any) -> _Product:
        (xc, wc), (xb, wb) = numbers.dot_dimension_numbers
        groups = numbers.rhs_group_dimensions
        if not groups:
            raise NotFactored
        n, axes, stacked = leaf.ndim, leaf.axes, (*wb, *groups)
        roles = {axes[k] for k in wc if leaf.shape[k] != 1}
        batch = {axes[k] for k in wb if leaf.shape[k] != 1}
        if not batch <= {"b"} or "b" in roles or len(roles) > 1:
            raise RolesError(
                f"groups axes {tuple(map(int, groups))}, batches axes "
                f"{tuple(map(int, wb))} and contracts axes {tuple(map(int, wc))} of a "
                f"weight of shape {leaf.shape} and roles {axes!r}: expected batch axes "
                "(b) to be batched, and in axes (i) or out axes (o) to be contracted"
            )
        xl = list(range(n, n + x.ndim))
        for kw, kx in zip((*wc, *wb), (*xc, *xb), strict=True):
            xl[kx] = kw
        (row,) = (xl[k] for k in numbers.lhs_ragged_dimensions)
        kept = [k for k in range(n) if k not in (*wc, *stacked)]
        out = [*wb, *(k for k in xl if k >= n), *kept]
        axes = "".join("b" if k in stacked else c for k, c in enumerate(axes))
        return cls(tuple(wc), tuple(groups), axes, xl, row, out, "o" in roles)


@functools.partial(inlined, static_argnames=("params", "nth"))
@in_low_rank
def ragged(
    leaf: LoRA,
    x: jax.Array,
    sizes: jax.Array,
    params: Params,
    *,
    aside: jax.Array,
    nth: int = 0,
) -> jax.Array:
    """ragged_dot_general of x and the weight.

    Args:
      leaf: the weight.  Its group axis is a batch axis, unless it was planned from a
        dense dispatch; then only one of the factors has it.
      x: the activation.
      sizes: the number of rows of x for each expert, as ragged_dot_general takes them.
      params: the primitive's parameters.
      aside: x for the low-rank branch; see `Evaluation.first_product`.
      nth: the number of earlier uses of the weight, for the dropout.

    Raises:
      RolesError: the contracted axes mix in and out axes, or the batched axes are not
        batch axes.
      NotFactored: the weight has no group axis (the gradient of a ragged product).
    """
    rest = dict(params)
    numbers = rest.pop("ragged_dot_dimension_numbers")
    sharding, offset = rest.pop("out_sharding", None), rest.pop("group_offset", None)
    if offset is not None or sharding is not None:
        raise NotFactored
    p = _Product.of(leaf, x, numbers)
    leaf = with_units(leaf, p.axes)

    def own(w: Any, x: Any, sizes: Any) -> Any:
        return lax.ragged_dot_general(x, w, sizes, numbers, **rest)

    y = base.use(leaf.base, own, x, sizes)
    dtype = compute_dtype(x, leaf)

    def times(h: jax.Array, hl: Any, factor: Any, fl: Any, keep: set[int]) -> Any:
        """The product of the rows of h with their expert's part of the factor."""
        h, factor = h.astype(dtype), factor.astype(dtype)
        if not {*p.groups} & {*fl}:
            return dot(h, hl, factor, fl, keep, **rest)
        batch = [k for k in hl if k in fl and k in keep]
        summed = [k for k in hl if k in fl and k not in keep]
        dims = (
            ([hl.index(k) for k in summed], [fl.index(k) for k in summed]),
            ([hl.index(k) for k in batch], [fl.index(k) for k in batch]),
        )
        own = lax.RaggedDotDimensionNumbers(
            dims, [hl.index(p.row)], [fl.index(k) for k in p.groups]
        )
        left = [k for k in hl if k not in batch and k not in summed]
        right = [k for k in fl if k not in (*batch, *summed, *p.groups)]
        product = lax.ragged_dot_general(h, factor, sizes, own, **rest)
        return product, [*batch, *left, *right]

    first = leaf.a, labels("a", leaf.axes)
    second = scaled(leaf, "b"), labels("b", leaf.axes)
    if p.transposed:
        first, second = second, first
    (factor, fl), keep = first, {*p.out, *second[1]}
    h, hl = times(drop(leaf, aside.astype(dtype), nth), p.xl, factor, fl, keep)
    factor, fl = second
    h, factor = with_output_bias_of(leaf, p.contracted, h, hl, factor, fl)
    d, dl = times(h, hl, factor, fl, {*p.out})
    return base.plus(y, order(d, dl, p.out))
