"""A bank: many adapters of one base, each in its slot.

A bank is an adapter, every array of which has one more axis, the first: its slots.  So
`jax.vmap` over a bank gives the adapters one by one, an optimizer trains them all, and
a sharding says on which devices which slots are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
from jax import export

from jlora._imported import when_imported
from jlora._leaf.fields import lacking, stored
from jlora._leaf.leaf import Adapted, is_adapted


class Bank(dict[str, Adapted]):
    """A flat dict from path to leaf, whose arrays have an axis of slots first.

    Inside of `jax.vmap` over its slots it is one adapter, and serves as that.  What it
    is made into otherwise, such as ``bank | {}``, is a plain dict.

    Attributes:
      ndims: static; the number of axes of the weight of each path.
    """

    ndims: Mapping[str, int]

    def __init__(self, leaves: Mapping[str, Adapted], ndims: Mapping[str, int]):
        super().__init__(leaves)
        self.ndims = dict(ndims)

    @property
    def slots(self) -> int | None:
        """The number of slots; None inside of a vmap over them, or without arrays."""
        for path, x in self.items():
            if not is_adapted(x) or lacking(x):  # half of a partition, or labels
                continue
            arrays = [getattr(x, name) for name in stored(x)]
            shapes = [y.shape for y in arrays if hasattr(y, "shape")]
            if shapes and x.ndim == self.ndims[path] + 1:
                return int(shapes[0][0])
        return None

    def __repr__(self) -> str:
        n = self.slots
        of = "of one adapter, or of a half" if n is None else f"of {n} slots"
        return f"Bank({of}: {dict.__repr__(self)})"


def slots_of(x: Any) -> int | None:
    """The number of slots of a bank; None for anything else."""
    return x.slots if isinstance(x, Bank) else None


def refuse_bank(x: Any, what: str) -> None:
    """Raises ValueError for a bank; what is expected is an adapter, or its tree."""
    if (n := slots_of(x)) is not None:
        raise ValueError(
            f"{what}: found a bank of {n} adapters: expected one, jlora.pick(bank, i); "
            "jlora.attach puts it on its params. For a batch whose examples have "
            "adapters of their own: jlora.per_example(fn)(params, bank, ids, ...)."
        )


def one_slot(bank: Bank) -> dict[str, Any]:
    """The shapes and dtypes of one of its adapters."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), dict(bank)
    )


def as_in(tree: Any, leaves: dict[str, Adapted]) -> dict[str, Adapted]:
    """The leaves of a tree as a bank, if the tree is one."""
    return Bank(leaves, tree.ndims) if isinstance(tree, Bank) else leaves


def _flatten(bank: Bank) -> tuple[list[Any], Any]:
    keys = sorted(bank)
    return [bank[k] for k in keys], tuple((k, bank.ndims[k]) for k in keys)


def _flatten_with_keys(bank: Bank) -> tuple[list[Any], Any]:
    leaves, static = _flatten(bank)
    paths = [jax.tree_util.DictKey(path) for path, _ in static]
    return list(zip(paths, leaves, strict=True)), static


def _unflatten(aux_data: Any, children: Any) -> Bank:
    paths = [path for path, _ in aux_data]
    return Bank(dict(zip(paths, children, strict=True)), dict(aux_data))


jax.tree_util.register_pytree_with_keys(Bank, _flatten_with_keys, _unflatten, _flatten)
export.register_pytree_node_serialization(
    Bank,
    serialized_name="jlora.Bank",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda text: tuple(map(tuple, json.loads(bytes(text)))),
    from_children=_unflatten,
)


def _with_flax(flax: Any) -> None:
    """Registers it with Flax's serialisation, as the dict that it is."""

    def from_state(bank: Bank, state: Any) -> Bank:
        return Bank(flax.from_state_dict(dict(bank), state), bank.ndims)

    flax.register_serialization_state(
        Bank, lambda bank: flax.to_state_dict(dict(bank)), from_state
    )


when_imported("flax.serialization", _with_flax)
