"""A checksum of an array, the same for every sharding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksum(x: Any) -> int:
    """Σ word·m(position) mod 2³² over the words of an array; m gives odd numbers.

    A change of one word always changes the sum, since m is odd.  Words that change
    places nearly always change it.  The parts of a sharded array have sums that add up
    to it, so nothing is gathered.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return int(_distributed_sum(x))
    with np.errstate(over="ignore"):
        return int(_sum(_words_of(np.asarray(x)), np))


@jax.jit
def _distributed_sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    # Numbers of less than a byte, and booleans, become bytes first.
    if x.dtype == bool or jax.dtypes.itemsize_bits(x.dtype) < 8:
        x = x.astype(jnp.int8)
    # An 8-byte number becomes two words along a new last axis.
    bits = 8 * min(x.dtype.itemsize, 4)
    return _sum(jax.lax.bitcast_convert_type(x, f"uint{bits}"), jnp)


def _words_of(x: np.ndarray) -> np.ndarray:
    """The words of `_distributed_sum`, in numpy: same words, same positions."""
    if x.dtype == bool or jax.dtypes.itemsize_bits(x.dtype) < 8:
        x = x.astype(np.int8)
    x = np.ascontiguousarray(x).reshape(x.shape)  # it gives a scalar an axis
    size = min(x.dtype.itemsize // (x.dtype.kind == "c" and 2 or 1), 4)
    words = x.reshape(*x.shape, 1).view(f"uint{8 * size}")
    return words if words.shape[-1] > 1 else words.reshape(x.shape)


def _sum(words: Any, xp: Any) -> Any:
    """The sum of `checksum`, in numpy or in jax.numpy."""
    # The position of each word in the flat array, from its index along each axis.
    at, stride = xp.zeros((), "uint32"), 1
    for k in reversed(range(words.ndim)):
        along = xp.arange(words.shape[k], dtype="uint32") * xp.uint32(stride % 2**32)
        at = at + along.reshape([-1 if j == k else 1 for j in range(words.ndim)])
        stride *= words.shape[k]
    # MurmurHash3's mixing, shortened, so that neighbours have unlike multipliers.
    at = (at + xp.uint32(1)) * xp.uint32(0x9E3779B1)
    at = (at ^ (at >> xp.uint32(15))) * xp.uint32(0x85EBCA77)
    at = (at ^ (at >> xp.uint32(13))) | xp.uint32(1)
    return xp.sum(words.astype("uint32") * at, dtype="uint32")
