"""Evaluates a jaxpr some of whose values are adapted leaves.

Equation by equation: one without adapted operands is bound as it stands; for one with
them the rule for its primitive computes with (w, a, b).  A use without a rule
materialises the weight, and says so.  The rules are in `_rules`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora import _algebra, _compat, _ops
from jlora._leaf import Full, LoRA


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["path"]
)
@dataclasses.dataclass(frozen=True)
class Tracked:
    """An adapted leaf on its way through the jaxpr, with its path for messages."""

    leaf: Any
    path: str


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
    """One evaluation of a function: the policy and what has been seen so far."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.seen: dict[str, list[tuple[str, bool]]] = {}
        self.uses: collections.Counter[str] = collections.Counter()
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

        Either ``h``, its x·a, where that was computed with those of other weights; or
        ``aside``: x for the low-rank branch, the same for all weights that x meets.
        What the branches send back to it is added up by itself, and to the rest once.
        So the parts that the base products send back, which on a mesh are summed over
        devices, stay together, and are summed in one go, as they are without adapters.
        """
        frame = self._frames[-1]
        if (h := frame.joined(eqn)) is not None:
            return {"h": h}
        if id(x) not in frame.asides:
            frame.asides[id(x)] = x, _compat.copied(x)
        return {"aside": frame.asides[id(x)][1]}

    def note(self, x: Tracked, name: str, *, formed: bool = False) -> int:
        """Records a use; returns how many uses of the path came before."""
        self.seen.setdefault(x.path, []).append((name, formed))
        self.uses[x.path] += 1
        return self.uses[x.path] - 1

    def materialise(self, x: Any, name: str) -> Any:
        """The merged array of an adapted leaf, with the warning that it is formed."""
        if not isinstance(x, Tracked):
            return x
        if isinstance(x.leaf, LoRA):
            text = f"{x.path!r} is used by {name!r}, which has no low-rank form"
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
                f"{', without dropout' if x.leaf.rate else ''}. "
                "Exclude the path, or pass strict=True to make this an error.",
                stacklevel=2,
            )
        self.note(x, name, formed=isinstance(x.leaf, LoRA))
        return _algebra.dense(x.leaf)


# What may be done to a weight ahead of time, on its way to a product.
_ON_THE_WAY = frozenset(
    "convert_element_type transpose reshape squeeze expand_dims copy name".split()
)


class _Frame:
    """One jaxpr under evaluation: its values so far, and what its equations will do."""

    def __init__(
        self, ev: Evaluation, jaxpr: Any, args: Sequence[Any], consts: Sequence[Any]
    ):
        self.ev, self.eqns = ev, jaxpr.eqns
        self.env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        self.env.update(zip(jaxpr.invars, args, strict=True))
        self.done: set[int] = set()
        self.formed: dict[int, jax.Array] = {}
        self.first: dict[int, jax.Array] = {}
        self.asides: dict[int, tuple[Any, jax.Array]] = {}

    def read(self, v: Any) -> Any:
        return v.val if isinstance(v, _compat.Literal) else self.env[v]

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
                values[i] = _algebra.dense(v.leaf)
        if any(isinstance(v, Tracked) for v in values) and name in RULES:
            try:
                with _compat.context(eqn):
                    out = RULES[name](ev, eqn, *values)
                return list(out) if isinstance(out, (list, tuple)) else [out]
            except _algebra.NotFactored:
                pass
        for i, v in enumerate(values):
            if isinstance(v, Tracked):
                if id(v) not in self.formed:
                    self.formed[id(v)] = ev.materialise(v, name)
                else:
                    ev.note(v, name, formed=True)
                values[i] = self.formed[id(v)]
        return _compat.bind(eqn, values)

    # Products of one activation with several weights, such as attention's q, k and v:
    # all of x·a is one product, so that x is read once for it, and written once by its
    # gradient.

    @functools.cached_property
    def made(self) -> dict[Any, Any]:
        """The equation that makes each variable."""
        return {v: eqn for eqn in self.eqns for v in eqn.outvars}

    @functools.cached_property
    def products(self) -> dict[Any, list[tuple[Any, bool]]]:
        """The products that each value enters, and whether as the second operand."""
        found = collections.defaultdict(list)
        for eqn in self.eqns:
            if eqn.primitive.name == "dot_general":
                for second, v in enumerate(eqn.invars):
                    found[self.name(v)].append((eqn, bool(second)))
        return found

    def name(self, v: Any) -> Any:
        """A name that a value shares with its converted copies of one dtype."""
        eqn = None if isinstance(v, _compat.Literal) else self.made.get(v)
        if eqn is None or eqn.primitive.name != "convert_element_type":
            return id(v)
        return self.name(eqn.invars[0]), eqn.params["new_dtype"]

    def ahead(self, v: Any) -> Any:
        """A value, evaluated now if it is a weight that only has its form changed."""
        if isinstance(v, _compat.Literal) or v in self.env:
            return None if isinstance(v, _compat.Literal) else self.env[v]
        eqn = self.made[v]
        if eqn.primitive.name in _ON_THE_WAY and len(eqn.invars) == 1:
            if isinstance(self.ahead(eqn.invars[0]), Tracked):
                self.evaluate(eqn)
                return self.env[v]
        return None

    def joined(self, eqn: Any) -> jax.Array | None:
        """x·a of a product, computed with those of all products that can share it."""
        if eqn.primitive.name != "dot_general":
            return None
        if id(eqn) not in self.first:
            second = not isinstance(self.ahead(eqn.invars[1]), Tracked)
            x = self.read(eqn.invars[second])
            meets = self.products[self.name(eqn.invars[second])]
            if len(meets) < 2 or isinstance(x, Tracked):
                return None
            factors, shares = {}, {}
            for other, at in meets:
                w = self.ahead(other.invars[not at])
                if id(other) in self.first or not isinstance(w, Tracked):
                    continue
                if (share := _ops.share(w.leaf, x, other.params, at)) is not None:
                    factors[id(other)], shares[id(other)] = w.leaf.a, share
            if (own := shares.get(id(eqn))) is None:
                return None
            group = [k for k, share in shares.items() if share.kind == own.kind]
            if len(group) < 2:
                return None
            hs = _ops.joint(
                [factors[k] for k in group], x, tuple(shares[k] for k in group)
            )
            self.first.update(zip(group, hs, strict=True))
        return self.first[id(eqn)]
