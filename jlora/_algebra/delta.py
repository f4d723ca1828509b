"""The delta of a leaf, and its factors in the plain form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
from jax import lax

from jlora._algebra.rows import added
from jlora._labels import wider
from jlora._leaf import LoRA, base, forms


def scaled(leaf: LoRA, name: str, to: Any = None) -> jax.Array:
    """scale * b, or scale * c, in the widest dtype of leaf and factor.

    Scaling a factor costs nothing for each token, and rounds once.  The scale does not
    train.

    Args:
      leaf: the leaf.
      name: the factor's name.
      to: the array that the result is added to, if that is not the leaf's weight.
    """
    field, scale = getattr(leaf, name), lax.stop_gradient(leaf.scale)
    if scale.ndim:  # the leaf is stacked; a scalar broadcasts as it is
        scale = lax.expand_dims(scale, range(scale.ndim, field.ndim))
    w = leaf.w if to is None else to
    wide = wider(field, scale, *([] if base.is_missing(w) else [w]))
    return field.astype(wide) * scale.astype(wide)


def delta(leaf: LoRA) -> jax.Array:
    """scale * a·b in the weight's shape, at full precision in the widest dtype."""
    leaf = added(leaf)
    a, b = leaf.a, scaled(leaf, "b")
    wide = b.dtype if a is None else wider(a, b)
    a = None if a is None else a.astype(wide)
    d = forms.of(leaf.form).delta(a, b.astype(wide), leaf.axes)
    chex.assert_equal(tuple(d.shape), leaf.shape)
    return d


def low_rank(leaf: LoRA) -> LoRA:
    """The leaf in the plain form, for which the algebra is written.

    Raises:
      NotFactored: its form cannot be written as the plain one.
    """
    if forms.of(leaf.form).plain:
        return leaf
    leaf = added(leaf)
    a, b = forms.of(leaf.form).low_rank(leaf.a, leaf.b, leaf.axes)
    return dataclasses.replace(leaf, a=a, b=b, form=None)


def in_low_rank(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Calls fn with its leaf in the plain form."""

    @functools.wraps(fn)
    def call(leaf: LoRA, *args: Any, **kwargs: Any) -> Any:
        return fn(low_rank(leaf), *args, **kwargs)

    return call
