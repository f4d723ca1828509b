"""Models laid out as those of other libraries are, as test inputs.

Each has the names, the ranks and the products of the original and tiny sizes that keep
what could mislead: what is square there is square here, and heads times their size are
the width if they are so there. `jlora.plan` watches the use and so knows the roles;
`python tests/layouts.py` prints which of them `jlora.wrap` tells without a plan.
"""

import dataclasses
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from helpers import integers, normal

import jlora

os.environ["KERAS_BACKEND"] = "jax"
with warnings.catch_warnings():  # Pydot reads names that pyparsing deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    import keras
from keras import ops

KEY = jax.random.key(0)
BATCH, TIME, VOCAB, LAYERS = 2, 5, 29, 2
WIDTH, FFN = 24, 40
HEADS, KV, SIZE = 6, 3, 4  # HEADS * SIZE is WIDTH


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model.

    Attributes:
      name: what it is called in the table.
      source: the library and the file or class that is laid out so.
      build: makes (fn, params, args), so that fn(params, *args) is the model's output
        and params is what a user passes to `jlora.wrap`.  If that is a Keras model, fn
        takes its values by path.
    """

    name: str
    source: str
    build: Callable[[], tuple[Callable, Any, tuple]]


LAYOUTS: list[Layout] = []


def layout(name, source):
    """Decorates the `build` of a `Layout`, which is added to the table."""

    def add(build):
        def traced_once():
            fn, params, args = build()
            return (fn if has_functions(params) else jax.jit(fn)), params, args

        LAYOUTS.append(Layout(name, source, functools.cache(traced_once)))
        return build

    return add


# What the models share.


def has_functions(params):
    """Whether some leaf is no array, so that jit could not take the tree."""
    leaves = jax.tree.leaves(arrays(params))
    return not all(isinstance(x, jax.Array) for x in leaves)


def drawn(shapes):
    """Random arrays of these shapes, which compiles nothing."""
    leaves, treedef = jax.tree.flatten(shapes)
    draws = [normal(*x.shape, seed=k, scale=0.3) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def abstract(tree):
    """The tree with shapes in place of its arrays."""

    def shape(x):
        return array(*x.shape) if isinstance(x, jax.Array) else x

    return tree if isinstance(tree, keras.Model) else jax.tree.map(shape, tree)


def nested(shapes):
    """A tree of random arrays from a dict of shapes by path."""
    tree = {}
    for path, shape in shapes.items():
        *keys, last = path.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = array(*shape)
    return drawn(tree)


def scanned(block, x, layers, axis=0):
    """The block with each layer's params in turn, which are stacked over an axis."""
    if axis:
        layers = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), layers)
    return jax.lax.scan(jax.checkpoint(lambda x, p: (block(p, x), None)), x, layers)[0]


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


def haiku(function, *args):
    model = hk.without_apply_rng(hk.transform(function))
    return model.apply, drawn(jax.eval_shape(model.init, KEY, *args)), args


def keras_model(model, *args):
    """The function takes the values of the model's variables by path."""
    order = [v.path for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def fn(params, *args):
        return model.stateless_call([params[path] for path in order], rest, *args)[0]

    return fn, model, args


def arrays(params):
    """The arrays of a Keras model by path; anything else is a tree of arrays."""
    if isinstance(params, keras.Model):
        return {v.path: v.value for v in params.trainable_variables}
    return params


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


class Below(nn.Module):
    """A module below a path of names."""

    names: str
    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, *args):
        return below(self.names, self.make)(*args)


def below(names, make):
    """make() as a submodule under a path of names, as deep as in the original."""
    first, _, rest = names.partition("/")
    return Below(rest, make, name=first) if rest else make(name=first)


class Numbered(nn.Module):
    """The modules one after another, named 0, 1, …"""

    makes: tuple[Callable[..., nn.Module], ...]

    @nn.compact
    def __call__(self, x, *args):
        for i, make in enumerate(self.makes):
            x = make(name=str(i))(x, *args)
        return x


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
    kv: int = 1
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
            f"kv_einsum{end}": {"w": array(LAYERS, 2, 1, d, SIZE)},
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


class HFGPT2Module(nn.Module):
    @nn.compact
    def __call__(self, x):
        wte = nn.Embed(VOCAB, WIDTH, name="wte")
        x = wte(x) + nn.Embed(TIME, WIDTH, name="wpe")(jnp.arange(TIME))
        return wte.attend(
            nn.LayerNorm(name="ln_f")(Numbered((HFGPT2Block,) * LAYERS, name="h")(x))
        )


class HFGPT2(nn.Module):
    @nn.compact
    def __call__(self, x):
        return HFGPT2Module(name="transformer")(x)


@layout("GPT-2 (Linen)", "transformers 4.53: FlaxGPT2LMHeadModel")
def hf_gpt2():
    return bare(HFGPT2(), ids())


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
        x = below(
            "encoder/layer", functools.partial(Numbered, (HFBertLayer,) * LAYERS)
        )(x)
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
    first: bool

    @nn.compact
    def __call__(self, x, y):
        h = HFT5Norm(name="layer_norm")(x)
        if self.kind == "DenseReluDense":
            return x + HFT5Gated(name=self.kind)(h)
        inside = self.kind == "SelfAttention"
        attention = HFT5Attention(inside and self.first, name=self.kind)
        return x + attention(h, h if inside else y)


class HFT5Block(nn.Module):
    """layer/0, layer/1, …: the self-attention, the one to the encoder, the MLP."""

    first: bool
    decoder: bool

    @nn.compact
    def __call__(self, x, y):
        kinds = ["SelfAttention", "EncDecAttention", "DenseReluDense"]
        if not self.decoder:
            del kinds[1]
        makes = [functools.partial(HFT5Layer, kind, self.first) for kind in kinds]
        return Numbered(tuple(makes), name="layer")(x, y)


class HFT5Stack(nn.Module):
    decoder: bool = False

    @nn.compact
    def __call__(self, x, y=None):
        makes = (
            functools.partial(HFT5Block, i == 0, self.decoder) for i in range(LAYERS)
        )
        x = Numbered(tuple(makes), name="block")(x, y)
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


# AXLearn and Praxis: w or weight for every projection, (width, heads, size) for the one
# out of heads as well.


