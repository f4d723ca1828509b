"""The roles of weights by their names, if the names leave no doubt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora._plan.plan import Plan
from jlora._plan.select import Candidate, Wanted, select
from jlora._plan.spec import Spec
from jlora._tree.by_path import arrays, others, sibling_bias

_IDLE = "no dense, einsum or convolution kernel by Flax's names"


def from_names(params: Any, wanted: Wanted) -> Plan:
    """The plan that Flax's naming conventions give."""
    leaves = arrays(params)

    def candidate(path: str, x: Any) -> Candidate:
        # `select` asks only for leaves that may be adapted, so no other leaf raises.
        return _candidate(path, x, leaves, wanted.named(path, x))

    return select(leaves, candidate, _IDLE, others(params), wanted)


def _candidate(path: str, x: Any, leaves: Mapping[str, Any], named: bool) -> Candidate:
    """The spec of a leaf, or None; raises for a kernel whose name leaves doubts."""
    bias = sibling_bias(path, leaves)
    if (told := _told(path, x, None if bias is None else leaves[bias])) is not None:
        return Spec.of(*told, bias=bias)
    name = path.rpartition("/")[2]
    # The name or the user says that this is a weight, so its roles have to be known.
    if (name in ("kernel", "w") and x.ndim > 2) or (named and x.ndim > 1):
        # A matrix that the user names is (in, out); a stack of biases is no matrix.
        if named and x.ndim == 2 and name not in ("bias", "scale"):
            return Spec.of("dense", "io", bias=bias)
        raise ValueError(
            f"{path!r} of shape {tuple(x.shape)}: its roles (which axes are "
            "contracted, which come out, which are a stack of layers) cannot be "
            "told from its name and shape. Let jlora watch it being used: "
            "jlora.wrap(params, plan=jlora.plan(fn, params, *args)); or exclude it."
        )
    return None


def _told(path: str, x: Any, bias: Any) -> tuple[str, str] | None:
    """(kind, roles) by Flax's names; None if the name is not one of these."""
    *_, parent, name = ("", "", *path.split("/"))

    def fits(out: int) -> bool:
        """Whether the bias, if any, has the last ``out`` axes; a stack has more."""
        return bias is None or tuple(bias.shape) == tuple(x.shape[-out:])

    if name == "embedding" and x.ndim == 2:
        return "embed", "io"
    if name in ("kernel", "w") and x.ndim == 2:
        return "dense", "io"
    if name != "kernel":
        return None
    # Flax's attention: (in, heads, size) in three projections, (heads, size, in) in the
    # last one.
    if x.ndim == 3 and parent in ("query", "key", "value") and fits(2):
        return "dense", "ioo"
    if x.ndim == 3 and parent == "out" and fits(1):
        return "dense", "iio"
    # Linen's own names for convolutions; their kernels are (*spatial, in, out).
    if parent.startswith("Conv_") and 3 <= x.ndim <= 5 and fits(1):
        return "conv", "i" * (x.ndim - 1) + "o"
    return None
