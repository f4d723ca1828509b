"""The arrays of a checkpoint: how they are stored, and read to their shardings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jlora._leaf import fields
from jlora._tree import sharding
from jlora.checkpoint import checksum, document, orbax
from jlora.checkpoint.extra import is_key


def of_adapter(adapter: dict[str, Any]) -> dict[str, Any]:
    """The arrays of an adapter's leaves, by path and field."""
    return {
        f"{path}:{name}": getattr(x, name)
        for path, x in adapter.items()
        for name in fields.stored(x)
    }


def data(x: Any) -> Any:
    """What is stored for an array: the words of PRNG keys, else the array itself."""
    if is_key(x):
        return jax.random.key_data(x)
    if isinstance(x, jax.Array) and not (
        jax.process_count() > 1 and x.is_fully_addressable
    ):
        return x
    # Also if each of several processes has its own array: these are alike.
    x = np.asarray(x)
    return x.astype(x.dtype.newbyteorder("="))


def places(stored: Any, plan: Any, bases: dict[str, Any]) -> dict[str, Any]:
    """The sharding of each array of the adapter, from the sharding of its base."""
    found: dict[str, Any] = {}
    for p, said in plan.items():
        names = document.names(said, p, stored)
        shapes = {n: document.struct(stored[at]) for n, at in names.items()}
        leaf = document.leaf_of(said, bases[p].shape, shapes)
        own = sharding.of_fields(leaf, sharding.of_array(bases[p]))
        found |= {at: getattr(own, n) for n, at in names.items()}
    return found


def read(
    path: epath.Path,
    arrays: Any,
    items: list[str],
    templates: dict[str, Any],
    wanted: dict[str, Any],
) -> dict[str, Any]:
    """The arrays of a checkpoint in their shardings, each verified by its checksum.

    Args:
      path: the checkpoint.
      arrays: shape, dtype and checksum of each array, by item and name, from the
        document.
      items: the items to read: "adapter", and perhaps "extra".
      templates: arrays of the caller, by name, whose shardings are used.
      wanted: shardings by name; they take precedence over those of templates.
    """

    def target(p: str, shape: list[int], dtype: str) -> Any:
        place = wanted.get(p, sharding.of_array(templates.get(p)))
        if place is None:  # numpy's: an array that JAX may still move
            return np.empty(shape, jnp.dtype(dtype))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    signatures = {k: arrays[k] for k in items if arrays[k]}
    targets: dict[str, Any] = {}
    found: dict[str, Any] = {k: {} for k in signatures}
    for k, v in signatures.items():
        for p, (shape, dtype, _) in v.items():
            if 0 in shape:  # not stored, since Orbax cannot
                numpy = isinstance(templates.get(p), np.ndarray)
                found[k][p] = (np if numpy else jnp).zeros(shape, dtype)
            else:
                targets.setdefault(k, {})[p] = target(p, shape, dtype)

    def from_disk() -> Any:
        with orbax.damage(path, "its arrays cannot be read"):
            args = {k: ocp.args.StandardRestore(v) for k, v in targets.items()}
            return orbax.restore(path, args) if args else {}

    for k, v in orbax.together(path, from_disk).items():
        found[k] |= v

    def verify() -> None:
        sums = {
            (k, p): checksum.checksum(found[k][p])
            for k, v in signatures.items()
            for p in v
        }
        for (k, p), own in sums.items():
            if own != signatures[k][p][2]:
                why = f"the array {p!r} is damaged"
                raise orbax.DamagedError(orbax.damaged(path, why))

    orbax.together(path, verify)
    return found
