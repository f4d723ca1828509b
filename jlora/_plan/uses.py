"""How primitives use a weight: the roles that each gives to its axes, and its bias."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jlora._algebra.gather import indexed_axes
from jlora._plan.seen import DATA, NONE, Axes, Data, Origin, Product, Seen, Weight
from jlora._plan.walk import Walk, met, step


@step("dot_general")
def _dot(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    out: Any = DATA
    ((lc, rc), (lb, rb)) = eqn.params["dimension_numbers"]
    if any(map(_is_weight, infos)):
        infos = [DATA if isinstance(i, Weight) and i.perhaps else i for i in infos]
    others = infos[::-1]
    dims = zip(infos, others, eqn.invars, (lc, rc), (lb, rb), strict=True)
    for info, other, v, c, b in dims:
        if not isinstance(info, Weight):
            continue
        roles = dict.fromkeys(range(v.aval.ndim), "o")
        roles |= dict.fromkeys(c, "i") | dict.fromkeys(b, "b")
        # Rows that meet another weight are results of their lookup, not matrices.
        if (
            not info.gathers
            or isinstance(other, (Data, Product))
            or (_a_matrix_each(info, roles) and not _is_weight(other))
        ):
            out = walk.use(info, "dot_general", roles, v.aval)
    return [out]


@step("conv_general_dilated")
def _conv(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    if not isinstance(infos[1], Weight):
        return None
    # rhs_spec lists the axes of the kernel: out, in, then the spatial ones.
    out, *convolved = eqn.params["dimension_numbers"].rhs_spec
    roles = dict.fromkeys(convolved, "i") | {out: "o"}
    kernel, groups = eqn.invars[1].aval, eqn.params["feature_group_count"]
    return [walk.use(infos[1], "conv_general_dilated", roles, kernel, groups)]


@step("ragged_dot_general")
def _ragged_dot(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    if not isinstance(infos[1], Weight):
        return None
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = dn.dot_dimension_numbers
    weights = eqn.invars[1].aval
    roles = dict.fromkeys(range(weights.ndim), "o")
    roles |= dict.fromkeys((*batch, *dn.rhs_group_dimensions), "b")
    roles |= dict.fromkeys(contracted, "i")
    return [walk.use(infos[1], "ragged_dot_general", roles, weights)]


@step("gather")
def _gather(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """Takes out rows: a lookup's result, or the weights of each token's expert."""
    weight = infos[0]
    if not isinstance(weight, Weight):
        return None
    dn = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    roles = dict.fromkeys(range(len(shape)), "o")
    roles |= dict.fromkeys(dn.operand_batching_dims, "b")
    indexed = indexed_axes(shape, dn, eqn.params["slice_sizes"])
    roles |= dict.fromkeys(indexed, "i")
    product = walk.use(weight, "gather", roles, eqn.invars[0].aval)
    if weight.gathers:  # rows of rows
        return [product]
    # The axes that the output keeps; they are its offset_dims, in the same order.
    gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    kept = [k for k in range(len(shape)) if k not in gone]
    ndim = eqn.outvars[0].aval.ndim

    def rows(axes: Axes) -> list[Origin]:
        left = iter(kept)
        return [axes[next(left)] if k in dn.offset_dims else NONE for k in range(ndim)]

    return [walk.rows(weight, rows)]


@step("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """A part of a weight; one row may be a lookup, or one matrix of a stack."""
    weight = met(eqn, infos)[0]
    if not isinstance(weight, Weight):
        return None
    old, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    cut = [k for k, (n, size) in enumerate(zip(old, sizes, strict=True)) if size < n]
    if not cut or weight.gathers or any(sizes[k] != 1 for k in cut):
        return [weight]
    roles = dict.fromkeys(range(len(old)), "o") | dict.fromkeys(cut, "i")
    walk.use(weight, "dynamic_slice", roles, eqn.invars[0].aval)
    return [
        walk.rows(
            weight,
            lambda axes: [NONE if k in cut else axes[k] for k in range(len(old))],
        )
    ]


@step("add")
def _add(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """A parameter that is added to a product, and has its out size, is its bias."""
    used = frozenset(path for path, seen in walk.seen.items() if seen.uses)
    for info in infos:
        for path, _ in info.parts if isinstance(info, Weight) else ():
            walk.seen.setdefault(path, Seen()).after |= used
    pairs = list(zip(met(eqn, infos), eqn.invars, strict=True))
    for (product, _), (other, v) in (pairs, pairs[::-1]):
        if not (isinstance(product, Product) and isinstance(other, Weight)):
            continue
        own = zip(other.parts[0][1], v.aval.shape, strict=True)
        if math.prod(n for origin, n in own if origin) != product.size:
            continue
        biases = [path for path, _ in other.parts]
        if len(biases) != len(product.paths):  # one bias for all the fused weights
            biases = biases[:1] * len(product.paths)
        for path, bias in zip(product.paths, biases, strict=True):
            seen = walk.seen[path]
            seen.bias = seen.bias or bias
            walk.seen[bias].of.add(path)
        return [DATA]
    return None


@step("optimization_barrier")
def _barrier(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    """Each output is the operand in its place."""
    return met(eqn, infos)


@step("mul", "div", "select_n")
def _times(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """A weight times or by its scale, or under its mask, is the weight still."""
    name = eqn.primitive.name
    if any(_is_weight(i) for i in infos):  # rows that meet a weight are no weight
        infos = met(eqn, infos)
    if any(isinstance(i, Product) for i in infos):
        return None
    shape = eqn.outvars[0].aval.shape
    spans = [_span(i, v.aval.shape) for i, v in zip(infos, eqn.invars, strict=True)]
    weights = [k for k, i in enumerate(infos) if isinstance(i, Weight)]
    data = [k for k, i in enumerate(infos) if isinstance(i, Data)]
    if not weights or len(weights) + len(data) < 2:
        return None
    at = max(weights, key=lambda k: spans[k])
    weight, whole = infos[at], sum(n != 1 for n in shape)
    # The scale of data is broadcast to its shape.  Rows have their tokens' axes, too.
    least = 2 if weight.gathers else max(whole, 2)
    if 1 < spans[at] < whole > max(spans[k] for k in (*weights, *data) if k != at):
        # Many of the weight, as under a vmap over scales: a product shows which it is.
        return [
            dataclasses.replace(
                weight, perhaps=True, through=weight.through or f"{name} under vmap"
            )
        ]
    if eqn.invars[at].aval.shape != shape or (data and spans[at] < least):
        return [DATA]
    if data and max(spans[k] for k in data) == whole:
        weight = dataclasses.replace(weight, perhaps=True)
    others = [infos[k] for k in weights if k != at and spans[k] == spans[at]]
    if (name == "div" and at) or any(
        {*i.paths} & {*weight.paths} for i in others
    ):  # no multiple of the weight
        weight = dataclasses.replace(weight, through=weight.through or name)
    elif others:
        every = (weight, *others)
        weight = dataclasses.replace(
            weight,
            parts=tuple(part for i in every for part in i.parts),
            mixed=True,
            through=next((i.through for i in every if i.through), None),
        )
    return [dataclasses.replace(weight, scaled=name != "select_n")]


def _span(info: Any, shape: Sequence[int]) -> int:
    """Along how many axes a value may vary, if it was made by a broadcast."""
    own: set[int] | frozenset[int] = {*range(len(shape))}
    if isinstance(info, Weight):
        own = {k for _, axes in info.parts for k, origin in enumerate(axes) if origin}
    elif isinstance(info, Data) and info.axes is not None:
        own = info.axes
    return sum(shape[k] != 1 for k in own)


def _is_weight(info: Any) -> bool:
    """Whether it is a weight for sure, and not rows of one."""
    return isinstance(info, Weight) and not info.gathers and not info.perhaps


def _a_matrix_each(rows: Weight, roles: dict[int, str]) -> bool:
    """Whether a product uses each token's row as a matrix for that token alone."""
    _, axes = rows.parts[0]
    tokens = {roles[k] for k, origin in enumerate(axes) if not origin}
    own = {roles[k] for k, origin in enumerate(axes) if origin}
    return tokens == {"b"} and {"i", "o"} <= own
