"""How the tensors of several adapters become one, as PEFT has it.

Each function takes tensors (adapters, stack, numbers), and one weight for each adapter
and member of the stack.  What is pruned is pruned in each member of the stack by
itself, so that a stack of layers gives what its layers give.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Merging:
    """One way to merge.

    Attributes:
      prune: which numbers are set to zero first: "magnitude" for all but the largest,
        "random" for a random part, after which the rest is divided by the density; None
        for no pruning.
      elect: whether each number is the mean over those adapters alone that have the
        sign of the majority (arXiv:2306.01708), else the sum over all.
    """

    prune: str | None
    elect: bool

    def __call__(
        self,
        x: jax.Array,
        weights: jax.Array,
        density: float | None,
        majority: str,
        key: jax.Array,
    ) -> jax.Array:
        """The merged numbers, (stack, numbers)."""
        if self.prune == "magnitude":
            x = largest(x, density)
        elif self.prune == "random":
            assert density is not None
            keep = jax.random.bernoulli(key, density, x.shape)
            x = jnp.where(keep, x / density, 0)
        if not self.elect:
            return jnp.sum(x * weights[..., None], 0)
        sign = jnp.sign(x)
        total = jnp.sum(x if majority == "total" else sign, 0)
        same = sign == jnp.where(total >= 0, 1, -1)
        sums = jnp.sum(jnp.where(same, x * weights[..., None], 0), 0)
        return sums / jnp.maximum(jnp.sum(same, 0), 1)


def largest(x: jax.Array, density: Any) -> jax.Array:
    """x with all but the largest numbers of each row set to zero."""
    k = int(density * x.shape[-1])
    if k == 0:
        return jnp.zeros_like(x)
    _, at = jax.lax.top_k(jnp.abs(x), k)
    mask = jnp.put_along_axis(jnp.zeros(x.shape, bool), at, True, -1, inplace=False)
    return jnp.where(mask, x, 0)


# By PEFT's names.  Those that PEFT also has for the delta are called name_svd there.
MERGINGS = {
    "linear": Merging(None, False),
    "ties": Merging("magnitude", True),
    "dare_linear": Merging("random", False),
    "dare_ties": Merging("random", True),
    "magnitude_prune": Merging("magnitude", False),
}
