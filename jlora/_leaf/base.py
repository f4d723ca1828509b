"""What ``w`` of an adapted leaf can be, and the one way to use it.

It is an array, the shape of an array, or a `Base`.  A `Base` is a pytree that makes the
array for each use.  `Dropped` is one, too.  Another library's class, such as a
quantised array, is one through a `Base` that `foreign` registers for it.  All code
reads a base through its ``shape`` and ``dtype``, and through the functions here:

* `use` computes fn(array, *operands);
* `then` gives a new base from a function of the array, such as its transpose;
* `valued`, `cut`, `fieldwise`, `gather` and `placed` do that, too.  They say more of
  the function, so that a base may apply it to its own fields.

A new kind of base is one file: a subclass of `Base` that defines ``shape``, ``dtype``
and ``use``, registered by `node.register`.  None means no base: in an adapter, or in
half of a partition.
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
from jax import lax
from jax.sharding import PartitionSpec

from jlora._labels import RANK
from jlora._leaf.node import register


@dataclasses.dataclass(frozen=True)
class Gathering:
    """lax.gather as a function, equal to any other with the same parameters.

    So JAX's trace cache knows a base that waits for the same gather.

    Attributes:
      params: the primitive's parameters, as items.
    """

    params: tuple[tuple[str, Any], ...]

    def __call__(self, w: Any, indices: Any) -> Any:
        return lax.gather(w, indices, **dict(self.params))


class Base(abc.ABC):
    """An object in place of a base array.  A subclass is a dataclass and a node.

    Attributes:
      shape: the array's shape, as the model sees it.
      dtype: the array's dtype, as the model sees it.
      slices: static; whether slicing every field along a leading axis slices the array,
        as `jax.lax.scan` slices a stack of layers.
      zero: static; whether the array is zero.  Such a base has no arrays.
      lossy: static; whether an array has to be rounded to become such a base.
    """

    slices = True
    zero = False
    lossy = False

    @property
    def whole(self) -> bool:
        """Whether a scan leaves it as it is, and each step takes its `row`."""
        return not self.slices

    @property
    def shards(self) -> bool:
        """Whether a shard of every field, by `specs`, is a shard of the array."""
        return self.slices

    shape: Any
    dtype: Any

    @abc.abstractmethod
    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """fn(array, *operands), with the array made for this use alone.

        ``fn`` closes over no traced value.  So a subclass may define a custom
        derivative for its use.
        """

    def then(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The base whose array is fn(array, *operands).

        By default the array is computed in each use, not here.
        """
        return Pending((self.node,), tuple(map(jnp.asarray, operands)), fn)

    @property
    def node(self) -> Any:
        """The node of a tree that has this base: itself, or what it stands for."""
        return self

    def along(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The base whose array is fn(array, axes, *operands), with all of its axes."""
        whole = tuple(range(len(self.shape)))
        return self.then(lambda w, *xs: fn(w, whole, *xs), *operands)

    def cut(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The base whose array is fn(array, axes, *operands): a part of the array.

        For a field of the base ``axes`` may have RANK where an axis stays as it is.
        """
        return self.along(fn, *operands)

    def row(self, step: Any) -> Any:
        """The base whose array is array[step], with a traced index in bounds."""
        return self.cut(_row, step)

    def fieldwise(self, fn: Callable[..., Any]) -> Any:
        """The base whose array is fn(array, axes), which moves data between devices.

        For any field with as many axes as the array, fn does what it does for the
        array.
        """
        return self.along(fn)

    def gather(self, fn: Gathering, indices: Any) -> Any:
        """The base whose array is fn(array, indices)."""
        return self.then(fn, indices)

    def placed(self, sharding: Any, fn: Callable[..., Any]) -> Any:
        """The base whose array is fn(array, sharding): the array under a sharding."""
        return self.then(lambda w: fn(w, sharding))

    def carrier(self) -> Any:
        """An array with the shape and the sharding of the base's; None without one."""
        return None

    def specs(self, spec: Sequence[Any]) -> Any:
        """This base with a PartitionSpec for each field, if its array has ``spec``.

        By default a field with as many axes as the array is sharded along the axes that
        have the array's size.  Any other field is whole on every device.
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
        """The number of axes of the array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of parameters that the base has."""
        return math.prod(self.shape)

    def plain(self) -> Any:
        """What takes the leaf's place in the tree when its adapter is removed."""
        return self

    def kept(self) -> Any:
        """What an adapter stores in place of this base; None stores nothing."""
        return None

    def of_shape(self, shape: tuple[int, ...]) -> Any:
        """This base with the shape that follows from the leaf's factors."""
        return self

    def document(self) -> dict[str, Any]:
        """What a checkpoint stores of it besides shape and dtype, as JSON."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint compares besides shape and dtype, as JSON."""
        return {}

    def remark(self) -> str:
        """What a table shows of it besides shape and dtype."""
        return ""


def _row(w: jax.Array, axes: Sequence[int], step: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(w, 0 if axes[0] == RANK else step, keepdims=False)


class _Uncompared(tuple[int, ...]):
    """A shape that is equal to any other: the factors know the right one.

    If it were compared, a slice of a stack would be another structure than a layer.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Uncompared)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Dropped(Base):
    """A base that was dropped on purpose, and counts as zero; see `jlora.drop_base`.

    It has no arrays, so slicing a stacked leaf does not change its ``shape``.  The
    shape of such a slice follows from the leaf's factors.

    Attributes:
      shape: static; the shape that the base had.
      dtype: static; the dtype that the base had.  The model still sees it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.zeros((3, 4))}, rank=2)
      >>> jlora.drop_base(t)["kernel"].w
      Dropped(shape=(3, 4), dtype=dtype('float32'))
    """

    shape: tuple[int, ...]
    dtype: Any
    zero = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        """No arrays."""
        return (), (_Uncompared(self.shape), self.dtype)

    @classmethod
    def tree_unflatten(cls, aux: Any, _: Any) -> Dropped:
        """From shape and dtype."""
        return cls(*aux)

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """The shape and dtype of the result, which is zero; `plus` adds to it."""
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
        """The shape and dtype, which is all that `attach` and `restore` need."""
        return struct(self)

    def kept(self) -> Dropped:
        """Itself, so that the adapter knows that its base was dropped."""
        return self

    def of_shape(self, shape: tuple[int, ...]) -> Dropped:
        """It has no arrays that slicing changes, so the factors give the shape."""
        return dataclasses.replace(self, shape=shape)

    def document(self) -> dict[str, Any]:
        """The dtype, which is nowhere else in a checkpoint's plan."""
        return {"dropped": str(self.dtype)}

    def remark(self) -> str:
        """Shown by `summary`."""
        return "base dropped"


