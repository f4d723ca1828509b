"""Models laid out as those of other libraries are, as test inputs.

Each has the names, the ranks and the products of the original and tiny sizes that keep
what could mislead: what is square there is square here, and heads times their size are
the width if they are so there. `jlora.plan` watches the use and so knows the roles;
`python tests/layouts.py` prints which of them `jlora.wrap` tells without a plan.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from helpers import integers, normal

import jlora

KEY = jax.random.key(0)
BATCH, TIME, VOCAB, LAYERS = 2, 5, 29, 2
WIDTH, FFN = 12, 20
HEADS, KV, SIZE = 3, 1, 4  # HEADS * SIZE is WIDTH


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model.

    Attributes:
      name: what it is called in the table.
      source: the library and the file or class that is laid out so.
      build: makes (fn, params, args), so that fn(params, *args) is the model's output
        and params is what a user passes to `jlora.wrap`.
    """

    name: str
    source: str
    build: Callable[[], tuple[Callable, Any, tuple]]


LAYOUTS: list[Layout] = []


def layout(name, source):
    """Decorates the `build` of a `Layout`, which is added to the table."""

    def add(build):
        LAYOUTS.append(Layout(name, source, functools.cache(build)))
        return build

    return add


# What the models share.


def drawn(shapes):
    """Random arrays of these shapes, which compiles nothing."""
    leaves, treedef = jax.tree.flatten(shapes)
    draws = [normal(*x.shape, seed=k, scale=0.3) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ids():
    return integers(BATCH, TIME, below=VOCAB)


def linen(model, *args):
    return model.apply, drawn(jax.eval_shape(model.init, KEY, *args)), args


def bare(model, *args):
    """A Linen model whose params are passed without the collection's name."""
    fn, variables, args = linen(model, *args)
    return (lambda p, *a: fn({"params": p}, *a)), variables["params"], args


def nnx_module(make, *args):
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state = nnx.split(module)
    return (lambda m, *a: m(*a)), nnx.merge(graph, drawn(state)), args


def eqx_module(make, *args):
    """For one example; it is called on a batch."""
    shapes = eqx.filter_eval_shape(make, KEY)
    arrays, static = eqx.partition(
        shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )
    return (lambda m, *a: jax.vmap(m)(*a)), eqx.combine(drawn(arrays), static), args


def attend(q, k, v):
    """Causal attention of (batch, time, heads, size), with as many or fewer k and v."""
    groups = q.shape[-2] // k.shape[-2]
    k, v = (jnp.repeat(x, groups, axis=-2) for x in (k, v))
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def heads(x, n=HEADS):
    return x.reshape(*x.shape[:-1], n, -1)


def flat(x):
    return x.reshape(*x.shape[:-2], -1)


def normed(x, scale, bias=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + bias


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


# Gemma: einsums whose weights have the heads, or the halves of a gate, first.


class GemmaEinsum(nn.Module):
    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, text, x):
        init = nn.initializers.normal()
        return jnp.einsum(text, x, self.param(self.weight_name, init, self.shape))


class GemmaBlock(nn.Module):
    kv: int
    transposed: bool

    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm(name="pre_attention_norm")(x)
        x = x + GemmaAttention(self.kv, name="attn")(h)
        h = nn.RMSNorm(name="pre_ffw_norm")(x)
        return x + GemmaMLP(self.transposed, name="mlp")(h)


class GemmaAttention(nn.Module):
    kv: int

    @nn.compact
    def __call__(self, x):
        if self.kv == HEADS:
            qkv = GemmaEinsum((3, HEADS, WIDTH, SIZE), name="qkv_einsum")
            q, k, v = qkv("BTD,SNDH->SBTNH", x)
        else:
            q = GemmaEinsum((HEADS, WIDTH, SIZE), name="q_einsum")("BTD,NDH->BTNH", x)
            kv = GemmaEinsum((2, self.kv, WIDTH, SIZE), name="kv_einsum")
            k, v = kv("BSD,CKDH->CBSKH", x)
        out = GemmaEinsum((HEADS, SIZE, WIDTH), name="attn_vec_einsum")
        return out("BTNH,NHD->BTD", attend(q, k, v))


class GemmaMLP(nn.Module):
    transposed: bool

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal()
        shape = (2, FFN, WIDTH) if self.transposed else (2, WIDTH, FFN)
        text = "...F,NHF->...NH" if self.transposed else "...F,NFH->...NH"
        gate = jnp.einsum(text, x, self.param("gating_einsum", init, shape))
        h = nn.gelu(gate[..., 0, :]) * gate[..., 1, :]
        return jnp.einsum("...H,HF->...F", h, self.param("linear", init, (FFN, WIDTH)))


class GemmaEmbedder(nn.Module):
    def setup(self):
        init = nn.initializers.normal()
        self.table = self.param("input_embedding", init, (VOCAB, WIDTH))

    def encode(self, x):
        return self.table[(x,)] * math.sqrt(WIDTH)

    def decode(self, x):
        return jnp.dot(x, self.table.T)


class Gemma(nn.Module):
    kv: int = KV
    transposed: bool = False

    @nn.compact
    def __call__(self, x):
        embedder = GemmaEmbedder(name="embedder")
        x = embedder.encode(x)
        for i in range(LAYERS):
            x = GemmaBlock(self.kv, self.transposed, name=f"layer_{i}")(x)
        return embedder.decode(nn.RMSNorm(name="final_norm")(x))


@layout("gemma 2B (Linen)", "gemma 3.3: gm/nn/_modules.py, one k and v for all heads")
def gemma():
    return linen(Gemma(), ids())


@layout("gemma 7B (Linen)", "gemma 3.3: gm/nn/_modules.py, qkv_einsum, gate transposed")
def gemma_qkv():
    return linen(Gemma(kv=HEADS, transposed=True), ids())


@layout("pi0's gemma (Linen, scan)", "openpi: models/gemma.py, two experts, nn.scan")
def openpi():
    """The stacked weights of two models of other widths side by side."""
    sizes = (WIDTH, FFN), (WIDTH - 4, FFN - 4)
    stack = {"attn": {}}
    for i, (d, f) in enumerate(sizes):
        end = f"_{i}" if i else ""
        stack["attn"] |= {
            f"q_einsum{end}": {"w": array(LAYERS, HEADS, d, SIZE)},
            f"kv_einsum{end}": {"w": array(LAYERS, 2, KV, d, SIZE)},
            f"attn_vec_einsum{end}": {"w": array(LAYERS, HEADS, SIZE, d)},
        }
        stack[f"mlp{end}"] = {
            "gating_einsum": array(LAYERS, 2, d, f),
            "linear": array(LAYERS, f, d),
        }
        stack |= {
            f"pre_{k}_norm{end}": {"scale": array(LAYERS, d)}
            for k in ("attention", "ffw")
        }
    shapes = {
        "embedder": {"input_embedding": array(VOCAB, WIDTH)},
        "layers": stack,
        **{
            f"final_norm{('', '_1')[i]}": {"scale": array(d)}
            for i, (d, _) in enumerate(sizes)
        },
    }

    def block(xs, p):
        qkv = []
        for x, end in zip(xs, ("", "_1"), strict=True):
            h = rms(x, p[f"pre_attention_norm{end}"]["scale"])
            q = jnp.einsum("BTD,NDH->BTNH", h, p["attn"][f"q_einsum{end}"]["w"])
            kv = p["attn"][f"kv_einsum{end}"]["w"]
            qkv.append((q, *jnp.einsum("BSD,2KDH->2BSKH", h, kv)))
        q, k, v = (jnp.concatenate(y, axis=1) for y in zip(*qkv, strict=True))
        parts = jnp.split(attend(q, k, v), [xs[0].shape[1]], axis=1)
        out = []
        for x, o, end in zip(xs, parts, ("", "_1"), strict=True):
            w = p["attn"][f"attn_vec_einsum{end}"]["w"]
            x = x + jnp.einsum("BTNH,NHD->BTD", o, w)
            h = rms(x, p[f"pre_ffw_norm{end}"]["scale"])
            gate = p[f"mlp{end}"]["gating_einsum"]
            h = jax.nn.gelu(jnp.dot(h, gate[0])) * jnp.dot(h, gate[1])
            out.append(x + jnp.dot(h, p[f"mlp{end}"]["linear"]))
        return out, None

    def fn(params, x, action):
        x = params["embedder"]["input_embedding"][x]
        (x, y), _ = jax.lax.scan(jax.checkpoint(block), [x, action], params["layers"])
        x = rms(x, params["final_norm"]["scale"])
        return x, rms(y, params["final_norm_1"]["scale"])

    return fn, drawn(shapes), (ids(), normal(BATCH, 3, WIDTH - 4))


# Tunix: an Einsum of its own in NNX, biases beside and not in it.


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


# Transformers' Flax models: Linen's layers, but for GPT-2's Conv1D.


class HFConv1D(nn.Module):
    """Its kernel is (out, in), and square in one place."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape).transpose()
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


class HFGPT2Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        qkv = jnp.split(HFConv1D(3 * WIDTH, name="c_attn")(x), 3, axis=2)
        return HFConv1D(WIDTH, name="c_proj")(flat(attend(*map(heads, qkv))))


class HFGPT2MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(HFConv1D(4 * WIDTH, name="c_fc")(x))
        return HFConv1D(WIDTH, name="c_proj")(x)


class HFGPT2Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + HFGPT2Attention(name="attn")(nn.LayerNorm(name="ln_1")(x))
        return x + HFGPT2MLP(name="mlp")(nn.LayerNorm(name="ln_2")(x))


class HFGPT2Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = HFGPT2Block(name=str(i))(x)
        return x


class HFGPT2Module(nn.Module):
    @nn.compact
    def __call__(self, x):
        wte = nn.Embed(VOCAB, WIDTH, name="wte")
        x = wte(x) + nn.Embed(TIME, WIDTH, name="wpe")(jnp.arange(TIME))
        return wte.attend(nn.LayerNorm(name="ln_f")(HFGPT2Blocks(name="h")(x)))


class HFGPT2(nn.Module):
    @nn.compact
    def __call__(self, x):
        return HFGPT2Module(name="transformer")(x)


@layout("GPT-2 (Linen)", "transformers 4.53: FlaxGPT2LMHeadModel")
def hf_gpt2():
    return bare(HFGPT2(), ids())


class Nested(nn.Module):
    """Submodules by a path of names, as deep as the original's classes are."""

    names: str
    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, *args):
        first, _, rest = self.names.partition("/")
        if rest:
            return Nested(rest, self.make, name=first)(*args)
        return self.make(name=first)(*args)


