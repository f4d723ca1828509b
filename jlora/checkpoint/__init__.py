"""Adapter checkpoints on Orbax: the adapter without its base, and what goes with it.

A checkpoint is a directory that Orbax commits by an atomic rename.  It holds the
arrays of the adapter, those of ``extra``, and a JSON document with the format version,
the plan (roles and rank of each leaf), a fingerprint of the base (the path, shape and
dtype of every array) and a checksum of every array that is stored.  `restore` verifies
all of it before it returns.

A checkpoint does not depend on the mesh.  It may be saved on one mesh, or by several
processes that share a file system, and restored on any other: the arrays go where the
new params and the new ``extra`` live.

For a series of checkpoints use Orbax's own CheckpointManager: an adapter is a pytree of
arrays, so ``ocp.args.StandardSave(jlora.adapter(tree))`` saves it beside the optimizer
state, and ``jlora.attach`` puts it back.

`save` and `restore` are in this file.  `document` is the JSON: **something new that a
checkpoint says of an adapter** goes there.  `extra` is the pytree beside the adapter.
`arrays` are the arrays of both, which `orbax` writes and reads, with `checksum`; an
array that is a field of the leaf (`_leaf.fields`) needs no change in this folder.
"""

from __future__ import annotations

import os
from typing import Any

import orbax.checkpoint as ocp

from jlora._adapter import adapter as adapter_of
from jlora._adapter import attach
from jlora._leaf import is_adapted
from jlora._leaf.bank import slots_of
from jlora._leaf.fields import missing
from jlora._tree import by_path
from jlora.checkpoint import arrays as _arrays
from jlora.checkpoint import checksum as _checksum
from jlora.checkpoint import document as _document
from jlora.checkpoint import extra as _extra
from jlora.checkpoint import orbax as _orbax
from jlora.checkpoint.orbax import DamagedError as DamagedError
from jlora.checkpoint.orbax import Handle as Handle


def save(
    directory: str | os.PathLike[str],
    tree: Any,
    *,
    extra: Any = None,
    block: bool = True,
) -> Handle | None:
    """Saves the adapter of a tree, and ``extra``, in a new directory.

    The directory appears whole or not at all, even if the process is killed.

    Args:
      directory: any path that Orbax takes.  It must not exist; its parents are made.
      tree: an adapted tree with its bases, of which only the fingerprint is stored.
        If there are several processes, each passes its view of the same global arrays.
      extra: any pytree to restore with the adapter: batch statistics, optimizer state,
        step.  Its leaves are arrays, PRNG keys, numbers, strings or booleans.
      block: whether to return only when the checkpoint is committed.  Otherwise the
        arrays are copied to the host, a `Handle` is returned, and the writing goes on
        in the background.  The program waits for it before it ends, and logs an error.
        Python 3.12.0 to 3.12.2 cannot do that, and there it is written at once.

    Returns:
      None, or with ``block=False`` a `Handle`.

    Raises:
      FileExistsError: the directory exists.
      OSError: the directory cannot be made, or the disk is full.
      ValueError: the tree has no adapted leaf, or one without its base.
      TypeError: a leaf of ``extra`` cannot be stored.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> import jlora, jlora.checkpoint
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> path = tempfile.mkdtemp() + "/adapter"
      >>> jlora.checkpoint.save(path, jlora.wrap(params, rank=2), extra={"step": 7})
      >>> tree, extra = jlora.checkpoint.restore(path, params, extra={"step": 0})
      >>> tree["kernel"].rank, extra["step"]
      (2, 7)
    """
    path = _orbax.path_of(directory)
    # Fails before any work.  If a save to this path is under way, `Handle._start` waits
    # for it, and checks the place then.
    if not _orbax.saving(path):
        _orbax.check_place(path)
    _require_bases(tree)
    adapter, other = adapter_of(tree), _extra.Extra.of(extra)
    bases = _document.bases(tree)
    arrays = {
        "adapter": {p: _arrays.data(x) for p, x in _arrays.of_adapter(adapter).items()},
        "extra": {p: _arrays.data(x) for p, x in other.arrays.items()},
    }
    document = {
        "format": _document.FORMAT,
        "version": _document.VERSION,
        "plan": {p: _document.entry(x, bases[p]) for p, x in adapter.items()},
        "base": _document.fingerprint(tree),
        "arrays": {
            k: {
                p: [*_document.signature(x), _checksum.checksum(x)]
                for p, x in v.items()
            }
            for k, v in arrays.items()
        },
        "values": other.values,
        "keys": other.keys,
    }
    document["crc"] = _document.crc(document)
    # Orbax cannot store empty arrays; the document has their shapes.
    stored = {k: {p: x for p, x in v.items() if x.size} for k, v in arrays.items()}
    items = {k: ocp.args.StandardSave(v) for k, v in stored.items() if v}
    handle = Handle(path)
    handle._start({"document": ocp.args.JsonSave(document), **items})
    if block or not _orbax.WRITES_AT_EXIT:
        handle.wait()
    return None if block else handle


