"""save: a directory that peft, and the servers that read its files, can load."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora._adapter import adapter as adapter_of
from jlora._leaf import LoRA
from jlora._leaf.bank import refuse_bank
from jlora._plan.plan import Plan
from jlora.peft import config as _config
from jlora.peft import files
from jlora.peft.given import Given, names_of
from jlora.peft.modules import WEIGHTS
from jlora.peft.names import FILE, Names
from jlora.peft.weights import completed, weights, with_head
from jlora.peft.writer import Writer


def save(
    directory: files.Where,
    tree: Any,
    *,
    names: Given,
    portable: bool = False,
    head: str | None = None,
    plan: Plan | None = None,
    config: Mapping[str, Any] | None = None,
    own_base: bool = False,
) -> None:
    """Saves the adapter of a tree as a directory that peft can load.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are written as peft writes
    them, and ``jlora_names.json`` beside them, with which `load` needs no ``names``.
    The directory appears whole or not at all.

    Args:
      directory: a new directory; its parents are made.
      tree: an adapted tree.  An adapter alone will do, if nothing in it trains whole.
      names: what `match` found; or a mapping from path to torch module, pairs of
        (regular expression, replacement) over paths, or a function from path to module.
        For a stack of layers ``{}`` stands for the index: ``"layers.{}.mlp.up_proj"``.
        A fused weight has a list of modules, or a mapping from each to its columns.
      portable: whether to write what vLLM, SGLang, TensorRT-LLM and transformers all
        take: one rank of 8, 16, 32, ..., padded with zeros, alpha = r with the scale in
        B, and plain suffixes for targets.  What trains besides factors is then an
        error.
      head: the module of the head in torch, such as "lm_head", if head and embedding
        are one tensor (tied), and one of them is adapted.  peft adapts the two by
        themselves.
      plan: a plan of the params, if nothing else tells the kind of a layer.
      config: more keys of ``adapter_config.json``, such as
        ``{"base_model_name_or_path": "org/model", "task_type": "CAUSAL_LM"}``.
      own_base: whether the file is for the base that the tree has, which you save as
        well: for adapters that PiSSA, OLoRA or LoftQ started, which changed the base.

    Raises:
      FileExistsError: the directory exists.
      ValueError: no names for an adapted weight; something for which peft has no form
        (the error says what, and what to do); with ``portable`` something that not
        every server takes.

    Example: see `load`.
    """
    where = files.folder("peft.save", directory).expanduser().absolute()
    if where.exists() or where.is_symlink():
        raise FileExistsError(
            f"peft.save: {where} exists: expected a new directory, so that no earlier "
            "adapter is lost. Save elsewhere, or move it away first."
        )
    refuse_bank(tree, "peft.save")
    adapter = adapter_of(tree)
    known = weights(tree, plan)
    given = names_of(names, list(known), "peft.save")
    low_rank = {p for p, x in adapter.items() if isinstance(x, LoRA)}
    whole = completed(given, known, "peft.save", {}, low_rank)
    whole = with_head(whole, head)
    writer = Writer(tree, adapter, whole, own_base)
    writer.run(portable)
    said = writer.config()
    if config is not None:
        _check_more(config, said)
        said |= dict(config)
        _config.parse(json.loads(json.dumps(said)), "config")
    if jax.process_index() == 0:
        _write(where, said, writer.tensors, writer.hints(), whole)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jlora.peft.save")


def _check_more(config: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    if not isinstance(config, Mapping) or not all(isinstance(k, str) for k in config):
        raise TypeError(
            f"peft.save: config is {config!r}: expected a mapping from key to value."
        )
    try:
        json.dumps(dict(config))
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"peft.save: config has what JSON has no form for ({e})."
        ) from None
    own = "base_model_name_or_path revision task_type inference_mode lora_dropout"
    if wrong := [k for k in config if k in said and k not in own.split()]:
        raise ValueError(
            f"peft.save: config sets {wrong}, which follow from the adapter: expected "
            f"keys that do not, such as {own.replace(' ', ', ')}."
        )


def _write(
    where: pathlib.Path,
    said: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    hints: str,
    names: Names,
) -> None:
    """Writes all files into a directory beside, and renames it."""
    with files.writing("peft.save", where):
        where.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.mkdtemp(prefix=f".{where.name}.", dir=where.parent)
    part = pathlib.Path(place)
    try:
        with files.writing("peft.save", where):
            _fill(part, said, tensors, hints, names)
            os.rename(part, where)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _fill(
    part: pathlib.Path,
    said: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    hints: str,
    names: Names,
) -> None:
    files.write(part / WEIGHTS, tensors, **({"jlora": hints} if hints else {}))
    text = json.dumps(said, indent=2, sort_keys=True)
    (part / _config.FILE).write_text(text + "\n", encoding="utf-8")
    names.save(part / FILE)
    os.chmod(part, 0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
