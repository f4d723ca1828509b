"""Models of Keras and KerasHub."""

import os
import warnings

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
    ids,
    layout,
)

os.environ["KERAS_BACKEND"] = "jax"
with warnings.catch_warnings():  # Pydot reads names that pyparsing deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    import keras
from keras import ops


def keras_model(model, *args):
    """The function takes the values of the model's variables by path."""
    order = [v.path for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def fn(params, *args):
        return model.stateless_call([params[path] for path in order], rest, *args)[0]

    return fn, model, args


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


@layout("LSTM tagger (Keras)", "keras: layers/rnn/lstm.py, gru.py")
def keras_lstm():
    layers = keras.layers
    inputs = keras.Input((TIME,), dtype="int32")
    x = layers.Embedding(VOCAB, WIDTH, name="embed")(inputs)
    x = layers.LSTM(WIDTH, return_sequences=True, name="lstm")(x)
    x = layers.GRU(WIDTH, return_sequences=True, name="gru")(x)
    x = layers.Dense(7, name="tags")(x)
    return keras_model(keras.Model(inputs, x, name="tagger"), ids())


@layout("segmentation (Keras)", "keras: Conv2DTranspose, SeparableConv2D")
def keras_segmentation():
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.SeparableConv2D(8, 3, 2, "same", depth_multiplier=2, name="down")(inputs)
    x = layers.Conv2D(8, 3, padding="same", groups=2, name="grouped")(ops.relu(x))
    x = layers.Conv2DTranspose(8, 3, 2, "same", name="up")(ops.relu(x))
    x = layers.Conv2D(2, 1, name="classes")(x)
    return keras_model(keras.Model(inputs, x, name="seg"), normal(BATCH, 8, 8, 3))