@layout("llama (AXLearn, repeated)", "axlearn: common/attention.py, GroupedQKVLinear")
def axlearn():
    layer = "decoder/transformer/repeat/layer"
    attention = f"{layer}/self_attention/attention"
    shapes = {
        "decoder/emb/token_emb/weight": (VOCAB, WIDTH),
        f"{layer}/self_attention/norm/scale": (LAYERS, WIDTH),
        f"{attention}/i_proj/qkv_proj/weight": (LAYERS, WIDTH, HEADS + 2 * KV, SIZE),
        f"{attention}/o_proj/weight": (LAYERS, WIDTH, HEADS, SIZE),
        f"{layer}/feed_forward/norm/scale": (LAYERS, WIDTH),
        f"{layer}/feed_forward/linear1_0/weight": (LAYERS, WIDTH, FFN),
        f"{layer}/feed_forward/linear1_1/weight": (LAYERS, WIDTH, FFN),
        f"{layer}/feed_forward/linear2/weight": (LAYERS, FFN, WIDTH),
        "decoder/output_norm/scale": (WIDTH,),
        "decoder/lm_head/weight": (VOCAB, WIDTH),
    }

    def block(p, x):
        attention, mlp = p["self_attention"], p["feed_forward"]
        h = rms(x, attention["norm"]["scale"])
        w = attention["attention"]["i_proj"]["qkv_proj"]["weight"]
        qkv = jnp.einsum("btd,dnh->btnh", h, w)
        q, k, v = jnp.split(qkv, [HEADS, HEADS + KV], axis=-2)
        w = attention["attention"]["o_proj"]["weight"]
        x = x + jnp.einsum("btnh,dnh->btd", attend(q, k, v), w)
        h = rms(x, mlp["norm"]["scale"])
        gate = jax.nn.silu(h @ mlp["linear1_0"]["weight"])
        return x + (gate * (h @ mlp["linear1_1"]["weight"])) @ mlp["linear2"]["weight"]

    def fn(params, x):
        p = params["decoder"]
        x = p["emb"]["token_emb"]["weight"][x]
        x = scanned(block, x, p["transformer"]["repeat"]["layer"])
        x = rms(x, p["output_norm"]["scale"])
        return jnp.einsum("bld,vd->blv", x, p["lm_head"]["weight"])

    return fn, nested(shapes), (ids(),)


@layout("LM with experts (Praxis)", "praxis 1.4: layers/attentions.py, transformers.py")
def praxis():
    """The first layer has q, k and v of their own, the second has them in one."""
    experts, one = 4, (WIDTH, HEADS, SIZE)
    lm = "params/lm/transformer"
    first, second = f"{lm}/x_layers_0", f"{lm}/x_layers_1"
    shapes = {
        **{f"{first}/self_attention/{k}/w": one for k in ("query", "key", "value")},
        **{f"{first}/self_attention/{k}/b": one[1:] for k in ("query", "key", "value")},
        f"{first}/self_attention/post/w": one,
        f"{first}/self_attention/post/b": (WIDTH,),
        f"{first}/ff_layer/ffn_layer1/linear/w": (WIDTH, FFN),
        f"{first}/ff_layer/ffn_layer1/bias/b": (FFN,),
        f"{first}/ff_layer/ffn_layer2/linear/w": (FFN, WIDTH),
        f"{first}/ff_layer/ffn_layer2/bias/b": (WIDTH,),
        f"{second}/self_attention/combined_qkv/w": (3, *one),
        f"{second}/self_attention/combined_qkv/b": (3, *one[1:]),
        f"{second}/self_attention/post/w": one,
        f"{second}/ff_layer/gate": (WIDTH, experts),
        f"{second}/ff_layer/wi_0": (experts, WIDTH, FFN),
        f"{second}/ff_layer/wo_0": (experts, FFN, WIDTH),
        "params/lm/final_ln/scale": (WIDTH,),
        "params/lm/softmax/logits_ffn/linear/w": (WIDTH, VOCAB),
        "params/lm/softmax/logits_ffn/bias/b": (VOCAB,),
    }

    def fn(params, x):
        p = params["params"]["lm"]
        first, second = (p["transformer"][f"x_layers_{i}"] for i in (0, 1))
        a = first["self_attention"]
        q, k, v = (
            jnp.einsum("BTD,DNH->BTNH", x, a[n]["w"]) + a[n]["b"]
            for n in ("query", "key", "value")
        )
        x = x + jnp.einsum("BTNH,DNH->BTD", attend(q, k, v), a["post"]["w"])
        x = x + a["post"]["b"]
        one, two = first["ff_layer"]["ffn_layer1"], first["ff_layer"]["ffn_layer2"]
        h = jnp.einsum("...y,yz->...z", x, one["linear"]["w"]) + one["bias"]["b"]
        h = jax.nn.relu(h)
        h = jnp.einsum("...y,yz->...z", h, two["linear"]["w"]) + two["bias"]["b"]
        x = x + h
        a = second["self_attention"]
        qkv = jnp.einsum("BTD,KDNH->KBTNH", x, a["combined_qkv"]["w"])
        q, k, v = qkv + a["combined_qkv"]["b"][:, None, None]
        x = x + jnp.einsum("BTNH,DNH->BTD", attend(q, k, v), a["post"]["w"])
        f = second["ff_layer"]
        gates = jax.nn.softmax(jnp.einsum("gsm,me->gse", x, f["gate"]))
        sent = jnp.einsum("gse,gsm->egsm", jnp.round(gates), x)
        h = jax.nn.relu(jnp.einsum("egcm,emh->egch", sent, f["wi_0"]))
        h = jnp.einsum("egch,ehm->egcm", h, f["wo_0"])
        x = rms(x + jnp.einsum("egsm,gse->gsm", h, gates), p["final_ln"]["scale"])
        out = p["softmax"]["logits_ffn"]
        return jnp.einsum("...y,yz->...z", x, out["linear"]["w"]) + out["bias"]["b"]

    return fn, nested(shapes), (normal(BATCH, TIME, WIDTH),)


# The JAX authors' examples of large models: dataclasses of arrays.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class JaxLlamaLayer:
    q: Any
    k: Any
    v: Any
    o: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    attn_pre_gamma: Any
    attn_post_gamma: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class JaxWeights:
    layers: list
    embedding: Any
    gamma_final: Any
    lm_head: Any