register(
    Dropped,
    [],
    ["shape", "dtype"],
    document=lambda x: {"shape": [*x["shape"]], "dtype": str(x["dtype"])},
    own=True,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bases", "operands"],
    meta_fields=["fn", "by_value"],
)
@dataclasses.dataclass(frozen=True)
class Pending(Base):
    """fn(*arrays, *operands) of other bases, computed anew in each use.

    Attributes:
      bases: the bases that make the arrays.
      operands: the function's other arguments, which are arrays.
      fn: static; it closes over no traced value.
      by_value: static; whether fn acts on each number of one array by itself, and has
        no operands.  Then what is cut from its result is cut from the base.
    """

    bases: tuple[Any, ...]
    operands: tuple[Any, ...]
    fn: Callable[..., Any]
    by_value: bool = False

    @property
    def slices(self) -> bool:  # type: ignore[override]
        """Whether slicing every field slices the array."""
        return self.by_value and slices(self.bases[0])

    def _inside(self, change: Callable[[Any], Any]) -> Any:
        """This base with its own base changed."""
        return dataclasses.replace(self, bases=(change(self.bases[0]),))

    def cut(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """As that of its own base, if it acts by value."""
        if not self.by_value:
            return super().cut(fn, *operands)
        return self._inside(lambda w: cut(w, fn, *operands))

    @property
    def whole(self) -> bool:
        """As that of its own base, if it acts by value."""
        return whole(self.bases[0]) if self.by_value else True

    @property
    def shards(self) -> bool:
        """As that of its own base, if it acts by value."""
        return self.by_value and shards(self.bases[0])

    def specs(self, spec: Sequence[Any]) -> Any:
        """As those of its own base, if it acts by value."""
        return (
            self._inside(lambda w: specs(w, spec))
            if self.by_value
            else super().specs(spec)
        )

    def row(self, step: Any) -> Any:
        """As that of its own base, if it acts by value."""
        if not self.by_value:
            return super().row(step)
        return self._inside(lambda w: row(w, step))

    def fieldwise(self, fn: Callable[..., Any]) -> Any:
        """As that of its own base, if it acts by value."""
        if not self.by_value:
            return super().fieldwise(fn)
        return self._inside(lambda w: fieldwise(w, fn))

    def gather(self, fn: Gathering, indices: Any) -> Any:
        """As that of its own base, if it acts by value."""
        if not self.by_value:
            return super().gather(fn, indices)
        return self._inside(lambda w: gather(w, fn, indices))

    def placed(self, sharding: Any, fn: Callable[..., Any]) -> Any:
        """As that of its own base, if it acts by value."""
        if not self.by_value:
            return super().placed(sharding, fn)
        return self._inside(lambda w: placed(w, sharding, fn))

    def carrier(self) -> Any:
        """As that of its own base, if it acts by value."""
        return carrier(self.bases[0]) if self.by_value else None

    @functools.cached_property
    def _struct(self) -> Any:
        bases = map(struct, self.bases)
        return jax.eval_shape(self.fn, *bases, *self.operands)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the function's result."""
        return tuple(self._struct.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the function's result."""
        return self._struct.dtype

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """fn(array, *operands); the function runs inside the uses of all bases."""
        n = len(self.bases) + len(self.operands)
        own = self.fn  # `call` may not hold self, which has arrays

        def call(*args: Any) -> Any:
            return fn(own(*args[:n]), *args[n:])

        return use_all(self.bases, call, *self.operands, *operands)


def use_all(bases: Sequence[Any], fn: Callable[..., Any], *operands: Any) -> Any:
    """fn(*arrays, *operands), with the arrays of all bases made for it, as in `use`.

    Each base is used inside the use of the base before it.  The remaining bases and
    operands are passed along as operands, since ``fn`` may close over no traced value.
    """
    first, *rest = bases
    if not rest:
        return use(first, fn, *operands)
    n = len(rest)

    def inner(w: Any, *args: Any) -> Any:
        def last(*xs: Any) -> Any:
            return fn(xs[n], *xs[:n], *xs[n + 1 :])

        return use_all(args[:n], last, w, *args[n:])

    return use(first, inner, *rest, *operands)


# class -> the function that gives the `Base` for an object of it; see `foreign`.
_FOREIGN: list[Callable[[type], Callable[[Any], Base] | None]] = []


def foreign(known: Callable[[type], Callable[[Any], Base] | None]) -> None:
    """Registers how objects of other libraries' classes are bases.

    Args:
      known: gives for a class the function from its objects to their `Base`, or None.
    """
    _FOREIGN.append(known)


@functools.lru_cache(maxsize=4096)
def _view(cls: Any) -> Callable[[Any], Base] | None:
    if issubclass(cls, Base):
        return lambda x: x
    return next(filter(None, (known(cls) for known in _FOREIGN)), None)


def is_base(x: Any) -> bool:
    """Whether x is a `Base`, which counts as one leaf of a tree, as an array does."""
    cls: Any = type(x)
    return _view(cls) is not None


def seen(w: Any) -> Base | None:
    """The `Base` that w is, or that stands for it; None for an array."""
    cls: Any = type(w)
    view = _view(cls)
    return None if view is None else view(w)


def use(w: Any, fn: Callable[..., Any], *operands: Any) -> Any:
    """fn(array, *operands); only its shape and dtype if the base is zero.

    Args:
      w: a base.
      fn: closes over no traced value if ``w`` is a `Base`, and is linear in the array
        if the base may be zero.
      *operands: its other arguments.
    """
    own = seen(w)
    return fn(w, *operands) if own is None else own.use(fn, *operands)


def then(w: Any, fn: Callable[..., Any], *operands: Any) -> Any:
    """The base whose array is fn(array, *operands), with `fn` as in `use`."""
    own = seen(w)
    return fn(w, *operands) if own is None else own.then(fn, *operands)


def valued(w: Any, fn: Callable[..., Any]) -> Any:
    """The base whose array is fn(array), which acts on each number by itself."""
    own = seen(w)
    if own is None:
        return fn(w)
    return own.then(fn) if own.zero else Pending((w,), (), fn, by_value=True)


def along(w: Any, fn: Callable[..., Any], *operands: Any) -> Any:
    """The base whose array is fn(array, axes, *operands); see `Base.along`."""
    own = seen(w)
    if own is None:
        return fn(w, range(len(w.shape)), *operands)
    return own.along(fn, *operands)


def cut(w: Any, fn: Callable[..., Any], *operands: Any) -> Any:
    """The base whose array is fn(array, axes, *operands); see `Base.cut`."""
    own = seen(w)
    if own is None:
        return fn(w, range(len(w.shape)), *operands)
    return own.cut(fn, *operands)


def fieldwise(w: Any, fn: Callable[..., Any]) -> Any:
    """The base whose array is fn(array, axes); see `Base.fieldwise`."""
    own = seen(w)
    return fn(w, range(len(w.shape))) if own is None else own.fieldwise(fn)


def gather(w: Any, fn: Gathering, indices: Any) -> Any:
    """The base whose array is fn(array, indices); see `Base.gather`."""
    own = seen(w)
    return fn(w, indices) if own is None else own.gather(fn, indices)


def placed(w: Any, sharding: Any, fn: Callable[..., Any]) -> Any:
    """The base whose array is fn(array, sharding); see `Base.placed`."""
    own = seen(w)
    return fn(w, sharding) if own is None else own.placed(sharding, fn)


def carrier(w: Any) -> Any:
    """An array with the shape and the sharding of the base's; None if there is none."""
    own = seen(w)
    return w if own is None else own.carrier()


def slices(w: Any) -> bool:
    """Whether slicing every field along a leading axis slices the array."""
    own = seen(w)
    return own is None or own.slices


def shards(w: Any) -> bool:
    """Whether a shard of every field, by `specs`, is a shard of the array."""
    own = seen(w)
    return own is None or own.shards


def whole(w: Any) -> bool:
    """Whether a scan leaves the base whole, and each step takes its `row`."""
    own = seen(w)
    return own is not None and own.whole


def row(w: Any, step: Any) -> Any:
    """The base whose array is array[step]; see `Base.row`."""
    own = seen(w)
    return _row(w, [0], step) if own is None else own.row(step)


def joined(bases: Sequence[Any], fn: Callable[..., Any]) -> Any:
    """The base whose array is fn(*arrays), with the arrays of several bases."""
    if all(map(is_zero, bases)):
        made = jax.eval_shape(fn, *map(struct, bases))
        return Dropped(made.shape, made.dtype)
    some = tuple(jnp.zeros(w.shape, w.dtype) if is_zero(w) else w for w in bases)
    return Pending(some, (), fn) if any(map(is_base, some)) else fn(*some)


def plus(y: Any, h: jax.Array) -> jax.Array:
    """y + h in y's dtype.  y is a result of `use`: a shape and dtype count as zero."""
    chex.assert_equal(tuple(y.shape), tuple(h.shape))
    h = h.astype(y.dtype)
    return h if isinstance(y, jax.ShapeDtypeStruct) else y + h


def array(w: Any) -> Any:
    """The array of a base; zeros for a base that is zero."""
    own = seen(w)
    if own is None:
        return w
    return jnp.zeros(w.shape, w.dtype) if own.zero else own.use(lambda w: w)


def struct(w: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a base's array."""
    return jax.ShapeDtypeStruct(tuple(w.shape), w.dtype)


def abstract(w: Any) -> Any:
    """The base with each of its arrays replaced by the array's shape and dtype."""
    return jax.tree.map(struct, w)


def traced(w: Any) -> Any:
    """What a function is traced with: the array, or the shape and dtype of a `Base`."""
    return struct(w) if is_base(w) else w


def is_zero(w: Any) -> bool:
    """Whether w is a base that counts as zero, and so has no arrays."""
    own = seen(w)
    return own is not None and own.zero


def is_lossy(w: Any) -> bool:
    """Whether an array has to be rounded to become such a base."""
    own = seen(w)
    return own is not None and own.lossy


def is_coded(w: Any) -> bool:
    """Whether it is an array of codes, which the user's function makes a weight of.

    Nothing can be added to such an array: integers or floats of 8 bits and less.
    """
    if is_missing(w) or is_base(w):
        return False
    return jnp.dtype(w.dtype).itemsize == 1 and w.dtype != bool


def is_missing(w: Any) -> bool:
    """Whether there is no base: None, or a base whose arrays are in the other half."""
    return w is None or (is_base(w) and not is_zero(w) and not jax.tree.leaves(w))


def is_abstract(w: Any) -> bool:
    """Whether only the shapes of the base's arrays are known."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w))


def is_concrete(w: Any) -> bool:
    """Whether the values of the base's arrays are known now."""
    unknown = jax.ShapeDtypeStruct, jax.core.Tracer
    arrays = jax.tree.leaves(w)
    return all(hasattr(x, "shape") and not isinstance(x, unknown) for x in arrays)


def shaped(w: Any) -> bool:
    """Whether the base gives its shape: a missing one and a zero one do not."""
    return not is_missing(w) and not is_zero(w)


def plain(w: Any) -> Any:
    """What takes the leaf's place in the tree when its adapter is removed."""
    return w.plain() if isinstance(w, Base) else w


def of_shape(w: Any, shape: tuple[int, ...]) -> Any:
    """A base with the shape that follows from the leaf's factors."""
    return w.of_shape(shape) if isinstance(w, Base) else w


def kept(w: Any) -> Any:
    """What an adapter stores in place of a base."""
    return w.kept() if isinstance(w, Base) else None


def document(w: Any) -> dict[str, Any]:
    """What a checkpoint stores of a base besides shape and dtype, as JSON."""
    own = seen(w)
    return {} if own is None else own.document()


def fingerprint(w: Any) -> dict[str, Any]:
    """What a checkpoint compares besides shape and dtype, as JSON."""
    own = seen(w)
    return {} if own is None else own.fingerprint()


def from_document(said: dict[str, Any], shape: Sequence[int]) -> Any:
    """What `kept` gave, from what `document` gave: a `Dropped` base, or None."""
    if "dropped" not in said:
        return None
    return Dropped(tuple(shape), jnp.dtype(said["dropped"]))


def remark(w: Any) -> str:
    """What a table shows of a base besides shape and dtype."""
    own = seen(w)
    return "" if own is None else own.remark()


def size(w: Any) -> int:
    """The number of parameters of a base."""
    own = seen(w)
    if own is not None:
        return own.size if shaped(w) else 0
    return math.prod(w.shape) if hasattr(w, "shape") else 0


def specs(w: Any, spec: Any) -> Any:
    """A base with a PartitionSpec for each field, if its array has ``spec``."""
    if not shaped(w):
        return w
    own = seen(w)
    return PartitionSpec(*spec) if own is None else own.specs(spec)
