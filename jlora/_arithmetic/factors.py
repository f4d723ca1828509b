"""The factors of a leaf as stacks of matrices, their SVD, and a leaf from matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._algebra.delta import scaled
from jlora._algebra.rows import replaces
from jlora._explicit import automatic, replicated
from jlora._init.matrices import exact
from jlora._leaf import LoRA, forms
from jlora._leaf.fields import lacking
from jlora._tree import by_path


def low_rank_leaves(tree: Any, what: str) -> dict[str, LoRA]:
    """The leaves whose delta is that of their factors, by path.

    Raises:
      ValueError: there are none; or one is half of a partition, or has a magnitude, so
        that its delta depends on the base.
    """
    by_path.require_adapted(tree, what)
    found = {
        path: x
        for path, x in by_path.flatten(tree)[0]
        if isinstance(x, LoRA) and not replaces(x)
    }
    for path, x in found.items():
        if lacks := lacking(x):
            raise ValueError(
                f"{what}: {path!r} lacks {', '.join(lacks)}: expected a whole adapter; "
                "if it is half of a partition, combine it first."
            )
        if x.m is not None:
            raise ValueError(f"{what}: {path!r} {MAGNITUDE}")
    if not found:
        raise ValueError(
            f"{what}: expected low-rank leaves, found none: all that is adapted trains "
            "whole, or replaces rows."
        )
    return found


MAGNITUDE = (
    "has a magnitude (dora), so its delta depends on the base: extract a plain adapter "
    "from its merged weights, jlora.extract(params, jlora.merge(tree), rank=...)."
)


def matrices(leaf: LoRA) -> tuple[jax.Array, jax.Array]:
    """(*stack, in, r) and scale * (*stack, r, out), in float32 or wider.

    The stack has the batch axes, and a form's own blocks.
    """
    n = forms.of(leaf.form).stacked(leaf.axes)
    wide = jnp.promote_types(leaf.a.dtype, jnp.float32)
    a, b = leaf.a.astype(wide), scaled(leaf, "b").astype(wide)
    a = a.reshape(*a.shape[:n], -1, a.shape[-1])
    return a, b.reshape(*b.shape[: n + 1], -1)


def as_leaf(fn: Callable[..., LoRA], leaf: LoRA, *args: Any) -> LoRA:
    """fn(*args), whose result has its fields sharded as those of this leaf are."""

    def like() -> Any:
        shapes = jax.eval_shape(fn, *jax.tree.map(_shape, args))
        own: dict[str, Any] = {
            name: jax.typeof(getattr(leaf, name)).sharding
            for name in leaf.fields
            if getattr(shapes, name) is not None
        }
        return dataclasses.replace(shapes, **own)

    return automatic(fn, like, *args)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def values(leaf: LoRA) -> jax.Array:
    """The singular values of each delta, (*stack, r)."""

    def like() -> Any:
        return replicated(leaf.a)

    return automatic(lambda x: svd(*matrices(x))[1], like, leaf)


def with_matrices(leaf: LoRA, a: jax.Array, b: jax.Array) -> LoRA:
    """The leaf with other matrices of any rank, and a scale of one."""
    n = forms.of(leaf.form).stacked(leaf.axes)
    left = (*leaf.a.shape[:-1], a.shape[-1])
    right = (*leaf.b.shape[:n], a.shape[-1], *leaf.b.shape[n + 1 :])
    new: dict[str, Any] = {
        "a": a.reshape(left).astype(leaf.a.dtype),
        "b": b.reshape(right).astype(leaf.b.dtype),
        "scale": jnp.ones_like(leaf.scale),
        "c": None if leaf.c is None else scaled(leaf, "c").astype(leaf.c.dtype),
    }
    return dataclasses.replace(leaf, **new)


@jax.jit
def svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The SVD of each a·b, from QR decompositions of both and an SVD of r × r."""
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.mT)
    u, s, vt = jnp.linalg.svd(exact(ra, rb.mT), full_matrices=False)
    return exact(qa, u), s, exact(vt, qb.mT)


def kept(s: jax.Array, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep, for all matrices of a stack.

    Args:
      s: (*stack, k) singular values, in falling order.
      rank: how many; or None.
      energy: the part of the sum of their squares to keep, if ``rank`` is None.
    """
    if rank is not None:
        return min(rank, s.shape[-1])
    assert energy is not None
    power = jnp.cumsum(s**2, -1)
    # As many as are needed by the matrix of the stack that needs most.
    enough = (
        power < energy * (1 - jnp.finfo(s.dtype).eps * s.shape[-1]) * power[..., -1:]
    )
    return int(jnp.max(jnp.sum(enough, -1), initial=0)) + 1


def check_size(what: str, rank: Any, energy: Any) -> None:
    """Raises unless exactly one of rank and energy is given, and makes sense."""
    if (rank is None) == (energy is None):
        raise ValueError(
            f"{what}: rank={rank!r} and energy={energy!r}: expected one of the two, a "
            "rank, or the part of the delta's energy to keep, such as energy=0.99."
        )
    if rank is not None and (
        isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1
    ):
        raise ValueError(f"{what}: rank {rank!r}: expected a positive integer.")
    if energy is not None and not (
        isinstance(energy, (int, float, np.floating)) and 0 < energy <= 1
    ):
        raise ValueError(f"{what}: energy {energy!r}: expected a number in (0, 1].")
