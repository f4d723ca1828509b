"""Paths, which name the leaves of a tree."""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Iterable
from typing import Any

import jax


def path_of(keys: tuple[Any, ...]) -> str:
    """``"encoder/layer_0/query/kernel"`` from JAX's key path.

    Flax's boxes and NNX's variables add a last attribute ``value``, which is left out.
    """
    names = []
    for key in keys:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            names.append(str(key))
    last = keys[-1] if keys else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        names.pop()
    return "/".join(names)


def relative(path: str, to: str) -> str:
    """``path`` relative to the parent of ``to``.

    Example:
      >>> relative("dense/bias", "dense/kernel"), relative("b/up", "w/up")
      ('bias', '../b/up')
    """
    return posixpath.relpath("/" + path, posixpath.dirname("/" + to))


def resolve(name: str, to: str) -> str:
    """The inverse of `relative`: the path whose name relative to ``to`` this is."""
    return posixpath.normpath(f"{posixpath.dirname('/' + to)}/{name}").lstrip("/")


def near(path: str, paths: Iterable[str]) -> str:
    """The paths that are most similar to this one, for an error message."""
    paths = list(paths)
    close = difflib.get_close_matches(path, paths, n=3, cutoff=0.4) or paths[:3]
    return ", ".join(repr(p) for p in close) if close else "none: the tree is empty"
