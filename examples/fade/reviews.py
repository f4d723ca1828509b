"""Movie reviews as the batches and the accuracy that `fading.train` asks for."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "minilm"))
import sentences


class Reviews:
    """Labelled sentences in batches of one size, tokenised by a snapshot's tokenizer.

    Attributes:
      data: the sentences, their labels and classes.
      parts: the rows of "train", "validation" and "test".
    """

    def __init__(self, data, snapshot: Path, widths: list[int], size: int):
        self.data, self.parts, self.size = data, data.split(), size
        self.tokens = sentences.Tokens.encode(data.texts, snapshot, widths)

    def keep(self, n: int, *parts: str) -> None:
        """A sample of n rows of these parts: the sentences are in an order."""
        for part in parts or list(self.parts):
            rows = np.random.default_rng(0).permutation(self.parts[part])
            self.parts[part] = rows[:n]

    def batches(self, step: int):
        """The inputs and labels of a step, an epoch after the other."""
        rows = self.parts["train"]
        epoch, position = divmod(step, len(rows) // self.size)
        rng = np.random.default_rng([0, epoch])
        rows = self.tokens.epoch(rows, self.size, rng)[position]
        return self.tokens.batch(rows), self.data.labels[rows]

    def accuracy(self, predict, part: str) -> float:
        """Of the logits `predict(ids, mask)` on a part."""
        right = 0
        for rows in self.tokens.batches(self.parts[part], size=64):
            found = predict(*self.tokens.batch(rows)).argmax(-1)
            right += (found == self.data.labels[rows]).sum()
        return float(right) / len(self.parts[part])
