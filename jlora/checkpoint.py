"""Adapter checkpoints on Orbax: the adapter without its base, and what goes with it.

A checkpoint is a directory that Orbax commits by an atomic rename.  It holds the
arrays of the adapter, those of ``extra``, and a JSON document with the format version,
the plan (roles and rank of each leaf), a fingerprint of the base (the path, shape and
dtype of every array) and a checksum of every array that is stored.  `restore` verifies
all of it before it gives anything back.

Nothing in it depends on the mesh: what was saved on one mesh, or by several processes
that share a file system, is restored to where the new params and the new ``extra``
live, on any other.

For a series of checkpoints use Orbax's own CheckpointManager: an adapter is a pytree of
arrays, so ``ocp.args.StandardSave(jlora.adapter(tree))`` saves it beside the optimizer
state, and ``jlora.attach`` puts it back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jlora import _checksum, _orbax, _paths, _sharding
from jlora._leaf import (
    Adapted,
    Blocks,
    Form,
    Full,
    Kernel,
    LoRA,
    is_adapted,
    missing,
)
from jlora._orbax import DamagedError as DamagedError
from jlora._orbax import Handle as Handle
from jlora._tree import adapter as adapter_of
from jlora._tree import attach

FORMAT = "jlora adapter"
VERSION = 1
# What Orbax cannot write.
_UNSTORED = frozenset("uint4 int2 uint2 int1 uint1".split())


def save(
    directory: str | os.PathLike[str],
    tree: Any,
    *,
    extra: Any = None,
    block: bool = True,
) -> Handle | None:
    """Saves the adapter of a tree, and ``extra``, in a directory of its own.

    The directory appears whole or not at all, also if the process is killed.

    Args:
      directory: must not exist; parents are made.  Any path that Orbax takes.
      tree: an adapted tree, with its base (of which only the fingerprint is stored).
        Of several processes each passes its own view of the same global arrays.
      extra: any pytree that must come back with it: batch statistics, optimizer state,
        step.  Its leaves are arrays, PRNG keys, or numbers, strings and booleans.
      block: return once committed.  Otherwise the arrays are copied to the host, a
        `Handle` is returned, and the writing goes on in the background; the end of the
        program waits for it, and logs what went wrong.

    Returns:
      None, or with ``block=False`` a `Handle`.

    Raises:
      FileExistsError: the directory exists.
      OSError: it cannot be made, or the disk is full.
      ValueError: the tree has no adapted leaf, or one without its base.
      TypeError: a leaf of ``extra`` that cannot be stored.

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
    if not _orbax.saving(path):
        _orbax.check_place(path)
    for leaf_path, x in _paths.flatten(tree)[0]:
        if is_adapted(x) and "w" in missing(x):
            raise ValueError(
                f"checkpoint.save: {leaf_path!r} has no base (w=None): expected the "
                "whole tree, whose base the checkpoint describes. Attach it first: "
                "jlora.attach(params, adapter)."
            )
    arrays: dict[str, dict[str, Any]] = {"adapter": {}, "extra": {}}
    plan: dict[str, Any] = {}
    for leaf_path, x in adapter_of(tree).items():
        kind = "full" if isinstance(x, Full) else "lora"
        plan[leaf_path] = {"kind": kind}
        if x.dropped is not None:
            plan[leaf_path]["dropped"] = str(x.dropped)
        if isinstance(x, LoRA):
            plan[leaf_path] |= {"roles": x.roles, "rank": x.rank}
            if x.form is not None:
                form = {"name": type(x.form).__name__, **dataclasses.asdict(x.form)}
                plan[leaf_path]["form"] = form
            if x.bias is not None:
                plan[leaf_path]["bias"] = x.bias
            if x.c is not None:
                plan[leaf_path]["lora_bias"] = True
        for name in _fields(plan[leaf_path]):
            arrays["adapter"][f"{leaf_path}:{name}"] = getattr(x, name)
    values: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for leaf_path, x in _leaves(extra):
        if (kind := _python(x)) is not None:
            values[leaf_path] = kind(x)
        elif not isinstance(x, (jax.Array, np.ndarray, np.generic)) or (
            not _is_key(x)
            and (np.dtype(x.dtype).kind in "OSUMm" or x.dtype.name in _UNSTORED)
        ):
            found = getattr(x, "dtype", type(x).__name__)
            raise TypeError(
                f"checkpoint.save: extra has a {found} at {leaf_path!r}: expected "
                "arrays of numbers, PRNG keys, numbers, strings and booleans."
            )
        else:
            arrays["extra"][leaf_path] = x
            if _is_key(x):
                impl = jax.random.key_impl(cast(jax.Array, x))
                keys[leaf_path] = [*_signature(x), str(impl)]
    arrays = {k: {p: _data(x) for p, x in v.items()} for k, v in arrays.items()}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan,
        "base": {p: _signature(x) for p, x in _base(tree).items()},
        "arrays": {
            k: {p: [*_signature(x), _checksum.checksum(x)] for p, x in v.items()}
            for k, v in arrays.items()
        },
        "values": values,
        "keys": keys,
    }
    document["crc"] = _document_crc(document)
    stored = {k: {p: x for p, x in v.items() if x.size} for k, v in arrays.items()}
    items = {k: ocp.args.StandardSave(v) for k, v in stored.items() if v}
    handle = Handle(path)
    handle._start({"document": ocp.args.JsonSave(document), **items})
    if not block:
        return handle
    handle.wait()
    return None


