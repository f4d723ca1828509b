"""loftq: a quantised base, and factors that take its error."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _qwix
from jlora._algebra.delta import delta
from jlora._init.eva import as_matrices, given, moment
from jlora._init.gptq import gptq
from jlora._init.matrices import Matrices, exact, positive, rank_of
from jlora._init.principal import MESH, largest
from jlora._leaf import LoRA, base
from jlora._leaf.forms import Misfit
from jlora._plan.spec import Spec


def loftq(
    qtype: Any = "nf4",
    steps: int = 1,
    *,
    block: int | None = 64,
    moments: Mapping[str, Any] | None = None,
) -> Any:
    """The base is quantised, and the factors start as what that takes from it.

    LoftQ (arXiv:2310.08659, algorithm 1): in turns, Q is the quantised W - scale * a·b,
    and a·b the best matrix of rank r for W - Q.  The model then starts closer to the
    float one than with a quantised base and a delta of zero.

    By default the best is the closest.  With ``moments`` it is what changes the outputs
    least, for inputs such as were observed: Q is rounded by GPTQ, as in
    `jlora.quantize`, and a·b is what helps the outputs most (CLoQ, arXiv:2501.18475;
    QERA, arXiv:2410.06040, theorem 1).

    An adapter fits this base alone, which the tree has.  `wrap` gets float params.

    Args:
      qtype: as in `jlora.quantize`.
      steps: how many turns, from 1; the paper has up to 5.
      block: as in `jlora.quantize`.
      moments: the second moments of what enters each weight, as `jlora.observe` gives
        them.  On a mesh an array (out, out) of each weight is on every device.  In a
        function that is traced they are not looked at: NaN give NaN.

    Raises:
      ValueError: no such qtype, or number of turns; a block that does not divide; a
        rank above the number of singular values; a scale that is not positive; a weight
        whose delta is no plain a·b, or without moments; a base that is quantised
        already.
      ImportError: qwix is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> tree = jlora.wrap(params, rank=8, init=jlora.initializers.loftq("int4"))
      >>> start = jlora.merge(tree)["kernel"]
      >>> plain = jlora.merge(jlora.wrap(jlora.quantize(params, "int4")))["kernel"]
      >>> error = lambda x: float(jnp.linalg.norm(x - params["kernel"]))
      >>> error(start) < 0.8 * error(plain)
      True
    """
    whole = isinstance(steps, numbers.Integral) and not isinstance(steps, bool)
    if not whole or steps < 1:
        raise ValueError(f"loftq: steps {steps!r}: expected a number of turns, from 1.")
    qtype = _qwix.qtype_named(qtype)
    _qwix.check_block(block, qtype, "loftq")
    own = _LoftQ(qtype, int(steps), block)
    return own if moments is None else _Observed(own, given(moments, "loftq"))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Observed:
    """The initialiser with moments; it needs to know the path."""

    own: _LoftQ
    moments: Mapping[str, Any]

    def __repr__(self) -> str:
        return "loftq"

    def at(self, path: str) -> _LoftQ:
        """The initialiser for the weight of this path."""
        return dataclasses.replace(self.own, moment=moment(self.moments, path, "loftq"))

    def on_mesh(self) -> _Observed:
        """The initialiser for a weight that is sharded: the same."""
        return self

    def __call__(self, key: jax.Array, w: Any, spec: Spec) -> Any:
        raise TypeError("loftq needs the weight's path: expected wrap to call it.")


@dataclasses.dataclass(frozen=True, repr=False)
class _LoftQ:
    """The initialiser that `loftq` gives.

    Attributes:
      qtype: the name of the qtype.
      steps: how many turns.
      block: how many numbers share a scale.
      niter: None for exact singular vectors; else the number of iterations.
      moment: (*batch, in, in) second moments of the inputs, or None.
    """

    qtype: str
    steps: int
    block: int | None
    niter: int | None = None
    moment: Any = None

    def __repr__(self) -> str:
        return "loftq"

    def __call__(self, key: jax.Array, w: Any, spec: Spec) -> Any:
        """(w, a, b), as every initialiser gives them."""
        positive(spec, "'loftq'")
        m, rank = Matrices.of(w, spec), rank_of(spec)
        m.check(rank, "'loftq'")
        lies = _qwix.along(spec.axes, spec.kind == "embed")
        tiles = _qwix.tiles_of(w.shape, lies, self.block)
        if tiles is None:
            raise Misfit(f"in axes that blocks of {self.block} divide for 'loftq'")
        wide = jnp.promote_types(w.dtype, jnp.float32)
        whole = base.array(w).astype(wide)

        def split(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
            u, s, vt = largest(key, self.niter, matrix, rank)
            root = jnp.sqrt(s / spec.scale)
            return u * root, root[:, None] * vt

        def weighted(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            matrix, seen = pair  # the outputs that change most: of (xE)ᵀ(xE)
            outputs = exact(matrix.T, exact(seen, matrix))
            vectors = jnp.linalg.eigh(outputs)[1][:, ::-1][:, :rank]
            a = exact(matrix, vectors) / spec.scale
            size = jnp.sqrt(jnp.linalg.norm(a, axis=0))
            size = jnp.where(size > 0, size, 1)
            return a / size, (vectors * size).T

        rest, q, a, b = whole, None, None, None
        for _ in range(self.steps):
            q = self._quantized(rest.astype(w.dtype), tiles, spec.axes)
            error = m.take(whole - base.array(q).astype(wide))
            if self.moment is None:
                a, b = m.factors(*jax.lax.map(split, error))
            else:
                seen = as_matrices(self.moment, m, "loftq").astype(wide)
                a, b = m.factors(*jax.lax.map(weighted, (error, seen)))
            own = jnp.full(m.sizes("b"), spec.scale, wide)
            rest = whole - delta(LoRA(None, a, b, own, roles=spec.axes.lstrip("b")))
        return q, a, b

    def _quantized(self, w: jax.Array, tiles: tuple[int, ...], axes: str) -> Any:
        if self.moment is None:
            return _qwix.quantized(w, self.qtype, tiles)
        return gptq(w, self.qtype, tiles, axes, self.moment, "loftq")

    def on_mesh(self) -> Any:
        """The initialiser for a weight that is sharded."""
        return dataclasses.replace(self, niter=MESH)
