"""Paths: how a leaf of a tree is named."""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Iterable
from typing import Any

import jax


def path_of(keys: tuple[Any, ...]) -> str:
    """``"encoder/layer_0/query/kernel"`` from JAX's key path.

    The attribute ``value`` that Flax's boxes and NNX's variables end in is left out.
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
    """Where a path stands, seen from where another one stands.

    Example:
      >>> relative("dense/bias", "dense/kernel"), relative("b/up", "w/up")
      ('bias', '../b/up')
    """
    return posixpath.relpath("/" + path, posixpath.dirname("/" + to))


def resolve(name: str, to: str) -> str:
    """The path that `relative` gave this name."""
    return posixpath.normpath(f"{posixpath.dirname('/' + to)}/{name}").lstrip("/")


def near(path: str, paths: Iterable[str]) -> str:
    """The paths that are most like this one, for an error message."""
    paths = list(paths)
    close = difflib.get_close_matches(path, paths, n=3, cutoff=0.4) or paths[:3]
    return ", ".join(repr(p) for p in close) if close else "none: the tree is empty"
