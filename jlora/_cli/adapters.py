"""Adapters of every format on disk: which one a path is, read, and written."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora.checkpoint
import jlora.loralib
from jlora._adapter import Adapter, attach
from jlora._adapter import adapter as adapter_of
from jlora._leaf import Full, LoRA
from jlora.checkpoint import document
from jlora.checkpoint import orbax as _orbax
from jlora.peft import modules as _modules
from jlora.peft import native
from jlora.peft.config import FILE as CONFIG_FILE
from jlora.peft.files import refuse, write, writing
from jlora.peft.load import load
from jlora.peft.names import FILE as NAMES
from jlora.peft.names import Names
from jlora.peft.save import save

FORMATS = "peft", "orbax", "loralib"


@dataclasses.dataclass(frozen=True)
class Found:
    """An adapter that was read.

    Attributes:
      path: where it is.
      format: "peft", "orbax" or "loralib".
      leaves: the adapter; by paths of the model, or by torch's tensors.
      names: which tensor each is; None if that is not known.
      base: the shapes of the base by path, for a checkpoint.
    """

    path: pathlib.Path
    format: str
    leaves: Adapter
    names: Names | None = None
    base: Any = None


def format_of(path: pathlib.Path) -> str:
    """The format of an adapter, by what is there.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is no adapter.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_file():
        return "loralib"
    if (path / CONFIG_FILE).exists():
        return "peft"
    if (path / "document").exists():
        return "orbax"
    inside = sorted(p.name for p in path.iterdir())[:4]
    raise ValueError(
        f"{path} is no adapter: expected a directory with {CONFIG_FILE} (PEFT), a "
        "checkpoint of jlora.checkpoint.save, or a file of loralib; found "
        f"{inside or 'nothing'}"
    )


def read(where: str | os.PathLike[str], alpha: float | None = None) -> Found:
    """An adapter of any format, without a model.

    Args:
      where: a directory or a file.
      alpha: loralib's ``lora_alpha``, which its files do not have.
    """
    path = pathlib.Path(where).expanduser()
    kind = format_of(path)
    if kind == "peft":
        own = _modules.read(path)
        return Found(path, kind, native.leaves(own), native.names_of(own))
    if kind == "orbax":
        base = base_of(path)
        leaves = adapter_of(jlora.checkpoint.restore(path, base))
        return Found(path, kind, leaves, base=base)
    try:
        jlora.loralib.read(path)
    except ValueError as e:
        refuse(path, f"it is no file of loralib ({e})")
    leaves = jlora.loralib.load(os.fspath(path), alpha=alpha)
    return Found(path, kind, leaves, _names_of_loralib(leaves))


def base_of(path: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the base of a checkpoint, by path."""
    said = document.read(_orbax.path_of(path))["base"]
    return {p: document.struct(own) for p, own in said.items()}


def _names_of_loralib(leaves: Adapter) -> Names:
    """The names of a loralib file, whose modules are the paths."""
    said = {}
    for path, x in leaves.items():
        module, _, last = path.rpartition("/")
        dotted = module.replace("/", ".")
        bias = isinstance(x, Full) and last == "bias"
        said[path] = f"{dotted}.bias" if bias else dotted
    return Names({}, said=said)


def write_peft(found: Found, out: str, names: Names | None, **options: Any) -> None:
    """Writes an adapter as PEFT's directory."""
    own = names if found.format == "orbax" or found.names is None else found.names
    if own is None:
        raise ValueError(
            f"{found.path} has the paths of a JAX model, and PEFT has torch's modules: "
            "expected --names names.json, as jlora match writes it"
        )
    save(out, found.leaves, names=own, **options)


def write_orbax(found: Found, out: str, names: Names | None) -> None:
    """Writes an adapter as a checkpoint of the model that names are of."""
    if names is None:
        raise ValueError(
            f"{found.path} has torch's modules, and a checkpoint has the paths of a "
            "JAX model: expected --names names.json, as jlora match writes it"
        )
    if not names.base:
        raise ValueError("the names have no shapes of the base: write them with match")
    base = {
        p: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for p, (shape, dtype) in names.base.items()
    }
    if found.format == "peft":
        jlora.checkpoint.save(out, load(found.path, base, names=names))
        return
    with tempfile.TemporaryDirectory() as folder:  # by the names of torch's modules
        write_peft(found, f"{folder}/a", names)
        tree = load(f"{folder}/a", base, names=names)
        jlora.checkpoint.save(out, tree)


def write_loralib(found: Found, out: str, names: Names | None) -> None:
    """Writes an adapter as a file of loralib's names, with the scale in lora_B."""
    path = pathlib.Path(out)
    if path.exists():
        raise FileExistsError(f"{path} exists: expected a new file")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file that ends in .safetensors")
    arrays = {}
    own = _torch_side(found, names)
    if more := [*own.whole, *own.rows]:
        raise ValueError(
            f"{more[0]} is trained whole, which loralib's files have no form for: "
            "expected factors alone"
        )
    for module in own.modules.values():
        if module.c is not None and module.c.any():
            raise ValueError(
                f"{module.name} has an output bias (lora_bias), which loralib's files "
                "have no form for"
            )
        if module.kind not in ("linear", "embedding") or module.m is not None:
            raise ValueError(
                f"{module.name} is {module.kind}"
                f"{' with a magnitude' if module.m is not None else ''}, which "
                "loralib's files have no form for: expected Linear and Embedding"
            )
        b = (module.b.astype(np.float64) * module.scale).astype(module.b.dtype)
        arrays[f"{module.name}.lora_A"] = module.a.T
        arrays[f"{module.name}.lora_B"] = b.T
    part = path.with_name(f".{path.name}.part")
    with writing("convert", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part, arrays)
            os.rename(part, path)
        finally:
            part.unlink(missing_ok=True)


def _torch_side(found: Found, names: Names | None) -> Any:
    """An adapter as PEFT's directory has it."""
    if found.format == "peft":
        return _modules.read(found.path)
    with tempfile.TemporaryDirectory() as folder:
        write_peft(found, f"{folder}/a", names)
        return _modules.read(f"{folder}/a")


def write_like(found: Found, leaves: Adapter, out: str) -> None:
    """Writes other leaves in the format of an adapter that was read."""
    if found.format == "orbax":
        jlora.checkpoint.save(out, attach(found.base, leaves))
    elif found.format == "peft":
        save(out, leaves, names=_resized(found.names, leaves))
    else:
        raise ValueError(
            f"{found.path} is a file of loralib: convert it to PEFT first, with jlora "
            "convert"
        )


def _resized(names: Names | None, leaves: Adapter) -> Names:
    assert names is not None
    return dataclasses.replace(names, found={p: names[p] for p in leaves})


def stored_names(path: pathlib.Path) -> Names | None:
    """The names beside an adapter, if there are any."""
    place = path / NAMES
    return Names.load(place) if path.is_dir() and place.exists() else None


def is_low_rank(x: Any) -> bool:
    """Whether a leaf has a delta of its factors."""
    return isinstance(x, LoRA) and x.a is not None
