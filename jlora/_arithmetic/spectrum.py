"""spectrum: the singular values of each delta, as numbers and as a picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._arithmetic.factors import low_rank_leaves, values
from jlora._plan.plan import table
from jlora._printed import PrintedByPath


@dataclasses.dataclass(frozen=True, repr=False)
class Spectrum(PrintedByPath[np.ndarray]):
    """Path to singular values, in falling order; ``print(spectrum)`` is a table.

    Attributes:
      found: path to an array (*stack, r), which has the batch axes and blocks of the
        weight in front.
    """

    found: Mapping[str, np.ndarray]

    def rank(self, path: str, energy: float = 0.99) -> int:
        """How many singular values have this part of the energy, in the neediest layer.

        Example:
          >>> Spectrum({"w": np.array([3.0, 1.0, 0.1])}).rank("w", 0.99)
          2
        """
        power = np.cumsum(self.found[path].astype(np.float64) ** 2, -1)
        enough = power >= energy * power[..., -1:] * (1 - 1e-6)
        return int(np.max(np.argmax(enough, -1), initial=0)) + 1

    def __str__(self) -> str:
        rows = [
            (
                path,
                str(s.shape[-1]),
                f"{np.max(s, initial=0):.3g}",
                f"{np.sqrt(np.sum(s.astype(np.float64) ** 2)):.3g}",
                *(str(self.rank(path, part)) for part in (0.5, 0.9, 0.99)),
            )
            for path, s in self.items()
        ]
        head = ("path", "rank", "largest", "norm", "50 %", "90 %", "99 %")
        return table(head, rows) + (
            "\nthe last columns: how many singular values have this part of the energy"
        )

    def plot(self, file: str | os.PathLike[str] | None = None) -> Any:
        """A picture: the singular values of each weight.

        Of a stack the line is the median of its layers, and the band has all of them.

        Args:
          file: where to save it, by its ending such as ``.png``; None for nowhere.

        Returns:
          The figure of matplotlib.

        Raises:
          ImportError: matplotlib is not installed: ``pip install "jlora[plot]"``.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                'Spectrum.plot needs matplotlib: pip install "jlora[plot]".'
            ) from None
        columns = min(4, max(1, len(self)))
        rows = -(-len(self) // columns)
        size = (3.2 * columns, 2.2 * rows + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for ax, (path, s) in zip(axes, self.items(), strict=False):
            every = s.reshape(-1, s.shape[-1])
            x = np.arange(1, s.shape[-1] + 1)
            if len(every) > 1:
                ax.fill_between(x, every.min(0), every.max(0), alpha=0.25, linewidth=0)
            ax.plot(x, np.median(every, 0), marker="o", markersize=3, linewidth=1)
            ax.set_title(_short(path), fontsize=8)
            ax.set_xlabel("singular value", fontsize=7)
            ax.tick_params(labelsize=7)
            ax.set_ylim(bottom=0)
            ax.set_ylabel("value" if ax is axes[0] else "", fontsize=7)
            ax.spines[["top", "right"]].set_visible(False)
        for ax in axes[len(self) :]:
            ax.set_visible(False)
        if file is not None:
            figure.savefig(file, dpi=150)
        return figure


def _short(path: str, most: int = 34) -> str:
    return path if len(path) <= most else f"…{path[1 - most :]}"


def spectrum(adapter: Any) -> Spectrum:
    """The singular values of the delta of each leaf, from its factors.

    They show how much of its rank an adapter uses: `truncate` takes the rest away.

    Args:
      adapter: an adapter, or an adapted tree.

    Raises:
      ValueError: no low-rank leaf, or one with a magnitude; traced factors.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> x = jlora.adapter(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2))
      >>> jlora.spectrum(x)["kernel"].shape
      (2,)
    """
    leaves = low_rank_leaves(adapter, "spectrum")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaves)):
        raise ValueError(
            "spectrum of traced factors: expected arrays with values, which a table "
            "shows. Call it outside of jit."
        )
    return Spectrum({path: np.asarray(values(x)) for path, x in leaves.items()})
