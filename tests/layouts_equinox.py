"""Models of Equinox, and of haliax on it."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import normal
from layouts_base import (
    BATCH,
    FFN,
    HEADS,
    KV,
    LAYERS,
    SIZE,
    TIME,
    VOCAB,
    WIDTH,
    attend,
    eqx_module,
    flat,
    ids,
    layout,
    normed,
)

# Levanter: Equinox modules of named arrays, stacked.


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """A node whose only child has no name in a path, but its number."""

    array: jax.Array
    axes: tuple[str, ...]

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(*children, axes)


class HaliaxLinear(eqx.Module):
    weight: NamedArray
    bias: NamedArray | None
    ins: int = eqx.field(static=True)

    def __init__(self, inner, outer, bias=True, out_first=False):
        axes = {**outer, **inner} if out_first else {**inner, **outer}
        self.weight = NamedArray(jnp.zeros(tuple(axes.values())), tuple(axes))
        self.bias = None
        if bias:
            self.bias = NamedArray(jnp.zeros(tuple(outer.values())), tuple(outer))
        self.ins = -len(inner) if out_first else len(inner)

    def __call__(self, x):
        n, w = abs(self.ins), self.weight.array
        own = range(w.ndim)[self.ins :] if self.ins < 0 else range(n)
        last = tuple(range(x.ndim - n, x.ndim))
        x = jax.lax.dot_general(x, w, ((last, tuple(own)), ((), ())))
        return x if self.bias is None else x + self.bias.array


class HaliaxNorm(eqx.Module):
    weight: NamedArray
    bias: NamedArray | None

    def __init__(self, bias=True):
        self.weight = NamedArray(jnp.ones(WIDTH), ("embed",))
        self.bias = NamedArray(jnp.zeros(WIDTH), ("embed",)) if bias else None

    def __call__(self, x):
        bias = 0.0 if self.bias is None else self.bias.array
        return normed(x, self.weight.array, bias)


EMBED, MLP = {"embed": WIDTH}, {"mlp": 4 * WIDTH}
SPLIT, VOCABULARY = {"heads": HEADS, "head_size": SIZE}, {"vocab": VOCAB}


class LevanterGPT2Attention(eqx.Module):
    c_attn: HaliaxLinear
    c_proj: HaliaxLinear

    def __init__(self):
        self.c_attn = HaliaxLinear(EMBED, {"qkv": 3} | SPLIT)
        self.c_proj = HaliaxLinear(SPLIT, EMBED)

    def __call__(self, x):
        q, k, v = jnp.moveaxis(self.c_attn(x), -3, 0)
        return self.c_proj(attend(q, k, v))


class LevanterGPT2MLP(eqx.Module):
    c_fc: HaliaxLinear
    c_proj: HaliaxLinear

    def __init__(self):
        self.c_fc = HaliaxLinear(EMBED, MLP)
        self.c_proj = HaliaxLinear(MLP, EMBED)

    def __call__(self, x):
        return self.c_proj(jax.nn.gelu(self.c_fc(x)))


class LevanterGPT2Block(eqx.Module):
    ln_1: HaliaxNorm
    attn: LevanterGPT2Attention
    ln_2: HaliaxNorm
    mlp: LevanterGPT2MLP

    def __init__(self):
        self.ln_1, self.ln_2 = HaliaxNorm(), HaliaxNorm()
        self.attn, self.mlp = LevanterGPT2Attention(), LevanterGPT2MLP()

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Stacked(eqx.Module):
    stacked: eqx.Module

    def __init__(self, make):
        self.stacked = eqx.filter_vmap(lambda _: make())(jnp.arange(LAYERS))

    def __call__(self, x):
        arrays, static = eqx.partition(self.stacked, eqx.is_array)

        def step(x, layer):
            return eqx.combine(layer, static)(x), None

        return jax.lax.scan(jax.checkpoint(step), x, arrays)[0]


class LevanterTransformer(eqx.Module):
    blocks: Stacked
    ln_f: HaliaxNorm

    def __init__(self):
        self.blocks, self.ln_f = Stacked(LevanterGPT2Block), HaliaxNorm()

    def __call__(self, x):
        return self.ln_f(self.blocks(x))


class LevanterGPT2Embeddings(eqx.Module):
    token_embeddings: NamedArray
    position_embeddings: NamedArray

    def __init__(self):
        self.token_embeddings = NamedArray(
            jnp.zeros((VOCAB, WIDTH)), ("vocab", "embed")
        )
        self.position_embeddings = NamedArray(
            jnp.zeros((TIME, WIDTH)), ("pos", "embed")
        )

    def __call__(self, x):
        return self.token_embeddings.array[x] + self.position_embeddings.array

    def unembed(self, x):
        return jnp.einsum("...d,vd->...v", x, self.token_embeddings.array)


class LevanterGPT2(eqx.Module):
    transformer: LevanterTransformer
    embeddings: LevanterGPT2Embeddings

    def __init__(self, key):
        self.transformer = LevanterTransformer()
        self.embeddings = LevanterGPT2Embeddings()

    def __call__(self, x):
        return self.embeddings.unembed(self.transformer(self.embeddings(x)))


@layout("GPT-2 (haliax, Stacked)", "levanter 1.1: models/gpt2.py")
def levanter_gpt2():
    return eqx_module(LevanterGPT2, ids())


class LevanterLlamaAttention(eqx.Module):
    """Of haliax since it has the out axes first, as torch does."""

    q_proj: HaliaxLinear
    k_proj: HaliaxLinear
    v_proj: HaliaxLinear
    o_proj: HaliaxLinear

    def __init__(self):
        dense = functools.partial(HaliaxLinear, bias=False, out_first=True)
        keys = {"kv_heads": KV, "head_size": SIZE}
        groups = {"kv_heads": KV, "q_heads_per_group": HEADS // KV, "head_size": SIZE}
        self.q_proj = dense(EMBED, groups)
        self.k_proj = dense(EMBED, keys)
        self.v_proj = dense(EMBED, keys)
        self.o_proj = dense(SPLIT, EMBED)

    def __call__(self, x):
        q = self.q_proj(x).reshape(*x.shape[:-1], HEADS, SIZE)
        return self.o_proj(attend(q, self.k_proj(x), self.v_proj(x)))


class LevanterLlamaMLP(eqx.Module):
    gate_proj: HaliaxLinear
    up_proj: HaliaxLinear
    down_proj: HaliaxLinear

    def __init__(self):
        dense = functools.partial(HaliaxLinear, bias=False, out_first=True)
        self.gate_proj, self.up_proj = dense(EMBED, MLP), dense(EMBED, MLP)
        self.down_proj = dense(MLP, EMBED)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class LevanterLlamaBlock(eqx.Module):
    self_attn: LevanterLlamaAttention
    mlp: LevanterLlamaMLP
    input_layernorm: HaliaxNorm
    post_attention_layernorm: HaliaxNorm

    def __init__(self):
        self.self_attn, self.mlp = LevanterLlamaAttention(), LevanterLlamaMLP()
        self.input_layernorm = HaliaxNorm(bias=False)
        self.post_attention_layernorm = HaliaxNorm(bias=False)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LevanterLlamaTransformer(eqx.Module):
    layers: Stacked
    norm: HaliaxNorm

    def __init__(self):
        self.layers, self.norm = Stacked(LevanterLlamaBlock), HaliaxNorm(bias=False)

    def __call__(self, x):
        return self.norm(self.layers(x))


class HaliaxEmbedding(eqx.Module):
    weight: NamedArray

    def __init__(self):
        self.weight = NamedArray(jnp.zeros((VOCAB, WIDTH)), ("vocab", "embed"))

    def __call__(self, x):
        return self.weight.array[x]


class LevanterLlamaEmbeddings(eqx.Module):
    token_embeddings: HaliaxEmbedding

    def __init__(self):
        self.token_embeddings = HaliaxEmbedding()

    def __call__(self, x):
        return self.token_embeddings(x)


class LevanterLlama(eqx.Module):
    transformer: LevanterLlamaTransformer
    embeddings: LevanterLlamaEmbeddings
    lm_head: HaliaxLinear

    def __init__(self, key):
        self.transformer = LevanterLlamaTransformer()
        self.embeddings = LevanterLlamaEmbeddings()
        self.lm_head = HaliaxLinear(EMBED, VOCABULARY, bias=False, out_first=True)

    def __call__(self, x):
        return self.lm_head(self.transformer(self.embeddings(x)))


@layout("llama (haliax, out axes first)", "levanter: models/llama.py, haliax 1.4")
def levanter_llama():
    return eqx_module(LevanterLlama, ids())


# Equinox: (out, in), layers one by one.


class EquimoAttention(eqx.Module):
    qkv: eqx.nn.Linear
    proj: eqx.nn.Linear

    def __init__(self, key):
        self.qkv = eqx.nn.Linear(WIDTH, 3 * WIDTH, key=key)
        self.proj = eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def __call__(self, x):
        qkv = jax.vmap(self.qkv)(x).reshape(len(x), 3, HEADS, SIZE)
        return jax.vmap(self.proj)(flat(attend(*jnp.moveaxis(qkv, 1, 0))))


class EquimoMlp(eqx.Module):
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear

    def __init__(self, key):
        self.fc1 = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=key)
        self.fc2 = eqx.nn.Linear(4 * WIDTH, WIDTH, key=key)

    def __call__(self, x):
        return jax.vmap(self.fc2)(jax.nn.gelu(jax.vmap(self.fc1)(x)))


class EquimoBlock(eqx.Module):
    prenorm: eqx.nn.LayerNorm
    attn: EquimoAttention
    norm: eqx.nn.LayerNorm
    mlp: EquimoMlp

    def __init__(self, key):
        self.prenorm, self.norm = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attn, self.mlp = EquimoAttention(key), EquimoMlp(key)

    def __call__(self, x):
        x = x + self.attn(jax.vmap(self.prenorm)(x))
        return x + self.mlp(jax.vmap(self.norm)(x))


class EquimoPatches(eqx.Module):
    proj: eqx.nn.Conv

    def __init__(self, key):
        self.proj = eqx.nn.Conv(2, 3, WIDTH, 3, 3, key=key)

    def __call__(self, x):
        return self.proj(x).reshape(WIDTH, -1).T


class EquimoPositions(eqx.Module):
    """A weight that is added."""

    weight: jax.Array

    def __call__(self, x):
        return x + self.weight


class EquimoViT(eqx.Module):
    patch_embed: EquimoPatches
    cls_token: jax.Array
    global_pos_embed: EquimoPositions
    blocks: tuple
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.patch_embed = EquimoPatches(key)
        self.cls_token = jnp.zeros((1, WIDTH))
        self.global_pos_embed = EquimoPositions(jnp.zeros((5, WIDTH)))
        self.blocks = tuple(EquimoBlock(key) for _ in range(LAYERS))
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, 7, key=key)

    def __call__(self, x):
        x = jnp.concatenate([self.cls_token, self.patch_embed(x)])
        x = self.global_pos_embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


@layout("ViT (Equinox)", "equimo 1.1: models/vit.py")
def equimo_vit():
    return eqx_module(EquimoViT, normal(BATCH, 3, 6, 6))


class EquinoxBert(eqx.Module):
    """Equinox's own attention, and its layers stacked by filter_vmap."""

    embed: eqx.nn.Embedding
    layers: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=key)
        self.layers = eqx.filter_vmap(EquinoxBertLayer)(jax.random.split(key, LAYERS))
        self.head = eqx.nn.Linear(WIDTH, "scalar", key=key)

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, layer):
            return eqx.combine(layer, static)(x), None

        x, _ = jax.lax.scan(step, jax.vmap(self.embed)(x), arrays)
        return self.head(x[0])


