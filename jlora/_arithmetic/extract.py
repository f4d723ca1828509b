"""extract: an adapter from two full checkpoints."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora._adapter import Adapter
from jlora._arithmetic.factors import check_size, kept
from jlora._explicit import automatic, replicated
from jlora._init.make import make
from jlora._init.matrices import Matrices
from jlora._leaf import Full, base
from jlora._plan.from_tree import from_tree
from jlora._plan.plan import Plan, check, listed
from jlora._plan.select import Wanted
from jlora._plan.spec import RANK, Rule, Spec
from jlora._tree import by_path, paths
from jlora._tree.patterns import Pattern, as_patterns, check_matched, matches
from jlora._tree.variables import opened


def extract(
    params: Any,
    tuned: Any,
    rank: int | None = None,
    *,
    energy: float | None = None,
    plan: Plan | None = None,
    targets: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] = (),
    rules: Iterable[Rule] = (),
    train: Pattern | Iterable[Pattern] = (),
) -> Adapter:
    """The adapter that is closest to what training has changed in a model.

    For each planned weight the largest singular vectors of tuned - base, in float32.
    The adapter of merged weights comes back up to their rounding, if ``rank`` is at
    least its own.  A weight that has not changed gets no leaf.

    Args:
      params: the base params.
      tuned: the trained ones, with the same structure.
      rank: the rank of each leaf; less where the weight has no more singular values.
      energy: the part of the sum of squared singular values that each leaf keeps, in
        place of a rank.
      plan: which weights, and with which roles.  Ranks and alphas of it do not count.
      targets: patterns of the weights, without a plan; as in `wrap`.
      exclude: patterns of weights to leave out, without a plan.
      rules: `Rule`s, which may say the axes of a weight, without a plan.
      train: patterns of leaves that are kept whole (`Full`), such as heads and norms.

    Returns:
      An adapter with a scale of one, for `attach` on ``params``.

    Raises:
      ValueError: both or none of rank and energy; targets beside a plan; two trees with
        different paths or shapes; nothing that has changed; and as in `wrap`.

    Warns of other leaves that have changed: name those to keep in ``train``.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params, tuned = {"kernel": jnp.ones((3, 4))}, {"kernel": jnp.zeros((3, 4))}
      >>> jlora.extract(params, tuned, rank=1)
      {'kernel': LoRA(w=None, a=float32[3,1], b=float32[1,4], roles='io')}
    """
    check_size("extract", rank, energy)
    module, params = params, opened(params)
    old, new = by_path.arrays(params), by_path.arrays(opened(tuned))
    _check_same(old, new)
    if plan is None:
        asked = Wanted.of(RANK, None, targets, exclude, rules)
        plan = from_tree(module, old, asked)
    else:
        check(plan, old, "extract", targets, exclude, rules)
    whole = as_patterns(train)
    check_matched("train", whole, list(old.items()))
    out: Adapter = {}
    left = []
    for path, w in old.items():
        v = new[path]
        if not _differ(w, v):
            continue
        if any(matches(p, path, w) for p in whole):
            out[path] = Full(None, jnp.array(v, copy=True))
        elif path in plan:
            out[path] = _leaf(path, w, v, plan[path], rank, energy)
        else:
            left.append(path)
    if left:
        warnings.warn(
            f"extract: {listed(left)} changed as well, and are not in the adapter: "
            "name those to keep in train=, or plan them.",
            stacklevel=2,
        )
    if not out:
        raise ValueError(
            "extract: expected planned weights that differ, found none: tuned has the "
            f"values of params at all {len(plan)} planned paths."
        )
    return out


def _differ(w: Any, v: Any) -> bool:
    same = jnp.array_equal(base.array(w), base.array(v), equal_nan=_floating(w))
    return not bool(same)


def _floating(w: Any) -> bool:
    return bool(jnp.issubdtype(w.dtype, jnp.floating))


def _leaf(
    path: str, w: Any, v: Any, spec: Spec, rank: int | None, energy: float | None
) -> Any:
    """The leaf of one weight."""
    spec = dataclasses.replace(
        spec, form=None, init=None, dora=None, lora_bias=None, rslora=None
    )
    m = Matrices.of(w, spec)

    def difference(v: jax.Array, w: jax.Array) -> jax.Array:
        return m.take(v) - m.take(w)

    arrays = base.array(v), base.array(w)
    change = automatic(difference, lambda: replicated(arrays[1]), *arrays)
    if not bool(jnp.isfinite(change).all()):  # LAPACK may not return from infinities
        raise ValueError(
            f"extract: {path!r} has NaN or infinities in one of both: expected finite "
            "numbers. Exclude it, or keep it whole with train=."
        )
    u, s, vt = _svd(change)
    k = kept(s, rank, energy)
    found = _Found(*m.factors(u[..., :k], s[..., :k, None] * vt[..., :k, :]))
    own = spec.with_scale(k, k)
    leaf = make(w, path, own, init=found, dtype=jnp.float32, key=None)
    return dataclasses.replace(leaf, w=None)


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """The initialiser that gives these factors."""

    a: jax.Array
    b: jax.Array

    def at(self, path: str) -> Any:
        """Itself: by this method `make` knows that it holds arrays of its own."""
        return self

    def __call__(self, key: Any, w: Any, spec: Any) -> Any:
        """(w, a, b), as every initialiser gives them."""
        return w, self.a, self.b


@jax.jit
def _svd(x: jax.Array) -> Any:
    """The SVD of each matrix, one after the other."""
    return jax.lax.map(lambda m: jnp.linalg.svd(m, full_matrices=False), x)


def _check_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises unless both trees have the same paths and shapes."""
    for path in [*old, *new]:
        if path not in old or path not in new:
            lacks, other = ("tuned", new) if path in old else ("params", old)
            raise ValueError(
                f"extract: {lacks} has no {path!r}; near paths: "
                f"{paths.near(path, other)}. Expected two trees of one model."
            )
        if tuple(old[path].shape) != tuple(new[path].shape):
            raise ValueError(
                f"extract: {path!r} has shape {tuple(old[path].shape)} in params and "
                f"{tuple(new[path].shape)} in tuned: expected two trees of one model."
            )
