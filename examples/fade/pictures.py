"""The pictures of 3L: what fades, what it is replaced by, and how well it goes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fading import Result

sys.path.insert(0, str(Path(__file__).parents[1] / "minilm"))
from figure import BLUE, GREY, ORANGE, STYLE, plt, smooth

GREEN = "#3a7d44"


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
