"""Where the output bias of an adapter goes: into the bias of its weight's layer.

There it is what merging makes of it, however the layer uses its weight.  Only where a
layer has no bias of its shape do the weight's products add it themselves (`_ops`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._algebra.delta import scaled
from jlora._leaf import Full, LoRA
from jlora._tree import paths


def homes(
    leaves: Mapping[str, Any],
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The adapted weights whose output bias each bias takes, by path; the others, why.

    Args:
      leaves: path to leaf, of a whole tree.
    """
    found: dict[str, list[str]] = {}
    homeless: dict[str, str] = {}
    for path, x in leaves.items():
        if not isinstance(x, LoRA) or x.c is None:
            continue
        bias = None if x.bias_path is None else paths.resolve(x.bias_path, path)
        if bias is None or bias not in leaves:
            at = f" at {bias!r}" if bias else ""
            homeless[path] = f"its layer has no bias{at}: expected one"
        elif (shape := tuple(leaves[bias].shape)) != tuple(x.c.shape):
            homeless[path] = (
                f"its layer's {bias!r} has shape {shape}: expected {tuple(x.c.shape)}"
            )
        else:
            found.setdefault(bias, []).append(path)
    return found, homeless


def plus(x: Any, weights: Sequence[LoRA], sign: int = 1) -> jax.Array:
    """A bias (of a `Full` leaf its value) with the weights' scale * c, rounded once."""
    value = x.value if isinstance(x, Full) else x
    wide = jnp.promote_types(value.dtype, jnp.float32)
    first, *rest = (scaled(w, "c") for w in weights)
    total = sum(rest, first)
    return (value.astype(wide) + sign * total).astype(x.dtype)
