"""Names: which weight of a model is which tensor of a PyTorch checkpoint.

A weight is made of `Part`s.  Each says that some rows and columns of the weight's
matrix are some rows and columns of one tensor.  So stacked layers, fused projections,
split heads and permuted channels are all the same thing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora._labels import by_role
from jlora._plan.plan import table
from jlora._printed import PrintedByPath
from jlora.peft import files
from jlora.peft.order import Order

FORMAT = "jlora names"
VERSION = 1
FILE = "jlora_names.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows and columns of a weight's matrix that are those of one tensor.

    The matrix of a weight is (in, out): its in axes in one, in their own order, then
    its out axes; one matrix for each index along its batch axes.  The matrix of a
    tensor is the same by the tensor's own axes.

    Attributes:
      tensor: its name in the checkpoint, such as "model.layers.0.mlp.up_proj.weight".
      tensor_axes: the roles of its axes: "oi" for torch's Linear, "io" for the Conv1D
        of GPT-2 and for embeddings, "oiii" for a Conv2d, "boi" for experts, "o" for a
        bias.
      axes: the roles of the weight's own axes.
      kind: "dense", "embed" or "conv"; "vector" for what is no matrix.
      at: the index along the weight's batch axes.
      item: the index along the tensor's batch axes.
      rows: which rows of the weight's matrix they are.
      columns: which columns.
      tensor_rows: which rows of the tensor's matrix these are, in the same order.
      tensor_columns: which columns.
      groups: a convolution's number of groups.
      window: the sizes of its window, if no shape of the tensor tells them.
    """

    tensor: str
    tensor_axes: str
    axes: str
    kind: str
    at: tuple[int, ...]
    item: tuple[int, ...]
    rows: Order
    columns: Order
    tensor_rows: Order
    tensor_columns: Order
    groups: int = 1
    window: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """The path of the torch module that has the tensor."""
        return self.tensor.rpartition(".")[0]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        said: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            said[field.name] = x.document() if isinstance(x, Order) else x
        return said

    @classmethod
    def from_document(cls, said: Mapping[str, Any]) -> Part:
        """From what `document` gave."""
        own = dict(said)
        for name in ("rows", "columns", "tensor_rows", "tensor_columns"):
            own[name] = Order.from_document(own[name])
        for name in ("at", "item", "window"):
            own[name] = tuple(map(int, own[name]))
        return cls(**own)

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor's values for the part, (rows, columns)."""
        x = matrix(tensor, self.tensor_axes, self.item)
        return cut(x, self.tensor_rows, self.tensor_columns)

    def words(self, shape: Sequence[int]) -> str:
        """What was done to the tensor, for a table.

        Args:
          shape: the tensor's shape; empty if it is not known.
        """
        turned = {"oi", "boi"}
        said = "transposed" if self.tensor_axes in turned else ""
        done = [said] if said else []
        sizes = dict.fromkeys("io", 0)
        for n, role in zip(shape, self.tensor_axes, strict=False):
            if role != "b":
                sizes[role] = (sizes[role] or 1) * n
        for word, own, theirs, n in (
            ("in", self.rows, self.tensor_rows, sizes["i"]),
            ("out", self.columns, self.tensor_columns, sizes["o"]),
        ):
            if not theirs.plain or not own.plain:
                odd = own if theirs.plain else theirs
                done.append(f"{word} permuted ({odd.words()})")
            elif n and not theirs.whole(n):
                done.append(f"{word} {theirs.words()}")
        return ", ".join(done)


def sizes(shape: Sequence[int], axes: str) -> tuple[list[int], list[int], list[int]]:
    """The sizes of the batch, in and out axes.

    Example:
      >>> sizes((3, 6, 2, 4), "bioo")
      ([3], [6], [2, 4])
    """
    batch, in_, out = ([shape[k] for k in by_role(role, axes)] for role in "bio")
    return batch, in_, out


def matrix(x: np.ndarray, axes: str, at: tuple[int, ...] = ()) -> np.ndarray:
    """The matrix (in, out) of an array whose axes have these roles.

    Args:
      x: the array.
      axes: one letter for each axis.
      at: the index along its batch axes.
    """
    x = np.transpose(x, by_role("bio", axes))[at]
    return x.reshape(math.prod(x.shape[: axes.count("i")]), -1)


def from_matrix(x: np.ndarray, axes: str, shape: Sequence[int] | None) -> np.ndarray:
    """The array of matrices (items, in, out); the inverse of `matrix`.

    Args:
      x: the matrices.
      axes: the roles of the array's axes.
      shape: its shape; None if each role has one axis at most.
    """
    order = by_role("bio", axes)
    if shape is None:
        sizes = dict(zip("bio", x.shape, strict=True))
        shape = [sizes[c] for c in axes]
    moved = x.reshape([shape[k] for k in order])
    return np.transpose(moved, np.argsort(order))


