"""Concatenation of weights, some of them adapted, as one leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra.delta import low_rank, scaled
from jlora._algebra.structure import folded, with_units
from jlora._labels import RANK, wider
from jlora._leaf import Bare, LoRA, base, fields
from jlora._leaf.fields import labels
from jlora._leaf.forms import NotFactored


def concatenate(parts: Sequence[Any], axis: int) -> LoRA | Bare:
    """lax.concatenate of weights: leaves, and bases that nothing adapts.

    Along a batch axis the factors are concatenated.  Along an in or out axis the ranks
    are added: one factor is concatenated along the rank, the other is block-diagonal.

    Raises:
      NotFactored: the parts differ in their roles or in their dropout.
    """
    if not any(isinstance(p, LoRA) for p in parts):
        return Bare(base.joined(parts, _Concatenate(axis)))
    leaves = _alike(parts)
    join = _stacked if leaves[0].axes[axis] == "b" else _side_by_side
    w = base.joined([leaf.base for leaf in leaves], _Concatenate(axis))
    return dataclasses.replace(join(leaves, axis), w=w)


@dataclasses.dataclass(frozen=True)
class _Concatenate:
    axis: int

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        return lax.concatenate(arrays, self.axis)


def _alike(parts: Sequence[LoRA | jax.Array]) -> list[LoRA]:
    """All parts as leaves with the same roles, and with factors of one dtype."""
    adapted = [low_rank(p) for p in parts if isinstance(p, LoRA)]

    def role(k: int) -> str:
        """The role of an axis, from the parts in which its size is not one."""
        roles = [p.axes[k] for p in adapted if p.shape[k] != 1]
        return min(roles or [p.axes[k] for p in adapted], key="iob".index)

    axes = "".join(map(role, range(adapted[0].ndim)))
    leaves = [with_units(_as_leaf(p, axes), axes) for p in parts]
    rates = {p.dropout and p.dropout.rate for p in leaves if p.rank}
    if any(p.axes != axes for p in leaves) or len(rates) > 1:
        raise NotFactored
    # The parts may share a dropout key.  Each part of a stack needs another mask, and a
    # joined weight a mask unlike that of its first part.
    leaves = [folded(p, i) for i, p in enumerate(leaves)]
    wide = {name: wider(*(getattr(p, name) for p in leaves)) for name in _FACTORS}

    def alike(p: LoRA) -> LoRA:
        new = {name: getattr(p, name).astype(dtype) for name, dtype in wide.items()}
        return dataclasses.replace(p, **new, roles=axes.lstrip("b"))

    return [alike(p) for p in leaves]


_FACTORS = "a", "b", "scale"


def _as_leaf(x: LoRA | jax.Array, axes: str) -> LoRA:
    """The leaf in the plain form; a plain array as a leaf of rank zero."""
    if isinstance(x, LoRA):
        return low_rank(x)
    shapes = fields.shapes(x.shape, axes, 0)
    a, b = jnp.zeros(shapes["a"]), jnp.zeros(shapes["b"])
    one = jnp.ones(shapes["scale"], jnp.float32)
    return LoRA(x, a, b, one, roles=axes.lstrip("b"))


def _stacked(leaves: Sequence[LoRA], axis: int) -> LoRA:
    """Along a batch axis: joins every field along it, with ranks padded with zeros."""
    axes, top = leaves[0].axes, max(p.rank for p in leaves)

    def join(name: str) -> Any:
        own = labels(name, axes)
        xs = [_padded(getattr(p, name), own, 0, top - p.rank) for p in leaves]
        return lax.concatenate(xs, own.index(axis))

    new: dict[str, Any] = {name: join(name) for name in _FACTORS}
    new["c"] = _outputs("c", [p.c for p in leaves], leaves, axis)
    new["gain"] = _outputs("gain", [p.gain for p in leaves], leaves, axis)
    dropouts = [p.dropout for p in leaves if p.dropout is not None]
    if 0 < len(dropouts) < len(leaves):
        raise NotFactored
    if dropouts:
        at = labels("dropout", axes).index(axis)
        key = jnp.concatenate([d.key for d in dropouts], at)
        new["dropout"] = dataclasses.replace(dropouts[0], key=key)
    return dataclasses.replace(leaves[0], **new)


def _side_by_side(leaves: Sequence[LoRA], axis: int) -> LoRA:
    """Along an in or out axis: puts the ranks side by side, and the scales into b."""
    axes, ranks = leaves[0].axes, [p.rank for p in leaves]
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]

    def join(name: str, xs: Sequence[jax.Array]) -> jax.Array:
        own = labels(name, axes)
        if axis not in own:
            return lax.concatenate(xs, own.index(RANK))
        padded = [
            _padded(x, own, end - r, ends[-1] - end)
            for x, r, end in zip(xs, ranks, ends, strict=True)
        ]
        return lax.concatenate(padded, own.index(axis))

    a = join("a", [p.a for p in leaves])
    b = join("b", [scaled(p, "b") for p in leaves])
    cs = [None if p.c is None else scaled(p, "c") for p in leaves]
    c = _outputs("c", cs, leaves, axis)
    gain = _outputs("gain", [p.gain for p in leaves], leaves, axis)
    one = jnp.ones_like(leaves[0].scale)
    dropout = next((p.dropout for p in leaves if p.dropout is not None), None)
    new: dict[str, Any] = {"a": a, "b": b, "scale": one, "c": c, "gain": gain}
    new["dropout"] = dropout
    return dataclasses.replace(leaves[0], **new)


def _padded(x: jax.Array, own: list[int], before: int, after: int) -> jax.Array:
    """x with zeros before and after along the rank, if it has one."""
    if RANK not in own or not (before or after):
        return x
    pads = [(before, after, 0) if k == RANK else (0, 0, 0) for k in own]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _outputs(
    name: str, xs: Sequence[jax.Array | None], leaves: Sequence[LoRA], axis: int
) -> jax.Array | None:
    """The field of the joined weight from those of its parts, or what stands for none.

    A part without an output bias has zeros, and one without a gain ones.  None if no
    part has the field.

    Raises:
      NotFactored: the parts are joined along an in axis, and have gains.
    """
    found = [x for x in xs if x is not None]
    if not found:
        return None
    dtype, fill = wider(*found), {"c": 0, "gain": 1}[name]
    own = labels(name, leaves[0].axes)
    parts = [
        jnp.full([p.shape[k] for k in own], fill, dtype) if x is None else x
        for x, p in zip(xs, leaves, strict=True)
    ]
    if axis in own:
        return lax.concatenate([x.astype(dtype) for x in parts], own.index(axis))
    if name == "gain":
        raise NotFactored
    return sum(parts[1:], parts[0])  # their products are summed
