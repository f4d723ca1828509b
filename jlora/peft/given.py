"""Names that a user writes: a mapping, regular expressions or a function."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora._tree.by_path import is_bias
from jlora._tree.paths import near
from jlora.peft.names import Names, Part
from jlora.peft.names import sizes as axes_of
from jlora.peft.order import Order

Given = Names | Mapping[str, Any] | Sequence[tuple[str, str]] | Callable[[str], Any]


def names_of(given: Any, paths: Sequence[str], what: str) -> Names:
    """Names from all that a user may pass for them.

    Args:
      given: what `match` gave; a mapping from path to module; pairs of (regular
        expression, replacement), of which the first that fits a whole path counts; or
        a function from path to module, or None.
      paths: the paths of the tree.
      what: the function that it was passed to, for errors.
    """
    if isinstance(given, Names):
        return given
    if isinstance(given, (str, os.PathLike)):
        return Names.load(given)
    if isinstance(given, Mapping):
        if lost := [p for p in given if p not in paths]:
            raise ValueError(
                f"{what}: names has {lost[0]!r}, which the tree has not; near paths: "
                f"{near(str(lost[0]), paths)}."
            )
        return Names({}, said=dict(given))
    if callable(given):
        found = {path: given(path) for path in paths}
        return Names({}, said={p: m for p, m in found.items() if m is not None})
    if isinstance(given, Sequence):
        try:
            pairs = [(re.compile(pattern), to) for pattern, to in given]
            if not all(callable(to) or isinstance(to, str) for _, to in pairs):
                raise TypeError("a replacement is a text or a function of the match")
        except (TypeError, ValueError, re.error) as e:
            raise ValueError(
                f"{what}: names: expected pairs of (regular expression, replacement), "
                f"such as [(r'layers_(\\d+)/(\\w+)/kernel', r'layers.\\1.\\2')] ({e})."
            ) from None
        said = {}
        for path in paths:
            for pattern, to in pairs:
                if found_ := pattern.fullmatch(path):
                    said[path] = _expanded(found_, to, what)
                    break
        return Names({}, said=said)
    raise TypeError(
        f"{what}: names is a {type(given).__name__}: expected what jlora.peft.match "
        "gives, a mapping from path to module, pairs of (regular expression, "
        "replacement), or a function from path to module."
    )


def _expanded(found: re.Match[str], to: Any, what: str) -> Any:
    try:
        return to(found) if callable(to) else found.expand(to)
    except (re.error, IndexError) as e:
        raise ValueError(
            f"{what}: names: the replacement {to!r} does not fit {found.re.pattern!r} "
            f"({e})."
        ) from None


_NAME = re.compile(r"[^\s.\0]+(\.[^\s.\0]+)*")


def _check_said(path: str, said: Any, modules: Sequence[Any]) -> None:
    """Raises unless what was said of a weight are names of modules."""
    good = modules and all(
        isinstance(m, str)
        and _NAME.fullmatch(m)
        and not {*"{}"} & {*m.replace("{}", "")}
        for m in modules
    )
    if not good:
        raise ValueError(
            f"names of {path!r}: {said!r}: expected the path of a module, such as "
            "'model.layers.{}.mlp.up_proj', a list of them for a fused weight, or a "
            "mapping from each to its number of columns."
        )
    if isinstance(said, Mapping):
        for n in said.values():
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(
                    f"names of {path!r}: {said!r}: expected a positive number of "
                    f"columns for each module, found {n!r}."
                )


def by_hand(
    path: str,
    said: Any,
    shape: Sequence[int],
    axes: str,
    kind: str,
    *,
    groups: int = 1,
    torch: str | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Part, ...]:
    """The parts of a weight from what was said of it by hand.

    Args:
      path: the weight's path, for errors.
      said: a module's path; several, or a mapping from module to its number of columns,
        for a fused weight.  ``{}`` stands for the index along a batch axis.
      shape: the weight's shape.
      axes: the roles of its axes.
      kind: "dense", "embed", "conv" or "vector".
      groups: a convolution's number of groups.
      torch: the roles of the tensor's axes, if they are not those of torch's layer.
      sizes: the number of columns of each module, if a file tells.
    """
    several = isinstance(said, (list, tuple, Mapping))
    modules = list(said) if several else [said]
    _check_said(path, said, modules)
    batch, in_, out = axes_of(shape, axes)
    rows, columns = math.prod(in_), math.prod(out)
    holes = {m.count("{}") for m in modules}
    if holes != {len(batch)}:
        raise ValueError(
            f"names of {path!r}: {said!r}: expected {len(batch)} times {{}} in each, "
            f"one for each batch axis of a weight of shape {tuple(shape)} and roles "
            f"{axes!r}."
        )
    if isinstance(said, Mapping):
        sizes = {m: int(n) for m, n in said.items()}
    rows_in_order = _in_order(in_, axes, kind)
    window = _window(in_, axes) if kind == "conv" else ()
    parts = []
    for at in np.ndindex(*batch):
        own = [_filled(m, at) for m in modules]
        widths = _widths(path, said, own, modules, columns, sizes)
        start = 0
        for module, width in zip(own, widths, strict=True):
            tensor, roles = _tensor_of(module, path, kind, len(in_), torch)
            mine = Order(start, ((width, 1),))
            orders = rows_in_order, mine, Order.all(rows), Order.all(width)
            index = tuple(map(int, at))
            parts.append(
                Part(tensor, roles, axes, kind, index, (), *orders, groups, window)
            )
            start += width
    return tuple(parts)


def _filled(template: str, at: Sequence[int]) -> str:
    """The template with the index along each batch axis in its holes."""
    for k in at:
        template = template.replace("{}", str(k), 1)
    return template


def _window(sizes: Sequence[int], axes: str) -> tuple[int, ...]:
    """The sizes of a convolution's window, from those of its in axes."""
    last = axes.lstrip("b").startswith("o")  # (out, in, *k); else (*k, in, out)
    return tuple(sizes[1:] if last else sizes[:-1])