@layout("llama 3 (dataclasses)", "jax-llm-examples: llama3_jax/model.py")
def jax_llama():
    def layer():
        return JaxLlamaLayer(
            q=array(WIDTH, HEADS, SIZE),
            k=array(WIDTH, KV, SIZE),
            v=array(WIDTH, KV, SIZE),
            o=array(HEADS, SIZE, WIDTH),
            w_gate=array(WIDTH, FFN),
            w_up=array(WIDTH, FFN),
            w_down=array(FFN, WIDTH),
            attn_pre_gamma=array(WIDTH),
            attn_post_gamma=array(WIDTH),
        )

    def fn(params, x):
        x = params.embedding[x]
        for p in params.layers:
            h = rms(x, p.attn_pre_gamma)
            q, k, v = (jnp.einsum("btd,dnh->btnh", h, w) for w in (p.q, p.k, p.v))
            x = x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), p.o)
            h = rms(x, p.attn_post_gamma)
            gate = jax.nn.silu(jnp.einsum("btd,df->btf", h, p.w_gate))
            h = gate * jnp.einsum("btd,df->btf", h, p.w_up)
            x = x + jnp.einsum("btf,fd->btd", h, p.w_down)
        return jnp.einsum("btd,dv->btv", rms(x, params.gamma_final), params.lm_head)

    ends = array(VOCAB, WIDTH), array(WIDTH), array(WIDTH, VOCAB)
    weights = JaxWeights([layer() for _ in range(LAYERS)], *ends)
    return fn, drawn(weights), (ids(),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeepSeekAttention:
    q_a: Any
    q_gamma: Any
    q_b: Any
    kv_a: Any
    k_pe: Any
    kv_gamma: Any
    k_b: Any
    v_b: Any
    o: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeepSeekExperts:
    w_router: Any
    b_router: Any
    we_gate: Any
    we_up: Any
    we_down: Any
    ws_gate: Any
    ws_up: Any
    ws_down: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeepSeekLayer:
    mlp: Any
    attn: Any
    gamma_pre_attn: Any
    gamma_post_attn: Any


@layout("DeepSeek R1 (dataclasses)", "jax-llm-examples: deepseek_r1_jax/model.py")
def jax_deepseek():
    low, rope, experts, f = 8, 2, 4, FFN // 2

    def layer():
        attention = DeepSeekAttention(
            q_a=array(WIDTH, low),
            q_gamma=array(low),
            q_b=array(low, HEADS, SIZE + rope),
            kv_a=array(WIDTH, low),
            k_pe=array(WIDTH, rope),
            kv_gamma=array(low),
            k_b=array(low, HEADS, SIZE),
            v_b=array(low, HEADS, SIZE),
            o=array(HEADS, SIZE, WIDTH),
        )
        mlp = DeepSeekExperts(
            w_router=array(WIDTH, experts),
            b_router=array(experts),
            we_gate=array(experts, WIDTH, f),
            we_up=array(experts, WIDTH, f),
            we_down=array(experts, f, WIDTH),
            ws_gate=array(WIDTH, f),
            ws_up=array(WIDTH, f),
            ws_down=array(f, WIDTH),
        )
        return DeepSeekLayer(mlp, attention, array(WIDTH), array(WIDTH))

    def mix(p, x):
        """One expert for each token, by a product of the sorted tokens."""
        x = x.reshape(-1, WIDTH)
        scores = jax.nn.sigmoid(x @ p.w_router) + p.b_router
        best = scores.argmax(-1)
        order, sizes = jnp.argsort(best), jnp.bincount(best, length=experts)
        h = x[order]
        gate = jax.nn.silu(jax.lax.ragged_dot(h, p.we_gate, sizes))
        h = gate * jax.lax.ragged_dot(h, p.we_up, sizes)
        routed = jax.lax.ragged_dot(h, p.we_down, sizes)[jnp.argsort(order)]
        shared = (jax.nn.silu(x @ p.ws_gate) * (x @ p.ws_up)) @ p.ws_down
        return routed + shared

    def fn(params, x):
        x = params.embedding[x]
        for p in params.layers:
            h, a = rms(x, p.gamma_pre_attn), p.attn
            q = jnp.einsum("btr,rhq->bthq", rms(h @ a.q_a, a.q_gamma), a.q_b)
            kv = rms(h @ a.kv_a, a.kv_gamma)
            k = jnp.einsum("btr,rhq->bthq", kv, a.k_b)
            shape = *k.shape[:-1], rope
            k_pe = jnp.broadcast_to((h @ a.k_pe)[..., None, :], shape)
            v = jnp.einsum("btr,rhv->bthv", kv, a.v_b)
            heads = attend(q, jnp.concatenate([k, k_pe], -1), v)
            x = x + jnp.einsum("bthv,hvd->btd", heads, a.o)
            h = rms(x, p.gamma_post_attn)
            x = x + mix(p.mlp, h).reshape(x.shape)
        return rms(x, params.gamma_final) @ params.lm_head

    ends = array(VOCAB, WIDTH), array(WIDTH), array(WIDTH, VOCAB)
    weights = JaxWeights([layer() for _ in range(LAYERS)], *ends)
    return fn, drawn(weights), (ids(),)


# Params without a library: torch's names and axes, GPT-2's, the tutorial's pairs.


@layout("llama (torch's state dict)", "safetensors of torch, used as x @ w.T")
def torch_llama():
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (HEADS * SIZE, WIDTH),
            f"{layer}.self_attn.k_proj.weight": (KV * SIZE, WIDTH),
            f"{layer}.self_attn.v_proj.weight": (KV * SIZE, WIDTH),
            f"{layer}.self_attn.o_proj.weight": (WIDTH, HEADS * SIZE),
            f"{layer}.mlp.gate_proj.weight": (FFN, WIDTH),
            f"{layer}.mlp.up_proj.weight": (FFN, WIDTH),
            f"{layer}.mlp.down_proj.weight": (WIDTH, FFN),
            f"{layer}.input_layernorm.weight": (WIDTH,),
            f"{layer}.post_attention_layernorm.weight": (WIDTH,),
        }
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}

    def fn(p, x):
        x = p["model.embed_tokens.weight"][x]
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            h = rms(x, p[f"{layer}.input_layernorm.weight"])
            q, k, v = (h @ p[f"{layer}.self_attn.{n}_proj.weight"].T for n in "qkv")
            o = flat(attend(heads(q), heads(k, KV), heads(v, KV)))
            x = x + o @ p[f"{layer}.self_attn.o_proj.weight"].T
            h = rms(x, p[f"{layer}.post_attention_layernorm.weight"])
            gate, up, down = (
                p[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            x = x + (jax.nn.silu(h @ gate.T) * (h @ up.T)) @ down.T
        return rms(x, p["model.norm.weight"]) @ p["lm_head.weight"].T

    return fn, nested(shapes), (ids(),)


@layout("GPT-2 (picoGPT's dict)", "picoGPT: w and b, as OpenAI's TensorFlow had them")
def pico_gpt():
    def linear(*shape):
        return {"w": array(*shape), "b": array(shape[-1])}

    def norm():
        return {"g": array(WIDTH), "b": array(WIDTH)}

    blocks = [
        {
            "attn": {
                "c_attn": linear(WIDTH, 3 * WIDTH),
                "c_proj": linear(WIDTH, WIDTH),
            },
            "mlp": {
                "c_fc": linear(WIDTH, 4 * WIDTH),
                "c_proj": linear(4 * WIDTH, WIDTH),
            },
            "ln_1": norm(),
            "ln_2": norm(),
        }
        for _ in range(LAYERS)
    ]
    params = {
        "wte": array(VOCAB, WIDTH),
        "wpe": array(TIME, WIDTH),
        "blocks": blocks,
        "ln_f": norm(),
    }

    def dense(p, x):
        return x @ p["w"] + p["b"]

    def fn(p, x):
        x = p["wte"][x] + p["wpe"][jnp.arange(TIME)]
        for block in p["blocks"]:
            h = normed(x, block["ln_1"]["g"], block["ln_1"]["b"])
            qkv = jnp.split(dense(block["attn"]["c_attn"], h), 3, axis=-1)
            x = x + dense(block["attn"]["c_proj"], flat(attend(*map(heads, qkv))))
            h = normed(x, block["ln_2"]["g"], block["ln_2"]["b"])
            h = jax.nn.gelu(dense(block["mlp"]["c_fc"], h))
            x = x + dense(block["mlp"]["c_proj"], h)
        return normed(x, p["ln_f"]["g"], p["ln_f"]["b"]) @ p["wte"].T

    return fn, drawn(params), (ids(),)


@layout("MLP (pairs in a list)", "JAX's tutorial: w of (out, in), jnp.dot(w, x) + b")
def tutorial_mlp():
    sizes = 13, WIDTH, WIDTH, 5
    params = [(array(m, n), array(m)) for n, m in zip(sizes, sizes[1:], strict=False)]

    def predict(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(jnp.dot(w, x) + b)
        w, b = params[-1]
        return jnp.dot(w, x) + b

    def fn(params, x):
        return jax.vmap(predict, in_axes=(None, 0))(params, x)

    return fn, drawn(params), (normal(BATCH, 13),)


# T5X and MaxText's experts: scanned over axis 1 as well.


@layout("T5 1.1 (T5X, scan over axis 1)", "t5x: examples/scalable_t5/network.py")
def t5x():
    """Kernels of joined heads; biases of positions by a product with a one-hot."""
    buckets = 8
    encoder = "encoder/layers"
    shapes = {
        "token_embedder/embedding": (VOCAB, WIDTH),
        f"{encoder}/relative_posemb/rel_embedding": (HEADS, LAYERS, buckets),
        **{
            f"{encoder}/attention/{k}/kernel": (WIDTH, LAYERS, WIDTH)
            for k in ("query", "key", "value", "out")
        },
        f"{encoder}/mlp/wi_0/kernel": (WIDTH, LAYERS, FFN),
        f"{encoder}/mlp/wi_1/kernel": (WIDTH, LAYERS, FFN),
        f"{encoder}/mlp/wo/kernel": (FFN, LAYERS, WIDTH),
        f"{encoder}/pre_attention_layer_norm/scale": (WIDTH, LAYERS),
        f"{encoder}/pre_mlp_layer_norm/scale": (WIDTH, LAYERS),
        "encoder/encoder_norm/scale": (WIDTH,),
        "decoder/logits_dense/kernel": (WIDTH, VOCAB),
    }

    def dense(p, x):
        return jax.lax.dot_general(x, p["kernel"], (((x.ndim - 1,), (0,)), ((), ())))

    def block(p, x):
        h = rms(x, p["pre_attention_layer_norm"]["scale"])
        hot = jax.nn.one_hot(jnp.arange(TIME) % buckets, buckets, axis=0)
        table = p["relative_posemb"]["rel_embedding"]
        bias = jax.lax.dot_general(table, hot, (((1,), (0,)), ((), ())))
        q, k, v = (
            heads(dense(p["attention"][n], h)) for n in ("query", "key", "value")
        )
        o = attend(q, k, v + bias.T[..., None])
        x = x + dense(p["attention"]["out"], flat(o))
        h = rms(x, p["pre_mlp_layer_norm"]["scale"])
        h = jax.nn.gelu(dense(p["mlp"]["wi_0"], h)) * dense(p["mlp"]["wi_1"], h)
        return x + dense(p["mlp"]["wo"], h)

    def fn(params, x):
        hot = jax.nn.one_hot(x, VOCAB)
        x = jnp.dot(hot, params["token_embedder"]["embedding"])
        x = scanned(block, x, params["encoder"]["layers"], axis=1)
        x = rms(x, params["encoder"]["encoder_norm"]["scale"])
        return dense(params["decoder"]["logits_dense"], x)

    return fn, nested(shapes), (ids(),)


@layout("mixtral (MaxText, scan over axis 1)", "maxtext: layers/mixtral.py, moe.py")
def maxtext_moe():
    """Experts first and layers second; every expert on every token."""
    experts = 4
    layer = "params/decoder/layers"
    moe = f"{layer}/MoeBlock_0"
    shapes = {
        "params/token_embedder/embedding": (VOCAB, WIDTH),
        f"{layer}/self_attention/query/kernel": (WIDTH, LAYERS, HEADS, SIZE),
        f"{layer}/self_attention/key/kernel": (WIDTH, LAYERS, KV, SIZE),
        f"{layer}/self_attention/value/kernel": (WIDTH, LAYERS, KV, SIZE),
        f"{layer}/self_attention/out/kernel": (HEADS, LAYERS, SIZE, WIDTH),
        f"{layer}/pre_self_attention_layer_norm/scale": (WIDTH, LAYERS),
        f"{layer}/post_self_attention_layer_norm/scale": (WIDTH, LAYERS),
        f"{moe}/gate/kernel": (WIDTH, LAYERS, experts),
        f"{moe}/wi_0": (experts, LAYERS, WIDTH, FFN),
        f"{moe}/wi_1": (experts, LAYERS, WIDTH, FFN),
        f"{moe}/wo": (experts, LAYERS, FFN, WIDTH),
        "params/decoder/decoder_norm/scale": (WIDTH,),
        "params/decoder/logits_dense/kernel": (WIDTH, VOCAB),
    }

    def block(p, x):
        a, m = p["self_attention"], p["MoeBlock_0"]
        h = rms(x, p["pre_self_attention_layer_norm"]["scale"])
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", h, a[n]["kernel"])
            for n in ("query", "key", "value")
        )
        x = x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), a["out"]["kernel"])
        h = rms(x, p["post_self_attention_layer_norm"]["scale"])
        weights = jax.nn.softmax(h @ m["gate"]["kernel"])
        gate, up = (jnp.einsum("BSM,EMH->BSEH", h, m[n]) for n in ("wi_0", "wi_1"))
        h = jnp.einsum("BSEH,EHM->BSEM", jax.nn.silu(gate) * up, m["wo"])
        return x + jnp.einsum("BSEM,BSE->BSM", h, weights)

    def fn(params, x):
        p = params["params"]
        x = p["token_embedder"]["embedding"][x]
        x = scanned(block, x, p["decoder"]["layers"], axis=1)
        x = rms(x, p["decoder"]["decoder_norm"]["scale"])
        return x @ p["decoder"]["logits_dense"]["kernel"]

    return fn, nested(shapes), (ids(),)


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


