"""Models of dm-haiku, some with parameters under names of their own."""

import haiku as hk
import jax
import jax.numpy as jnp
from helpers import normal
from layouts_base import (
    BATCH,
    HEADS,
    KEY,
    LAYERS,
    SIZE,
    TIME,
    VOCAB,
    WIDTH,
    drawn,
    ids,
    layout,
)


def haiku(function, *args):
    model = hk.without_apply_rng(hk.transform(function))
    return model.apply, drawn(jax.eval_shape(model.init, KEY, *args)), args


# Haiku: w and b in a dict for each module; AlphaFold has names and layers of its own.


def alphafold_linear(size, name):
    """Its weights are called so, and have as many axes as the output has, and one."""

    class Linear(hk.Module):
        def __call__(self, x):
            shape = (x.shape[-1], size)
            w = hk.get_parameter("weights", shape, init=jnp.zeros)
            return x @ w + hk.get_parameter("bias", shape[1:], init=jnp.zeros)

    return Linear(name)


class AlphaFoldAttention(hk.Module):
    def __call__(self, q_data, m_data, bias):
        def w(name, *shape):
            return hk.get_parameter(name, shape, init=jnp.zeros)

        q = jnp.einsum("bqa,ahc->bqhc", q_data, w("query_w", WIDTH, HEADS, SIZE))
        k = jnp.einsum("bka,ahc->bkhc", m_data, w("key_w", WIDTH, HEADS, SIZE))
        v = jnp.einsum("bka,ahc->bkhc", m_data, w("value_w", WIDTH, HEADS, SIZE))
        logits = jnp.einsum("bqhc,bkhc->bhqk", q, k) + bias
        o = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits), v)
        gate = jnp.einsum("bqc,chv->bqhv", q_data, w("gating_w", WIDTH, HEADS, SIZE))
        o = o * jax.nn.sigmoid(gate + w("gating_b", HEADS, SIZE))
        out = w("output_w", HEADS, SIZE, WIDTH)
        return jnp.einsum("bqhc,hco->bqo", o, out) + w("output_b", WIDTH)


class AlphaFoldRows(hk.Module):
    def __call__(self, msa, pair):
        h = hk.LayerNorm(-1, True, True, name="query_norm")(msa)
        w = hk.get_parameter("feat_2d_weights", (8, HEADS), init=jnp.zeros)
        bias = jnp.einsum("qkc,ch->hqk", pair, w)
        return AlphaFoldAttention(name="attention")(h, h, bias)


class AlphaFoldTransition(hk.Module):
    def __call__(self, x):
        x = hk.LayerNorm(-1, True, True, name="input_layer_norm")(x)
        x = jax.nn.relu(alphafold_linear(4 * WIDTH, "transition1")(x))
        return alphafold_linear(WIDTH, "transition2")(x)


class Evoformer(hk.Module):
    def __call__(self, msa, pair):
        msa = msa + AlphaFoldRows(name="msa_row_attention_with_pair_bias")(msa, pair)
        return msa + AlphaFoldTransition(name="msa_transition")(msa), pair


def evoformer(msa, pair):
    msa = alphafold_linear(WIDTH, "preprocess_msa")(msa)
    stack = hk.experimental.layer_stack(LAYERS)
    return stack(lambda msa, pair: Evoformer(name="evoformer_iteration")(msa, pair))(
        msa, pair
    )[0]


@layout("AlphaFold's evoformer (Haiku, stack)", "alphafold: model/modules.py")
def alphafold():
    return haiku(evoformer, normal(3, TIME, 11), normal(TIME, TIME, 8))


def haiku_transformer(x):
    table = hk.Embed(VOCAB, WIDTH)
    x = table(x) + hk.get_parameter(
        "positional_embeddings", (TIME, WIDTH), init=jnp.ones
    )
    init = hk.initializers.VarianceScaling(1.0)
    for _ in range(LAYERS):
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(HEADS, SIZE, w_init=init, model_size=WIDTH)(
            h, h, h
        )
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(4 * WIDTH)(h)))
    return hk.Linear(VOCAB)(x)


@layout("transformer (Haiku)", "dm-haiku: examples/transformer/model.py")
def haiku_lm():
    return haiku(haiku_transformer, ids())


class StandardisedConv(hk.Module):
    """Its kernel is used after a standardisation, times a gain."""

    def __init__(self, size, groups, name):
        super().__init__(name)
        self.size, self.groups = size, groups

    def __call__(self, x):
        shape = 3, 3, x.shape[-1] // self.groups, self.size
        w = hk.get_parameter("w", shape, init=jnp.zeros)
        gain = hk.get_parameter("gain", shape[-1:], init=jnp.ones)
        w = w - w.mean((0, 1, 2))
        w = w * gain * jax.lax.rsqrt((w * w).mean((0, 1, 2)) + 1e-4)
        numbers = "NHWC", "HWIO", "NHWC"
        y = jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=self.groups,
        )
        return y + hk.get_parameter("b", shape[-1:], init=jnp.zeros)


@layout("NFNet (Haiku)", "deepmind-research: nfnets/base.py, WSConv2D")
def nfnet():
    """Only the head is read as it is; the kernels are formed from their arrays."""

    def net(x):
        x = hk.Conv2D(8, 3, name="stem_conv0")(x)
        x = StandardisedConv(16, 1, name="ws_conv2_d")(jax.nn.gelu(x))
        x = StandardisedConv(16, 2, name="ws_conv2_d_1")(x)
        return hk.Linear(5, name="linear")(x.mean((1, 2)))

    return haiku(net, normal(BATCH, 6, 6, 3))
