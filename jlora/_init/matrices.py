"""A weight as a stack of matrices (in, out), and its factors from theirs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora._algebra.delta import delta
from jlora._labels import by_role, order
from jlora._leaf import LoRA, base
from jlora._leaf.forms import Misfit
from jlora._plan.spec import Spec

# From the matrix (in, out) in float32, and the rank, to factors (in, r) and (r, out).
Split = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


def exact(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y at full precision."""
    return jnp.matmul(x, y, precision="highest")


def rank_of(spec: Spec) -> int:
    """The rank of a spec, the default if it was not given."""
    rank = spec.resolved().rank
    assert rank is not None
    return rank


@dataclasses.dataclass(frozen=True)
class Matrices:
    """A weight of this shape as a stack of matrices.

    Attributes:
      shape: the weight's shape.
      axes: the roles of its axes, one letter for each.
      form: whether it is adapted in another form than a pair of factors.
    """

    shape: tuple[int, ...]
    axes: str
    form: bool = False

    @classmethod
    def of(cls, w: Any, spec: Spec) -> Matrices:
        """From a base and the spec."""
        return cls(tuple(w.shape), spec.axes, spec.form is not None)

    def sizes(self, role: str) -> list[int]:
        """The sizes of the axes of a role."""
        return [self.shape[k] for k in by_role(role, self.axes)]

    @property
    def size(self) -> tuple[int, int]:
        """The size of each matrix, (in, out)."""
        return math.prod(self.sizes("i")), math.prod(self.sizes("o"))

    def check(self, rank: int, what: str, *, outs: bool = True) -> None:
        """Raises unless each matrix has this rank, and the delta is a plain a·b.

        Args:
          rank: the wanted rank.
          what: the initialiser's name.
          outs: whether the number of outputs limits the rank, too.

        Raises:
          Misfit: the rank is too large, or the weight has a form of its own.
        """
        if self.form:
            raise Misfit(f"a weight whose delta is a plain a·b for {what}")
        i, o = self.size
        if rank > (most := min(i, o) if outs else i):
            raise Misfit(
                f"a rank of at most {most}, since as a matrix the weight is "
                f"{i} × {o}, found {rank}"
            )

    def take(self, w: jax.Array) -> jax.Array:
        """(batch, in, out), in float32 or wider."""
        wide = jnp.promote_types(w.dtype, jnp.float32)
        w = order(w, range(w.ndim), by_role("bio", self.axes))
        return w.astype(wide).reshape(-1, *self.size)

    def put(self, matrices: jax.Array) -> jax.Array:
        """An array of the weight's shape from its matrices (batch, in, out)."""
        lies = by_role("bio", self.axes)
        x = matrices.reshape([self.shape[k] for k in lies])
        return order(x, lies, range(len(lies)))

    def factors(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weight's factors, from those of its matrices."""
        batch, r = self.sizes("b"), a.shape[-1]
        a = a.reshape(*batch, *self.sizes("i"), r)
        return a, b.reshape(*batch, r, *self.sizes("o"))


def moved(w: Any, spec: Spec, split: Split) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The base without scale * a·b, and a and b, which `split` takes from its matrices.

    The difference is computed in float32 and rounded once.  Matrices of a stack are
    split one after the other, so that one of them is in memory at a time.
    """
    m, rank, w = Matrices.of(w, spec), rank_of(spec), base.array(w)
    matrices = m.take(w)
    if len(matrices) == 1:
        a, b = split(matrices[0], rank)
    else:
        a, b = jax.lax.map(lambda x: split(x, rank), matrices)
    a, b = m.factors(a, b)
    own = jnp.full(m.sizes("b"), spec.scale, matrices.dtype)
    d = delta(LoRA(None, a, b, own, roles=spec.axes.lstrip("b")))
    return (w.astype(d.dtype) - d).astype(w.dtype), a, b


def positive(spec: Spec, what: str) -> None:
    """Raises unless the scale is positive.

    Raises:
      Misfit: it is zero or negative, so that no part of the base can move.
    """
    if not spec.scale > 0:
        raise Misfit(f"a positive alpha for {what}, found {spec.alpha}")
