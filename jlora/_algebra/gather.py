"""gather of whole rows of a weight: lookups, and each token's own matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._algebra import rows
from jlora._algebra.delta import in_low_rank, low_rank, scaled
from jlora._algebra.use import Params, finished, gated, inlined, with_output_bias_of
from jlora._labels import RANK, by_role, dot, order
from jlora._leaf import LoRA, base
from jlora._leaf.base import Gathering
from jlora._leaf.fields import labels, mapped
from jlora._leaf.forms import NotFactored


def indexed_axes(
    shape: Sequence[int], dimension_numbers: Any, slice_sizes: Sequence[int]
) -> tuple[int, ...]:
    """The axes that a gather really indexes: those of which it takes only a part.

    The index into an axis that is taken whole can only be zero.  vmap of ``w[i]`` makes
    such gathers.
    """
    axes = tuple(dimension_numbers.start_index_map)
    return tuple(k for k in axes if slice_sizes[k] != shape[k]) or axes


class Gather:
    """A gather of whole rows, on labels.

    The axes of the indices get the labels from the weight's ndim on.

    Attributes:
      out: the labels of the result.
      roles: the roles of the axes that are indexed.
      units: the axes of size one that are removed without being indexed.

    Raises:
      NotFactored: the gather cuts a row, or the indexed axes have several roles.
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
        # In this mode an index into a whole axis matters, too: out of bounds it fills.
        fills = rest["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        if (
            len(self.roles) != 1
            or not cut <= {*self.indexed, *batched}
            or any(leaf.axes[k] != "b" for k in batched)
            or (fills and len(self.indexed) != len(dn.start_index_map))
        ):
            raise NotFactored
        self.index = [n + k for k in range(indices.ndim - 1)]
        for k, at in zip(batched, dn.start_indices_batching_dims, strict=True):
            self.index[at] = k
        self.gone = {*dn.collapsed_slice_dims, *batched}
        self.units = self.gone - {*self.indexed, *batched}
        kept, free = iter([k for k in range(n) if k not in self.gone]), iter(self.index)
        ndim = len(self.index) + n - len(self.gone)
        self.out = [next(kept if k in dn.offset_dims else free) for k in range(ndim)]
        if len(self.indexed) != len(dn.start_index_map):
            columns = [dn.start_index_map.index(k) for k in self.indexed]
            self.indices = indices[..., np.array(columns)]

    def __call__(self, field: Any, own: list[int]) -> tuple[Any, list[int]]:
        """The same gather of a field with all indexed axes; its rank stays whole."""
        dn, rest = self.numbers, dict(self.rest)
        field, own = self.drop(field, own)
        kept = [k for k in own if k not in self.gone]

        def at(ks: Sequence[int]) -> tuple[int, ...]:
            return tuple(own.index(k) for k in ks)

        first = len(self.index)
        rest["dimension_numbers"] = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(first, first + len(kept))),
            collapsed_slice_dims=at(
                sorted({*dn.collapsed_slice_dims} - self.units, key=own.index)
            ),
            start_index_map=at(self.indexed),
            operand_batching_dims=at(dn.operand_batching_dims),
            start_indices_batching_dims=dn.start_indices_batching_dims,
        )
        rest["slice_sizes"] = tuple(
            self.rank if k == RANK else self.sizes[k] for k in own
        )
        # An index out of bounds has a delta of zero.  Random keys have no zero: their
        # index is clipped, since any key is right there.
        rest["fill_value"] = None if rest["fill_value"] is None else 0
        if not jnp.issubdtype(field.dtype, jnp.floating):
            rest |= {"mode": "clip", "fill_value": None}
        return lax.gather(field, self.indices, **rest), [*self.index, *kept]

    def drop(self, field: Any, own: list[int]) -> tuple[Any, list[int]]:
        """The field without the axes in ``units``, and its labels."""
        at = [i for i, k in enumerate(own) if k in self.units]
        field = lax.squeeze(field, at) if at else field
        return field, [k for k in own if k not in self.units]


def _itself(w: Any) -> Any:
    return w


@functools.partial(inlined, static_argnames=("params",))
def lookup(
    leaf: LoRA, indices: jax.Array, params: Params, *, gate: jax.Array | None = None
) -> jax.Array:
    """gather of whole rows of the weight: rows of one factor times the other one.

    For an index out of bounds the base gives what its mode says, and the delta is zero.
    An index that breaks a promise to be in bounds reads the last row, as in JAX.  It
    also counts as the last row in the gradient of the factor that is not indexed.

    Raises:
      NotFactored: the gather indexes in and out axes at once, or cuts a row; or the
        weight has an output bias and not all of its in axes are indexed.
    """
    gather = Gather(leaf, indices, params)
    y = base.use(base.gather(leaf.base, Gathering(params), indices), _itself)
    if rows.replaces(leaf) and "b" not in leaf.axes and gather.roles == {"i"}:
        return rows.lookup(leaf, gather, y)
    leaf = low_rank(leaf)
    la, lb = labels("a", leaf.axes), labels("b", leaf.axes)
    first, second = (leaf.a, la), (scaled(leaf, "b"), lb)
    if gather.roles == {"o"}:
        if leaf.c is not None:
            raise NotFactored
        first, second = second, first
    elif gather.roles != {"i"}:
        raise NotFactored
    h, hl = gather(*first)
    h = gated(h, hl, gate, leaf.ndim)
    h, factor = with_output_bias_of(leaf, gather.indexed, h, hl, *second)
    factor, fl = gather.drop(factor, second[1])
    d, dl = dot(h.astype(y.dtype), hl, factor.astype(y.dtype), fl, {*gather.out})
    y = base.plus(y, order(d, dl, gather.out))
    each = [gather] if gather.roles == {"o"} else []
    return finished(leaf, y, gather.out, *each)


@in_low_rank
def take(leaf: LoRA, indices: jax.Array, params: Params) -> LoRA:
    """gather along batch axes, such as a gather of each token's expert.

    The axes of the indices become batch axes of the new leaf.

    Raises:
      NotFactored: the gather indexes other axes.
    """
    gather = Gather(leaf, indices, params)
    if gather.roles != {"b"}:
        raise NotFactored
    axes = "".join("b" if k >= leaf.ndim else leaf.axes[k] for k in gather.out)
    place = {k: at for at, k in enumerate(gather.out)} | {RANK: RANK}

    def pick(field: Any, roles: str) -> Any:
        picked, found = gather(field, by_role(roles, leaf.axes))
        return order(picked, [place[k] for k in found], by_role(roles, axes))

    fields = mapped(leaf, pick)
    w = base.gather(leaf.base, Gathering(params), indices)
    return dataclasses.replace(leaf, w=w, roles=axes.lstrip("b"), **fields)
