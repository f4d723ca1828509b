"""Llama 3 as a plain function of a dict of stacked layers, and how it is sharded.

The layers are one scan over stacked weights, each rematerialised in the backward pass,
as large models are trained on TPU.  Weights are sharded over two mesh axes: "fsdp",
over which the batch is split as well, and "tp", over which heads and hidden features
are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

TARGETS = "layers/w*"
"""The seven matrices of every layer: attention's four, the feed-forward's three."""


@dataclasses.dataclass(frozen=True)
class Llama:
    """The sizes of a model; calling one gives its logits."""

    d: int = 64
    ffn: int = 160
    vocab: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 8
    layers: int = 4
    theta: float = 500_000.0

    def shapes(self, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
        """The params as ``jax.ShapeDtypeStruct``s."""
        n, d, f, k = self.layers, self.d, self.ffn, self.head_dim
        shapes = {
            "embed": (self.vocab, d),
            "layers": {
                "norm_attention": (n, d),
                "wq": (n, d, self.heads, k),
                "wk": (n, d, self.kv_heads, k),
                "wv": (n, d, self.kv_heads, k),
                "wo": (n, self.heads, k, d),
                "norm_ffn": (n, d),
                "w_gate": (n, d, f),
                "w_up": (n, d, f),
                "w_down": (n, f, d),
            },
            "norm": (d,),
            "head": (d, self.vocab),
        }
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, dtype),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def specs(self) -> dict[str, Any]:
        """The PartitionSpec of each of the params."""
        into, out = P(None, "fsdp", "tp"), P(None, "tp", "fsdp")
        return {
            "embed": P("tp", "fsdp"),
            "layers": {
                "norm_attention": P(),
                **dict.fromkeys(("wq", "wk", "wv"), P(None, "fsdp", "tp", None)),
                "wo": P(None, "tp", None, "fsdp"),
                "norm_ffn": P(),
                **{"w_gate": into, "w_up": into, "w_down": out},
            },
            "norm": P(),
            "head": P("fsdp", "tp"),
        }

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random params."""
        leaves, treedef = jax.tree.flatten(self.shapes(dtype))
        keys = jax.random.split(key, len(leaves))

        def array(key: jax.Array, x: Any) -> jax.Array:
            if x.shape in ((self.d,), (self.layers, self.d)):
                return jnp.ones(x.shape, dtype)
            return jax.random.normal(key, x.shape, dtype) / math.sqrt(self.d)

        return jax.tree.unflatten(treedef, map(array, keys, leaves))

    def __call__(self, params: Any, ids: jax.Array, bump: Any = 0) -> jax.Array:
        """Logits (batch, length, vocab) of ids (batch, length).

        ``bump`` is added to the embedded ids: the gradient by it is what a backward
        pass costs where no weight trains.
        """
        angles = self._angles(ids.shape[1])

        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            h = norm(x, p["norm_attention"])
            q, k, v = (
                jnp.einsum("btd,dhk->bthk", h, p[name]) for name in ("wq", "wk", "wv")
            )
            o = attention(rotated(q, angles), rotated(k, angles), v)
            x = split(x + jnp.einsum("bthk,hkd->btd", o, p["wo"]))
            h = norm(x, p["norm_ffn"])
            h = jax.nn.silu(h @ p["w_gate"]) * (h @ p["w_up"])
            return split(x + h @ p["w_down"]), None

        x = split(params["embed"][ids] + bump)
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
        return norm(x, params["norm"]) @ params["head"]

    def loss(self, params: Any, ids: jax.Array, bump: Any = 0) -> jax.Array:
        """Mean cross entropy of the next token, of ids (batch, length + 1)."""
        logits = self(params, ids[:, :-1], bump)
        scores = jax.nn.log_softmax(logits.astype(jnp.float32))
        wanted = jax.nn.one_hot(ids[:, 1:], self.vocab, dtype=scores.dtype)
        return -jnp.mean(jnp.sum(scores * wanted, axis=-1))

    def _angles(self, length: int) -> jax.Array:
        half = self.head_dim // 2
        frequencies = self.theta ** (-jnp.arange(half) / half)
        return jnp.arange(length)[:, None] * frequencies  # (length, half)


LLAMA_3_8B = Llama(4096, 14336, 128256, 32, 8, 128, 32)
LLAMA_3_70B = Llama(8192, 28672, 128256, 64, 8, 128, 80)


def split(x: jax.Array) -> jax.Array:
    """Activations (batch, length, d), the batch split over "fsdp" if there is one."""
    if "fsdp" not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, P("fsdp", None, None))


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm (arXiv:1910.07467), computed in float32."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-5)
    return (wide * inverse).astype(x.dtype) * scale


def rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary positions (arXiv:2104.09864) for x (batch, length, heads, head_dim)."""
    cos, sin = (f(angles)[:, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(x.dtype)


BLOCK = 512


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention, several heads of q for one of k and v (arXiv:2305.13245).

    The scores of a block of queries at a time are in memory (arXiv:2112.05682), also in
    the backward pass, which computes them again.
    """
    batch, length, heads, size = q.shape
    n = length // BLOCK if length % BLOCK == 0 else 1
    q = q.reshape(batch, n, length // n, k.shape[2], -1, size)

    @jax.checkpoint
    def block(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, at = x  # (batch, block, kv_heads, heads / kv_heads, size), its positions
        scores = jnp.einsum("bqngk,bsnk->bngqs", q, k) / math.sqrt(size)
        causal = at[:, None] >= jnp.arange(length)
        scores = jnp.where(causal, scores.astype(jnp.float32), -1e9)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bngqs,bsnk->bqngk", weights, v)

    positions = jnp.arange(length).reshape(n, -1)
    out = jax.lax.map(block, (jnp.moveaxis(q, 1, 0), positions))
    return jnp.moveaxis(out, 0, 1).reshape(batch, length, heads, size)
