"""Rule and Spec: with what one weight is adapted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jlora._leaf import fields, forms
from jlora._leaf.forms import Form
from jlora._tree.patterns import Pattern


class Default(int):
    """A number that nobody gave, in a signature; it yields to any that is given."""


RANK = Default(8)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the paths of a pattern get instead of the defaults; the first match wins.

    A rule also makes a target of what it matches, such as an embedding.

    Attributes:
      pattern: a glob, a compiled regular expression or (path, array) -> bool.
      rank: of these leaves; None for the default.
      alpha: of these leaves; None for the default, and for alpha = rank where only the
        rank is given.
      form: of these leaves; None for a·b, or one of `jlora.loralib`'s.
      lora_bias: whether these leaves have an output bias; None for what `wrap` says.

    Example:
      >>> import jlora
      >>> jlora.Rule("**/query/kernel", rank=16, alpha=32).rank
      16
    """

    pattern: Pattern
    rank: int | None = None
    alpha: float | None = None
    form: Form | None = None
    lora_bias: bool | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_rank(self.rank, f"Rule({self.pattern!r})")
        if self.lora_bias not in (None, True, False):
            raise TypeError(
                f"Rule({self.pattern!r}): lora_bias {self.lora_bias!r}: expected True, "
                "False or None."
            )


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one weight is adapted.

    Attributes:
      kind: "dense", "embed" or "conv".
      rank: r; None in a `Plan`'s own ``specs`` where nothing was said.
      alpha: the delta is alpha / rank * a·b; None where nothing was said: the rank.
      batch_axes: the weight's batch axes, counted from the end.
      in_axes: its in axes, likewise.
      out_axes: its out axes, likewise.
      bias: path of the bias that belongs to the weight, or None: the array that was
        seen to be added to its product; where the product was lost sight of before, or
        nothing was watched, the array named ``bias`` or ``b`` beside the weight.
      form: of the adapted leaf, as in `Rule`.
      lora_bias: likewise.
    """

    kind: str
    rank: int | None
    alpha: float | None
    batch_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    bias: str | None = None
    form: Form | None = None
    lora_bias: bool | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        axes: str,
        rank: int | None = None,
        alpha: float | None = None,
        bias: str | None = None,
        form: Form | None = None,
        lora_bias: bool | None = None,
    ) -> Spec:
        """A spec from one letter for each axis, e.g. ``"bio"``."""
        batch, in_, out = (
            tuple(k - len(axes) for k, c in enumerate(axes) if c == role)
            for role in "bio"
        )
        spec = cls(kind, None, None, batch, in_, out, bias, form, lora_bias)
        return spec.with_scale(rank, alpha)

    def with_scale(self, rank: int | None, alpha: float | None) -> Spec:
        """This spec with another rank and alpha."""
        if isinstance(alpha, (str, bool)):
            raise TypeError(f"alpha {alpha!r}: expected a number or None.")
        return dataclasses.replace(
            self,
            rank=None if rank is None else int(rank),
            alpha=None if alpha is None else float(alpha),
        )

    def resolved(self) -> Spec:
        """This spec with the defaults where nothing was said."""
        rank = int(RANK) if self.rank is None else self.rank
        return self.with_scale(rank, rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """alpha / rank, which multiplies a·b."""
        spec = self.resolved()
        assert spec.alpha is not None and spec.rank is not None
        return spec.alpha / spec.rank

    @property
    def axes(self) -> str:
        """The roles as one letter for each axis, e.g. ``"bio"``."""
        role = dict.fromkeys(self.batch_axes, "b") | dict.fromkeys(self.in_axes, "i")
        role |= dict.fromkeys(self.out_axes, "o")
        return "".join(role[k] for k in range(-len(role), 0))

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of a, b, scale and c for a weight of this shape, by field."""
        rank = self.resolved().rank
        assert rank is not None
        found = fields.shapes(shape, self.axes, rank, self.form)
        return {name: found[name] for name in fields.made(bool(self.lora_bias))}

    def fan_in(self, shape: Sequence[int]) -> int:
        """How many inputs a sums over for a weight of this shape."""
        return forms.of(self.form).fan_in(tuple(shape), self.axes)

    def size(self, shape: Sequence[int]) -> int:
        """Parameters of the adapter of a weight of this shape."""
        return sum(
            math.prod(own)
            for name, own in self.shapes(shape).items()
            if fields.LORA[name].trains
        )


def check_rank(rank: Any, where: str) -> int | None:
    """The rank that was given, or None for a default; raises for no positive int."""
    if hasattr(rank, "specs"):
        raise TypeError(
            f"{where}: a plan goes in by keyword, plan=plan, found it as rank."
        )
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1:
        raise ValueError(
            f"{where}: rank {rank!r}: expected a positive integer, found "
            f"{type(rank).__name__} {rank!r}; to leave a weight as it is, exclude its "
            "path."
        )
    return None if isinstance(rank, Default) else int(rank)


def fitted(
    form: Form | None, where: str, shape: tuple[int, ...], axes: str, kind: str
) -> Form | None:
    """The form with all that it takes from the weight.

    Raises:
      TypeError: it is no form.
      ValueError: the weight cannot have it.
      AdaptsNothing: it would leave the weight as it is.
    """
    if form is None:
        return None
    if not forms.is_form(form):
        raise TypeError(
            f"{where}: form {form!r}: expected one such as "
            "jlora.loralib.Blocks((True, False, True)) or jlora.loralib.Kernel()."
        )
    try:
        return form.fits(shape, axes, kind)
    except forms.AdaptsNothing:
        raise
    except forms.Misfit as e:
        raise ValueError(
            f"{where}: {form} does not fit a {kind} weight of shape {shape} and roles "
            f"{axes!r}: expected {e}."
        ) from None


def einsum_axes(text: str, ndim: int) -> str:
    """The roles of the second operand of an einsum, one letter for each axis.

    Example:
      >>> einsum_axes("...ti,...io->...to", 3), einsum_axes("btd,dhk->bthk", 3)
      ('bio', 'ioo')
    """
    operands, out = text.replace(" ", "").split("->")
    x, w = operands.split(",")
    rest = ndim - len(w.replace("...", ""))

    def role(c: str) -> str:
        return ("b" if c in x else "o") if c in out else "i"

    # What stands for the ellipsis has its axes; \0 is no letter of an einsum.
    named = w.replace("...", "\0" * rest)
    return "".join(role("..." if c == "\0" else c) for c in named)
