"""A product whose derivative has the cotangent second.

For y = h·b, JAX takes the gradient of b as a product with y's cotangent first and h
second.  XLA for CPU brings the axes that are summed over, which here are all but the
features, to the end of what is first: it copies the whole cotangent in another order,
with everything that is fused into it, to contract it with an array that is tiny.  The
other way round only h is copied.  On GPU and TPU the two are alike.

Forward this is `lax.dot_general`, and so is all that JAX makes of it: policies of
remat, batching, derivatives of h.  One primitive, the derivative by b, carries the
order to where JAX transposes it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from jax import lax

from jlora import _compat
from jlora._compat import ad, batching, core, mlir

Params = tuple[tuple[str, Any], ...]  # of dot_general as items: hashable
_DEFAULTS = {"precision": None, "preferred_element_type": None, "out_sharding": None}


def product(x: jax.Array, y: jax.Array, params: Params) -> jax.Array:
    """dot_general with these parameters.

    Where y has more outside of the contraction than inside, so that the result is
    larger than x, the gradient of y has the cotangent second.

    Example:
      >>> import jax.numpy as jnp
      >>> dims = (((2,), (0,)), ((), ()))
      >>> h, b = jnp.ones((4, 16, 2)), jnp.ones((2, 32))
      >>> fn = lambda b: product(h, b, (("dimension_numbers", dims),)).sum()
      >>> jax.grad(fn)(b).shape
      (2, 32)
    """
    known = dict(params)
    (_, summed), (_, batch) = known["dimension_numbers"]
    sizes = {k: n for k, n in enumerate(y.shape) if k not in batch}
    if not all(isinstance(n, int) for n in y.shape):  # the symbols of an export
        return lax.dot_general(x, y, **known)
    inner = math.prod(sizes[k] for k in summed)
    if math.prod(sizes.values()) > inner**2:
        if known.get("precision") is None:  # as it is here, wherever it is derived
            known["precision"] = _compat.default_precision()
        return _widening(x, y, tuple(known.items()))
    return lax.dot_general(x, y, **known)


def _dot(h: Any, b: Any, **params: Any) -> Any:
    """dot_general with these very parameters, whatever precision is asked for here."""
    with jax.default_matmul_precision(None):
        return lax.dot_general(h, b, **params)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _widening(h: jax.Array, b: jax.Array, params: Params) -> jax.Array:
    return _dot(h, b, **dict(params))


@functools.partial(_widening.defjvp, symbolic_zeros=True)
def _jvp(params: Params, primals: Any, tangents: Any) -> Any:
    (h, b), (dh, db), known = primals, tangents, {**_DEFAULTS, **dict(params)}
    parts, zero = [], jax.custom_derivatives.SymbolicZero
    if not isinstance(dh, zero):
        parts.append(_dot(dh, b, **known))
    if not isinstance(db, zero):
        parts.append(_linear(h, db, **known))
    return _dot(h, b, **known), functools.reduce(lax.add, parts)


def _linear(h: Any, b: Any, **params: Any) -> Any:
    """The product as a linear function of b, transposed in the order that we want."""
    varying = _compat.varying(h) | _compat.varying(b)

    def vary(x: Any) -> Any:  # as lax's own products do
        axes = tuple(varying - _compat.varying(x))
        return lax.pcast(x, axes, to="varying") if axes else x

    return _linear_p.bind(vary(h), vary(b), **params)


def _transpose(ct: Any, h: Any, b: Any, **params: Any) -> Any:
    """The cotangent of b: h and ct contracted over all axes that h brought."""
    if isinstance(ct, ad.Zero):
        return [None, None]
    if ad.is_undefined_primal(h):  # only of a derivative's own transpose
        shape = jax.ShapeDtypeStruct(h.aval.shape, h.aval.dtype)
        linear = jax.linear_transpose(lambda h: lax.dot_general(h, b, **params), shape)
        return [*linear(ct), None]
    (hc, bc), (hb, bb) = params.pop("dimension_numbers")
    summed = [k for k in range(h.ndim) if k not in (*hc, *hb)]
    batch = range(len(hb))
    in_ct = range(len(hb), len(hb) + len(summed))
    free = [k for k in range(b.aval.ndim) if k not in (*bc, *bb)]
    axes = [*bb, *(bc[hc.index(k)] for k in sorted(hc)), *free]
    params["out_sharding"] = None  # not that of the product's result
    if sharding := _compat.explicit_only(b.aval.sharding):
        spec = [sharding.spec[k] for k in axes]
        params["out_sharding"] = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    out = lax.dot_general(h, ct, ((summed, in_ct), (hb, batch)), **params)
    return [None, lax.transpose(out.astype(b.aval.dtype), np.argsort(axes))]


def _batched(args: Any, dims: Any, **params: Any) -> Any:
    return jax.vmap(functools.partial(_dot, **params), dims)(*args), 0


_linear_p = core.Primitive("jlora_product")
_linear_p.def_impl(_dot)
_linear_p.def_effectful_abstract_eval(core.primitives.dot_general_p.abstract_eval)
ad.defjvp(
    _linear_p,
    lambda dh, h, b, **params: _dot(dh, b, **params),
    lambda db, h, b, **params: _linear(h, db, **params),
)
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batched
mlir.register_lowering(_linear_p, mlir.lower_fun(_dot, multiple_results=False))
