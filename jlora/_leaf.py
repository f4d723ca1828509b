"""The adapted leaves: what stands in a params tree where an array stood.

Their invariants, in one place:

* ``LoRA.w`` is the base array that the user passed, the same object; only ``a``
  and ``b`` train.  It is the first field.
* The roles of the weight's axes are one static string, counted from the end:
  ``"i"`` for an axis that is contracted with the activation, ``"o"`` for one that
  comes out, ``"b"`` for a batch axis (stacked layers, experts).  Axes that the
  string does not reach lead, and are batch axes.
* ``a`` is (*batch, *in, r) and ``b`` is (*batch, r, *out), each in the order of the
  weight's own axes; ``scale`` and ``key`` are (*batch).

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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoRA(_NotAnArray):
    """A weight ``w`` with a low-rank delta: W + scale * a·b (arXiv:2106.09685, eq. 3).

    Attributes:
      w: the base array, frozen; None in an adapter or in a hole of a partition.
      a: (*batch, *in, r), float32 whatever the base's dtype.
      b: (*batch, r, *out), likewise.
      scale: (*batch) float32, alpha / rank; data, so that turning an adapter up,
        down or off does not recompile.
      key: (*batch) typed PRNG keys of the dropout on the activation, or None.
      roles: static; one letter an axis of the weight, from the end.
      rate: static; the dropout rate that belongs to ``key``.
      form: static; None for a and b as above, or how else they make the delta.

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
    key: Any = None
    roles: str = "io"
    rate: float = 0.0
    form: Form | None = None

    @property
    def ndim(self) -> int:
        """Number of axes of the weight, known from the factors alone."""
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
        return self.w.dtype

    @property
    def rank(self) -> int:
        """r, the size of the axis that ``a`` and ``b`` share."""
        shared = self.a.shape[-1]
        if isinstance(self.form, Kernel) and self.form.shape:
            return shared // self.form.shape[0]
        return shared

    def __repr__(self) -> str:
        fields = ", ".join(f"{n}={_brief(getattr(self, n))}" for n in ("w", "a", "b"))
        form = f", form={self.form}" if self.form else ""
        return f"LoRA({fields}, roles={self.roles!r}{form})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Full(_NotAnArray):
    """A whole array that trains, for heads and biases, beside its base.

    Attributes:
      w: the base array, frozen; None in an adapter or in a hole of a partition.
      value: what trains: a copy of ``w`` at the start, float32 unless asked otherwise.
    """

    w: Any
    value: Any

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
        return self.w.dtype

    def __repr__(self) -> str:
        return f"Full(w={_brief(self.w)}, value={_brief(self.value)})"


Adapted = LoRA | Full

jax.tree_util.register_dataclass(
    LoRA,
    data_fields=["w", "a", "b", "scale", "key"],
    meta_fields=["roles", "rate", "form"],
)
jax.tree_util.register_dataclass(Full, data_fields=["w", "value"], meta_fields=[])


def trained(leaf: Adapted) -> tuple[str, ...]:
    """The fields of an adapted leaf that train; all others are frozen.

    Example:
      >>> trained(Full(None, 1.0))
      ('value',)
    """
    return ("a", "b") if isinstance(leaf, LoRA) else ("value",)


def missing(leaf: Adapted) -> list[str]:
    """The fields that an adapted leaf lacks, as an adapter or a partition's half does.

    Example:
      >>> missing(Full(None, 1.0))
      ['w']
    """
    names = ("w", "a", "b", "scale") if isinstance(leaf, LoRA) else ("w", "value")
    return [name for name in names if getattr(leaf, name) is None]


def is_adapted(x: Any) -> bool:
    """Whether x is an adapted leaf; the ``is_leaf`` of every tree function here.

    Example:
      >>> import jax, jlora
      >>> jax.tree.leaves({"bias": jlora.Full(1.0, 2.0)}, is_leaf=jlora.is_adapted)
      [Full(w=1.0, value=2.0)]
    """
    return isinstance(x, (LoRA, Full))
