"""A quantised array as a base: dequantised anew in each use, and never kept.

The class of the array is qwix's `QArray`, or any other that has what it has: low-bit
numbers of the array's shape, and a scale for each block of them.  So qwix need not be
imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._explicit import automatic
from jlora._labels import RANK
from jlora._leaf import base
from jlora._leaf.node import register

# The values of NormalFloat4 (arXiv:2305.14314, appendix E), as qwix and bitsandbytes
# have them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


class Quantized(base.Base):
    """What stands for a quantised array wherever a base is asked for.

    It is made for a moment and is in no tree: the array itself is.

    Attributes:
      array: an object with ``qvalue`` (low-bit numbers of the array's shape), ``scale``
        (as many axes; each has the array's size, or the number of its blocks),
        ``zero_point`` (None, or as the scale) and ``qtype`` (static).
    """

    def __init__(self, array: Any):
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the low-bit numbers, which is the array's."""
        return tuple(codes_of(self.array).shape)

    @property
    def dtype(self) -> Any:
        """The scale's dtype, which the dequantised array has."""
        return self.array.scale.dtype

    lossy = True
    shards = True
    whole = True

    def row(self, step: Any) -> Any:
        """Taken in each use."""
        return Row(self.array, (step,))

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """fn(array, *operands), with the array made in the forward and backward pass.

        The checkpoint keeps the quantised array for the backward pass, instead of the
        dequantised one.  The barrier ties it to the operands that it meets.  Without it
        XLA for CPU makes the arrays of all layers ahead of time.
        """

        def call(array: Any, *operands: Any) -> Any:
            array, operands = lax.optimization_barrier((array, operands))
            return fn(dequantized(array, operands), *operands)

        return jax.checkpoint(call)(self.array, *operands)

    @property
    def node(self) -> Any:
        """The array."""
        return self.array

    def cut(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The fields, cut; in each use, if the cut goes along an axis with blocks."""
        shape = self.shape
        whole = tuple(range(len(shape)))
        new = jax.eval_shape(
            lambda w, *xs: fn(w, whole, *xs), base.struct(self), *operands
        ).shape
        blocked = {
            k
            for field in jax.tree.leaves(self.array)
            for k in whole
            if field.shape[k] not in (1, shape[k])
        }
        if any(new[k] != shape[k] for k in blocked):
            return super().cut(fn, *operands)

        def one(field: Any) -> Any:
            axes = [k if field.shape[k] == shape[k] else RANK for k in whole]
            return fn(field, axes, *operands)

        return jax.tree.map(one, self.array)

    def fieldwise(self, fn: Callable[..., Any]) -> Any:
        """Every field by itself."""
        whole = tuple(range(len(self.shape)))
        return jax.tree.map(lambda field: fn(field, whole), self.array)

    def gather(self, fn: base.Gathering, indices: Any) -> Any:
        """The fields' own rows; so no other row is dequantised."""
        rest = dict(fn.params)
        dn, sizes, shape = rest["dimension_numbers"], rest["slice_sizes"], self.shape
        part = [size != n for size, n in zip(sizes, shape, strict=True)]
        batched, fill = dn.operand_batching_dims, rest["fill_value"]
        fields = jax.tree.leaves(self.array)
        if (
            any(p and size != 1 for p, size in zip(part, sizes, strict=True))
            or any(x.shape[k] != shape[k] for x in fields for k in batched)
            or not (fill is None or fill == 0 or math.isnan(fill))
        ):
            return super().gather(fn, indices)

        def one(field: Any) -> Any:
            tiles = [shape[k] // field.shape[k] for k in dn.start_index_map]
            own = indices // jnp.asarray(tiles, indices.dtype)
            size = [1 if p else n for p, n in zip(part, field.shape, strict=True)]
            params = rest | {"slice_sizes": tuple(size)}
            if (
                not jnp.issubdtype(field.dtype, jnp.floating)
                or field.dtype.itemsize < 2
            ):
                # Where the scale is filled with NaN, any number will do.
                params |= {"mode": "clip", "fill_value": None}
            return lax.gather(field, own, **params)

        return jax.tree.map(one, self.array)

    def placed(self, sharding: Any, fn: Callable[..., Any]) -> Any:
        """Every field under the sharding that follows from the array's."""
        if not isinstance(sharding, NamedSharding):
            return jax.tree.map(lambda field: fn(field, sharding), self.array)

        def one(field: Any, spec: PartitionSpec) -> Any:
            return fn(field, sharding.update(spec=spec))

        return jax.tree.map(one, self.array, self.specs([*sharding.spec]))

    def carrier(self) -> Any:
        """The low-bit numbers."""
        return codes_of(self.array)

    def specs(self, spec: Sequence[Any]) -> Any:
        """The scales are sharded with their blocks; an axis of size one is whole."""

        def own(field: Any) -> PartitionSpec:
            names = [*spec, *(None,) * (field.ndim - len(spec))]
            sizes = zip(names, field.shape, self.shape, strict=True)
            return PartitionSpec(
                *(None if m == 1 < n else name for name, m, n in sizes)
            )

        return jax.tree.map(own, self.array)

    def fingerprint(self) -> dict[str, Any]:
        """Which quantisation it is: the type of its numbers, the shape of scales."""
        said = {"qtype": qtype_of(self.array), "scale": [*self.array.scale.shape]}
        zero = getattr(self.array, "zero_point", None) is not None
        return said | ({"zero_point": True} if zero else {})

    def remark(self) -> str:
        """The type of its numbers, and the size of a block."""
        numbers, scales = self.shape, self.array.scale.shape
        tiles = [n // m for n, m in zip(numbers, scales, strict=True)]
        return f"{qtype_of(self.array)} in blocks of {int(np.prod(tiles))}"


@functools.partial(register, data=["array", "steps"])
@dataclasses.dataclass(frozen=True)
class Row(base.Base):
    """One layer of a quantised stack in a scan, taken in each use.

    If the scan itself slices the stack, XLA for CPU widens all its numbers to bytes or
    to float16 ahead of the loop, since it slices no narrower ones.

    Attributes:
      array: the stack.
      steps: which layer: an index for each scan around it, from the outermost in.
    """

    array: Any
    steps: tuple[Any, ...]

    whole = True

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the stack, without the axes of the scans."""
        return tuple(codes_of(self.array).shape[len(self.steps) :])

    @property
    def dtype(self) -> Any:
        """The scale's dtype."""
        return self.array.scale.dtype

    def row(self, step: Any) -> Any:
        """Of a scan inside the scan."""
        return Row(self.array, (*self.steps, step))

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """As `Quantized.use`, with the layer taken behind the barrier."""

        def call(array: Any, steps: Any, *operands: Any) -> Any:
            held = lax.optimization_barrier((array, steps, operands))
            array, steps, operands = held
            return fn(dequantized(_row(array, steps), operands), *operands)

        return jax.checkpoint(call)(self.array, self.steps, *operands)

    @property
    def _taken(self) -> Quantized:
        """The layer, taken now."""
        return Quantized(_row(self.array, self.steps))

    def cut(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The layer's."""
        return self._taken.cut(fn, *operands)

    def fieldwise(self, fn: Callable[..., Any]) -> Any:
        """The layer's."""
        return self._taken.fieldwise(fn)

    def gather(self, fn: base.Gathering, indices: Any) -> Any:
        """The layer's."""
        return self._taken.gather(fn, indices)

    def placed(self, sharding: Any, fn: Callable[..., Any]) -> Any:
        """The layer's."""
        return self._taken.placed(sharding, fn)

    def specs(self, spec: Sequence[Any]) -> Any:
        """Those of the stack, whose first axes are whole."""
        stack = Quantized(self.array).specs([*[None] * len(self.steps), *spec])
        return Row(stack, (PartitionSpec(),) * len(self.steps))


def _row(array: Any, steps: Sequence[Any]) -> Any:
    def one(field: Any) -> Any:
        for step in steps:
            at = 0 if field.shape[0] == 1 else step
            field = lax.dynamic_index_in_dim(field, at, keepdims=False)
        return field

    return jax.tree.map(one, array)


def codes_of(array: Any) -> Any:
    """The low-bit numbers of a quantised array, as its tree has them."""
    codes = vars(array).get("codes")  # qvalue is a view of them: see `_qwix`
    return array.qvalue if codes is None else codes


def qtype_of(array: Any) -> str:
    """The name of a quantised array's qtype, such as "int8" or "nf4"."""
    qtype = getattr(array, "qtype", None)
    if isinstance(qtype, str):
        return qtype
    return str(jnp.dtype(codes_of(array).dtype if qtype is None else qtype))


def dequantized(array: Any, operands: Any = ()) -> jax.Array:
    """(numbers - zero point) * scale, each scale for all numbers of its block.

    Args:
      array: the quantised array.
      operands: what the array meets.  Where that is wider, as float32 activations are
        than a bfloat16 weight, XLA would leave the rounding to bfloat16 out, and a
        weight in use have other numbers than one that is merged.
    """
    array = jax.tree.map(lax.stop_gradient, array)
    floats = [
        x for x in jax.tree.leaves(operands) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    hold = array.scale.dtype == jnp.bfloat16 and any(
        x.dtype.itemsize > 2 for x in floats
    )

    def like() -> Any:
        return jax.typeof(codes_of(array)).sharding

    return automatic(functools.partial(_dequantized, hold), like, array)


def _dequantized(hold: bool, array: Any) -> jax.Array:
    numbers, scale = codes_of(array), array.scale
    if qtype_of(array) == "nf4":
        numbers = _nf4(numbers)
    elif numbers.dtype == jnp.int4:
        # The maximum is each number itself.  A bare conversion is a product of its own
        # to XLA for GPU, which takes every second row for zeros where a thread reads
        # less than four bytes, as of a weight of 512 numbers (seen in JAX 0.11.2).
        numbers = jnp.maximum(numbers.astype(jnp.int8), -8)

    def rounded(x: jax.Array) -> jax.Array:
        return _held(x) if hold else x.astype(array.scale.dtype)

    numbers = rounded(numbers)
    zero = getattr(array, "zero_point", None)
    blocks = [scale] if zero is None else [scale, zero]
    shape: list[int] = []
    views: list[list[int]] = [[] for _ in blocks]
    for k, n in enumerate(numbers.shape):
        m = max(x.shape[k] for x in blocks)
        split = 1 < m < n
        shape += [m, n // m] if split else [n]
        for view, x in zip(views, blocks, strict=True):
            view += [x.shape[k], 1] if split else [x.shape[k]]
    wide = numbers.reshape(shape)
    scale, *zeros = (x.reshape(view) for x, view in zip(blocks, views, strict=True))
    for x in zeros:
        wide = rounded(wide - x.astype(wide.dtype))
    return rounded(wide * scale).astype(scale.dtype).reshape(numbers.shape)


def _held(x: jax.Array) -> jax.Array:
    """x as bfloat16 has it, in float32."""
    return lax.reduce_precision(x.astype(jnp.float32), 8, 7)  # exponent, mantissa


def _nf4(codes: jax.Array) -> jax.Array:
    """The values of 4-bit codes, in float32.

    A pair of values by a multiple of the lowest bit, then selects by the other bits.  A
    table of values would be a lookup to XLA, which it does not fuse into the product
    that reads the array.  Selects of constants JAX would broadcast outside of a scan.
    """
    codes = codes.astype(jnp.int32)
    odd = (codes & 1).astype(jnp.float32)
    values = [
        low + odd * (high - low)  # exact: so are these differences
        for low, high in zip(NF4[::2], NF4[1::2], strict=True)
    ]
    for bit in (2, 4, 8):
        on = (codes & bit) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(on, high, low) for low, high in pairs]
    return values[0]


def _known(cls: type) -> Callable[[Any], base.Base] | None:
    """`Quantized`, for a class that has what qwix's QArray has."""
    if not dataclasses.is_dataclass(cls):
        return None
    names = {field.name for field in dataclasses.fields(cls)}
    return Quantized if {"qvalue", "scale", "qtype"} <= names else None


base.foreign(_known)
