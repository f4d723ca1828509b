"""For training loops: the half that trains, labels, the scale, and dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._algebra.rows import replaces
from jlora._init.keys import path_key, typed
from jlora._leaf import Dropout, LoRA, is_adapted
from jlora._leaf.fields import trained
from jlora._tree import by_path
from jlora._tree.trace import hide, is_array, show


def partition(tree: Any) -> tuple[Any, Any]:
    """(trainable, frozen): each has the tree's structure, and None for the other half.

    a, b, c, m and `Full` values are trainable; all else is frozen.  Differentiate with
    respect to the trainable half, and `combine` the halves inside the loss.  Then
    the base is an input of the training step, but no output.  What is no array among
    arrays, as the functions and flags of a module of Equinox, is part of the structure
    of the frozen half.  So both are arguments that ``jax.jit`` takes.

    Raises:
      ValueError: the tree has no adapted leaf.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> [x.shape for x in jax.tree.leaves(jlora.partition(t)[0])]
      [(3, 2), (2, 4)]
    """
    found = labels(tree)
    by_path.require_adapted(tree, "partition")

    def half(frozen: bool) -> Any:
        return jax.tree.map(
            lambda x, label: x if (label == "frozen") is frozen else None, tree, found
        )

    # A tree of shardings or of labels has no arrays, and stays as it is.
    rest = half(True)
    return half(False), hide(rest) if any(
        map(is_array, jax.tree.leaves(tree))
    ) else rest


def combine(trainable: Any, frozen: Any) -> Any:
    """The whole tree from the halves of `partition`.

    Raises:
      ValueError: the halves are of different trees.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.combine(*jlora.partition(t))["kernel"].w is t["kernel"].w
      True
    """
    try:
        return jax.tree.map(
            lambda x, y: show(y) if x is None else x,
            trainable,
            frozen,
            is_leaf=lambda x: x is None,
        )
    except ValueError as e:
        raise ValueError(
            f"combine: expected the two halves of one jlora.partition, found {e}"
        ) from None


def labels(tree: Any, by: str = "kind") -> Any:
    """The tree with a label for each array: "lora", "full" or "frozen".

    a, b, c and m have the label "lora", `Full` values "full", and all else "frozen".
    By field, they have the labels "a", "b", "c" and "m" instead.

    Args:
      tree: an adapted tree.
      by: "kind" or "field".

    Raises:
      ValueError: ``by`` is neither.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> (x := jlora.labels(t)["kernel"]).w, x.a, x.scale
      ('frozen', 'lora', 'frozen')
    """
    if by not in ("kind", "field"):
        raise ValueError(f"labels: by={by!r}: expected 'kind' or 'field'.")

    def leaf(_: str, x: Any) -> Any:
        all_frozen = jax.tree.map(lambda _: "frozen", x)
        if not is_adapted(x):
            return all_frozen
        label = "lora" if isinstance(x, LoRA) else "full"
        own = dict.fromkeys(trained(x), label)
        if by == "field" and isinstance(x, LoRA):
            own = {name: name for name in own}
        return dataclasses.replace(all_frozen, **own)

    return by_path.map_leaves(leaf, tree)


def scaled(tree: Any, s: Any) -> Any:
    """The tree with every adapter's scale multiplied by s; 0 turns adapters off.

    The scale is data, so a jitted function is not recompiled.  `Full` leaves do not
    change.  An adapter can be scaled, too.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> float(jlora.scaled(t, 0.5)["kernel"].scale)
      0.5
    """
    by_path.require_adapted(tree, "scaled")
    if isinstance(s, (str, Mapping)):
        raise ValueError(f"scaled: {s!r}: expected a number.")

    def leaf(path: str, x: Any) -> Any:
        if not isinstance(x, LoRA):
            return x
        new = x.scale * s
        if new.shape != x.scale.shape or jnp.iscomplexobj(new):
            raise ValueError(
                f"scaled: {path!r} has a scale of shape {x.scale.shape}: expected a "
                f"real number, or one for each member of the stack, found {s!r}."
            )
        return dataclasses.replace(x, scale=new.astype(x.scale.dtype))

    return by_path.map_leaves(leaf, tree, share=True)


def dropout(tree: Any, rate: float, key: jax.Array) -> Any:
    """The tree with dropout on the activation that enters each low-rank branch.

    Call it inside the loss, with a new key each step; `lift` then computes
    x·w + (drop(x)·a)·b.  Masks are independent per leaf, per use and per scan step.
    A lookup has no activation, so it has no dropout; rows that are replaced have no
    low-rank branch.

    Args:
      tree: an adapted tree.
      rate: the probability of a zero, a Python float in [0, 1); 0 for none.
      key: a PRNG key; each leaf's path is folded into it.

    Raises:
      ValueError: a rate outside [0, 1), or one that is traced; no adapted leaf.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.dropout(t, 0.1, jax.random.key(0))["kernel"].dropout.rate
      0.1
    """
    if isinstance(rate, jax.core.Tracer) or not 0 <= rate < 1:
        raise ValueError(
            f"dropout: rate {rate!r}: expected a Python number in [0, 1), since it is "
            "part of the compiled function."
        )
    by_path.require_adapted(tree, "dropout")
    key = typed(key)

    def leaf(path: str, x: Any) -> Any:
        if not isinstance(x, LoRA) or replaces(x):
            return x
        if rate == 0:
            return dataclasses.replace(x, dropout=None)
        own = path_key(key, path)
        # A stack has a key for each layer, so that slices of it have one, too.
        keys = jax.random.split(own, x.scale.shape) if x.scale.shape else own
        return dataclasses.replace(x, dropout=Dropout(keys, float(rate)))

    return by_path.map_leaves(leaf, tree, share=True)
