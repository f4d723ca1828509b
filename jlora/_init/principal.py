"""pissa and olora: factors that take a part of the base away."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora._init.matrices import Matrices, exact, moved, positive, rank_of
from jlora._plan.spec import Spec


def pissa(niter: int | None = None) -> Any:
    """The factors are the largest singular vectors of the base, which loses them.

    PiSSA (arXiv:2404.02948, eq. 2 to 4): for W = U·S·Vᵀ, a = U √S and b = √S Vᵀ of the
    r largest singular values, both divided by √scale, and the base becomes
    W - scale * a·b.  So what trains are the principal parts of the weight.  The model
    computes the same at the start, within the rounding of the base's dtype.

    The base that is left is in the tree.  An adapter fits it alone; for the original
    base, make a plain one of it: ``jlora.mix([adapter, start], [1, -1])``, where start
    is the adapter before training.

    A stack is split layer by layer; a convolution as the matrix of its in axes, which
    are the spatial ones and the channels, and its outputs.  On a mesh the singular
    vectors come from subspace iterations, so that no device gets the whole weight.

    Args:
      niter: None for exact singular vectors; else the number of iterations of a
        randomised method (arXiv:0909.4061, algorithm 4.4), which takes products with
        the weight alone.  ``init="pissa_niter_4"`` is pissa(4).

    Raises:
      ValueError: a rank above the number of singular values; a scale that is not
        positive; a weight whose delta is no plain a·b.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.diag(jnp.array([5.0, 3.0, 1.0]))}
      >>> leaf = jlora.wrap(params, rank=1, init="pissa")["kernel"]
      >>> bool(abs(leaf.w - jnp.diag(jnp.array([0.0, 3.0, 1.0]))).max() < 1e-6)
      True
    """
    if niter is not None and (
        isinstance(niter, bool) or not isinstance(niter, int) or niter < 0
    ):
        raise ValueError(
            f"pissa: niter {niter!r}: expected a number of iterations, or None for "
            "exact singular vectors."
        )
    return _Pissa(niter)


@dataclasses.dataclass(frozen=True, repr=False)
class _Pissa:
    """The initialiser that `pissa` gives; it is equal to others with the same niter."""

    niter: int | None

    def __repr__(self) -> str:
        return "pissa" if self.niter is None else f"pissa_niter_{self.niter}"

    def __call__(self, key: jax.Array, w: Any, spec: Spec) -> Any:
        """(w, a, b), as every initialiser gives them."""
        return self._moved(w, spec, functools.partial(largest, key, self.niter))

    def _moved(self, w: Any, spec: Spec, svd: Any) -> Any:
        positive(spec, "'pissa'")
        Matrices.of(w, spec).check(rank_of(spec), "'pissa'")

        def split(m: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
            u, s, vt = svd(m, rank)
            root = jnp.sqrt(s / spec.scale)
            return u * root, root[:, None] * vt

        return moved(w, spec, split)

    def on_mesh(self) -> Any:
        """The initialiser for a weight that is sharded."""
        return _Pissa(MESH) if self.niter is None else self


MESH = 16  # iterations, after which singular values in float32 no longer change
_EXTRA = 8  # columns besides the rank, without which the last ones converge slowly


def largest(
    key: jax.Array, niter: int | None, m: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular vectors and values: (in, r), (r), (r, out).

    Args:
      key: a PRNG key; only iterations read it.
      niter: None for exact ones; else the number of subspace iterations.
      m: the matrix (in, out).
      rank: r.
    """
    if niter is not None:
        return _iterated(key, niter, m, rank)
    u, s, vt = jnp.linalg.svd(m, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def _iterated(
    key: jax.Array, niter: int, m: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values and vectors by subspace iterations.

    All large operations are products, so a sharded matrix stays where it is.
    """
    k = min(rank + _EXTRA, *m.shape)
    q = _basis(exact(m, jax.random.normal(key, (m.shape[1], k), m.dtype)))

    def again(_: int, q: jax.Array) -> jax.Array:
        return _basis(exact(m, _basis(exact(m.T, q))))

    q = jax.lax.fori_loop(0, niter, again, q)
    rows = exact(m.T, q)  # m is close to q·rowsᵀ
    right = _basis(rows)
    u, s, vt = jnp.linalg.svd(exact(rows.T, right), full_matrices=False)
    return exact(q, u[:, :rank]), s[:rank], exact(vt[:rank], right.T)


def _basis(x: jax.Array) -> jax.Array:
    """Orthonormal columns that span those of x (tall), from products with it alone.

    From the eigenvectors of xᵀx, twice, since the first time squares the condition.
    Columns that x does not span become zero.
    """
    for _ in range(2):
        values, vectors = jnp.linalg.eigh(exact(x.T, x))
        smallest = jnp.finfo(x.dtype).eps * x.shape[1] * values[-1]
        inverse = jnp.where(values > smallest, 1 / jnp.sqrt(jnp.abs(values)), 0)
        x = exact(x, vectors * jnp.where(jnp.isfinite(inverse), inverse, 0))
    return x


def olora(key: jax.Array, w: Any, spec: Spec) -> tuple[Any, jax.Array, jax.Array]:
    """The factors are a QR decomposition of the base, which loses them.

    OLoRA (arXiv:2406.01775, section 3.2): for Wᵀ = Q·R with Wᵀ (out, in), b is the
    first r columns of Q, transposed, and a the first r rows of R, transposed; the base
    becomes W - scale * a·b.  Q's first columns depend on those of Wᵀ alone, and R's
    rows are a product with them, so a thin decomposition is enough.

    The model computes the same at the start.  As with `pissa`, the base that is left is
    in the tree, and ``jlora.mix([adapter, start], [1, -1])`` gives a plain adapter for
    the original base.

    Args:
      key: not used.
      w: the base.
      spec: how the weight is adapted.

    Returns:
      The base that is left, and factors a and b of the spec's shapes.

    Raises:
      ValueError: a rank above the number of inputs or outputs; a weight whose delta is
        no plain a·b.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> leaf = jlora.wrap({"kernel": jnp.eye(3)}, rank=2, init="olora")["kernel"]
      >>> bool(abs(leaf.b @ leaf.b.T - jnp.eye(2)).max() < 1e-6)
      True
    """
    Matrices.of(w, spec).check(rank_of(spec), "'olora'")

    def split(m: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
        q, _ = jnp.linalg.qr(m[:rank].T)
        return exact(m, q), q.T

    return moved(w, spec, split)
