"""The adapted leaves: what stands in a params tree where an array stood.

Their invariants, in one place:

* ``LoRA.w`` is the base array that the user passed, the same object; only ``a``
  and ``b`` train.  It is the first field.
* The roles of the weight's axes are one static string, counted from the end:
  ``"i"`` for an axis that is contracted with the activation, ``"o"`` for one that
  comes out, ``"b"`` for a batch axis (stacked layers, experts).  Axes that the
  string does not reach lead, and are batch axes.
* ``a`` is (*batch, *in, r), ``b`` is (*batch, r, *out) and ``c`` is (*batch, *out),
  each in the order of the weight's own axes; ``scale`` and ``key`` are (*batch).

So every field of a stacked leaf starts with the same batch axes, and a user's own
``tree.map(lambda x: x[0], ...)``, scan or vmap slices the leaf by slicing its fields.
Nothing is validated in the constructors: the leaves must survive ``jax.tree.map`` to
anything.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import jax

_ADVICE = (
    "is an adapted leaf, not an array: call the function that uses it through "
    "jlora.lift(fn), or turn the tree into plain arrays with jlora.merge(tree)"
)


class _NotAnArray:
    """Refuses every use as an array, so that W + BA is never formed in silence."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self!r} {_ADVICE}.")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}; it {_ADVICE}.", name=name
        )

    __jax_array__ = __array__ = __array_ufunc__ = _refuse
    __getitem__ = __len__ = __iter__ = _refuse
    __float__ = __int__ = __index__ = __complex__ = _refuse


_OPERATORS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
for _name in _OPERATORS.split():
    setattr(_NotAnArray, f"__{_name}__", _NotAnArray._refuse)
    setattr(_NotAnArray, f"__r{_name}__", _NotAnArray._refuse)
for _name in "neg pos abs invert lt le gt ge round divmod rdivmod".split():
    setattr(_NotAnArray, f"__{_name}__", _NotAnArray._refuse)


