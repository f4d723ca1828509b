"""One token of one row, with a key-value cache: what a server makes a batch of."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.append(str(Path(__file__).parents[1] / "smollm"))
from model import Llama, rotated


def empty(model: Llama, length: int) -> dict[str, jax.Array]:
    """The cache of a row of so many tokens: (layers, length, kv_heads, size) twice."""
    c, dtype = model.layers.config, model.norm.scale.get_value().dtype
    shape = (c.layers, length, c.kv_heads, c.head_dim)
    return {name: jnp.zeros(shape, dtype) for name in "kv"}


def step(model: Llama, cache, token, at):
    """The next token's logits (vocabulary,), and the cache with this token in it.

    Args:
      model: with scanned layers.
      cache: as `empty` makes it.
      token: () an integer.
      at: () its position.
    """

    def layer(x, own):
        layer, cache = own
        c = layer.config
        h = layer.attention_norm(x)
        q, k, v = (
            p(h).reshape(1, 1, -1, c.head_dim) for p in (layer.q, layer.k, layer.v)
        )
        q, k = (rotated(y, c.theta, at) for y in (q, k))
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], y[0], at, axis=0)
            for name, y in (("k", k), ("v", v))
        }
        seen = jnp.arange(len(cache["k"])) <= at
        attended = jax.nn.dot_product_attention(
            q, cache["k"][None], cache["v"][None], mask=seen[None, None, None]
        )
        x = x + layer.o(attended.reshape(1, 1, -1))
        h = layer.ffn_norm(x)
        return x + layer.down(nnx.silu(layer.gate(h)) * layer.up(h)), cache

    x = model.embed(token[None, None])
    x, cache = jax.lax.scan(layer, x, (model.layers, cache))
    return model.embed.attend(model.norm(x))[0, 0], cache
