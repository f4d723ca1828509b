"""Rule and Spec: how one weight is adapted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jlora._leaf import fields, forms
from jlora._leaf.forms import Form
from jlora._tree.patterns import Pattern


class Default(int):
    """A default value in a signature, so that it differs from one that a user gives."""


RANK = Default(8)

# What a rule may decide besides rank and alpha, else `wrap` for all weights.
OPTIONS = "init", "rslora", "dora", "lora_bias"
# Those that are flags, each with the field of the leaf that it adds.
FLAGS = {"rslora": "", "dora": "m", "lora_bias": "c"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the paths of a pattern get instead of the defaults; the first match wins.

    What a rule matches is a target, too, even if it is an embedding.

    Attributes:
      pattern: a glob, a compiled regular expression or (path, array) -> bool.
      rank: r of these leaves; None for the default.
      alpha: alpha of these leaves.  None for the default; or for alpha = rank, if the
        rule gives a rank.
      init: how these leaves start, as in `wrap`; None for the ``init`` of `wrap`.
      rslora: whether their scale is alpha / √rank; None for the ``rslora`` of `wrap`.
      dora: whether they have a magnitude; None for the ``dora`` of `wrap`.
      lora_bias: whether they have an output bias; None for the ``lora_bias`` of `wrap`.
      form: form of these leaves, one of `jlora.loralib`'s; None for a·b.
      axes: the roles of these leaves' axes, one letter for each: b for a batch axis, i
        for one that is contracted, o for one that comes out; such as ``"bio"`` for
        experts.  None if a plan, or the tree, tells them.  They are checked against the
        use.

    Example:
      >>> import jlora
      >>> jlora.Rule("**/query/kernel", rank=16, alpha=32).rank
      16
    """

    pattern: Pattern
    rank: int | None = None
    alpha: float | None = None
    init: Any = None
    rslora: bool | None = None
    dora: bool | None = None
    lora_bias: bool | None = None
    form: Form | None = None
    axes: str | None = None

    def __post_init__(self) -> None:
        if self.axes is not None and not (
            isinstance(self.axes, str) and {"i", "o"} <= {*self.axes} <= {*"bio"}
        ):
            raise ValueError(
                f"Rule({self.pattern!r}): axes {self.axes!r}: expected one letter for "
                "each axis of the weight, b, i or o, with an i and an o, such as 'bio'."
            )
        if self.rank is not None:
            check_rank(self.rank, f"Rule({self.pattern!r})")
        check_flags(self, f"Rule({self.pattern!r})")


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one weight is adapted.

    Attributes:
      kind: "dense", "embed" or "conv".
      rank: r; None if the user did not give it.
      alpha: the delta is alpha / rank * a·b; None, if not given, for alpha = rank.
      batch_axes: the weight's batch axes, counted from the end.
      in_axes: its in axes, likewise.
      out_axes: its out axes, likewise.
      bias: path of the bias that belongs to the weight, or None.  It is the array that
        the watched function adds to the weight's product.  If no such array was seen,
        or nothing was watched, it is the ``bias`` or ``b`` beside the weight.
      form: as in `Rule`.
      init: as in `Rule`.
      rslora: as in `Rule`.
      dora: as in `Rule`.
      lora_bias: as in `Rule`.
      told: what told the roles, if no use of the weight was seen: "class", "name or
        shape", or "rule"; else empty.
      groups: a convolution's number of groups, as far as it was seen.
      tied: whether an embedding was seen in a product, too, as a tied head is.
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
    told: str = ""
    init: Any = None
    rslora: bool | None = None
    dora: bool | None = None
    groups: int = 1
    tied: bool = False

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
        told: str = "",
    ) -> Spec:
        """A spec from one letter for each axis, e.g. ``"bio"``."""
        batch, in_, out = (
            tuple(k - len(axes) for k, c in enumerate(axes) if c == role)
            for role in "bio"
        )
        spec = cls(kind, None, None, batch, in_, out, bias, form, lora_bias, told)
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

    def with_options(self, source: Any) -> Spec:
        """This spec with the options of a `Rule`, or of a mapping, that it lacks."""
        said = source if isinstance(source, Mapping) else vars(source)
        own = {name: said[name] for name in OPTIONS if getattr(self, name) is None}
        return dataclasses.replace(self, **own)

    def resolved(self) -> Spec:
        """This spec with the defaults for a rank or alpha of None."""
        rank = int(RANK) if self.rank is None else self.rank
        return self.with_scale(rank, rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """alpha / rank, which multiplies a·b; alpha / √rank with rslora."""
        spec = self.resolved()
        assert spec.alpha is not None and spec.rank is not None
        return spec.alpha / (math.sqrt(spec.rank) if self.rslora else spec.rank)

    @property
    def variant(self) -> str:
        """What it has besides rank and alpha, such as ``"rslora, dora"``."""
        words = [name for name in FLAGS if getattr(self, name)]
        if self.init is not None:
            words.append(getattr(self.init, "__name__", str(self.init)))
        return ", ".join(words)

    @property
    def layer(self) -> str:
        """The kind of its layer, as `LoRA` has it: "dense", "conv/4", "embed/tied"."""
        if self.tied:
            return f"{self.kind}/tied"
        return f"{self.kind}/{self.groups}" if self.groups > 1 else self.kind

    @property
    def axes(self) -> str:
        """The roles as one letter for each axis, e.g. ``"bio"``."""
        role = dict.fromkeys(self.batch_axes, "b") | dict.fromkeys(self.in_axes, "i")
        role |= dict.fromkeys(self.out_axes, "o")
        return "".join(role[k] for k in range(-len(role), 0))

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of a, b, scale, c and m for a weight of this shape, by field."""
        rank = self.resolved().rank
        assert rank is not None
        found = fields.shapes(shape, self.axes, rank, self.form)
        wanted = {field for name, field in FLAGS.items() if getattr(self, name)}
        return {name: found[name] for name in fields.made(wanted)}

    def fan_in(self, shape: Sequence[int]) -> int:
        """How many inputs the factor a sums over, for a weight of this shape."""
        return forms.of(self.form).fan_in(tuple(shape), self.axes)

    def size(self, shape: Sequence[int]) -> int:
        """Number of adapter parameters for a weight of this shape."""
        return sum(
            math.prod(own)
            for name, own in self.shapes(shape).items()
            if fields.LORA[name].trains
        )


def check_rank(rank: Any, where: str) -> int | None:
    """The rank, or None for a `Default`; raises unless it is a positive integer."""
    if hasattr(rank, "specs"):  # a Plan, whose module imports this one
        raise TypeError(
            f"{where}: a plan goes in by keyword, plan=plan, found it as rank."
        )
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1:
        # A tree, which belongs before the rank, would fill the screen.
        said = f" {rank!r}" if isinstance(rank, (bool, int, float, str)) else ""
        raise ValueError(
            f"{where}: rank{said}: expected a positive integer, found "
            f"{type(rank).__name__}{said}; the params come before it, and to leave a "
            "weight as it is, exclude its path."
        )
    return None if isinstance(rank, Default) else int(rank)


def check_flags(said: Any, where: str) -> None:
    """Raises unless every flag is a boolean, or None in a rule."""
    for name in FLAGS:
        if (flag := getattr(said, name)) not in (None, True, False):
            raise TypeError(f"{where}: {name} {flag!r}: expected True, False or None.")


def fitted(
    form: Form | None, where: str, shape: tuple[int, ...], axes: str, kind: str
) -> Form | None:
    """The form, completed with what it needs to know of the weight.

    Raises:
      TypeError: ``form`` is not a form.
      ValueError: the weight cannot have this form.
      AdaptsNothing: this form would not change the weight.
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
        raise  # a Misfit as well, but no error to `select`, which skips the leaf
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

    # One \0, which is no letter of an einsum, for each axis that the ellipsis covers.
    named = w.replace("...", "\0" * rest)
    return "".join(role("..." if c == "\0" else c) for c in named)
