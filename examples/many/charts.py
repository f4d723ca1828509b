"""The pictures of the examples in this folder."""

import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "minilm"))
from figure import BLUE, GREY, ORANGE, STYLE

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _saved(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sweep(runs, history, best: int, path: Path) -> None:
    """Each run's validation loss, by its learning rate; and where they ended."""
    rates, ranks = sorted({r.rate for r in runs}), sorted({r.rank for r in runs})
    shades = plt.cm.viridis(np.linspace(0, 0.9, len(rates)))
    colors = dict(zip(rates, shades, strict=True))
    lines = {rank: ["-", "--", ":", "-."][k % 4] for k, rank in enumerate(ranks)}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.6), layout="constrained"
        )
        steps = np.array(history.evaluated)
        for k, run in enumerate(runs):
            seen = np.isfinite(history.validation[:, k])
            if not seen.any():
                continue
            y = history.validation[seen, k]
            style = {"color": colors[run.rate], "linestyle": lines[run.rank]}
            left.plot(steps[seen], y, **style, linewidth=3 if k == best else 1.3)
            end = "o" if seen[-1] else "x"
            fill = None if k == best else "none"
            left.plot(
                steps[seen][-1:],
                y[-1:],
                end,
                color=colors[run.rate],
                markerfacecolor=fill,
            )
            offset = 1 + 0.06 * (ranks.index(run.rank) - (len(ranks) - 1) / 2)
            right.plot(
                run.rate * offset,
                y[-1],
                end,
                color=colors[run.rate],
                markersize=7 + 3 * ranks.index(run.rank),
                markerfacecolor="none" if end == "o" and k != best else None,
            )
        left.set(title="All runs", xlabel="step", ylabel="validation loss (nats)")
        right.set(title="Where each ended", xlabel="learning rate")
        right.set_ylabel("validation loss (nats)")
        right.set_xscale("log")
        right.set_xticks(rates, [f"{rate:g}" for rate in rates])
        right.minorticks_off()
        for rate in rates:
            left.plot([], [], color=colors[rate], label=f"learning rate {rate:g}")
        for rank in ranks:
            label = f"rank {rank}" + " (larger on the right)" * (rank != ranks[0])
            left.plot([], [], color=GREY, linestyle=lines[rank], label=label)
        for mark, fill, label in (
            ("o", "none", "to the end"),
            ("x", None, "stopped"),
            ("o", None, "the best"),
        ):
            left.plot([], [], mark, color=GREY, markerfacecolor=fill, label=label)
        figure.legend(loc="outside lower center", ncols=5, fontsize=9)
        _saved(figure, path)


def heat_map(table: np.ndarray, adapters, domains, path: Path) -> None:
    """Perplexities (adapters, domains), coloured by how far above a column's lowest."""
    above = table / table.min(0) - 1
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
        picture = axis.imshow(100 * above, cmap="Blues_r", aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            lowest = value == table[:, j].min()
            axis.text(
                j,
                i,
                f"{value:.1f}",
                ha="center",
                va="center",
                weight="bold" if lowest else None,
                color="white" if above[i, j] < above.max() / 2 else "black",
            )
        axis.set_xticks(range(len(domains)), [f"on {name}" for name in domains])
        axis.set_yticks(range(len(adapters)), adapters)
        axis.set_title("Perplexity of held-out texts")
        axis.set_ylabel("adapter")
        figure.colorbar(picture, label="above the lowest of its column, the best (%)")
        _saved(figure, path)


def throughput(rows: list[dict], batch: int, path: Path) -> None:
    """Tokens a second, by the number of distinct adapters in a batch."""
    x = [row["distinct"] for row in rows]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
        for name, color, words in (
            ("base", GREY, "the base alone"),
            ("mixed", BLUE, "each row its own adapter, one batch"),
            ("apart", ORANGE, "one adapter after the other"),
        ):
            y = [row[name] for row in rows]
            axis.plot(x, y, "o-", color=color, linewidth=2, label=words)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, x)
        axis.set_ylim(bottom=0)
        axis.set(
            title=f"Decoding {batch} rows",
            xlabel="distinct adapters in the batch",
            ylabel="tokens a second",
        )
        axis.legend()
        _saved(figure, path)
