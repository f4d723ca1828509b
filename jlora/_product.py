"""A product whose gradient has the cotangent as its second operand.

For y = h·b, JAX computes the gradient of b as a product with y's cotangent first and h
second.  XLA for CPU moves the summed axes of the first operand to its end.  Here these
are all axes but the features.  So XLA copies the whole cotangent, with everything that
is fused into it, only to contract it with a tiny array.  In the other order only h is
copied.  On GPU and TPU both orders are equally fast.

The forward pass is a `lax.dot_general`.  So remat policies, batching and derivatives by
h treat it as any other product.  Only the derivative by b is a new primitive: it fixes
the order in which JAX transposes it.
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

Params = tuple[tuple[str, Any], ...]  # dot_general's, as items: hashable
_DEFAULTS = {"precision": None, "preferred_element_type": None, "out_sharding": None}


def product(x: jax.Array, y: jax.Array, params: Params) -> jax.Array:
    """dot_general with these parameters.

    If the free axes of y are larger than its summed axes, the result is larger than x.
    Then the gradient of y is computed with the cotangent second.

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
    if not all(isinstance(n, int) for n in y.shape):  # symbolic sizes in jax.export
        return lax.dot_general(x, y, **known)
    inner = math.prod(sizes[k] for k in summed)
    if math.prod(sizes.values()) > inner**2:
        if known.get("precision") is None:
            # A derivative may be taken under another default: keep the one from here.
            known["precision"] = _compat.default_precision()
        return _widening(x, y, tuple(known.items()))
    return lax.dot_general(x, y, **known)


def _dot(h: Any, b: Any, **params: Any) -> Any:
    """dot_general with exactly these parameters, whatever the default precision is."""
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
    """The product as a linear function of b, with our order when it is transposed."""
    varying = _compat.varying(h) | _compat.varying(b)

    def vary(x: Any) -> Any:  # lax's own products do the same
        axes = tuple(varying - _compat.varying(x))
        return lax.pcast(x, axes, to="varying") if axes else x

    return _linear_p.bind(vary(h), vary(b), **params)


def _transpose(ct: Any, h: Any, b: Any, **params: Any) -> Any:
    """The cotangent of b: h and ct, contracted over the axes of ct that came from h."""
    if isinstance(ct, ad.Zero):
        return [None, None]
    if ad.is_undefined_primal(h):  # only if a derivative by b is itself transposed by h
        shape = jax.ShapeDtypeStruct(h.aval.shape, h.aval.dtype)
        linear = jax.linear_transpose(lambda h: lax.dot_general(h, b, **params), shape)
        return [*linear(ct), None]
    (hc, bc), (hb, bb) = params.pop("dimension_numbers")
    summed = [k for k in range(h.ndim) if k not in (*hc, *hb)]
    batch = range(len(hb))
    in_ct = range(len(hb), len(hb) + len(summed))
    free = [k for k in range(b.aval.ndim) if k not in (*bc, *bb)]
    # Axis k of the product below is axis axes[k] of b.
    axes = [*bb, *(bc[hc.index(k)] for k in sorted(hc)), *free]
    params["out_sharding"] = None  # the one in params is for the result y, not for b
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
