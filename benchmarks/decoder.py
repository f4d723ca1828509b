"""The model of the benchmarks: a small Llama-like decoder, in Flax and in PyTorch.

One arithmetic twice: grouped queries, SwiGLU, RMSNorm before each block, no positions,
the mean cross entropy of the next token in float32.  Either can be given a zero,
`bump`, which is added to the queries, keys and values of the first layer: the gradient
with respect to it needs the gradients of all activations down to the first adapted
weight, and of no weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

ADAPTED = "wq wk wv wo gate up down".split()
"""The seven matrices of every layer."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """How large a decoder is."""

    d: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    layers: int

    @property
    def head_dim(self) -> int:
        return self.d // self.heads

    @property
    def sides(self) -> int:
        """Σ (in + out) over the adapted matrices."""
        kv = self.kv_heads * self.head_dim
        return self.layers * (
            2 * 2 * self.d + 2 * (self.d + kv) + 3 * (self.d + self.ffn)
        )


class Layer(nn.Module):
    """Attention and SwiGLU, each added to what came in."""

    shape: Shape
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, bump: jax.Array | None) -> jax.Array:
        s = self.shape

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, False, self.dtype, self.dtype, name=name)

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(dtype=self.dtype, param_dtype=self.dtype, name=name)

        h = norm("norm1")(x)
        q = dense("wq", s.heads * s.head_dim)(h)
        k = dense("wk", s.kv_heads * s.head_dim)(h)
        v = dense("wv", s.kv_heads * s.head_dim)(h)
        if bump is not None:
            q, k, v = q + bump, k + bump, v + bump
        q, k, v = (y.reshape(*y.shape[:2], -1, s.head_dim) for y in (q, k, v))
        o = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=self.attention
        )
        x = x + dense("wo", s.d)(o.reshape(*x.shape[:2], -1))
        h = norm("norm2")(x)
        gated = nn.silu(dense("gate", s.ffn)(h)) * dense("up", s.ffn)(h)
        return x + dense("down", s.d)(gated)


class Decoder(nn.Module):
    """(batch, length) ids to (batch, length, vocab) logits; layers are unrolled.

    `attention` is the implementation of `jax.nn.dot_product_attention`.
    """

    shape: Shape
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, ids: jax.Array, bump: jax.Array | None = None) -> jax.Array:
        s = self.shape
        x = nn.Embed(s.vocab, s.d, self.dtype, self.dtype, name="embed")(ids)
        for i in range(s.layers):
            layer = Layer(s, self.dtype, self.attention, name=f"layer_{i}")
            x = layer(x, bump if i == 0 else None)
        x = nn.RMSNorm(dtype=self.dtype, param_dtype=self.dtype, name="norm")(x)
        return nn.Dense(s.vocab, False, self.dtype, self.dtype, name="head")(x)


def loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token; ids have one position more."""
    logits = logits.astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return each.mean()


def in_torch(shape: Shape, params: Any, device: str, dtype: Any) -> Any:
    """The decoder as a `torch.nn.Module` with these weights; returns the loss."""
    import numpy as np
    import torch
    from torch import nn as tnn
    from torch.nn import functional as F

    s = shape

    class TorchLayer(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            kv = s.kv_heads * s.head_dim
            self.norm1 = tnn.RMSNorm(s.d, eps=1e-6)
            self.wq = tnn.Linear(s.d, s.d, bias=False)
            self.wk = tnn.Linear(s.d, kv, bias=False)
            self.wv = tnn.Linear(s.d, kv, bias=False)
            self.wo = tnn.Linear(s.d, s.d, bias=False)
            self.norm2 = tnn.RMSNorm(s.d, eps=1e-6)
            self.gate = tnn.Linear(s.d, s.ffn, bias=False)
            self.up = tnn.Linear(s.d, s.ffn, bias=False)
            self.down = tnn.Linear(s.ffn, s.d, bias=False)

        def forward(self, x: Any, bump: Any) -> Any:
            h = self.norm1(x)
            q, k, v = self.wq(h), self.wk(h), self.wv(h)
            if bump is not None:
                q, k, v = q + bump, k + bump, v + bump
            q, k, v = (
                y.reshape(*y.shape[:2], -1, s.head_dim).transpose(1, 2)
                for y in (q, k, v)
            )
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.wo(o.transpose(1, 2).reshape(*x.shape[:2], -1))
            h = self.norm2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    class TorchDecoder(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = tnn.Embedding(s.vocab, s.d)
            self.layers = tnn.ModuleDict(
                {f"layer_{i}": TorchLayer() for i in range(s.layers)}
            )
            self.norm = tnn.RMSNorm(s.d, eps=1e-6)
            self.head = tnn.Linear(s.d, s.vocab, bias=False)

        def forward(self, ids: Any, bump: Any = None) -> Any:
            x = self.embed(ids[:, :-1])
            for i, layer in enumerate(self.layers.values()):
                x = layer(x, bump if i == 0 else None)
            logits = self.head(self.norm(x)).float()
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    state = {}
    for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [k.key for k in keys if k.key != "params"]
        prefix = ["layers"] if names[0].startswith("layer_") else []
        value = np.asarray(x, np.float32)
        value = value.T if names[-1] == "kernel" else value
        state[".".join([*prefix, *names[:-1], "weight"])] = torch.from_numpy(
            value.copy()
        )
    model = TorchDecoder()
    model.load_state_dict(state)
    return model.to(device, getattr(torch, jnp.dtype(dtype).name))
