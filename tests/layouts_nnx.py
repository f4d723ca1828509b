"""Models of Flax NNX, with its layers and with parameters of their own."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from helpers import normal
from layouts_base import (
    BATCH,
    FFN,
    HEADS,
    KV,
    LAYERS,
    SIZE,
    VOCAB,
    WIDTH,
    attend,
    flat,
    heads,
    ids,
    layout,
    nnx_module,
    rms,
)

# Tunix: an Einsum of its own in NNX, biases beside and not in it.


class Tied(nnx.Module):
    """Blocks between an embedding and the same, transposed."""

    def __init__(self, block, rngs):
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([block(rngs) for _ in range(LAYERS)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.embedder(x)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(self.final_norm(x))


class TunixEinsum(nnx.Module):
    def __init__(self, text, shape, rngs):
        self.text = text
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.text, x, self.w[...])


class TunixNorm(nnx.Module):
    def __init__(self, width, rngs):
        self.w = nnx.Param(nnx.initializers.ones_init()(rngs.params(), width))

    def __call__(self, x):
        return rms(x, self.w[...])


class TunixAttention(nnx.Module):
    def __init__(self, rngs, bias):
        self.q_proj = TunixEinsum("BTD,DNH->BTNH", (WIDTH, HEADS, SIZE), rngs)
        self.k_proj = TunixEinsum("BSD,DKH->BSKH", (WIDTH, KV, SIZE), rngs)
        self.v_proj = TunixEinsum("BSD,DKH->BSKH", (WIDTH, KV, SIZE), rngs)
        self.o_proj = TunixEinsum("BTNH,NHD->BTD", (HEADS, SIZE, WIDTH), rngs)
        self.bias = bias
        if bias:  # Qwen 2
            zeros = nnx.initializers.zeros_init()
            self.q_bias = nnx.Param(zeros(rngs.params(), HEADS * SIZE))
            self.k_bias = nnx.Param(zeros(rngs.params(), KV * SIZE))
            self.v_bias = nnx.Param(zeros(rngs.params(), KV * SIZE))
        else:  # Qwen 3
            self.q_norm = TunixNorm(SIZE, rngs)
            self.k_norm = TunixNorm(SIZE, rngs)

    def __call__(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.bias:
            pairs = (q, self.q_bias), (k, self.k_bias), (v, self.v_bias)
            q, k, v = (x + b[...].reshape(x.shape[-2:]) for x, b in pairs)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(q, k, v))


class TunixMLP(nnx.Module):
    def __init__(self, rngs):
        dense = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_proj = dense(WIDTH, FFN)
        self.up_proj = dense(WIDTH, FFN)
        self.down_proj = dense(FFN, WIDTH)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class TunixExperts(nnx.Module):
    """Every expert on every token, weighted by the router's two best."""

    def __init__(self, rngs, experts=4):
        init = nnx.initializers.normal()
        self.router = nnx.Linear(WIDTH, experts, use_bias=False, rngs=rngs)
        self.gate_proj = nnx.Param(init(rngs.params(), (experts, WIDTH, FFN)))
        self.up_proj = nnx.Param(init(rngs.params(), (experts, WIDTH, FFN)))
        self.down_proj = nnx.Param(init(rngs.params(), (experts, FFN, WIDTH)))

    def __call__(self, x):
        scores = jax.nn.softmax(self.router(x))
        best, chosen = jax.lax.top_k(scores, 2)
        mask = jax.nn.one_hot(chosen, scores.shape[-1]) * best[..., None]
        x = jnp.einsum("BTD,BTNE->BTED", x, jax.nn.one_hot(chosen, scores.shape[-1]))
        gate = jnp.einsum("BTED,EDF->BTEF", x, self.gate_proj[...])
        up = jnp.einsum("BTED,EDF->BTEF", x, self.up_proj[...])
        h = jnp.einsum("BTEF,EFD->BTED", nnx.silu(gate) * up, self.down_proj[...])
        return jnp.einsum("BTED,BTNE->BTD", h, mask)


