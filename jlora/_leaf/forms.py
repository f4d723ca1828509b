"""Forms: how the factors of a leaf make its delta.

A form is static.  It owns all that depends on the layout of a and b: their shapes, the
rank, the delta, and the same delta as one plain pair of factors.  No other code asks
which form a leaf has.  A leaf whose form is None has the plain form, `Pair`.

Below, ``axes`` is one letter for each axis of the weight, such as ``"bio"``, and ``a``
and ``b`` are the factors.  Methods are linear in ``b``, so it may hold the scale.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._labels import BLOCK, RANK, by_role, dot, order

Shape = tuple[int, ...]
Labels = list[int]


class NotFactored(Exception):
    """This use has no low-rank form; the weight has to be materialised."""


class Misfit(ValueError):
    """A form that a weight cannot have; the message says what was expected."""


class AdaptsNothing(Misfit):
    """A form whose delta is always zero; the message says why."""


class Form(abc.ABC):
    """How a and b make the delta.

    Attributes:
      aligned: whether each axis of a and b is an axis of the weight, or the rank.  Only
        then are factors sharded and sliced as the weight is.
      formed: whether every use forms the delta, because the form has no low-rank use.
      turns: whether a transposed weight has the same form.
      replaces: whether b replaces rows of the weight, and is not added to it.
      implicit: the factors that follow from the form, and are None in a leaf.
      plain: whether it is a pair of factors, for which the algebra is written.
      exact: whether products with a are computed in float32 at least.
      groups: the groups of the convolution that it is for; None for any number.
      indices: the rows of the weight that b replaces; none if it adds.
    """

    plain: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    aligned: ClassVar[bool] = False
    formed: ClassVar[bool] = False
    turns: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    implicit: ClassVar[frozenset[str]] = frozenset()
    groups: int | None = None
    indices: tuple[int, ...] = ()

    @abc.abstractmethod
    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """The shapes of a and b for a weight of this shape."""

    @abc.abstractmethod
    def weight_shape(self, a: Any, b: Any, axes: str) -> Shape:
        """The shape of the weight with these factors."""

    @abc.abstractmethod
    def ndim(self, a: Any, b: Any, roles: str) -> int:
        """The number of axes of the weight, from its factors and the leaf's roles."""

    @abc.abstractmethod
    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """The labels of the axes of a and b.

        Raises:
          NotFactored: some are neither axes of the weight nor the rank.
        """

    @abc.abstractmethod
    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """(a, b) of the same delta in the plain form.

        Raises:
          NotFactored: the plain form does not have this delta.
        """

    @abc.abstractmethod
    def delta(self, a: Any, b: jax.Array, axes: str) -> jax.Array:
        """The delta in the weight's shape, at full precision."""

    def rank(self, a: Any, b: Any) -> int:
        """r, from the factors."""
        return a.shape[-1]

    def entered(self, h: jax.Array) -> jax.Array:
        """What becomes of x·a, before it meets b."""
        return h

    def stacked(self, axes: str) -> int:
        """How many axes of a and b come before those of their matrices."""
        return axes.count("b")

    def assemble(
        self, d: jax.Array, labels: Labels, out: Sequence[int], axes: str
    ) -> jax.Array:
        """A product with both factors, with its axes in the order ``out``.

        Args:
          d: the product.
          labels: its labels.
          out: the wanted labels: axes of the weight, and axes of an activation.
          axes: the roles of the weight's axes.
        """
        return order(d, labels, out)

    def fits(self, shape: Shape, axes: str, kind: str) -> Form:
        """This form, completed with what it needs to know from the weight.

        Raises:
          Misfit: the weight cannot have this form.
          AdaptsNothing: the form would leave the weight unchanged.
        """
        return self

    def fan_in(self, shape: Shape, axes: str) -> int:
        """The number of inputs that a sums over, for a weight of this shape."""
        return math.prod(_sizes(shape, axes)["i"])

    @property
    def slices(self) -> tuple[bool, ...]:
        """For each slice of the outputs: whether it has factors; () without slices."""
        return ()

    @property
    def blocks(self) -> int:
        """The number of pairs of factors."""
        return sum(self.slices) or 1


def _sizes(shape: Shape, axes: str) -> dict[str, list[int]]:
    """The sizes of the weight's axes by role."""
    found: dict[str, list[int]] = {role: [] for role in "bio"}
    for n, role in zip(shape, axes, strict=True):
        found[role].append(n)
    return found


