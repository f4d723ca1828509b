"""Initialisers of a and b: the delta is exactly zero at the start."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _paths, _sharding
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


@functools.lru_cache(maxsize=1024)
def _factors(
    init: str, spec: Spec, shape: tuple[int, ...], dtype: Any
) -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """What makes a weight's factors from a key and its scale; what tells their shapes.

    The same functions for all weights of a kind, so that JAX traces them once where it
    compiles them or asks for their shapes.
    """
    stack = tuple(shape[k] for k in spec.batch_axes)

    def factors(key: jax.Array, scale: Any) -> dict[str, jax.Array]:
        shapes = factor_shapes(shape, spec.axes, spec.rank, spec.form)
        a, b = _INITS[init](key, spec, *shapes, dtype)
        fields = {"a": a, "b": b, "scale": jnp.full(stack, scale, jnp.float32)}
        if spec.lora_bias:
            fields["c"] = jnp.zeros(bias_shape(shape, spec.axes), dtype)
        return fields

    return factors, jax.jit(factors).eval_shape


def make(
    w: Any, path: str, spec: Spec, *, init: str, dtype: Any, key: jax.Array | None
) -> LoRA:
    """The adapted leaf of a weight, its factors where the weight is (`sharding`).

    An abstract base gets abstract factors.
    """
    if init not in _INITS:
        raise ValueError(f"init {init!r}: expected one of {', '.join(_INITS)}.")
    key, scale = typed(key), spec.alpha / spec.rank
    kind = dataclasses.replace(spec, bias=None, alpha=0.0)  # alike for many weights
    factors, shapes_of = _factors(init, kind, tuple(w.shape), jnp.dtype(dtype))
    shapes = shapes_of(jax.ShapeDtypeStruct((), key.dtype), scale)
    static: dict[str, Any] = {"roles": spec.axes.lstrip("b"), "form": spec.form}
    if spec.bias is not None:
        static["bias"] = _paths.relative(spec.bias, path)
    leaf = LoRA(w, **shapes, **static)
    sharding = _sharding.of_array(w)
    placed = _sharding.of_fields(leaf, sharding)
    own = {name: getattr(placed, name) for name in shapes}
    if isinstance(w, jax.ShapeDtypeStruct):
        abstract: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own[name])
            for name, x in shapes.items()
        }
        return dataclasses.replace(leaf, **abstract)
    made: dict[str, Any]
    args = path_key(key, path), scale
    if sharding is None:
        made = factors(*args)
    elif isinstance(w, jax.core.Tracer):  # of explicit axes, which are in its type
        made = jax.tree.map(jax.sharding.reshard, factors(*args), own)
    else:  # every device makes its own part, of the numbers that no mesh changes
        made = jax.jit(factors, out_shardings=own)(*args)
    return dataclasses.replace(leaf, **made)
