"""Functions on meshes with explicit axes, where an array's type says how it is sharded.

What depends on the JAX version is in `_compat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jlora import _compat


def automatic(fn: Callable[..., Any], out: Callable[[], Any], *args: Any) -> Any:
    """fn(*args), in which XLA chooses the shardings also on explicit axes of a mesh.

    There a function has to say how each result is sharded, and decompositions take no
    sharded operand at all.

    Args:
      fn: a function of arrays, which closes over none.
      out: gives the NamedSharding of each result; called only on explicit axes.
      *args: its arguments.
    """
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    found = next(filter(None, map(_compat.explicit_sharding, arrays)), None)
    if found is None:
        return fn(*args)
    whole = jax.sharding.NamedSharding(found.mesh, jax.sharding.PartitionSpec())

    def given(sharding: Any) -> Any:  # that of an array on no mesh says nothing
        return sharding if _compat.explicit_only(sharding) else whole

    own = jax.tree.map(given, out())
    return jax.sharding.auto_axes(fn, out_sharding=own)(*args)


def replicated(x: jax.Array) -> jax.sharding.NamedSharding:
    """The sharding on the mesh of x by which each device has all of an array."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def explicit(tree: Any) -> bool:
    """Whether an array of a tree is on explicit axes of a mesh."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return any(_compat.explicit_sharding(x) is not None for x in arrays)


def whole(x: jax.Array) -> jax.Array:
    """The array whole on each device, where its axes are explicit."""
    return automatic(lambda x: x, lambda: replicated(x), x)
