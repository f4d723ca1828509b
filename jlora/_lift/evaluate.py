"""Evaluates a jaxpr some of whose values are adapted leaves.

An equation without adapted operands is bound as it stands.  For one with them the rule
for its primitive computes with (w, a, b).  A use without a rule materialises the
weight, and says so.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora import _compat
from jlora._algebra.delta import dense
from jlora._leaf import Full, LoRA
from jlora._leaf.forms import NotFactored
from jlora._lift.shared import Products


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["paths"]
)
@dataclasses.dataclass(frozen=True)
class Tracked:
    """An adapted leaf on its way through the jaxpr.

    Attributes:
      leaf: what it is by now.
      paths: static; where the weights stand of which it was made.
    """

    leaf: Any
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """The paths, for a message."""
        return " + ".join(self.paths)

    def now(self, leaf: Any) -> Tracked:
        """The same weights as another leaf."""
        return Tracked(leaf, self.paths)


# fn(evaluation, equation, *operands) gives what the equation gives, or raises
# NotFactored; by the name of the primitive.
RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the rule for the primitives of these names."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


class Evaluation:
    """One evaluation of a function: the policy and what has been seen so far.

    Attributes:
      strict: whether to raise where a weight would be materialised.
      seen: by path the uses so far, and whether each formed the weight.
      uses: how many uses there were of each leaf, by its paths.
    """

    def __init__(self, strict: bool):
        self.strict = strict
        self.seen: dict[str, list[tuple[str, bool]]] = {}
        self.uses: collections.Counter[tuple[str, ...]] = collections.Counter()
        self._frames: list[_Frame] = []

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr on arrays and `Tracked` leaves."""
        jaxpr, consts = _compat.jaxpr_and_consts(jaxpr)
        frame = _Frame(self, jaxpr, args, consts)
        self._frames.append(frame)
        try:
            for eqn in jaxpr.eqns:
                frame.evaluate(eqn)
        finally:
            self._frames.pop()
        return [frame.read(v) for v in jaxpr.outvars]

    def first_product(self, eqn: Any, x: Any) -> dict[str, Any]:
        """What a product of the activation x and a weight starts from, as keywords.

        Either ``h``, which is x·a, where it was computed with those of other weights;
        or ``aside``: x for the low-rank branch, the same for all weights that x meets.

        In the backward pass the low-rank gradients are summed first, then added once to
        the base's gradient.  On a mesh the base products' gradients are sums over
        devices: so they stay together, and are summed at once, as without adapters.
        """
        frame = self._frames[-1]
        if (h := frame.products.joined(eqn)) is not None:
            return {"h": h}
        if id(x) not in frame.asides:
            frame.asides[id(x)] = x, _compat.copied(x)
        return {"aside": frame.asides[id(x)][1]}

    def note(self, x: Tracked, name: str, *, formed: bool = False) -> None:
        """Records a use."""
        for path in x.paths:
            self.seen.setdefault(path, []).append((name, formed))
        self.uses[x.paths] += 1

    def materialise(self, x: Any, name: str) -> Any:
        """The merged array of an adapted leaf, with the warning that it is formed."""
        if not isinstance(x, Tracked):
            return x
        if isinstance(x.leaf, LoRA):
            text = f"{x.name!r} is used by {name!r}, which has no low-rank form"
            if x.leaf.c is not None:
                raise ValueError(
                    f"{text}, and there its output bias has no place: expected it in "
                    "products, convolutions and lookups of whole in axes only. Wrap "
                    "this path with lora_bias=False, or exclude it."
                )
            if self.strict:
                raise ValueError(
                    f"{text}, and strict=True: exclude this path from the plan, use "
                    "the weight in a product, or lift without strict to have "
                    "W + scale·a·b formed for it."
                )
            warnings.warn(
                f"{text}: W + scale·a·b is formed for it, and its gradient with it"
                f"{', without dropout' if x.leaf.dropout is not None else ''}. "
                "Exclude the path, or pass strict=True to make this an error.",
                stacklevel=2,
            )
        self.note(x, name, formed=isinstance(x.leaf, LoRA))
        return dense(x.leaf)


class _Frame:
    """One jaxpr under evaluation: its values so far.

    Attributes:
      env: value by variable.
      done: the equations that were evaluated, by id.
      formed: the array of each leaf that was materialised, by the leaf's id.
      asides: x, and x for the low-rank branch, by the id of x.
      products: what the products of this jaxpr share.
    """

    def __init__(
        self, ev: Evaluation, jaxpr: Any, args: Sequence[Any], consts: Sequence[Any]
    ):
        self.ev = ev
        self.env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        self.env.update(zip(jaxpr.invars, args, strict=True))
        self.done: set[int] = set()
        self.formed: dict[int, jax.Array] = {}
        self.asides: dict[int, tuple[Any, jax.Array]] = {}
        self.products = Products(jaxpr.eqns, self)

    def read(self, v: Any) -> Any:
        return v.val if isinstance(v, _compat.Literal) else self.env[v]

    def weight(self, v: Any) -> Any:
        """The leaf that a variable holds; None for what is none, or not known yet."""
        x = None if isinstance(v, _compat.Literal) else self.env.get(v)
        return x.leaf if isinstance(x, Tracked) else None

    def evaluate(self, eqn: Any) -> None:
        if id(eqn) in self.done:
            return
        self.done.add(id(eqn))
        values = [self.read(v) for v in eqn.invars]
        if Tracked in map(type, values):
            outs = self.apply(eqn, values)
        else:
            outs = _compat.bind(eqn, values)
        self.env.update(zip(eqn.outvars, outs, strict=True))

    def apply(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Evaluates an equation that reads at least one adapted leaf."""
        name, ev = eqn.primitive.name, self.ev
        for i, v in enumerate(values):
            if isinstance(v, Tracked) and isinstance(v.leaf, Full):
                ev.note(v, name)
                values[i] = dense(v.leaf)
        if any(isinstance(v, Tracked) for v in values) and name in RULES:
            try:
                with _compat.context(eqn):
                    out = RULES[name](ev, eqn, *values)
                return list(out) if isinstance(out, (list, tuple)) else [out]
            except NotFactored:
                pass
        for i, v in enumerate(values):
            if isinstance(v, Tracked):
                if id(v) not in self.formed:
                    self.formed[id(v)] = ev.materialise(v, name)
                else:
                    ev.note(v, name, formed=True)
                values[i] = self.formed[id(v)]
        return _compat.bind(eqn, values)
