"""PRNG keys: one for each path, which does not depend on the rest of the tree."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp


def path_key(key: jax.Array, path: str) -> jax.Array:
    """The key with a stable hash of the path folded in."""
    digest = hashlib.sha256(path.encode()).digest()
    # fold_in takes 32 bits at a time; 64 make it unlikely that two paths collide.
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "little"))
    return key


def typed(key: jax.Array | None) -> jax.Array:
    """The key as a typed key; ``jax.random.key(0)`` for None."""
    if key is None:
        return jax.random.key(0)
    if not hasattr(key, "dtype"):
        raise TypeError(
            f"key {key!r}: expected a PRNG key such as jax.random.key(0), found "
            f"{type(key).__name__}."
        )
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
