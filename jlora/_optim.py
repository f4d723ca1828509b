"""What optax needs: adapters train, the base is frozen."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora._adapter import adapter
from jlora._leaf import is_adapted
from jlora._leaf.fields import trained
from jlora._pairs import is_fixed
from jlora._tree import boxes, by_path, paths
from jlora._tree.variables import variables


def optimizer(
    tx: optax.GradientTransformation,
    tree: Any,
    *,
    full: optax.GradientTransformation | None = None,
    b_lr_ratio: float | None = None,
) -> optax.GradientTransformation:
    """``tx`` for what trains, and zero updates for what is frozen.

    The state covers the adapters alone.  It is the state of ``optax.multi_transform``
    over a flat dict, from path to the fields that train there.

    Put wrappers such as clipping and ``optax.MultiSteps`` inside ``tx``, so that they
    see the adapters only.  Outside of it ``nnx.Optimizer`` fails in the second step, as
    it does without this function: NNX makes its own dicts of the adapted leaves that an
    optimizer's state holds.  Donate the train state: otherwise every step copies the
    whole base, since it is an output of the step as well.

    Extra arguments of an update that are trees like the gradients, and functions of the
    params, are passed on: ``tx`` may be ``optax.lbfgs()``, whose update takes value,
    grad and value_fn.

    Args:
      tx: the transformation for a, b and c.  If ``full`` is None, it is for `Full`
        values as well, and a clipped global norm is the norm of both together.
      tree: the adapted tree; only its structure and dtypes are read.  With NNX, a
        wrapped module or its state, for ``nnx.Optimizer(model, tx, wrt=nnx.Param)``.
      full: another transformation for `Full` values.
      b_lr_ratio: the learning rate of b, c and m, divided by that of a: LoRA+
        (arXiv:2402.12354), which takes 16.  Their updates are multiplied by it after
        ``tx``, and so is the weight decay in ``tx``.

    Raises:
      TypeError: ``tx`` is no transformation of optax, or the ratio no number.
      ValueError: a tree without adapted leaves, or one with leaves that are not
        floating-point, which ``jax.grad`` refuses.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> state = jlora.optimizer(optax.adamw(1e-4), t).init(t)
    """
    _check_transformation(tx)
    times = _ratios(b_lr_ratio)
    advice = ""
    if variables(tree):
        advice = (
            "NNX: a wrapped module is optimised wrt=nnx.Param; one of jlora.nnx layers "
            "by plain optax, wrt=nnx.LoRAParam."
        )
    by_path.require_adapted(tree, "optimizer", advice)
    if not advice:  # in NNX, `wrt` selects the variables that are optimised
        _require_floating(tree)

    def label(params: dict[str, dict[str, Any]]) -> dict[str, str]:
        whole = "lora" if full is None else "full"
        return {path: whole if "value" in x else "lora" for path, x in params.items()}

    each = {"lora": tx} if full is None else {"lora": tx, "full": full}
    inner = optax.partition(each, label, mask_compatible_extra_args=True)

    def init(params: Any) -> Any:
        by_path.require_adapted(params, "optimizer", advice)
        adapter(params)  # raises if two leaves have one path
        _require_floating(params)
        return inner.init(_flat(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if not (own := _flat(grads)):
            raise ValueError(_no_gradients(grads))
        values = None if params is None else _flat(params)
        given = {name: _given(x, grads, params) for name, x in extra.items()}
        updates, state = inner.update(own, state, values, **given)
        factors = times | ({"a": 0} if is_fixed(state) else {})

        def leaf(path: str, x: Any) -> Any:
            zeros = jax.tree.map(jnp.zeros_like, x)
            if not is_adapted(x):
                return zeros
            new = {name: boxes.held(y) for name, y in updates[path].items()}
            new |= {
                k: (new[k] * by).astype(new[k].dtype)
                for k, by in factors.items()
                if k in new and "a" in new  # rows that are replaced have no a
            }
            return dataclasses.replace(zeros, **new)

        return by_path.map_leaves(leaf, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def _flat(tree: Any) -> dict[str, dict[str, Any]]:
    """What trains, as a flat dict by path.

    So the state keeps nothing of the base, and the paths are the same after NNX has
    taken its variables off.  Linen's boxes stay, since they name the mesh axes of the
    moments.
    """
    return {
        paths.path_of(keys): {name: getattr(x, name) for name in trained(x)}
        for keys, x in boxes.adapted(tree)
    }


def _ratios(ratio: Any) -> dict[str, Any]:
    """By which number the update of each field is multiplied."""
    if ratio is None:
        return {}
    traced = isinstance(ratio, jax.Array) and ratio.ndim == 0
    number = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool)
    if not traced and not (number and 0 < ratio < math.inf):
        raise TypeError(
            f"optimizer: b_lr_ratio {ratio!r}: expected a positive number, such as 16: "
            "the learning rate of b over that of a."
        )
    return dict.fromkeys(("b", "c", "m"), ratio)


def _check_transformation(tx: Any) -> None:
    if not hasattr(tx, "init"):
        found = "the tree" if by_path.has_adapted(tx) else f"a {type(tx).__name__}"
        raise TypeError(
            "optimizer: expected an optax transformation, then the adapted tree: "
            f"jlora.optimizer(optax.adamw(1e-4), tree), found {found} first."
        )


def _no_gradients(grads: Any) -> str:
    return (
        "optimizer: expected gradients of the adapted tree, as jax.grad gives them, "
        f"found a {type(grads).__name__} without adapted leaves. What the state keeps "
        "(optax.value_and_grad_from_state) covers the adapters alone: to train by it, "
        "use optax's own optimizer on the trainable half of jlora.partition(tree)."
    )


def _given(x: Any, grads: Any, params: Any) -> Any:
    """An extra argument of a transformation, as the one inside expects it.

    A tree like that of the gradients becomes flat, as they do.  A function of the
    params, such as ``value_fn``, is called with flat ones, and gets the tree.
    """
    like: Any = jax.tree.structure(grads)
    if not callable(x):
        return _flat(x) if jax.tree.structure(x) == like else x
    if params is None:
        return x
    known = _flat(params).keys()

    @functools.wraps(x)  # some transformations read the names of its arguments
    def call(values: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(values, dict) or values.keys() != known:
            return x(values, *args, **kwargs)
        others = {p: v for p, v in values.items() if isinstance(v, optax.MaskedNode)}

        def leaf(path: str, y: Any) -> Any:
            if not is_adapted(y) or path in others:
                return y
            new = {name: boxes.held(v) for name, v in values[path].items()}
            return dataclasses.replace(y, **new)

        def out(y: Any) -> Any:
            if jax.tree.structure(y) == like:
                return _flat(y) | others
            return tuple(map(out, y)) if type(y) is tuple else y

        return out(x(by_path.map_leaves(leaf, params), *args, **kwargs))

    return call


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