class HFBertSelf(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (
            heads(nn.Dense(WIDTH, name=name)(x)) for name in ("query", "key", "value")
        )
        return flat(attend(q, k, v))


class HFBertOutput(nn.Module):
    @nn.compact
    def __call__(self, h, x):
        return nn.LayerNorm(name="LayerNorm")(nn.Dense(WIDTH, name="dense")(h) + x)


class HFBertAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return HFBertOutput(name="output")(HFBertSelf(name="self")(x), x)


class HFBertIntermediate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.gelu(nn.Dense(FFN, name="dense")(x))


class HFBertLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = HFBertAttention(name="attention")(x)
        return HFBertOutput(name="output")(
            HFBertIntermediate(name="intermediate")(x), x
        )


class HFBertLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = HFBertLayer(name=str(i))(x)
        return x


class HFBertEmbeddings(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(VOCAB, WIDTH, name="word_embeddings")(x)
        x += nn.Embed(TIME, WIDTH, name="position_embeddings")(jnp.arange(TIME))
        x += nn.Embed(2, WIDTH, name="token_type_embeddings")(jnp.zeros(TIME, int))
        return nn.LayerNorm(name="LayerNorm")(x)


class HFBertPooler(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(WIDTH, name="dense")(x[:, 0]))


class HFBertModule(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = HFBertEmbeddings(name="embeddings")(x)
        x = Nested("encoder/layer", HFBertLayers)(x)
        return HFBertPooler(name="pooler")(x)


class HFBert(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="classifier")(HFBertModule(name="bert")(x))


@layout("BERT (Linen)", "transformers 4.53: FlaxBertForSequenceClassification")
def hf_bert():
    return bare(HFBert(), ids())


class HFT5Attention(nn.Module):
    """Projections to another width than the model's, as in T5 1.1."""

    first: bool

    @nn.compact
    def __call__(self, x, y):
        dense = functools.partial(nn.Dense, use_bias=False)
        inner = HEADS * (SIZE + 1)
        q, k, v = (
            heads(dense(inner, name=n)(h)) for n, h in (("q", x), ("k", y), ("v", y))
        )
        if self.first:
            bias = nn.Embed(8, HEADS, name="relative_attention_bias")
            v = v + bias(jnp.arange(y.shape[1]))[..., None]
        return dense(WIDTH, name="o")(flat(attend(q, k, v)))


class HFT5Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return rms(x, self.param("weight", nn.initializers.ones, x.shape[-1:]))


class HFT5Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, use_bias=False)
        h = nn.gelu(dense(FFN, name="wi_0")(x)) * dense(FFN, name="wi_1")(x)
        return dense(WIDTH, name="wo")(h)


class HFT5Layer(nn.Module):
    kind: str
    first: bool = False

    @nn.compact
    def __call__(self, x, y=None):
        h = HFT5Norm(name="layer_norm")(x)
        if self.kind == "DenseReluDense":
            return x + HFT5Gated(name=self.kind)(h)
        y = h if y is None else y
        return x + HFT5Attention(self.first, name=self.kind)(h, y)


class HFT5Layers(nn.Module):
    """layer/0, layer/1, …: the self-attention, the one to the encoder, the MLP."""

    first: bool
    decoder: bool

    @nn.compact
    def __call__(self, x, y):
        x = HFT5Layer("SelfAttention", self.first, name="0")(x)
        if self.decoder:
            x = HFT5Layer("EncDecAttention", name="1")(x, y)
        return HFT5Layer("DenseReluDense", name="2" if self.decoder else "1")(x)


class HFT5Blocks(nn.Module):
    decoder: bool

    @nn.compact
    def __call__(self, x, y):
        for i in range(LAYERS):
            make = functools.partial(HFT5Layers, i == 0, self.decoder)
            x = Nested(f"{i}/layer", make)(x, y)
        return x


class HFT5Stack(nn.Module):
    decoder: bool = False

    @nn.compact
    def __call__(self, x, y=None):
        x = HFT5Blocks(self.decoder, name="block")(x, y)
        return HFT5Norm(name="final_layer_norm")(x)


class HFT5(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        shared = nn.Embed(VOCAB, WIDTH, name="shared")
        x = HFT5Stack(name="encoder")(shared(x))
        y = HFT5Stack(decoder=True, name="decoder")(shared(y), x)
        return nn.Dense(VOCAB, use_bias=False, name="lm_head")(y)


@layout("T5 1.1 (Linen)", "transformers 4.53: FlaxT5ForConditionalGeneration")
def hf_t5():
    return bare(HFT5(), ids(), ids()[:, :3])


# Images.


@layout("ViT (Linen)", "big_vision: models/vit.py; vision_transformer's is the same")
def big_vision_vit():
    return linen(BigVisionViT(), normal(BATCH, 6, 6, 3))


class MlpBlock(nn.Module):
    width: int = FFN

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.width)(x)))


class BigVisionBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, h)
        return x + MlpBlock()(nn.LayerNorm()(x))


class BigVisionEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = BigVisionBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, WIDTH))
        probe = jnp.tile(probe, [len(x), 1, 1])
        x = nn.MultiHeadDotProductAttention(HEADS)(probe, x)
        return (x + MlpBlock()(nn.LayerNorm()(x)))[:, 0]


class BigVisionViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (3, 3), 3, padding="VALID", name="embedding")(x)
        x = x.reshape(len(x), -1, WIDTH)
        init = nn.initializers.normal()
        x = x + self.param("pos_embedding", init, (1, *x.shape[1:]))
        x = BigVisionEncoder(name="Transformer")(x)
        return nn.Dense(5, name="head")(MAPHead()(x))


class MixerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + jnp.swapaxes(MlpBlock(7, name="token_mixing")(h), 1, 2)
        return x + MlpBlock(FFN, name="channel_mixing")(nn.LayerNorm()(x))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (2, 2), 2, name="stem")(x).reshape(len(x), -1, WIDTH)
        for i in range(LAYERS):
            x = MixerBlock(name=f"MixerBlock_{i}")(x)
        x = nn.LayerNorm(name="pre_head_layer_norm")(x).mean(axis=1)
        return nn.Dense(5, name="head")(x)


