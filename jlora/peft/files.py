"""Safetensors files, read with care: a file from a stranger is only ever data.

The safetensors library checks header, offsets and sizes against the file before it
gives anything.  What it does not know is checked here: that no name leads out of the
directory, and that the index of a folder of shards tells the truth.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

INDEX = "model.safetensors.index.json"
_MOST_JSON = 1 << 28  # bytes of a config or an index that are read
_FLOATS = {"F64", "F32", "F16", "BF16"}

Where = str | os.PathLike[str]


class FormatError(ValueError):
    """A file or directory that is not what its format says, or that leads out of it."""


def refuse(where: Any, why: str, do: str = "") -> NoReturn:
    """Raises a `FormatError` about a file."""
    raise FormatError(f"{os.fspath(where)}: {why}{'. ' + do if do else ''}".rstrip())


def folder(what: str, directory: Any) -> pathlib.Path:
    """The path of a directory that a user passed to a function."""
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(
            f"{what}: expected the path of a directory first, then the tree; found a "
            f"{type(directory).__name__}."
        )
    return pathlib.Path(directory).expanduser()


@contextlib.contextmanager
def writing(what: str, where: Any) -> Iterator[None]:
    """Names the place in every error of writing there."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as e:
        why = getattr(e, "strerror", None) or str(e)
        kind = type(e) if isinstance(e, OSError) else OSError
        raise kind(
            f"{what}: {os.fspath(where)} cannot be written ({why}): expected a place "
            "with room, in which files may be made."
        ) from None