class EquimoViT(eqx.Module):
    patch_embed: EquimoPatches
    cls_token: jax.Array
    pos_embed: jax.Array
    blocks: tuple
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.patch_embed = EquimoPatches(key)
        self.cls_token, self.pos_embed = jnp.zeros((1, WIDTH)), jnp.zeros((5, WIDTH))
        self.blocks = tuple(EquimoBlock(key) for _ in range(LAYERS))
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, 7, key=key)

    def __call__(self, x):
        x = jnp.concatenate([self.cls_token, self.patch_embed(x)]) + self.pos_embed
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


# KerasHub: EinsumDense with other equations under the same names, and bare weights.


def keras_einsum(text, shape, name, bias=None):
    return keras.layers.EinsumDense(text, (None, *shape), bias_axes=bias, name=name)


@keras.saving.register_keras_serializable("layouts")
class KerasAttention(keras.layers.Layer):
    """Gemma's kernels have the heads first, Llama's the width."""

    def __init__(self, gemma, name):
        super().__init__(name=name)
        query, key = (
            ("btd,ndh->btnh", "bsd,kdh->bskh")
            if gemma
            else ("bqm,muh->bquh", "bkm,mvh->bkvh")
        )
        self.query = keras_einsum(query, (HEADS, SIZE), "query")
        self.key = keras_einsum(key, (KV, SIZE), "key")
        self.value = keras_einsum(key, (KV, SIZE), "value")
        self.output_dense = keras_einsum("btnh,nhd->btd", (WIDTH,), "attention_output")

    def build(self, shape):
        for layer in (self.query, self.key, self.value):
            layer.build(shape)
        self.output_dense.build((None, None, HEADS, SIZE))

    def call(self, x):
        return self.output_dense(attend(self.query(x), self.key(x), self.value(x)))


