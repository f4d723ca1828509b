"""The tensors of a file that ``torch.save`` wrote, without torch and without trust.

Since torch 1.6 such a file is a zip archive: ``NAME/data.pkl`` is a pickle of what was
saved, in which a tensor is a call of ``torch._utils._rebuild_tensor_v2`` on a storage,
and ``NAME/data/KEY`` has the bytes of storage KEY
(https://docs.pytorch.org/docs/stable/notes/serialization.html).  A pickle can call any
function that it can name.  This reader knows only the few names that tensors need, has
its own functions for them, and refuses every other name.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import zipfile
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

# The values are strings, since a pickle can change mutable objects that it is given.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

# The most elements of an expanded tensor (strides of 0), since the number of its bytes
# in the file does not limit them.
_EXPANDED = 2**24
# The first bytes of the older format: a pickle of torch's magic number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"


class _Refused(ValueError):
    """A file that the reader refuses; the text says why."""


class _Storage(NamedTuple):
    """The flat array that tensors are views of; a pickle cannot make one itself."""

    row: np.ndarray


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict that ``torch.save`` wrote, by name.

    They may be floating-point (bfloat16 included), integer or boolean.  Views are read
    with their strides and offsets.  If the file holds a dict whose only value is a
    dict, the inner one is read: loralib's examples save ``{"model_state_dict": ...}``.

    Args:
      path: the path of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file that is no zip archive, has the format from before torch 1.6,
        or is damaged; a pickle that asks for anything but tensors, or holds none.
    """
    where = os.fspath(path)
    with open(where, "rb") as file:
        head = file.read(len(_LEGACY))
    if head == _LEGACY:
        raise ValueError(
            f"{where!r} is in torch's format from before 1.6, which is a bare pickle: "
            "expected a zip archive. Save it again with a later torch: "
            "torch.save(torch.load(path), path)."
        )
    if not head.startswith(_ZIP):
        raise ValueError(
            f"{where!r} is no zip archive (it begins with {head!r}): expected a file "
            "that torch.save wrote, or one whose name ends in .safetensors."
        )
    try:
        with zipfile.ZipFile(where) as archive:
            found = _Unpickler(archive).load()
        return _flat(found)
    except _Refused as e:
        raise ValueError(f"{where!r} {e}") from None
    except Exception as e:  # a damaged archive or pickle may raise anything
        raise ValueError(
            f"{where!r} is truncated or damaged ({type(e).__name__}: {str(e)[:200]}): "
            "expected a file as torch.save wrote it. Copy or save it again."
        ) from e


def _flat(found: Any) -> dict[str, np.ndarray]:
    """The dict of tensors: what was found, or the only value of that."""
    if isinstance(found, dict) and len(found) == 1:
        (only,) = found.values()
        found = only if isinstance(only, dict) else found
    if not isinstance(found, dict) or not found:
        raise _Refused(
            f"holds no tensors but {_brief(found)}: expected a dict from name to "
            "tensor, such as loralib.lora_state_dict(model)."
        )
    for name, x in found.items():
        if not (isinstance(name, str) and isinstance(x, np.ndarray)):
            raise _Refused(
                f"has {_brief(x)} at {name!r}: expected nothing but tensors by name, "
                "such as loralib.lora_state_dict(model). Save only those."
            )
    return dict(found)


def _brief(x: Any) -> str:
    name = type(x).__name__
    return f"{name} {x!r}" if isinstance(x, (int, float, str)) else f"a {name}"


class _Unpickler(pickle.Unpickler):
    """Unpickles one archive; refuses every name that is not allowed."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused(
                f"is a zip archive with {len(pickles)} files data.pkl: expected one, "
                "as torch.save writes."
            )
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise _Refused(
                "is a compressed zip archive: expected one whose files are stored as "
                "they are, as torch.save writes. Zip it again with zip -0, or save it "
                "again."
            )
        self._archive, self._folder = archive, pickles[0].removesuffix("data.pkl")
        order = f"{self._folder}byteorder"  # torch writes it since 2.0
        big = order in archive.namelist() and archive.read(order) == b"big"
        self._order = ">" if big else "<"
        self._storages: dict[Any, _Storage] = {}
        super().__init__(io.BytesIO(archive.read(pickles[0])))

    def find_class(self, module: str, name: str) -> Any:
        """The object that the pickle gets for a name."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        match f"{module}.{name}":
            case "collections.OrderedDict":
                return collections.OrderedDict
            # New functions, since a pickle can set attributes of what it gets.
            case "torch._utils._rebuild_tensor_v2":
                return lambda *args: _tensor(*args)
            case "torch._utils._rebuild_parameter":
                return lambda *args: _parameter(*args)
        raise _Refused(
            f"asks for {module}.{name}: expected a pickle of tensors, which needs "
            f"collections.OrderedDict, torch's {', '.join(_STORAGES)} and the "
            "functions that make a tensor of them. Nothing of it was run; save only "
            "loralib.lora_state_dict(model)."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that the pickle refers to."""
        if pid in self._storages:
            return self._storages[pid]
        tag, name, key, _, size = pid
        if tag != "storage" or name not in _STORAGES.values():
            _broken(f"a reference to {tag!r} of {name!r}")
        dtype = jnp.dtype(name)
        data = self._archive.read(f"{self._folder}data/{key}")
        if len(data) != size * dtype.itemsize:
            _broken(f"{len(data)} bytes for {size} elements of {name}")
        # Unsigned words have a byte order in numpy, which bfloat16 does not.
        words = np.frombuffer(data, f"{self._order}u{dtype.itemsize}")
        row = words.astype(f"=u{dtype.itemsize}").view(dtype)
        return self._storages.setdefault(pid, _Storage(row))


def _broken(what: str) -> NoReturn:
    raise pickle.UnpicklingError(what)


def _tensor(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    *metadata: Any,
) -> np.ndarray:
    if any(metadata):
        raise _Refused(
            f"has a tensor that is a conjugate or negative view ({metadata[0]}): "
            "expected plain tensors. Save its resolve_neg().resolve_conj()."
        )
    # A view of a view could reach beyond the storage.
    if type(storage) is not _Storage:
        _broken(f"a tensor of {_brief(storage)}")
    (row,) = storage
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = 0 in size or offset + last < row.size
    fits = inside and math.prod(size) <= max(row.size, _EXPANDED)
    if min((offset, *size, *stride)) < 0 or not fits:
        _broken(
            f"a tensor of shape {size}, strides {stride} and offset {offset} in "
            f"{row.size} elements"
        )
    return np.lib.stride_tricks.as_strided(
        row[offset:],
        size,
        [step * row.itemsize for step in stride],
        writeable=False,
    )


def _parameter(data: np.ndarray, requires_grad: bool, hooks: Any) -> np.ndarray:
    return data
