"""The run in one picture: the loss of each step, and perplexity along the way."""

from pathlib import Path

import matplotlib
import numpy as np
import pinned  # noqa: F401  (makes examples/minilm importable)
from figure import BLUE, GREY, ORANGE, STYLE, smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GREEN = "#3f9b5b"
COLORS = {"float": GREY, "int8": ORANGE, "mixed": GREEN, "nf4": BLUE}


def draw(histories: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Writes the picture of some bases' histories (`finetune.State`) to `path`."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.6), layout="constrained"
        )
        for base, history in histories.items():
            color, loss = COLORS[base], history["loss"]
            seen = np.append(0, np.cumsum(history["tokens"]))
            if len(histories) == 1:
                left.plot(seen[1:], loss, color=color, alpha=0.25, linewidth=0.7)
            smoothed = smooth(loss, max(1, len(loss) // 12))
            left.plot(seen[1:], smoothed, color=color, linewidth=2, label=base)
            x, y = seen[history["evaluated"]], history["perplexity"]
            words = f"{base}: {y[0]:.1f} before, {y[-1]:.1f} after"
            right.plot(x, y, "o-", color=color, linewidth=2, label=words)
        left.set(title="Training loss", xlabel="tokens seen")
        left.set_ylabel("cross-entropy (nats a token)")
        right.set(title="Perplexity of held-out texts", xlabel="tokens seen")
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:.0f}")
        right.yaxis.set_minor_formatter("{x:.0f}")
        for axis in (left, right):
            axis.legend(title="base")
        figure.savefig(path, dpi=150)
        plt.close(figure)
