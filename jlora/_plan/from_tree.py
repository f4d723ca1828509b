"""The plan of `wrap` without a plan: what the tree itself tells of its weights.

The class of a layer tells the roles of its weights; else the shape of the bias beside a
weight and the names do.  What they tell is written on the leaf, and the first lifted
trace holds it to the use.
"""

from __future__ import annotations

import warnings
from typing import Any

from jlora._plan import names
from jlora._plan.from_layers import from_layers
from jlora._plan.plan import Plan
from jlora._plan.select import UNTOLD, Candidate, Wanted, select
from jlora._plan.spec import Spec
from jlora._tree.by_path import others, sibling_bias
from jlora._tree.variables import opened

_IDLE = "no dense, einsum or convolution kernel by class, bias or name"
_LEFT = "neither class nor bias nor name tells whether it is a weight"


def from_tree(tree: Any, leaves: dict[str, Any], wanted: Wanted) -> Plan:
    """The plan of the weights whose roles the tree tells.

    Args:
      tree: what the user passed to `wrap`.
      leaves: its arrays by path.
      wanted: what the user asked for.
    """
    layers, rest = from_layers(tree), others(opened(tree))
    shapes = {p: tuple(x.shape) for p, x in leaves.items()}
    biases = {p: sibling_bias(p, leaves) for p in leaves}
    known = names.Names(
        {p: s for p, s in shapes.items() if p not in rest},
        {p: b for p, b in biases.items() if p not in rest},
    )

    def candidate(path: str, x: Any) -> Candidate:
        bias, named = biases[path], wanted.named(path, x)
        if path in layers:
            kind, axes = layers[path]
            return Spec.of(kind, axes.rjust(x.ndim, "b"), bias=bias, told="class")
        found = known.told(path) if path not in rest else None
        # A matrix that the user names is (in, out); a stack of biases is no matrix.
        if found is None and named and x.ndim == 2 and not names.is_vector(path):
            found = "dense", "io"
        if found is not None:
            return Spec.of(*found, bias=bias, told="name or shape")
        # It is said to be a weight, so its roles have to be known.
        stated = named and x.ndim > 1 and not names.is_vector(path)
        if stated or names.is_weight(path, x.ndim):
            return UNTOLD
        matrix = sum(n > 1 for n in x.shape) > 1 and not names.is_vector(path)
        return _LEFT if matrix and not names.is_table(path) else None

    plan = select(leaves, candidate, _IDLE, rest, wanted)
    if left := [path for path, why in plan.skipped.items() if why == _LEFT]:
        some = ", ".join(f"{path!r} {shapes[path]}" for path in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(
            f"wrap: not adapted, since {_LEFT}: {some}{more}. Plan from the function "
            "that uses them, jlora.wrap(params, plan=jlora.plan(fn, params, *args)); "
            "or name all that is to be adapted as targets; or exclude these.",
            stacklevel=3,
        )
    return plan
