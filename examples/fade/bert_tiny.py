"""3L on BERT-tiny: the structure and the counts that it was described with, and a run.

    python examples/fade/bert_tiny.py             # a few minutes on 2 cores
    python examples/fade/bert_tiny.py --quick     # every step of it in seconds

The queries, keys, values and both feed-forward matrices of BERT-tiny (2 layers, width
128) are replaced by factors of rank 32 with an output bias C, while the attention's
output and the layer norms train on. No pretrained BERT-tiny ships with a package, so
the base is trained here first, on movie reviews.
"""

import argparse
from pathlib import Path

import fading
import flax.linen as nn
import jax
import jax.numpy as jnp
from reviews import Reviews, sentences

import jlora

RANK = ALPHA = 32
WATCH = "backbone/layer_0/attention/query/kernel"
ADAPTED = [
    "**/attention/query/kernel",
    "**/attention/key/kernel",
    "**/attention/value/kernel",
    "**/ffn_in/kernel",
    "**/ffn_out/kernel",
]
TRAINED = ["**/layer_*/attention/out/*", "**/layer_*/*_norm/*"]


class Layer(nn.Module):
    """A post-norm transformer layer of width 128, with 2 heads."""

    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        x = nn.LayerNorm(name="attention_norm")(
            x + attention(x, mask=mask[:, None, None, :])
        )
        h = nn.gelu(nn.Dense(512, name="ffn_in")(x))
        return nn.LayerNorm(name="ffn_norm")(x + nn.Dense(128, name="ffn_out")(h))


class Backbone(nn.Module):
    """BERT-tiny: token ids and mask (batch, length) to pooled states (batch, 128)."""

    @nn.compact
    def __call__(self, ids, mask):
        x = nn.Embed(30522, 128, name="token")(ids)
        x += nn.Embed(512, 128, name="position")(jnp.arange(ids.shape[1]))
        x += nn.Embed(2, 128, name="segment")(jnp.zeros_like(ids))
        x = nn.LayerNorm(name="norm")(x)
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x, mask)
        return nn.tanh(nn.Dense(128, name="pooler")(x[:, 0]))


class Classifier(nn.Module):
    """Logits (batch, 2)."""

    @nn.compact
    def __call__(self, ids, mask):
        pooled = Backbone(name="backbone")(ids, mask)
        return nn.Dense(2, name="logits")(pooled)


MODEL = Classifier()


def logits(params, ids, mask):
    return MODEL.apply({"params": params}, ids, mask)


def init(key):
    ids = jnp.zeros((1, 8), jnp.int32)
    return MODEL.init(key, ids, ids > 0)["params"]


def wrap(params, rank=RANK, lora_bias=True, key=None):
    """The tree in which five matrices a layer have factors, and C."""
    return jlora.wrap(
        params,
        rank=rank,
        alpha=rank,
        targets=ADAPTED,
        train=TRAINED,
        lora_bias=lora_bias,
        key=key,
    )


def counts() -> dict[str, int]:
    """The figures of the document, of models that are built and not computed."""
    params = jax.eval_shape(init, jax.random.key(0))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    with_c, without = (
        jlora.count(wrap(params, lora_bias=flag))[0] for flag in (True, False)
    )
    # The document's second feed-forward layer had its A built for the first one's
    # inputs, 128 instead of 512, and could not be applied.
    missing = 2 * RANK * (512 - 128)
    return {
        "backbone": size(params["backbone"]),
        "with the head": size(params),
        "trainable, with C": with_c,
        "trainable, without C": without,
        "trainable in the document, where ffn-out's A is too small": with_c - missing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps, few sentences")
    parser.add_argument("--out", type=Path, default=Path("runs/fade"))
    parser.add_argument("--model", type=Path, help="a Hugging Face BERT's tokenizer")
    args = parser.parse_args()

    print("parameters")
    for name, n in counts().items():
        print(f"  {n:>9,}  {name}")

    steps, size = (12, 16) if args.quick else (500, 32)
    snapshot = sentences.snapshot(args.model)
    reviews = Reviews(sentences.movie_reviews(), snapshot, [32, 64], size)
    if args.quick:
        reviews.keep(64)

    params = init(jax.random.key(0))
    params = fading.train_whole(logits, params, reviews.batches, steps, 1e-3)
    whole = reviews.accuracy(lambda *x: jax.jit(logits)(params, *x), "test")
    results = [
        fading.train(
            logits,
            wrap(params, lora_bias=variant.lora_bias),
            variant,
            reviews.batches,
            steps,
            reviews.accuracy,
            watch=WATCH,
            learning_rate=2e-3,
        )
        for variant in fading.variants(RANK)
    ]
    reference = "the base, trained whole", counts()["with the head"], whole
    fading.show("bert_tiny", results, reference, WATCH, args.out, record=not args.quick)


if __name__ == "__main__":
    main()
