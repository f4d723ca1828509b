"""Forms: how the factors of a leaf make its delta.

A form is static.  It owns all that depends on how a and b are laid out: their shapes,
the rank, the delta, and the same delta as one plain pair of factors.  No other code
asks which form a leaf has.  `plain` is the form of a leaf that names none.

``axes`` below is one letter for each axis of the weight, such as ``"bio"``; ``a`` and
``b`` are the factors; a ``b`` that is passed to a form is multiplied by the scale.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jlora._labels import BLOCK, RANK, dot, order

Shape = tuple[int, ...]
Labels = list[int]


class NotFactored(Exception):
    """This use has no low-rank form; the weight has to be materialised."""


class Misfit(ValueError):
    """A form that a weight cannot have; the text is what was expected of it."""


class AdaptsNothing(Misfit):
    """A form whose delta is zero; the text says why."""


class Form(abc.ABC):
    """How a and b make the delta.

    Attributes:
      aligned: whether each axis of a and b is an axis of the weight, or the rank.  Only
        then are factors sharded and sliced as the weight is.
      formed: whether the delta itself is formed in each use, which is then its nature.
      groups: of the convolution that it is for; None for any.
    """

    aligned: ClassVar[bool] = False
    formed: ClassVar[bool] = False
    groups: int | None = None

    @abc.abstractmethod
    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """The shapes of a and b for a weight of this shape."""

    @abc.abstractmethod
    def weight_shape(self, a: Shape, b: Shape, axes: str) -> Shape:
        """The shape of the weight whose factors have these shapes."""

    @abc.abstractmethod
    def ndim(self, a: Any, roles: str) -> int:
        """Number of axes of the weight, from a and the roles that are spelt out."""

    @abc.abstractmethod
    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """The labels of the axes of a and b.

        Raises:
          NotFactored: they are not axes of the weight.
        """

    @abc.abstractmethod
    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """(a, b) of the same delta in the plain form.

        Raises:
          NotFactored: there is none.
        """

    @abc.abstractmethod
    def delta(self, a: jax.Array, b: jax.Array, axes: str) -> jax.Array:
        """The product of the factors in the weight's shape, at full precision."""

    def rank(self, a: Any) -> int:
        """r, from the factor a."""
        return a.shape[-1]

    def assemble(
        self, d: jax.Array, labels: Labels, out: Sequence[int], axes: str
    ) -> jax.Array:
        """A product with both factors, its axes ``out`` of the weight or of data."""
        return order(d, labels, out)

    def fits(self, shape: Shape, axes: str, kind: str) -> Form:
        """This form with all that it takes from the weight.

        Raises:
          Misfit: the weight cannot have this form.
          AdaptsNothing: it would leave the weight as it is.
        """
        return self

    def fan_in(self, shape: Shape, axes: str) -> int:
        """How many inputs a sums over, for a weight of this shape."""
        return math.prod(_sizes(shape, axes)["i"])

    @property
    def slices(self) -> tuple[bool, ...]:
        """A flag for each slice of the outputs that has factors of its own, or not."""
        return ()

    @property
    def blocks(self) -> int:
        """How many pairs of factors there are."""
        return sum(self.slices) or 1


def _sizes(shape: Shape, axes: str) -> dict[str, list[int]]:
    """The sizes of the weight's axes by role."""
    found: dict[str, list[int]] = {role: [] for role in "bio"}
    for n, role in zip(shape, axes, strict=True):
        found[role].append(n)
    return found


def _labels(axes: str, roles: str) -> Labels:
    """The labels of the axes of these roles, role by role; r is the rank."""
    return [
        k for role in roles for k in ([RANK] if role == "r" else _where(axes, role))
    ]


def _where(axes: str, role: str) -> Labels:
    return [k for k, own in enumerate(axes) if own == role]


@dataclasses.dataclass(frozen=True)
class Pair(Form):
    """One pair: a is (*batch, *in, r), b is (*batch, r, *out)."""

    aligned = True

    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """(*batch, *in, r) and (*batch, r, *out)."""
        size = _sizes(shape, axes)
        batch, in_, out = (size[role] for role in "bio")
        return (*batch, *in_, rank), (*batch, rank, *out)

    def weight_shape(self, a: Shape, b: Shape, axes: str) -> Shape:
        """Batch and in axes are those of a, out axes those of b."""
        n = axes.count("b")
        sizes = {"b": iter(a[:n]), "i": iter(a[n:-1]), "o": iter(b[n + 1 :])}
        return tuple(next(sizes[role]) for role in axes)

    def ndim(self, a: Any, roles: str) -> int:
        """All axes of a but the rank, and the out axes."""
        return a.ndim - 1 + roles.count("o")

    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """Axes of the weight, and the rank."""
        return _labels(axes, "bir"), _labels(axes, "bro")

    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """As they are."""
        return a, b

    def delta(self, a: jax.Array, b: jax.Array, axes: str) -> jax.Array:
        """a·b."""
        la, lb = self.labels(axes)
        weight = range(len(axes))
        d, labels = dot(a, la, b, lb, {*weight, BLOCK}, precision="highest")
        return self.assemble(d, labels, weight, axes)