def restore(
    directory: str | os.PathLike[str], params: Any, *, extra: Any = None
) -> Any:
    """The adapted tree that was saved, on the base that it was saved from.

    Args:
      directory: as given to `save`.
      params: the base: plain params with the paths, shapes and dtypes of the saved
        tree's (``jax.ShapeDtypeStruct``s will do).  The adapter is sharded as they are.
      extra: a pytree of the structure of the saved ``extra``; its arrays (or
        ``jax.ShapeDtypeStruct``s, such as ``jax.eval_shape(tx.init, tree)`` gives)
        need only have the right shapes and dtypes.  One with a sharding, as on a mesh
        those of ``tx.init(tree)`` are, gets its array there, another one gets it on the
        default device.  A Python number stands for a scalar array, such as a
        TrainState's step, and gets a Python number back.

    Returns:
      The tree; with ``extra``, the pair (tree, extra).

    Raises:
      FileNotFoundError: there is no such directory.
      DamagedError: it is no whole adapter checkpoint, or an array is damaged; on all
        processes, if one of them found it.
      OSError: it could not be read, which need not be the checkpoint's fault.
      ValueError: it is of a newer format; it belongs to another base, or ``extra`` is
        another structure (with the first path that differs, what was expected and what
        was found).  DamagedError is one, too.

    Example: see `save`.
    """
    path = _orbax.path_of(directory)
    document = _orbax.together(path, lambda: _document(path))
    for p, x in _paths.flatten(params)[0]:
        if is_adapted(x):
            raise ValueError(
                f"checkpoint.restore: {p!r} is adapted: expected the plain base params "
                "(jlora.unwrap gives them)."
            )
    _same(
        f"checkpoint.restore: {path} belongs to another base",
        document["base"],
        {p: _signature(x) for p, x in _base(params).items()},
        "Pass the params that the adapter was trained on.",
    )
    templates: dict[str, Any] = {}
    if extra is not None:
        templates = dict(_leaves(extra))
        stored = document["arrays"]["extra"]
        want = {p: s[:2] for p, s in stored.items()}
        want |= {p: type(v).__name__ for p, v in document["values"].items()}
        want |= {p: s[:2] for p, s in document["keys"].items()}
        have = {p: _template_signature(x, want.get(p)) for p, x in templates.items()}
        _same(
            f"checkpoint.restore: the extra of {path} has another structure",
            want,
            have,
            "Pass a pytree of the structure that was saved.",
        )
    items = ["adapter"] if extra is None else ["adapter", "extra"]
    arrays = document["arrays"]
    places = _places(arrays["adapter"], document["plan"], _base(params))
    read = _read(path, arrays, items, templates, places)
    leaves = {}
    for p, spec in document["plan"].items():
        fields = {n: _jax(read["adapter"][f"{p}:{n}"], p) for n in _fields(spec)}
        leaves[p] = _leaf(None, spec, fields)
    tree = attach(params, leaves)
    if extra is None:
        return tree
    found = {**document["values"]}
    for p, x in read.get("extra", {}).items():
        *_, impl = document["keys"].get(p, [None])
        found[p] = _as_template(x, templates[p], impl, p)
    flat, treedef = jax.tree_util.tree_flatten_with_path(extra)
    restored = [found[jax.tree_util.keystr(keys)] for keys, _ in flat]
    return tree, jax.tree.unflatten(treedef, restored)


