"""A third kind of base, which the library does not know: what a quantised one will be.

All that the library sees of it is the interface of `jlora._leaf.base.Base`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jlora._leaf.base import Base
from jlora._leaf.node import register


@functools.partial(
    register,
    data=["words", "factor"],
    meta=["dtype"],
    document=lambda static: {"dtype": str(static["dtype"])},
    from_document=lambda said: {"dtype": np.dtype(said["dtype"])},
)
@dataclasses.dataclass(frozen=True)
class Int8(Base):
    """An array as 8-bit integers times a factor for each row of its first axis.

    Both fields begin with that axis, so slicing them slices the array.

    Attributes:
      words: int8, of the array's shape.
      factor: float32 (rows, 1, ..., 1).
      dtype: static; of the array.
    """

    words: jax.Array
    factor: jax.Array
    dtype: np.dtype

    @classmethod
    def of(cls, w):
        """The nearest to an array."""
        wide = np.asarray(w, np.float64)
        axes = tuple(range(1, wide.ndim))
        factor = abs(wide).max(axes, keepdims=bool(axes)) / 127 + 1e-9
        words = np.round(wide / factor).astype(np.int8)
        factor = np.asarray(factor, np.float32)
        return cls(jnp.asarray(words), jnp.asarray(factor), np.dtype(w.dtype))

    @property
    def shape(self):
        return self.words.shape

    def use(self, fn, *operands):
        """The array is made again in the backward pass, and not kept.

        The barrier ties it to the activation that it meets: else XLA for CPU makes all
        of them ahead of time.  (Up to jaxlib 0.10.0 it still makes each only once.)
        """

        def call(words, factor, *operands):
            words, *operands = jax.lax.optimization_barrier((words, *operands))
            return fn(_decoded(words, factor, self.dtype), *operands)

        return jax.checkpoint(call)(self.words, self.factor, *operands)

    @property
    def array(self):
        """The array, for an oracle."""
        return _decoded(self.words, self.factor, self.dtype)


@functools.partial(register, data=["array"])
@dataclasses.dataclass(frozen=True)
class AsItIs(Base):
    """An array behind the interface: what the interface itself costs."""

    array: jax.Array

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def use(self, fn, *operands):
        return fn(self.array, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_rule(fn, w, *operands):
    return fn(w, *operands)


def _backward(fn, kept, ct):
    w, operands = kept
    _, pullback = jax.vjp(lambda *operands: fn(w, *operands), *operands)
    return jnp.zeros_like(w), *pullback(ct)


_by_rule.defvjp(lambda fn, w, *xs: (fn(w, *xs), (w, xs)), _backward)


@functools.partial(register, data=["array"])
@dataclasses.dataclass(frozen=True)
class ByRule(AsItIs):
    """An array whose uses have a derivative of their own."""

    array: jax.Array

    def use(self, fn, *operands):
        return _by_rule(fn, self.array, *operands)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _decoded(words, factor, dtype):
    with jax.named_scope("decoding"):
        return (words.astype(jnp.float32) * factor).astype(dtype)


def on_int8(params):
    """The params with every float matrix and larger array as an `Int8`; and as arrays.

    Both hold the same numbers.
    """

    def one(x):
        weight = x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
        return Int8.of(x) if weight else x

    coded = jax.tree.map(one, params)
    return coded, jax.tree.map(arrays, coded, is_leaf=is_int8)


def is_int8(x):
    return isinstance(x, Int8)


def arrays(x):
    return x.array if is_int8(x) else x
