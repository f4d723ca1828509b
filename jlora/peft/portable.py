"""The modules of an adapter in the form that every server takes.

One rank of a few, padded with zeros; a scale of one, so that alpha = r and nothing is
read wrong; Linear layers only; and bare suffixes for targets, so all modules of a
suffix are there, those that are not adapted as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import numpy as np

from jlora.peft.modules import Module
from jlora.peft.names import Names
from jlora.peft.to_torch import Joined

# Ranks that every server takes: vLLM compiles for these.
RANKS = 8, 16, 32, 64, 128, 256, 512
# Modules that servers fuse: where one is adapted, the others get zeros.
_TOGETHER = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
MERGE = "merge it into the base"
_EXTRACT = "extract a plain adapter, jlora.extract(params, jlora.merge(tree), rank=...)"


def refusal(name: str, what: str, do: str) -> str:
    """The text of an error about something that is not portable."""
    return (
        f"peft.save: portable: {name!r} {what}, which not every server takes: {do}; or "
        "save without portable, and see jlora.peft.check(directory, server)."
    )


def portable_of(parts: Joined, names: Names) -> tuple[Joined, list[str]]:
    """The modules in portable form, and the targets that name them.

    Raises:
      ValueError: a magnitude, an output bias, a layer that is no Linear, or a rank that
        is too high.
    """
    for tensor, m in parts.modules.items():
        if m.m is not None or m.c is not None:
            what = "has a magnitude or an output bias"
            raise ValueError(refusal(m.name, what, _EXTRACT))
        if m.kind != "linear" or not tensor.endswith(".weight"):
            raise ValueError(refusal(m.name, "is no Linear", "leave it out"))
    most = max(m.rank for m in parts.modules.values())
    if most > RANKS[-1]:
        raise ValueError(
            f"peft.save: portable: rank {most}: expected at most {RANKS[-1]}. Lower: "
            "jlora.truncate(adapter, rank)."
        )
    rank = next(r for r in RANKS if r >= most)
    modules = {t: m.rescaled(1.0).padded(rank) for t, m in parts.modules.items()}
    own = {m.name for m in modules.values()}
    wanted = {n.rpartition(".")[2] for n in own}
    for group in _TOGETHER:
        if wanted & group:
            wanted |= group & {n.rpartition(".")[2] for n in names.modules}
    if not suffixes_of({f"x.{w}" for w in wanted}, _parents(names.modules)):
        return Joined(modules, parts.ranks, parts.filled), sorted(own)
    like = next(iter(modules.values()))
    for tensor, shape in names.tensors.items():
        name = tensor.removesuffix(".weight")
        if tensor in modules or name == tensor or len(shape) != 2:
            continue
        known = names.parts_of(tensor)
        table = any(p.kind == "embed" for p in known)
        if name.rpartition(".")[2] in wanted and not table:
            turned = known and known[0].tensor_axes != "oi"
            out, in_ = shape[::-1] if turned else shape
            a, b = (np.zeros(s, like.a.dtype) for s in ((in_, rank), (rank, out)))
            modules[tensor] = Module(name, tensor, "linear", a, b, 1.0)
    return Joined(modules, parts.ranks, parts.filled), sorted(wanted)


def suffixes_of(own: Set[str], every: Set[str]) -> list[str]:
    """The last keys of these modules, if they are those of no others; else nothing.

    peft adapts every module whose path ends in a target, and a list of layers is a
    module, too: ``layers.0`` ends in ``0``.
    """
    wanted = {name.rpartition(".")[2] for name in own}
    others = (every | _parents(every)) - own
    if any(name.rpartition(".")[2] in wanted for name in others):
        return []
    return sorted(wanted)


def _parents(names: Iterable[str]) -> set[str]:
    """The paths of all modules that hold others."""
    out: set[str] = set()
    for name in names:
        while name := name.rpartition(".")[0]:
            out.add(name)
    return out
