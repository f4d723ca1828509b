"""Where adapters live: each axis of a field is sharded as that axis of the base is.

a has the base's in axes, b has its out axes, and both have its batch axes.  The rank is
whole on every device.  So the low-rank branch moves the same data between devices as
the base's product, and besides only arrays with the rank as one of their axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jlora import _compat
from jlora._leaf import Adapted, Full, fields, is_adapted
from jlora._leaf import base as base_
from jlora._tree import by_path, paths


def of_array(w: Any) -> Sharding | None:
    """The sharding that an array was given; None if JAX may still choose.

    A traced array has one if its mesh has explicit axes; a ``jax.ShapeDtypeStruct`` if
    it was made with one.  A `Base` has that of the array that carries it.
    """
    w = base_.carrier(w)
    if isinstance(w, jax.core.Tracer):
        return _compat.explicit_sharding(w)
    return getattr(w, "sharding", None) if getattr(w, "committed", True) else None


def is_split(place: Sharding | None) -> bool:
    """Whether several devices have different parts of an array."""
    return place is not None and not place.is_fully_replicated


def of_fields(leaf: Adapted, base: Any) -> Any:
    """The leaf with the sharding of each field in its place, from that of the base.

    Args:
      leaf: a leaf of arrays, or of their shapes.
      base: the base's PartitionSpec or Sharding, or None if JAX may choose.
    """
    if isinstance(base, PartitionSpec):
        return fields.specs(leaf, base)
    if isinstance(base, NamedSharding):
        own = jax.tree.map(
            lambda spec: NamedSharding(base.mesh, spec), fields.specs(leaf, base.spec)
        )
    else:
        one = isinstance(base, SingleDeviceSharding)
        place = SingleDeviceSharding(*base.device_set) if one else None
        own = jax.tree.map(lambda _: place, leaf)
    # The base may be in the host's memory, and stays there.  Every step computes with
    # the fields, so they get the device's memory.
    array = leaf.w is not None and not base_.is_base(leaf.w)
    return dataclasses.replace(own, w=base) if array else own


def like(w: Any, fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """fn with its result sharded as w is; nothing is gathered to compute it."""
    place = of_array(w)
    if isinstance(base_.carrier(w), jax.core.Tracer):
        return fn
    if not isinstance(place, NamedSharding):
        return fn
    return jax.jit(fn, out_shardings=place)


def shardings(tree: Any, base: Any) -> Any:
    """The sharding of every array of an adapted tree, from the shardings of its base.

    Use it for ``in_shardings`` and ``out_shardings`` of jit, for the specs of
    ``shard_map``, or for ``jax.device_put``.  To `wrap` sharded arrays you do not need
    it: `wrap` shards the factors itself.

    Args:
      tree: an adapted tree, or one of shapes (``jax.eval_shape(jlora.wrap, params)``).
      base: the PartitionSpec or Sharding of every array of the plain params, as Flax's
        ``get_partition_spec`` gives them.  One for a whole subtree may stand in place
        of the subtree.

    Returns:
      The tree with a PartitionSpec or Sharding in place of each array.  a has the
      base's in axes, b has its out axes, both have its batch axes, and the rank is
      whole.

    Raises:
      ValueError: ``base`` has nothing for one of the arrays.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> from jax.sharding import PartitionSpec as P
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> x = jlora.shardings(t, {"kernel": P("fsdp", "tp")})["kernel"]
      >>> x.a, x.b
      (P('fsdp', None), P(None, 'tp'))
    """

    def given(x: Any) -> bool:
        return x is None or isinstance(x, (PartitionSpec, Sharding))

    pairs, _ = paths.flatten_with_keys(base, given)
    given_at = {paths.path_of(keys): x for keys, x in pairs}

    def own(path: str) -> Any:
        at = path
        while at not in given_at and at:
            at = at.rpartition("/")[0]
        if at not in given_at or not given(given_at[at]):
            found = f"a {type(given_at[at]).__name__}" if at in given_at else "nothing"
            raise ValueError(
                f"shardings: expected a PartitionSpec or Sharding at {path!r} of base, "
                f"found {found}; near paths: {paths.near(path, given_at)}. Give those "
                "of the plain params, such as nn.get_partition_spec(params)."
            )
        return given_at[at]

    def leaf(path: str, x: Any) -> Any:
        if base_.is_base(x):  # as the base of a leaf, which is nothing else here
            return of_fields(Full(x, x), own(path)).w
        return of_fields(x, own(path)) if is_adapted(x) else own(path)

    return by_path.map_leaves(leaf, tree)
