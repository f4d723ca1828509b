"""Paths and patterns: how a leaf of a tree is named, and how names are matched."""

from __future__ import annotations

import difflib
import functools
import posixpath
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jlora import _boxes
from jlora._leaf import is_adapted

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]


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


def flatten(
    tree: Any,
) -> tuple[list[tuple[str, Any]], Callable[[Iterable[Any]], Any]]:
    """(path, leaf) pairs, adapted leaves whole, and what makes a tree of new leaves."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_adapted)

    def build(leaves: Iterable[Any]) -> Any:
        return _boxes.fit(jax.tree.unflatten(treedef, leaves))

    return [(path_of(keys), x) for keys, x in pairs], build


def map_leaves(fn: Callable[[str, Any], Any], tree: Any, *, share: bool = False) -> Any:
    """tree_map of fn(path, leaf), with adapted leaves whole.

    A tree of NNX's variables gets new ones.  With ``share`` those whose leaves stay are
    the old ones, so that what a call writes into them is not lost.
    """
    pairs, build = flatten(tree)
    out = build(fn(path, x) for path, x in pairs)
    if not share or not variables(tree):
        return out
    old, treedef = jax.tree.flatten(tree, is_leaf=is_variable)
    new = jax.tree.leaves(out, is_leaf=is_variable)

    def same(x: Any, y: Any) -> bool:
        return is_variable(x) and x.get_raw_value() is y.get_raw_value()

    kept = [x if same(x, y) else y for x, y in zip(old, new, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def is_variable(x: Any) -> bool:
    """Whether x is one of NNX's mutable variables."""
    nnx = sys.modules.get("flax.nnx")  # without it there is none
    return nnx is not None and isinstance(x, nnx.Variable)


def variables(tree: Any) -> list[Any]:
    """NNX's variables in a tree, in order; other frameworks have none."""
    if "flax.nnx" not in sys.modules:
        return []
    return list(filter(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)))


def of_adapters(tree: Any) -> bool:
    """Whether variables of NNX in the tree are factors of a layer's own."""
    return any(
        isinstance(v, sys.modules["flax.nnx"].LoRAParam) for v in variables(tree)
    )


def others(tree: Any) -> dict[str, str]:
    """Path to what stands there, of arrays that their framework calls no parameters.

    NNX's variables that are no ``Param`` or belong to an adapter already, and Linen's
    collections beside ``params``.
    """
    found = {}
    if variables(tree):
        nnx = sys.modules["flax.nnx"]
        pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
        for keys, x in pairs:
            plain = isinstance(x, nnx.Param) and not isinstance(x, nnx.LoRAParam)
            if is_variable(x) and not plain:
                found[path_of(keys)] = f"a {type(x).__name__}"
    elif isinstance(tree, Mapping) and "params" in tree:
        for path, _ in flatten(tree)[0]:
            if (collection := path.split("/")[0]) != "params":
                found[path] = f"in {collection!r}"
    return found


def refuse_layers(tree: Any, what: str) -> None:
    """Raises for a module of jlora.nnx layers, whose factors are variables."""
    if of_adapters(tree):
        raise ValueError(
            f"{what}: the module has layers with factors of their own (nnx.LoRAParam): "
            "expected a tree of jlora.wrap. Carry them to the plain twin: "
            "jlora.attach(twin, jlora.nnx.adapter(module))."
        )


def require_adapted(tree: Any, what: str, advice: str = "") -> None:
    """Raises for a tree without adapted leaves."""
    if not any(is_adapted(x) for _, x in flatten(tree)[0]):
        if not advice:
            refuse_layers(tree, what)
        raise ValueError(
            f"{what}: the tree has no adapted leaf: expected the result of "
            f"jlora.wrap(params, ...), found plain params. {advice}".rstrip()
        )


@functools.lru_cache(maxsize=4096)
def _compile(glob: str) -> re.Pattern[str]:
    """`*`, `?` and `[...]` within one key; `**` for zero or more whole keys."""
    within = {"*": "[^/]*", "?": "[^/]"}

    def token(found: re.Match[str]) -> str:
        text = found.group()
        if len(text) > 1:
            return "[" + text[1:-1].replace("\\", r"\\").replace("!", "^", 1) + "]"
        return within.get(text, re.escape(text))

    keys = [
        "(?:[^/]+/)*" if key == "**" else re.sub(r"\[[^\]]+\]|.", token, key) + "/"
        for key in glob.split("/")
    ]
    return re.compile("".join(keys))


def matches(pattern: Pattern, path: str, x: Any) -> bool:
    """Whether a glob, a compiled regular expression (full match) or a callable fits."""
    if isinstance(pattern, str):
        # A tree that is one array has the empty path, of no keys.
        return _compile(pattern).fullmatch(path + "/" if path else "") is not None
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    # A class is callable, but meant as a filter of NNX, which see no path.
    if callable(pattern) and not isinstance(pattern, type):
        return bool(pattern(path, x))
    raise TypeError(
        f"pattern {pattern!r}: expected a glob, a compiled regular expression or a "
        f"callable (path, array) -> bool, found {type(pattern).__name__}. Filters of "
        "NNX are for its own wrt= and split."
    )


def as_patterns(patterns: Pattern | Iterable[Pattern] | None) -> list[Pattern]:
    """One pattern or several, as a list."""
    if patterns is None:
        return []
    if isinstance(patterns, (str, re.Pattern)) or callable(patterns):
        return [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(
            f"patterns {patterns!r}: expected a pattern or several, found "
            f"{type(patterns).__name__}."
        )
    return list(patterns)


def are_patterns(x: Any) -> bool:
    """Whether x can only be meant as patterns: strings or regular expressions."""
    if isinstance(x, (list, tuple)):
        return bool(x) and all(are_patterns(p) for p in x)
    return isinstance(x, (str, re.Pattern))


def near(path: str, paths: Iterable[str]) -> str:
    """The paths that are most like this one, for an error message."""
    paths = list(paths)
    close = difflib.get_close_matches(path, paths, n=3, cutoff=0.4) or paths[:3]
    return ", ".join(repr(p) for p in close) if close else "none: the tree is empty"


def check_matched(
    what: str, patterns: Iterable[Pattern], leaves: list[tuple[str, Any]]
) -> None:
    """Raises for each pattern that fits no path at all, with the paths near it."""
    for pattern in patterns:
        if not any(matches(pattern, path, x) for path, x in leaves):
            raise ValueError(_no_match(what, pattern, leaves))


def _no_match(what: str, pattern: Pattern, leaves: list[tuple[str, Any]]) -> str:
    regex = isinstance(pattern, re.Pattern)
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    words = re.sub(r"[^\w/]+", "", text).strip("/") if isinstance(text, str) else ""
    paths = [p for p, _ in leaves]
    close = near(words, [p for p in paths if words and words in p] or paths)
    rule = (
        "A regular expression has to match the whole path."
        if regex
        else "A glob covers the whole path: '*' stands within one key, '**' for any "
        "number of keys."
    )
    for guess in (f"**/{words}", f"{words}/**", f"**/{words}/**", f"**/*{words}*/**"):
        if words and any(matches(guess, p, None) for p in paths):
            rule += f" Did you mean {guess!r}?"
            break
    return f"{what} {text!r} matches no path of the tree; near paths: {close}. {rule}"
