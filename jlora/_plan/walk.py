"""A walk over a jaxpr, equation by equation, that knows where its weights are.

`STEPS` has a function for each primitive that uses a weight or calls another jaxpr.
They are in `uses` and in `watch`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jlora import _compat
from jlora._plan.moves import MOVES
from jlora._plan.seen import DATA, Axes, Data, Origin, Product, Seen, Use, Weight

# fn(walk, equation, infos) gives the infos of the outputs, or None to leave it to
# `Walk.general`.
Step = Callable[["Walk", Any, list[Any]], "list[Any] | None"]
STEPS: dict[str, Step] = {}
# What these give from a product is still the product, to which a bias may be added.
KEEPS_PRODUCT = frozenset(
    "reshape transpose convert_element_type squeeze expand_dims broadcast_in_dim copy "
    "sharding_constraint name reduce_precision mul psum psum_invariant rev".split()
)


def step(*names: str) -> Callable[[Step], Step]:
    """Registers the step for the primitives with these names."""

    def register(fn: Step) -> Step:
        STEPS.update(dict.fromkeys(names, fn))
        return fn

    return register


class Walk:
    """One walk over a jaxpr.

    Attributes:
      seen: what was seen of each path.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}

    def run(self, jaxpr: Any, infos: Sequence[Any]) -> list[Any]:
        """The infos of the outputs, from those of the inputs."""
        jaxpr, _ = _compat.jaxpr_and_consts(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.invars, infos, strict=True))

        def read(v: Any) -> Any:
            return None if isinstance(v, _compat.Literal) else env.get(v)

        for eqn in jaxpr.eqns:
            infos = [read(v) for v in eqn.invars]
            if any(info is not None for info in infos):
                env.update(zip(eqn.outvars, self.apply(eqn, infos), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def apply(self, eqn: Any, infos: list[Any]) -> list[Any]:
        """The infos of an equation's outputs, from those of its operands."""
        own = STEPS.get(eqn.primitive.name, Walk.follow)
        outs = own(self, eqn, infos)
        return self.general(eqn, infos) if outs is None else outs

    def follow(self, eqn: Any, infos: list[Any]) -> list[Any] | None:
        """The infos of a call's outputs, and of any primitive with such a jaxpr."""
        for key in ("jaxpr", "call_jaxpr"):
            body, _ = _compat.jaxpr_and_consts(eqn.params.get(key))
            if hasattr(body, "eqns") and len(body.invars) == len(infos):
                outs = self.run(body, infos)
                return outs if len(outs) == len(eqn.outvars) else None
        return None

    def general(self, eqn: Any, infos: list[Any]) -> list[Any]:
        """The infos of the outputs of a primitive that has no step."""
        infos = met(eqn, infos)
        products = [i for i in infos if isinstance(i, Product)]
        # A product that meets anything but constants is data from there on.
        mixed = len(products) > 1 or any(isinstance(i, (Data, Weight)) for i in infos)
        kept = eqn.primitive.name in KEEPS_PRODUCT and len(eqn.outvars) == 1
        if products and kept and not mixed:
            return [products[0]]
        if eqn.primitive.name == "broadcast_in_dim" and isinstance(infos[0], Data):
            return [_broadcast_data(infos[0], eqn)]
        if any(isinstance(i, (Data, Product)) for i in infos):
            return [DATA] * len(eqn.outvars)
        return [self.moved(eqn, infos, v.aval.shape) for v in eqn.outvars]

    def moved(self, eqn: Any, infos: list[Any], shape: tuple[int, ...]) -> Any:
        """The info of an output of this shape: the weight, with its axes moved."""
        weights = [(i, k) for k, i in enumerate(infos) if isinstance(i, Weight)]
        if not weights:
            return None
        weight, at = weights[0]
        old = eqn.invars[at].aval.shape
        if eqn.primitive.name in ("concatenate", "stack"):
            parts = tuple(part for info, _ in weights for part in info.parts)
            weight = dataclasses.replace(weight, parts=parts, gathers=())
        if (move := MOVES.get(eqn.primitive.name)) is not None:
            return move(weight, eqn, old, shape)
        if shape != old:
            return DATA if weight.perhaps else None
        name = eqn.primitive.name
        # A weight is standardised by what is computed from it: it is the weight still.
        through = weight.through or (None if name in ("add", "sub") else name)
        return dataclasses.replace(weight, through=through)

    def use(
        self,
        weight: Weight,
        name: str,
        roles: dict[int, str],
        read: Any,
        groups: int = 1,
    ) -> Product:
        """Records that a primitive gives these roles to a weight's axes.

        Args:
          weight: the weight.
          name: the primitive.
          roles: role by axis of the value that it reads.
          read: the shape and dtype of that value.
          groups: a convolution's number of groups.
        """
        paths = weight.paths
        decoded = weight.scaled and jnp.issubdtype(read.dtype, jnp.floating)
        for i, (path, axes) in enumerate(weight.parts):
            mixed = tuple(p for p in paths if p != path) if weight.mixed else ()
            own = _original(axes, roles)
            use = Use(name, own, None, weight.through, mixed, groups, decoded)
            if weight.gathers:  # rows: the first use counts, beside their lookup
                weight.gathers[i].rows = weight.gathers[i].rows or use
            else:
                self.seen.setdefault(path, Seen()).uses.append(use)
        out = math.prod(n for k, n in enumerate(read.shape) if roles.get(k) == "o")
        return Product(paths, out)

    def rows(self, weight: Weight, fn: Callable[[Axes], Sequence[Origin]]) -> Weight:
        """The rows that the lookup just recorded takes out; their next use decides."""
        uses = tuple(self.seen[path].uses[-1] for path, _ in weight.parts)
        return dataclasses.replace(weight.move(fn), gathers=uses)


def met(eqn: Any, infos: list[Any]) -> list[Any]:
    """The infos, in which rows that meet another operand become lookup results."""
    if len([i for i in infos if i is not None]) < 2:
        return infos
    return [
        i.as_product(v.aval.shape) if isinstance(i, Weight) and i.gathers else i
        for i, v in zip(infos, eqn.invars, strict=True)
    ]


def _broadcast_data(data: Data, eqn: Any) -> Data:
    """The info of data that is broadcast."""
    dims, old = eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape
    new = eqn.params["shape"]
    own = range(len(old)) if data.axes is None else data.axes
    return Data(frozenset(dims[k] for k in own if old[k] == new[dims[k]] != 1))


def _original(axes: Sequence[Origin], roles: dict[int, str]) -> dict[int, str]:
    """The roles by axis of the parameter, from those by axis of the value."""
    return {o: roles[k] for k, ax in enumerate(axes) if k in roles for o in ax}
