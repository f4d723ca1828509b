"""Linen's boxes, which name the mesh axes of an array, around adapted leaves.

A box of a weight becomes one of an adapted leaf.  It keeps the weight's axis names.
Its new class derives each field's names from them, so that Flax's
``get_partition_spec``, ``get_sharding`` and ``unbox`` know where adapters live.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax

from jlora._leaf import is_adapted
from jlora._leaf.fields import specs
from jlora._tree.paths import flatten_with_keys


def is_box(x: Any) -> bool:
    """Whether x is one of Flax's boxes that name the axes of their value."""
    meta = sys.modules.get("flax.core.meta")  # without Flax there are no boxes
    return meta is not None and isinstance(x, meta.Partitioned)


class _Adapted:
    """The methods that all boxes of adapted leaves share; see `_around`."""

    value: Any
    plain: Any  # Flax's class, which the box of the weight had

    def fields(self) -> Any:
        """The leaf with each field in a box that names the field's axes."""
        plain, rest = self.plain, vars(self)

        def own(x: Any, names: Any) -> Any:
            if x is None:
                return None
            return plain(**rest | {"value": x, "names": tuple(names)})

        names = self.get_partition_spec().value
        return jax.tree.map(own, self.value, names, is_leaf=lambda x: x is None)

    def unbox(self, apply_constraint: bool = True) -> Any:
        fields = self.fields()
        return jax.tree.map(lambda x: x.unbox(apply_constraint), fields, is_leaf=is_box)

    def get_partition_spec(self) -> Any:
        own = specs(self.value, vars(self)["names"])
        return self.replace(value=own)  # type: ignore[attr-defined]

    def get_sharding(self, mesh: jax.sharding.Mesh) -> Any:
        own = self.get_partition_spec()
        return jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), own)


@functools.cache
def _around(cls: Any) -> Any:
    """The class for boxes of class ``cls`` that hold an adapted leaf."""
    name = f"Adapted{cls.__name__}"
    return type(name, (_Adapted, cls), {"__module__": __name__, "plain": cls})


def adapted(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """(keys, leaf) of the adapted leaves; a leaf from a box has its fields in boxes."""
    pairs, _ = flatten_with_keys(
        tree, lambda x: is_adapted(x) or isinstance(x, _Adapted)
    )
    pairs = [(k, x.fields() if isinstance(x, _Adapted) else x) for k, x in pairs]
    return [(keys, x) for keys, x in pairs if is_adapted(x)]


def held(x: Any) -> Any:
    """The value of a box; anything else unchanged."""
    return x.value if is_box(x) else x


def fit(tree: Any) -> Any:
    """The tree, in which the class of each box fits the value that it holds now."""
    if not any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box))):
        return tree

    def one(x: Any) -> Any:
        if not is_box(x) or isinstance(x, _Adapted) == is_adapted(x.value):
            return x
        own: Any = type(x)
        cls = _around(own) if is_adapted(x.value) else own.plain
        return cls(**vars(x))

    return jax.tree.map(one, tree, is_leaf=is_box)
