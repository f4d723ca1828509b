"""Models of Flax Linen, with its layers and with parameters of their own."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from helpers import integers, normal
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
    bare,
    flat,
    heads,
    ids,
    layout,
    linen,
    rms,
)


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
    scanned: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, h)
        x = x + MlpBlock()(nn.LayerNorm()(x))
        return (x, None) if self.scanned else x


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


class SigLIP(nn.Module):
    """The same blocks in a stack, whose biases have the heads and their size."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (3, 3), 3, padding="VALID", name="embedding")(x)
        blocks = nn.scan(
            nn.remat(BigVisionBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x = x.reshape(len(x), -1, WIDTH)
        x, _ = below("Transformer/encoderblock", functools.partial(blocks, True))(
            x, None
        )
        return nn.Dense(5, name="head")(MAPHead()(x))


@layout("SigLIP (Linen, scan)", "big_vision: models/vit.py with scan, in PaliGemma")
def siglip():
    return linen(SigLIP(), normal(BATCH, 6, 6, 3))


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


# Graphs, and an ensemble.


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


class Critic(nn.Module):
    @nn.compact
    def __call__(self, *x):
        x = ExplicitMLP((WIDTH, WIDTH, 1), name="MLP_0")(jnp.concatenate(x, -1))
        return x.squeeze(-1)


class Critics(nn.Module):
    """Two critics of one observation: the first kernels share what they read."""

    @nn.compact
    def __call__(self, *x):
        members = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        make = nn.vmap(Critic, in_axes=None, axis_size=2, **members)
        return make(name="VmapCritic_0")(*x)


@layout("SAC's critics (Linen, vmap)", "jaxrl: networks/critic_net.py, DoubleCritic")
def critics():
    return linen(Critics(), normal(BATCH, 7), normal(BATCH, 3))


# Images, sound, sequences.


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
