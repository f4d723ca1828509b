"""The weight that a leaf stands for: its magnitude, its gain, and the merged array.

With DoRA (arXiv:2402.09353, eq. 5) a leaf stands for m * V / ‖V‖, where V is
W + scale * a·b.  This is V times a gain for each output, m / ‖V‖.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._algebra import rows
from jlora._algebra.delta import delta, low_rank, scaled
from jlora._explicit import automatic
from jlora._labels import BLOCK, RANK, aligned, dot, order, wider
from jlora._leaf import Bare, Full, LoRA, base, forms
from jlora._leaf.fields import labels


def settled(leaf: Any) -> Any:
    """The leaf as its uses need it.

    It has its gain in the place of its magnitude; and the rows that it replaces as they
    are used, with a scale of one.
    """
    if not isinstance(leaf, LoRA):
        return leaf
    if rows.replaces(leaf):
        return rows.settled(leaf)
    if leaf.m is None:
        return leaf
    norm = lax.stop_gradient(magnitude(leaf))
    scale = lax.stop_gradient(leaf.scale)
    scale = lax.expand_dims(scale, range(scale.ndim, norm.ndim))
    # An output of zeros stays one, whatever its gain is; a scale of zero turns the
    # whole adapter off, and so its magnitude.
    on = (norm > 0) & (scale != 0)
    gain = jnp.where(on, leaf.m / jnp.where(on, norm, 1), 1)
    return dataclasses.replace(leaf, m=None, gain=gain)


def unsettled(leaf: Any, passed: Any = None) -> Any:
    """What was passed to `settled`, from its result; placed as that is.

    If the function has changed the leaf, nothing was passed that is like it: then its
    magnitude comes from the gain.
    """
    if not isinstance(leaf, LoRA):
        return leaf
    if passed is None:
        if leaf.gain is None:
            return leaf
        return dataclasses.replace(leaf, m=leaf.gain * magnitude(leaf), gain=None)
    changed = "b", "scale", "m", "gain"
    if leaf.gain is None and not rows.replaces(leaf):
        return leaf
    return dataclasses.replace(
        leaf, **{name: getattr(passed, name) for name in changed}
    )


def magnitude(leaf: LoRA) -> jax.Array:
    """‖V‖ over the in axes, for V = W + scale * a·b; (*batch, *out).

    It is computed in float32 or wider.  From ‖W‖² + 2⟨W, a·b⟩ + ‖a·b‖², so that no
    array of the weight's size is formed: the second term is (Wᵀa)·b, and the third one
    bᵀ(aᵀa)b.  On the shards of a mesh it is the norm of the whole weight.
    """

    def like() -> Any:
        known = next((x for x in (leaf.m, leaf.gain) if x is not None), None)
        if known is not None:
            return _compat.explicit_sharding(known)
        b, names = jax.typeof(leaf.b).sharding, labels("b", leaf.axes)
        at = dict(zip(names, b.spec, strict=True))
        spec = jax.sharding.PartitionSpec(*map(at.get, labels("m", leaf.axes)))
        return jax.sharding.NamedSharding(b.mesh, spec)

    return automatic(_magnitude, like, leaf)


def _magnitude(leaf: LoRA) -> jax.Array:
    axes = leaf.axes
    ins = [k for k, c in enumerate(axes) if c == "i"]
    own, rest = labels("m", axes), [k for k, c in enumerate(axes) if c != "i"]
    wide = wider(leaf, leaf.a, leaf.b, jax.ShapeDtypeStruct((), jnp.float32))
    if forms.of(leaf.form).formed:
        v = base.plus(base.use(leaf.base, lambda w: w.astype(wide)), delta(leaf))
        return jnp.sqrt(order(jnp.sum(v * v, ins), rest, own))
    leaf = low_rank(leaf)
    (la, lb), keep = (labels("a", axes), labels("b", axes)), {*own}
    a, b = leaf.a.astype(wide), scaled(leaf, "b").astype(wide)

    def ranks(labels: list[int], other: int) -> list[int]:
        return [other if k == RANK else k for k in labels]

    def against_b(x: jax.Array) -> jax.Array:
        return jnp.sum(x * b, lb.index(RANK))

    gram, lg = dot(a, la, a, ranks(la, BLOCK), keep, precision="highest")
    ab, l_ab = dot(gram, lg, b, lb, keep, precision="highest")
    total = against_b(order(ab, l_ab, ranks(lb, BLOCK)))
    if not base.is_zero(leaf.w):

        def powers(w: jax.Array) -> jax.Array:
            return order(squares(w, tuple(ins), wide), rest, own)

        def products(w: jax.Array, a: jax.Array) -> jax.Array:
            # a is rounded to w's dtype, and not w widened, which would be a copy.  The
            # errors of its numbers are independent, and far below one of w's own.
            own = {"precision": "highest", "preferred_element_type": wide}
            aw, lw = dot(a.astype(w.dtype), la, w, [*range(len(axes))], keep, **own)
            return order(aw, lw, lb)

        cross = against_b(base.use(leaf.base, products, a))
        total = base.use(leaf.base, powers) + 2 * cross + total
    # On shards that split in axes, each device has a part of the sum; b is not split.
    split = _compat.varying(total) - _compat.varying(leaf.b)
    total = lax.psum(total, tuple(split)) if split else total
    return jnp.sqrt(jnp.maximum(total, 0))


@functools.partial(jax.jit, static_argnums=(1, 2))
def squares(w: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """The sum of squares over some axes; one kernel, also where nothing else is."""
    return jnp.sum(lax.square(w.astype(dtype)), axes)


def gained(leaf: LoRA, y: Any, yl: Sequence[int]) -> Any:
    """y times the gain of the leaf, if it has one.

    Args:
      leaf: the leaf.
      y: a product with the weight, the weight itself, or what meets its out axes.
      yl: the labels of y.

    Raises:
      NotFactored: y lacks an out axis or a batch axis of the weight.
    """
    if leaf.gain is None:
        return y
    return times(y, yl, leaf.gain, labels("gain", leaf.axes))


def times(y: Any, yl: Sequence[int], gain: jax.Array, gl: Sequence[int]) -> Any:
    """y times a gain with the labels ``gl``, rounded once.

    Only y and the gain are kept for the backward pass, and no wider copy of y.
    """
    gone = [i for i, k in enumerate(gl) if k not in yl]
    if any(gain.shape[i] != 1 for i in gone):
        raise forms.NotFactored
    gain = aligned(lax.squeeze(gain, gone), [k for k in gl if k in yl], yl)
    if y.dtype == gain.dtype:
        return y * gain

    def product(y: jax.Array, gain: jax.Array) -> jax.Array:
        wide = wider(y, gain)
        return (y.astype(wide) * gain.astype(wide)).astype(y.dtype)

    return jax.checkpoint(product, prevent_cse=False)(y, gain)


def dense(leaf: LoRA | Full | Bare) -> jax.Array:
    """The merged weight, computed in float32 (or wider) and rounded once."""
    if isinstance(leaf, Bare):
        return base.array(leaf.w)
    if isinstance(leaf, Full):
        return leaf.value.astype(leaf.dtype)
    leaf = settled(leaf)
    if rows.replaces(leaf):
        return rows.dense(leaf)
    d = delta(leaf)
    wide = wider(leaf, d)
    w = base.plus(base.use(leaf.base, lambda w: w.astype(wide)), d)
    return gained(leaf, w, [*range(leaf.ndim)]).astype(leaf.dtype)