class TunixLayer(nnx.Module):
    def __init__(self, rngs, bias, experts):
        self.input_layernorm = TunixNorm(WIDTH, rngs)
        self.attn = TunixAttention(rngs, bias)
        self.post_attention_layernorm = TunixNorm(WIDTH, rngs)
        self.mlp = TunixExperts(rngs) if experts else TunixMLP(rngs)

    def __call__(self, x):
        x = x + self.attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TunixEmbedder(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.normal()
        self.input_embedding = nnx.Param(init(rngs.params(), (VOCAB, WIDTH)))

    def encode(self, x):
        return self.input_embedding[...][(x,)]


class Tunix(nnx.Module):
    def __init__(self, rngs, bias=False, experts=False):
        self.embedder = TunixEmbedder(rngs)
        self.layers = nnx.List([TunixLayer(rngs, bias, experts) for _ in range(LAYERS)])
        self.final_norm = TunixNorm(WIDTH, rngs)
        self.lm_head = TunixEinsum("BTD,DV->BTV", (WIDTH, VOCAB), rngs)

    def __call__(self, x):
        x = self.embedder.encode(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))


@layout("qwen 2 (NNX)", "google-tunix 0.1: models/qwen2/model.py")
def tunix_qwen2():
    return nnx_module(functools.partial(Tunix, bias=True), ids())


@layout("qwen 3 MoE (NNX)", "google-tunix 0.1: models/qwen3/model.py")
def tunix_qwen3_moe():
    return nnx_module(functools.partial(Tunix, experts=True), ids())


# NNX's own layers: one by one, stacked by vmap, and with parameters beside them.


class DinoMLP(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.fc2 = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x)))


class DinoBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.gamma1 = nnx.Param(jnp.ones(WIDTH))
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp = DinoMLP(rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x)) * self.gamma1[...]
        return x + self.mlp(self.norm2(x))


class DinoViT(nnx.Module):
    def __init__(self, rngs, stacked=False):
        shape = (3, 3)
        self.patch = nnx.Conv(3, WIDTH, shape, shape, padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 5, WIDTH)))
        if stacked:
            self.blocks = nnx.vmap(DinoBlock)(rngs.split(LAYERS))
        else:
            self.blocks = nnx.List([DinoBlock(rngs) for _ in range(LAYERS)])
        self.stacked = stacked
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 7, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x).reshape(len(x), -1, WIDTH)
        cls = jnp.broadcast_to(self.cls_token[...], (len(x), 1, WIDTH))
        x = jnp.concatenate([cls, x], 1) + self.pos_embed[...]
        if self.stacked:
            step = nnx.scan(
                lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            x = step(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x)[:, 0])


@layout("DINOv2 (NNX)", "ports of timm's ViT: nnx.MultiHeadAttention, layer scale")
def dino():
    return nnx_module(DinoViT, normal(BATCH, 6, 6, 3))


@layout("ViT (NNX, stacked by vmap)", "flax: nnx.vmap and nnx.scan over the blocks")
def dino_stacked():
    return nnx_module(functools.partial(DinoViT, stacked=True), normal(BATCH, 6, 6, 3))


class MambaConv(nnx.Module):
    def __init__(self, size, rngs):
        options = dict(feature_group_count=size, padding="CAUSAL", rngs=rngs)
        self.conv = nnx.Conv(size, size, (4,), **options)

    def __call__(self, x):
        return self.conv(x)


class MambaMixer(nnx.Module):
    """A scan over time of states of each channel; matrices before and after."""

    def __init__(self, rngs, states=4):
        inner, rank = 2 * WIDTH, 3
        dense = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.in_proj = dense(WIDTH, 2 * inner)
        self.conv1d = MambaConv(inner, rngs)
        self.x_proj = dense(inner, rank + 2 * states)
        self.dt_proj = nnx.Linear(rank, inner, rngs=rngs)
        self.A_log = nnx.Param(jnp.zeros((inner, states)))
        self.D = nnx.Param(jnp.ones(inner))
        self.out_proj = dense(inner, WIDTH)
        self.splits = rank, rank + states

    def __call__(self, x):
        x, z = jnp.split(self.in_proj(x), 2, -1)
        x = nnx.silu(self.conv1d(x))
        dt, b, c = jnp.split(self.x_proj(x), self.splits, -1)
        dt = nnx.softplus(self.dt_proj(dt))
        decay = jnp.exp(-dt[..., None] * jnp.exp(self.A_log[...]))
        push = (dt * x)[..., None] * b[..., None, :]

        def step(h, xs):
            h = xs[0] * h + xs[1]
            return h, jnp.einsum("bds,bs->bd", h, xs[2])

        xs = [jnp.moveaxis(y, 1, 0) for y in (decay, push, c)]
        _, y = jax.lax.scan(step, jnp.zeros_like(push[:, 0]), xs)
        return self.out_proj((jnp.moveaxis(y, 0, 1) + self.D[...] * x) * nnx.silu(z))


class MambaBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mixer = MambaMixer(rngs)

    def __call__(self, x):
        return x + self.mixer(self.norm(x))


@layout("mamba (NNX)", "bonsai: models/mamba2/modeling.py, with mamba 1's mixer")
def mamba():
    return nnx_module(functools.partial(Tied, MambaBlock), ids())


class GptOssExperts(nnx.Module):
    """Each expert has a bias of its own, under a name with its weight's."""

    def __init__(self, experts):
        self.gate_up_proj = nnx.Param(jnp.zeros((experts, WIDTH, 2 * FFN)))
        self.gate_up_proj_bias = nnx.Param(jnp.zeros((experts, 2 * FFN)))
        self.down_proj = nnx.Param(jnp.zeros((experts, FFN, WIDTH)))
        self.down_proj_bias = nnx.Param(jnp.zeros((experts, WIDTH)))

    def __call__(self, x, weights):
        x = jnp.broadcast_to(x[None], (weights.shape[-1], *x.shape))
        h = jnp.einsum("enh,ehd->end", x, self.gate_up_proj[...])
        h = h + self.gate_up_proj_bias[...][:, None]
        h = nnx.silu(h[..., ::2]) * (h[..., 1::2] + 1)
        h = jnp.einsum("end,edh->enh", h, self.down_proj[...])
        h = h + self.down_proj_bias[...][:, None]
        return jnp.sum(h * weights.T[..., None], 0)


class GptOssRouter(nnx.Module):
    def __init__(self, rngs, experts):
        self.linear = nnx.Linear(WIDTH, experts, rngs=rngs)

    def __call__(self, x):
        return nnx.softmax(self.linear(x))


class GptOssMLP(nnx.Module):
    def __init__(self, rngs, experts=4):
        self.router = GptOssRouter(rngs, experts)
        self.experts = GptOssExperts(experts)

    def __call__(self, x):
        flat = x.reshape(-1, WIDTH)
        return self.experts(flat, self.router(flat)).reshape(x.shape)


class GptOssAttention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = nnx.Linear(WIDTH, HEADS * SIZE, rngs=rngs)
        self.k_proj = nnx.Linear(WIDTH, KV * SIZE, rngs=rngs)
        self.v_proj = nnx.Linear(WIDTH, KV * SIZE, rngs=rngs)
        self.o_proj = nnx.Linear(HEADS * SIZE, WIDTH, rngs=rngs)
        self.sinks = nnx.Param(jnp.zeros(HEADS))

    def __call__(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        o = attend(heads(q) + self.sinks[...][:, None], heads(k, KV), heads(v, KV))
        return self.o_proj(flat(o))


class GptOssLayer(nnx.Module):
    def __init__(self, rngs):
        self.input_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.self_attn = GptOssAttention(rngs)
        self.post_attention_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = GptOssMLP(rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class GptOss(nnx.Module):
    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([GptOssLayer(rngs) for _ in range(LAYERS)])
        self.lm_head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@layout("gpt-oss (NNX)", "bonsai: models/gpt_oss/modeling.py")
def gpt_oss():
    return nnx_module(GptOss, ids())


class FlaxGemmaBlock(nnx.Module):
    """The equations are the layers' own."""

    def __init__(self, rngs):
        einsum = functools.partial(nnx.Einsum, rngs=rngs)
        self.pre_attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.q_einsum = einsum("BTD,NDH->BTNH", (HEADS, WIDTH, SIZE))
        self.kv_einsum = einsum("BSD,CKDH->CBSKH", (2, KV, WIDTH, SIZE))
        self.attn_vec_einsum = einsum("BTNH,NHD->BTD", (HEADS, SIZE, WIDTH), (WIDTH,))
        self.pre_ffw_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = TunixMLP(rngs)

    def __call__(self, x):
        h = self.pre_attention_norm(x)
        o = attend(self.q_einsum(h), *self.kv_einsum(h))
        x = x + self.attn_vec_einsum(o)
        return x + self.mlp(self.pre_ffw_norm(x))


@layout("gemma (NNX, nnx.Einsum)", "flax: examples/gemma/modules.py, and a bias")
def flax_gemma():
    return nnx_module(functools.partial(Tied, FlaxGemmaBlock), ids())
