"""mix: several adapters as one."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter import Adapter
from jlora._algebra.delta import delta, low_rank
from jlora._algebra.rows import replaces
from jlora._arithmetic.factors import MAGNITUDE, as_leaf, matrices, svd, with_matrices
from jlora._arithmetic.merging import MERGINGS
from jlora._init.keys import path_key, typed
from jlora._init.matrices import Matrices
from jlora._leaf import Full, LoRA, Note, base, forms, is_adapted
from jlora._leaf.bank import refuse_bank
from jlora._leaf.fields import lacking
from jlora._leaf.forms import NotFactored
from jlora._tree import paths

METHODS = ("cat", "svd", *MERGINGS, *(f"{m}_svd" for m in MERGINGS if m != "linear"))


def mix(
    adapters: Sequence[Adapter],
    weights: Sequence[Any],
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    key: jax.Array | None = None,
) -> Adapter:
    """One adapter from several, as a weighted sum of their deltas or of their factors.

    With "cat" the delta is exactly the sum of weight * delta, and the ranks add up; so
    ``mix([x, y], [1, 1])`` is x + y.  Use `jlora.scaled` to multiply an adapter by a
    number, and -1 to negate it.  "svd" is the closest adapter of a rank to that sum,
    from the factors alone.

    The other methods are peft's ``add_weighted_adapter``: they merge the factors a, and
    the factors b, number by number, each weighted by √|weight * scale|, a with its
    sign.  This is no sum of deltas.  Those called ``_svd`` merge the deltas instead,
    which are formed for it, and give the closest adapter of a rank.

    ==================  =========================================================
    linear              the sum of the factors
    ties                the largest by magnitude; the mean of those that have the
                        sign of the majority (arXiv:2306.01708)
    dare_linear         a random part, divided by the density (arXiv:2311.03099);
                        their sum
    dare_ties           a random part, divided by the density; the mean as in ties
    magnitude_prune     the largest by magnitude; their sum
    ==================  =========================================================

    An adapter of `initializers.pissa` or `initializers.olora` fits the base that is
    left.  With the adapter before training, ``mix([adapter, start], [1, -1])`` is one
    for the original base, with twice the rank.

    Args:
      adapters: adapters of the same paths, as `jlora.adapter` gives them.
      weights: a number for each, which may be traced, and negative.
      method: "cat", "svd", or one of the table; the last four also with ``_svd``.
      rank: the rank of the result, for "svd" and ``_svd``; None for the largest rank.
      density: the part of the numbers that is kept, in (0, 1], for all but "cat",
        "svd" and "linear".
      majority: "total", by the sum of the numbers, or "frequency", by the number of
        signs; for ties.
      key: a PRNG key for "dare"; each path is folded into it.

    Returns:
      An adapter with a scale of one; where rows are replaced, with the sum of weight *
      scale.

    Raises:
      ValueError: no adapters, or another number of weights; adapters of different
        plans, forms or ranks, of which one lost its base, or which have magnitudes
        (the error says which paths and why); an unknown method; a wrong density.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> x = jlora.adapter(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2))
      >>> jlora.mix([x, x], [0.5, 0.5])["kernel"].rank
      4
    """
    adapters, weights = _listed(adapters), _listed(weights)
    _check(adapters, weights, method, rank, density, majority)
    # float32, or float64 under jax_enable_x64.
    key, ws = typed(key), [jnp.asarray(w, jnp.result_type(float)) for w in weights]
    # What an initialiser moved is taken out again by weights that sum up to zero.
    original = not _traced(ws) and abs(float(sum(ws))) < 1e-6

    def leaf(path: str) -> Any:
        leaves: list[Any] = [adapter[path] for adapter in adapters]
        if isinstance(leaves[0], Full):
            return _whole(path, leaves, ws)
        if replaces(leaves[0]):
            return _rows(path, leaves, ws)
        own = path_key(key, path)
        new = _mixed(leaves, ws, own, method, rank, density, majority)
        notes = {
            "told": leaves[0].told,
            "moved": Note("" if original else leaves[0].moved),
            "layer": leaves[0].layer,
        }
        return dataclasses.replace(new, **notes)

    return {path: leaf(path) for path in adapters[0]}


# ------------------------------------------------------------------------- the methods


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _mixed(
    leaves: Sequence[LoRA],
    weights: Sequence[jax.Array],
    key: jax.Array,
    method: str,
    rank: int | None,
    density: float | None,
    majority: str,
) -> LoRA:
    """Low-rank leaves as one; compiled once for all that are alike."""

    def one(leaves: Any, weights: Any, key: Any) -> LoRA:
        leaves = _alike(leaves)
        if method == "cat":
            new = _cat(leaves, weights)
        elif method == "svd":
            new = _svd(leaves, weights, rank)
        else:
            merge = functools.partial(
                MERGINGS[method.removesuffix("_svd")],
                density=density,
                majority=majority,
            )
            call = _merged_deltas if method.endswith("_svd") else _merged_factors
            new = call(leaves, weights, merge, key, rank)
        c = _output_bias(leaves, weights)
        return dataclasses.replace(new, c=c, dropout=None)

    first = next((x for x in leaves if x.c is not None), leaves[0])
    return as_leaf(one, first, leaves, weights, key)


def _weighted(leaf: LoRA, weight: jax.Array) -> LoRA:
    return dataclasses.replace(leaf, scale=leaf.scale * weight.astype(leaf.scale.dtype))


def _cat(leaves: Sequence[LoRA], weights: Sequence[jax.Array]) -> LoRA:
    """Ranks side by side; the scales and weights go into b."""
    pairs = [matrices(_weighted(x, w)) for x, w in zip(leaves, weights, strict=True)]
    a = jnp.concatenate([a for a, _ in pairs], -1)
    b = jnp.concatenate([b for _, b in pairs], -2)
    return with_matrices(leaves[0], a, b)


def _svd(
    leaves: Sequence[LoRA], weights: Sequence[jax.Array], rank: int | None
) -> LoRA:
    """The largest singular vectors of the sum; a's columns are orthonormal."""
    u, s, vt = svd(*matrices(_cat(leaves, weights)))
    k = max(x.rank for x in leaves) if rank is None else rank
    k = min(k * (leaves[0].a.shape[-1] // leaves[0].rank), s.shape[-1])
    return with_matrices(leaves[0], u[..., :k], s[..., :k, None] * vt[..., :k, :])


def _count(x: jax.Array, n: int) -> int:
    """How many matrices a stack has, along its first n axes."""
    return math.prod(x.shape[:n])


def _merged_factors(
    leaves: Sequence[LoRA],
    weights: Sequence[jax.Array],
    merge: Any,
    key: jax.Array,
    rank: int | None,
) -> LoRA:
    """The factors, number by number; the weights are √|weight * scale|."""
    n = forms.of(leaves[0].form).stacked(leaves[0].axes)
    blocks = _count(leaves[0].a, n)
    own = [
        jnp.broadcast_to(
            (w * x.scale).reshape(x.scale.shape + (1,) * (n - x.scale.ndim)),
            x.a.shape[:n],
        ).reshape(blocks)
        for x, w in zip(leaves, weights, strict=True)
    ]
    ws = jnp.stack(own)
    root = jnp.sqrt(jnp.abs(ws))
    found = []
    for k, name in enumerate("ab"):
        xs = jnp.stack([getattr(x, name).astype(jnp.float32) for x in leaves])
        flat = xs.reshape(len(leaves), blocks, -1)
        signed = root * jnp.where(ws >= 0, 1, -1) if name == "a" else root
        new = merge(flat, signed, key=jax.random.fold_in(key, k))
        found.append(new.reshape(xs.shape[1:]))
    a, b = found
    one = jnp.ones_like(leaves[0].scale)
    a, b = a.astype(leaves[0].a.dtype), b.astype(leaves[0].b.dtype)
    return dataclasses.replace(leaves[0], a=a, b=b, scale=one)


def _merged_deltas(
    leaves: Sequence[LoRA],
    weights: Sequence[jax.Array],
    merge: Any,
    key: jax.Array,
    rank: int | None,
) -> LoRA:
    """The deltas, number by number, and their largest singular vectors."""
    first, axes = leaves[0], leaves[0].axes
    m = Matrices(first.shape, axes)
    deltas = jnp.stack([m.take(delta(x)) for x in leaves])
    flat = deltas.reshape(*deltas.shape[:2], -1)
    ws = jnp.broadcast_to(jnp.stack(weights)[:, None], flat.shape[:2])
    mixed = merge(flat, ws, key=key).reshape(deltas.shape[1:])
    u, s, vt = jnp.linalg.svd(mixed, full_matrices=False)
    k = min(max(x.rank for x in leaves) if rank is None else rank, s.shape[-1])
    a, b = m.factors(u[..., :k], s[..., :k, None] * vt[..., :k, :])
    new: dict[str, Any] = {"a": a.astype(first.a.dtype), "b": b.astype(first.b.dtype)}
    new["scale"] = jnp.ones_like(first.scale)
    return dataclasses.replace(first, form=None, **new)


def _output_bias(leaves: Sequence[LoRA], weights: Sequence[jax.Array]) -> Any:
    """The sum of weight * scale * c; None if no adapter has an output bias."""
    total = None
    for x, w in zip(leaves, weights, strict=True):
        if x.c is None:
            continue
        s = w * x.scale
        own = s.reshape(s.shape + (1,) * (x.c.ndim - s.ndim)) * x.c
        total = own if total is None else total + own
    found = next((x.c for x in leaves if x.c is not None), None)
    return total if total is None or found is None else total.astype(found.dtype)


def _alike(leaves: Sequence[LoRA]) -> list[LoRA]:
    """The leaves in one form: their own if it is the same, else the plain one."""
    if len({x.form for x in leaves}) == 1:
        return list(leaves)
    return [low_rank(x) for x in leaves]


def _traced(xs: Sequence[Any]) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in xs)


def _whole(path: str, leaves: Sequence[Full], weights: Sequence[jax.Array]) -> Full:
    """The sum of weight * value of leaves that replace the base's value."""
    if _traced(weights) or abs(float(sum(weights)) - 1) > 1e-6:
        raise ValueError(
            f"mix: {path!r} trained whole, so its values are a sum only with weights "
            "that sum up to 1, found another sum. Mix the low-rank leaves alone, {p: x "
            "for p, x in adapter.items() if isinstance(x, jlora.LoRA)}, and put one of "
            "its values back."
        )
    total: Any = sum(w * x.value for w, x in zip(weights, leaves, strict=True))
    return dataclasses.replace(leaves[0], value=total.astype(leaves[0].value.dtype))


def _rows(path: str, leaves: Sequence[LoRA], weights: Sequence[jax.Array]) -> LoRA:
    """Rows whose change is the sum of weight * change, whatever the base has there.

    With scales s a leaf changes them by s * (b - base).  So the sum has the scale
    Σ weight * s, and the mean of b by weight * s.
    """
    scales = [w * x.scale for w, x in zip(weights, leaves, strict=True)]
    total: Any = sum(scales)
    if not _traced([total]) and bool(jnp.any(jnp.abs(total) < 1e-6)):
        raise ValueError(
            f"mix: {path!r} replaces rows, and its weights times scales sum up to 0: "
            "then what is left depends on the base. Leave the path out of the "
            "adapters, and put its leaf of one of them back."
        )
    # A sum that is one but for rounding: then the rows do not depend on the base.
    total = jnp.where(jnp.abs(total - 1) < 1e-6, 1, total)
    shape = total.shape + (1,) * (leaves[0].b.ndim - total.ndim)
    b: Any = sum(
        (s / total).reshape(shape) * x.b for s, x in zip(scales, leaves, strict=True)
    )
    first = leaves[0]
    return dataclasses.replace(
        first, b=b.astype(first.b.dtype), scale=total.astype(first.scale.dtype)
    )


# ------------------------------------------------------------------------ what is wrong


def _check(
    adapters: Any, weights: Any, method: Any, rank: Any, density: Any, majority: Any
) -> None:
    if method not in METHODS:
        near = paths.near(method, METHODS) if isinstance(method, str) else ""
        raise ValueError(
            f"mix: method {method!r}: expected one of {', '.join(METHODS)}"
            + (f"; near names: {near}." if near else ".")
        )
    if isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            "mix: expected a list of adapters, as jlora.adapter gives them, found "
            f"{'one' if adapters else 'none'}."
        )
    for x in adapters:
        refuse_bank(x, "mix")
        if not isinstance(x, Mapping) or not all(map(is_adapted, x.values())):
            raise ValueError(
                "mix: expected adapters, flat dicts from path to leaf, found a "
                f"{type(x).__name__}: jlora.adapter(tree) gives one."
            )
    if not isinstance(weights, list) or not all(map(_is_number, weights)):
        raise ValueError(
            f"mix: weights {weights!r}: expected a list, a number for each adapter."
        )
    if len(weights) != len(adapters):
        raise ValueError(
            f"mix: {len(weights)} weights for {len(adapters)} adapters: expected as "
            "many."
        )
    sized = method == "svd" or method.endswith("_svd")
    whole = hasattr(rank, "__index__") and not isinstance(rank, bool)
    if rank is not None and not (sized and whole and rank >= 1):
        raise ValueError(
            f"mix: rank {rank!r} with {method!r}: expected a positive rank, and only "
            "for a method that ends in svd."
        )
    prunes = method in METHODS[3:] and method != "linear"
    if prunes and not (
        isinstance(density, (int, float, np.floating)) and 0 < density <= 1
    ):
        raise ValueError(
            f"mix: density {density!r} with {method!r}: expected a number in (0, 1], "
            "the part that is kept."
        )
    if not prunes and density is not None:
        raise ValueError(
            f"mix: density with {method!r}, which keeps all: leave it out."
        )
    if majority not in ("total", "frequency"):
        raise ValueError(
            f"mix: majority {majority!r}: expected 'total' or 'frequency'."
        )
    _check_alike(adapters, method)


