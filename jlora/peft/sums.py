"""Sums of numbers that do not depend on their order, and comparisons of all of them.

Each number is mixed into 64 bits, in the precision in which a tensor and the weight
that was made of it are equal.  Matrices are read chunk by chunk, so that little memory
is needed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.peft.order import Order

_CHUNK = 1 << 18  # numbers that are mixed at once, so that they stay in the cache
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """64 well mixed bits for each number of a few bits (two rounds of MurmurHash3).

    Zero gives zero, so that padding with zeros changes no sum.
    """
    x = bits.astype(np.uint64)
    x *= _MIX[0]
    x ^= x >> np.uint64(29)
    x *= _MIX[1]
    x ^= x >> np.uint64(32)
    return x


@functools.cache
def _table() -> np.ndarray:
    """The mixed bits of every number of 16 bits."""
    return _mixed(np.arange(1 << 16, dtype=np.uint32))


def hashed(x: np.ndarray, precision: str) -> np.ndarray:
    """The mixed bits of an array's numbers, rounded to a precision; -0 is 0."""
    x = _rounded(x, precision)
    if x.dtype.itemsize == 2:
        bits = np.ascontiguousarray(x).view(np.uint16)
        bits = np.where(bits == 0x8000, np.uint16(0), bits)
        return _table()[bits]
    x = np.ascontiguousarray(x) + x.dtype.type(0)
    if x.dtype.itemsize == 4:
        return _mixed(x.view(np.uint32))
    words = x.view(np.uint64)
    return _mixed(words ^ (words >> np.uint64(32)))


# From the coarsest to the finest, by the bits of their fractions.
PRECISIONS = "bfloat16", "float16", "float32", "float64"


def common(file: str, params: str) -> str:
    """The precision in which a tensor and a weight made from it are equal.

    It is the coarser one.  Of float16 and bfloat16 neither is: there it is the
    weight's, which the tensor was rounded to.
    """
    if {file, params} == {"bfloat16", "float16"}:
        return params
    return min(file, params, key=PRECISIONS.index)


def _rounded(x: np.ndarray, precision: str) -> np.ndarray:
    own = str(x.dtype)
    if own == precision:
        return x
    if precision == "bfloat16" and own == "float64":
        x = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(jnp.dtype(precision))


def sums_of_lines(x: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the mixed numbers of a matrix: (of each row, of each column)."""
    n, m = x.shape
    if x.strides[0] < x.strides[1] and m > 1:
        return sums_of_lines(x.T, precision)[::-1]
    rows, columns = np.empty(n, np.uint64), np.zeros(m, np.uint64)
    step = max(1, _CHUNK // max(m, 1))
    for k in range(0, n, step):
        h = hashed(x[k : k + step], precision)
        rows[k : k + step] = h.sum(1)
        columns += h.sum(0)
    return rows, columns


def columns_of(x: np.ndarray, order: Order) -> Any:
    """Columns of a matrix; a view where they follow each other."""
    if order.plain:
        return x[:, order.start : order.start + len(order)]
    return _Taken(x, order.positions)


def sums_of(x: Any, precision: str) -> np.ndarray:
    """The sum of the mixed numbers of each row."""
    if isinstance(x, np.ndarray):
        return sums_of_lines(x, precision)[0]
    step = max(1, _CHUNK // max(x.shape[1], 1))
    return np.concatenate(
        [hashed(x[k : k + step], precision).sum(1) for k in range(0, len(x), step)]
    )


class _Taken:
    """Columns of a matrix in some order, taken chunk by chunk: never all at once."""

    def __init__(self, x: np.ndarray, columns: np.ndarray):
        self._x, self._columns = x, columns
        self.dtype = x.dtype
        self.shape = x.shape[0], len(columns)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._x[rows][:, self._columns]


def equal(m: Any, t: Any, precision: str, mine: Any = None, theirs: Any = None) -> bool:
    """Whether the rows of two matrices are equal in a precision, chunk by chunk.

    Args:
      m: one.
      t: the other.
      precision: to which both are rounded.
      mine: which rows of m; None for all.
      theirs: which rows of t, in the same order.
    """
    if m.shape[1] != t.shape[1]:
        return False
    n, step = len(t) if theirs is None else len(theirs), max(1, _CHUNK // m.shape[1])
    for k in range(0, n, step):
        own = slice(k, k + step)
        a = m[own if mine is None else mine[own]]
        b = t[own if theirs is None else theirs[own]]
        if not (_rounded(np.asarray(a), precision) == _rounded(b, precision)).all():
            return False
    return True
