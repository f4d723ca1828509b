"""The JSON document of a checkpoint: what it holds, and for which base.

It has the format and its version; the plan, with an entry for each leaf; the base's
fingerprint: the path, shape and dtype of every array; shape, dtype and checksum of
every array that is stored; the values of ``extra`` that are no arrays, and the types of
its PRNG keys; and a checksum of the document itself.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax import lax

from jlora._algebra.weight import squares
from jlora._explicit import automatic, replicated
from jlora._leaf import Adapted, Full, LoRA, base, forms, is_adapted
from jlora._leaf.leaf import STATIC
from jlora._leaf.leaf import document as static_document
from jlora._leaf.leaf import from_document as from_static_document
from jlora._tree import by_path, paths
from jlora.checkpoint import orbax

FORMAT = "jlora adapter"
VERSION = 1


def signature(x: Any) -> list[Any]:
    """Shape and dtype, as JSON."""
    return [list(x.shape), str(x.dtype)]


def fingerprint(tree: Any) -> dict[str, list[Any]]:
    """The signature of every base array, by path; the tree may be plain params.

    A quantised array has one more entry, which says how it is quantised.
    """

    def own(x: Any) -> list[Any]:
        said = base.fingerprint(x)
        return [*signature(x), said] if said else signature(x)

    return {path: own(x) for path, x in bases(tree).items()}


def without_qtypes(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """A `fingerprint` that does not say how arrays are quantised."""
    return {path: own[:2] for path, own in found.items()}


def bases(tree: Any) -> dict[str, Any]:
    """The base arrays of a tree by path, or what has their shape and dtype."""

    # A leaf whose base was dropped has the shape and dtype itself.
    def own(x: Any) -> Any:
        return x.base if is_adapted(x) and base.shaped(x.w) else x

    pairs = [(path, own(x)) for path, x in by_path.flatten(tree)[0]]
    return {p: x for p, x in pairs if hasattr(x, "shape") and hasattr(x, "dtype")}


def entry(leaf: Adapted, w: Any) -> dict[str, Any]:
    """The plan's entry of a leaf: all that its arrays do not tell.

    Args:
      leaf: the leaf, with or without its base.
      w: its base.
    """
    said: dict[str, Any] = (
        {"kind": "full"} if isinstance(leaf, Full) else {"kind": "lora"}
    )
    said |= base.document(leaf.w)
    if isinstance(leaf, LoRA):
        static = {name: getattr(leaf, name) for name in STATIC}
        said |= {"rank": leaf.rank, **static_document(static)}
        fits = leaf.moved or base.is_lossy(w)  # this base alone
        if fits and not base.is_abstract(w) and not base.is_zero(leaf.w):
            said |= _values(w)
    return said


_CLOSE = {"norm": 1e-4, "signed": 1e-3}
"""How far the values may be from those of the same base, in parts of its norm.  A base
that is made anew, on another machine, differs in bfloat16 by some last bits."""


def _values(w: Any) -> dict[str, float]:
    """What tells the values of a base; in all processes the same.

    Its norm, and the sum of its numbers with signs that look random.  What was rounded
    otherwise has nearly the same norm, and another such sum, by about the norm of the
    difference.
    """
    x = base.array(w)
    squared, signed = automatic(_sums, lambda: (replicated(x), replicated(x)), x)
    return {"norm": math.sqrt(float(squared)), "signed": float(signed)}


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of squares and of signed numbers, an axis at a time so that little is lost."""
    mixed = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # odd factors and shifts, until no pattern is left
        mixed = mixed + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = mixed * jnp.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    x = x.astype(jnp.float32)
    signed = jnp.where(mixed >> 31, -x, x)
    for _ in range(x.ndim):
        signed = signed.sum(-1)
    return squares(x, tuple(range(x.ndim)), jnp.float32), signed