class EquinoxBertLayer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, FFN, 1, key=key)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(x)


@layout("BERT (Equinox, filter_vmap)", "equinox: examples/bert.ipynb, stacked")
def equinox_bert():
    return eqx_module(EquinoxBert, ids())


class Codec(eqx.Module):
    """Convolutions down and up in torch's layout, and a recurrent cell between."""

    down: list
    cell: eqx.nn.LSTMCell
    up: list

    def __init__(self, key):
        conv = functools.partial(eqx.nn.Conv1d, kernel_size=4, stride=2, key=key)
        back = functools.partial(
            eqx.nn.ConvTranspose1d, kernel_size=4, stride=2, key=key
        )
        self.down = [conv(1, 16, padding=1), conv(16, WIDTH, groups=2, padding=1)]
        self.cell = eqx.nn.LSTMCell(WIDTH, WIDTH, key=key)
        self.up = [back(WIDTH, 16), back(16, 1)]

    def __call__(self, x):
        for conv in self.down:
            x = jax.nn.gelu(conv(x))

        def step(state, x):
            state = self.cell(x, state)
            return state, state[0]

        _, x = jax.lax.scan(step, (jnp.zeros(WIDTH),) * 2, x.T)
        x = x.T
        for conv in self.up:
            x = conv(jax.nn.gelu(x))
        return x


@layout("codec (Equinox)", "equinox: nn.Conv1d, nn.ConvTranspose1d, nn.LSTMCell")
def codec():
    return eqx_module(Codec, normal(BATCH, 1, 16))
