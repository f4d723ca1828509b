"""What the uses of a weight share: dtypes, dropout, and the output bias."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra.delta import scaled
from jlora._labels import RANK, wider
from jlora._leaf import LoRA
from jlora._leaf.forms import NotFactored

# A use is traced once for its shapes and inlined wherever it recurs, with its
# derivatives, so a deep model costs one trace for each kind of layer.
inlined = functools.partial(jax.jit, inline=True)
Params = tuple[tuple[str, Any], ...]  # a primitive's parameters as items: hashable


class RolesError(ValueError):
    """This use contradicts the roles that the weight's axes were given."""


def compute_dtype(x: jax.Array, w: Any) -> Any:
    """What the factors are cast to: the activation's dtype.

    Where a product mixes dtypes, the base is read in its own, so the wider one;
    integers have no say.
    """
    return wider(x, w) if jnp.issubdtype(x.dtype, jnp.inexact) else w.dtype


def drop(leaf: LoRA, x: jax.Array, nth: int) -> jax.Array:
    """Inverted dropout on the activation (arXiv:1207.0580); each use has its mask."""
    if leaf.dropout is None:
        return x
    rate = leaf.dropout.rate
    key = jax.random.fold_in(leaf.dropout.key.reshape(-1)[0], nth)
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def with_output_bias(
    leaf: LoRA, h: jax.Array, hl: list[int], factor: jax.Array, fl: list[int]
) -> tuple[jax.Array, jax.Array]:
    """x·a with a one beside its ranks, and scale * b with scale * c as one more row.

    So the output bias goes wherever the second product goes, and needs none of its own.

    Args:
      leaf: the weight; without an output bias nothing changes.
      h: x·a.
      hl: its labels.
      factor: scale * b.
      fl: its labels.
    """
    if leaf.c is None:
        return h, factor
    at = hl.index(RANK)
    one = jnp.ones_like(lax.slice_in_dim(h, 0, 1, axis=at))
    row = lax.expand_dims(scaled(leaf, "c"), [fl.index(RANK)]).astype(factor.dtype)
    return (
        lax.concatenate([h, one], at),
        lax.concatenate([factor, row], fl.index(RANK)),
    )


def with_output_bias_of(
    leaf: LoRA,
    used: Sequence[int],
    h: jax.Array,
    hl: list[int],
    factor: jax.Array,
    fl: list[int],
) -> tuple[jax.Array, jax.Array]:
    """`with_output_bias`, where the weight is used from its inputs to its outputs.

    Args:
      leaf: the weight.
      used: its axes that the first product sums over.
      h: the first product.
      hl: its labels.
      factor: the second factor.
      fl: its labels.

    Raises:
      NotFactored: some of its in axes are left, over which the bias would be summed.
    """
    ins, outs = ({k for k, c in enumerate(leaf.axes) if c == role} for role in "io")
    if leaf.c is None or outs & {*used}:
        return h, factor
    if any(leaf.shape[k] != 1 for k in ins - {*used}):
        raise NotFactored
    return with_output_bias(leaf, h, hl, factor, fl)
