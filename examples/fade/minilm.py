"""3L on a real pretrained model: MiniLM on movie reviews, faded away and compared.

    python examples/fade/minilm.py                # under half an hour on 2 cores
    python examples/fade/minilm.py --quick        # every step of it in a minute

Ordinary LoRA keeps the encoder's 10.6 million weights. 3L ends without them: what is
deployed are the embeddings, the norms and the factors. The table in README.md says what
that costs in accuracy and what it buys in size.
"""

import argparse
import time
from pathlib import Path

import fading
import jax
import numpy as np
from fading import Variant
from reviews import Reviews, sentences

import jlora

# of examples/minilm, which `reviews` put on the path
import encoder  # isort: skip


WATCH = "encoder/layer_3/attention/value/kernel"
WIDTH = 32
"""In tokens; three sentences in ten are cut there. It is what the run's time is for."""
VARIANTS = [
    *fading.variants(32, kept_c=False),
    *(Variant("decay", "decay", rank) for rank in (8, 128)),
    *(Variant("decay + noise + C", "compensate", r, lora_bias=True) for r in (8, 128)),
]


def learning_rate(rank: int) -> float:
    """1e-3 at rank 32; a step of Adam moves a·b by about the root of the rank more."""
    return 1e-3 * (32 / rank) ** 0.5


def wrap(params, variant):
    """Every matrix of the encoder has factors; its norms and the head train whole."""
    return jlora.wrap(
        params,
        rank=variant.rank,
        targets="encoder/layer_*/**/kernel",
        train=["head/*", "encoder/layer_*/*_norm/*"],
        lora_bias=variant.lora_bias,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps, few sentences")
    parser.add_argument("--steps", type=int, default=265, help="of 16 sentences each")
    parser.add_argument(
        "--model", type=Path, help="your own Hugging Face BERT snapshot"
    )
    parser.add_argument("--data", type=Path, help="your own file of label<TAB>text")
    parser.add_argument("--out", type=Path, default=Path("runs/fade"))
    args = parser.parse_args()
    start = time.monotonic()

    base = sentences.snapshot(args.model)
    data = sentences.read_tsv(args.data) if args.data else sentences.movie_reviews()
    steps, size = 12 if args.quick else args.steps, 16
    reviews = Reviews(data, base, [WIDTH], size)
    if args.quick:
        reviews.keep(64)
    reviews.keep(128, "validation")  # it is looked at often
    model, params = encoder.load(base, len(data.classes), jax.random.key(0))

    def logits(params, ids, mask):
        return model.apply({"params": params}, ids, mask)

    results = [
        fading.train(
            logits,
            wrap(params, variant),
            variant,
            reviews.batches,
            steps,
            reviews.accuracy,
            watch=WATCH,
            learning_rate=learning_rate(variant.rank),
        )
        for variant in (VARIANTS[:4] if args.quick else VARIANTS)
    ]
    rows = reviews.parts
    majority = np.bincount(data.labels[rows["train"]]).argmax()
    majority = float((data.labels[rows["test"]] == majority).mean())
    total = sum(x.size for x in jax.tree.leaves(params))
    reference = results[0].variant.name, total, results[0].accuracy
    words = f"The majority class is {majority:.3f} of the test sentences."
    fading.show(
        "minilm",
        results,
        reference,
        WATCH,
        args.out,
        record=not args.quick,
        words=words,
    )
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
