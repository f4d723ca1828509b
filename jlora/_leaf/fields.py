"""The one table of the fields of an adapted leaf, and what follows from it.

The table says which of the weight's axes each field has.  From it come the labels,
shapes and partition specs of the fields, what trains, what a checkpoint stores, and
what is checked.  A new field is one line here, and one in the leaf's class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jlora._labels import by_role
from jlora._leaf import base, forms


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a leaf, besides ``w``.

    Attributes:
      axes: the roles of its axes, in order: b, i and o stand for the weight's batch, in
        and out axes, r for the rank, * for all axes of the weight.
      trains: whether it trains; if not, it is frozen.
      optional: whether it may be None in a whole leaf.
      kept: whether it is part of an adapter, and of a checkpoint.
    """

    axes: str
    trains: bool = False
    optional: bool = False
    kept: bool = True


LORA = {
    "a": Field(forms.A, trains=True),
    "b": Field(forms.B, trains=True),
    "scale": Field("b"),
    "c": Field("bo", trains=True, optional=True),
    "m": Field("bo", trains=True, optional=True),
    "gain": Field("bo", optional=True, kept=False),
    "dropout": Field("b", optional=True, kept=False),
}
FULL = {"value": Field("*", trains=True), "on": Field("", optional=True)}


def labels(name: str, axes: str) -> list[int]:
    """The labels of a field of `LoRA`, if the weight's axes have the roles ``axes``.

    Example:
      >>> labels("a", "bio"), labels("c", "obi")
      ([0, 1, -1], [1, 0])
    """
    return by_role(LORA[name].axes, axes)


def mapped(leaf: Any, fn: Callable[[Any, str], Any]) -> dict[str, Any]:
    """fn(array, roles) for the array of every field, by field; None stays None."""
    return {
        name: jax.tree.map(
            lambda x, roles=field.axes: fn(x, roles), getattr(leaf, name)
        )
        for name, field in leaf.fields.items()
    }


def shapes(
    shape: Sequence[int], axes: str, rank: int, form: forms.Form | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every field of a `LoRA` leaf for a weight of this shape.

    Example:
      >>> {name: shapes((5, 3, 4), "bio", 2)[name] for name in ("a", "b", "c")}
      {'a': (5, 3, 2), 'b': (5, 2, 4), 'c': (5, 4)}
    """
    factors = iter(forms.of(form).shapes(tuple(shape), axes, rank))
    return {
        name: next(factors)
        if "r" in field.axes
        else tuple(shape[k] for k in by_role(field.axes, axes))
        for name, field in LORA.items()
    }


def specs(leaf: Any, spec: Any) -> Any:
    """The leaf with a PartitionSpec for each array, if its weight has ``spec``.

    A field's axes are sharded as the weight's are; the rank is whole.  If a form is not
    aligned, its factors are small, and whole on every device.
    """
    names = dict(enumerate(spec))

    def own(_: Any, roles: str) -> PartitionSpec:
        whole = "r" in roles and not forms.of(leaf.form).aligned
        axes = [] if whole else by_role(roles, leaf.axes)
        return PartitionSpec(*(names.get(k) for k in axes))

    w = base.specs(leaf.w, spec)
    return dataclasses.replace(leaf, w=w, **mapped(leaf, own))


def trained(leaf: Any) -> tuple[str, ...]:
    """The fields of a leaf that train; all others are frozen."""
    return _present(leaf, lambda field: field.trains)


def stored(leaf: Any) -> tuple[str, ...]:
    """The fields of a leaf that are part of its adapter."""
    return _present(leaf, lambda field: field.kept)


def _present(leaf: Any, wanted: Callable[[Field], bool]) -> tuple[str, ...]:
    """The wanted fields, without those that are None because they may be."""
    return tuple(
        name
        for name, field in leaf.fields.items()
        if wanted(field) and not (_optional(leaf, name) and getattr(leaf, name) is None)
    )


def _optional(leaf: Any, name: str) -> bool:
    """Whether a field of this leaf may be None."""
    return leaf.fields[name].optional or name in forms.of(leaf.form).implicit


def missing(leaf: Any) -> list[str]:
    """The required fields that are None, as in an adapter or half of a partition."""
    names = ["w", *(name for name in leaf.fields if not _optional(leaf, name))]
    absent = {name: getattr(leaf, name) is None for name in names}
    absent["w"] = base.is_missing(leaf.w)
    return [name for name in names if absent[name]]


def lacking(leaf: Any) -> list[str]:
    """The required fields besides the base that are None, as in half of a partition."""
    return [name for name in missing(leaf) if name != "w"]


def bare(leaf: Any) -> Any:
    """The leaf as it is in an adapter: without its base and the fields not kept."""
    table: Mapping[str, Field] = leaf.fields
    gone = {name: None for name, field in table.items() if not field.kept}
    return dataclasses.replace(leaf, w=base.kept(leaf.w), **gone)


def check(leaf: Any) -> None:
    """Raises ValueError if a field of a `LoRA` leaf does not have its right shape."""
    wanted = shapes(leaf.shape, leaf.axes, leaf.rank, leaf.form)
    for name in stored(leaf):
        if (found := tuple(getattr(leaf, name).shape)) != wanted[name]:
            raise ValueError(
                f"has {name} of shape {found}: expected {wanted[name]}, by its roles "
                f"{leaf.axes!r} and rank {leaf.rank}."
            )


def made(wanted: Container[str]) -> tuple[str, ...]:
    """The fields that a new leaf starts with; an optional one only if wanted."""
    return tuple(n for n, field in LORA.items() if not field.optional or n in wanted)