# ------------------------------------------------------------------------------ parts


def _fields(spec: dict[str, Any]) -> tuple[str, ...]:
    """The arrays of a leaf that the document describes."""
    if spec["kind"] == "full":
        return ("value",)
    return ("a", "b", "scale", "c") if spec.get("lora_bias") else ("a", "b", "scale")


def _leaf(w: Any, spec: dict[str, Any], fields: dict[str, Any]) -> Adapted:
    """A leaf from the document's words on it and its arrays, or their shapes."""
    dropped = None if "dropped" not in spec else jnp.dtype(spec["dropped"])
    if spec["kind"] == "full":
        return Full(w, **fields, dropped=dropped)
    static: dict[str, Any] = {"roles": spec["roles"], "bias": spec.get("bias")}
    form = _form(spec.get("form"))
    return LoRA(w, **fields, **static, form=form, dropped=dropped)


def _form(stored: dict[str, Any] | None) -> Form | None:
    """A leaf's form from its fields in the document, where JSON made tuples lists."""
    if stored is None:
        return None
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    forms: dict[Any, Any] = {"Blocks": Blocks, "Kernel": Kernel}
    return forms[fields.pop("name")](**fields)


def _leaves(extra: Any) -> list[tuple[str, Any]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(extra)
    return [(jax.tree_util.keystr(keys), x) for keys, x in pairs]


def _base(tree: Any) -> dict[str, Any]:
    def base(x: Any) -> Any:
        return x if not is_adapted(x) or x.w is None else x.w

    pairs = [(p, base(x)) for p, x in _paths.flatten(tree)[0]]
    return {p: x for p, x in pairs if hasattr(x, "shape") and hasattr(x, "dtype")}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _python(x: Any) -> type | None:
    """The JSON type of a Python number, string or boolean; None for all else."""
    if isinstance(x, np.generic):
        return str if isinstance(x, np.str_) else None
    return next((t for t in (bool, int, float, str) if isinstance(x, t)), None)


def _data(x: Any) -> Any:
    """What is stored of an array: the words of a PRNG key, the array itself else."""
    if _is_key(x):
        return jax.random.key_data(x)
    if isinstance(x, jax.Array) and not (
        jax.process_count() > 1 and x.is_fully_addressable
    ):
        return x
    x = np.asarray(x)  # also of an array of each process's own, which are alike
    return x.astype(x.dtype.newbyteorder("="))


def _as_template(x: Any, template: Any, impl: str | None, p: str) -> Any:
    """A stored array as the kind of thing that the template is."""
    if impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    if not hasattr(template, "dtype"):
        return type(template)(x)
    if isinstance(template, np.generic):
        return x[()]
    return x if isinstance(template, np.ndarray) else _jax(x, p)


def _jax(x: Any, where: str) -> jax.Array:
    """An array that was read, as one of JAX's; free to move where it was not placed."""
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise ValueError(
            f"checkpoint.restore: {where!r} was saved as {x.dtype}, which JAX would "
            "narrow here: expected jax.config.update('jax_enable_x64', True), as when "
            "it was saved."
        )
    return jnp.asarray(x)


def _signature(x: Any) -> list[Any]:
    return [list(x.shape), str(x.dtype)]


def _template_signature(x: Any, stored: Any) -> Any:
    """A template's signature; a Python number stands for a scalar array of its kind."""
    kind = _python(x)
    if kind is not None:
        scalar = isinstance(stored, list) and stored[0] == []
        kinds = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating}
        if scalar and kind in kinds and jnp.issubdtype(stored[1], kinds[kind]):
            return stored
        return kind.__name__
    if not hasattr(x, "dtype"):
        return type(x).__name__
    if isinstance(x, (np.ndarray, np.generic)):
        x = np.empty(x.shape, x.dtype.newbyteorder("="))
    return _signature(x)


def _document_crc(document: dict[str, Any]) -> int:
    text = json.dumps({k: v for k, v in document.items() if k != "crc"}, sort_keys=True)
    return zlib.crc32(text.encode())


