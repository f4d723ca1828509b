"""3L: fade the base away while the adapters train, until only they are left.

A faded layer computes d·(x·W + bias) + x·noise + s·(x·a)·b + s·c.  A schedule takes
the factor d from one to zero.  On the way, noise keeps the mean and deviation of the
weight.  The output bias c makes up for what fades.  At zero the base is dropped, and
the model consists of its factors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra.rows import replaces
from jlora._init.keys import path_key, typed
from jlora._leaf import LoRA, base, is_adapted
from jlora._leaf.bank import refuse_bank
from jlora._leaf.fields import missing
from jlora._leaf.node import register
from jlora._tree import by_path, paths


@functools.partial(register, data=["array", "mean", "std"])
@dataclasses.dataclass(frozen=True)
class Measured(base.Base):
    """A base array with its statistics, so that no step computes them again.

    Attributes:
      array: the base array itself.
      mean: the mean, in float32 or wider; the axes that it is taken over have size 1.
      std: the standard deviation, likewise.
    """

    array: Any
    mean: Any
    std: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        return self.array.dtype

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """fn of the array, which need not be made."""
        return fn(self.array, *operands)

    def then(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """A plain array: the statistics are not those of the result."""
        return fn(self.array, *operands)

    def plain(self) -> Any:
        """The array."""
        return self.array


def fade(
    tree: Any,
    factor: Any,
    *,
    noise: Any = None,
    per: str = "tensor",
    key: jax.Array | None = None,
) -> Any:
    """The tree with every adapted base scaled by ``factor``, and noise added.

    Call it inside the loss, on the tree that has not faded, with the factor of the
    step.  It does not change that tree.  If a faded tree is faded again, the factors
    multiply.  To evaluate during training, fade without noise.  A checkpoint holds no
    factor: save the step, and fade the restored tree.

    The faded weight is W' = d·W + noise.  Each call draws the noise anew from
    N((1 - d)·m, (1 - d²)·δ²) for W's mean m and standard deviation δ, so W' has the
    same mean and deviation.  The bias of the layer is scaled without noise; a bias that
    trains whole (`Full`) is not scaled.

    Args:
      tree: an adapted tree.
      factor: d, a number or a traced scalar in [0, 1] (a traced one is not verified);
        1 changes nothing.
      noise: a multiplier of the noise, a number or a traced scalar: 1 for the
        distribution above, 0 or None for no noise.
      per: "tensor" for one m and δ for each weight (for each layer or expert of a
        stack), "output" for one m and δ for each output.
      key: a PRNG key for the noise; each leaf's path is folded into it.  In a loop over
        layers, or on the shards of a mesh, pass a different key for each.

    Returns:
      The faded tree; `unwrap` gives the faded weights, in their own dtype.  Called
      once with factor 1 and noise, before training, it does not change the weights, but
      keeps m and δ beside them, so that no step computes them again.

    Raises:
      ValueError: no adapted leaf, or one without its base; a factor outside [0, 1];
        negative noise, or noise without a key; another ``per``.
      TypeError: a factor or noise that is no number, such as the schedule itself.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> float(jlora.unwrap(jlora.fade(t, 0.25))["kernel"].mean())
      0.25
    """
    by_path.require_adapted(tree, "fade")
    d, amount = _number("factor", factor, 1.0), None
    if noise is not None:
        amount = _number("noise", noise, math.inf)
    if per not in ("tensor", "output"):
        raise ValueError(f"fade: per={per!r}: expected 'tensor' or 'output'.")
    # Known without running: the base does not fade, or there is no noise.
    still = isinstance(d, float) and d == 1
    silent = amount is None or (isinstance(amount, float) and amount == 0)
    if not silent and key is None:
        raise ValueError(
            "fade: noise without a key: expected a PRNG key of its own for each step, "
            "such as jax.random.fold_in(key, step)."
        )
    own = None if key is None else typed(key)
    biases = set()
    for path, x in by_path.flatten(tree)[0]:
        if not _fades(x):
            continue
        if base.is_zero(x.w):
            raise ValueError(
                f"fade: the base of {path!r} was dropped: expected the tree that still "
                "has its bases. Without them there is nothing to fade: leave the call "
                "out."
            )
        if missing(x) or base.is_abstract(x.w):
            refuse_bank(tree, "fade")
            what = ", ".join(f"{name}=None" for name in missing(x)) or "only shapes"
            raise ValueError(
                f"fade: {path!r} has {what}: expected the whole adapted tree, as "
                "jlora.wrap or jlora.combine gives it (in jax.eval_shape for shapes); "
                "of jlora.linen layers jlora.attach({'params': variables['params']}, "
                "jlora.linen.adapter(variables)) gives that of the plain twin."
            )
        if x.bias_path is not None:
            biases.add(paths.resolve(x.bias_path, path))

    def leaf(path: str, x: Any) -> Any:
        if not _fades(x):
            return _scaled(x, d) if path in biases and not is_adapted(x) else x
        if silent:
            w = x.base if still else base.then(x.base, _scaled, d)
        elif still:
            w = _measured(x, per)
        else:
            assert own is not None
            w = _noisy(_measured(x, per), d, amount, path_key(own, f"{path}:noise"))
        return dataclasses.replace(x, w=w)

    return by_path.map_leaves(leaf, tree, share=True)


def _fades(x: Any) -> bool:
    """Whether the base of a leaf fades; where rows are replaced, the others stay."""
    return isinstance(x, LoRA) and not replaces(x)


def _number(name: str, x: Any, most: float) -> Any:
    """A concrete number in [0, most] as a float; a traced scalar as it is."""
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


def _measured(x: LoRA, per: str) -> Measured:
    """The base with its mean and standard deviation, computed unless it has them."""
    w = x.base
    kept = {
        k for k, c in enumerate(x.axes) if c == "b" or (per == "output" and c == "o")
    }
    shape = tuple(n if k in kept else 1 for k, n in enumerate(x.shape))
    if isinstance(w, Measured) and w.mean.shape == shape:
        return w
    w = base.array(base.plain(w))
    rest = tuple(k for k in range(x.ndim) if k not in kept)
    wide = lax.stop_gradient(w).astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, std = (jnp.expand_dims(f(wide, axis=rest), rest) for f in (jnp.mean, jnp.std))
    return Measured(w, mean, std)


def _noisy(x: Measured, d: Any, amount: Any, key: jax.Array) -> jax.Array:
    """d·w + amount·noise; no noise is drawn if it would be zero."""

    def drawn() -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        z = jax.random.normal(key, x.shape, wide)
        std = amount * jnp.sqrt(1 - jnp.square(jnp.asarray(d, wide)))
        noise = z * (std * x.std) + amount * (1 - d) * x.mean
        return (x.array.astype(wide) * d + noise).astype(x.dtype)

    # `fade` does not come here with the numbers d = 1 or amount = 0.
    if isinstance(d, float) and isinstance(amount, float):
        return drawn()
    return lax.cond((amount > 0) & (d < 1), drawn, lambda: _scaled(x.array, d))


def drop_base(tree: Any, *, force: bool = False) -> Any:
    """The tree without the bases that have faded: only the adapters are left.

    `lift` then computes s·(x·a)·b + s·c alone, the same as for the faded tree.  For
    `count`, checkpoints and memory the model is smaller; `Full` leaves lose their bases
    as well.  `merge` still gives plain params of full size.

    Args:
      tree: an adapted tree whose adapted bases, and their layers' biases, are zero, as
        ``fade(tree, factor(step))`` gives it for the last step of a schedule.
        ``fade(tree, 0.0)`` makes them zero after any step, so it hides that training
        stopped halfway.
      force: whether to drop bases that are not zero, and to set those biases to zero.
        This changes what the model computes.

    Raises:
      ValueError: no adapted leaf; a base that is not zero, or whose values are not
        known (in a traced function), without ``force``.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.count(jlora.drop_base(jlora.fade(t, 0.0)))
      (14, 14)
    """
    by_path.require_adapted(tree, "drop_base")
    leaves = dict(by_path.flatten(tree)[0])
    biases = set()
    for path, x in leaves.items():
        if not is_adapted(x) or base.is_zero(x.w) or replaces(x):
            continue
        if lacks := missing(x):
            refuse_bank(tree, "drop_base")
            raise ValueError(
                f"drop_base: {path!r} has {lacks[0]}=None: expected the whole tree."
            )
        if not isinstance(x, LoRA):
            continue
        if not force:
            _require_faded(path, base.plain(x.w))
        if x.bias_path is None:
            continue
        at = paths.resolve(x.bias_path, path)
        if is_adapted(leaves.get(at)):  # a bias that trains does not fade
            continue
        if at in leaves:
            biases.add(at)
            if not force:
                _require_faded(at, leaves[at])

    def leaf(path: str, x: Any) -> Any:
        if path in biases:
            return jnp.zeros_like(x)
        if not is_adapted(x) or base.is_zero(x.w) or replaces(x):
            return x
        return dataclasses.replace(x, w=base.Dropped(x.shape, x.dtype))

    return by_path.map_leaves(leaf, tree)


def _require_faded(path: str, w: Any) -> None:
    advice = (
        "Fade it first, by the last step of the schedule: "
        "jlora.drop_base(jlora.fade(tree, factor(step))); or pass force=True"
    )
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(w))
    if traced or base.is_abstract(w):
        raise ValueError(
            f"drop_base: the values of {path!r} are not known here: expected concrete "
            f"arrays, so that a base that has not faded is not lost. {advice}."
        )
    largest = float(jnp.max(jnp.abs(base.array(w)), initial=0))
    if largest != 0:  # true of NaN, too
        raise ValueError(
            f"drop_base: the base of {path!r} has not faded: expected zeros, found "
            f"values up to {largest:.3g}. {advice}, which changes the model."
        )
