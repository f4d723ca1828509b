"""What ``w`` of an adapted leaf can be, and the one way to use it.

An array; the shape of one; a `Dropped` base; or another `Base`, such as a quantised
array: an object that is a pytree and makes the array for each use.  All code reads a
base by its ``shape`` and ``dtype``, and by the functions here:

* `use` computes fn(array, *operands);
* `then` is the base that a function of the array makes, such as its transpose.

A new kind of base is one file: a subclass of `Base` that defines ``shape``, ``dtype``
and ``use``.  None stands for no base: in an adapter, or in half of a partition.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class Base(abc.ABC):
    """What stands in for a base array.  A subclass is a registered pytree.

    Attributes:
      shape: of the array, as the model sees it.
      dtype: of the array, as the model sees it.
      slices: static; whether slicing every field along a leading axis slices the array,
        as `jax.lax.scan` slices a stack of layers.
      zero: static; whether the array is zero, and has no fields at all.
    """

    slices = True
    zero = False

    shape: Any
    dtype: Any

    @abc.abstractmethod
    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """fn(array, *operands), with the array made for this use alone.

        ``fn`` closes over no traced value, so that this may be a function with a
        derivative of its own.
        """

    def then(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The base whose array is fn(array, *operands); by default made when used."""
        return Pending((self,), tuple(map(jnp.asarray, operands)), fn)

    def specs(self, spec: Sequence[Any]) -> Any:
        """This base with a PartitionSpec for each field, where its array has ``spec``.

        By default a field is sharded along those of its axes that have the array's
        size, if it has as many axes; else it is whole on every device.
        """

        def own(field: Any) -> PartitionSpec:
            if field.ndim != len(self.shape):
                return PartitionSpec()
            names = [*spec, *(None,) * (field.ndim - len(spec))]
            pairs = zip(names, field.shape, self.shape, strict=True)
            return PartitionSpec(*(name if n == m else None for name, n, m in pairs))

        return jax.tree.map(own, self)

    @property
    def ndim(self) -> int:
        """Number of axes of the array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of parameters that the base has."""
        return math.prod(self.shape)

    def plain(self) -> Any:
        """What stands in the tree once the adapter is taken off."""
        return self

    def kept(self) -> Any:
        """What an adapter keeps of it, to know later what its base was."""
        return None

    def of_shape(self, shape: tuple[int, ...]) -> Any:
        """This base, where its leaf's factors say that this is the shape by now."""
        return self

    def document(self) -> dict[str, Any]:
        """What a checkpoint says of it beside shape and dtype, as JSON."""
        return {}

    def remark(self) -> str:
        """What a table says of it beside shape and dtype."""
        return ""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["shape", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class Dropped(Base):
    """A base that was given up on purpose, and counts as zero; see `jlora.drop_base`.

    It has no arrays.  Of a stack that was sliced the leaf's factors tell the shape.

    Attributes:
      shape: static; the shape that the base had.
      dtype: static; the dtype that it had, which the model still sees.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.zeros((3, 4))}, rank=2)
      >>> jlora.drop_base(t)["kernel"].w
      Dropped(shape=(3, 4), dtype=dtype('float32'))
    """

    shape: tuple[int, ...]
    dtype: Any
    zero = True

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """Only the shape and dtype of what is zero; `plus` adds to it."""
        return jax.eval_shape(fn, struct(self), *operands)

    def then(self, fn: Callable[..., Any], *operands: Any) -> Dropped:
        """Zero, too."""
        made = self.use(fn, *operands)
        return Dropped(made.shape, made.dtype)

    @property
    def size(self) -> int:
        """It has no parameters."""
        return 0

    def plain(self) -> jax.ShapeDtypeStruct:
        """What `attach` and `restore` need to know of it."""
        return struct(self)

    def kept(self) -> Dropped:
        """Itself: an adapter without a base is all there is."""
        return self

    def of_shape(self, shape: tuple[int, ...]) -> Dropped:
        """The factors know of slices of a stack, and this does not."""
        return dataclasses.replace(self, shape=shape)

    def document(self) -> dict[str, Any]:
        """The dtype, which nothing else in a checkpoint's plan says."""
        return {"dropped": str(self.dtype)}

    def remark(self) -> str:
        """For `summary`."""
        return "base dropped"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bases", "operands"],
    meta_fields=["fn"],
)
@dataclasses.dataclass(frozen=True)
class Pending(Base):
    """fn(*arrays, *operands) of other bases, computed anew in each use.

    Attributes:
      bases: what the arrays come from.
      operands: arrays that the function takes besides.
      fn: static; it closes over no traced value.
    """

    bases: tuple[Any, ...]
    operands: tuple[Any, ...]
    fn: Callable[..., Any]
    slices = False

    @functools.cached_property
    def _struct(self) -> Any:
        bases = map(struct, self.bases)
        return jax.eval_shape(self.fn, *bases, *self.operands)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what the function gives."""
        return tuple(self._struct.shape)

    @property
    def dtype(self) -> Any:
        """Of what the function gives."""
        return self._struct.dtype

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The first base makes its array inside of the second's use, and so on."""
        n = len(self.bases) + len(self.operands)

        def call(*args: Any) -> Any:
            return fn(self.fn(*args[:n]), *args[n:])

        return _use_all(self.bases, call, *self.operands, *operands)


