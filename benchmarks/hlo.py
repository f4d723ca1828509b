"""What a compiled program does between chips: its collectives, by kind and size.

Reads the text of the optimised HLO.  A collective in the body of a loop is counted
once, as XLA's own cost analysis counts it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_LINE = re.compile(
    rf"= (?P<out>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_OP = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<dims>[\d,]*)\]")


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One collective: its kind, and what comes out of it on a chip.

    Attributes:
      kind: one of `KINDS`.
      dtype: as HLO writes it, such as "bf16".
      shape: of the result on one chip (for an all-gather what was gathered).
      op: the name of the operation that needs it, which says nothing of its size.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    op: str = dataclasses.field(default="", compare=False, repr=False)

    @property
    def phase(self) -> str:
        """When it is done in a training step, as the operation's name tells."""
        if not self.op:
            return "unnamed"
        if "rematted_computation" in self.op:
            return "recomputed"
        return "backward" if "transpose(" in self.op else "forward"

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * bits(self.dtype) // 8


def bits(dtype: str) -> int:
    """Bits of an element: bf16 has 16, f8e4m3fn has 8, pred a byte of its own."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+?(\d+)", dtype)
    assert found, dtype
    return int(found[1])


def collectives(text: str) -> list[Collective]:
    """All collectives of an HLO module, those of several arrays taken apart.

    One that is spread over several fusions, so that computation hides it, stands in the
    text once for each of them, under one channel: it is counted once.

    Example:
      >>> line = "%x = f32[8,3]{1,0} all-gather(%y), dimensions={0}"
      >>> collectives(line), collectives(line)[0].bytes
      ([Collective(kind='all-gather', dtype='f32', shape=(8, 3))], 96)
    """
    out: list[Collective] = []
    channels = set()
    for line in text.splitlines():
        found = _LINE.search(line)
        if not found:
            continue
        if channel := _CHANNEL.search(line):
            if channel[1] in channels:
                continue
            channels.add(channel[1])
        op = _OP.search(line)
        arrays = [
            Collective(
                found["kind"],
                a["dtype"],
                tuple(map(int, a["dims"].split(",") if a["dims"] else ())),
                op[1] if op else "",
            )
            for a in _ARRAY.finditer(found["out"])
        ]
        arrays = [a for a in arrays if bits(a.dtype)]
        if found["start"] and found["kind"] in ("all-gather", "collective-permute"):
            # Their tuples hold the operands first, and bookkeeping of u32 last.
            arrays = [a for a in arrays if not (a.dtype == "u32" and not a.shape)]
            arrays = arrays[len(arrays) // 2 :]
        out += arrays
    return out


def table(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Kind to (how many, bytes of their results)."""
    out: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for c in found:
        count, size = out[c.kind]
        out[c.kind] = count + 1, size + c.bytes
    return dict(out)
