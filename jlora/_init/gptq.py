"""gptq: low-bit numbers of which each makes up for the errors of those before it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _qwix
from jlora._init.eva import as_matrices
from jlora._init.matrices import Matrices, exact
from jlora._leaf import base

DAMPING = 0.01
"""What is added to the second moment of each input, in parts of their mean (as in the
paper's section 3.3), so that inputs which never vary do not divide by zero."""

PARTS = tuple(1 - k / 40 for k in range(11))
"""From 1 to 3/4: what a block's largest magnitude may be clipped to."""


def gptq(
    w: Any, qtype: str, tiles: tuple[int, ...], axes: str, moment: Any, what: str
) -> Any:
    """The array quantised so that the outputs change little, not the weight.

    GPTQ (arXiv:2210.17323, algorithm 1): the inputs' rows of the weight are rounded one
    after another, the one with most energy first.  The error of each is made up for by
    the rows that are still floats, as well as they can for inputs with these second
    moments.  The scales are chosen before, so that a block lies together.

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
    if isinstance(w, jax.Array) and base.is_concrete((w, moment)):
        moment = _beside(w, moment)
    return _qwix.quantized(w, qtype, tiles, _Rounded(m), moment)


def _beside(w: jax.Array, moment: Any) -> Any:
    """The moments whole on each of w's devices; there a jit puts what is on none."""
    place = w.sharding
    if isinstance(place, jax.sharding.NamedSharding):
        return jax.device_put(moment, place.update(spec=jax.sharding.PartitionSpec()))
    return moment if moment.sharding == place else np.asarray(moment)


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
    """The numbers (in, out) and scales (in / size, out) of one matrix, as floats."""
    n, moment = len(w), moment.astype(w.dtype)
    seen = jnp.diag(moment)
    nearest = functools.partial(_nearest, qtype, dtype)
    largest = _clipped(nearest, w.reshape(n // size, size, -1), seen.reshape(-1, size))
    order = jnp.argsort(-seen)  # what shows most is rounded first, and made up for
    factor = _inverse_factor(moment[order][:, order])
    part = next(k for k in range(min(n, 128), 0, -1) if n % k == 0)

    def rows(left: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        own, tops, x = (
            lax.dynamic_slice_in_dim(y, k * part, part)
            for y in (factor, largest[order // size], left)
        )
        square = lax.dynamic_slice_in_dim(own, k * part, part, axis=1)

        def row(x: jax.Array, j: jax.Array) -> tuple[jax.Array, Any]:
            codes, _, value = nearest(x[j], tops[j])
            error = (x[j] - value) / square[j, j]
            later = jnp.where(jnp.arange(part) > j, square[j], 0)
            return x - jnp.outer(later, error), (codes, error)

        _, (codes, error) = lax.scan(row, x, jnp.arange(part))
        later = jnp.where(jnp.arange(n) >= (k + 1) * part, own, 0)
        return left - exact(later.T, error), codes

    _, codes = lax.scan(rows, w[order], jnp.arange(n // part))
    codes = jnp.zeros_like(w).at[order].set(codes.reshape(w.shape))
    return codes, jax.vmap(nearest)(largest, largest)[1]


def _clipped(nearest: Any, blocks: jax.Array, seen: jax.Array) -> jax.Array:
    """The largest magnitude (blocks, out) that each block gets numbers for.

    Larger ones are clipped.  It is the part of the block's own largest, of those in
    `PARTS`, with the least squared error, each input weighed by its moment.

    Args:
      nearest: a row and the largest magnitude to codes, scale and values.
      blocks: (blocks, size, out) of the weight.
      seen: (blocks, size) second moments.
    """
    whole = abs(blocks).max(1)
    rounded = jax.vmap(
        jax.vmap(nearest, (0, None))
    )  # (blocks, size, out), (blocks, out)

    def error(part: jax.Array) -> jax.Array:
        values = rounded(blocks, part * whole)[2]
        return jnp.einsum("bso,bs->bo", jnp.square(values - blocks), seen)

    parts = jnp.array(PARTS, blocks.dtype)
    return whole * parts[lax.map(error, parts).argmin(0)]


def _inverse_factor(moment: jax.Array) -> jax.Array:
    """Upper triangular u with uᵀu = the inverse of the damped moments.

    Moments that were rounded may be damped more, until they have an inverse.
    """
    mean = jnp.trace(moment) / len(moment)
    eye = jnp.eye(len(moment), dtype=moment.dtype)
    moment = jnp.where(mean > 0, moment / mean, 0)  # u's scale is free

    def root(damping: jax.Array) -> jax.Array:  # upper · upperᵀ = damped
        damped = moment + damping * eye
        return jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]

    def more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        damping = 4 * state[0]
        return damping, root(damping)

    start = jnp.asarray(DAMPING, moment.dtype)
    _, upper = lax.while_loop(
        lambda state: ~jnp.isfinite(state[1]).all() & (state[0] < len(moment)),
        more,
        (start, root(start)),
    )
    return lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False)


def _nearest(
    qtype: str, dtype: Any, x: jax.Array, largest: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A row in low bits: codes and scales as floats, and values; for each output.

    The scale is that of the block, of which this is the largest magnitude.  What is
    beyond has the outermost code, which is as far from zero on both sides: integers
    round what is half a step beyond, and it stays a hair below that.
    """
    bound = largest * (1 - 2**-8)
    size = _qwix.block_of(qtype) or 2
    pair = jnp.stack([jnp.clip(x, -bound, bound), largest])
    q = _qwix.rounded(qtype, (size, 1), jnp.pad(pair, [(0, size - 2), (0, 0)]), dtype)
    value = base.array(q)[0].astype(x.dtype)
    return q.qvalue[0].astype(jnp.float32), q.scale[0].astype(x.dtype), value
