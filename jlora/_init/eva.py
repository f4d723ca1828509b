"""eva: factors a that span what enters a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._init.matrices import Matrices, rank_of
from jlora._leaf.forms import Misfit
from jlora._plan.spec import Spec
from jlora._tree import paths


def eva(moments: Mapping[str, Any]) -> Any:
    """a has the directions in which the weight's inputs have most energy; b is zero.

    EVA (arXiv:2410.07170, section 3.2): the first r right singular vectors of the
    inputs, which are eigenvectors of their second moments.  The mean of the inputs is
    not subtracted (peft does).  The delta is zero, and the base does not change.  The
    paper's ranks come from `jlora.redistribute`.

    Args:
      moments: the second moments by path, as `jlora.observe` gives them.

    Returns:
      An initialiser, for ``init`` of `wrap`.

    Raises:
      ValueError: when it is used: a weight without moments; a rank above the number of
        its inputs.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda p, x: x @ p["kernel"]
      >>> params, x = {"kernel": jnp.ones((3, 4))}, jnp.array([[0.0, 2.0, 0.0]])
      >>> plan = jlora.plan(f, params, x, rank=1)
      >>> moments = jlora.observe(f, params, x, plan=plan)
      >>> tree = jlora.wrap(params, plan=plan, init=jlora.initializers.eva(moments))
      >>> abs(tree["kernel"].a[:, 0]).tolist()
      [0.0, 1.0, 0.0]
    """
    return _Eva(given(moments, "eva"))


def given(moments: Any, what: str) -> Mapping[str, Any]:
    """The moments; raises TypeError if they are none."""
    if not isinstance(moments, Mapping):
        raise TypeError(
            f"{what}: expected moments by path, as jlora.observe gives them, found a "
            f"{type(moments).__name__}."
        )
    return moments


_OTHER_INIT = (
    "Observe with the plan that is wrapped; an embedding has none: give it another "
    "init by a jlora.Rule."
)


def moment(
    moments: Mapping[str, Any], path: str, what: str, advice: str = _OTHER_INIT
) -> Any:
    """The moments of one weight, in float32; raises ValueError if there are none."""
    if path not in moments:
        raise ValueError(
            f"{what}: no moments of {path!r}; near paths: {_near(path, moments)}. "
            + advice
        )
    return _checked(moments[path], path, what)


def _near(path: str, moments: Mapping[str, Any]) -> str:
    return paths.near(path, moments) if moments else "none, there are no moments"


def _checked(x: Any, path: str, what: str) -> Any:
    """The moments of one weight in float32; or the error that says what they are.

    Raises:
      ValueError: no square real arrays, not finite, or not the moments of anything.
    """
    try:
        with np.errstate(over="ignore"):  # which is told below
            x = x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
    except (TypeError, ValueError):
        x = None
    real = x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    if x is None or not real or x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        found = "nothing of the kind" if x is None else f"{x.dtype}{list(x.shape)}"
        raise ValueError(
            f"{what}: the moments of {path!r} are {found}: expected an array "
            "(*batch, in, in) of floats, as jlora.observe gives it."
        )
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.dtype(jnp.float32))
    x = x.astype(jnp.float32)
    with jax.ensure_compile_time_eval():
        why = "" if isinstance(x, jax.core.Tracer) else _wrong(x)
    if why:
        raise ValueError(
            f"{what}: the moments of {path!r} {why}: expected sums of x·xᵀ. Look at "
            "the batches that were observed."
        )
    return x


def _wrong(x: jax.Array) -> str:
    """Why an array is no second moments; empty if it may be."""
    if not bool(jnp.isfinite(x).all()):
        return "have NaN or infinities in float32"
    if not bool((abs(x - x.mT) <= 0.02 * abs(x).max((-1, -2), keepdims=True)).all()):
        return "are not symmetric"
    # Also of moments that were rounded to bfloat16.
    each = jnp.sqrt(jnp.maximum(jnp.diagonal(x, axis1=-2, axis2=-1), 0))
    most = each[..., :, None] * each[..., None, :]
    if not bool((abs(x) <= 1.02 * most + 1e-30).all()):
        return "are not those of any inputs, which have none below zero"
    return ""


def as_matrices(moment: Any, m: Matrices, what: str) -> jax.Array:
    """The moments of each matrix of a weight, (batch, in, in).

    Raises:
      Misfit: they are of another weight.
    """
    want = (*m.sizes("b"), m.size[0], m.size[0])
    if moment.shape != want:
        raise Misfit(f"moments of shape {want} for {what!r}, found {moment.shape}")
    if isinstance(moment, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda x: x.reshape(-1, *x.shape[-2:]), moment)
    return moment.reshape(-1, *moment.shape[-2:])


@dataclasses.dataclass(frozen=True, eq=False)
class _Eva:
    """The initialiser that `eva` gives; it needs to know the path."""

    moments: Mapping[str, Any]

    def at(self, path: str) -> Any:
        """The initialiser for the weight of this path."""
        return _EvaOf(moment(self.moments, path, "eva"))

    def __call__(self, key: jax.Array, w: Any, spec: Spec) -> Any:
        raise TypeError("eva needs the weight's path: expected wrap to call it.")


@dataclasses.dataclass(frozen=True, eq=False)
class _EvaOf:
    """The initialiser for one weight.

    Attributes:
      moment: (*batch, in, in).
    """

    moment: Any

    def __call__(self, key: jax.Array, w: Any, spec: Spec) -> Any:
        """(w, a, b), as every initialiser gives them."""
        m, rank = Matrices.of(w, spec), rank_of(spec)
        m.check(rank, "'eva'", outs=False)
        _, vectors = jnp.linalg.eigh(as_matrices(self.moment, m, "eva"))
        a = vectors[..., ::-1][..., :rank]
        return w, *m.factors(a, jnp.zeros((len(a), rank, m.size[1])))
