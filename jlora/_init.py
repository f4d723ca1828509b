"""Initialisers of a and b: the delta is exactly zero at the start."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _paths
from jlora._leaf import Blocks, Kernel, LoRA, bias_shape, factor_shapes
from jlora._plan import Spec

Initialiser = Callable[[jax.Array, Spec, tuple[int, ...], tuple[int, ...], Any], Any]


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, whatever else is in the tree."""
    digest = hashlib.sha256(path.encode()).digest()
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "little"))
    return key


def typed(key: jax.Array | None) -> jax.Array:
    """The key as a typed one; None is ``jax.random.key(0)``."""
    if key is None:
        return jax.random.key(0)
    if not hasattr(key, "dtype"):
        raise TypeError(
            f"key {key!r}: expected a PRNG key such as jax.random.key(0), found "
            f"{type(key).__name__}."
        )
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def kaiming(
    key: jax.Array, spec: Spec, a: tuple[int, ...], b: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """a ~ U(±1/√fan_in) over the in axes, b = 0; embeddings: a = 0, b ~ N(0, 1).

    loralib's choice: kaiming_uniform with a = √5 (arXiv:1502.01852, eq. 10).
    """
    if spec.kind == "embed":
        return jnp.zeros(a, dtype), jax.random.normal(key, b, dtype)
    # Matrices and not axes for a kernel's; a block is initialised by itself.
    blocks = isinstance(spec.form, Blocks)
    skip = len(a) - 2 if isinstance(spec.form, Kernel) else len(spec.batch_axes)
    fan_in = math.prod(a[skip + blocks : -1])
    bound = 1 / math.sqrt(max(fan_in, 1))
    return jax.random.uniform(key, a, dtype, -bound, bound), jnp.zeros(b, dtype)


_INITS: dict[str, Initialiser] = {"kaiming": kaiming}


def make(
    w: Any, path: str, spec: Spec, *, init: str, dtype: Any, key: jax.Array | None
) -> LoRA:
    """The adapted leaf of a weight; an abstract base gets abstract factors."""
    if init not in _INITS:
        raise ValueError(f"init {init!r}: expected one of {', '.join(_INITS)}.")
    shape_a, shape_b = factor_shapes(tuple(w.shape), spec.axes, spec.rank, spec.form)
    stack = tuple(w.shape[k] for k in spec.batch_axes)
    static: dict[str, Any] = {"roles": spec.axes.lstrip("b"), "form": spec.form}
    if spec.bias is not None:
        static["bias"] = _paths.relative(spec.bias, path)
    shape_c = bias_shape(tuple(w.shape), spec.axes) if spec.lora_bias else None
    if isinstance(w, jax.ShapeDtypeStruct):
        a, b = (jax.ShapeDtypeStruct(shape, dtype) for shape in (shape_a, shape_b))
        c = None if shape_c is None else jax.ShapeDtypeStruct(shape_c, dtype)
        scale = jax.ShapeDtypeStruct(stack, jnp.float32)
        return LoRA(w, a, b, scale, c, **static)
    a, b = _INITS[init](path_key(typed(key), path), spec, shape_a, shape_b, dtype)
    c = None if shape_c is None else jnp.zeros(shape_c, dtype)
    scale = jnp.full(stack, spec.alpha / spec.rank, jnp.float32)
    return LoRA(w, a, b, scale, c, **static)
