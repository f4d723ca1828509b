"""truncate: an adapter with lower ranks."""

from __future__ import annotations

from typing import Any

import jax

from jlora._arithmetic.factors import (
    as_leaf,
    check_size,
    kept,
    low_rank_leaves,
    matrices,
    svd,
    values,
    with_matrices,
)
from jlora._leaf import LoRA
from jlora._tree import by_path


def truncate(
    adapter: Any, rank: int | None = None, *, energy: float | None = None
) -> Any:
    """The closest adapter of a lower rank: the largest singular vectors of each delta.

    From QR decompositions of the factors and an SVD of r × r; the delta is not formed.
    At full rank the delta stays the same.  The factors a get orthonormal columns, and
    the scale becomes one.

    Args:
      adapter: an adapter, or an adapted tree.
      rank: the rank of each leaf that has a larger one.
      energy: the part of the sum of squared singular values that each delta keeps, in
        (0, 1], in place of a rank.  A stack gets the rank that its neediest layer
        needs.

    Returns:
      What was passed, with other factors.

    Raises:
      ValueError: both or none of rank and energy, or values that make no sense; an
        energy under jit, where ranks may not depend on values; no low-rank leaf, or
        one with a magnitude.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> x = jlora.adapter(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2))
      >>> jlora.truncate(x, rank=1)["kernel"].rank, jlora.truncate(x, energy=0.9)
      (1, {'kernel': LoRA(w=None, a=float32[3,1], b=float32[1,4], roles='io')})
    """
    check_size("truncate", rank, energy)
    changed = low_rank_leaves(adapter, "truncate")
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(adapter))
    if energy is not None and traced:
        raise ValueError(
            "truncate: energy of traced factors: expected arrays with values, since "
            "the ranks depend on them. Truncate outside of jit, or to a rank."
        )

    def leaf(path: str, x: Any) -> Any:
        if path not in changed:
            return x
        unit = x.a.shape[-1] // x.rank  # of a kernel's form, several columns
        k = kept(values(x), None, energy) if rank is None else int(rank) * unit

        def smaller(x: LoRA) -> LoRA:
            u, s, vt = svd(*matrices(x))
            n = min(-(-k // unit) * unit, s.shape[-1])
            return with_matrices(x, u[..., :n], s[..., :n, None] * vt[..., :n, :])

        return as_leaf(smaller, x, x)

    return by_path.map_leaves(leaf, adapter, share=True)
