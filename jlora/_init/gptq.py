"""gptq: low-bit numbers of which each makes up for the errors of those before it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _qwix
from jlora._init.eva import as_matrices
from jlora._init.matrices import Matrices, exact
from jlora._leaf import base

DAMPING = 0.01
"""What is added to the second moment of each input, in parts of their mean (as in the
paper's section 3.3), so that inputs which never vary do not divide by zero."""


def gptq(
    w: Any, qtype: str, tiles: tuple[int, ...], axes: str, moment: Any, what: str
) -> Any:
    """The array quantised so that the outputs change little, not the weight.

    GPTQ (arXiv:2210.17323, algorithm 1): the inputs' rows of the weight are rounded in
    their order.  The error of each is made up for by the rows that are still floats, as
    well as they can for inputs with these second moments.

    Args:
      w: an array, or the shape of one.
      qtype: the name of the qtype.
      tiles: along each axis, how many numbers share a scale, as in `_qwix.quantized`.
      axes: the roles of the weight's axes.
      moment: (*batch, in, in) second moments of the inputs.
      what: who asks, for errors.

    Raises:
      Misfit: the moments are of another weight.
    """
    m = Matrices(tuple(w.shape), axes)
    moment = as_matrices(moment, m, what)
    return _qwix.quantized(w, qtype, tiles, _Rounded(m), moment)


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """The function that takes the place of rounding to the nearest numbers.

    Attributes:
      matrices: the weight as a stack of matrices.
    """

    matrices: Matrices

    def __call__(
        self, qtype: str, tiles: tuple[int, ...], w: jax.Array, moment: jax.Array
    ) -> Any:
        m = self.matrices
        blocks = [n // t for n, t in zip(m.shape, tiles, strict=True)]
        scales = dataclasses.replace(m, shape=tuple(blocks))
        size = math.prod(m.size) // math.prod(scales.size)
        like = jax.eval_shape(functools.partial(_qwix.rounded, qtype, tiles), w)
        one = functools.partial(_matrix, qtype, size, w.dtype)
        codes, scale = lax.map(lambda pair: one(*pair), (m.take(w), moment))
        codes, scale = m.put(codes), scales.put(scale)
        return _qwix.array(
            codes.astype(like.qvalue.dtype), scale.astype(like.scale.dtype), qtype
        )


def _matrix(
    qtype: str, size: int, dtype: Any, w: jax.Array, moment: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The numbers (in, out) and scales (in / size, out) of one matrix, in float32."""
    n = len(w)
    factor = _inverse_factor(moment.astype(w.dtype))
    nearest = functools.partial(_nearest, qtype, dtype)

    def block(w: jax.Array, k: jax.Array) -> tuple[jax.Array, Any]:
        rows = lax.dynamic_slice_in_dim(factor, k * size, size)
        part = lax.dynamic_slice_in_dim(w, k * size, size)
        own = lax.dynamic_slice_in_dim(rows, k * size, size, axis=1)
        largest = abs(part).max(0)

        def row(part: jax.Array, j: jax.Array) -> tuple[jax.Array, Any]:
            codes, scale, value = nearest(part[j], largest)
            error = (part[j] - value) / own[j, j]
            left = part - jnp.outer(jnp.where(jnp.arange(size) > j, own[j], 0), error)
            return left, (codes, scale, error)

        _, (codes, scale, error) = lax.scan(row, part, jnp.arange(size))
        later = jnp.where(jnp.arange(n) >= (k + 1) * size, rows, 0)
        return w - exact(later.T, error), (codes, scale[0])

    _, (codes, scale) = lax.scan(block, w, jnp.arange(n // size))
    return codes.reshape(w.shape), scale


def _inverse_factor(moment: jax.Array) -> jax.Array:
    """Upper triangular u with uᵀu = the inverse of the damped moments."""
    mean = jnp.trace(moment) / len(moment)
    eye = jnp.eye(len(moment), dtype=moment.dtype)
    damped = jnp.where(mean > 0, moment / mean, 0) + DAMPING * eye  # u's scale is free
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # upper upperᵀ = damped
    return lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False)


def _nearest(
    qtype: str, dtype: Any, x: jax.Array, largest: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A row in low bits: codes and scales in float32, and values; for each output.

    The scale is that of the block, of which this is the largest magnitude.
    """
    size = _qwix.block_of(qtype) or 2
    pair = jnp.stack([jnp.clip(x, -largest, largest), largest])
    q = _qwix.rounded(qtype, (size, 1), jnp.pad(pair, [(0, size - 2), (0, 0)]), dtype)
    value = base.array(q)[0].astype(x.dtype)
    return q.qvalue[0].astype(jnp.float32), q.scale[0].astype(jnp.float32), value