def _require_bases(tree: Any) -> None:
    """Raises for a leaf without its base, which the checkpoint describes."""
    if slots_of(tree) is not None:
        raise ValueError(
            "checkpoint.save: found a bank of adapters, which has no base for the "
            "checkpoint to describe: expected a tree. Save one slot, "
            "jlora.attach(params, jlora.pick(bank, i)); or the whole bank with Orbax's "
            "StandardCheckpointer, which gives it back with jax.eval_shape(lambda: "
            "bank) as its template."
        )
    for path, x in by_path.flatten(tree)[0]:
        if is_adapted(x) and "w" in missing(x):
            raise ValueError(
                f"checkpoint.save: {path!r} has no base (w=None): expected the "
                "whole tree, whose base the checkpoint describes. Attach it first: "
                "jlora.attach(params, adapter)."
            )


def restore(
    directory: str | os.PathLike[str],
    params: Any,
    *,
    extra: Any = None,
    any_qtype: bool = False,
) -> Any:
    """Restores the adapted tree of a checkpoint, on the base that it was saved from.

    Args:
      directory: the directory that was passed to `save`.
      params: the base: plain params with the same paths, shapes and dtypes as the saved
        tree's base.  ``jax.ShapeDtypeStruct``s will do.  The adapter is sharded as they
        are.
      extra: a pytree with the structure of the saved ``extra``.  Only shapes, dtypes
        and shardings of its arrays are read, so it may have ``jax.ShapeDtypeStruct``s,
        such as ``jax.eval_shape(tx.init, tree)`` gives.  An array is restored to the
        sharding that it has here (on a mesh, ``tx.init(tree)`` has shardings), else to
        the default device.  A Python number may stand for a scalar array, such as a
        TrainState's step; it is restored as a Python number.
      any_qtype: whether the base may be quantised or rounded otherwise than the saved
        one, or not at all.  The adapter was trained to fit the saved one.

    Returns:
      The tree; with ``extra``, the pair (tree, extra).

    Raises:
      FileNotFoundError: there is no such directory.
      DamagedError: the directory is no whole adapter checkpoint, or an array is
        damaged.  If one process finds this, all processes raise.
      OSError: the checkpoint could not be read, but it may be whole.
      ValueError: the checkpoint has a newer format or belongs to another base, or
        ``extra`` has another structure.  The error names the first path that differs,
        what was expected and what was found.  A DamagedError is a ValueError, too.

    Example: see `save`.
    """
    path = _orbax.path_of(directory)
    document = _orbax.together(path, lambda: _document.read(path))
    for p, x in by_path.flatten(params)[0]:
        if is_adapted(x):
            raise ValueError(
                f"checkpoint.restore: {p!r} is adapted: expected the plain base params "
                "(jlora.unwrap gives them)."
            )
    want, have = document["base"], _document.fingerprint(params)
    if any_qtype:
        want, have = map(_document.without_qtypes, (want, have))
    advice = "Pass the params that the adapter was trained on"
    if _document.without_qtypes(want) == _document.without_qtypes(have):
        advice += ", quantised as they were"
        # What an initialiser has left of a base is needed itself.
        if not any("moved" in said for said in document["plan"].values()):
            advice += "; or any_qtype=True to put it on these"
    _document.require_same(
        f"checkpoint.restore: {path} belongs to another base", want, have, f"{advice}."
    )
    bases = _document.bases(params)
    for p, said in document["plan"].items():
        _document.require_left(said, p, bases[p], path, any_qtype=any_qtype)
    items, templates = ["adapter"], {}
    if extra is not None:
        items += ["extra"]
        templates = _extra.require_structure(path, document, extra)
    arrays, plan = document["arrays"], document["plan"]
    places = _arrays.places(arrays["adapter"], plan, bases)
    read = _arrays.read(path, arrays, items, templates, places)
    adapter = {}
    for p, said in plan.items():
        names = _document.names(said, p, arrays["adapter"])
        own = {n: _extra.as_jax(read["adapter"][at], p) for n, at in names.items()}
        adapter[p] = _document.leaf_of(said, bases[p].shape, own)
    tree = attach(params, adapter)
    if extra is None:
        return tree
    found = read.get("extra", {})
    return tree, _extra.restored(extra, document, templates, found)
