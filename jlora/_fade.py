"""3L: fade the base away while the adapters train, until only they are left.

A faded layer computes d·(x·W + bias) + x·noise + s·(x·a)·b + s·c.  The factor d goes
from one to zero by a schedule; noise keeps the statistics of the weight meanwhile; the
output bias c makes up for what fades.  At zero the base is dropped, and the model is
its factors.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _algebra, _init, _paths
from jlora._leaf import LoRA, is_adapted, missing


def fade(
    tree: Any,
    factor: Any,
    *,
    noise: Any = None,
    per: str = "tensor",
    key: jax.Array | None = None,
) -> Any:
    """The tree with every adapted base scaled by ``factor``, and noise in its place.

    Call it inside the loss, with the tree as it is and the factor of the step; the base
    itself stays as it was (to fade a faded tree multiplies the factors).  To evaluate
    on the way, fade without noise.  A checkpoint holds no factor: save the step, and
    fade what was restored.

    The faded weight is W' = d·W + noise, where the noise is drawn anew from
    N((1 - d)·m, (1 - d²)·δ²) for W's mean m and standard deviation δ, so that W' has
    them too.  The bias of the layer is scaled without noise; one that trains whole
    (`Full`) is left to training.

    Args:
      tree: an adapted tree.
      factor: d, a number or a traced scalar in [0, 1] (a traced one is not verified);
        1 changes nothing.
      noise: what the noise is multiplied by, a number or a traced scalar: 1 for the
        distribution above, 0 or None for none.
      per: "tensor" for one m and δ a weight (each layer or expert of a stack has its
        own), "output" for those of each output.
      key: a PRNG key for the noise; each leaf's is folded from its path.  In a loop
        over layers, or on each shard of a mesh, give each a key of its own.

    Returns:
      The faded tree: `unwrap` gives the faded weights, in their own dtype.  With noise
      the leaves keep m and δ: called once with factor 1 before training, it leaves the
      weights as they are and saves each step from computing them again.

    Raises:
      ValueError: no adapted leaf, or one without its base; a factor outside [0, 1];
        negative noise, or noise without a key; another ``per``.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> float(jlora.unwrap(jlora.fade(t, 0.25))["kernel"].mean())
      0.25
    """
    _paths.require_adapted(tree, "fade")
    d, amount = _number("factor", factor, 1.0), None
    if noise is not None:
        amount = _number("noise", noise, math.inf)
    if per not in ("tensor", "output"):
        raise ValueError(f"fade: per={per!r}: expected 'tensor' or 'output'.")
    still = isinstance(d, float) and d == 1
    silent = amount is None or (isinstance(amount, float) and amount == 0)
    if not silent and key is None:
        raise ValueError(
            "fade: noise without a key: expected a PRNG key of its own for each step, "
            "such as jax.random.fold_in(key, step)."
        )
    own = None if key is None else _init.typed(key)
    biases = set()
    for path, x in _paths.flatten(tree)[0]:
        if not isinstance(x, LoRA):
            continue
        if x.dropped is not None:
            raise ValueError(
                f"fade: the base of {path!r} was dropped: expected the tree that still "
                "has its bases. Without them there is nothing to fade: leave the call "
                "out."
            )
        if missing(x) or isinstance(x.w, jax.ShapeDtypeStruct):
            what = ", ".join(f"{name}=None" for name in missing(x)) or "only shapes"
            raise ValueError(
                f"fade: {path!r} has {what}: expected the whole adapted tree, as "
                "jlora.wrap or jlora.combine gives it (in jax.eval_shape for shapes); "
                "of jlora.linen layers jlora.attach({'params': variables['params']}, "
                "jlora.linen.adapter(variables)) gives that of the plain twin."
            )
        if x.bias is not None:
            biases.add(_paths.resolve(x.bias, path))

    def leaf(path: str, x: Any) -> Any:
        if not isinstance(x, LoRA):
            return _scaled(x, d) if path in biases and not is_adapted(x) else x
        if silent:
            return x if still else dataclasses.replace(x, w=_scaled(x.w, d))
        x = _measured(x, per)
        if still:
            return x
        assert own is not None
        return dataclasses.replace(
            x, w=_noisy(x, d, amount, _init.path_key(own, f"{path}:noise"))
        )

    return _paths.map_leaves(leaf, tree, share=True)


def _number(name: str, x: Any, most: float) -> Any:
    """A Python number in [0, most] as a float; a traced scalar as it is."""
    if isinstance(x, jax.core.Tracer):
        if x.shape:
            raise ValueError(f"fade: {name} of shape {x.shape}: expected a scalar.")
        return x
    if callable(x) or x is None or isinstance(x, str):
        raise TypeError(
            f"fade: {name} is a {type(x).__name__}: expected a number, such as what a "
            "schedule gives for the step: schedule(step)."
        )
    if jnp.shape(x) or not 0 <= float(x) <= most or math.isinf(float(x)):
        range_ = "[0, 1]" if most == 1 else "[0, ∞)"
        raise ValueError(f"fade: {name} {x!r}: expected a number in {range_}.")
    return float(x)


def _scaled(w: jax.Array, d: Any) -> jax.Array:
    """d·w, computed in float32 (or wider) and rounded once."""
    wide = jnp.promote_types(w.dtype, jnp.float32)
    return (w.astype(wide) * d).astype(w.dtype)


def _measured(x: LoRA, per: str) -> LoRA:
    """The leaf with the mean and standard deviation of its base, if it lacks them."""
    *_, batch = _algebra.labels_of(x.axes)
    kept = _algebra.bias_labels(x.axes) if per == "output" else batch
    shape = tuple(x.shape[k] for k in kept)
    if x.mean is not None and x.mean.shape == shape:
        return x
    rest = tuple(k for k in range(x.ndim) if k not in kept)
    w = lax.stop_gradient(x.w).astype(jnp.promote_types(x.dtype, jnp.float32))
    left = [k for k in range(x.ndim) if k in kept]
    mean, std = (
        _algebra.order(f(w, axis=rest), left, kept) for f in (jnp.mean, jnp.std)
    )
    return dataclasses.replace(x, mean=mean, std=std)


def _noisy(x: LoRA, d: Any, amount: Any, key: jax.Array) -> jax.Array:
    """d·w + amount·noise; nothing is drawn where that would be zero."""
    each = x.mean.ndim > x.scale.ndim  # of the outputs
    labels = _algebra.bias_labels(x.axes) if each else _algebra.labels_of(x.axes)[2]

    def spread(y: jax.Array) -> jax.Array:
        return _algebra.spread(y, labels, x.shape, range(x.ndim))

    def drawn() -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        z = jax.random.normal(key, x.shape, wide)
        std = amount * jnp.sqrt(1 - jnp.square(jnp.asarray(d, wide)))
        noise = z * spread(std * x.std) + spread(amount * (1 - d) * x.mean)
        return (x.w.astype(wide) * d + noise).astype(x.dtype)

    if isinstance(d, float) and isinstance(amount, float):
        return drawn()
    return lax.cond((amount > 0) & (d < 1), drawn, lambda: _scaled(x.w, d))


def drop_base(tree: Any, *, force: bool = False) -> Any:
    """The tree without the bases that have faded: the model is its factors.

    `lift` then computes s·(x·a)·b + s·c alone, which is what the faded tree gives.
    `count`, checkpoints and memory have the smaller model; what trained whole (`Full`)
    goes without its base as well.  `merge` still gives plain params, of full size.

    Args:
      tree: an adapted tree whose adapted bases, and their layers' biases, are zero, as
        ``fade(tree, factor(step))`` gives it for the last step of a schedule.  (With
        ``fade(tree, 0.0)`` they are zero after any step: nothing then tells that
        training stopped halfway.)
      force: drop bases that are not zero, and set those biases to zero, which changes
        what the model computes.

    Raises:
      ValueError: no adapted leaf; a base that is not zero, or whose values are not
        known (in a traced function), without ``force``.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.count(jlora.drop_base(jlora.fade(t, 0.0)))
      (14, 14)
    """
    _paths.require_adapted(tree, "drop_base")
    leaves = dict(_paths.flatten(tree)[0])
    biases = set()
    for path, x in leaves.items():
        if not is_adapted(x) or x.dropped is not None:
            continue
        if lacks := missing(x):
            raise ValueError(
                f"drop_base: {path!r} has {lacks[0]}=None: expected the whole tree."
            )
        if not isinstance(x, LoRA):
            continue
        if not force:
            _require_faded(path, x.w)
        if x.bias is None or is_adapted(leaves.get(at := _paths.resolve(x.bias, path))):
            continue
        if at in leaves:
            biases.add(at)
            if not force:
                _require_faded(at, leaves[at])

    def leaf(path: str, x: Any) -> Any:
        if path in biases:
            return jnp.zeros_like(x)
        if not is_adapted(x) or x.dropped is not None:
            return x
        if isinstance(x, LoRA):
            x = dataclasses.replace(x, mean=None, std=None)
        return dataclasses.replace(x, w=None, dropped=x.w.dtype)

    return _paths.map_leaves(leaf, tree)


def _require_faded(path: str, w: Any) -> None:
    advice = (
        "Fade it first, by the last step of the schedule: "
        "jlora.drop_base(jlora.fade(tree, factor(step))); or pass force=True"
    )
    if isinstance(w, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        raise ValueError(
            f"drop_base: the values of {path!r} are not known here: expected concrete "
            f"arrays, so that a base that has not faded is not lost. {advice}."
        )
    largest = float(jnp.max(jnp.abs(w), initial=0))
    if largest != 0:  # also where it is NaN
        raise ValueError(
            f"drop_base: the base of {path!r} has not faded: expected zeros, found "
            f"values up to {largest:.3g}. {advice}, which changes the model."
        )
