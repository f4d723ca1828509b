"""match: names found by the values themselves.

Each number is mixed into 64 bits.  The sum of the mixed numbers of a line does not
depend on the order along it, so a column of a weight is found among the rows and
columns of all tensors, whatever the order of its own numbers.  Then the lines the other
way give the order along them, and at last all values are compared one by one: nothing
is accepted on a sum, a name or a shape alone.

Weights and checkpoint may have different precisions.  Both are compared in the lower
one, to which the higher is rounded, as whoever converted it did.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._leaf import base as _base
from jlora._plan.plan import Plan, check
from jlora._tree import by_path
from jlora.peft.files import Tensors, Where, tensors
from jlora.peft.names import Names, Part, cut, matrix
from jlora.peft.order import Order
from jlora.peft.weights import Weight, bias_parts, weights

_CHUNK = 1 << 18  # numbers that are mixed at once, so that they stay in the cache


def match(
    params: Any,
    base: Where | Sequence[Where],
    *,
    plan: Plan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Names:
    """Which tensor of a PyTorch checkpoint each weight of a model is, by its values.

    Values decide, through any transpose, reshape, split, fusion, stack, and permutation
    of rows and columns, in the lower precision of the two.  Tensors are read one at a
    time.

    Args:
      params: plain params that have the checkpoint's values.
      base: a safetensors file, a folder of shards with its index, or several of them.
      plan: a plan of params, which tells the roles of the weights' axes.  With None
        they come from the layers' classes and names, as in `jlora.wrap`.
      progress: is called with the number of values done and of all.

    Returns:
      `Names`.  Print them: what has no tensor, or could be several, is listed with the
      reason, and never guessed.

    Raises:
      FileNotFoundError, FormatError: as of the files.
      ValueError: params of which only the shapes are known; a plan of another tree.

    Example:
      >>> import pathlib, tempfile, jax, numpy as np, safetensors.numpy, jlora.peft
      >>> w = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> safetensors.numpy.save_file({"fc.weight": w}, file)
      >>> print(jlora.peft.match({"fc": {"kernel": w.T}}, file))
      path       slice  tensor     how
      ---------------------------------------
      fc/kernel         fc.weight  transposed
      1 weight, 1 part
    """
    leaves = by_path.arrays(params)
    if plan is not None:
        check(plan, leaves, "peft.match")
    if abstract := [p for p, x in leaves.items() if _base.is_abstract(x)]:
        raise ValueError(
            f"peft.match: {abstract[0]!r} has only a shape: expected arrays, since "
            "their values decide."
        )
    known = weights(params, plan)
    files = tensors(base)
    return _Matcher(leaves, known, files, progress).names()


# ------------------------------------------------------------------------ mixed numbers

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


def _hashed(x: np.ndarray, precision: str) -> np.ndarray:
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
_PRECISIONS = "bfloat16", "float16", "float32", "float64"


def _lower(one: str, other: str) -> str:
    """The coarser of two precisions."""
    return min(one, other, key=_PRECISIONS.index)


def _rounded(x: np.ndarray, precision: str) -> np.ndarray:
    own = str(x.dtype)
    if own == precision:
        return x
    if precision == "bfloat16" and own == "float64":
        x = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(jnp.dtype(precision))


def _sums(x: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the mixed numbers of a matrix: (of each row, of each column)."""
    n, m = x.shape
    if x.strides[0] < x.strides[1] and m > 1:
        return _sums(x.T, precision)[::-1]
    rows, columns = np.empty(n, np.uint64), np.zeros(m, np.uint64)
    step = max(1, _CHUNK // max(m, 1))
    for k in range(0, n, step):
        h = _hashed(x[k : k + step], precision)
        rows[k : k + step] = h.sum(1)
        columns += h.sum(0)
    return rows, columns


# ---------------------------------------------------------------------------- the index


@dataclasses.dataclass(frozen=True)
class View:
    """One way to read a tensor as matrices: its name, its axes' roles, and the item.

    Attributes:
      tensor: its name.
      axes: the roles of its axes; "*" for all of it as one line.
      item: the index along its batch axes.
      sums: the sums of its columns, which are looked up, in one precision.
    """

    tensor: str
    axes: str
    item: tuple[int, ...]
    sums: np.ndarray


class _Index:
    """Where each sum of a column is: one entry for each column of each view."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self._keys: list[np.ndarray] = []

    def add(self, view: View) -> None:
        """Enters the columns of a view."""
        self.views.append(view)
        self._keys.append(view.sums)

    @functools.cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums in order, with the view and the column of each."""
        if not self._keys:
            return np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int32)
        keys = np.concatenate(self._keys)
        sizes = [len(k) for k in self._keys]
        views = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        columns = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
        self._keys = []
        order = np.argsort(keys, kind="stable")
        return keys[order], views[order], columns[order]

    def find(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The range of entries that have each sum."""
        keys = self._sorted[0]
        return np.searchsorted(keys, sums, "left"), np.searchsorted(keys, sums, "right")

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(views, columns) of single entries."""
        _, views, columns = self._sorted
        return views[places], columns[places]

    def entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(views, columns) of a range of entries."""
        _, views, columns = self._sorted
        return views[start:stop], columns[start:stop]


@dataclasses.dataclass
class _Claim:
    """Columns of a weight that are columns of a view, by their sums."""

    path: str
    at: tuple[int, ...]
    view: View
    mine: np.ndarray
    theirs: np.ndarray
    turned: bool = False  # rows were looked up in place of columns


@dataclasses.dataclass
class _Matcher:
    """The steps of `match`."""

    leaves: Mapping[str, Any]
    known: Mapping[str, Weight]
    files: Tensors
    progress: Callable[[int, int], None] | None

    def __post_init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.found: dict[str, tuple[Part, ...]] = {}
        self.done = 0
        floats = [name for name in self.files if self.files.is_float(name)]
        self.total = sum(math.prod(self.files.shape(n)) for n in floats) * 2
        self.total += sum(math.prod(w.shape) for w in self.known.values()) * 2
        self.indices: dict[str, _Index] = collections.defaultdict(_Index)
        self.floats = floats

    def _tick(self, n: int) -> None:
        self.done += n
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def names(self) -> Names:
        """All that is found."""
        mine = {str(x.dtype) for x in self.leaves.values()} & {*_PRECISIONS}
        for name in self.floats:
            self._enter(name, mine)
        weights_ = [p for p, w in self.known.items() if self._is_matrix(p, w)]
        claims = [claim for path in weights_ for claim in self._claims(path)]
        self._confirm(claims)
        for path, w in self.known.items():
            if path not in self.found and path not in self.missing:
                self._vector(path, w)
        base = {p: w.said for p, w in self.known.items()}
        shapes = {name: self.files.shape(name) for name in self.files}
        found = {p: self.found[p] for p in self.known if p in self.found}
        self.missing = {p: w for p, w in self.missing.items() if p not in found}
        heads = {p: "" for p, w in self.known.items() if w.tied and p in found}
        return Names(found, self.missing, base, shapes, heads)

    def _is_matrix(self, path: str, w: Weight) -> bool:
        if str(self.leaves[path].dtype) not in _PRECISIONS:
            self.missing[path] = f"it is {self.leaves[path].dtype}: no weight"
            return False
        return w.axes is not None and "i" in w.axes and "o" in w.axes

    # ----------------------------------------------------------------- the checkpoint

    def _enter(self, name: str, precisions: set[str]) -> None:
        x = self.files.view(name)
        own = str(x.dtype)
        for precision in {_lower(own, p) for p in precisions}:
            for view in self._views(name, x, precision):
                self.indices[precision].add(view)
        self._tick(x.size)

    def _views(self, name: str, x: np.ndarray, precision: str) -> Iterator[View]:
        """The readings of a tensor; every number is mixed once.

        A matrix is torch's (out, in), or lies the other way round.  An array of three
        axes may be a stack of these, as of experts.  A convolution has its out axis
        first, a transposed one second.
        """
        if not x.size:
            return
        if x.ndim == 2:
            rows, columns = _sums(x, precision)
            yield View(name, "oi", (), rows)
            yield View(name, "io", (), columns)
            total = rows.sum()
        elif x.ndim > 2:
            rest = "i" * (x.ndim - 2)
            first = np.empty(x.shape[0], np.uint64)
            second = np.zeros(x.shape[1], np.uint64)
            for k, item in enumerate(x):
                rows, columns = _sums(item.reshape(x.shape[1], -1), precision)
                if x.ndim == 3:
                    yield View(name, "boi", (k,), rows)
                    yield View(name, "bio", (k,), columns)
                first[k] = rows.sum()
                second += rows
            yield View(name, "oi" + rest, (), first)
            yield View(name, "io" + rest, (), second)
            total = first.sum()
        else:
            total = _sums(x.reshape(1, -1), precision)[0][0]
        # Every tensor is one line, too: that of a vector, or of an array of any shape.
        yield View(name, "*", (), np.array([total]))

    # --------------------------------------------------------------------- the weights

    def _value(self, path: str) -> np.ndarray:
        return np.asarray(_base.array(self.leaves[path]))

    def _claims(self, path: str) -> list[_Claim]:
        """The columns of a weight, each with the column of a tensor that it is."""
        w = self.known[path]
        assert w.axes is not None
        x = self._value(path)
        batch = [n for n, c in zip(w.shape, w.axes, strict=True) if c == "b"]
        out: list[_Claim] = []
        for at in np.ndindex(*batch):
            m = matrix(x, w.axes, at)
            own = self._layer(path, at, m)
            if isinstance(own, str):
                where = f"{path}{list(at)}" if at else path
                self.missing[path] = f"{where}: {own}" if at else own
                return []
            out += own
            self._tick(m.size)
        return out

    def _layer(
        self, path: str, at: tuple[int, ...], m: np.ndarray
    ) -> list[_Claim] | str:
        """The claims of one matrix; or why it has none."""
        why = "its values are in no tensor"
        precisions = sorted(
            {p for p in self.indices if p == _lower(p, str(m.dtype))},
            key=_PRECISIONS.index,
            reverse=True,
        )
        for precision in precisions:
            rows, columns = _sums(m, precision)
            for sums, turned in ((columns, False), (rows, True)):
                own = self._assigned(self.indices[precision], sums, turned)
                if isinstance(own, str):
                    why = why if "several" in why or turned else own
                    continue
                return [
                    _Claim(path, at, view, mine, theirs, turned)
                    for view, mine, theirs in own
                ]
        return why

    def _assigned(
        self, index: _Index, sums: np.ndarray, turned: bool
    ) -> list[tuple[View, np.ndarray, np.ndarray]] | str:
        """For each view: which lines of a matrix are which of its lines; or why not.

        Lines that are in one view only show the views; equal lines are shared out among
        these, and inside of a view keep their order.
        """
        start, stop = index.find(sums)
        count = stop - start
        zero = sums == 0  # equal to any other line of zeros, or padding
        if not (count[~zero]).any():
            return "its values are in no tensor"
        if n := int(((count == 0) & ~zero).sum()):
            return f"{n:,} of its {len(sums):,} columns are in no tensor"
        if (count == 1).all():
            return [
                (index.views[v], np.flatnonzero(own == v), columns[own == v])
                for own, columns in [index.at(start)]
                for v in dict.fromkeys(own.tolist())
            ]
        return self._shared_out(index, sums, start, stop)

    def _shared_out(
        self, index: _Index, sums: np.ndarray, start: np.ndarray, stop: np.ndarray
    ) -> list[tuple[View, np.ndarray, np.ndarray]] | str:
        """As `_assigned`, where some lines are equal to others."""
        candidates = [index.entries(a, b) for a, b in zip(start, stop, strict=True)]
        single = {
            k: int(v[0])
            for k, (v, _) in enumerate(candidates)
            if sums[k] and len({*v.tolist()}) == 1
        }
        views = {*single.values()}
        if not views:
            return self._ambiguous(
                index, [x for x, n in zip(candidates, sums, strict=True) if n]
            )
        near = single[min(single)]
        free: dict[tuple[int, int], collections.deque[int]] = {}
        chosen: dict[int, tuple[list[int], list[int]]] = {}
        for k, (own, columns) in enumerate(candidates):
            mine = [v for v in dict.fromkeys(own.tolist()) if v in views]
            if not mine and sums[k]:
                return self._ambiguous(index, [candidates[k]])
            near = single.get(k, near)
            # A line that several of the views have goes where its neighbour is.
            for view in sorted(mine, key=lambda v: v != near):
                key = view, int(sums[k])
                if key not in free:
                    free[key] = collections.deque(columns[own == view].tolist())
                if free[key]:
                    lines = chosen.setdefault(view, ([], []))
                    lines[0].append(k)
                    lines[1].append(free[key].popleft())
                    break
            else:
                if sums[k]:
                    return "it has a column more often than the checkpoint"
        return [
            (index.views[v], np.array(a), np.array(b)) for v, (a, b) in chosen.items()
        ]

    def _ambiguous(self, index: _Index, candidates: Sequence[Any]) -> str:
        names = sorted({index.views[v].tensor for own, _ in candidates for v in own})
        if len(names) == 1:
            return f"it is {names[0]!r}, in more ways than one"
        return _several(names)

    # --------------------------------------------------------------------- every value

    def _confirm(self, claims: Sequence[_Claim]) -> None:
        """Compares the values of all claims, tensor by tensor, and makes the parts."""
        by: dict[str, list[_Claim]] = collections.defaultdict(list)
        for claim in claims:
            by[claim.view.tensor].append(claim)
        parts: dict[str, list[Part]] = collections.defaultdict(list)
        failed: dict[str, str] = {}
        for tensor, own in by.items():
            x = self.files.view(tensor)
            for claim in own:
                part = self._part(claim, x)
                if isinstance(part, str):
                    failed[claim.path] = part
                else:
                    parts[claim.path].append(part)
            self._tick(x.size)
        for path, own_parts in parts.items():
            if path in failed:
                continue
            order = sorted(own_parts, key=lambda p: (p.at, p.columns.positions.min()))
            self.found[path] = tuple(order)
        self.missing |= failed

    def _part(self, claim: _Claim, x: np.ndarray) -> Part | str:
        """The part of a claim, if all of its values are equal; else the reason."""
        w = self.known[claim.path]
        assert w.axes is not None
        m = matrix(self._value(claim.path), w.axes, claim.at)
        t = matrix(x, claim.view.axes, claim.view.item)
        axes = claim.view.axes
        if claim.turned:  # its lines are rows: the tensor's roles the other way round
            t, axes = t.T, axes.translate(str.maketrans("io", "oi"))
        precision = _lower(str(m.dtype), str(t.dtype))
        mine, theirs = Order.of(claim.mine), Order.of(claim.theirs)
        if claim.turned:
            m, t = m.T, t.T
        along = self._along(_columns(m, mine), _columns(t, theirs), precision)
        if along is None:
            return (
                f"{claim.view.tensor!r} has the same columns in sum, and other values"
            )
        own, other = along
        rows, t_rows = (mine, theirs) if claim.turned else (own, other)
        columns, t_columns = (own, other) if claim.turned else (mine, theirs)
        rows, t_rows = _by_theirs(rows, t_rows)
        columns, t_columns = _by_mine(columns, t_columns)
        return Part(
            claim.view.tensor,
            axes,
            w.axes,
            w.kind,
            claim.at,
            claim.view.item,
            rows,
            columns,
            t_rows,
            t_columns,
            w.groups,
        )

    def _along(
        self, m: np.ndarray, t: np.ndarray, precision: str
    ) -> tuple[Order, Order] | None:
        """The orders along the first axis by which two matrices are equal; or None."""
        n, k = len(m), len(t)
        if n == k and _equal(m, t, precision):
            return Order.all(n), Order.all(n)
        ours, theirs = _sums_of(m, precision), _sums_of(t, precision)
        a, b = np.argsort(ours, kind="stable"), np.argsort(theirs, kind="stable")
        # Lines of zeros, whose sums are zero and come first, may be padding.
        zeros = [int((x == 0).sum()) for x in (ours, theirs)]
        kept = min(zeros)
        a, b = (np.delete(x, np.s_[kept:z]) for x, z in zip((a, b), zeros, strict=True))
        if len(a) != len(b):
            return None
        if not (ours[a] == theirs[b]).all():
            return None
        order = np.argsort(b, kind="stable")
        a, b = a[order], b[order]
        if not _equal(m, t, precision, a, b):
            return None
        return Order.of(a), Order.of(b)

    # ------------------------------------------------------------- what is no matrix

    def _vector(self, path: str, w: Weight) -> None:
        """A bias of a weight that is known, or an array whose values one tensor has."""
        for weight, parts in list(self.found.items()):
            if by_path.sibling_bias(weight, self.known) == path:
                own = bias_parts(parts, self.known[weight], w.shape)
                if own is not None and self._holds(path, own):
                    self.found[path] = own
                    return
        x = self._value(path)
        if not x.size:
            self.missing[path] = "it is empty"
            return
        self._tick(x.size)
        for split in range(min(x.ndim, 3)):
            own = self._arrays(path, x, split)
            if isinstance(own, tuple):
                self.found[path] = own
                return
            if split == 0 or "several" in own:
                self.missing[path] = own
            if "several" in own:
                return

    def _arrays(self, path: str, x: np.ndarray, split: int) -> tuple[Part, ...] | str:
        """The parts of an array: one tensor for each index along the first axes."""
        parts = []
        axes = "b" * split + "o" * (x.ndim - split)
        for at in np.ndindex(*x.shape[:split]):
            own = self._array(path, x[at].reshape(-1), tuple(map(int, at)), axes)
            if isinstance(own, str):
                return own
            parts.append(own)
        return tuple(parts)

    def _array(
        self, path: str, x: np.ndarray, at: tuple[int, ...], axes: str
    ) -> Part | str:
        for precision in self.indices:
            if precision != _lower(precision, str(x.dtype)):
                continue
            index = self.indices[precision]
            total = _sums(x.reshape(1, -1), precision)[0]
            start, stop = index.find(total)
            views, _ = index.entries(int(start[0]), int(stop[0]))
            lines = [index.views[v] for v in views if index.views[v].axes == "*"]
            same = [v for v in lines if math.prod(self.files.shape(v.tensor)) == x.size]
            if len(same) > 1:
                return _several(v.tensor for v in same)
            if same:
                return self._line(x, same[0].tensor, at, axes, precision)
        return "its values are in no tensor"

    def _line(
        self, x: np.ndarray, tensor: str, at: tuple[int, ...], axes: str, precision: str
    ) -> Part | str:
        t = self.files.view(tensor)
        n = t.ndim
        along = self._along(x[:, None], t.reshape(-1, 1), precision)
        if along is None:
            return f"{tensor!r} has the same sum, and other values"
        own, other = along
        one = Order.all(1)
        return Part(tensor, "o" * n, axes, "vector", at, (), one, own, one, other)

    def _holds(self, path: str, parts: Sequence[Part]) -> bool:
        """Whether the tensors of these parts are there, and have the array's values."""
        x = self._value(path)
        for part in parts:
            if part.tensor not in self.files or not self.files.is_float(part.tensor):
                return False
            t = self.files.view(part.tensor)
            if t.ndim != len(part.tensor_axes):
                return False
            theirs = matrix(t, part.tensor_axes, part.item)
            if theirs.shape[1] <= part.tensor_columns.positions.max():
                return False
            mine = cut(matrix(x, part.axes, part.at), part.rows, part.columns)
            theirs = cut(theirs, part.tensor_rows, part.tensor_columns)
            precision = _lower(str(mine.dtype), str(theirs.dtype))
            if not _equal(mine, theirs, precision):
                return False
        return True


def _columns(x: np.ndarray, order: Order) -> Any:
    """Columns of a matrix; a view where they follow each other."""
    if order.plain:
        return x[:, order.start : order.start + len(order)]
    return _Taken(x, order.positions)


def _sums_of(x: Any, precision: str) -> np.ndarray:
    """The sum of the mixed numbers of each row."""
    if isinstance(x, np.ndarray):
        return _sums(x, precision)[0]
    step = max(1, _CHUNK // max(x.shape[1], 1))
    return np.concatenate(
        [_hashed(x[k : k + step], precision).sum(1) for k in range(0, len(x), step)]
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


def _equal(
    m: Any, t: Any, precision: str, mine: Any = None, theirs: Any = None
) -> bool:
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


def _by_theirs(mine: Order, theirs: Order) -> tuple[Order, Order]:
    """Both orders, listed in the order of the tensor's positions."""
    if theirs.plain:
        return mine, theirs
    order = np.argsort(theirs.positions, kind="stable")
    return Order.of(mine.positions[order]), Order.of(theirs.positions[order])


def _by_mine(mine: Order, theirs: Order) -> tuple[Order, Order]:
    """Both orders, listed in the order of the weight's positions."""
    if mine.plain:
        return mine, theirs
    order = np.argsort(mine.positions, kind="stable")
    return Order.of(mine.positions[order]), Order.of(theirs.positions[order])


def _several(names: Iterable[str]) -> str:
    """The reason that several tensors are equal."""
    own = sorted(names)
    some = ", ".join(map(repr, own[:4]))
    more = f" and {len(own) - 4} more" if len(own) > 4 else ""
    return (
        f"its values are in several tensors, which are equal: {some}{more}. Say which "
        "by hand: names | {path: module}"
    )
