"""Structure: the leaf of a transposed, reshaped, broadcast or sliced weight.

Each field changes along its own axes.  The base changes by the operation itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra.delta import in_low_rank, low_rank
from jlora._labels import RANK, by_role, order, runs
from jlora._leaf import Dropout, LoRA, base, forms
from jlora._leaf.fields import mapped
from jlora._leaf.forms import NotFactored


def refit(leaf: LoRA, shape: Sequence[int], axes: str) -> LoRA:
    """The leaf reshaped; the axes of each role keep their order."""
    size = dict(enumerate(shape)) | {RANK: leaf.rank}

    def fit(x: Any, roles: str) -> Any:
        return x.reshape([size[k] for k in by_role(roles, axes)])

    w = base.then(leaf.base, Call(lax.reshape, tuple(shape)))
    return dataclasses.replace(leaf, w=w, roles=axes.lstrip("b"), **mapped(leaf, fit))


@dataclasses.dataclass(frozen=True)
class Call:
    """The function from x to fn(x, *args), equal to any other that does the same.

    So JAX's trace cache knows a base that waits for the same operation.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __init__(self, fn: Callable[..., Any], *args: Any):
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "args", args)

    def __call__(self, x: Any) -> Any:
        return self.fn(x, *self.args)


def with_units(leaf: LoRA, wanted: str) -> LoRA:
    """The same leaf, in which each axis of size one has its role in ``wanted``."""
    triples = zip(leaf.shape, leaf.axes, wanted, strict=True)
    axes = "".join(v if n == 1 else r for n, r, v in triples)
    return leaf if axes == leaf.axes else refit(leaf, leaf.shape, axes)


def transpose(leaf: LoRA, permutation: Sequence[int]) -> LoRA:
    """lax.transpose."""
    leaf = leaf if forms.of(leaf.form).turns else low_rank(leaf)
    axes = "".join(leaf.axes[k] for k in permutation)
    place = {k: at for at, k in enumerate(permutation)} | {RANK: RANK}

    def move(x: jax.Array, roles: str) -> jax.Array:
        moved = [place[k] for k in by_role(roles, leaf.axes)]
        return order(x, moved, by_role(roles, axes))

    w = base.then(leaf.base, Call(lax.transpose, tuple(permutation)))
    return dataclasses.replace(leaf, w=w, roles=axes.lstrip("b"), **mapped(leaf, move))


@in_low_rank
def reshape(leaf: LoRA, shape: Sequence[int]) -> LoRA:
    """lax.reshape that mixes no axes of different roles.

    An axis of size one becomes a batch axis; any use may give it another role.

    Raises:
      NotFactored: the reshape mixes axes of different roles, or the size is zero.
    """
    axes = ["b"] * len(shape)
    if 0 in shape:
        raise NotFactored
    for left, right in runs(leaf.shape, shape):
        roles = {leaf.axes[k] for k in left}
        if len(roles) > 1:
            raise NotFactored
        for k in right:
            (axes[k],) = roles
    return refit(leaf, shape, "".join(axes))


@in_low_rank
def squeeze(leaf: LoRA, dimensions: Sequence[int]) -> LoRA:
    """lax.squeeze; the other axes keep their roles."""
    kept = [k for k in range(leaf.ndim) if k not in dimensions]
    axes = "".join(leaf.axes[k] for k in kept)
    return refit(leaf, [leaf.shape[k] for k in kept], axes)


@in_low_rank
def broadcast(leaf: LoRA, shape: Sequence[int], dimensions: Sequence[int]) -> LoRA:
    """lax.broadcast_in_dim; an axis that is new or grows is a batch axis."""
    old = list(zip(leaf.shape, leaf.axes, dimensions, strict=True))
    leaf = with_units(leaf, "".join(c if n == shape[k] else "b" for n, c, k in old))
    units, axes = [1] * len(shape), ["b"] * len(shape)
    for n, c, k in zip(leaf.shape, leaf.axes, dimensions, strict=True):
        units[k], axes[k] = n, c
    leaf = refit(leaf, units, "".join(axes))

    def grow(x: jax.Array, roles: str) -> jax.Array:
        own = by_role(roles, leaf.axes)
        sizes = [leaf.rank if k == RANK else shape[k] for k in own]
        return lax.broadcast_in_dim(x, sizes, range(len(sizes)))

    whole = Call(lax.broadcast_in_dim, tuple(shape), tuple(range(len(shape))))
    fields = mapped(leaf, grow) | {"w": base.then(leaf.base, whole)}
    return folded(dataclasses.replace(leaf, **fields), None)


@in_low_rank
def per_axis(
    leaf: LoRA,
    fn: Callable[..., Any],
    *operands: Any,
    of_base: Callable[..., Any] = base.cut,
) -> LoRA:
    """An operation that acts on each axis separately: slice, rev, dynamic_slice.

    fn(array, labels, *operands) is called on the base and on every field.

    Args:
      leaf: the leaf.
      fn: the operation.
      *operands: its other arguments.
      of_base: what it is for a base: `base.cut`, `base.along` or `base.fieldwise`.

    Raises:
      NotFactored: the operation cuts an in axis of a weight with an output bias.  The
        bias belongs to the sum over the whole axis.
    """

    def one(x: Any, roles: str) -> Any:
        return fn(x, by_role(roles, leaf.axes), *operands)

    w = of_base(leaf.base, fn, *operands)
    part = dataclasses.replace(leaf, w=w, **mapped(leaf, one))
    if leaf.c is not None:
        ins = [k for k, c in enumerate(leaf.axes) if c == "i"]
        if any(part.shape[k] < leaf.shape[k] for k in ins):
            raise NotFactored
    return part


def folded(leaf: LoRA, data: Any) -> LoRA:
    """The leaf with ``data``, or each key's position, folded into its dropout keys."""
    if leaf.dropout is None:
        return leaf
    key = leaf.dropout.key
    at = jnp.arange(key.size) if data is None else jnp.full(key.size, data)
    key = jax.vmap(jax.random.fold_in)(key.reshape(-1), at).reshape(key.shape)
    return dataclasses.replace(leaf, dropout=Dropout(key, leaf.dropout.rate))
