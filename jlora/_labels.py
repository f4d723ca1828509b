"""Arrays whose axes have labels: reordered, broadcast and multiplied by label.

Axis k of a weight has the label k.  Axes that only the activation has get the labels
from the weight's ndim on.  The negative labels below are for axes that no weight has.
Nothing here knows what a leaf is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jlora._product import product

# The rank, which a and b share; the blocks of a fused weight; a convolution's input
# features, its groups, and the output features of one group.
RANK, BLOCK, IN, GROUP, OUT = -1, -2, -3, -4, -5


def by_role(roles: str, axes: str) -> list[int]:
    """The labels of axes that have these roles, in this order.

    Args:
      roles: b, i and o stand for all batch, in and out axes of the weight, r for the
        rank, * for all axes of the weight in their own order.
      axes: one letter for each axis of the weight.

    Example:
      >>> by_role("bir", "bio"), by_role("bo", "obi"), by_role("*", "io")
      ([0, 1, -1], [1, 0], [0, 1])
    """
    if roles == "*":
        return list(range(len(axes)))
    own = {role: [k for k, c in enumerate(axes) if c == role] for role in "bio"}
    own["r"] = [RANK]
    return [k for role in roles for k in own[role]]


def order(x: jax.Array, labels: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """x with its axes in the wanted order."""
    if list(labels) == list(wanted):
        return x
    return lax.transpose(x, [labels.index(k) for k in wanted])


def aligned(x: jax.Array, labels: Sequence[int], out: Sequence[int]) -> jax.Array:
    """x with an axis for each of ``out``, of size one where x has no such axis."""
    x = order(x, labels, [k for k in out if k in labels])
    return lax.expand_dims(x, [i for i, k in enumerate(out) if k not in labels])


def spread(
    x: jax.Array, labels: Sequence[int], shape: Sequence[int], out: Sequence[int]
) -> jax.Array:
    """x broadcast to an array of this shape whose axes are ``out``."""
    wanted = [k for k in out if k in labels]
    x = order(x, labels, wanted)
    return lax.broadcast_in_dim(x, shape, [list(out).index(k) for k in wanted])


def dot(
    x: jax.Array,
    xl: Sequence[int],
    y: jax.Array,
    yl: Sequence[int],
    keep: set[int],
    sharding: tuple[Any, Sequence[int]] = (None, ()),
    **params: Any,
) -> tuple[jax.Array, list[int]]:
    """dot_general of x and y.  It sums the labels that both have, except ``keep``.

    Args:
      x: an array.
      xl: its labels.
      y: another array.
      yl: its labels.
      keep: labels that become batch axes if both have them.
      sharding: the sharding of the final result, and the final result's labels.  This
        product takes the entries of the labels that it shares with that result.
      **params: dot_general's other parameters.

    Returns:
      The product and its labels, in dot_general's order: batch, rest of x, rest of y.
    """
    batch = [k for k in xl if k in yl and k in keep]
    summed = [k for k in xl if k in yl and k not in keep]
    dims = (
        (tuple(map(xl.index, summed)), tuple(map(yl.index, summed))),
        (tuple(map(xl.index, batch)), tuple(map(yl.index, batch))),
    )
    rest = [k for k in [*xl, *yl] if k not in batch and k not in summed]
    labels, (wanted, places) = [*batch, *rest], sharding
    if wanted is not None:
        names = dict(zip(places, wanted.spec, strict=False))
        spec = jax.sharding.PartitionSpec(*map(names.get, labels))
        params["out_sharding"] = jax.NamedSharding(wanted.mesh, spec)
    params["dimension_numbers"] = dims
    return product(x, y, tuple(params.items())), labels


def wider(*xs: Any) -> Any:
    """The dtype of the one that has the most bits."""
    return max((x.dtype for x in xs), key=lambda dtype: dtype.itemsize)


def runs(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which runs of old axes a reshape turns into which runs of new axes.

    The runs are as short as possible.  Axes of size one are in no run.

    Example:
      >>> runs((6, 1, 35), (2, 3, 5, 7))
      [((0,), (0, 1)), ((2,), (2, 3))]
    """
    todo = [[k for k, n in enumerate(s) if n != 1] for s in (old, new)]
    out = []
    while todo[0] and todo[1]:
        left, right = [todo[0].pop(0)], [todo[1].pop(0)]
        while (p := math.prod(old[k] for k in left)) != (
            q := math.prod(new[k] for k in right)
        ):
            if p < q:
                left.append(todo[0].pop(0))
            else:
                right.append(todo[1].pop(0))
        out.append((tuple(left), tuple(right)))
    return out
