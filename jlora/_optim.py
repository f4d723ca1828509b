"""What optax needs: adapters train, the base is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora._adapter import adapter
from jlora._leaf import is_adapted
from jlora._leaf.fields import trained
from jlora._tree import boxes, by_path, paths
from jlora._tree.variables import variables


def optimizer(
    tx: optax.GradientTransformation,
    tree: Any,
    *,
    full: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """``tx`` for what trains, and zero updates for what is frozen.

    The state covers the adapters alone.  It is the state of ``optax.multi_transform``
    over a flat dict, from path to the fields that train there.

    Put wrappers such as clipping and ``optax.MultiSteps`` inside ``tx``, so that they
    see the adapters only.  Donate the train state: otherwise every step copies the
    whole base, since it is an output of the step as well.

    Args:
      tx: the transformation for a, b and c.  If ``full`` is None, it is for `Full`
        values as well, and a clipped global norm is the norm of both together.
      tree: the adapted tree; only its structure and dtypes are read.  With NNX, a
        wrapped module or its state, for ``nnx.Optimizer(model, tx, wrt=nnx.Param)``.
      full: another transformation for `Full` values.

    Raises:
      ValueError: a tree without adapted leaves, or one with leaves that are not
        floating-point, which ``jax.grad`` refuses.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> state = jlora.optimizer(optax.adamw(1e-4), t).init(t)
    """
    advice = ""
    if variables(tree):
        advice = (
            "NNX: a wrapped module is optimised wrt=nnx.Param; one of jlora.nnx layers "
            "by plain optax, wrt=nnx.LoRAParam."
        )
    by_path.require_adapted(tree, "optimizer", advice)
    if not advice:  # in NNX, `wrt` selects the variables that are optimised
        _require_floating(tree)

    # What trains, as a flat dict by path.  So the state keeps nothing of the base, and
    # the paths are the same after NNX has taken its variables off.  Linen's boxes stay,
    # since they name the mesh axes of the moments.
    def flat(tree: Any) -> dict[str, dict[str, Any]]:
        return {
            paths.path_of(keys): {name: getattr(x, name) for name in trained(x)}
            for keys, x in boxes.adapted(tree)
        }

    def label(params: dict[str, dict[str, Any]]) -> dict[str, str]:
        whole = "lora" if full is None else "full"
        return {path: whole if "value" in x else "lora" for path, x in params.items()}

    each = {"lora": tx} if full is None else {"lora": tx, "full": full}
    inner = optax.multi_transform(each, label)

    def init(params: Any) -> Any:
        by_path.require_adapted(params, "optimizer", advice)
        adapter(params)  # raises if two leaves have one path
        _require_floating(params)
        return inner.init(flat(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        values = None if params is None else flat(params)
        updates, state = inner.update(flat(grads), state, values, **extra)

        def leaf(path: str, x: Any) -> Any:
            zeros = jax.tree.map(jnp.zeros_like, x)
            if not is_adapted(x):
                return zeros
            new = {name: boxes.held(y) for name, y in updates[path].items()}
            return dataclasses.replace(zeros, **new)

        return by_path.map_leaves(leaf, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def _require_floating(tree: Any) -> None:
    for path, x in by_path.flatten(tree)[0]:
        for y in jax.tree.leaves(x):
            # A module of Equinox also has leaves that are no arrays, and do not train.
            if hasattr(y, "dtype") and not jnp.issubdtype(y.dtype, jnp.floating):
                advice = "Call jlora.dropout inside the loss." if is_adapted(x) else ""
                raise ValueError(
                    f"optimizer: {path!r} holds {y.dtype}: expected floating-point "
                    "leaves only, since jax.grad differentiates the whole tree of a "
                    "TrainState. Train the half that jlora.partition(tree) gives. "
                    f"{advice}".rstrip()
                )
