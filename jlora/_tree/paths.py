"""Paths, which name the leaves of a tree."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax


def path_of(keys: tuple[Any, ...]) -> str:
    """``"encoder/layer_0/query/kernel"`` from the keys of `flatten_with_keys`."""
    names = []
    for key in keys:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            names.append(str(key))
    return "/".join(names)


def flatten_with_keys(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda x: False
) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """JAX's (keys, leaf) pairs and treedef; keys pass over what holds a value alone.

    A box of Flax and a variable of NNX have one attribute, ``value``, which is no key
    here.  Where an attribute of that name is one of several, it is a key.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    if not any(keys and keys[-1] == _VALUE for keys, _ in pairs):
        return pairs, treedef

    def held(x: Any) -> list[Any]:
        """The one value of a node that has no other attribute; else nothing."""
        one = None if is_leaf(x) else _REGISTRY.flatten_one_level_with_keys(x)
        children = list(one[0]) if one else []
        if [key for key, _ in children] != [_VALUE]:
            return []
        value = children[0][1]
        return [value] if is_leaf(value) or jax.tree_util.all_leaves([value]) else []

    outer, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_leaf(x) or bool(held(x))
    )
    return [(keys, *(held(x) or [x])) for keys, x in outer], treedef


_VALUE = jax.tree_util.GetAttrKey("value")
_REGISTRY = jax.tree_util.default_registry


_SEP, _UP, _HERE = "/", "..", "."


def relative(path: str, to: str) -> str:
    """``path`` relative to the parent of ``to``.

    Each ``..`` at the start is one key up.  If a key with that name comes next, or one
    named ``.``, a ``.`` stands between.

    Example:
      >>> relative("dense/bias", "dense/kernel"), relative("b/up", "w/up")
      ('bias', '../b/up')
      >>> relative("dense/..", "dense/kernel"), relative("..", "w/up")
      ('./..', '.././..')
    """
    keys, parent = path.split(_SEP), to.split(_SEP)[:-1]
    same = [x == y for x, y in zip(keys[:-1], parent, strict=False)]
    shared = [*same, False].index(False)
    rest, up = keys[shared:], [_UP] * (len(parent) - shared)
    return _SEP.join([*up, *([_HERE] if rest[0] in (_HERE, _UP) else []), *rest])


def resolve(name: str, to: str) -> str:
    """The inverse of `relative`: the path whose name relative to ``to`` this is."""
    keys, parent = name.split(_SEP), to.split(_SEP)[:-1]
    up = next((k for k, key in enumerate(keys) if key != _UP), len(keys) - 1)
    rest = keys[up + 1 :] if keys[up] == _HERE else keys[up:]
    return _SEP.join([*parent[: max(len(parent) - up, 0)], *rest])


def near(path: str, paths: Iterable[str]) -> str:
    """The paths that are most similar to this one, for an error message."""
    paths = list(paths)
    close = difflib.get_close_matches(path, paths, n=3, cutoff=0.4) or paths[:3]
    return ", ".join(repr(p) for p in close) if close else "none: the tree is empty"
