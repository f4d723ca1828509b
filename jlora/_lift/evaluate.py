"""Evaluates a jaxpr some of whose values are adapted leaves.

An equation without adapted operands is bound unchanged.  Otherwise the rule for its
primitive computes with (w, a, b).  A use without a rule materialises the weight, with a
warning.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._algebra.slots import Slot
from jlora._algebra.weight import dense
from jlora._leaf import Bare, Full, LoRA, base
from jlora._leaf.forms import NotFactored
from jlora._lift.shared import Products


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaf"],
    meta_fields=["paths", "taken", "at", "coded"],
)
@dataclasses.dataclass(frozen=True)
class Tracked:
    """An adapted leaf, or a base that nothing adapts, on its way through the jaxpr.

    Attributes:
      leaf: the leaf after the operations so far.
      paths: static; the paths of the weights from which it was made.
      taken: static; whether it holds a matrix for each token, taken from a stack.
      at: static; which input of the function it is; None once it was changed.
      coded: static; whether its base is an array of codes, which the function makes a
        weight of.  The delta is one of that weight: it joins where it is used.
    """

    leaf: Any
    paths: tuple[str, ...]
    taken: bool = False
    at: int | None = None
    coded: bool = False

    @property
    def name(self) -> str:
        """The paths, for messages."""
        return " + ".join(self.paths)

    @property
    def bare(self) -> bool:
        """Whether it is a base that nothing adapts."""
        return isinstance(self.leaf, Bare)

    def now(self, leaf: Any) -> Tracked:
        """The result of an operation on this leaf, with the same paths."""
        return dataclasses.replace(self, leaf=leaf, at=None)


# The rules by the names of primitives.  fn(evaluation, equation, *operands) returns the
# results of the equation, or raises NotFactored.
RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the rule for the primitives with these names."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


class Evaluation:
    """One evaluation of a function: its policy, and the uses of weights so far.

    Attributes:
      strict: whether to raise if a weight would be materialised.
      gate: None, or what `_algebra.use.gated` takes: which ranks each token has.
      slots: where the factors of some weights are in a bank; by path.
      seen: the uses so far, and whether each formed the weight; by path.
      uses: the number of uses of each leaf, by the leaf's paths.
      rows: the most rows of an activation that met a weight in a product or lookup, or
        infinity if it has other uses; by path.
      ranks: of the leaves as they were passed; by path.
    """

    def __init__(
        self, strict: bool, gate: Any = None, slots: Mapping[str, Slot] | None = None
    ):
        self.strict = strict
        self.gate = gate
        self.slots = slots or {}
        self.seen: dict[str, list[tuple[str, bool]]] = {}
        self.uses: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.rows: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self._frames: list[_Frame] = []
        self._formed: dict[str, list[Tracked]] = {}

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
        """The input of the low-rank branch of a product with x, as keywords.

        It is ``h``, which is x·a, if x·a was computed together with that of other
        weights.  Else it is ``aside``: a copy of x, the same for all its products.

        With the copy, the backward pass sums the low-rank gradients of x first, then
        adds them once to the base's gradient.  On a mesh the gradients of the base
        products are sums over devices.  Without a low-rank gradient between them, they
        are summed together, as without adapters.
        """
        frame = self._frames[-1]
        if (h := frame.products.joined(eqn)) is not None:
            return {"h": h}
        if id(x) not in frame.asides:  # x is stored, too, so that no other gets its id
            frame.asides[id(x)] = x, _compat.copied(x)
        return {"aside": frame.asides[id(x)][1]}

    def unbroadcast(self, v: Any) -> tuple[Any, list[int]]:
        """An operand without the axes along which it was broadcast, or that are units.

        Returns:
          The array, and which axis of the operand each of its axes is.
        """
        return self._frames[-1].unbroadcast(v)

    def note(
        self, x: Tracked, name: str, *, formed: bool = False, rows: float = math.inf
    ) -> None:
        """Records a use."""
        for path in x.paths:
            self.seen.setdefault(path, []).append((name, formed))
            self.rows[path] = max(rows, self.rows.get(path, 0))
        self.uses[x.paths] += 1

    def whole(self, x: Tracked) -> bool:
        """Whether the ranks of a leaf are still those of one weight, in their order.

        Those of several slots are told apart by their place.
        """
        return not x.taken and self.ranks.get(x.name) == x.leaf.rank

    def materialise(self, x: Any, name: str) -> Any:
        """The merged array of a `Tracked` leaf; anything else unchanged.

        `warn` says that the weight of a `LoRA` leaf is formed.

        Raises:
          ValueError: the policy is strict, or the leaf has an output bias or codes.
        """
        if not isinstance(x, Tracked):
            return x
        if isinstance(x.leaf, LoRA):
            text = f"{x.name!r} is used by {name!r}, which has no low-rank form"
            if self.gate is not None:
                raise ValueError(
                    f"{text} in which each token has an adapter of its own: expected a "
                    "product or a lookup of the weight alone. Exclude this path, or "
                    "give one id for each example, and no product='joined'."
                )
            if x.leaf.c is not None:
                raise ValueError(
                    f"{text}, and there its output bias has no place: expected it in "
                    "products, convolutions and lookups of whole in axes only. Wrap "
                    "this path with lora_bias=False, or exclude it."
                )
            if x.coded:
                raise ValueError(
                    f"{text}, before it is a weight: its base is an array of codes, "
                    "such as int8, to which nothing can be added. Exclude this path, "
                    "or pass the params with this weight dequantised."
                )
            if self.strict:
                raise ValueError(
                    f"{text}, and strict=True: exclude this path from the plan, use "
                    "the weight in a product, or lift without strict to have "
                    "W + scale·a·b formed for it."
                )
            self._formed.setdefault(name, []).append(x)
        if not x.bare:
            self.note(x, name, formed=isinstance(x.leaf, LoRA))
        return dense(x.leaf)

    def warn(self) -> None:
        """Warns of all weights that were formed, once for all."""
        if not self._formed:
            return
        said = []
        for name, leaves in self._formed.items():
            names = [*dict.fromkeys(f"{x.name!r}" for x in leaves)]
            some = ", ".join(names[:5])
            some += f" and {len(names) - 5} more" if len(names) > 5 else ""
            verb = "is" if len(names) == 1 else "are"
            said.append(f"{some} {verb} used by {name!r}, which has no low-rank form")
        dropout = any(
            x.leaf.dropout is not None
            for leaves in self._formed.values()
            for x in leaves
        )
        warnings.warn(
            f"{'; '.join(said)}: W + scale·a·b is formed for it, and its gradient with "
            f"it{', without dropout' if dropout else ''}. Exclude the path, or pass "
            "strict=True to make this an error.",
            stacklevel=2,
        )


class _Frame:
    """One jaxpr under evaluation: its values so far.

    Attributes:
      env: the values of the variables.
      done: the ids of the equations that were evaluated.
      formed: the arrays of the leaves that were materialised, by the leaf's id.
      asides: x and its copy for the low-rank branch, by the id of x.
      products: the products of this jaxpr, some of which share x·a.
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
        """The leaf of a variable; None if it is not a leaf, or not evaluated yet."""
        x = None if isinstance(v, _compat.Literal) else self.env.get(v)
        return x.leaf if isinstance(x, Tracked) else None

    def unbroadcast(self, v: Any) -> tuple[Any, list[int]]:
        """See `Evaluation.unbroadcast`."""
        if not isinstance(v, _compat.Literal) and (eqn := self.products.made.get(v)):
            if eqn.primitive.name == "broadcast_in_dim":
                x, axes = self.unbroadcast(eqn.invars[0])
                return x, [eqn.params["broadcast_dimensions"][k] for k in axes]
            if eqn.primitive.name == "convert_element_type":
                x, axes = self.unbroadcast(eqn.invars[0])
                return lax.convert_element_type(x, eqn.params["new_dtype"]), axes
        x, shape = self.read(v), v.aval.shape
        x = dense(x.leaf) if isinstance(x, Tracked) else x
        axes = [k for k, n in enumerate(shape) if n != 1]
        return jnp.reshape(x, [shape[k] for k in axes]), axes

    def evaluate(self, eqn: Any) -> None:
        if id(eqn) in self.done:  # evaluated ahead of its turn, by `products`
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
            if isinstance(v, Tracked) and not v.bare:
                if id(v) not in self.formed:
                    self.formed[id(v)] = ev.materialise(v, name)
                else:
                    ev.note(v, name, formed=True)
                values[i] = self.formed[id(v)]
        return _used(eqn, values)


def _used(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation, with the arrays of its bare bases made for it alone."""
    at = [i for i, v in enumerate(values) if isinstance(v, Tracked)]
    if not at:
        return _compat.bind(eqn, values)
    rest = [i for i in range(len(values)) if i not in at]

    def fn(*args: Any) -> tuple[Any, ...]:
        operands = dict(zip([*at, *rest], args, strict=True))
        return tuple(_compat.bind(eqn, [operands[i] for i in range(len(args))]))

    bases = [values[i].leaf.w for i in at]
    return list(base.use_all(bases, fn, *(values[i] for i in rest)))