def _listed(x: Any) -> Any:
    """A sequence or an iterator as a list; all else, and a mapping, as it is."""
    many = isinstance(x, Iterable) and not isinstance(x, (Mapping, str, Set))
    return list(x) if many else x


def _is_number(x: Any) -> bool:
    """Whether x is a real number, or a scalar array of them."""
    if isinstance(x, (jax.Array, np.ndarray)):
        return x.ndim == 0 and not jnp.issubdtype(x.dtype, jnp.complexfloating)
    return isinstance(x, numbers.Real)


def _check_alike(adapters: Sequence[Adapter], method: str) -> None:
    """Raises unless the adapters have the same paths, and leaves that can be mixed."""
    first = adapters[0]
    wrong: list[str] = []
    for k, other in enumerate(adapters[1:], 1):
        for path in [*first, *(p for p in other if p not in first)]:
            if path not in other or path not in first:
                has, lacks = (0, k) if path in first else (k, 0)
                wrong.append(f"{path!r} is in adapter {has}, not in adapter {lacks}")
            elif why := _differ(first[path], other[path], method):
                wrong.append(f"{path!r} {why} (adapters 0 and {k})")
    for k, x in enumerate(adapters):
        for path, leaf in x.items():
            if getattr(leaf, "m", None) is not None:
                raise ValueError(f"mix: {path!r} of adapter {k} {MAGNITUDE}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            "mix: expected adapters of the same plan, found that "
            + "; ".join(wrong[:4])
            + f"{more}."
        )


def _differ(x: Any, y: Any, method: str) -> str | None:
    """Why two leaves cannot be mixed; else None."""
    if type(x) is not type(y):
        return "is trained whole in one, and low-rank in the other"
    if x.shape != y.shape:
        return f"is for weights of shape {x.shape} and {y.shape}"
    if base.is_zero(x.w) != base.is_zero(y.w):
        return "lost its base in one, and not in the other"
    if isinstance(x, Full):
        return None
    if x.axes != y.axes:
        return f"has the roles {x.axes!r} and {y.axes!r}"
    for leaf in (x, y):
        if lacks := lacking(leaf):
            return f"lacks {', '.join(lacks)}: it is half of a partition"
    if x.form != y.form:
        differ = f"has the forms {x.form} and {y.form}"
        if replaces(x) or replaces(y):
            return differ
        try:
            x, y = low_rank(x), low_rank(y)
        except NotFactored:
            return f"{differ}, of which one is no plain a·b"
    if method in MERGINGS and x.rank != y.rank:
        return f"has ranks {x.rank} and {y.rank}, which {method!r} cannot mix"
    return None