class KerasGated(keras.layers.Layer):
    def __init__(self, name):
        super().__init__(name=name)
        self.gate = keras_einsum("btd,df->btf", (FFN,), "ffw_gating")
        self.up = keras_einsum("btd,df->btf", (FFN,), "ffw_gating_2")
        self.down = keras_einsum("btf,fd->btd", (WIDTH,), "ffw_linear")

    def build(self, shape):
        self.gate.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], FFN))

    def call(self, x):
        return self.down(ops.gelu(self.gate(x)) * self.up(x))


class KerasExperts(keras.layers.Layer):
    """Weights that are no layer's."""

    def __init__(self, name, experts=4):
        super().__init__(name=name)
        self.experts = experts
        self.router = keras.layers.Dense(
            experts, use_bias=False, name="sparse_feedforward_gate_dense"
        )

    def build(self, shape):
        self.router.build(shape)
        name = "expert_feedforward_{}_dense"
        up, down = (self.experts, WIDTH, FFN), (self.experts, FFN, WIDTH)
        self.gate = self.add_weight(shape=up, name=name.format("gate"))
        self.up = self.add_weight(shape=up, name=name.format("intermediate"))
        self.down = self.add_weight(shape=down, name=name.format("output"))

    def call(self, x):
        weights = ops.softmax(ops.reshape(self.router(x), (-1, self.experts)))
        h = ops.reshape(x, (-1, WIDTH))
        gate, up = (ops.einsum("th,ehm->etm", h, w) for w in (self.gate, self.up))
        out = ops.einsum("eti,eih->eth", ops.silu(gate) * up, self.down)
        return ops.reshape(ops.einsum("eth,te->th", out, weights), ops.shape(x))


class KerasBlock(keras.layers.Layer):
    def __init__(self, gemma, name):
        super().__init__(name=name)
        self.norms = [keras.layers.RMSNormalization(name=f"norm_{i}") for i in (0, 1)]
        self.attention = KerasAttention(gemma, name="attention")
        self.mlp = KerasGated("mlp") if gemma else KerasExperts("experts")

    def build(self, shape):
        for layer in (*self.norms, self.attention, self.mlp):
            layer.build(shape)

    def call(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def keras_lm(gemma, name):
    inputs = keras.Input((TIME,), dtype="int32")
    embed = keras.layers.ReversibleEmbedding(VOCAB, WIDTH, name="token_embedding")
    x = embed(inputs)
    for i in range(LAYERS):
        x = KerasBlock(gemma, name=f"decoder_block_{i}")(x)
    x = keras.layers.RMSNormalization(name="final_normalization")(x)
    return keras.Model(inputs, embed(x, reverse=True), name=name)


@layout("gemma (Keras)", "keras-hub: models/gemma/gemma_attention.py")
def keras_gemma():
    return keras_model(keras_lm(True, "gemma"), ids())


@layout("mixtral (Keras)", "keras-hub: models/mixtral/mixtral_decoder.py")
def keras_mixtral():
    return keras_model(keras_lm(False, "mixtral"), ids())


class KerasEncoder(keras.layers.Layer):
    def __init__(self, name):
        super().__init__(name=name)
        dense = keras.layers.Dense
        self.attention = keras.layers.MultiHeadAttention(
            HEADS, SIZE, name="self_attention_layer"
        )
        self.norm = keras.layers.LayerNormalization(name="self_attention_layer_norm")
        self.up = dense(FFN, "gelu", name="feedforward_intermediate_dense")
        self.down = dense(WIDTH, name="feedforward_output_dense")

    def build(self, shape):
        self.attention.build(shape, shape)
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], FFN))

    def call(self, x):
        x = self.norm(x + self.attention(x, x))
        return x + self.down(self.up(x))


@layout("BERT (Keras)", "keras-hub: layers/modeling/transformer_encoder.py")
def keras_bert():
    inputs = keras.Input((TIME,), dtype="int32")
    x = keras.layers.Embedding(VOCAB, WIDTH, name="token_embedding")(inputs)
    for i in range(LAYERS):
        x = KerasEncoder(name=f"transformer_layer_{i}")(x)
    x = keras.layers.Dense(WIDTH, "tanh", name="pooled_dense")(x[:, 0])
    return keras_model(keras.Model(inputs, x, name="bert"), ids())


@layout("MobileNet (Keras)", "keras: applications/mobilenet_v2.py, without biases")
def keras_mobilenet():
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, 2, "same", use_bias=False, name="Conv1")(inputs)
    x = layers.BatchNormalization(name="bn_Conv1")(x)
    for i in range(LAYERS):
        name = f"block_{i}"
        h = layers.Conv2D(16, 1, use_bias=False, name=f"{name}_expand")(x)
        h = layers.DepthwiseConv2D(
            3, padding="same", use_bias=False, name=f"{name}_depthwise"
        )(ops.relu6(h))
        h = layers.Conv2D(8, 1, use_bias=False, name=f"{name}_project")(ops.relu6(h))
        x = x + layers.BatchNormalization(name=f"{name}_project_BN")(h)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(5, name="predictions")(x)
    return keras_model(keras.Model(inputs, x, name="mobilenet"), normal(BATCH, 8, 8, 3))


