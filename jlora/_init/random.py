"""gaussian and orthogonal: random factors whose delta is zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora._init.matrices import Matrices, exact, rank_of
from jlora._leaf.forms import Misfit
from jlora._plan.spec import Spec


def gaussian(key: jax.Array, w: Any, spec: Spec) -> tuple[Any, jax.Array, jax.Array]:
    """a ~ N(0, 1/r²), b = 0; for embeddings a = 0, b ~ N(0, 1).

    The ``"gaussian"`` of peft.  The delta is exactly zero; the base does not change.

    Args:
      key: the leaf's typed PRNG key.
      w: the base; only its shape is read.
      spec: how the weight is adapted.

    Returns:
      The base that was passed, and float32 factors a and b of the spec's shapes.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((300, 400))}
      >>> a = jlora.wrap(params, rank=10, init="gaussian")["kernel"].a
      >>> round(float(a.std()), 2)
      0.1
    """
    shapes = spec.shapes(w.shape)
    if spec.kind == "embed":
        a, b = jnp.zeros(shapes["a"]), jax.random.normal(key, shapes["b"], jnp.float32)
    else:
        a = jax.random.normal(key, shapes["a"], jnp.float32) / rank_of(spec)
        b = jnp.zeros(shapes["b"])
    return w, a, b


def orthogonal(key: jax.Array, w: Any, spec: Spec) -> tuple[Any, jax.Array, jax.Array]:
    """a and b random, neither of them zero, with a·b = 0.

    Both come from one orthogonal r × r matrix: a from its even rows, b from its odd
    ones, each times normals of deviation 1/10.  So both factors train from the first
    step.  The ``"orthogonal"`` of peft, after
    https://datta0.github.io/posts/rethink-lora-init.

    The delta is zero up to rounding, and the base does not change.  Where factors are
    cast to half precision in a product, the rounding is that of half precision.

    Args:
      key: the leaf's typed PRNG key.
      w: the base; only its shape is read.
      spec: how the weight is adapted, with an even rank.

    Returns:
      The base that was passed, and float32 factors a and b of the spec's shapes.

    Raises:
      ValueError: an odd rank; a weight whose delta is no plain a·b.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 5))}
      >>> leaf = jlora.wrap(params, rank=2, init="orthogonal")["kernel"]
      >>> bool(abs(leaf.a @ leaf.b).max() < 1e-6 < abs(leaf.b).min())
      True
    """
    r = rank_of(spec)
    m = Matrices.of(w, spec)
    if r % 2:
        raise Misfit(f"an even rank for 'orthogonal', found {r}")
    m.check(0, "'orthogonal'")
    (i, o), n = m.size, 1
    for size in m.sizes("b"):
        n *= size
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (n, r, r), jnp.float32))
    left = jax.random.normal(keys[1], (n, i, r // 2), jnp.float32)
    right = jax.random.normal(keys[2], (n, r // 2, o), jnp.float32)
    a = exact(left, q[:, 0::2]) / 10
    b = exact(q[:, 1::2].mT, right) / 10
    return w, *m.factors(a, b)
