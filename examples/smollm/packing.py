"""Short texts packed into rows of one length, so that one compilation serves them all.

Several texts share a row. Each has a number there, its segment, and no text sees
another. Rotary positions are relative, so a text's logits are those it has alone.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer


class Batch(NamedTuple):
    """Arrays (rows, width)."""

    ids: np.ndarray
    targets: np.ndarray
    """The token that follows each of `ids`."""
    segments: np.ndarray
    """From 1; 0 where the row is not filled."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokenised texts, each after the token `end`, which also follows the last."""

    tokens: list[list[int]]
    end: int
    rows: int
    width: int

    @classmethod
    def encode(
        cls, texts: Sequence[str], tokenizer: Tokenizer, end: int, rows: int, width: int
    ):
        """Tokenises for batches (rows, width); what is longer than a row is cut."""
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return cls([x.ids[: width - 1] for x in encoded], end, rows, width)

    def batches(self, order: Iterable[int]) -> Iterator[Batch]:
        """All the texts of `order`, each in the fullest row that has room for it.

        A batch ends with the first text that fits in no row of it.
        """
        batch: list[list[int]] = [[] for _ in range(self.rows)]
        room = [self.width] * self.rows
        for number in order:
            size = len(self.tokens[number]) + 1
            fitting = [row for row in range(self.rows) if room[row] >= size]
            if not fitting:
                yield self._batch(batch)
                batch = [[] for _ in range(self.rows)]
                room = [self.width] * self.rows
                fitting = [0]
            row = min(fitting, key=room.__getitem__)
            batch[row].append(number)
            room[row] -= size
        if any(batch):
            yield self._batch(batch)

    def epochs(self, part: np.ndarray, seed: int) -> Iterator[Batch]:
        """Without an end: the texts of `part`, in a new order each time."""
        for epoch in itertools.count():
            rng = np.random.default_rng([seed, epoch])
            yield from self.batches(rng.permutation(part))

    def _batch(self, numbers: list[list[int]]) -> Batch:
        batch = Batch(*np.zeros((3, self.rows, self.width), np.int32))
        for row, texts in enumerate(numbers):
            start = 0
            for segment, number in enumerate(texts, 1):
                text = self.tokens[number]
                stop = start + len(text) + 1
                batch.ids[row, start:stop] = [self.end, *text]
                batch.targets[row, start:stop] = [*text, self.end]
                batch.segments[row, start:stop] = segment
                start = stop
        return batch
