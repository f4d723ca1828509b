"""Positions along an axis in some order: what a split or a permutation of it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


class Order:
    """Some positions along an axis, in some order.

    It is kept as a start and (size, stride) pairs, the last of which runs fastest, if
    the positions are regular: a slice is one pair, interleaved halves are two.  Any
    other order is kept whole.

    Example:
      >>> Order.of([0, 4, 1, 5, 2, 6, 3, 7])
      Order(0, ((4, 1), (2, 4)))
      >>> Order.of([0, 4, 1, 5]).positions
      array([0, 4, 1, 5])
    """

    def __init__(
        self,
        start: int = 0,
        pairs: Sequence[tuple[int, int]] = (),
        listed: Sequence[int] | None = None,
    ):
        self.start = start
        self.pairs = tuple(pairs)
        self.listed = None if listed is None else tuple(listed)

    @classmethod
    def of(cls, positions: Any) -> Order:
        """The order of these positions, one or more."""
        x = np.asarray(positions, np.int64)
        start, rest, pairs = int(x[0]), x, []
        while len(rest) > 1:
            steps = np.diff(rest)
            other = np.flatnonzero(steps != steps[0])
            size = int(other[0]) + 1 if len(other) else len(rest)
            if len(rest) % size:
                return cls(listed=x.tolist())
            runs = rest.reshape(-1, size)
            if not (np.diff(runs, axis=1) == steps[0]).all():
                return cls(listed=x.tolist())
            pairs.append((size, int(steps[0])))
            rest = runs[:, 0]
        if len(pairs) > 6 and 2 ** len(pairs) > len(x):
            return cls(listed=x.tolist())
        return cls(start, pairs[::-1])

    @classmethod
    def all(cls, n: int) -> Order:
        """All n positions as they are."""
        return cls(0, ((n, 1),) if n > 1 else ())

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """The positions, as an array of integers."""
        if self.listed is not None:
            return np.array(self.listed, np.int64)
        out = np.full(1, self.start, np.int64)
        for size, stride in self.pairs:
            out = (out[:, None] + np.arange(size) * stride).reshape(-1)
        return out

    def __len__(self) -> int:
        if self.listed is not None:
            return len(self.listed)
        return math.prod(size for size, _ in self.pairs)

    @property
    def plain(self) -> bool:
        """Whether the positions follow each other."""
        return self.listed is None and (
            not self.pairs or (len(self.pairs) == 1 and self.pairs[0][1] == 1)
        )

    def whole(self, n: int) -> bool:
        """Whether it is all n positions as they are."""
        return self.plain and self.start == 0 and len(self) == n

    def document(self) -> Any:
        """As JSON: a list of positions, or start and pairs."""
        if self.listed is not None:
            return list(self.listed)
        return {"start": self.start, "pairs": [list(pair) for pair in self.pairs]}

    @classmethod
    def from_document(cls, said: Any) -> Order:
        """From what `document` gave."""
        if isinstance(said, list):
            return cls(listed=[int(k) for k in said])
        pairs = [(int(size), int(stride)) for size, stride in said["pairs"]]
        return cls(int(said["start"]), pairs)

    def words(self) -> str:
        """For a table: ``0:64`` for a slice, ``4×2 of 0:8`` for a regular order."""
        if self.plain:
            return f"{self.start}:{self.start + len(self)}"
        low, high = int(self.positions.min()), int(self.positions.max()) + 1
        if self.listed is not None:
            return f"an order of {len(self):,} in {low}:{high}"
        return f"{'×'.join(str(size) for size, _ in self.pairs)} of {low}:{high}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self.document() == other.document()

    def __hash__(self) -> int:
        return hash((self.start, self.pairs, self.listed))

    def __repr__(self) -> str:
        if self.listed is not None:
            return f"Order(listed=<{len(self):,} positions>)"
        return f"Order({self.start}, {self.pairs})"
