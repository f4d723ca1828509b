"""kaiming: the initialiser of loralib and of PEFT."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora._plan.spec import Spec


def kaiming(key: jax.Array, w: Any, spec: Spec) -> tuple[Any, jax.Array, jax.Array]:
    """a ~ U(±1/√fan_in) over the in axes, b = 0; for embeddings a = 0, b ~ N(0, 1).

    kaiming_uniform with a = √5 (arXiv:1502.01852, eq. 10), as in loralib.  The delta is
    exactly zero, and the base does not change.

    Args:
      key: the leaf's typed PRNG key.
      w: the base; only its shape is read.
      spec: how the weight is adapted.

    Returns:
      The base that was passed, and float32 factors a and b of the spec's shapes.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> spec = jlora.Spec.of("dense", "io", rank=2)
      >>> key, w = jax.random.key(0), jnp.ones((3, 4))
      >>> w, a, b = jlora.initializers.kaiming(key, w, spec)
      >>> a.shape, b.shape, float(abs(a).max()) <= 1 / 3**0.5
      ((3, 2), (2, 4), True)
    """
    shapes = spec.shapes(w.shape)
    a, b = shapes["a"], shapes["b"]
    if spec.kind == "embed":
        return w, jnp.zeros(a), jax.random.normal(key, b, jnp.float32)
    # An empty in axis gives a fan-in of 0.
    bound = 1 / math.sqrt(max(spec.fan_in(w.shape), 1))
    return w, jax.random.uniform(key, a, jnp.float32, -bound, bound), jnp.zeros(b)
