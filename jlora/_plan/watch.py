"""Watches how a function uses its weights, in its jaxpr: nothing is computed.

Loops, branches and calls are followed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jlora import _compat
from jlora._plan import uses as uses  # importing it registers its steps
from jlora._plan.seen import DATA, Seen, Weight
from jlora._plan.walk import Walk, step


@step("scan")
def _scan(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    # Operands: n constants, m of the carry, then what is sliced along its first axis.
    n, m = _compat.scan_counts(eqn.params)
    jaxpr, _ = _compat.jaxpr_and_consts(eqn.params["jaxpr"])
    sliced = [
        i.move(lambda axes: axes[1:]) if isinstance(i, Weight) else i
        for i in infos[n + m :]
    ]
    ins, outs = jaxpr.invars[n : n + m], jaxpr.outvars[:m]
    same = _unchanged(ins, outs, infos[n : n + m])
    found = walk.run(jaxpr, [*infos[:n], *same, *sliced])
    return [*same, *(DATA if i is not None else None for i in found[m:])]


@step("while")
def _while(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    p = eqn.params
    # Operands: n constants of the condition, m of the body, then the carry.
    n, m = p["cond_nconsts"], p["body_nconsts"]
    jaxpr, _ = _compat.jaxpr_and_consts(p["body_jaxpr"])
    same = _unchanged(jaxpr.invars[m:], jaxpr.outvars, infos[n + m :])
    walk.run(p["cond_jaxpr"], [*infos[:n], *same])
    walk.run(jaxpr, [*infos[n : n + m], *same])
    return same


@step("cond")
def _cond(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    # The first operand is the branch index.  A branch decides what is known only if all
    # agree.
    outs = [walk.run(branch, infos[1:]) for branch in eqn.params["branches"]]
    return [
        found[0] if all(i == found[0] for i in found) else DATA
        for found in zip(*outs, strict=True)
    ]


@step(*_compat.JIT, *_compat.REMAT, *_compat.CALL, "shard_map")
def _call(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    return walk.follow(eqn, infos)


def _unchanged(ins: Any, outs: Any, infos: list[Any]) -> list[Any]:
    """The infos of a loop's carry: kept for what its body returns unchanged."""
    return [
        info if i is o else DATA for i, o, info in zip(ins, outs, infos, strict=True)
    ]


def watch(jaxpr: Any, paths: Sequence[str | None]) -> dict[str, Seen]:
    """What was seen of each path: the paths are those of the jaxpr's first inputs.

    An input whose path is None is data, and so are all others.
    """
    walk = Walk()
    infos: list[Any] = []
    invars = _compat.jaxpr_and_consts(jaxpr)[0].invars
    for path, v in itertools.zip_longest(paths, invars):
        axes = tuple(frozenset({k}) for k in range(v.aval.ndim))
        infos.append(DATA if path is None else Weight(((path, axes),)))
    walk.run(jaxpr, infos)
    return walk.seen
