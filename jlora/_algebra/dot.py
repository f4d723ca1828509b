"""dot_general of an activation and a weight, with the weight on either side."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax

from jlora._algebra import rows
from jlora._algebra.delta import low_rank, scaled
from jlora._algebra.use import (
    Params,
    RolesError,
    branch,
    compute_dtype,
    drop,
    finished,
    gated,
    inlined,
    with_output_bias_of,
)
from jlora._algebra.weight import gained
from jlora._labels import BLOCK, RANK, dot
from jlora._leaf import LoRA, base, forms
from jlora._leaf.forms import NotFactored


@dataclasses.dataclass(frozen=True)
class Product:
    """The dimension numbers of a product, seen from the weight.

    Attributes:
      contracted: the weight's axes that are summed over.
      xl: the labels of the activation: the weight's for axes that meet one of the
        weight's, else new ones.
      out: the labels of the result.
      transposed: whether the weight's out axes are contracted, as in a tied head.
    """

    contracted: tuple[int, ...]
    xl: list[int]
    out: list[int]
    transposed: bool

    @classmethod
    def of(
        cls, leaf: LoRA, x: Any, numbers: Any, weight_first: bool, mixes: bool
    ) -> Product:
        n = leaf.ndim
        (lc, rc), (lb, rb) = numbers
        wc, wb, xc, xb = (lc, lb, rc, rb) if weight_first else (rc, rb, lc, lb)
        roles = {leaf.axes[k] for k in wc if leaf.shape[k] != 1}
        if mixes and len(roles) > 1:
            roles -= {"b"}
        if "b" in roles or len(roles) > 1:
            raise RolesError(
                f"contracts axes {tuple(map(int, wc))} of a weight of shape "
                f"{leaf.shape} and roles {leaf.axes!r}: expected in axes (i) only, or "
                "out axes (o) only"
            )
        if not wc:
            raise NotFactored
        xl = list(range(n, n + x.ndim))
        for kw, kx in zip((*wc, *wb), (*xc, *xb), strict=True):
            xl[kx] = kw
        kept = [k for k in range(n) if k not in wc and k not in wb]
        new = [k for k in xl if k >= n]
        out = [*wb, *kept, *new] if weight_first else [*wb, *new, *kept]
        return cls(tuple(wc), xl, out, "o" in roles)


@functools.partial(inlined, static_argnames=("params", "weight_first", "mixes", "nth"))
def contract(
    leaf: LoRA,
    x: jax.Array,
    params: Params,
    *,
    weight_first: bool,
    mixes: bool = False,
    aside: jax.Array | None = None,
    h: jax.Array | None = None,
    nth: int = 0,
    gate: jax.Array | None = None,
) -> jax.Array:
    """dot_general of x and the weight, on either side.

    The factor that has the contracted axes comes first: (x·a)·b, or (x·b)·a if the
    weight is used transposed (a tied head).  An axis of size one may have any role.

    Args:
      leaf: the weight.
      x: the activation.
      params: the primitive's parameters.
      weight_first: whether the weight is the first operand.
      mixes: whether batch axes may be contracted together with in or out axes, as where
        the outputs of each token's experts are summed.  The second product sums them.
      aside: x for the low-rank branch; see `Evaluation.first_product`.
      h: x·a instead of ``aside``, if it was computed already.
      nth: the number of earlier uses of the weight, for the dropout.
      gate: which ranks each token has; see `gated`.

    Raises:
      RolesError: the contracted axes mix in and out axes, or hold a batch axis.
      NotFactored: no axis is contracted; or only some in axes are, and the weight has
        an output bias.
    """
    rest = dict(params)
    numbers = rest.pop("dimension_numbers")
    out_sharding = rest.pop("out_sharding", None)
    p = Product.of(leaf, x, numbers, weight_first, mixes)

    def own(w: Any, x: Any) -> Any:
        left, right = (w, x) if weight_first else (x, w)
        return lax.dot_general(left, right, numbers, out_sharding=out_sharding, **rest)

    if p.transposed:
        x = gained(leaf, x, p.xl)
        aside = aside if aside is None else gained(leaf, aside, p.xl)
    dtype = compute_dtype(x, leaf)
    if rows.replaces(leaf):
        if (y := rows.contract(leaf, x, own, p, dtype, rest)) is not None:
            return y
        leaf = low_rank(leaf)
    y = base.use(leaf.base, own, x)
    if p.transposed or leaf.c is not None:
        leaf = low_rank(leaf)
    form = forms.of(leaf.form)
    factors = leaf.a, scaled(leaf, "b")
    first, second = zip(factors, form.labels(leaf.axes), strict=True)
    if p.transposed:
        first, second = second, first
    # Not in `rest`, which a backward pass reads later.
    options = branch(leaf, rest) | {"sharding": (out_sharding, p.out)}

    def times(h: jax.Array, hl: Any, factor: Any, fl: Any, keep: set[int]) -> Any:
        h, factor = h.astype(dtype), factor.astype(dtype)
        if weight_first:
            return dot(factor, fl, h, hl, keep, **options)
        return dot(h, hl, factor, fl, keep, **options)

    if h is not None:
        hl = [*(k for k in p.xl if k >= leaf.ndim), RANK]
    else:
        assert aside is not None
        factor, fl = first
        h = drop(leaf, aside.astype(dtype), nth)
        h, hl = times(h, p.xl, factor, fl, {*p.out, *second[1]})
        h = h if p.transposed else form.entered(h)
    h = gated(h, hl, gate, leaf.ndim).astype(dtype)
    factor, fl = second[0].astype(dtype), second[1]
    h, factor = with_output_bias_of(leaf, p.contracted, h, hl, factor, fl)
    d, dl = times(h, hl, factor, fl, {*p.out, BLOCK})
    y = base.plus(y, form.assemble(d, dl, p.out, leaf.axes))
    return y if p.transposed else finished(leaf, y, p.out)
