"""The BERT/MiniLM encoder in Flax Linen, and the way its pretrained weights get in.

The module tree follows Flax's own conventions (attention is
`nn.MultiHeadDotProductAttention`, so its kernels have separate head axes), which is
all that `jlora.wrap` needs in order to know the roles of every axis.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file


class Layer(nn.Module):
    """One post-norm transformer layer: attention, then a GELU block."""

    heads: int
    ffn: int
    eps: float

    @nn.compact
    def __call__(self, x, mask):
        norm = partial(nn.LayerNorm, epsilon=self.eps)
        attended = nn.MultiHeadDotProductAttention(self.heads, name="attention")(
            x, mask=mask[:, None, None, :]
        )
        x = norm(name="attention_norm")(x + attended)
        hidden = nn.gelu(nn.Dense(self.ffn, name="up")(x), approximate=False)
        return norm(name="ffn_norm")(x + nn.Dense(x.shape[-1], name="down")(hidden))


class Encoder(nn.Module):
    """Token ids (batch, length) and their mask to hidden states (batch, length, d)."""

    vocabulary: int
    positions: int
    segments: int
    features: int
    layers: int
    heads: int
    ffn: int
    eps: float

    @nn.compact
    def __call__(self, ids, mask):
        def embed(size, name):
            return nn.Embed(size, self.features, name=name)

        x = embed(self.vocabulary, "word")(ids)
        x += embed(self.segments, "segment")(jnp.zeros_like(ids))
        x += embed(self.positions, "position")(jnp.arange(ids.shape[1]))
        x = nn.LayerNorm(epsilon=self.eps, name="norm")(x)
        for i in range(self.layers):
            x = Layer(self.heads, self.ffn, self.eps, name=f"layer_{i}")(x, mask)
        return x


class Classifier(nn.Module):
    """A sentence classifier: the encoder, the mean over real tokens, a dense head."""

    encoder: Encoder
    classes: int

    def setup(self):
        self.head = nn.Dense(self.classes)

    def __call__(self, ids, mask):
        """Class logits (batch, classes)."""
        return self.head(self.embed(ids, mask))

    def embed(self, ids, mask):
        """Sentence embeddings (batch, features)."""
        weights = mask[..., None].astype(jnp.float32)
        hidden = self.encoder(ids, mask)
        return (hidden * weights).sum(1) / weights.sum(1)


def load(
    directory: Path, classes: int, key: jax.Array
) -> tuple[Classifier, dict[str, Any]]:
    """Reads a Hugging Face BERT snapshot: the classifier and its parameters.

    `directory` holds `config.json` and `model.safetensors`. The encoder's parameters
    are the pretrained ones; the head's are drawn with `key`.
    """
    config = json.loads((directory / "config.json").read_text())
    for name, value in {"model_type": "bert", "hidden_act": "gelu"}.items():
        if config.get(name) != value:
            raise SystemExit(
                f"{directory / 'config.json'}: {name} is {config.get(name)!r}; this"
                f" port runs BERT encoders with {name} {value!r}"
            )
    encoder = Encoder(
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        segments=config["type_vocab_size"],
        features=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        eps=config["layer_norm_eps"],
    )
    model = Classifier(encoder, classes)
    head = nn.Dense(classes).init(key, jnp.zeros((1, encoder.features)))["params"]
    tensors = load_file(directory / "model.safetensors")
    params = {"encoder": encoder_params(tensors, encoder), "head": head}

    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    expected = jax.eval_shape(model.init, key, ids, ids)["params"]
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
        raise SystemExit(f"{directory}: the weights do not fit the configuration")
    return model, jax.tree.map(jnp.asarray, params)


def digest(directory: Path) -> str:
    """The sha256 of a snapshot's weights: which base an adapter belongs to."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def encoder_params(tensors: Mapping[str, np.ndarray], encoder: Encoder) -> dict:
    """Renames and reshapes Hugging Face tensors into the tree that `Encoder` reads.

    Torch keeps linear weights as (out, in) and attention's heads flat; Flax wants
    (in, out) and the heads on an axis of their own.
    """
    tensors = {name.removeprefix("bert."): array for name, array in tensors.items()}
    width = encoder.features // encoder.heads

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def dense(name, kernel=(-1,), bias=(-1,)):
        """Reads a linear layer; `kernel` and `bias` are the shapes Flax gives them."""
        weight = tensors[f"{name}.weight"].T
        kernel = weight.shape if kernel == (-1,) else kernel
        return {
            "kernel": weight.reshape(kernel),
            "bias": tensors[f"{name}.bias"].reshape(bias),
        }

    def layer(name):
        split = (encoder.features, encoder.heads, width)
        return {
            "attention": {
                **{
                    role: dense(f"{name}.attention.self.{role}", split, split[1:])
                    for role in ("query", "key", "value")
                },
                "out": dense(f"{name}.attention.output.dense", split[1:] + split[:1]),
            },
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense"),
            "down": dense(f"{name}.output.dense"),
            "ffn_norm": norm(f"{name}.output.LayerNorm"),
        }

    embeddings = {
        "word": "word_embeddings",
        "position": "position_embeddings",
        "segment": "token_type_embeddings",
    }
    return {
        **{
            ours: {"embedding": tensors[f"embeddings.{theirs}.weight"]}
            for ours, theirs in embeddings.items()
        },
        "norm": norm("embeddings.LayerNorm"),
        **{f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(encoder.layers)},
    }
