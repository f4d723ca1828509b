"""A product with one slot's factors, out of those of all slots.

Inside of a `jax.vmap` over examples, each with a slot of its own, XLA gathers the
factors of all examples: it reads them, writes them side by side, and reads them again.
Where an example has few tokens that is most of what the low-rank branch costs.  For TPU
there is a kernel that reads each example's factors where they are, and nothing else,
as Punica has it for CUDA (arXiv:2310.18547).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jlora._algebra.use import Params, compute_dtype
from jlora._leaf import LoRA, base

FEW_TOKENS = 16
"""Of each example: with more of them a gather is a small part of the cost."""

MEMORY = 12 * 2**20
"""Bytes of a TPU core's vector memory that the kernel's blocks may take, of 16 MiB."""


class Slot(NamedTuple):
    """The factors of all slots of one weight, and which of them is meant."""

    a: jax.Array
    """(slots, in, r)"""
    b: jax.Array
    """(slots, r, out)"""
    i: jax.Array
    """() the index of the slot, or -1 for none."""


def taken(x: jax.Array, i: jax.Array) -> jax.Array:
    """x[i], i ≥ 0; for a TPU so that it has the least to move.

    There a has its rank before its inputs in memory.  A gather whose result has the
    rank last fills that up to 128, which is ten times the bytes of the slots; this one
    is three.  And where bfloat16 is made of the slot, XLA makes it of the whole bank,
    unless there is a product between them.
    """
    narrow = x.ndim >= 3 and x.shape[-1] < 128

    def on_tpu(x: jax.Array, i: jax.Array) -> jax.Array:
        taken = x.mT[i] if narrow else x[i]
        if x.dtype == jnp.float32:
            taken = taken * (i >= 0).astype(x.dtype)  # one, which XLA does not know
        return taken.mT if narrow else taken

    return lax.platform_dependent(x, i, tpu=on_tpu, default=lambda x, i: x[i])


def readable(
    leaf: LoRA, x: Any, params: Params, weight_first: bool, slot: Slot
) -> bool:
    """Whether `contract` can compute this use of a leaf."""
    if jax.sharding.get_abstract_mesh().manual_axes:  # in a shard_map
        return False
    given = dict(params)
    contracted = given["dimension_numbers"] == (((x.ndim - 1,), (0,)), ((), ()))
    here = leaf.shape == (slot.a.shape[1], slot.b.shape[2])
    extra = leaf.form, leaf.c, leaf.m, leaf.gain, leaf.dropout
    return (
        contracted
        and here
        and given["precision"] is None
        and compute_dtype(x, leaf) != jnp.float64
        and x.size > 0
        and not weight_first
        and leaf.axes == "io"
        and all(field is None for field in extra)
        and x.size // x.shape[-1] <= FEW_TOKENS
    )


def contract(leaf: LoRA, x: jax.Array, params: Params, slot: Slot) -> jax.Array:
    """x·w + scale · (x·a[i])·b[i], for a use that is `readable`.

    Args:
      leaf: the weight, with the scale of its slot.
      x: (*tokens, in)
      params: the primitive's parameters.
      slot: where its factors are.
    """
    rest = dict(params)
    numbers = rest.pop("dimension_numbers")

    def own(w: Any, x: Any) -> Any:
        return lax.dot_general(x, w, numbers, **rest)

    y = base.use(leaf.base, own, x)
    dtype = compute_dtype(x, leaf)
    scale = lax.stop_gradient(leaf.scale)
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    d = slot_product(rows, slot.a, slot.b, slot.i) * scale
    d = jnp.where(slot.i >= 0, d, 0)  # of another slot's numbers, else
    return base.plus(y, d.reshape(*x.shape[:-1], -1).astype(y.dtype))


@jax.custom_jvp
def slot_product(x: jax.Array, a: jax.Array, b: jax.Array, i: jax.Array) -> jax.Array:
    """(x·a[i])·b[i] (tokens, out) in float32; its derivatives are those of a gather.

    Args:
      x: (tokens, in)
      a: (slots, in, r)
      b: (slots, r, out)
      i: () the slot; with -1 the result is of no use.
    """
    return _in_batch(x, a, b, i)


@slot_product.defjvp
def _derivative(primals: Any, tangents: Any) -> Any:
    return jax.jvp(_gathered, primals, tangents)


def _gathered(x: jax.Array, a: jax.Array, b: jax.Array, i: jax.Array) -> jax.Array:
    at = jnp.maximum(i, 0)
    # Without a slot zeros: what is in the first one may be no number.
    a, b = (jnp.where(i >= 0, taken(f, at), 0).astype(x.dtype) for f in (a, b))
    return jnp.matmul(x @ a, b, preferred_element_type=jnp.float32)


@custom_vmap
def _in_batch(x: jax.Array, a: jax.Array, b: jax.Array, i: jax.Array) -> jax.Array:
    return _gathered(x, a, b, i)


@_in_batch.def_vmap
def _examples(size: int, batched: Any, *args: jax.Array) -> tuple[jax.Array, bool]:
    axes = [0 if own else None for own in batched]
    gathered = jax.vmap(_gathered, axes, axis_size=size)
    if list(batched) != [True, False, False, True] or not _fits(*args[:3]):
        return gathered(*args), True
    return lax.platform_dependent(*args, tpu=read, default=gathered), True


def _fits(x: jax.Array, a: jax.Array, b: jax.Array) -> bool:
    """Whether the kernel takes this: rank 1 it cannot, and its memory is small."""
    (_, tokens, n), (_, rank, out) = x.shape, b.shape
    block = x.itemsize * tokens * n + a.itemsize * rank * (n + out) + 4 * tokens * out
    return rank > 1 and 2 * block <= MEMORY  # two: the next one comes in meanwhile


def read(
    x: jax.Array, a: jax.Array, b: jax.Array, i: jax.Array, interpret: bool = False
) -> jax.Array:
    """`slot_product` of all examples, in which each reads its own slot of the bank.

    Args:
      x: (examples, tokens, in)
      a: (slots, in, r)
      b: (slots, r, out)
      i: (examples,) the slots; the pipeline fetches the next while one is multiplied.
      interpret: run it without a TPU.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    a = a.mT  # as a TPU has it in memory, so nothing moves
    (examples, tokens, n), (_, rank, out) = x.shape, b.shape

    def kernel(_: Any, x: Any, a: Any, b: Any, y: Any) -> None:
        f32 = jnp.float32
        own = a[0].astype(x.dtype), b[0].astype(x.dtype)
        numbers = ((1,), (1,)), ((), ())
        h = lax.dot_general(x[0], own[0], numbers, preferred_element_type=f32)
        y[0] = jnp.dot(h.astype(x.dtype), own[1], preferred_element_type=f32)

    def example(k: Any, slots: Any) -> Any:
        return k, 0, 0

    def slot(k: Any, slots: Any) -> Any:
        return slots[k], 0, 0

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(examples,),
        in_specs=[
            pl.BlockSpec((1, tokens, n), example),
            pl.BlockSpec((1, rank, n), slot),
            pl.BlockSpec((1, rank, out), slot),
        ],
        out_specs=pl.BlockSpec((1, tokens, out), example),
    )
    factors = rank * (n + out)
    moved = x.itemsize * tokens * n + a.itemsize * factors + 4 * tokens * out
    cost = pl.CostEstimate(2 * examples * tokens * factors, 0, examples * moved)
    shape = jax.ShapeDtypeStruct((examples, tokens, out), jnp.float32)
    call = pl.pallas_call(
        kernel, grid_spec=grid, out_shape=shape, cost_estimate=cost, interpret=interpret
    )
    return call(jnp.maximum(i, 0), x, a, b)
