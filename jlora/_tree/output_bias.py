"""The output bias of an adapter is added to the bias of its weight's layer.

This gives the same result as merging, whatever the layer does with its weight.  If the
layer has no bias of the right shape, the weight's products add it instead (`_algebra`).
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
    """Finds the bias to which each adapted weight's output bias is added.

    Args:
      leaves: all leaves of a tree, by path.

    Returns:
      The paths of the weights for each bias, by the path of the bias.  For each weight
      without such a bias the reason, by the path of the weight.
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
    """A bias plus or minus the weights' scale * c, rounded once.

    The bias of a `Full` leaf is its value.
    """
    value = x.value if isinstance(x, Full) else x
    wide = jnp.promote_types(value.dtype, jnp.float32)
    first, *rest = (scaled(w, "c", to=value) for w in weights)
    total = sum(rest, first)
    return (value.astype(wide) + sign * total).astype(x.dtype)
