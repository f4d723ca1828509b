"""The adapted leaves, which replace arrays in a params tree.

Their invariants, in one place:

* ``w`` is the base array that the user passed, the same object.  It is the first field.
* The roles of the weight's axes are one static string, aligned with the last axes:
  ``"i"`` for an axis that is contracted with the activation, ``"o"`` for an axis of the
  output, ``"b"`` for a batch axis (stacked layers, experts).  If the weight has more
  axes than the string has letters, the first axes are batch axes.
* `fields.LORA` says which of the weight's axes each field has.  In a stacked leaf every
  field starts with the batch axes.

So a user's ``tree.map(lambda x: x[0], ...)``, scan or vmap slices the leaf by slicing
its fields.  The constructors validate nothing: ``jax.tree.map`` may put any object into
a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from jlora._leaf import base, forms
from jlora._leaf.fields import FULL, LORA, trained
from jlora._leaf.node import NotAnArray, Note, register


class _NotAnArray(NotAnArray):
    """Refuses every use as an array, so that W + a·b is never formed unnoticed."""

    _advice = (
        "is an adapted leaf, not an array: call the function that uses it through "
        "jlora.lift(fn) with the tree as an argument, or turn the tree into plain "
        "arrays with jlora.merge(tree)"
    )


def _brief(x: Any) -> str:
    """``float32[3,4]`` for an array, the repr of anything else."""
    if base.is_base(x):  # never its arrays; and it may hold anything, as in labels
        arrays = [y for y in jax.tree.leaves(x) if hasattr(y, "shape")]
        inside = ", ".join(map(_brief, arrays))
        return repr(x) if base.is_zero(x) else f"{type(x).__name__}({inside})"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return repr(x)


class Told(Note):
    """What told the roles of a leaf: "class", "name or shape", "rule" or "embedding".

    It is empty if a use of the weight was seen.
    """


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout on the activation that enters the low-rank branch; see `jlora.dropout`.

    Attributes:
      key: (*batch) typed PRNG keys.
      rate: static; the probability of a zero.
    """

    key: Any
    rate: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoRA(_NotAnArray):
    """A weight ``w`` with a low-rank delta: W + scale * a·b (arXiv:2106.09685, eq. 3).

    Attributes:
      w: the frozen base: an array, or a `Base` in its place, such as `Dropped`; None in
        an adapter and in half of a partition.
      a: (*batch, *in, r), float32 whatever the base's dtype is.
      b: (*batch, r, *out), float32 whatever the base's dtype is.
      scale: (*batch) float32, or wider if base or factors are; alpha / rank.  It is
        data, so that changing it does not recompile; zero turns the adapter off.
      c: (*batch, *out) output bias of the low-rank branch, or None.  scale * c is added
        to a product of x with the weight.
      m: (*batch, *out) magnitude of DoRA, or None.  The weight is then
        m * V / ‖V‖ for V = W + scale * a·b, with the norm over the in axes.
      gain: (*batch, *out) m / ‖V‖, in the place of m where it is known: inside of a
        lifted call, which computes it once for each leaf.  Else None.
      dropout: a `Dropout` on the activation, or None.
      roles: static; the roles of the weight's last axes, one letter for each.
      form: static; None for a and b as above, else how they make the delta.
      bias_path: static; the path of the bias of the weight's layer, relative to the
        weight, such as "bias"; None if the layer has no bias.
      told: static; what told the roles, if no use was seen.  `lift` compares them with
        the use.
      moved: static; the initialiser that moved a part of the base into the factors, so
        that they fit what is left alone; else empty.
      layer: static; the layer that the weight is of: "dense", "embed" or "conv";
        "conv/4" for a convolution of four groups, "embed/tied" for an embedding that is
        the head, too.  It is empty if nothing told.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlora import LoRA
      >>> LoRA(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.zeros((2, 4)), jnp.ones(())).rank
      2
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    c: Any = None
    m: Any = None
    gain: Any = None
    dropout: Any = None
    roles: str = "io"
    form: forms.Form | None = None
    bias_path: str | None = None
    told: Told = Told()
    moved: Note = Note()
    layer: Note = Note()

    fields: ClassVar = LORA

    @property
    def ndim(self) -> int:
        """The number of axes of the weight, from the base or from the factors."""
        if base.shaped(self.w):
            return len(self.w.shape)
        return forms.of(self.form).ndim(self.a, self.b, self.roles)

    @property
    def axes(self) -> str:
        """The role of each axis of the weight, e.g. ``"bio"`` for a stacked Dense."""
        return self.roles.rjust(self.ndim, "b")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, with or without the base."""
        if base.shaped(self.w):
            return tuple(self.w.shape)
        return forms.of(self.form).weight_shape(self.a, self.b, self.axes)

    @property
    def dtype(self) -> Any:
        """The weight's dtype, which only the base knows."""
        return self.w.dtype

    @property
    def rank(self) -> int:
        """r, the size of the axis that ``a`` and ``b`` share."""
        return forms.of(self.form).rank(self.a, self.b)

    @property
    def base(self) -> Any:
        """``w`` with the leaf's shape; a `Dropped` base does not see its slicing."""
        return base.of_shape(self.w, self.shape)

    def __repr__(self) -> str:
        names = ["w", *trained(self)]
        fields = ", ".join(f"{n}={_brief(getattr(self, n))}" for n in names)
        form = f", form={self.form}" if self.form else ""
        return f"LoRA({fields}, roles={self.roles!r}{form})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Full(_NotAnArray):
    """A whole array that trains, with its frozen base: for heads and biases.

    Attributes:
      w: the frozen base, as in `LoRA`.
      value: the array that trains.  It starts as a copy of ``w``, in float32 unless the
        user asks for another dtype.
      on: () one if the value counts, zero if ``w`` does; only in a bank of adapters,
        and in one that was picked by a traced index.  Else None: the value does.
    """

    w: Any
    value: Any
    on: Any = None

    fields: ClassVar = FULL
    form: ClassVar = None

    @property
    def ndim(self) -> int:
        """The number of axes of the array."""
        return len(self.shape)

    @property
    def axes(self) -> str:
        """``o`` for every axis, since none is contracted or sliced."""
        return "o" * self.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape, with or without the base."""
        return tuple((self.w if base.shaped(self.w) else self.value).shape)

    @property
    def dtype(self) -> Any:
        """The base's dtype, which is the one that the model sees."""
        return self.w.dtype

    @property
    def base(self) -> Any:
        """``w`` with the leaf's shape, as in `LoRA`."""
        return base.of_shape(self.w, self.shape)

    def __repr__(self) -> str:
        return f"Full(w={_brief(self.w)}, value={_brief(self.value)})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bare(_NotAnArray):
    """A base without an adapter, on its way through a lifted function.

    It is in no tree of a user: there the base itself is.  A `Base` that nothing adapts,
    such as a quantised embedding, is still dequantised in each use alone.

    Attributes:
      w: the base.
      roles: static, and always empty: every axis counts as a batch axis.
    """

    w: Any
    roles: str = ""

    fields: ClassVar[dict[str, Any]] = {}
    form: ClassVar = None
    c: ClassVar = None
    gain: ClassVar = None
    dropout: ClassVar = None
    rank: ClassVar = 0

    @property
    def base(self) -> Any:
        """The base."""
        return self.w

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.w.shape)

    @property
    def axes(self) -> str:
        """``b`` for every axis, none of which has a field."""
        return "b" * self.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        """The base's dtype."""
        return self.w.dtype

    def __repr__(self) -> str:
        return f"Bare(w={_brief(self.w)})"


