"""Convolution of an activation with a weight as its kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra.delta import delta, low_rank, scaled
from jlora._algebra.structure import with_units
from jlora._algebra.use import (
    Params,
    RolesError,
    branch,
    compute_dtype,
    drop,
    finished,
    inlined,
    with_output_bias,
)
from jlora._algebra.weight import dense, gained
from jlora._labels import GROUP, IN, OUT, RANK, dot, order
from jlora._leaf import LoRA, base, forms
from jlora._leaf.fields import labels
from jlora._leaf.forms import NotFactored

# run(x, kernel): the convolution, with the primitive's other parameters bound.
Run = Callable[[Any, Any], Any]


@functools.partial(inlined, static_argnames=("params", "nth"))
def conv(
    leaf: LoRA, x: jax.Array, params: Params, *, aside: jax.Array, nth: int = 0
) -> jax.Array:
    """conv_general_dilated of x with the weight as its kernel.

    x is convolved with a, which gives r features, with the same strides, padding and
    dilations.  b maps these to the outputs as a 1x1 convolution.  With groups, all
    groups of inputs share a, and each uses its own columns of b.  This is the low-rank
    form of the kernel array itself.  If the kernel is used from its outputs to its
    inputs, as in a gradient, b comes first.

    Args:
      leaf: the kernel.
      x: the activation.
      params: the primitive's parameters.
      aside: x for the low-rank branch; see `Evaluation.first_product`.
      nth: the number of earlier uses of the kernel, for the dropout.

    Raises:
      RolesError: the convolved axes are not all in axes, or the outputs are not an out
        axis; or the form is for another number of groups.
      NotFactored: a batch-grouped convolution (the gradient of a grouped one), or a
        grouped one from the kernel's outputs to its inputs.
    """
    rest = dict(params)
    if rest["batch_group_count"] != 1:
        raise NotFactored
    groups, wanted = rest["feature_group_count"], forms.of(leaf.form).groups
    if wanted not in (None, groups):
        raise RolesError(
            f"convolves in {groups} groups with a leaf of {leaf.form}: expected "
            f"groups={groups} in its form"
        )
    run: Run = functools.partial(cast(Any, lax.conv_general_dilated), **rest)
    if forms.of(leaf.form).formed:
        return _formed(leaf, x, aside, nth, run, rest["dimension_numbers"])
    numbers = rest["dimension_numbers"]
    leaf, transposed = _oriented(low_rank(leaf), numbers)
    if transposed:
        if groups != 1:
            raise NotFactored
        xl = _features(numbers.lhs_spec, numbers.rhs_spec[1])
        x, aside = gained(leaf, x, xl), gained(leaf, aside, xl)
    dtype = compute_dtype(x, leaf)
    y = base.use(leaf.base, lambda w, x: run(x, w), x)
    x = drop(leaf, aside, nth).astype(dtype)
    rest = branch(leaf, rest)
    run = functools.partial(cast(Any, lax.conv_general_dilated), **rest)
    low_rank_run = _from_outputs if transposed else _from_inputs
    y = base.plus(y, low_rank_run(leaf, x, run, rest, y.shape))
    if transposed:
        return y
    return finished(leaf, y, _features(numbers.out_spec, numbers.rhs_spec[0]))


def _features(spec: Sequence[int], axis: int) -> list[int]:
    """The labels of an image whose features meet this axis of the kernel.

    The other axes get labels that no kernel has.
    """
    return [axis if k == spec[1] else len(spec) + k for k in range(len(spec))]


def _formed(
    leaf: LoRA, x: jax.Array, aside: jax.Array, nth: int, run: Run, spec: Any
) -> jax.Array:
    """The convolution for a form without a low-rank use: one, with the merged kernel.

    With dropout there are two, since base and delta then read different activations.
    """
    dtype = compute_dtype(x, leaf)
    if leaf.dropout is None and leaf.gain is None:
        y = run(x, dense(leaf))
    else:
        y = base.use(leaf.base, lambda w, x: run(x, w), x)
        x = drop(leaf, aside, nth).astype(dtype)
        y = base.plus(y, run(x, delta(leaf).astype(dtype)))
    if leaf.gain is None and leaf.c is not None:
        leaf = dataclasses.replace(leaf, gain=jnp.ones_like(leaf.c))
    return finished(leaf, y, _features(spec.out_spec, spec.rhs_spec[0]))


def _oriented(leaf: LoRA, spec: Any) -> tuple[LoRA, bool]:
    """The kernel with roles that fit this use, and whether it is used from its outputs.

    Raises:
      RolesError: no roles fit.
    """
    out_axis, in_axis, *_ = spec.rhs_spec
    forward, backward = (
        "".join("o" if k == at else "i" for k in range(leaf.ndim))
        for at in (out_axis, in_axis)
    )
    for wanted in (forward, backward):
        if (found := with_units(leaf, wanted)).axes == wanted:
            return found, wanted != forward
    raise RolesError(
        f"convolves axes {tuple(k for k, c in enumerate(forward) if c == 'i')} of "
        f"a weight of shape {leaf.shape} and roles {leaf.axes!r}: "
        f"expected {forward!r}, or {backward!r} from its outputs to its inputs"
    )


def _kernel(leaf: LoRA, dtype: Any) -> tuple[jax.Array, int]:
    """a as a kernel whose output axis is the rank, and the position of that axis."""
    at = leaf.axes.index("o")
    axes = [RANK if k == at else k for k in range(leaf.ndim)]
    return order(leaf.a.astype(dtype), labels("a", leaf.axes), axes), at


# The parameters of a convolution that its product with b takes, too.
_PRODUCT = "precision", "preferred_element_type"


def _from_outputs(leaf: LoRA, x: jax.Array, run: Run, rest: Any, shape: Any) -> Any:
    """b first: a product from the features of x to the rank, then the convolution."""
    a, _ = _kernel(leaf, x.dtype)
    b = scaled(leaf, "b").astype(x.dtype)
    free = list(range(x.ndim))
    k = free.pop(rest["dimension_numbers"].lhs_spec[1])
    xl = [*free[:k], IN, *free[k:]]
    products = {name: rest[name] for name in _PRODUCT}
    h, hl = dot(x, xl, b, [RANK, IN], {*free}, **products)
    h = order(h, hl, [*free[:k], RANK, *free[k:]])
    return run(h.astype(x.dtype), a)


def _from_inputs(leaf: LoRA, x: jax.Array, run: Run, rest: Any, shape: Any) -> Any:
    """a first: a convolution to r features per group, then each group's part of b."""
    groups = rest["feature_group_count"]
    a, at = _kernel(leaf, x.dtype)
    b = scaled(leaf, "b").astype(x.dtype)
    free = list(range(x.ndim))
    k = free.pop(rest["dimension_numbers"].out_spec[1])
    h = run(x, jnp.concatenate([a] * groups, axis=at)).astype(x.dtype)
    h = forms.of(leaf.form).entered(h)
    h = lax.reshape(h, (*h.shape[:k], groups, leaf.rank, *h.shape[k + 1 :]))
    hl = [*free[:k], GROUP, RANK, *free[k:]]
    h, b = with_output_bias(leaf, h, hl, b, [RANK, at])
    b = b.reshape(b.shape[0], groups, -1)
    products = {name: rest[name] for name in _PRODUCT}
    d, dl = dot(h, hl, b, [RANK, GROUP, OUT], {*free, GROUP}, **products)
    d = order(d, dl, [*free[:k], GROUP, OUT, *free[k:]])
    return lax.reshape(d, shape)
