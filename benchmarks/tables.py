"""Tables of results as Markdown, one section a measurement, in files that are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a table; the first row is its head.

    Example:
      >>> print(markdown([["", "a"], ["x", "1"]]))
      |  | a |
      | --- | --- |
      | x | 1 |
    """
    head, *rest = rows
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rest]
    )


def record(path: Path, head: str, section: str) -> None:
    """Puts a section into a file, in place of the one of the same title."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    title = section.split("\n", 1)[0]
    parts = re.split(r"(?m)^(?=## )", text)[1:]
    kept = [p.rstrip() + "\n" for p in parts if p.split("\n", 1)[0] != title]
    path.write_text("\n".join([head, *sorted([*kept, section])]), encoding="utf-8")