Adapted = LoRA | Full


STATIC = "roles", "form", "bias_path", "told", "moved", "layer"
_NOTES = "told", "moved", "layer"


def document(static: Mapping[str, Any]) -> dict[str, Any]:
    """The static fields of a `LoRA` leaf, by name, as JSON."""
    said = {"roles": static["roles"], **forms.document(static["form"])}
    if static["bias_path"] is not None:
        said["bias"] = static["bias_path"]
    notes = {name: str(static[name]) for name in _NOTES if static[name]}
    return said | notes


def from_document(said: Mapping[str, Any]) -> dict[str, Any]:
    """The static fields from what `document` gave; it may say more than these."""
    return {
        "roles": said["roles"],
        "form": forms.from_document(said),
        "bias_path": said.get("bias"),
        "told": Told(said.get("told", "")),
        "moved": Note(said.get("moved", "")),
        "layer": Note(said.get("layer", "")),
    }


register(Dropout, ["key"], ["rate"])
register(Full, ["w", *FULL])
register(Bare, ["w"], ["roles"])
register(LoRA, ["w", *LORA], STATIC, document=document, from_document=from_document)


def is_adapted(x: Any) -> bool:
    """Whether x is an adapted leaf; made to be ``is_leaf`` of `jax.tree` functions.

    Example:
      >>> import jax, jlora
      >>> jax.tree.leaves({"bias": jlora.Full(1.0, 2.0)}, is_leaf=jlora.is_adapted)
      [Full(w=1.0, value=2.0)]
    """
    return isinstance(x, (LoRA, Full))


def is_leaf(x: Any) -> bool:
    """Whether x is one leaf of a params tree for jlora, but a node for JAX."""
    return is_adapted(x) or base.is_base(x)