# The roles of the axes of a and b in a plain pair; r is the rank.
A, B = "bir", "bro"


@dataclasses.dataclass(frozen=True)
class Pair(Form):
    """One pair: a is (*batch, *in, r), b is (*batch, r, *out)."""

    plain = True
    aligned = True
    turns = True

    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """(*batch, *in, r) and (*batch, r, *out)."""
        size = _sizes(shape, axes)
        batch, in_, out = (size[role] for role in "bio")
        return (*batch, *in_, rank), (*batch, rank, *out)

    def weight_shape(self, a: Any, b: Any, axes: str) -> Shape:
        """Batch and in axes come from a, out axes from b."""
        return self._weight_shape(tuple(a.shape), tuple(b.shape), axes)

    def _weight_shape(self, a: Shape, b: Shape, axes: str) -> Shape:
        n = axes.count("b")
        sizes = {"b": iter(a[:n]), "i": iter(a[n:-1]), "o": iter(b[n + 1 :])}
        return tuple(next(sizes[role]) for role in axes)

    def ndim(self, a: Any, b: Any, roles: str) -> int:
        """All axes of a except the rank, and the out axes."""
        return a.ndim - 1 + roles.count("o")

    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """Axes of the weight, and the rank."""
        return by_role(A, axes), by_role(B, axes)

    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """a and b unchanged."""
        return a, b

    def delta(self, a: Any, b: jax.Array, axes: str) -> jax.Array:
        """a·b."""
        la, lb = self.labels(axes)
        weight = range(len(axes))
        d, labels = dot(a, la, b, lb, {*weight, BLOCK}, precision="highest")
        return self.assemble(d, labels, weight, axes)


@jax.custom_vjp
def _tap(h: jax.Array) -> jax.Array:
    return h


_tap.defvjp(lambda h: (h, h), lambda h, _: (h,))


@dataclasses.dataclass(frozen=True)
class Probe(Pair):
    """A pair whose a is the identity, to see what enters a weight.

    The gradient of x·a is x·a itself, whatever comes after it.  So the gradient of a is
    the sum of xᵀ·x, in any loop and any layout.
    """

    exact = True

    def entered(self, h: jax.Array) -> jax.Array:
        """h, with the gradient h."""
        return _tap(h)


