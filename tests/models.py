"""Models that the tests adapt: a scanned language model, a conv net, a Llama.

The first two are Flax Linen; the third is a plain function of a dict, since nothing
in the library may depend on a framework. Dimensions of the Llama are primes or
products of primes that no activation shares, so an array of a base weight's size is
recognised in a jaxpr or in HLO by its number of elements alone.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Block(nn.Module):
    """A pre-norm transformer block with the (carry, xs) signature of nn.scan."""

    d: int
    heads: int
    ffn: int

    @nn.compact
    def __call__(self, x, _):
        hd = self.d // self.heads
        h = nn.LayerNorm(name="norm1")(x)
        q = nn.DenseGeneral((self.heads, hd), name="query")(h)
        k = nn.DenseGeneral((self.heads, hd), name="key", use_bias=False)(h)
        v = nn.DenseGeneral((self.heads, hd), name="value")(h)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(hd)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scores = jnp.where(causal[None, None], scores, jnp.finfo(scores.dtype).min)
        o = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        x = x + nn.DenseGeneral(self.d, axis=(-2, -1), name="out")(o)
        h = nn.LayerNorm(name="norm2")(x)
        h = jax.nn.gelu(nn.Dense(self.ffn, name="up")(h))
        return x + nn.Dense(self.d, name="down")(h), None


class ScannedLM(nn.Module):
    """Embedding, scanned and rematerialised blocks, logits by the tied embedding."""

    vocab: int = 61
    d: int = 24
    heads: int = 3
    ffn: int = 52
    layers: int = 3

    def setup(self):
        block = nn.remat(
            Block,
            prevent_cse=False,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        )
        self.embed = nn.Embed(self.vocab, self.d)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )(self.d, self.heads, self.ffn)
        self.norm = nn.LayerNorm()

    def encode(self, ids):
        x, _ = self.blocks(self.embed(ids), None)
        return self.norm(x)

    def __call__(self, ids):
        return self.embed.attend(self.encode(ids))


class UnrolledLM(nn.Module):
    """The same blocks, each traced for itself."""

    vocab: int = 61
    d: int = 24
    heads: int = 3
    ffn: int = 52
    layers: int = 3

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.vocab, self.d)
        x = embed(ids)
        for _ in range(self.layers):
            x, _ = Block(self.d, self.heads, self.ffn)(x, None)
        return embed.attend(nn.LayerNorm()(x))


class ConvNet(nn.Module):
    """Strided, dilated, grouped and depthwise convolutions; statistics; dropout."""

    classes: int = 5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = jax.nn.relu(x)
        x = nn.Conv(
            12, (3, 3), kernel_dilation=2, feature_group_count=2, name="grouped"
        )(x)
        x = jax.nn.relu(x)
        x = nn.Conv(12, (3, 3), feature_group_count=12, name="depthwise")(x)
        x = nn.Conv(10, (2, 2), input_dilation=2, padding=1, name="upward")(x)
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


@functools.cache
def scanned_lm():
    """The scanned LM with its params and a batch of ids: model, params, ids."""
    model = ScannedLM()
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, model.vocab)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"], ids


@functools.cache
def conv_net():
    """The conv net with its variables and a batch: model, variables, images."""
    model = ConvNet()
    x = jax.random.normal(jax.random.key(1), (2, 11, 13, 3))
    return model, jax.jit(model.init)(jax.random.key(0), x), x


@dataclasses.dataclass(frozen=True)
class Llama:
    """A Llama-like decoder, unrolled, as a plain function of a dict."""

    d: int = 503
    ffn: int = 1009
    vocab: int = 1999
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 122
    layers: int = 2

    def shapes(self):
        """The params as ShapeDtypeStructs: nothing is allocated."""

        def array(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "norm1": array(self.d),
            "wq": array(self.d, q),
            "wk": array(self.d, kv),
            "wv": array(self.d, kv),
            "wo": array(q, self.d),
            "norm2": array(self.d),
            "gate": array(self.d, self.ffn),
            "up": array(self.d, self.ffn),
            "down": array(self.ffn, self.d),
        }
        return {
            "embed": array(self.vocab, self.d),
            **{f"layer_{i}": dict(layer) for i in range(self.layers)},
            "norm": array(self.d),
            "head": array(self.d, self.vocab),
        }

    def init(self, seed=0):
        """Random params, drawn by numpy: nothing is compiled."""
        rng = np.random.default_rng(seed)

        def array(leaf):
            if len(leaf.shape) == 1:
                return jnp.ones(leaf.shape)
            draw = rng.normal(size=leaf.shape) / math.sqrt(leaf.shape[0])
            return jnp.asarray(draw, leaf.dtype)

        return jax.tree.map(array, self.shapes())

    def __call__(self, params, ids, bump=None):
        """Logits. `bump` is added to the first layer's q, k and v: a zero there, and
        the gradient with respect to it, make the floor of invariant 5."""
        batch, seq = ids.shape
        x = params["embed"][ids]
        for i in range(self.layers):
            p = params[f"layer_{i}"]
            h = rms_norm(x, p["norm1"])
            qkv = [h @ p["wq"], h @ p["wk"], h @ p["wv"]]
            if i == 0 and bump is not None:
                qkv = [y + z for y, z in zip(qkv, bump, strict=True)]
            q, k, v = (y.reshape(batch, seq, -1, self.head_dim) for y in qkv)
            q = q.reshape(batch, seq, self.kv_heads, -1, self.head_dim)
            scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k) / math.sqrt(self.head_dim)
            causal = jnp.tril(jnp.ones((seq, seq), bool))[None, None, None]
            weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
            o = jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(batch, seq, -1)
            x = x + o @ p["wo"]
            h = rms_norm(x, p["norm2"])
            x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return rms_norm(x, params["norm"]) @ params["head"]

    def loss(self, params, ids, bump=None):
        """Mean next-token cross entropy of (batch, seq + 1) ids."""
        logits = jax.nn.log_softmax(self(params, ids[:, :-1], bump))
        return -jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1).mean()


# The seven matrices of every layer, as a target pattern.
LLAMA_TARGETS = [f"layer_*/{name}" for name in "wq wk wv wo gate up down".split()]
LLAMA_70B = Llama(8192, 28672, 128256, 64, 8, 128, 80)


def rms_norm(x, scale):
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))
