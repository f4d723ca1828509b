"""Lines of matrices: where each is among those of all tensors, and in which order."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.peft.order import Order


@dataclasses.dataclass(frozen=True)
class View:
    """One way to read a tensor as matrices: its name, its axes' roles, and the item.

    Attributes:
      tensor: its name.
      axes: the roles of its axes.
      item: the index along its batch axes.
      sums: the sums of its columns, which are looked up, in one precision.
    """

    tensor: str
    axes: str
    item: tuple[int, ...]
    sums: np.ndarray


class Index:
    """Where each sum of a column is: one entry for each column of each view."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self._keys: list[np.ndarray] = []

    def add(self, view: View) -> None:
        """Enters the columns of a view."""
        self.views.append(view)
        self._keys.append(view.sums)

    @functools.cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums in order, with the view and the column of each."""
        if not self._keys:
            return np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int32)
        keys = np.concatenate(self._keys)
        sizes = [len(k) for k in self._keys]
        views = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        columns = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
        self._keys = []
        order = np.argsort(keys, kind="stable")
        return keys[order], views[order], columns[order]

    def find(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The range of entries that have each sum."""
        keys = self._sorted[0]
        return np.searchsorted(keys, sums, "left"), np.searchsorted(keys, sums, "right")

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(views, columns) of single entries."""
        _, views, columns = self._sorted
        return views[places], columns[places]

    def entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(views, columns) of a range of entries."""
        _, views, columns = self._sorted
        return views[start:stop], columns[start:stop]


def preferred(view: View, kind: str) -> tuple[int, str]:
    """The order in which readings of one tensor are tried, by the kind of a weight."""
    first = {"embed": ("io",), "conv": ("oii", "oiii", "oiiii")}.get(
        kind, ("oi", "boi")
    )
    return int(view.axes not in first), view.axes


def shared_out(
    sums: np.ndarray, candidates: Sequence[Any], views: Sequence[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]] | str:
    """For each view the lines of a matrix, and the line of the view that each is.

    A line that several views have goes where its neighbour is.
    """
    free: dict[tuple[int, int], collections.deque[int]] = {}
    chosen: dict[int, tuple[list[int], list[int]]] = {}
    alone = [
        [v for v in dict.fromkeys(own.tolist()) if v in views] for own, _ in candidates
    ]
    near = next(
        (v[0] for k, v in enumerate(alone) if len(v) == 1 and sums[k]), views[0]
    )
    for k, (own, columns) in enumerate(candidates):
        if len(alone[k]) == 1 and sums[k]:
            near = alone[k][0]
        for view in sorted(alone[k], key=lambda v: v != near):
            key = view, int(sums[k])
            if key not in free:
                free[key] = collections.deque(columns[own == view].tolist())
            if free[key]:
                lines = chosen.setdefault(view, ([], []))
                lines[0].append(k)
                lines[1].append(free[key].popleft())
                break
        else:
            if sums[k]:
                return "it has a column more often than the checkpoint"
    return {v: (np.array(a), np.array(b)) for v, (a, b) in chosen.items()}


def in_order(
    mine: np.ndarray, theirs: np.ndarray, sums: np.ndarray, of: np.ndarray
) -> np.ndarray | None:
    """The lines that are each of ours, where some are equal; None if nothing tells.

    Lines that are equal keep their order, if those that are not do.  Else they follow
    the regular order that the others have, such as that of interleaved halves.

    Args:
      mine: our lines, in order.
      theirs: a line that each of them is, among equal ones the next.
      sums: the sum of each of ours.
      of: the sums of all of theirs.
    """
    _, where, counts = np.unique(sums, return_inverse=True, return_counts=True)
    known = (counts[where] == 1) & (sums != 0)
    if known.all() or (np.diff(theirs[known]) > 0).all():
        ordered = known.all() or (np.diff(theirs) > 0).all()
        return theirs if ordered else _regular(theirs, known, sums, of)
    return _regular(theirs, known, sums, of)


def _regular(
    theirs: np.ndarray, known: np.ndarray, sums: np.ndarray, of: np.ndarray
) -> np.ndarray | None:
    """The regular order of all positions that the known ones have; None without one."""
    n, start = len(theirs), int(theirs.min())
    if int(theirs.max()) - start + 1 != n or known.sum() < 2:
        return None
    at = np.flatnonzero(known)
    for a in (d for d in range(1, n + 1) if n % d == 0):
        for b in (d for d in range(1, n // a + 1) if n // a % d == 0):
            x = np.arange(n).reshape(a, b, n // (a * b))
            for axes in itertools.permutations(range(3)):
                order = x.transpose(axes).reshape(-1) + start
                same = (order[at] == theirs[at]).all()
                if same and (of[order] == sums).all():
                    return order
    return None


def by_theirs(mine: Order, theirs: Order) -> tuple[Order, Order]:
    """Both orders, listed in the order of the tensor's positions."""
    if theirs.plain:
        return mine, theirs
    order = np.argsort(theirs.positions, kind="stable")
    return Order.of(mine.positions[order]), Order.of(theirs.positions[order])


def by_mine(mine: Order, theirs: Order) -> tuple[Order, Order]:
    """Both orders, listed in the order of the weight's positions."""
    if mine.plain:
        return mine, theirs
    order = np.argsort(mine.positions, kind="stable")
    return Order.of(mine.positions[order]), Order.of(theirs.positions[order])
