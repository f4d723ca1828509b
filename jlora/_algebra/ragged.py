"""ragged_dot_general: a stack of experts, each on its own rows of an activation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra.delta import in_low_rank, scaled
from jlora._algebra.structure import with_units
from jlora._algebra.use import (
    Params,
    RolesError,
    branch,
    compute_dtype,
    drop,
    finished,
    inlined,
    with_output_bias_of,
)
from jlora._algebra.weight import times as weighted
from jlora._labels import RANK, dot, order
from jlora._leaf import LoRA, base, forms
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

    def times(
        self,
        h: jax.Array,
        hl: list[int],
        factor: jax.Array,
        fl: list[int],
        keep: set[int],
        *,
        sizes: jax.Array,
        params: dict[str, Any],
    ) -> tuple[jax.Array, list[int]]:
        """The product of the rows of h with their expert's part of the factor."""
        if not {*self.groups} & {*fl}:
            return dot(h, hl, factor, fl, keep, **params)
        batch = [k for k in hl if k in fl and k in keep]
        summed = [k for k in hl if k in fl and k not in keep]
        dims = (
            ([hl.index(k) for k in summed], [fl.index(k) for k in summed]),
            ([hl.index(k) for k in batch], [fl.index(k) for k in batch]),
        )
        numbers = lax.RaggedDotDimensionNumbers(
            dims, [hl.index(self.row)], [fl.index(k) for k in self.groups]
        )
        left = [k for k in hl if k not in batch and k not in summed]
        right = [k for k in fl if k not in (*batch, *summed, *self.groups)]
        product = lax.ragged_dot_general(h, factor, sizes, numbers, **params)
        return product, [*batch, *left, *right]


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

    dtype = compute_dtype(x, leaf)

    times = functools.partial(p.times, sizes=sizes, params=branch(leaf, rest))

    def each(field: Any, _: Any) -> Any:
        """What each row's expert has of a field: the product of ones with the field."""
        fl = labels("b", leaf.axes)
        rows = [k for k in p.xl if k == p.row or (k < leaf.ndim and k in p.out)]
        ones = jnp.ones([*(x.shape[p.xl.index(k)] for k in rows), 1], field.dtype)
        field = lax.expand_dims(field, [fl.index(RANK)])
        exact = rest | {"precision": "highest", "preferred_element_type": None}
        keep = {*p.out, *p.xl}
        return times(ones, [*rows, RANK], field, fl, keep, params=exact)

    if p.transposed and leaf.gain is not None:
        gain, gl = each(leaf.gain, [])
        x, aside = (weighted(v, p.xl, gain, gl) for v in (x, aside))
    y = base.use(leaf.base, own, x, sizes)
    first = leaf.a, labels("a", leaf.axes)
    second = scaled(leaf, "b"), labels("b", leaf.axes)
    if p.transposed:
        first, second = second, first
    (factor, fl), keep = first, {*p.out, *second[1]}
    h = drop(leaf, aside.astype(dtype), nth)
    h, hl = times(h, p.xl, factor.astype(dtype), fl, keep)
    h = h if p.transposed else forms.of(leaf.form).entered(h)
    factor, fl = second
    h, factor = with_output_bias_of(leaf, p.contracted, h, hl, factor, fl)
    d, dl = times(h.astype(dtype), hl, factor.astype(dtype), fl, {*p.out})
    y = base.plus(y, order(d, dl, p.out))
    return y if p.transposed else finished(leaf, y, p.out, each)
