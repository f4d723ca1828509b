"""Llama in Flax NNX: grouped-query attention, rotary positions, SwiGLU, tied words."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int
    features: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    """The base of the rotary frequencies."""
    eps: float


class Layer(nnx.Module):
    """One pre-norm transformer layer: attention, then a gated block."""

    def __init__(self, config: Config, dtype: DTypeLike | None, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(nnx.RMSNorm, epsilon=config.eps, dtype=dtype, rngs=rngs)
        d, size = config.features, config.head_dim
        self.config = config
        self.attention_norm = norm(d)
        self.q = linear(d, config.heads * size)
        self.k = linear(d, config.kv_heads * size)
        self.v = linear(d, config.kv_heads * size)
        self.o = linear(config.heads * size, d)
        self.ffn_norm = norm(d)
        self.gate = linear(d, config.ffn)
        self.up = linear(d, config.ffn)
        self.down = linear(config.ffn, d)

    def __call__(self, x, mask):
        """Hidden states (batch, length, d); mask (batch, 1, length, length)."""
        h = self.attention_norm(x)
        # Heads become an axis. Several heads of q share one of k and v.
        q, k, v = (
            p(h).reshape(*h.shape[:2], -1, self.config.head_dim)
            for p in (self.q, self.k, self.v)
        )
        q, k = (rotated(y, self.config.theta) for y in (q, k))
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask)
        x = x + self.o(attended.reshape(*h.shape[:2], -1))
        h = self.ffn_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """Token ids (batch, length) to the next tokens' logits (batch, length, vocabulary).

    With `scanned` the layers are one `Layer` whose arrays have a leading axis, run by a
    scan, which is compiled in less time. `dtype` is that of the activations.
    """

    def __init__(
        self,
        config: Config,
        *,
        scanned: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.scanned = scanned
        self.embed = nnx.Embed(
            config.vocabulary, config.features, dtype=dtype, rngs=rngs
        )
        layer = partial(Layer, config, dtype)
        if scanned:
            self.layers = nnx.vmap(layer)(rngs.split(config.layers))
        else:
            self.layers = nnx.List(layer(rngs) for _ in range(config.layers))
        self.norm = nnx.RMSNorm(
            config.features, epsilon=config.eps, dtype=dtype, rngs=rngs
        )

    def __call__(self, ids, segments=None):
        """Logits.

        `segments` (batch, length) numbers the sentences that share a row: a token sees
        those before it with the same number.
        """
        causal = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))[None, None]
        mask = causal
        if segments is not None:
            mask = causal & (segments[:, None, :, None] == segments[:, None, None, :])
        x = self.embed(ids)
        if self.scanned:
            x, _ = jax.lax.scan(lambda x, layer: (layer(x, mask), None), x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x, mask)
        return self.embed.attend(self.norm(x))


def rotated(x, theta, start=0):
    """Rotary positions, from `start` on, for x (batch, length, heads, size).

    A pair that turns together is the element i of the first half and that of the second
    one, as in transformers. It is computed in float32.
    """
    half = x.shape[-1] // 2
    positions = start + jnp.arange(x.shape[1])
    angles = positions[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # (length, 1, half)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)


def cross_entropy(logits, targets, mask):
    """The mean over the tokens of the mask, in nats, of the loss of each target."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
    return jnp.sum(losses * mask) / jnp.sum(mask)
