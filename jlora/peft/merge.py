"""merge: a PEFT adapter folded into its base, from files to files.

No tensor is ever whole in memory, and what is not adapted is copied as bytes: shards,
index and metadata are those of the base.  Each number is computed in float32, and
rounded once.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from jlora._tree.paths import near
from jlora.peft import files
from jlora.peft.files import INDEX, Where, refuse
from jlora.peft.modules import Adapter, Module, read
from jlora.peft.weights import prefix

_CHUNK = 1 << 22  # numbers that are computed at once
_PICKLES = ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5"

Progress = Callable[[int, int], None]


def merge(
    base: Where, adapter: Where, out: Where, *, progress: Progress | None = None
) -> list[str]:
    """Writes a base with a PEFT adapter merged into it.

    Args:
      base: a safetensors file, or a folder of shards.
      adapter: an adapter's directory.
      out: a new file, or a new folder, as the base is.  It appears whole or not at all.
      progress: is called with the number of bytes done and of all.

    Returns:
      The tensors that were changed.

    Raises:
      FileExistsError: ``out`` exists.
      FileNotFoundError, FormatError: as of the files.
      ValueError: a tensor of the adapter that the base has not, or in another shape.
    """
    source, target = (files.folder("merge", x) for x in (base, out))
    target = target.absolute()
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"merge: {target} exists: expected a new place.")
    shards = files.shards(source)
    tensors = files.Tensors(shards)
    changes = _Changes(read(files.folder("merge", adapter)), tensors)
    with files.writing("merge", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    part = pathlib.Path(place)
    try:
        with files.writing("merge", target):
            _fill(part, source, shards, changes, progress)
            if source.is_dir():
                os.chmod(part, 0o755)
                os.rename(part, target)
            else:
                os.rename(part / source.name, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(changes.names)


def _fill(
    part: pathlib.Path,
    source: pathlib.Path,
    shards: list[pathlib.Path],
    changes: _Changes,
    progress: Progress | None,
) -> None:
    """Writes all files of the result into a folder."""
    total, done = sum(p.stat().st_size for p in shards), 0
    for shard in shards:
        new = part / shard.name
        shutil.copyfile(shard, new)
        _rewrite(new, shard, changes)
        done += shard.stat().st_size
        if progress is not None:
            progress(done, total)
    if source.is_dir():
        _copy_rest(source, part)


def _copy_rest(source: pathlib.Path, part: pathlib.Path) -> None:
    """Copies what makes a folder a model: index, config and tokenizer; no pickles."""
    for path in sorted(source.iterdir()):
        if path.is_dir() or path.suffix in (".safetensors", *_PICKLES):
            continue
        if path.name == INDEX or not path.name.startswith("."):
            shutil.copyfile(files.inside(source, path.name), part / path.name)


def _rewrite(new: pathlib.Path, shard: pathlib.Path, changes: _Changes) -> None:
    """Writes the changed tensors of a shard into its copy, in their places."""
    tensors = changes.tensors
    with open(new, "r+b") as f:
        for name in sorted(changes.names):
            if tensors.files[name] == shard:
                for row, values in changes.of(name):
                    f.seek(tensors.offset(name) + row * values[0].nbytes)
                    f.write(np.ascontiguousarray(values).tobytes())
        f.flush()
        os.fsync(f.fileno())


class _Changes:
    """What an adapter makes of each tensor of a base, rows after rows."""

    def __init__(self, adapter: Adapter, tensors: files.Tensors):
        self.tensors = tensors
        add, cut = prefix(set(tensors), adapter.tensors)

        def own(name: str) -> str:
            return cut + name.removeprefix(add)

        self.where = adapter.where
        self.modules = {
            own(t): self._as_stored(own(t), m) for t, m in adapter.modules.items()
        }
        self.whole = {own(t): x for t, x in adapter.whole.items()}
        self.rows = {own(t): x for t, x in adapter.rows.items()}
        self.biases = {
            f"{t.rpartition('.')[0]}.bias": m
            for t, m in self.modules.items()
            if m.c is not None
        }
        self._drop_ties()
        self.names = {*self.modules, *self.whole, *self.rows, *self.biases}
        self._check()
        fan = bool(adapter.config.said.get("fan_in_fan_out"))
        self.turned = {t: self._turned(t, m, fan) for t, m in self.modules.items()}

    def _as_stored(self, name: str, m: Module) -> Module:
        """A module of one expert as one of several, if its tensor is that."""
        single = name in self.tensors and len(self.tensors.shape(name)) == 3
        if m.kind != "linear" or not single or name.endswith(".weight"):
            return m
        return dataclasses.replace(m, kind="experts", a=m.a[None], b=m.b[None])

    def _drop_ties(self) -> None:
        """Leaves out a head that the base keeps as its table, if both are the same."""
        for name in [t for t in self.whole if t not in self.tensors]:
            same = [
                t
                for t in self.tensors
                if self.tensors.shape(t) == self.whole[name].shape
                and self.tensors.is_float(t)
                and (np.asarray(self.whole[name]) == self.tensors.read(t)).all()
            ]
            if same:
                del self.whole[name]

    def _check(self) -> None:
        """Raises for tensors that the base has not, or in another shape."""
        for name in sorted(self.names):
            if name not in self.tensors:
                raise ValueError(
                    f"merge: {self.where} changes {name!r}, which the base has not; "
                    f"near: {near(name, self.tensors)}. A head that is tied to the "
                    "table of words is no tensor of its own: untie it first."
                )
            if not self.tensors.is_float(name):
                refuse(
                    self.tensors.files[name],
                    f"{name!r} is {self.tensors[name][1]}: expected floating-point "
                    "numbers (a quantised base is merged after dequantising it)",
                )
        for name, x in self.whole.items():
            if self.tensors.shape(name) != x.shape:
                raise ValueError(
                    f"merge: {name!r} has shape {x.shape} in the adapter and "
                    f"{self.tensors.shape(name)} in the base: its tokens were resized. "
                    "Resize the base first."
                )
        for name, (indices, values) in self.rows.items():
            shape = self.tensors.shape(name)
            if max(indices) >= shape[0] or values.shape[1:] != shape[1:]:
                raise ValueError(
                    f"merge: row {max(indices)} of {values.shape[1:]} does not fit "
                    f"{name!r} of shape {shape}: expected the adapter's own base."
                )

    def _turned(self, name: str, m: Module, fan: bool) -> bool:
        """Whether a weight lies as (in, out), as an embedding or a Conv1D."""
        shape = self.tensors.shape(name)
        rows, columns = m.a.shape[-2], m.b.shape[-1]
        if m.kind == "embedding":
            ways = {True: (rows, columns)}
        elif m.kind == "experts":
            ways = {
                False: (len(m.a), columns, rows),
                True: (len(m.a), rows, columns),
            }
        elif m.kind == "conv":
            n = rows // int(np.prod(m.kernel))
            ways = {False: (columns, n, *m.kernel)}
        else:
            ways = {False: (columns, rows), True: (rows, columns)}
        fits = [turned for turned, own in ways.items() if own == shape]
        if not fits:
            raise ValueError(
                f"merge: {name!r} has shape {shape} in the base, and factors for (in, "
                f"out) = {(rows, columns)}: expected the adapter's own base."
            )
        if len(fits) == 1:
            return fits[0]
        return self._as_others(name, m) if m.kind == "experts" else self._as_most(fan)

    def _as_most(self, fan: bool) -> bool:
        """How square matrices lie: as the others do; else as the file says."""
        seen = set()
        for name, m in self.modules.items():
            sizes = m.a.shape[-2], m.b.shape[-1]
            if m.kind == "linear" and sizes[0] != sizes[1]:
                seen.add(self.tensors.shape(name) == sizes)
        return seen.pop() if len(seen) == 1 else fan

    def _as_others(self, name: str, m: Module) -> bool:
        """How experts lie whose matrices are square: as the others of their module."""
        for other, own in self.modules.items():
            rows, columns = own.a.shape[-2], own.b.shape[-1]
            if own.name == m.name and own.kind == "experts" and rows != columns:
                return self._turned(other, own, False)
        raise ValueError(
            f"merge: the matrices of {name!r} are square, and nothing tells whether "
            "they lie as (in, out) or (out, in): merge it in peft, or with a model."
        )

    def of(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, new values) of some rows of a tensor after others."""
        shape = self.tensors.shape(name)
        if not shape:
            dtype = self.tensors.dtype(name)
            yield 0, np.asarray(self.whole[name]).astype(dtype).reshape(1)
            return
        for k, old in self._rows(name):
            yield k, self._new(name, k, old)

    def _rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The old rows, as many at once as are computed at once."""
        shape = self.tensors.shape(name)
        step = max(1, _CHUNK // max(int(np.prod(shape[1:])), 1))
        for k in range(0, shape[0], step):
            yield k, self.tensors.rows(name, k, min(k + step, shape[0]))

    def _new(self, name: str, k: int, old: np.ndarray) -> np.ndarray:
        n, dtype = len(old), old.dtype
        out = old
        if name in self.whole:
            out = self.whole[name][k : k + n].astype(dtype)
        if name in self.modules:
            wide = np.result_type(dtype, np.float32)
            out = self._merged(name, k, old.astype(wide))
        if name in self.biases:
            m = self.biases[name]
            assert m.c is not None
            more = m.scale * m.c[k : k + n].astype(np.float32)
            out = out.astype(np.float32) + more
        if name in self.rows:
            indices, values = self.rows[name]
            out = np.array(out)
            for index, value in zip(indices, values, strict=True):
                if k <= index < k + n:
                    out[index - k] = value.astype(dtype)
        return out.astype(dtype)

    def _merged(self, name: str, k: int, old: np.ndarray) -> np.ndarray:
        """Rows of a weight with the delta, and DoRA's magnitude."""
        m, turned = self.modules[name], self.turned[name]
        new = old + self._delta(m, turned, k, old)
        if m.m is None:
            return new
        if turned:
            return new * (m.m / self._norms(name))
        axes = tuple(range(1, new.ndim))
        norm = np.sqrt((new.astype(np.float64) ** 2).sum(axes, keepdims=True))
        own = m.m[k : k + len(old)].reshape(norm.shape)
        return new * (own / norm)

    def _delta(self, m: Module, turned: bool, k: int, old: np.ndarray) -> np.ndarray:
        """scale·a·b for rows of the tensor, as it lies there."""
        a, b = (x.astype(old.dtype) for x in (m.a, m.b))
        own = slice(k, k + len(old))
        if m.kind == "experts":
            d = a[own] @ b[own] if turned else (a[own] @ b[own]).swapaxes(1, 2)
        else:
            d = a[own] @ b if turned else (a @ b[:, own]).T
        return (d * old.dtype.type(m.scale)).reshape(old.shape)

    def _norms(self, name: str) -> np.ndarray:
        """The norm of each column of a merged weight that lies as (in, out)."""
        if getattr(self, "_last", ("", None))[0] != name:
            m = self.modules[name]
            total = np.zeros(m.b.shape[-1])
            for k, old in self._rows(name):
                old = old.astype(np.result_type(old.dtype, np.float32))
                new = old + self._delta(m, True, k, old)
                total += (new.astype(np.float64) ** 2).sum(0)
            self._last = name, np.sqrt(total)
        return self._last[1]