@layout("LSTM tagger (Keras)", "keras: layers/rnn, Bidirectional")
def keras_lstm():
    layers = keras.layers
    inputs = keras.Input((TIME,), dtype="int32")
    x = layers.Embedding(VOCAB, WIDTH, name="embed")(inputs)
    x = layers.Bidirectional(
        layers.LSTM(WIDTH // 2, return_sequences=True, name="lstm"), name="both"
    )(x)
    x = layers.GRU(WIDTH, return_sequences=True, name="gru")(x)
    x = layers.Dense(7, name="tags")(x)
    return keras_model(keras.Model(inputs, x, name="tagger"), ids())


# Penzai: named axes, the array two keys below the layer.


@layout("llama (Penzai)", "penzai 0.2: models/transformer/variants/llamalike_common.py")
def penzai():
    """Queries have a group axis; paths are of numbered sublayers."""
    groups = KV, HEADS // KV, SIZE
    shapes = {"body/sublayers/0/table/embeddings/value/data_array": (VOCAB, WIDTH)}

    def weights(i, j, where, *shape):
        path = f"body/sublayers/{i + 1}/sublayers/{j}/delta/sublayers/{where}"
        shapes[f"{path}/weights/value/data_array"] = shape

    for i in range(LAYERS):
        weights(i, 0, "0/sublayers/1", WIDTH)
        weights(i, 0, "1/input_to_query/sublayers/0", WIDTH, *groups)
        weights(i, 0, "1/input_to_key/sublayers/0", WIDTH, KV, SIZE)
        weights(i, 0, "1/input_to_value/sublayers/0", WIDTH, KV, SIZE)
        weights(i, 0, "1/attn_value_to_output/sublayers/1", *groups, WIDTH)
        weights(i, 1, "0/sublayers/1", WIDTH)
        weights(i, 1, "1/sublayers/0/branches/0/sublayers/0", WIDTH, FFN)
        weights(i, 1, "1/sublayers/0/branches/1", WIDTH, FFN)
        weights(i, 1, "1/sublayers/1", FFN, WIDTH)
    end = LAYERS + 1
    shapes[f"body/sublayers/{end}/sublayers/1/weights/value/data_array"] = (WIDTH,)
    shapes[f"body/sublayers/{end + 1}/weights/value/data_array"] = (WIDTH, VOCAB)

    def at(p, path):
        for key in path.split("/"):
            p = p[key]
        return p["weights"]["value"]["data_array"]

    def fn(params, x):
        p = params["body"]["sublayers"]
        x = p["0"]["table"]["embeddings"]["value"]["data_array"][x]
        for i in range(LAYERS):
            a, m = (
                p[str(i + 1)]["sublayers"][j]["delta"]["sublayers"] for j in ("0", "1")
            )
            h = rms(x, at(a, "0/sublayers/1"))
            q = jnp.tensordot(h, at(a, "1/input_to_query/sublayers/0"), (2, 0))
            q = q.reshape(*x.shape[:2], HEADS, SIZE)
            k = jnp.tensordot(h, at(a, "1/input_to_key/sublayers/0"), (2, 0))
            v = jnp.tensordot(h, at(a, "1/input_to_value/sublayers/0"), (2, 0))
            o = attend(q, k, v).reshape(*x.shape[:2], *groups)
            w = at(a, "1/attn_value_to_output/sublayers/1")
            x = x + jnp.tensordot(o, w, ((2, 3, 4), (0, 1, 2)))
            h = rms(x, at(m, "0/sublayers/1"))
            gate = jax.nn.silu(h @ at(m, "1/sublayers/0/branches/0/sublayers/0"))
            h = gate * (h @ at(m, "1/sublayers/0/branches/1"))
            x = x + h @ at(m, "1/sublayers/1")
        x = rms(x, at(p, f"{end}/sublayers/1"))
        return x @ at(p, str(end + 1))

    return fn, nested(shapes), (ids(),)


# Graphs and molecules.


class ExplicitMLP(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, size in enumerate(self.sizes):
            x = nn.Dense(size)(jax.nn.relu(x) if i else x)
        return x


class GraphNet(nn.Module):
    """Messages along edges; square layers."""

    @nn.compact
    def __call__(self, nodes, edges, senders, receivers):
        nodes, edges = nn.Dense(WIDTH)(nodes), nn.Dense(WIDTH)(edges)
        for _ in range(LAYERS):
            h = jnp.concatenate([edges, nodes[senders], nodes[receivers]], -1)
            edges = edges + ExplicitMLP((WIDTH, WIDTH))(h)
            sums = jax.ops.segment_sum(edges, receivers, len(nodes))
            nodes = nodes + ExplicitMLP((WIDTH, WIDTH))(
                jnp.concatenate([nodes, sums], -1)
            )
        return nn.Dense(3)(nodes.sum(0))


@layout("graph network (Linen)", "jraph: ogb_examples/train_flax.py")
def jraph():
    senders, receivers = integers(9, below=TIME), integers(9, below=TIME, seed=1)
    return linen(GraphNet(), normal(TIME, 7), normal(9, 4), senders, receivers)


@layout("equivariant linear layers (e3nn)", "e3nn-jax: _src/linear.py")
def e3nn():
    """A matrix for each pair of irreps, whose name holds brackets and spaces."""
    dims, n = {"0e": 1, "1o": 3, "2e": 5}, 8
    shapes = {}
    for i in range(LAYERS):
        for j, irrep in enumerate(dims):
            shapes[f"linear_{i}/w[{j},{j}] {n}x{irrep},{n}x{irrep}"] = (n, n)
        shapes[f"linear_{i}/b[0] {n}x0e"] = (n,)

    def fn(params, x):
        """Of (nodes, channels, components) for each irrep."""
        for i in range(LAYERS):
            p = params[f"linear_{i}"]
            x = [
                jnp.einsum("uw,zui->zwi", p[f"w[{j},{j}] {n}x{k},{n}x{k}"], y) / n**0.5
                for j, (k, y) in enumerate(zip(dims, x, strict=True))
            ]
            x[0] = jax.nn.gelu(x[0] + p[f"b[0] {n}x0e"][:, None])
        return x

    return fn, nested(shapes), ([normal(TIME, n, d) for d in dims.values()],)


# Images, sound and states, in Linen and NNX.


class DiffusersAttention(nn.Module):
    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        dense = functools.partial(nn.Dense, WIDTH, use_bias=False)
        q = heads(dense(name="to_q")(x))
        k, v = heads(dense(name="to_k")(context)), heads(dense(name="to_v")(context))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        o = flat(jnp.einsum("bhqk,bkhd->bqhd", weights, v))
        return nn.Dense(WIDTH, name="to_out_0")(o)


class DiffusersFF(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = below("net_0/proj", functools.partial(nn.Dense, 8 * WIDTH))(x)
        h, gate = jnp.split(x, 2, axis=-1)
        return nn.Dense(WIDTH, name="net_2")(h * nn.gelu(gate))


class DiffusersBlock(nn.Module):
    @nn.compact
    def __call__(self, x, context):
        x = x + DiffusersAttention(name="attn1")(nn.LayerNorm(name="norm1")(x))
        h = nn.LayerNorm(name="norm2")(x)
        x = x + DiffusersAttention(name="attn2")(h, context)
        return x + DiffusersFF(name="ff")(nn.LayerNorm(name="norm3")(x))


class DiffusersTransformer(nn.Module):
    @nn.compact
    def __call__(self, x, context):
        h = nn.Conv(WIDTH, (1, 1), padding="VALID", name="proj_in")(x)
        h = h.reshape(len(x), -1, WIDTH)
        h = DiffusersBlock(name="transformer_blocks_0")(h, context)
        h = nn.Conv(WIDTH, (1, 1), padding="VALID", name="proj_out")(h.reshape(x.shape))
        return x + h


class DiffusersResnet(nn.Module):
    size: int

    @nn.compact
    def __call__(self, x, time):
        h = nn.GroupNorm(4, name="norm1")(x)
        h = nn.Conv(self.size, (3, 3), name="conv1")(nn.swish(h))
        h = h + nn.Dense(self.size, name="time_emb_proj")(nn.swish(time))[:, None, None]
        h = nn.GroupNorm(4, name="norm2")(h)
        h = nn.Conv(self.size, (3, 3), name="conv2")(nn.swish(h))
        if x.shape != h.shape:
            x = nn.Conv(self.size, (1, 1), name="conv_shortcut")(x)
        return x + h


class DiffusersDown(nn.Module):
    @nn.compact
    def __call__(self, x, time, context):
        x = DiffusersResnet(WIDTH, name="resnets_0")(x, time)
        x = DiffusersTransformer(name="attentions_0")(x, context)
        down = functools.partial(nn.Conv, WIDTH, (3, 3), 2)
        return below("downsamplers_0/conv", down)(x)


class DiffusersTime(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="linear_2")(nn.swish(nn.Dense(32, name="linear_1")(x)))


class DiffusersUNet(nn.Module):
    @nn.compact
    def __call__(self, x, time, context):
        time = DiffusersTime(name="time_embedding")(time)
        x = nn.Conv(8, (3, 3), name="conv_in")(x)
        x = DiffusersDown(name="down_blocks_0")(x, time, context)
        x = below("mid_block/resnets_0", functools.partial(DiffusersResnet, WIDTH))(
            x, time
        )
        x = jax.image.resize(x, (len(x), 4, 4, WIDTH), "nearest")
        x = below(
            "up_blocks_0/upsamplers_0/conv", functools.partial(nn.Conv, WIDTH, (3, 3))
        )(x)
        return nn.Conv(4, (3, 3), name="conv_out")(x)


@layout("UNet (Linen)", "diffusers 0.34: FlaxUNet2DConditionModel")
def unet():
    args = normal(BATCH, 4, 4, 4), normal(BATCH, 16), normal(BATCH, 4, 20)
    return bare(DiffusersUNet(), *args)


class WhisperAttention(nn.Module):
    """Whisper's k_proj has no bias."""

    key_bias: bool = False

    @nn.compact
    def __call__(self, x, y):
        q = nn.Dense(WIDTH, name="q_proj")(x)
        k = nn.Dense(WIDTH, use_bias=self.key_bias, name="k_proj")(y)
        v = nn.Dense(WIDTH, name="v_proj")(y)
        weights = jnp.einsum("bqhd,bkhd->bhqk", heads(q), heads(k))
        o = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), heads(v))
        return nn.Dense(WIDTH, name="out_proj")(flat(o))


class WhisperLayer(nn.Module):
    cross: bool

    @nn.compact
    def __call__(self, x, y=None):
        h = nn.LayerNorm(name="self_attn_layer_norm")(x)
        x = x + WhisperAttention(name="self_attn")(h, h)
        if self.cross:
            h = nn.LayerNorm(name="encoder_attn_layer_norm")(x)
            x = x + WhisperAttention(name="encoder_attn")(h, y)
        h = nn.LayerNorm(name="final_layer_norm")(x)
        h = nn.gelu(nn.Dense(4 * WIDTH, name="fc1")(h))
        return x + nn.Dense(WIDTH, name="fc2")(h)


class WhisperEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(WIDTH, (3,), name="conv1")(x))
        x = nn.gelu(nn.Conv(WIDTH, (3,), 2, name="conv2")(x))
        x = x + nn.Embed(4, WIDTH, name="embed_positions")(jnp.arange(x.shape[1]))
        make = functools.partial(WhisperLayer, False)
        x = Numbered((make,) * LAYERS, name="layers")(x)
        return nn.LayerNorm(name="layer_norm")(x)


