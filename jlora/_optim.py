"""What optax needs: adapters train, the base is frozen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora import _paths
from jlora._leaf import is_adapted
from jlora._tree import _require_adapted, labels


def optimizer(
    tx: optax.GradientTransformation,
    tree: Any,
    *,
    full: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """optax.multi_transform: ``tx`` for what trains, zero updates for what is frozen.

    Put wrappers such as clipping and ``optax.MultiSteps`` inside ``tx``, so that they
    see the adapters only.  Donate the train state: without, the whole base is copied
    once a step, since it comes out of the step as well.

    Args:
      tx: for a and b, and for `Full` values where ``full`` is None (one transformation
        over both, so that a clipped global norm is theirs together).
      tree: the adapted tree; only its structure is read.
      full: another transformation for `Full` values.

    Raises:
      ValueError: a tree without adapted leaves, or one with leaves that are not
        floating-point, which ``jax.grad`` refuses.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> state = jlora.optimizer(optax.adamw(1e-4), t).init(t)
    """
    _require_adapted(tree, "optimizer")
    for path, x in _paths.flatten(tree)[0]:
        for y in jax.tree.leaves(x):
            if not jnp.issubdtype(y.dtype, jnp.floating):
                raise ValueError(
                    f"optimizer: {path!r} holds {y.dtype}: expected floating-point "
                    "leaves only, since jax.grad differentiates the whole tree of a "
                    "TrainState. Train the half that jlora.partition(tree) gives."
                    + (
                        " (Call jlora.dropout inside the loss.)"
                        if is_adapted(x)
                        else ""
                    )
                )
    kinds = {"frozen": optax.set_to_zero(), "lora": tx, "full": full or tx}
    names = labels(tree)
    if full is None:
        names = jax.tree.map(lambda n: "lora" if n == "full" else n, names)
        del kinds["full"]
    return optax.multi_transform(kinds, names)
