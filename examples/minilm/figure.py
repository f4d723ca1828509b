"""The run in one picture: loss, accuracy, and where in the network the adapters act."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from flax.traverse_util import flatten_dict

import jlora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#8a8a8a"
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


def relative_deltas(tree) -> dict[str, float]:
    """The Frobenius norm of each learnt delta, as a share of its weight's norm."""
    merged = flatten_dict(jlora.merge(tree), sep="/")
    base = flatten_dict(jlora.unwrap(tree), sep="/")
    return {
        path: float(jnp.linalg.norm(merged[path] - base[path]))
        / float(jnp.linalg.norm(base[path]))
        for path, leaf in jlora.adapter(tree).items()
        if isinstance(leaf, jlora.LoRA)
    }


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over a trailing window, shorter at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (sums[end] - sums[start]) / (end - start)


def draw(runs, batch: int, head_only: float, majority: float, path: Path) -> None:
    """Writes the picture of all `runs` (one a seed) to `path`."""
    deltas = [relative_deltas(run.tree) for run in runs]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        _curves(axes[0], axes[1], runs, batch)
        for value, words in (
            (head_only, "head only, on the test"),
            (majority, "majority class, on the test"),
        ):
            axes[1].axhline(value, color=GREY, linestyle="--", zorder=1)
            axes[1].annotate(
                f"{words}: {value:.3f}",
                (0.99, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                color="#555555",
            )
        _bars(axes[2], deltas)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _curves(loss_axis, accuracy_axis, runs, batch: int) -> None:
    for i, run in enumerate(runs):
        history, alpha = run.history, 1.0 if len(runs) == 1 else 0.6
        width = max(1, len(history["loss"]) // 12)
        seen = (np.arange(len(history["loss"])) + 1) * batch
        first = i == 0
        if len(runs) == 1:
            loss_axis.plot(seen, history["loss"], color=BLUE, alpha=0.2, linewidth=0.7)
        loss_axis.plot(
            seen, smooth(history["loss"], width), color=BLUE, alpha=alpha, linewidth=2
        )
        accuracy_axis.plot(
            seen,
            smooth(history["accuracy"], width),
            color=BLUE,
            alpha=alpha,
            linewidth=2,
            label="training batches, before their step" if first else None,
        )
        accuracy_axis.plot(
            history["validated"] * batch,
            history["validation"],
            "o-",
            color=ORANGE,
            alpha=alpha,
            linewidth=2,
            label="validation" if first else None,
        )
    loss_axis.set(
        title="Training loss", xlabel="sentences seen", ylabel="cross-entropy (nats)"
    )
    loss_axis.set_ylim(bottom=0)
    accuracy_axis.set(title="Accuracy", xlabel="sentences seen", ylabel="share right")
    accuracy_axis.legend(loc="center right")


def _bars(axis, deltas: list[dict[str, float]]) -> None:
    """Queries and values side by side for every layer, the mean over the runs."""
    for offset, role, color in ((-0.2, "query", BLUE), (0.2, "value", ORANGE)):
        paths = [path for path in deltas[0] if path.endswith(f"{role}/kernel")]
        values = np.array([[run[path] for path in paths] for run in deltas])
        axis.bar(
            np.arange(len(paths)) + offset,
            100 * values.mean(0),
            width=0.38,
            color=color,
            label=role,
        )
    axis.set(
        title="Size of the learnt delta",
        xlabel="layer",
        ylabel="‖scale · a·b‖ / ‖W‖  (%)",
        xticks=np.arange(len(paths)),
    )
    axis.margins(y=0.2)
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper right", ncols=2)
