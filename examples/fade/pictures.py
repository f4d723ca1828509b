"""The pictures of 3L: what fades, what it is replaced by, and how well it goes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from fading import Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#3a7d44", "#8a8a8a"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over a trailing window, shorter at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (sums[end] - sums[start]) / (end - start)


def draw(results: Sequence[Result], reference: float, watch: str, path: Path) -> None:
    """A row a variant: schedules and accuracy, and the statistics of one weight."""
    faded = [r for r in results if r.variant.setting]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(faded), 2, figsize=(12, 3.4 * len(faded)), layout="constrained"
        )
        for (left, right), result in zip(np.atleast_2d(axes), faded, strict=True):
            _schedules(left, result, reference)
            _statistics(right, result, watch)
        marks = [*left.get_legend_handles_labels(), *right.get_legend_handles_labels()]
        figure.legend(
            [*marks[0], *marks[2]],
            [*marks[1], *(f"{name} of d·W + noise" for name in marks[3])],
            loc="outside upper center",
            ncols=3,
            fontsize=10,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    print(f"picture: {path}")


def _schedules(axis: Any, result: Result, reference: float) -> None:
    history = result.history
    steps = np.arange(len(history["loss"]))
    axis.plot(steps, history["factor"], color=GREY, label="factor of the base")
    axis.plot(steps, history["noise"], color=ORANGE, label="spread of the noise / δ")
    width = max(1, len(steps) // 20)
    batches = smooth(history["accuracy"], width)
    axis.plot(steps, batches, color=BLUE, alpha=0.35, label="accuracy, training")
    axis.plot(
        history["validated"] - 1,
        history["validation"],
        "o-",
        color=BLUE,
        markersize=4,
        label="accuracy, validation",
    )
    axis.axhline(reference, color=GREEN, linestyle="--", linewidth=1)
    axis.annotate(
        f"the whole model, {reference:.3f}",
        (0, reference),
        xytext=(2, 3),
        textcoords="offset points",
        color=GREEN,
        fontsize=9,
    )
    title = f"{result.variant.name}, rank {result.variant.rank}"
    axis.set(title=title, xlabel="step", ylim=(-0.03, 1.05))


def _statistics(axis: Any, result: Result, watch: str) -> None:
    history = result.history
    steps = np.arange(len(history["mean"]))
    axis.plot(steps, history["spread"], color=ORANGE, label="spread")
    axis.plot(steps, history["mean"], color=BLUE, label="mean")
    for name in ("mean", "spread"):
        axis.axhline(history[name][0], color=GREY, linestyle="--", linewidth=1)
    axis.set(title=watch, xlabel="step")
