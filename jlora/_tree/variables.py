"""Variables, which are mutable: those in a tree of NNX, and those of a Keras model.

Neither is imported here: if the user has not imported it, a tree has no variables.
"""

from __future__ import annotations

import sys
from typing import Any

import jax


def is_variable(x: Any) -> bool:
    """Whether x is one of NNX's mutable variables."""
    nnx = sys.modules.get("flax.nnx")  # without Flax there are no variables
    return nnx is not None and isinstance(x, nnx.Variable)


def variables(tree: Any) -> list[Any]:
    """NNX's variables in a tree, in the order of the tree."""
    if "flax.nnx" not in sys.modules:
        return []
    return list(filter(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)))


def of_adapters(tree: Any) -> bool:
    """Whether the tree has NNX variables that are the factors of a layer."""
    return any(
        isinstance(v, sys.modules["flax.nnx"].LoRAParam) for v in variables(tree)
    )


def refuse_layers(tree: Any, what: str) -> None:
    """Raises ValueError for a module of jlora.nnx layers: its factors are variables."""
    if of_adapters(tree):
        raise ValueError(
            f"{what}: the module has layers with factors of their own (nnx.LoRAParam): "
            "expected a tree of jlora.wrap. Carry them to the plain twin: "
            "jlora.attach(twin, jlora.nnx.adapter(module))."
        )


def is_model(x: Any) -> bool:
    """Whether x is a model or a layer of Keras, which is no tree."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(x, keras.Layer)


def opened(tree: Any) -> Any:
    """The tree; or of a Keras model the values of its trainable variables, by path."""
    if not is_model(tree):
        return tree
    return {v.path: v.value for v in tree.trainable_variables}