def _use_all(bases: Sequence[Any], fn: Callable[..., Any], *operands: Any) -> Any:
    """fn(*arrays, *operands), with the arrays of all bases made for it."""
    first, *rest = bases
    if not rest:
        return use(first, fn, *operands)
    n = len(rest)

    def inner(w: Any, *args: Any) -> Any:
        def last(*xs: Any) -> Any:
            return fn(xs[n], *xs[:n], *xs[n + 1 :])

        return _use_all(args[:n], last, w, *args[n:])

    return use(first, inner, *rest, *operands)


def is_base(x: Any) -> bool:
    """Whether x stands in for an array, and is one node of a tree as an array is."""
    return isinstance(x, Base)


def use(w: Any, fn: Callable[..., Any], *operands: Any) -> Any:
    """fn(array, *operands); of a base that is zero only the result's shape and dtype.

    Args:
      w: a base.
      fn: linear in the array wherever the base may be zero; with a `Base` it closes
        over no traced value.
      *operands: what else it takes.
    """
    return w.use(fn, *operands) if is_base(w) else fn(w, *operands)


def then(w: Any, fn: Callable[..., Any], *operands: Any) -> Any:
    """The base whose array is fn(array, *operands), with `fn` as in `use`."""
    return w.then(fn, *operands) if is_base(w) else fn(w, *operands)


def joined(bases: Sequence[Any], fn: Callable[..., Any]) -> Any:
    """The base whose array is fn(*arrays) of several bases."""
    if all(map(is_zero, bases)):
        made = jax.eval_shape(fn, *map(struct, bases))
        return Dropped(made.shape, made.dtype)
    some = tuple(jnp.zeros(w.shape, w.dtype) if is_zero(w) else w for w in bases)
    return Pending(some, (), fn) if any(map(is_base, some)) else fn(*some)


def plus(y: Any, h: jax.Array) -> jax.Array:
    """What `use` gave, plus h in its dtype."""
    chex.assert_equal(tuple(y.shape), tuple(h.shape))
    h = h.astype(y.dtype)
    return h if isinstance(y, jax.ShapeDtypeStruct) else y + h


def array(w: Any) -> Any:
    """The array itself; zeros for one that is zero."""
    if not is_base(w):
        return w
    return jnp.zeros(w.shape, w.dtype) if w.zero else w.use(lambda w: w)


def struct(w: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a base's array."""
    return jax.ShapeDtypeStruct(tuple(w.shape), w.dtype)


def abstract(w: Any) -> Any:
    """The base with the shape and dtype of each of its arrays in its place."""
    return jax.tree.map(struct, w)


def traced(w: Any) -> Any:
    """What a function is traced on: an array itself, the shape of what stands in."""
    return struct(w) if is_base(w) else w


def is_zero(w: Any) -> bool:
    """Whether it is a base that counts as zero, and has no arrays."""
    return is_base(w) and w.zero


def shaped(w: Any) -> bool:
    """Whether the base tells its shape: None does not, nor a base without arrays."""
    return w is not None and not is_zero(w)


def plain(w: Any) -> Any:
    """What stands in the tree once the adapter is taken off."""
    return w.plain() if is_base(w) else w


def kept(w: Any) -> Any:
    """What an adapter keeps of a base."""
    return w.kept() if is_base(w) else None


def document(w: Any) -> dict[str, Any]:
    """What a checkpoint says of a base beside shape and dtype, as JSON."""
    return w.document() if is_base(w) else {}


def from_document(said: dict[str, Any], shape: Sequence[int]) -> Any:
    """What an adapter keeps of a base, from a checkpoint's words; the others' None."""
    if "dropped" not in said:
        return None
    return Dropped(tuple(shape), jnp.dtype(said["dropped"]))


def remark(w: Any) -> str:
    """What a table says of a base beside shape and dtype."""
    return w.remark() if is_base(w) else ""


def size(w: Any) -> int:
    """Number of parameters of a base."""
    if is_base(w):
        return w.size
    return math.prod(w.shape) if hasattr(w, "shape") else 0


def specs(w: Any, spec: Any) -> Any:
    """A base with a PartitionSpec for each field, where its array has ``spec``."""
    if not shaped(w):
        return w
    return w.specs(spec) if is_base(w) else PartitionSpec(*spec)
