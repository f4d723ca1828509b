"""Report and Entry: how the lift treats each adapted leaf."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jlora._printed import Printed


@dataclasses.dataclass(frozen=True)
class Entry:
    """How the lift treats one adapted leaf.

    Attributes:
      path: the path of the leaf in its tree.
      status: "factored" (W + scale·a·b is never formed; also for a `Full` leaf),
        "materialised" (W + scale·a·b is formed at least once) or "unused".
      where: the primitives that use the leaf, in order of use.
    """

    path: str
    status: str
    where: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Printed):
    """The result of `explain`: one `Entry` per adapted leaf; iterable and printable.

    Attributes:
      entries: one for each adapted leaf.
      product: of a bank, how each example finds its slot: "gathered" (its factors are
        taken from the bank), "kernel" (on TPU some are read there), "joined" (one
        product with the ranks of all slots) or "by token" (the same, with an adapter
        for each token); else None.
      note: what else there is to say, as the last line.
    """

    entries: tuple[Entry, ...]
    product: str | None = None
    note: str = ""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        width = max([len(e.path) for e in self], default=0)
        rows = [
            f"{e.path:{width}}  {e.status:12}  {', '.join(e.where)}".rstrip()
            for e in self
        ]
        counts = collections.Counter(e.status for e in self)
        if not rows:
            return "no adapted leaves"
        total = ", ".join(f"{n} {s}" for s, n in counts.items())
        return "\n".join([*rows, total, *([self.note] if self.note else [])])


def report(
    paths: Sequence[str], seen: Mapping[str, Sequence[tuple[str, bool]]]
) -> Report:
    """The report on these paths.

    Args:
      paths: the paths of the adapted leaves, in the order of the tree.
      seen: the primitives that used each leaf, and whether each use formed the weight;
        by path.
    """

    def entry(path: str) -> Entry:
        uses = seen.get(path, ())
        formed = any(formed for _, formed in uses)
        status = "materialised" if formed else "factored" if uses else "unused"
        return Entry(path, status, tuple(name for name, _ in uses))

    return Report(tuple(map(entry, paths)))
