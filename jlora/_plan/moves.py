"""What a weight's axes become: one function for each primitive that moves them.

A primitive that keeps the axes, and what the lift keeps factored, is among them.  Any
other keeps a weight's axes if it keeps its shape; else nothing is known of its result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jlora import _compat
from jlora._labels import runs
from jlora._plan.seen import NONE, Weight

# fn(weight, equation, old shape, new shape) gives the weight with its axes moved.
Move = Callable[[Weight, Any, Sequence[int], Sequence[int]], Weight]
MOVES: dict[str, Move] = {}


def move(*names: str) -> Callable[[Move], Move]:
    """Registers what the primitives with these names make of a weight's axes."""

    def register(fn: Move) -> Move:
        MOVES.update(dict.fromkeys(names, fn))
        return fn

    return register


@move("transpose")
def _transpose(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    return weight.move(lambda axes: [axes[k] for k in eqn.params["permutation"]])


@move("squeeze")
def _squeeze(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    gone = {k % len(old) for k in eqn.params["dimensions"]}
    kept = [k for k in range(len(old)) if k not in gone]
    return weight.move(lambda axes: [axes[k] for k in kept])


@move("broadcast_in_dim")
def _broadcast(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    dims = eqn.params["broadcast_dimensions"]
    own = {k: j for j, k in enumerate(dims) if old[j] == new[k]}
    return weight.move(
        lambda axes: [axes[own[k]] if k in own else NONE for k in range(len(new))]
    )


@move("reshape", "expand_dims")
def _reshape(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    if (order := eqn.params.get("dimensions")) and eqn.primitive.name == "reshape":
        weight = weight.move(lambda axes: [axes[k] for k in order])
        old = tuple(old[k] for k in order)
    # The axes of an empty array cannot be paired by their sizes.
    pairs = runs(old, new) if 0 not in old else []
    from_ = {k: left for left, right in pairs for k in right}
    return weight.move(
        lambda axes: [
            NONE.union(*(axes[j] for j in from_.get(k, ()))) for k in range(len(new))
        ]
    )


@move(
    *("convert_element_type", "reduce_precision", "name", "neg", "stop_gradient"),
    *("device_put", "rev"),
    *_compat.COPY,
    *_compat.VARY,
    *_compat.RESHARD,
    "sub",
    "select_n",
    "concatenate",
)
def _kept(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    return weight


@move("mul", "div")
def _scaled(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    return dataclasses.replace(weight, scaled=True)


@move("stack")
def _stack(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    at = eqn.params.get("axis", 0)
    return weight.move(lambda axes: (*axes[:at], NONE, *axes[at:]))


@move("unstack")
def _unstack(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    axis = eqn.params["axis"]
    return weight.move(lambda axes: axes[:axis] + axes[axis + 1 :])


@move("slice", "split", *_compat.ALL_GATHER)
def _cut(weight: Weight, eqn: Any, old: Any, new: Any) -> Any:
    # Without tiling, an all_gather adds an axis for the devices.
    return weight if len(new) == len(old) else None
