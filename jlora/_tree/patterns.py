"""Patterns, which choose the leaves of a tree by their paths."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from jlora._tree.paths import near

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]


@functools.lru_cache(maxsize=4096)
def _compile(glob: str) -> re.Pattern[str]:
    """The regular expression of a glob, for a path that ends in "/".

    `*`, `?` and `[...]` match within one key; `**` matches zero or more whole keys.
    """
    within = {"*": "[^/]*", "?": "[^/]"}

    def token(found: re.Match[str]) -> str:
        text = found.group()
        if len(text) > 1:
            return "[" + text[1:-1].replace("\\", r"\\").replace("!", "^", 1) + "]"
        return within.get(text, re.escape(text))

    keys = [
        "(?:[^/]*/)*" if key == "**" else re.sub(r"\[[^\]]+\]|.", token, key) + "/"
        for key in glob.split("/")
    ]
    return re.compile("".join(keys))


def matches(pattern: Pattern, path: str, x: Any) -> bool:
    """Whether a pattern fits a leaf.

    A glob or compiled regular expression has to match the whole path.
    """
    if isinstance(pattern, str):
        # A tree that is a single array has an empty path, without keys.
        return _compile(pattern).fullmatch(path + "/" if path else "") is not None
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    # A class is callable, but is meant as one of NNX's filters, which get no path.
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


def check_matched(
    what: str, patterns: Iterable[Pattern], leaves: list[tuple[str, Any]]
) -> None:
    """Raises ValueError if a pattern fits no path, and names similar paths."""
    for pattern in patterns:
        if not any(matches(pattern, path, x) for path, x in leaves):
            raise ValueError(_no_match(what, pattern, leaves))


def _words(text: str, paths: Iterable[str]) -> str:
    """The part of a pattern without its signs, with "/" for "." if paths have that."""
    keys = re.sub(r"[^\w/]+", "", text.replace(".", "/")).strip("/")
    if keys and any(f"/{keys}/" in f"/{p}/" for p in paths):
        return keys
    return re.sub(r"[^\w/]+", "", text).strip("/")


def _no_match(what: str, pattern: Pattern, leaves: list[tuple[str, Any]]) -> str:
    regex = isinstance(pattern, re.Pattern)
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    paths = [p for p, _ in leaves]
    words = _words(text, paths) if isinstance(text, str) else ""
    like = [p for p in paths if words and words.lower() in p.lower()]
    close = near(words, like or paths)
    rule = (
        "A regular expression has to match the whole path."
        if regex
        else "A glob covers the whole path: '*' stands within one key, '**' for any "
        "number of keys."
    )
    guesses: list[Pattern] = [
        *(words, f"**/{words}", f"{words}/**", f"**/{words}/**", f"**/*{words}*/**")
    ]
    if regex:
        guesses = [re.compile(f".*{words}.*")]
    elif isinstance(text, str) and "{" in text:
        rule += " It has no braces: pass a list of patterns."
    elif isinstance(text, str) and ".*" in text:
        rule += f" A regular expression is given as re.compile({text!r})."
    for guess in guesses:
        if words and any(matches(guess, p, None) for p in paths):
            rule += f" Did you mean {guess!r}?"
            break
    return f"{what} {text!r} matches no path of the tree; near paths: {close}. {rule}"