@dataclasses.dataclass(frozen=True)
class Blocks(Pair):
    """The form of loralib's ``MergedLinear``: factors for each enabled slice.

    The first out axis of the weight is n equal slices (a fused qkv has three), k of
    them enabled.  ``a`` is (*batch, k, *in, r), ``b`` (*batch, k, r, *out) with the
    first of out divided by n; the delta of a slice that is not enabled is zero.

    Attributes:
      enabled: one flag for each slice.
    """

    enabled: tuple[bool, ...]

    aligned = False

    def shapes(self, shape: Shape, axes: str, rank: int) -> tuple[Shape, Shape]:
        """(*batch, k, *in, r) and (*batch, k, r, out / n, ...)."""
        size = _sizes(shape, axes)
        batch, in_, (first, *out) = (size[role] for role in "bio")
        stack = *batch, sum(self.enabled)
        return (*stack, *in_, rank), (*stack, rank, first // len(self.enabled), *out)

    def weight_shape(self, a: Shape, b: Shape, axes: str) -> Shape:
        """That of one pair, with n slices in the first out axis."""
        n = axes.count("b")
        left, right = [*a[:n], *a[n + 1 :]], [*b[:n], *b[n + 1 :]]
        right[n + 1] *= len(self.enabled)
        return super().weight_shape(tuple(left), tuple(right), axes)

    def ndim(self, a: Any, roles: str) -> int:
        """a has an axis for the slices."""
        return super().ndim(a, roles) - 1

    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """BLOCK comes after the batch axes."""
        n = axes.count("b")
        la, lb = super().labels(axes)
        return [*la[:n], BLOCK, *la[n:]], [*lb[:n], BLOCK, *lb[n:]]

    def assemble(
        self, d: jax.Array, labels: Labels, out: Sequence[int], axes: str
    ) -> jax.Array:
        """The products of the blocks in their slices of the first out axis."""
        at = list(out).index(axes.index("o"))
        d = order(d, labels, [*out[:at], BLOCK, *out[at:]])
        blocks = iter(jnp.split(d, d.shape[at], axis=at))
        zeros = jnp.zeros_like(d[(slice(None),) * at + (slice(1),)])
        d = lax.concatenate([next(blocks) if f else zeros for f in self.enabled], at)
        return d.reshape(*d.shape[:at], -1, *d.shape[at + 2 :])

    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """One pair of k·r ranks, with a block-diagonal b."""
        n, rank = axes.count("b"), a.shape[-1]
        slots = [slot for slot, flag in enumerate(self.enabled) if flag]
        a = jnp.moveaxis(a, n, -2)
        a = a.reshape(*a.shape[:-2], len(slots) * rank)
        columns = n + 1  # where b has the first out axis, once a block is taken out
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
        """The slices have to be equal, and one of them enabled."""
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

    For a kernel (k, k, in/groups, out), ``a`` is (*batch, in·k, r·k) and ``b``
    (*batch, r·k, out/groups·k).  Such a delta has no low-rank use, so it is formed.

    Attributes:
      shape: of the kernel, without batch axes; None until it is known.
      groups: of the convolution.
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

    def weight_shape(self, a: Shape, b: Shape, axes: str) -> Shape:
        """The kernel's own, after the batch axes of a."""
        return (*a[: axes.count("b")], *(self.shape or ()))

    def ndim(self, a: Any, roles: str) -> int:
        """a has two axes where the kernel has four."""
        return a.ndim + 2

    def rank(self, a: Any) -> int:
        """r of the r·k that a and b share."""
        return a.shape[-1] // self.shape[0] if self.shape else a.shape[-1]

    def labels(self, axes: str) -> tuple[Labels, Labels]:
        """Matrices have no axes of the kernel."""
        raise NotFactored

    def low_rank(self, a: jax.Array, b: jax.Array, axes: str) -> Any:
        """A reshape mixes the ranks with the axes of the kernel."""
        raise NotFactored

    def delta(self, a: jax.Array, b: jax.Array, axes: str) -> jax.Array:
        """The product of the matrices, read as torch's (out, in, k, k)."""
        n = axes.count("b")
        k, _, channels, features = self.shape or ()
        ab = jnp.matmul(a, b, precision="highest")
        oihw = ab.mT.reshape(*ab.shape[:n], features, channels, k, k)
        return jnp.moveaxis(oihw, (n, n + 1), (n + 3, n + 2))

    def fits(self, shape: Shape, axes: str, kind: str) -> Form:
        """With the shape of the kernel."""
        if kind != "conv" or axes.lstrip("b") != "iiio" or shape[-4] != shape[-3]:
            raise Misfit(
                "a 2-D convolution with a square kernel, (k, k, in/groups, out)"
            )
        if self.groups < 1 or shape[-1] % self.groups:
            raise Misfit(f"a number of groups that divides {shape[-1]}, its outputs")
        return dataclasses.replace(self, shape=shape[-4:])

    def fan_in(self, shape: Shape, axes: str) -> int:
        """The rows of the matrix a."""
        k, _, channels, _ = shape[-4:]
        return channels * self.groups * k


_PAIR = Pair()
_FORMS: dict[str, Any] = {cls.__name__: cls for cls in (Blocks, Kernel)}


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


def from_document(said: dict[str, Any]) -> Form | None:
    """The form of a checkpoint's words, in which JSON made tuples lists."""
    if (form := said.get("form")) is None:
        return None
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in form.items()}
    return _FORMS[str(found.pop("name"))](**found)