def cut(x: np.ndarray, rows: Order, columns: Order) -> np.ndarray:
    """Rows and columns of a matrix; a view where they follow each other."""
    for axis, order in enumerate((rows, columns)):
        if order.plain:
            own = slice(order.start, order.start + len(order))
            x = x[own] if axis == 0 else x[:, own]
        else:
            x = np.take(x, order.positions, axis)
    return x


@dataclasses.dataclass(frozen=True, repr=False)
class Names(PrintedByPath[tuple[Part, ...]]):
    """Path to the `Part`s of its weight; ``print(names)`` is a table.

    `match` finds them.  ``names | {path: module}`` says some by hand, `save` writes
    them as JSON, and ``Names.load`` reads them back.

    Attributes:
      found: path to parts.
      missing: path to the reason why it has none.
      base: path to (shape, dtype), for every array of the model.
      tensors: name to shape, for every tensor of the checkpoint.
      heads: for embeddings that are the head, too (tied): the path to the head's module
        in torch, or to "" if it is not known.
      said: path to what was said by hand, which a tree completes.
    """

    found: Mapping[str, tuple[Part, ...]]
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: Mapping[str, tuple[tuple[int, ...], str]] = dataclasses.field(
        default_factory=dict
    )
    tensors: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    heads: dict[str, str] = dataclasses.field(default_factory=dict)
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __or__(self, other: Any) -> Names:
        """These names, with others in their place where both have them."""
        if isinstance(other, Names):
            new = {p: v for p, v in self.said.items() if p not in other.found}
            return Names(
                {**self.found, **other.found},
                {
                    p: w
                    for p, w in {**self.missing, **other.missing}.items()
                    if p not in {**self.found, **other.found}
                },
                {**self.base, **other.base},
                {**self.tensors, **other.tensors},
                {**self.heads, **other.heads},
                {**new, **other.said},
            )
        if not isinstance(other, Mapping):
            return NotImplemented
        left = {p: v for p, v in self.found.items() if p not in other}
        missing = {p: v for p, v in self.missing.items() if p not in other}
        said = {**self.said, **other}
        return dataclasses.replace(self, found=left, missing=missing, said=said)

    @property
    def modules(self) -> set[str]:
        """The path of every module of the checkpoint that has a tensor."""
        return {tensor.rpartition(".")[0] for tensor in self.tensors}

    def parts_of(self, tensor: str) -> list[Part]:
        """The parts that are of a tensor, whatever their weight."""
        return [p for own in self.found.values() for p in own if p.tensor == tensor]

    def renamed(self, how: Any) -> Names:
        """These names with the tensors of another checkpoint of the same model.

        Args:
          how: a function from name to name, or pairs of (regular expression,
            replacement), each of which is applied in turn, as by ``re.sub``.

        Example:
          >>> part = Part("fc.weight", "oi", "io", "dense", (), (), *[Order.all(2)] * 4)
          >>> names = Names({"fc/kernel": (part,)})
          >>> names.renamed([("^", "model.")])["fc/kernel"][0].tensor
          'model.fc.weight'
        """
        pairs = [] if callable(how) else _compiled(how)

        def new(name: str) -> str:
            if callable(how):
                return str(how(name))
            for pattern, to in pairs:
                name = pattern.sub(to, name)
            return name

        found = {
            path: tuple(dataclasses.replace(p, tensor=new(p.tensor)) for p in parts)
            for path, parts in self.found.items()
        }
        tensors = {new(name): shape for name, shape in self.tensors.items()}
        return dataclasses.replace(self, found=found, tensors=tensors)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes them as JSON, in one step: the file is whole or as it was."""
        if self.said:
            raise ValueError(
                f"Names.save: {', '.join(map(repr, list(self.said)[:3]))} were said by "
                "hand, and only a tree tells what they mean: expected names that match "
                "found. Those beside an adapter that jlora.peft.save wrote are whole."
            )
        place = pathlib.Path(file)
        part = place.with_name(f".{place.name}.part")
        with files.writing("Names.save", place):
            try:
                with open(part, "w", encoding="utf-8") as f:
                    json.dump(self.document(), f, indent=1)
                os.replace(part, place)
            finally:
                part.unlink(missing_ok=True)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "found": {k: [p.document() for p in v] for k, v in self.found.items()},
            "missing": dict(self.missing),
            "base": {k: [list(s), d] for k, (s, d) in self.base.items()},
            "tensors": {k: list(v) for k, v in self.tensors.items()},
            "heads": dict(self.heads),
        }

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Names:
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          FormatError: it is no file of names, or a newer one.
        """
        path = pathlib.Path(file)
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}: expected names as JSON.")
        said = files.read_json(path)
        if said.get("format") != FORMAT:
            files.refuse(path, f"its format is not {FORMAT!r}: it has no names")
        if not isinstance(said.get("version"), int) or said["version"] > VERSION:
            files.refuse(
                path,
                f"it has version {said.get('version')}: expected at most {VERSION}",
                "Update jlora.",
            )
        try:
            names = cls(
                {
                    k: tuple(map(Part.from_document, v))
                    for k, v in said["found"].items()
                },
                {str(k): str(v) for k, v in said["missing"].items()},
                {k: (tuple(map(int, s)), str(d)) for k, (s, d) in said["base"].items()},
                {k: tuple(map(int, s)) for k, s in said["tensors"].items()},
                {str(k): str(v) for k, v in said.get("heads", {}).items()},
            )
            names._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            files.refuse(path, f"its names are damaged ({type(e).__name__}: {e})")
        return names

    def _check(self) -> None:
        """Raises ValueError for parts that do not fit their weight."""
        for path, parts in self.found.items():
            size = math.prod(self.base[path][0]) if path in self.base else None
            for part in parts:
                if {*part.axes, *part.tensor_axes} - {
                    *"bio"
                } or part.kind not in _KINDS:
                    raise ValueError(
                        f"{path!r}: axes {part.axes!r}, kind {part.kind!r}"
                    )
                for ours, theirs in (
                    (part.rows, part.tensor_rows),
                    (part.columns, part.tensor_columns),
                ):
                    for own in (ours, theirs):
                        n = len(own)
                        if not 0 < n <= (size or 1 << 31):
                            raise ValueError(f"{path!r} has an order of {n} positions")
                        if own.positions.min() < 0:
                            raise ValueError(f"{path!r} has a negative position")
                    if len(ours) != len(theirs):
                        raise ValueError(f"{path!r} has orders of different lengths")

    def __str__(self) -> str:
        rows = [
            row for path, parts in self.found.items() for row in self._rows(path, parts)
        ]
        lines = [table(("path", "slice", "tensor", "how"), rows)] if rows else []
        if self.said:
            lines += [f"{path}: {how!r} (by hand)" for path, how in self.said.items()]
        n = sum(map(len, self.found.values()))
        lines.append(
            f"{len(self.found)} weight{'s' * (len(self.found) != 1)}, {n} "
            f"part{'s' * (n != 1)}"
        )
        if self.missing and not (self.found or self.said):
            lines.append("nothing was found: are these the params of this base?")
        used = {p.tensor for parts in self.found.values() for p in parts}
        if spare := [name for name in self.tensors if name not in used]:
            some = ", ".join(spare[:6])
            more = f", and {len(spare) - 6} more" if len(spare) > 6 else ""
            lines.append(f"tensors of the checkpoint without a weight: {some}{more}")
        if self.missing:
            lines.append("without a tensor:")
            lines += [f"  {path}: {why}" for path, why in self.missing.items()]
        return "\n".join(lines)

    def _rows(self, path: str, parts: Sequence[Part]) -> Iterator[tuple[str, ...]]:
        """The rows of a table; layers that are alike in one row."""
        groups: dict[Any, list[Part]] = {}
        for part in parts:
            how = part.words(self.tensors.get(part.tensor, ()))
            fused = sum(p.at == part.at for p in parts) > 1
            columns = part.columns.words() if fused else ""
            key = _NUMBER.sub("#", part.tensor), how, columns, len(part.at)
            groups.setdefault(key, []).append(part)
        for (_, how, columns, _), own in groups.items():
            at = _span([p.at for p in own])
            where = ", ".join(filter(None, [at, columns and f"out {columns}"]))
            item = _span([p.item for p in own])
            yield path, where, _joined([p.tensor for p in own]) + item, how


