"""What the uses of a weight share: dtypes, dropout, output bias and gain."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra.delta import scaled
from jlora._algebra.weight import times
from jlora._labels import RANK, aligned, wider
from jlora._leaf import LoRA, forms
from jlora._leaf.fields import labels
from jlora._leaf.forms import NotFactored

# JAX traces such a function and its derivatives once for each set of shapes, and
# inlines them in each use.  So a deep model costs one trace for each kind of layer.
inlined = functools.partial(jax.jit, inline=True)
Params = tuple[tuple[str, Any], ...]  # a primitive's parameters, as items: hashable


class RolesError(ValueError):
    """This use contradicts the roles of the weight's axes."""


class TokensError(ValueError):
    """A use whose activation does not tell which axis is the tokens."""


def gated(h: jax.Array, hl: Sequence[int], gate: Any, ndim: int) -> jax.Array:
    """x·a, or what was looked up, without the ranks of slots that a token has not.

    The tokens are the first axis of the activation that is not one, of those that the
    weight does not meet.

    Args:
      h: the first product, whose ranks are those of all slots.
      hl: the labels of h.
      gate: (slots,) for all tokens, (tokens, slots), or None.  It is one, or NaN, for a
        slot that a token has, and zero for the others, whatever their numbers are.
      ndim: the number of axes of the weight; the activation's labels are from there on.

    Raises:
      TokensError: that axis has another size.
    """
    if gate is None:
        return h
    at = hl.index(RANK)
    mask = jnp.repeat(gate, h.shape[at] // gate.shape[-1], axis=-1).astype(h.dtype)
    shape = [1] * h.ndim
    shape[at] = h.shape[at]
    if gate.ndim == 1:
        mask = mask.reshape(shape)
        return jnp.where(mask == 0, 0, h * mask)
    own = sorted((k, i) for i, k in enumerate(hl) if k >= ndim and h.shape[i] != 1)
    sizes = tuple(h.shape[i] for _, i in own)
    tokens = len(gate)
    if sizes[:1] != (tokens,) and not (tokens == 1 and not sizes):
        raise TokensError(
            f"with an activation whose axes are {sizes}, besides those that the weight "
            f"meets: expected the {tokens} tokens of ids first. Give one id for each "
            "example, or exclude the path."
        )
    if own:
        mask = mask.T if at < own[0][1] else mask
        shape[own[0][1]] = tokens
    mask = mask.reshape(shape)
    return jnp.where(mask == 0, 0, h * mask)


def compute_dtype(x: jax.Array, w: Any) -> Any:
    """The dtype that the factors are cast to: the wider one of activation and weight.

    An activation of integers does not count.
    """
    dtype = wider(x, w) if jnp.issubdtype(x.dtype, jnp.inexact) else w.dtype
    exact = isinstance(w, LoRA) and forms.of(w.form).exact
    return jnp.promote_types(dtype, jnp.float32) if exact else dtype


def branch(leaf: LoRA, params: dict[str, Any]) -> dict[str, Any]:
    """A product's parameters, as its low-rank branch has them."""
    exact = forms.of(leaf.form).exact
    return params | {"preferred_element_type": None} if exact else params


def drop(leaf: LoRA, x: jax.Array, nth: int) -> jax.Array:
    """Inverted dropout on the activation (arXiv:1207.0580), a new mask for each use."""
    if leaf.dropout is None:
        return x
    rate = leaf.dropout.rate
    # One mask covers all of x, so one of the keys is enough.
    key = jax.random.fold_in(leaf.dropout.key.reshape(-1)[0], nth)
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def with_output_bias(
    leaf: LoRA, h: jax.Array, hl: list[int], factor: jax.Array, fl: list[int]
) -> tuple[jax.Array, jax.Array]:
    """h with a one appended to its rank, and the factor with scale * c as one more row.

    So the second product adds the output bias, and no other operation is needed.

    Args:
      leaf: the weight; without an output bias nothing changes.
      h: x·a.
      hl: the labels of h.
      factor: scale * b.
      fl: the labels of the factor.
    """
    if leaf.c is None or leaf.gain is not None:  # `finished` adds it after the gain
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
    """`with_output_bias`, if the weight is used from its inputs to its outputs.

    Args:
      leaf: the weight.
      used: the weight's axes that the first product sums over or indexes.
      h: the first product.
      hl: the labels of h.
      factor: the second factor.
      fl: the labels of the factor.

    Raises:
      NotFactored: some in axes are not used yet.  A later sum over them would add the
        output bias more than once.
    """
    ins, outs = ({k for k, c in enumerate(leaf.axes) if c == role} for role in "io")
    if leaf.c is None or outs & {*used}:
        return h, factor
    if any(leaf.shape[k] != 1 for k in ins - {*used}):
        raise NotFactored
    return with_output_bias(leaf, h, hl, factor, fl)


# A field and its labels as what meets the axes of a product, and the labels of that.
Each = Callable[[Any, list[int]], tuple[Any, list[int]]]


def finished(
    leaf: LoRA, y: jax.Array, yl: Sequence[int], each: Each = lambda x, xl: (x, xl)
) -> jax.Array:
    """The product of a leaf with the gain, and then the output bias, which has none.

    Args:
      leaf: the leaf; without a gain nothing is left to do.
      y: the product with V.
      yl: the labels of y.
      each: what of the gain and of the output bias meets y, if not all of it does.
    """
    if leaf.gain is None:
        return y
    own = labels("gain", leaf.axes)
    y = times(y, yl, *each(leaf.gain, own))
    if leaf.c is None:
        return y
    c, cl = each(scaled(leaf, "c"), own)
    return y + aligned(c, cl, yl).astype(y.dtype)