class WhisperDecoder(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        embed = nn.Embed(VOCAB, WIDTH, name="embed_tokens")
        x = embed(x) + nn.Embed(TIME, WIDTH, name="embed_positions")(jnp.arange(TIME))
        make = functools.partial(WhisperLayer, True)
        x = Numbered((make,) * LAYERS, name="layers")(x, y)
        return embed.attend(nn.LayerNorm(name="layer_norm")(x))


class WhisperModel(nn.Module):
    @nn.compact
    def __call__(self, sound, x):
        sound = WhisperEncoder(name="encoder")(sound)
        return WhisperDecoder(name="decoder")(x, sound)


class Whisper(nn.Module):
    @nn.compact
    def __call__(self, sound, x):
        return WhisperModel(name="model")(sound, x)


@layout("whisper (Linen)", "transformers 4.53: FlaxWhisperForConditionalGeneration")
def whisper():
    return bare(Whisper(), normal(BATCH, 8, 9), ids())


class Wav2Vec2Position(nn.Module):
    """A grouped convolution whose kernel is torch's, normalised and transposed."""

    @nn.compact
    def __call__(self, x):
        groups, width = 2, 4
        shape = (WIDTH, WIDTH // groups, width)
        v = self.param("weight_v", nn.initializers.normal(), shape)
        g = self.param("weight_g", nn.initializers.ones, (1, 1, width))
        bias = self.param("bias", nn.initializers.zeros, (WIDTH,))
        kernel = v / jnp.linalg.norm(v, axis=(0, 1))[None, None] * g
        numbers = ("NHC", "HIO", "NHC")
        y = jax.lax.conv_general_dilated(
            x,
            kernel.T,
            (1,),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=groups,
        )
        return x + nn.gelu(y + bias)


class Wav2Vec2FF(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(FFN, name="intermediate_dense")(x))
        return nn.Dense(WIDTH, name="output_dense")(x)


class Wav2Vec2Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + WhisperAttention(key_bias=True, name="attention")(x, x)
        return x + Wav2Vec2FF(name="feed_forward")(nn.LayerNorm(name="layer_norm")(x))


class Wav2Vec2Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = below("pos_conv_embed/conv", Wav2Vec2Position)(x)
        return Numbered((Wav2Vec2Layer,) * LAYERS, name="layers")(x)


class Wav2Vec2ConvLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.gelu(nn.Conv(16, (3,), 2, use_bias=False, name="conv")(x))


class Wav2Vec2Module(nn.Module):
    @nn.compact
    def __call__(self, x):
        convs = functools.partial(Numbered, (Wav2Vec2ConvLayer,) * LAYERS)
        x = below("feature_extractor/conv_layers", convs)(x)
        dense = functools.partial(nn.Dense, WIDTH)
        x = below("feature_projection/projection", dense)(x)
        return Wav2Vec2Encoder(name="encoder")(x)


class Wav2Vec2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Wav2Vec2Module(name="wav2vec2")(x)
        return nn.Dense(VOCAB, name="lm_head")(x)


@layout("wav2vec 2 (Linen)", "transformers 4.53: FlaxWav2Vec2ForCTC")
def wav2vec2():
    return bare(Wav2Vec2(), normal(BATCH, 19, 1))


class ResNetConv(nn.Module):
    size: int
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        shape = self.width, self.width
        conv = nn.Conv(
            self.size, shape, self.stride, use_bias=False, name="convolution"
        )
        norm = nn.BatchNorm(use_running_average=True, name="normalization")
        return norm(conv(x))


class ResNetBottleneck(nn.Module):
    stride: int

    @nn.compact
    def __call__(self, x):
        convs = (ResNetConv, 8, 1), (ResNetConv, 8, 3, self.stride), (ResNetConv, 32, 1)
        makes = tuple(functools.partial(*conv) for conv in convs)
        h = Numbered(makes, name="layer")(x)
        if self.stride > 1:
            x = ResNetConv(32, 1, self.stride, name="shortcut")(x)
        return nn.relu(x + h)


class HFResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        stem = functools.partial(ResNetConv, 8, 3, 2)
        x = nn.relu(below("embedder/embedder", stem)(x))
        makes = tuple(functools.partial(ResNetBottleneck, s) for s in (2, 1))
        blocks = functools.partial(Numbered, makes)
        x = below("encoder/stages/0/layers", blocks)(x)
        return x.mean((1, 2))


class HFResNetClassifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = HFResNet(name="resnet")(x)
        return below("classifier/1", functools.partial(nn.Dense, 5))(x)


@layout("ResNet (Linen)", "transformers 4.53: FlaxResNetForImageClassification")
def hf_resnet():
    """With the statistics of its norms in a collection of their own."""
    return linen(HFResNetClassifier(), normal(BATCH, 8, 8, 3))


class VAEDecoder(nn.Module):
    """Transposed convolutions, of Flax's kinds both."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3 * 3 * 8, name="fc")(x).reshape(len(x), 3, 3, 8)
        x = nn.ConvTranspose(8, (3, 3), (2, 2), name="up_0")(x)
        up = nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True, name="up_1")
        return nn.Conv(3, (3, 3), name="out")(nn.gelu(up(nn.gelu(x))))


@layout("VAE's decoder (Linen)", "flax: nn.ConvTranspose, transpose_kernel on and off")
def vae():
    return linen(VAEDecoder(), normal(BATCH, 7))


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(x)
        forward = nn.RNN(nn.OptimizedLSTMCell(WIDTH), name="forward")
        return nn.Dense(7, name="tags")(nn.RNN(nn.GRUCell(WIDTH))(forward(x)))


@layout("LSTM tagger (Linen)", "flax: nn.RNN, nn.OptimizedLSTMCell, nn.GRUCell")
def linen_lstm():
    return linen(Tagger(), ids())


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


class Mamba(nnx.Module):
    def __init__(self, rngs):
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([MambaBlock(rngs) for _ in range(LAYERS)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.embedder(x)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(self.final_norm(x))


@layout("mamba (NNX)", "bonsai: models/mamba2/modeling.py, with mamba 1's mixer")
def mamba():
    return nnx_module(Mamba, ids())


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


@functools.cache
def plan_of(case):
    fn, params, args = case.build()
    return jlora.plan(fn, arrays(params), *args, rank=8)


def told(case):
    """What `jlora.wrap` without a plan makes of a layout, beside the plan.

    Returns:
      "whole": it adapts the same paths with the same roles.  "other" and the paths that
      have other roles, or that the plan leaves alone.  "part" and the paths that it
      leaves alone.  Or "error" and the first line of it.
    """
    return compared(plan_of(case), case.build()[1])


def compared(plan, params):
    """What `told` returns, for params and their plan."""
    try:
        tree = jlora.wrap(abstract(params), rank=8)
    except (TypeError, ValueError) as error:
        return "error", [str(error).splitlines()[0]]
    found = {path: leaf.axes for path, leaf in jlora.adapter(tree).items()}
    seen = {path: spec.axes for path, spec in plan.items()}
    wrong = {
        path: axes
        for path, axes in found.items()
        if path not in seen or not agree(axes, seen[path], plan.shapes[path])
    }
    if wrong:
        return "other", [f"{p}: {a}, not {seen.get(p)}" for p, a in wrong.items()]
    missing = [path for path in plan if path not in found]
    return ("part", missing) if missing else ("whole", [])


def agree(told, seen, shape):
    """Whether roles are the same; an axis of size one has any."""
    pairs = zip(told, seen, shape, strict=True)
    return all(t == s for t, s, n in pairs if n != 1)


def show(name, plan, result, details, whole=False):
    """A row of the table, and what is not as the plan has it."""
    print(f"{name:38} {len(plan):3}  {result}")
    for line in details if whole else details[:3]:
        print(f"{'':44}{line if whole else line[:100]}")
    if whole:
        for path, spec in plan.items():
            print(f"    {path}  {plan.shapes[path]}  {spec.kind} {spec.axes}")


SAYS = {
    "whole": "all of the plan",
    "part": "{} of them; a warning lists the others",
    "other": "the first call raises: `plan=jlora.plan(fn, params, *args)`",
    "error": "`wrap` raises: `plan=jlora.plan(fn, params, *args)`",
}


def table():
    """The table of the documentation, in Markdown."""
    rows = []
    for case in LAYOUTS:
        result, details = told(case)
        weights = len(plan_of(case))
        words = SAYS[result].format(weights - len(details))
        rows.append(f"| {case.name} | {case.source} | {weights} | {words} |")
    head = "| model | laid out as | weights | `wrap(params, rank=8)` adapts |"
    return "\n".join([head, "|---|---|---|---|", *sorted(rows, key=str.lower), ""])


def main(words):
    """The table; of the layouts whose names hold one of the words, with the plans."""
    if words == ["--markdown"]:
        print(table(), end="")
        return
    for case in LAYOUTS:
        if words and not any(word in case.name for word in words):
            continue
        params, plan = case.build()[1], plan_of(case)
        show(case.name, plan, *compared(plan, params), whole=bool(words))
        if arrays(params) is not params:
            name = f"{case.name}, values"
            show(name, plan, *compared(plan, arrays(params)), whole=bool(words))


if __name__ == "__main__":
    main(sys.argv[1:])