@layout("MLP-Mixer (Linen)", "vision_transformer: vit_jax/models_mixer.py")
def mixer():
    return linen(Mixer(), normal(BATCH, 6, 6, 3))


# MaxText: Linen with logical axes, layers scanned over axis 1.


class MaxTextDense(nn.Module):
    features: tuple[int, ...]
    axis: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, x):
        axis = tuple(a % x.ndim for a in self.axis)
        shape = (*(x.shape[a] for a in axis), *self.features)
        names = ("embed", "heads", "kv", "mlp")[: len(shape)]
        init = nn.with_logical_partitioning(nn.initializers.normal(), names)
        contracted = axis, tuple(range(len(axis)))
        return jax.lax.dot_general(
            x, self.param("kernel", init, shape), (contracted, ((), ()))
        )


class MaxTextAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = MaxTextDense((HEADS, SIZE), name="query")(x)
        k = MaxTextDense((KV, SIZE), name="key")(x)
        v = MaxTextDense((KV, SIZE), name="value")(x)
        return MaxTextDense((WIDTH,), (-2, -1), name="out")(attend(q, k, v))


class MaxTextMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate = MaxTextDense((FFN,), name="wi_0")(x)
        return MaxTextDense((WIDTH,), name="wo")(
            nn.silu(gate) * MaxTextDense((FFN,), name="wi_1")(x)
        )


class MaxTextLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.RMSNorm(name="pre_self_attention_layer_norm")(x)
        x = x + MaxTextAttention(name="self_attention")(h)
        h = nn.RMSNorm(name="post_self_attention_layer_norm")(x)
        return x + MaxTextMLP(name="mlp")(h), None


class MaxTextDecoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(MaxTextLayer),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(name="layers")(x, None)
        x = nn.RMSNorm(name="decoder_norm")(x)
        return MaxTextDense((VOCAB,), name="logits_dense")(x)


class MaxText(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(VOCAB, WIDTH, name="token_embedder")(x)
        return MaxTextDecoder(name="decoder")(x)


@layout("llama 2 (Linen, scan over axis 1)", "maxtext: layers/models.py, llama2.py")
def maxtext():
    return linen(MaxText(), ids())


# Levanter: Equinox modules of named arrays, stacked.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedArray:
    array: jax.Array
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})


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


def told(case):
    """What `jlora.wrap` without a plan makes of a layout, beside the plan.

    Returns:
      "whole": it adapts the same paths with the same roles.  "other" and the paths that
      have other roles, or that the plan leaves alone.  "part" and the paths that it
      leaves alone.  Or "error" and the first line of it.
    """
    fn, params, args = case.build()
    plan = jlora.plan(fn, params, *args, rank=8)
    try:
        tree = jlora.wrap(params, rank=8)
    except (TypeError, ValueError) as error:
        return "error", [str(error).splitlines()[0]]
    found = {path: leaf.axes for path, leaf in jlora.adapter(tree).items()}
    wrong = {path: axes for path, axes in found.items() if axes != roles(plan, path)}
    if wrong:
        return "other", [f"{p}: {a}, not {roles(plan, p)}" for p, a in wrong.items()]
    missing = [path for path in plan if path not in found]
    return ("part", missing) if missing else ("whole", [])


def roles(plan, path):
    return plan[path].axes if path in plan else "none"


def main(names):
    """The table, of the layouts whose names hold one of these words; or of all."""
    for case in LAYOUTS:
        if names and not any(word in case.name for word in names):
            continue
        fn, params, args = case.build()
        plan = jlora.plan(fn, params, *args, rank=8)
        result, details = told(case)
        print(f"{case.name:34} {len(plan):3}  {result}")
        for line in details[:6]:
            print(f"{'':40}{line}")
        if names:
            for path, spec in plan.items():
                print(f"{'':6}{path:60} {plan.shapes[path]} {spec.axes} {spec.bias}")


if __name__ == "__main__":
    main(sys.argv[1:])