def require_left(
    said: dict[str, Any], path: str, w: Any, where: Any, *, any_qtype: bool
) -> None:
    """Raises if a leaf needs a base of these values, and w is another one.

    That is what an initialiser has left of the base; or a base as it was rounded.

    Args:
      said: the entry of the leaf.
      path: its path.
      w: the base that it is restored on; one without values passes.
      where: the checkpoint, for the error.
      any_qtype: whether the base may be rounded otherwise.
    """
    how = said.get("moved")
    if "norm" not in said or base.is_abstract(w) or (any_qtype and not how):
        return
    found = _values(w)
    if any(
        abs(found[name] - said.get(name, found[name])) > close * said["norm"]
        for name, close in _CLOSE.items()
    ):
        if not how:
            raise ValueError(
                f"checkpoint.restore: {where} belongs to another base: {path!r} was "
                f"trained on one with {_said(said)}, found {_said(found)}: it is of "
                "another model, or was rounded otherwise, as by other moments. Pass "
                "the quantised base itself, which Orbax saves as any tree; or, for "
                "another rounding of the same weights, any_qtype=True."
            )
        raise ValueError(
            f"checkpoint.restore: {where} belongs to another base: {path!r} was "
            f"trained on what {how!r} had left of it, with {_said(said)}, found "
            f"{_said(found)}. Pass that base: as Orbax saved it, or made as before the "
            f"training, jlora.unwrap(jlora.wrap(params, ..., init={how!r})), with the "
            "same options. Or save an adapter of the original base, "
            "jlora.mix([trained, start], [1, -1])."
        )


def _said(values: Mapping[str, Any]) -> str:
    signed = f", signed sum {values['signed']:.6g}" if "signed" in values else ""
    return f"norm {values['norm']:.6g}{signed}"


def names(said: dict[str, Any], path: str, arrays: Iterable[str]) -> dict[str, str]:
    """The stored fields of a leaf, each with the name of its array."""
    table = Full.fields if said["kind"] == "full" else LoRA.fields
    at = {name: f"{path}:{name}" for name in table}
    return {name: own for name, own in at.items() if own in arrays}


def leaf_of(said: dict[str, Any], shape: Any, arrays: dict[str, Any]) -> Adapted:
    """The leaf that an entry of the plan describes, without its base.

    Args:
      said: the entry.
      shape: the weight's shape.
      arrays: the leaf's fields, or their shapes, by name.
    """
    w = base.from_document(said, shape)
    if said["kind"] == "full":
        return Full(w, **arrays)
    static = from_static_document(said)
    implicit: dict[str, Any] = dict.fromkeys(forms.of(static["form"]).implicit)
    return LoRA(w, **implicit, **arrays, **static)


def crc(document: dict[str, Any]) -> int:
    """The checksum of a document, but for its ``crc``."""
    text = json.dumps({k: v for k, v in document.items() if k != "crc"}, sort_keys=True)
    return zlib.crc32(text.encode())


def read(path: epath.Path) -> dict[str, Any]:
    """Reads the document of a checkpoint.

    Raises:
      FileNotFoundError: there is no such directory.
      DamagedError: the document is not as it was written.
      ValueError: the format is newer than this version reads.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint.restore: there is no directory {path}: expected one that "
            "jlora.checkpoint.save made. A save that was killed leaves none."
        )
    with orbax.damage(path, "its document cannot be read"):
        args = {"document": ocp.args.JsonRestore()}
        document = orbax.restore(path, args)["document"]
        fmt, version = document["format"], document["version"]
    if fmt != FORMAT:
        why = f"its format is {fmt!r}, not {FORMAT!r}"
        raise orbax.DamagedError(orbax.damaged(path, why))
    if version > VERSION:
        raise ValueError(
            f"checkpoint.restore: {path} has format version {version}: expected at "
            f"most {VERSION}, which is what this jlora reads. Update jlora."
        )
    if document.get("crc") != crc(document):
        raise orbax.DamagedError(orbax.damaged(path, "its document is damaged"))
    return document


def require_same(
    what: str, want: dict[str, Any], have: dict[str, Any], do: str
) -> None:
    """Raises at the first path whose signatures differ.

    Args:
      what: the start of the error, which says what is wrong.
      want: signature by path, of what was saved.
      have: signature by path, of what was passed.
      do: the end of the error, which says what to do.
    """
    for p in [*want, *have]:
        expected, found = (side.get(p, "nothing") for side in (want, have))
        if expected == found:
            continue
        near = paths.near(p, have) if found == "nothing" else ""
        near = f" (near paths: {near})" if near else ""
        if have == {q.removeprefix("params/"): v for q, v in want.items()}:
            do = "It was saved from {'params': params}: pass that."
        elif want == {q.removeprefix("params/"): v for q, v in have.items()}:
            do = "It was saved from the tree under 'params': pass that."
        raise ValueError(
            f"{what}: at {p!r} expected {_words(expected)}, found "
            f"{_words(found)}{near}. {do}"
        )


def _words(own: Any) -> str:
    if isinstance(own, str):
        return own
    shape, dtype, *more = own
    how = "".join(f", {said['qtype']} with scales {said['scale']}" for said in more)
    return f"{dtype}[{','.join(map(str, shape))}]{how}"


def struct(stored: list[Any]) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a stored array, from its signature."""
    return jax.ShapeDtypeStruct(*stored[:2])
