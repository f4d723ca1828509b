"""The delta of a leaf, and its factors in the plain form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jlora._labels import RANK, order, wider
from jlora._leaf import LoRA, base, forms
from jlora._leaf.fields import labels


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
    form = forms.of(leaf.form)
    if form.replaces:
        d = form.delta(None, change(leaf), leaf.axes)
    else:
        a, b = leaf.a, scaled(leaf, "b")
        wide = wider(a, b)
        d = form.delta(a.astype(wide), b.astype(wide), leaf.axes)
    chex.assert_equal(tuple(d.shape), leaf.shape)
    return d


def rows(leaf: LoRA) -> tuple[jax.Array, jax.Array]:
    """What a leaf that replaces rows has in their place, and what the base has there.

    With a scale s these are s * b + (1 - s) * w, so that 0 turns the adapter off.  At
    one it is b alone, whatever the base has there.
    """
    form: Any = leaf.form
    axes, lb = leaf.axes, labels("b", leaf.axes)
    wide = wider(leaf.b, leaf.scale)
    if base.is_zero(leaf.w):
        old = jnp.zeros(leaf.b.shape, wide)
    else:
        at = axes.index("i")
        own = [RANK if c == "i" else k for k, c in enumerate(axes)]

        def take(w: jax.Array) -> jax.Array:
            return order(form.take(w, at), own, lb).astype(wide)

        old = lax.stop_gradient(base.use(leaf.base, take))
    s, new = lax.stop_gradient(leaf.scale), leaf.b.astype(wide)
    s = lax.expand_dims(s, range(s.ndim, new.ndim)).astype(wide)
    return jnp.where(s == 1, new, s * new + (1 - s) * old), old


def change(leaf: LoRA) -> jax.Array:
    """What a leaf that replaces rows adds to them."""
    new, old = rows(leaf)
    return new - old


def low_rank(leaf: LoRA) -> LoRA:
    """The leaf in the plain form, for which the algebra is written.

    Raises:
      NotFactored: its form cannot be written as the plain one.
    """
    if forms.of(leaf.form).plain:
        return leaf
    if forms.of(leaf.form).replaces:
        leaf = dataclasses.replace(
            leaf, b=change(leaf), scale=jnp.ones_like(leaf.scale)
        )
    a, b = forms.of(leaf.form).low_rank(leaf.a, leaf.b, leaf.axes)
    return dataclasses.replace(leaf, a=a, b=b, form=None)


def in_low_rank(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Calls fn with its leaf in the plain form."""

    @functools.wraps(fn)
    def call(leaf: LoRA, *args: Any, **kwargs: Any) -> Any:
        return fn(low_rank(leaf), *args, **kwargs)

    return call