def _same(what: str, want: dict[str, Any], have: dict[str, Any], do: str) -> None:
    """Raises at the first path whose signatures differ."""
    for p in [*want, *have]:
        expected, found = (side.get(p, "nothing") for side in (want, have))
        if expected != found:
            near = _paths.near(p, have) if found == "nothing" else ""
            near = f" (near paths: {near})" if near else ""
            if have == {q.removeprefix("params/"): v for q, v in want.items()}:
                do = "It was saved from {'params': params}: pass that."
            elif want == {q.removeprefix("params/"): v for q, v in have.items()}:
                do = "It was saved from the tree under 'params': pass that."
            raise ValueError(
                f"{what}: at {p!r} expected {_words(expected)}, found "
                f"{_words(found)}{near}. {do}"
            )


def _words(signature: Any) -> str:
    if isinstance(signature, str):
        return signature
    shape, dtype = signature
    return f"{dtype}[{','.join(map(str, shape))}]"


def _document(path: epath.Path) -> dict[str, Any]:
    """The JSON document of a checkpoint, of a format that this version reads."""
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint.restore: there is no directory {path}: expected one that "
            "jlora.checkpoint.save made. A save that was killed leaves none."
        )
    with _orbax.damage(path, "its document cannot be read"):
        args = {"document": ocp.args.JsonRestore()}
        document = _orbax.restore(path, args)["document"]
        fmt, version = document["format"], document["version"]
    if fmt != FORMAT:
        raise DamagedError(
            _orbax.damaged(path, f"its format is {fmt!r}, not {FORMAT!r}")
        )
    if version > VERSION:
        raise ValueError(
            f"checkpoint.restore: {path} has format version {version}: expected at "
            f"most {VERSION}, which is what this jlora reads. Update jlora."
        )
    if document.get("crc") != _document_crc(document):
        raise DamagedError(_orbax.damaged(path, "its document is damaged"))
    return document


def _places(arrays: Any, plan: Any, base: dict[str, Any]) -> dict[str, Any]:
    """The sharding of each array of the adapter, from that of its base."""
    places: dict[str, Any] = {}
    for p, spec in plan.items():
        names = {n: f"{p}:{n}" for n in _fields(spec)}
        shapes = {n: jax.ShapeDtypeStruct(*arrays[at][:2]) for n, at in names.items()}
        leaf = _leaf(base[p], spec, shapes)
        own = _sharding.of_fields(leaf, _sharding.of_array(base[p]))
        places |= {at: getattr(own, n) for n, at in names.items()}
    return places


def _read(
    path: epath.Path,
    arrays: Any,
    items: list[str],
    templates: dict[str, Any],
    places: dict[str, Any],
) -> dict[str, Any]:
    """The arrays of a checkpoint where they belong, each verified by its checksum."""

    def target(p: str, shape: list[int], dtype: str) -> Any:
        place = places.get(p, _sharding.of_array(templates.get(p)))
        if place is None:
            return np.empty(shape, jnp.dtype(dtype))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    signatures = {k: arrays[k] for k in items if arrays[k]}
    targets: dict[str, Any] = {}
    read: dict[str, Any] = {k: {} for k in signatures}
    for k, v in signatures.items():
        for p, (shape, dtype, _) in v.items():
            if 0 in shape:  # Orbax stores none of these
                numpy = isinstance(templates.get(p), np.ndarray)
                read[k][p] = (np if numpy else jnp).zeros(shape, dtype)
            else:
                targets.setdefault(k, {})[p] = target(p, shape, dtype)

    def arrays_of() -> Any:
        with _orbax.damage(path, "its arrays cannot be read"):
            args = {k: ocp.args.StandardRestore(v) for k, v in targets.items()}
            return _orbax.restore(path, args) if args else {}

    found = _orbax.together(path, arrays_of)
    for k in targets:
        read[k] |= found[k]

    def verify() -> None:
        sums = {
            (k, p): _checksum.checksum(read[k][p])
            for k, v in signatures.items()
            for p in v
        }
        for (k, p), found in sums.items():
            if found != signatures[k][p][2]:
                raise DamagedError(_orbax.damaged(path, f"the array {p!r} is damaged"))

    _orbax.together(path, verify)
    return read
