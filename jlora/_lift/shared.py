"""One product x·a for several weights that meet the same activation.

Attention's q, k and v read the same x.  If their factors a are put side by side, x is
read once for all three, and its gradient is written once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._algebra.use import compute_dtype, inlined
from jlora._labels import RANK, order
from jlora._leaf import LoRA
from jlora._leaf.fields import labels

# These primitives may be evaluated ahead of their turn, between a weight and a product.
_ON_THE_WAY = frozenset(
    ["convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "name"]
) | {*_compat.COPY}


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of one weight in a product that several weights share; see `joint`.

    Attributes:
      order: the order of a's axes in the product: the in axes, as ``axes`` has the axes
        that they meet, then the rank.
      axes: the activation's axes that are contracted.
      dtype: the dtype in which the product is computed.
      params: dot_general's parameters, without the dimension numbers.
      factor: the dtype of a, and the mesh axes along which it varies.
    """

    order: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: Any
    params: tuple[tuple[str, Any], ...]
    factor: tuple[Any, ...]

    def joins(self, other: Share) -> bool:
        """Whether both can be one product: they differ at most in their order."""
        return dataclasses.replace(self, order=other.order) == other


def share(leaf: Any, x: Any, params: Any, weight_first: bool) -> Share | None:
    """The part of a dot_general in a shared product; None if it cannot take part.

    It can if x meets all in axes and no others, and the leaf has no batch axes, no
    dropout and the plain form.
    """
    if not isinstance(leaf, LoRA) or leaf.form is not None or leaf.dropout is not None:
        return None
    (lc, rc), (lb, _) = params["dimension_numbers"]
    wc, xc = (lc, rc) if weight_first else (rc, lc)
    ins = {k for k, role in enumerate(leaf.axes) if role == "i"}
    if lb or {*wc} != ins or "b" in leaf.axes or params.get("out_sharding") is not None:
        return None
    pairs = sorted(zip(xc, wc, strict=True))
    own = labels("a", leaf.axes)
    return Share(
        order=tuple(own.index(k) for k in (*(k for _, k in pairs), RANK)),
        axes=tuple(k for k, _ in pairs),
        dtype=compute_dtype(x, leaf),
        params=tuple((k, v) for k, v in params.items() if k != "dimension_numbers"),
        factor=(leaf.a.dtype, _compat.varying(leaf.a)),
    )


@functools.partial(inlined, static_argnames=("shares",))
def joint(
    factors: Sequence[jax.Array], x: jax.Array, shares: Sequence[Share]
) -> Sequence[jax.Array]:
    """x·a for each weight, from one product; each has the shape (*rest of x, r)."""
    first = shares[0]
    a = [
        order(a, range(a.ndim), own.order)
        for a, own in zip(factors, shares, strict=True)
    ]
    wide = lax.concatenate([f.astype(first.dtype) for f in a], len(first.axes))
    dims = ((first.axes, tuple(range(len(first.axes)))), ((), ()))
    h = lax.dot_general(x.astype(first.dtype), wide, dims, **dict(first.params))
    return lax.split(h, [f.shape[-1] for f in a], axis=h.ndim - 1)


class Products:
    """The products of one jaxpr, some of which share the computation of x·a.

    Args:
      eqns: the equations of the jaxpr.
      frame: the evaluation of the jaxpr.  It reads variables, knows which of them hold
        leaves, and can evaluate an equation ahead of its turn.
    """

    def __init__(self, eqns: Sequence[Any], frame: Any):
        self._eqns, self._frame = eqns, frame
        self._first: dict[int, jax.Array] = {}

    @functools.cached_property
    def made(self) -> dict[Any, Any]:
        """The equation that makes each variable."""
        return {v: eqn for eqn in self._eqns for v in eqn.outvars}

    @functools.cached_property
    def _entered(self) -> dict[Any, list[tuple[Any, bool]]]:
        """The products that read each value, and whether as their second operand."""
        found = collections.defaultdict(list)
        for eqn in self._eqns:
            if eqn.primitive.name == "dot_general":
                for second, v in enumerate(eqn.invars):
                    found[self._name(v)].append((eqn, bool(second)))
        return found

    def _name(self, v: Any) -> Any:
        """A name for a variable; copies converted to the same dtype share one."""
        eqn = None if isinstance(v, _compat.Literal) else self.made.get(v)
        if eqn is None or eqn.primitive.name != "convert_element_type":
            return id(v)
        return self._name(eqn.invars[0]), eqn.params["new_dtype"]

    def _weight(self, v: Any) -> Any:
        """The leaf of a variable, evaluated now if only `_ON_THE_WAY` is left to do."""
        if isinstance(v, _compat.Literal) or v in self._frame.env:
            return self._frame.weight(v)
        eqn = self.made[v]
        if eqn.primitive.name in _ON_THE_WAY and len(eqn.invars) == 1:
            if self._weight(eqn.invars[0]) is not None:
                self._frame.evaluate(eqn)
                return self._frame.weight(v)
        return None

    def joined(self, eqn: Any) -> jax.Array | None:
        """x·a of a product, if it shares the computation with others; else None."""
        if eqn.primitive.name != "dot_general":
            return None
        if id(eqn) not in self._first:
            self._join(eqn)
        return self._first.get(id(eqn))

    def _join(self, eqn: Any) -> None:
        """Computes x·a for a product and all that can share it, if there are any."""
        second = self._weight(eqn.invars[1]) is None
        v = eqn.invars[second]
        meets = self._entered[self._name(v)]
        if len(meets) < 2 or self._frame.weight(v) is not None:
            return
        x = self._frame.read(v)
        factors, shares = {}, {}
        for other, at in meets:
            leaf = self._weight(other.invars[not at])
            if id(other) in self._first or leaf is None:
                continue
            if (own := share(leaf, x, other.params, at)) is not None:
                factors[id(other)], shares[id(other)] = leaf.a, own
        if (own := shares.get(id(eqn))) is None:
            return
        group = [k for k, other in shares.items() if other.joins(own)]
        if len(group) < 2:
            return
        hs = joint([factors[k] for k in group], x, tuple(shares[k] for k in group))
        self._first.update(zip(group, hs, strict=True))