def _widths(
    path: str,
    said: Any,
    own: Sequence[str],
    modules: Sequence[str],
    columns: int,
    sizes: Mapping[str, int] | None,
) -> list[int]:
    """The number of columns of each module of a weight."""
    known = sizes or {}
    pairs = list(zip(own, modules, strict=True))
    if all(m in known or t in known for m, t in pairs):
        widths = [known[m] if m in known else known[t] for m, t in pairs]
    else:
        widths = [columns // len(own)] * len(own)
    if sum(widths) != columns:
        raise ValueError(
            f"names of {path!r}: {said!r} have {widths} columns: expected {columns} in "
            "all. Say the number of each by a mapping, {module: columns}."
        )
    return widths


def _tensor_of(
    module: str, path: str, kind: str, window: int, torch: str | None
) -> tuple[str, str]:
    """(name, roles) of the tensor of a module's weight, or of its bias."""
    last = module.rpartition(".")[2]
    if kind == "vector":
        named = last in ("weight", "bias")
        own = "bias" if is_bias(path) else "weight"
        return (module if named else f"{module}.{own}"), "o"
    roles = {"dense": "oi", "embed": "io", "conv": "oi" + "i" * (window - 1)}[kind]
    name = module if last == "weight" else f"{module}.weight"
    return name, torch or roles


def _in_order(sizes: Sequence[int], axes: str, kind: str) -> Order:
    """Where the rows of torch's matrix are in the weight's.

    torch has a convolution's channels before its window; Flax has them after.
    """
    n = math.prod(sizes)
    own = axes.lstrip("b")
    if kind != "conv" or own.startswith("o"):  # (out, in, *k), as torch has it
        return Order.all(n)
    return Order.of(np.moveaxis(np.arange(n).reshape(sizes), -1, 0).reshape(-1))