def inside(folder: pathlib.Path, name: Any) -> pathlib.Path:
    """The file of this name in a folder; raises if it is not really in there.

    Links are followed to where they lead.  In the cache of the Hugging Face hub a
    snapshot links to the blobs of its own repository, which count as inside.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        refuse(folder, f"it names the file {name!r}: expected a name")
    try:
        path = folder / name
        real, root = os.path.realpath(path), os.path.realpath(folder)
    except (OSError, ValueError) as e:
        refuse(folder, f"it names the file {name!r}, which cannot be had ({e})")
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if os.path.isabs(name) or not any(real.startswith(r + os.sep) for r in roots):
        refuse(
            folder,
            f"{name!r} leads out of the directory, to {real}",
            "Nothing was read. Copy the file itself there if you trust it.",
        )
    return path


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file, of a reasonable size and depth."""
    try:
        if (size := path.stat().st_size) > _MOST_JSON:
            refuse(
                path, f"it has over {_MOST_JSON:,} bytes: expected a small JSON file"
            )
        with open(path, "rb") as f:
            said = json.loads(f.read(size).decode("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        if isinstance(e, FormatError):
            raise
        refuse(path, f"it is no JSON file ({type(e).__name__}: {str(e)[:200]})")
    if not isinstance(said, dict):
        refuse(path, f"it holds a {type(said).__name__}: expected an object of names")
    return said


@contextlib.contextmanager
def _checked(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except FormatError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as e:
        if path.exists() and not os.access(path, os.R_OK):
            raise PermissionError(f"{path} may not be read: mind its mode.") from None
        if isinstance(e, FileNotFoundError):
            raise FileNotFoundError(f"there is no file {path}") from None
        refuse(
            path,
            f"it is no whole safetensors file ({str(e)[:200]})",
            "Copy or download it again.",
        )


class Tensors(Mapping[str, Any]):
    """The tensors of one or more safetensors files, by name, read one at a time.

    Indexing gives shape and dtype; `get` reads the values.

    Attributes:
      files: the file of each tensor.
      metadata: the metadata of each file.
    """

    def __init__(self, paths: Sequence[pathlib.Path]):
        self.files: dict[str, pathlib.Path] = {}
        self.metadata: dict[pathlib.Path, dict[str, str]] = {}
        self._infos: dict[str, tuple[tuple[int, ...], str]] = {}
        self._open: dict[pathlib.Path, Any] = {}
        self._offsets: dict[pathlib.Path, dict[str, int]] = {}
        self._ends: dict[str, int] = {}
        for path in paths:
            with _checked(path):
                f = safetensors.safe_open(path, framework="np")
                self._open[path] = f
                self.metadata[path] = dict(f.metadata() or {})
                for name in f.keys():
                    part = f.get_slice(name)
                    if name in self.files:
                        other = self.files[name]
                        refuse(path, f"{name!r} is in {other}, too: expected it once")
                    self.files[name] = path
                    shape = tuple(map(int, part.get_shape()))
                    self._infos[name] = shape, part.get_dtype()

    def __getitem__(self, name: str) -> tuple[tuple[int, ...], str]:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._infos[name][0]

    def is_float(self, name: str) -> bool:
        """Whether a tensor has floating-point numbers that numpy can hold."""
        return self._infos[name][1] in _FLOATS

    def dtype(self, name: str) -> Any:
        """The dtype of a floating-point tensor."""
        words = {"F64": "float64", "F32": "float32", "F16": "float16"}
        return jnp.dtype(words.get(self._infos[name][1], "bfloat16"))

    def offset(self, name: str) -> int:
        """Where in its file the values of a tensor start."""
        path = self.files[name]
        if path not in self._offsets:
            with _checked(path), open(path, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
            header.pop("__metadata__", None)
            at = {name: own["data_offsets"] for name, own in header.items()}
            self._offsets[path] = {n: 8 + size + x[0] for n, x in at.items()}
            self._ends |= {n: 8 + size + x[1] for n, x in at.items()}
        return self._offsets[path][name]

    def view(self, name: str) -> np.ndarray:
        """The values of a tensor as they lie in the file, mapped: nothing is copied."""
        self._check(name)
        shape, path = self.shape(name), self.files[name]
        if 0 in shape:
            return np.zeros(shape, self.dtype(name))
        place = self.offset(name)
        with _checked(path):
            flat = np.memmap(path, np.uint8, "r", place, self._bytes(name))
        return flat.view(self.dtype(name)).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some rows of a tensor, in memory; nothing else of the file is touched."""
        self._check(name)
        shape = self.shape(name)[1:]
        row = math.prod(shape) * self.dtype(name).itemsize
        path, place = self.files[name], self.offset(name) + start * row
        with _checked(path):
            flat = np.fromfile(path, np.uint8, (stop - start) * row, offset=place)
            return flat.view(self.dtype(name)).reshape(stop - start, *shape)

    def same_bytes(self, name: str, other: Tensors) -> bool:
        """Whether a tensor of any dtype is the same in both, byte by byte."""
        place, theirs = self.offset(name), other.offset(name)
        with open(self.files[name], "rb") as f, open(other.files[name], "rb") as g:
            f.seek(place)
            g.seek(theirs)
            left = self._ends[name] - place
            while left > 0:
                n = min(left, 1 << 22)
                if f.read(n) != g.read(n):
                    return False
                left -= n
        return True

    def _bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in memory."""
        self._check(name)
        path = self.files[name]
        with _checked(path):
            return self._open[path].get_tensor(name)

    def _check(self, name: str) -> None:
        path = self.files[name]
        if not self.is_float(name):
            refuse(
                path,
                f"{name!r} is {self._infos[name][1]}: expected floating-point numbers "
                "of 16 bits or more",
            )


def tensors(base: Where | Sequence[Where]) -> Tensors:
    """The tensors of a safetensors file, of a folder of shards, or of several files.

    A folder has ``model.safetensors.index.json``, or safetensors files without one.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder.
      FormatError: a file that is not whole, another format, a name that leads out of
        the folder, or a tensor that is there twice.
    """
    given: list[Any] = list(base) if isinstance(base, (list, tuple)) else [base]
    if not all(isinstance(one, (str, os.PathLike)) for one in given):
        raise TypeError(
            f"base is a {type(base).__name__}: expected a safetensors file, a folder "
            "of shards, or a list of them."
        )
    paths = [pathlib.Path(one).expanduser() for one in given]
    return Tensors([path for one in paths for path in shards(one)])


def shards(base: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a base: the file itself, or those of the folder."""
    if not base.exists():
        raise FileNotFoundError(
            f"there is no {base}: expected a safetensors file, or a folder with the "
            f"shards and {INDEX}."
        )
    if not base.is_dir():
        if base.suffix != ".safetensors":
            refuse(
                base,
                "expected a safetensors file",
                "Pickles (.bin, .pt) run code when they are read, and are not: convert "
                "them first, with safetensors.torch.save_file.",
            )
        return [base]
    if (base / INDEX).exists():
        return _indexed(base)
    found = sorted(p.name for p in base.iterdir() if p.suffix == ".safetensors")
    if not found:
        raise FileNotFoundError(
            f"there is no safetensors file in {base}: expected model.safetensors, or "
            f"shards with {INDEX}. Pickles (.bin, .pt) are not read."
        )
    return [inside(base, name) for name in found]


def _indexed(folder: pathlib.Path) -> list[pathlib.Path]:
    where = inside(folder, INDEX)
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(where, "expected a weight_map, from tensor to file")
    names = sorted(
        {
            str(n) if isinstance(n, str) else refuse(where, f"{n!r} is no file")
            for n in weight_map.values()
        }
    )
    paths = {name: inside(folder, name) for name in names}
    for name, path in paths.items():
        if not path.exists():
            raise FileNotFoundError(f"{where} names {name!r}, which is not there.")
    found = Tensors(list(paths.values()))
    for tensor, name in weight_map.items():
        if found.files.get(tensor) != paths[name]:
            refuse(where, f"it says that {tensor!r} is in {name!r}, which has it not")
    return list(paths.values())


def write(path: pathlib.Path, arrays: Mapping[str, Any], **metadata: str) -> None:
    """Writes a safetensors file as PEFT does, with its metadata and more."""
    whole = {
        name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()
    }
    safetensors.numpy.save_file(whole, path, metadata={"format": "pt", **metadata})
