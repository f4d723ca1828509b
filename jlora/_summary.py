"""Counts of parameters, and a table of the adapted leaves."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jlora._leaf import Adapted, LoRA, base, is_adapted
from jlora._leaf.bank import one_slot, slots_of
from jlora._leaf.fields import missing, trained
from jlora._plan.names import is_called_vector
from jlora._plan.plan import listed, oversized, table
from jlora._printed import Printed
from jlora._tree import by_path


def count(tree: Any) -> tuple[int, int]:
    """(trainable, total) numbers of parameters: adapters, and base plus adapters.

    Scales and dropout keys do not count.  Both the base and the value of a `Full` leaf
    do.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2))
      (14, 26)
    """
    sizes = [_sizes(x) for _, x in by_path.flatten(tree)[0]]
    trainable = sum(t for t, _ in sizes)
    return trainable, trainable + sum(base for _, base in sizes)


def _sizes(x: Any) -> tuple[int, int]:
    """(trainable, base) parameters of a leaf."""
    if not is_adapted(x):
        return 0, base.size(x)
    return sum(base.size(getattr(x, name)) for name in trained(x)), base.size(x.w)


def _dtype(x: Adapted) -> str:
    return "" if missing(x) else str(x.dtype)


def _words(x: Adapted) -> str:
    """The roles of a leaf, its form, its output bias and its kind of base."""
    words = [x.axes if isinstance(x, LoRA) else "full"]
    if isinstance(x, LoRA):
        words += [str(x.form)] if x.form else []
        words += [name for name in trained(x) if name not in ("a", "b")]
    words += [base.remark(x.w)] if base.remark(x.w) else []
    return ", ".join(words)


class Summary(Printed, str):
    """A string that is its own repr, so that the interpreter's prompt shows a table."""


def summary(tree: Any) -> Summary:
    """A printable table of the adapted leaves, with the totals of `count`.

    Of a bank, the table is that of one slot.  Below it stand adapters that are no
    smaller than their weights, and the matrices that are not adapted, as embeddings are
    not unless they are named.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((30, 40))}
      >>> print(jlora.summary(jlora.wrap(params, rank=2)))
      path    shape  dtype    adapted  rank  trainable
      ------------------------------------------------
      kernel  30×40  float32  io          2        140
      1 adapted leaf: 140 trainable of 1,340 parameters (10.4 %)
    """
    if (slots := slots_of(tree)) is not None:
        return Summary(f"{summary(one_slot(tree))}\nof each of {slots} slots")
    rows, left, sizes = [], [], []
    for path, x in by_path.flatten(tree)[0]:
        if not is_adapted(x) and _is_matrix(x) and not is_called_vector(path):
            left.append(f"{path} {'×'.join(map(str, x.shape))}")
        if is_adapted(x):
            low = isinstance(x, LoRA)
            sizes += [(path, _sizes(x)[0], math.prod(x.shape))] if low else []
            rows.append(
                (
                    path,
                    "×".join(map(str, x.shape)),
                    _dtype(x),
                    _words(x),
                    str(x.rank) if low else "",
                    f"{_sizes(x)[0]:,}",
                )
            )
    trainable, total = count(tree)
    leaves = f"{len(rows)} adapted lea{'f' if len(rows) == 1 else 'ves'}"
    head = ("path", "shape", "dtype", "adapted", "rank", "trainable")
    share = 100 * trainable / max(total, 1)
    lines = [
        table(head, rows),
        f"{leaves}: {trainable:,} trainable of {total:,} parameters ({share:.3g} %)",
        *oversized(sizes),
    ]
    lines += [f"left as they are: {listed(left)}"] if left else []
    return Summary("\n".join(lines))


def _is_matrix(x: Any) -> bool:
    """Whether x is a floating-point array with at least two axes."""
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return False
    return sum(n > 1 for n in shape) > 1