@dataclasses.dataclass(frozen=True)
class Blocks(Pair):
    """The form of loralib's ``MergedLinear``: factors for each enabled slice.

    The first out axis of the weight has n equal slices (a fused qkv has three), k of
    which are enabled.  ``a`` is (*batch, k, *in, r).  ``b`` is (*batch, k, r, *out),
    with the first out axis divided by n.  A slice that is not enabled has a delta of
    zero.

    Attributes:
      enabled: one flag for each slice.
    """

    enabled: tuple[bool, ...]

    plain = False
    aligned = False
    turns = False

    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """(*batch, k, *in, r) and (*batch, k, r, out / n, ...)."""
        size = _sizes(shape, axes)
        batch, in_, (first, *out) = (size[role] for role in "bio")
        stack = *batch, sum(self.enabled)
        return (*stack, *in_, rank), (*stack, rank, first // len(self.enabled), *out)

    def weight_shape(self, a: Any, b: Any, axes: str) -> Shape:
        """The shape for one pair, with n slices in the first out axis."""
        n = axes.count("b")
        left, right = ([*x.shape[:n], *x.shape[n + 1 :]] for x in (a, b))
        right[n + 1] *= len(self.enabled)
        return self._weight_shape(tuple(left), tuple(right), axes)

    def ndim(self, a: Any, b: Any, roles: str) -> int:
        """As for one pair, without a's axis for the slices."""
        return super().ndim(a, b, roles) - 1

    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """As for one pair, with BLOCK after the batch axes."""
        n = axes.count("b")
        la, lb = super().labels(axes)
        return [*la[:n], BLOCK, *la[n:]], [*lb[:n], BLOCK, *lb[n:]]

    def stacked(self, axes: str) -> int:
        """The batch axes, and the slices."""
        return axes.count("b") + 1

    def assemble(
        self, d: jax.Array, labels: Labels, out: Sequence[int], axes: str
    ) -> jax.Array:
        """The product of each block in its slice of the first out axis."""
        at = list(out).index(axes.index("o"))
        d = order(d, labels, [*out[:at], BLOCK, *out[at:]])
        blocks = iter(jnp.split(d, d.shape[at], axis=at))
        zeros = jnp.zeros_like(d[(slice(None),) * at + (slice(1),)])
        d = lax.concatenate([next(blocks) if f else zeros for f in self.enabled], at)
        return d.reshape(*d.shape[:at], -1, *d.shape[at + 2 :])

    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """One pair of rank k·r, with a block-diagonal b."""
        n, rank = axes.count("b"), a.shape[-1]
        slots = [slot for slot, flag in enumerate(self.enabled) if flag]
        a = jnp.moveaxis(a, n, -2)
        a = a.reshape(*a.shape[:-2], len(slots) * rank)
        columns = n + 1  # the first out axis of one block of b
        size = b.shape[columns + 1]
        padded = []
        for i, slot in enumerate(slots):
            block = lax.index_in_dim(b, i, n, keepdims=False)
            pads = [(0, 0, 0)] * block.ndim
            before, after = slot * size, (len(self.enabled) - 1 - slot) * size
            pads[columns] = (before, after, 0)
            padded.append(lax.pad(block, jnp.zeros((), block.dtype), pads))
        return a, jnp.concatenate(padded, n)

    def fits(self, shape: Shape, axes: str, kind: str) -> Form:
        """This form; the slices have to be equal, and at least one enabled."""
        if not all(flag in (False, True) for flag in self.enabled):
            raise Misfit("flags, True or False")
        if not self.enabled or "o" not in axes:
            raise Misfit("one flag for each slice of the first out axis")
        size = shape[axes.index("o")]
        if size % len(self.enabled):
            raise Misfit(f"a number of flags that divides {size}, its first out axis")
        if not any(self.enabled):
            raise AdaptsNothing("no slice of it is enabled")
        return self

    @property
    def slices(self) -> tuple[bool, ...]:
        """The flags."""
        return self.enabled


@dataclasses.dataclass(frozen=True)
class Kernel(Form):
    """The form of loralib's ``ConvLoRA``: the delta is a reshaped product of matrices.

    For a kernel (k, k, in/groups, out), ``a`` is (*batch, in·k, r·k) and ``b`` is
    (*batch, r·k, out/groups·k).  Such a delta has no low-rank use: each use forms it.

    Attributes:
      shape: the kernel's shape, without batch axes; None until it is known.
      groups: the convolution's number of groups.
    """

    shape: tuple[int, ...] | None = None
    groups: int = 1

    formed = True

    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """(*batch, in·k, r·k) and (*batch, r·k, out/groups·k)."""
        batch = _sizes(shape, axes)["b"]
        k, _, channels, features = shape[-4:]
        shared = rank * k
        b = (*batch, shared, features // self.groups * k)
        return (*batch, channels * self.groups * k, shared), b

    def weight_shape(self, a: Any, b: Any, axes: str) -> Shape:
        """The kernel's shape, after the batch axes of a."""
        return (*a.shape[: axes.count("b")], *(self.shape or ()))

    def ndim(self, a: Any, b: Any, roles: str) -> int:
        """a has two axes where the kernel has four."""
        return a.ndim + 2

    def rank(self, a: Any, b: Any) -> int:
        """r; a and b share an axis of size r·k."""
        return a.shape[-1] // self.shape[0] if self.shape else a.shape[-1]

    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """Raises: the axes of the matrices are not axes of the kernel."""
        raise NotFactored

    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """Raises: the reshape mixes the rank with the axes of the kernel."""
        raise NotFactored

    def delta(self, a: Any, b: jax.Array, axes: str) -> jax.Array:
        """The product of the matrices, reshaped as torch's (out, in, k, k)."""
        n = axes.count("b")
        k, _, channels, features = self.shape or ()
        ab = jnp.matmul(a, b, precision="highest")
        oihw = ab.mT.reshape(*ab.shape[:n], features, channels, k, k)
        return jnp.moveaxis(oihw, (n, n + 1), (n + 3, n + 2))

    def fits(self, shape: Shape, axes: str, kind: str) -> Form:
        """This form with the shape of the kernel."""
        if kind != "conv" or axes.lstrip("b") != "iiio" or shape[-4] != shape[-3]:
            raise Misfit(
                "a 2-D convolution with a square kernel, (k, k, in/groups, out)"
            )
        if self.groups < 1 or shape[-1] % self.groups:
            raise Misfit(f"a number of groups that divides {shape[-1]}, its outputs")
        return dataclasses.replace(self, shape=shape[-4:])

    def fan_in(self, shape: Shape, axes: str) -> int:
        """The number of rows of the matrix a."""
        k, _, channels, _ = shape[-4:]
        return channels * self.groups * k


@dataclasses.dataclass(frozen=True)
class Rows(Form):
    """Some rows of a table are replaced: those of the tokens that train.

    b is (*batch, n, *out), the new rows.  a says where they go, which ``indices`` does
    already: it is one at (indices[k], k), else zero, and never an array.

    Attributes:
      indices: the indices of the rows along the table's only in axis.
      size: the number of rows that the table has.
    """

    indices: tuple[int, ...] = ()
    size: int = 0

    turns = True
    replaces = True
    implicit = frozenset("a")

    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """No a; and (*batch, n, *out)."""
        size = _sizes(shape, axes)
        return (), (*size["b"], len(self.indices), *size["o"])

    def weight_shape(self, a: Any, b: Any, axes: str) -> Shape:
        """That of b, with all rows along the in axis."""
        n = axes.count("b")
        rest = {"b": iter(b.shape[:n]), "o": iter(b.shape[n + 1 :])}
        return tuple(self.size if c == "i" else next(rest[c]) for c in axes)

    def ndim(self, a: Any, b: Any, roles: str) -> int:
        """b has an axis of rows, too."""
        return b.ndim

    def rank(self, a: Any, b: Any) -> int:
        """The number of rows that train."""
        return len(self.indices)

    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """As for a plain pair."""
        return by_role(A, axes), by_role(B, axes)

    def low_rank(self, a: jax.Array | None, b: jax.Array, axes: str) -> Any:
        """a as an array of ones and zeros; b has to be the change of the rows."""
        n = axes.count("b")
        hot = jnp.arange(self.size)[:, None] == jnp.array(self.indices)
        return jnp.broadcast_to(hot.astype(b.dtype), (*b.shape[:n], *hot.shape)), b

    def delta(self, a: Any, b: jax.Array, axes: str) -> jax.Array:
        """The changes of the rows in their places."""
        at = axes.index("i")
        own = order(
            b, by_role(B, axes), [RANK if c == "i" else k for k, c in enumerate(axes)]
        )
        shape = (*own.shape[:at], self.size, *own.shape[at + 1 :])
        return self.put(jnp.zeros(shape, b.dtype), own, at)

    def __repr__(self) -> str:
        some = ", ".join(map(str, self.indices[:3]))
        more = f", … {len(self.indices):,} rows" if len(self.indices) > 3 else ""
        return f"Rows({some}{more} of {self.size:,})"

    def take(self, x: jax.Array, axis: int) -> jax.Array:
        """The rows of an array that has all of them along this axis."""
        return jnp.take(
            x, np.array(self.indices), axis, unique_indices=True, mode="clip"
        )

    def put(self, x: jax.Array, rows: Any, axis: int) -> jax.Array:
        """The array with these rows in place of its own along this axis."""
        at = (slice(None),) * axis + (np.array(self.indices),)
        return x.at[at].set(rows, unique_indices=True, mode="promise_in_bounds")

    def find(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For each index into the table which row of b it is, and whether it is one.

        All are compared, which XLA fuses into the one sum: a search would be a loop.
        """
        ids = ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)
        hit = ids[..., None] == np.array(self.indices, ids.dtype)
        at = jnp.sum(jnp.where(hit, np.arange(len(self.indices)), 0), -1)
        return at, hit.any(-1)


_PAIR = Pair()
_FORMS: dict[str, Any] = {cls.__name__: cls for cls in (Blocks, Kernel, Rows)}


def of(form: Form | None) -> Form:
    """The form itself; the plain pair for None."""
    return _PAIR if form is None else form


def is_form(x: Any) -> bool:
    """Whether x is a form."""
    return isinstance(x, Form)


def document(form: Form | None) -> dict[str, Any]:
    """A form as JSON, for a checkpoint; nothing for the plain pair."""
    if form is None:
        return {}
    return {"form": {"name": type(form).__name__, **dataclasses.asdict(form)}}  # type: ignore[call-overload]


def from_document(said: Mapping[str, Any]) -> Form | None:
    """The form from what `document` gave, in which JSON turned tuples into lists."""
    if (form := said.get("form")) is None:
        return None
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in form.items()}
    return _FORMS[str(found.pop("name"))](**found)
