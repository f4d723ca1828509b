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
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora._leaf import base as _base
from jlora._plan.names import is_called_vector
from jlora._plan.plan import Plan, check
from jlora._tree import by_path
from jlora.peft.files import Tensors, Where, tensors
from jlora.peft.lines import (
    Index,
    View,
    by_mine,
    by_theirs,
    in_order,
    preferred,
    shared_out,
)
from jlora.peft.names import Names, Part, cut, matrix
from jlora.peft.order import Order
from jlora.peft.sums import (
    PRECISIONS,
    columns_of,
    common,
    equal,
    sums_of,
    sums_of_lines,
)
from jlora.peft.weights import Weight, bias_parts, weights


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
    if isinstance(params, (str, os.PathLike)):
        raise TypeError(
            "peft.match: expected params, then the base's files; found a path first."
        )
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
    if all(".lora_" in name for name in files):
        raise ValueError(
            f"peft.match: {base} is an adapter: expected the base's own safetensors."
        )
    return _Matcher(leaves, known, files, progress).names()


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
        # By the tensors' dtype, and the precision of the sums.
        self.indices: dict[tuple[str, str], Index] = collections.defaultdict(Index)
        # The tensors of each sum over all numbers, by the same.
        self.wholes: dict[tuple[str, str], dict[int, list[str]]] = {}
        self.zeros: list[str] = []
        self.floats = floats

    def _tick(self, n: int) -> None:
        self.done += n
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def names(self) -> Names:
        """All that is found."""
        mine = {str(x.dtype) for x in self.leaves.values()} & {*PRECISIONS}
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
        heads = dict.fromkeys(self._heads(found), "")
        return Names(found, self.missing, base, shapes, heads)

    def _heads(self, found: Mapping[str, tuple[Part, ...]]) -> list[str]:
        """Embeddings that are the head, too; and heads whose tensor is an embedding."""
        tables = {
            p.tensor for parts in found.values() for p in parts if p.kind == "embed"
        }
        return [
            path
            for path, parts in found.items()
            if self.known[path].tied
            or (parts[0].kind == "dense" and parts[0].tensor in tables)
        ]

    def _keys(self, dtype: str) -> list[tuple[str, str]]:
        """The indices in which a weight of this dtype may be, the finest first."""
        fits = [k for k in self.indices if k[1] == common(k[0], dtype)]
        fits += [
            k for k in self.wholes if k not in fits and k[1] == common(k[0], dtype)
        ]
        return sorted(fits, key=lambda k: (-PRECISIONS.index(k[1]), k[0]))

    def _is_matrix(self, path: str, w: Weight) -> bool:
        if str(self.leaves[path].dtype) not in PRECISIONS:
            self.missing[path] = f"it is {self.leaves[path].dtype}: no weight"
            return False
        return w.axes is not None and "i" in w.axes and "o" in w.axes

    # ----------------------------------------------------------------- the checkpoint

    def _enter(self, name: str, precisions: set[str]) -> None:
        x = self.files.view(name)
        own = str(x.dtype)
        for precision in sorted({common(own, p) for p in precisions}):
            key = own, precision
            total = (
                sums_of_lines(x.reshape(1, -1), precision)[0][0] if x.ndim < 2 else 0
            )
            for view in self._views(name, x, precision):
                self.indices[key].add(view)
                total = view.sums.sum()
            self.wholes.setdefault(key, {}).setdefault(int(total), []).append(name)
            if total == 0 and x.ndim > 1 and not x.any():
                self.zeros.append(name)
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
            rows, columns = sums_of_lines(x, precision)
            yield View(name, "oi", (), rows)
            yield View(name, "io", (), columns)
        elif x.ndim > 2:
            rest = "i" * (x.ndim - 2)
            first = np.empty(x.shape[0], np.uint64)
            second = np.zeros(x.shape[1], np.uint64)
            for k, item in enumerate(x):
                rows, columns = sums_of_lines(item.reshape(x.shape[1], -1), precision)
                if x.ndim == 3:
                    yield View(name, "boi", (k,), rows)
                    yield View(name, "bio", (k,), columns)
                first[k] = rows.sum()
                second += rows
            yield View(name, "oi" + rest, (), first)
            yield View(name, "io" + rest, (), second)

    # --------------------------------------------------------------------- the weights

    def _value(self, path: str) -> np.ndarray:
        return np.asarray(_base.array(self.leaves[path]))

    def _rounded(self, path: str) -> str:
        """What to do about a weight that is quantised, so that no file has it."""
        if not _base.is_lossy(self.leaves[path]):
            return ""
        return "; it is quantised: match the float params, which have the same names"

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
                where = f"at {list(map(int, at))}: " if at else ""
                self.missing[path] = where + own + self._rounded(path)
                return []
            out += own
            self._tick(m.size)
        return out

    def _layer(
        self, path: str, at: tuple[int, ...], m: np.ndarray
    ) -> list[_Claim] | str:
        """The claims of one matrix; or why it has none."""
        why = "its values are in no tensor"
        for key in self._keys(str(m.dtype)):
            if key not in self.indices:
                continue
            precision = key[1]
            rows, columns = sums_of_lines(m, precision)
            for sums, turned in ((columns, False), (rows, True)):
                kind = self.known[path].kind
                own = self._assigned(self.indices[key], sums, kind, m, turned)
                if isinstance(own, str):
                    why = why if "several" in why or turned else own
                    continue
                return [
                    _Claim(path, at, view, mine, theirs, turned)
                    for view, mine, theirs in own
                ]
        return why

    def _assigned(
        self, index: Index, sums: np.ndarray, kind: str, m: np.ndarray, turned: bool
    ) -> list[tuple[View, np.ndarray, np.ndarray]] | str:
        """For each view: which lines of a matrix are which of its lines; or why not.

        Lines that are in one tensor only show the tensors; equal lines are shared out
        among these.  Lines of zeros may be padding.
        """
        start, stop = index.find(sums)
        count = stop - start
        zero = sums == 0  # equal to any other line of zeros, or padding
        if zero.all():
            return "all of it is zero"
        if not (count[~zero]).any():
            return "its values are in no tensor"
        if n := int(((count == 0) & ~zero).sum()):
            return f"{n:,} of its {len(sums):,} columns are in no tensor"
        if (count == 1).all() and not zero.any():
            return [
                (index.views[v], np.flatnonzero(own == v), columns[own == v])
                for own, columns in [index.at(start)]
                for v in dict.fromkeys(own.tolist())
            ]
        candidates = [index.entries(a, b) for a, b in zip(start, stop, strict=True)]
        views = self._chosen(index, candidates, zero, kind)
        if isinstance(views, str):
            return views
        found = shared_out(sums, candidates, views)
        if isinstance(found, str):
            return found
        lost = len(sums) - sum(len(mine) for mine, _ in found.values())
        size = m.shape[1] if turned else m.shape[0]
        if lost and (why := self._padding(lost, size)):
            return why
        out = []
        for v, (mine, theirs) in found.items():
            ordered = in_order(mine, theirs, sums[mine], index.views[v].sums)
            if ordered is None:
                return "it has equal columns, and nothing tells their order"
            out.append((index.views[v], mine, ordered))
        return out

    def _padding(self, lost: int, size: int) -> str:
        """Why lines of zeros may be no padding; empty if they can be nothing else."""
        like = [  # of this size, or of one that was padded to it
            n
            for n in self.zeros
            if any(k <= size < k + 256 for k in self.files.shape(n))
        ]
        if not like:
            return ""
        return (
            f"{lost:,} of its lines are zero: padding, or the tensor of zeros "
            f"{like[0]!r}. Say its parts by hand"
        )

    def _chosen(
        self, index: Index, candidates: Sequence[Any], zero: np.ndarray, kind: str
    ) -> list[int] | str:
        """The views that a matrix is made of: one reading for each tensor."""
        tensors: dict[str, set[int]] = {}
        for k, (views, _) in enumerate(candidates):
            if zero[k]:
                continue
            own = {index.views[v].tensor for v in views.tolist()}
            if len(own) == 1:
                tensors.setdefault(own.pop(), set()).update(views.tolist())
        if not tensors:
            own = [x for x, z in zip(candidates, zero, strict=True) if not z]
            return self._ambiguous(index, own)
        every = {v for own in tensors.values() for v in own}
        for k, (views, _) in enumerate(candidates):
            if not zero[k] and not every & {*views.tolist()}:
                return self._ambiguous(index, [candidates[k]])
        # A tensor that may be read in several ways is read in the first that has all
        # of the lines that it alone has; those of other items are other matrices.
        chosen: list[int] = []
        for tensor, own in tensors.items():
            lines = [
                {*views.tolist()}
                for k, (views, _) in enumerate(candidates)
                if not zero[k]
                and {index.views[v].tensor for v in views.tolist()} == {tensor}
            ]
            ways = sorted(own, key=lambda v: preferred(index.views[v], kind))
            whole = [v for v in ways if all(v in line for line in lines)]
            needed = [v for v in own if any(line == {v} for line in lines)]
            chosen += whole[:1] or needed or ways
        return chosen

    def _ambiguous(self, index: Index, candidates: Sequence[Any]) -> str:
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
        precision = common(str(t.dtype), str(m.dtype))
        mine, theirs = Order.of(claim.mine), Order.of(claim.theirs)
        if claim.turned:
            m, t = m.T, t.T
        along = self._along(columns_of(m, mine), columns_of(t, theirs), precision)
        if along is None:
            return (
                f"{claim.view.tensor!r} has the same columns in sum, and other values"
            )
        if isinstance(along, str):
            return along
        own, other = along
        rows, t_rows = (mine, theirs) if claim.turned else (own, other)
        columns, t_columns = (own, other) if claim.turned else (mine, theirs)
        rows, t_rows = by_theirs(rows, t_rows)
        columns, t_columns = by_mine(columns, t_columns)
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
    ) -> tuple[Order, Order] | str | None:
        """The orders along the first axis by which two are equal, or why not."""
        n, k = len(m), len(t)
        if n == k and equal(m, t, precision):
            return Order.all(n), Order.all(n)
        ours, theirs = sums_of(m, precision), sums_of(t, precision)
        a, b = np.argsort(ours, kind="stable"), np.argsort(theirs, kind="stable")
        # Lines of zeros, whose sums are zero and come first, may be padding.
        zeros = [int((x == 0).sum()) for x in (ours, theirs)]
        kept = min(zeros)
        a, b = (np.delete(x, np.s_[kept:z]) for x, z in zip((a, b), zeros, strict=True))
        if len(a) != len(b):
            return None
        if zeros[0] > kept and (why := self._padding(zeros[0] - kept, m.shape[1])):
            return why
        if not (ours[a] == theirs[b]).all():
            return None
        order = np.argsort(a, kind="stable")
        a, b = a[order], b[order]
        ordered = in_order(a, b, ours[a], theirs)
        if ordered is None:
            return "it has equal rows, and nothing tells their order"
        order = np.argsort(ordered, kind="stable")
        a, b = a[order], ordered[order]
        if not equal(m, t, precision, a, b):
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
        unknown = x.ndim > 1 and w.axes is None and not is_called_vector(path)
        for split in range(max(min(x.ndim, 3), 1)):
            own = self._arrays(path, x, split)
            if isinstance(own, tuple):
                self.found[path] = own
                return
            if split == 0 or "several" in own:
                more = "; nothing tells the roles of its axes: pass plan=" * unknown
                self.missing[path] = own + more + self._rounded(path)
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
        for key in self._keys(str(x.dtype)):
            total = int(sums_of_lines(x.reshape(1, -1), key[1])[0][0])
            found = self.wholes.get(key, {}).get(total, [])
            same = [n for n in found if math.prod(self.files.shape(n)) == x.size]
            if len(same) > 1:
                return _several(same)
            if same:
                return self._line(x, same[0], at, axes, key[1])
        return "its values are in no tensor"

    def _line(
        self, x: np.ndarray, tensor: str, at: tuple[int, ...], axes: str, precision: str
    ) -> Part | str:
        t = self.files.view(tensor)
        n = t.ndim
        along = self._along(x[:, None], t.reshape(-1, 1), precision)
        if along is None:
            return f"{tensor!r} has the same sum, and other values"
        if isinstance(along, str):
            return along
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
            precision = common(str(theirs.dtype), str(mine.dtype))
            if not equal(mine, theirs, precision):
                return False
        return True


def _several(names: Iterable[str]) -> str:
    """The reason that several tensors are equal."""
    own = sorted(names)
    some = ", ".join(map(repr, own[:4]))
    more = f" and {len(own) - 4} more" if len(own) > 4 else ""
    return (
        f"its values are in several tensors, which are equal: {some}{more}. Say which "
        "by hand: names | {path: module}"
    )
