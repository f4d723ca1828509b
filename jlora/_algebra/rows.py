"""A table some of whose rows are replaced: what is in them, and its uses.

Its form is `Rows`.  Everything that differs from a weight to which a·b is added is
here; `added` makes it such a weight, for all other uses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._explicit import automatic
from jlora._labels import RANK, aligned, dot, order, wider
from jlora._leaf import LoRA, base, forms
from jlora._leaf.fields import labels
from jlora._leaf.forms import Misfit


def replaces(leaf: Any) -> bool:
    """Whether the leaf replaces rows, and adds nothing to its base."""
    return isinstance(leaf, LoRA) and forms.of(leaf.form).replaces


def rows_of(leaf: Any) -> tuple[int, ...]:
    """The indices of the rows that a leaf replaces."""
    return tuple(forms.of(leaf.form).indices)


def _in_rows(leaf: LoRA) -> list[int]:
    """The labels of the table's axes, with RANK where its rows are."""
    return [RANK if role == "i" else k for k, role in enumerate(leaf.axes)]


def _new_and_old(leaf: LoRA) -> tuple[jax.Array, jax.Array]:
    """What the leaf has in the rows, and what the base has there; as b.

    With a scale s these are s * b + (1 - s) * w, so that 0 turns the adapter off.  At
    one it is b alone, whatever the base has there.
    """
    form: Any = leaf.form
    wide = wider(leaf.b, leaf.scale)
    if base.is_zero(leaf.w):
        old = jnp.zeros(leaf.b.shape, wide)
    else:

        def take(w: jax.Array) -> jax.Array:
            rows = form.take(w, leaf.axes.index("i"))
            return order(rows, _in_rows(leaf), labels("b", leaf.axes)).astype(wide)

        def like() -> Any:
            return _compat.explicit_sharding(leaf.b)

        take_ = functools.partial(automatic, take, like)
        old = lax.stop_gradient(base.use(leaf.base, take_))
    s, new = lax.stop_gradient(leaf.scale), leaf.b.astype(wide)
    s = lax.expand_dims(s, range(s.ndim, new.ndim)).astype(wide)
    return jnp.where(s == 1, new, s * new + (1 - s) * old), old


def settled(leaf: LoRA) -> LoRA:
    """The leaf with the rows as they are used, and a scale of one.

    Raises:
      Misfit: the table has another shape than the rows were made for, as on the
        shards of a mesh.
    """
    form: Any = leaf.form
    whole = form.weight_shape(leaf.a, leaf.b, leaf.axes)
    if base.shaped(leaf.w) and tuple(leaf.w.shape) != whole:
        raise Misfit(
            f"rows of it train in a table of shape {whole}, found one of shape "
            f"{tuple(leaf.w.shape)}: in a jax.shard_map of your own the table has to "
            "be whole. Give it the spec P(), or shard it outside, by jit."
        )
    new, _ = _new_and_old(leaf)
    return dataclasses.replace(leaf, b=new, scale=jnp.ones_like(leaf.scale))


def added(leaf: LoRA) -> LoRA:
    """The leaf with what is added to the rows as its b, and a scale of one.

    A leaf that replaces nothing stays as it is.
    """
    if not replaces(leaf):
        return leaf
    new, old = _new_and_old(leaf)
    return dataclasses.replace(leaf, b=new - old, scale=jnp.ones_like(leaf.scale))


def dense(leaf: LoRA) -> jax.Array:
    """The merged table of a settled leaf: its own rows, and the base's."""
    form: Any = leaf.form
    new = order(leaf.b, labels("b", leaf.axes), _in_rows(leaf)).astype(leaf.dtype)
    w = base.array(leaf.base)

    def put(w: jax.Array, new: jax.Array) -> jax.Array:
        return form.put(w, new, leaf.axes.index("i"))

    def like() -> Any:
        return jax.typeof(w).sharding

    return automatic(put, like, w, new)


def lookup(leaf: LoRA, gather: Any, y: Any) -> jax.Array:
    """A lookup in a settled leaf.

    Args:
      leaf: a table without batch axes.
      gather: a `gather.Gather` of its rows.
      y: the base's lookup.
    """
    form: Any = leaf.form
    ids = gather.indices[..., 0]
    if gather.rest["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        ids = jnp.clip(ids, 0, form.size - 1)  # as the primitive does
    at, hit = form.find(ids)
    lb = labels("b", leaf.axes)
    new, nl = gather.drop(
        jnp.take(leaf.b, at, lb.index(RANK), mode="clip"), [*gather.index, *lb[1:]]
    )
    y = jnp.zeros(y.shape, y.dtype) if base.is_zero(leaf.w) else y
    new = aligned(new, nl, gather.out).astype(y.dtype)
    return jnp.where(aligned(hit, gather.index, gather.out), new, y)


def contract(
    leaf: LoRA, x: jax.Array, own: Any, p: Any, dtype: Any, params: Any
) -> jax.Array | None:
    """The product with a settled leaf, as in a tied head.

    Args:
      leaf: the table.
      x: the activation.
      own: the base's product, a function of (w, x).
      p: its dimension numbers, a `dot.Product`.
      dtype: the dtype of the product with the rows.
      params: its other parameters.

    Returns:
      None if the table's rows are batched, or stacked.
    """
    form: Any = leaf.form
    at, b, lb = leaf.axes.index("i"), leaf.b.astype(dtype), labels("b", leaf.axes)
    if "b" in leaf.axes or leaf.c is not None:
        return None
    if p.transposed and at not in p.xl:  # one result for each row
        y = base.use(leaf.base, own, x)
        h, hl = dot(x.astype(dtype), p.xl, b, lb, {*p.out}, **params)
        h = order(h, hl, [RANK if k == at else k for k in p.out])
        y = jnp.zeros(y.shape, y.dtype) if base.is_zero(leaf.w) else y
        return form.put(y, h.astype(y.dtype), p.out.index(at))
    if not p.transposed and at in p.contracted:  # a sum over rows
        where = p.xl.index(at)
        rows, rl = form.take(x, where), [RANK if k == at else k for k in p.xl]
        y = base.use(leaf.base, own, form.put(x, 0, where))
        d, dl = dot(rows.astype(dtype), rl, b, lb, {*p.out}, **params)
        return base.plus(y, order(d, dl, p.out))
    return None