def _brief(x: Any) -> str:
    """``float32[3,4]`` for an array, the repr of anything else."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return repr(x)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The form of loralib's ``MergedLinear``: factors for each enabled slice.

    The first out axis of the weight is n equal slices (a fused qkv has three), k of
    them enabled.  ``a`` is (*batch, k, *in, r), ``b`` (*batch, k, r, *out) with the
    first of out divided by n; the delta of a slice that is not enabled is zero.

    Attributes:
      enabled: one flag a slice.
    """

    enabled: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The form of loralib's ``ConvLoRA``: the delta is a reshaped product of matrices.

    For a kernel (k, k, in/groups, out), ``a`` is (*batch, in·k, r·k) and ``b``
    (*batch, r·k, out/groups·k).  Such a delta has no low-rank use, so it is formed.

    Attributes:
      shape: of the kernel, without batch axes; None until it is known.
      groups: of the convolution.
    """

    shape: tuple[int, ...] | None = None
    groups: int = 1


Form = Blocks | Kernel


def factor_shapes(
    shape: tuple[int, ...], axes: str, rank: int, form: Form | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a and b for a weight of this shape and these roles.

    Example:
      >>> factor_shapes((5, 3, 4), "bio", 2)
      ((5, 3, 2), (5, 2, 4))
    """
    size: dict[str, list[int]] = {role: [] for role in "bio"}
    for n, role in zip(shape, axes, strict=True):
        size[role].append(n)
    batch, in_, out = size["b"], size["i"], size["o"]
    if isinstance(form, Kernel):
        k, _, channels, features = shape[-4:]
        shared = rank * k
        b = (*batch, shared, features // form.groups * k)
        return (*batch, channels * form.groups * k, shared), b
    if isinstance(form, Blocks):
        batch = [*batch, sum(form.enabled)]
        out = [out[0] // len(form.enabled), *out[1:]]
    return (*batch, *in_, rank), (*batch, rank, *out)


def bias_shape(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """The shape of c for a weight of this shape and these roles: batch, then out.

    Example:
      >>> bias_shape((5, 3, 4), "bio")
      (5, 4)
    """
    pairs = list(zip(shape, axes, strict=True))
    return tuple(n for role in "bo" for n, own in pairs if own == role)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoRA(_NotAnArray):
    """A weight ``w`` with a low-rank delta: W + scale * a·b (arXiv:2106.09685, eq. 3).

    Attributes:
      w: the base array, frozen; None in an adapter, in a hole of a partition, or where
        the base was dropped.
      a: (*batch, *in, r), float32 whatever the base's dtype.
      b: (*batch, r, *out), likewise.
      scale: (*batch) float32, alpha / rank; data, so that turning an adapter up,
        down or off does not recompile.
      c: (*batch, *out) output bias of the low-rank branch, or None: a product of x
        with the weight has scale * c added to it.
      key: (*batch) typed PRNG keys of the dropout on the activation, or None.
      mean: (*batch) or (*batch, *out) float32, of the base's values; None until `fade`
        wants it.
      std: likewise, their standard deviation.
      roles: static; one letter an axis of the weight, from the end.
      rate: static; the dropout rate that belongs to ``key``.
      form: static; None for a and b as above, or how else they make the delta.
      bias: static; where the bias of the weight's layer stands, as a path from where
        the weight stands, such as "bias"; None if it has none.
      dropped: static; the dtype of a base that was dropped, so that ``w`` is zero.

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
    key: Any = None
    mean: Any = None
    std: Any = None
    roles: str = "io"
    rate: float = 0.0
    form: Form | None = None
    bias: str | None = None
    dropped: Any = None

    @property
    def ndim(self) -> int:
        """Number of axes of the weight, known from it or from the factors alone."""
        if self.w is not None:
            return len(self.w.shape)
        if isinstance(self.form, Kernel):
            return self.a.ndim + 2
        blocks = isinstance(self.form, Blocks)
        return self.a.ndim - 1 - blocks + self.roles.count("o")

    @property
    def axes(self) -> str:
        """The role of each axis of the weight, e.g. ``"bio"`` for a stacked Dense."""
        return self.roles.rjust(self.ndim, "b")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, with or without the base."""
        if self.w is not None:
            return tuple(self.w.shape)
        axes, a, b = self.axes, list(self.a.shape), list(self.b.shape)
        n = axes.count("b")
        if isinstance(self.form, Kernel):
            return (*a[:n], *(self.form.shape or ()))
        if isinstance(self.form, Blocks):
            del a[n], b[n]
            b[n + 1] *= len(self.form.enabled)
        sizes = {"b": iter(a[:n]), "i": iter(a[n:-1]), "o": iter(b[n + 1 :])}
        return tuple(next(sizes[role]) for role in axes)

    @property
    def dtype(self) -> Any:
        """The weight's dtype; AttributeError without a base."""
        return self.w.dtype if self.dropped is None else self.dropped

    @property
    def rank(self) -> int:
        """r, the size of the axis that ``a`` and ``b`` share."""
        shared = self.a.shape[-1]
        if isinstance(self.form, Kernel) and self.form.shape:
            return shared // self.form.shape[0]
        return shared

    def __repr__(self) -> str:
        names = ["w", "a", "b"] + (["c"] if self.c is not None else [])
        fields = ", ".join(f"{n}={_brief(getattr(self, n))}" for n in names)
        form = f", form={self.form}" if self.form else ""
        if self.dropped is not None:
            form += f", dropped={self.dropped}"
        return f"LoRA({fields}, roles={self.roles!r}{form})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Full(_NotAnArray):
    """A whole array that trains, for heads and biases, beside its base.

    Attributes:
      w: the base array, frozen; None in an adapter or in a hole of a partition.
      value: what trains: a copy of ``w`` at the start, float32 unless asked otherwise.
      dropped: static; the dtype of a base that was dropped.
    """

    w: Any
    value: Any
    dropped: Any = None

    @property
    def ndim(self) -> int:
        """Number of axes of the array."""
        return len(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape, with or without the base."""
        return tuple((self.value if self.w is None else self.w).shape)

    @property
    def dtype(self) -> Any:
        """The dtype that the model sees: the base's."""
        return self.w.dtype if self.dropped is None else self.dropped

    def __repr__(self) -> str:
        return f"Full(w={_brief(self.w)}, value={_brief(self.value)})"


Adapted = LoRA | Full

jax.tree_util.register_dataclass(
    LoRA,
    data_fields=["w", "a", "b", "scale", "c", "key", "mean", "std"],
    meta_fields=["roles", "rate", "form", "bias", "dropped"],
)
jax.tree_util.register_dataclass(
    Full, data_fields=["w", "value"], meta_fields=["dropped"]
)


def trained(leaf: Adapted) -> tuple[str, ...]:
    """The fields of an adapted leaf that train; all others are frozen.

    Example:
      >>> trained(Full(None, 1.0))
      ('value',)
    """
    if isinstance(leaf, Full):
        return ("value",)
    return ("a", "b") if leaf.c is None else ("a", "b", "c")


def missing(leaf: Adapted) -> list[str]:
    """The fields that an adapted leaf lacks, as an adapter or a partition's half does.

    Example:
      >>> missing(Full(None, 1.0))
      ['w']
    """
    names = ("w", "a", "b", "scale") if isinstance(leaf, LoRA) else ("w", "value")
    names = names[leaf.dropped is not None :]
    return [name for name in names if getattr(leaf, name) is None]


def is_adapted(x: Any) -> bool:
    """Whether x is an adapted leaf; the ``is_leaf`` of every tree function here.

    Example:
      >>> import jax, jlora
      >>> jax.tree.leaves({"bias": jlora.Full(1.0, 2.0)}, is_leaf=jlora.is_adapted)
      [Full(w=1.0, value=2.0)]
    """
    return isinstance(x, (LoRA, Full))