def _compiled(pairs: Any) -> list[tuple[re.Pattern[str], Any]]:
    try:
        return [(re.compile(pattern), to) for pattern, to in pairs]
    except (re.error, TypeError, ValueError) as e:
        raise ValueError(
            f"Names.renamed: {pairs!r}: expected a function, or pairs of (regular "
            f"expression, replacement) ({e})."
        ) from None


_KINDS = "dense", "embed", "conv", "vector"
_NUMBER = re.compile(r"\d+")


def _span(indices: Sequence[tuple[int, ...]]) -> str:
    """``[0:16]`` for indices along batch axes that follow each other."""
    if not indices or not indices[0]:
        return ""
    axes = []
    for own in zip(*indices, strict=True):
        values = sorted({*own})
        regular = values == list(range(values[0], values[-1] + 1))
        if len(values) == 1:
            axes.append(str(values[0]))
        elif regular:
            axes.append(f"{values[0]}:{values[-1] + 1}")
        else:
            axes.append(f"{len(values)} of {values[0]}:{values[-1] + 1}")
    return f"[{', '.join(axes)}]"


def _joined(names: Sequence[str]) -> str:
    """One name for several that differ in numbers: ``layers.{0..15}.up.weight``."""
    found = [_NUMBER.findall(name) for name in names]
    numbers = iter(zip(*found, strict=True))

    def word(match: re.Match[str]) -> str:
        own = [*dict.fromkeys(next(numbers))]
        if len(own) == 1:
            return own[0]
        return f"{{{own[0]}..{own[-1]}}}"

    return _NUMBER.sub(word, names[0])
