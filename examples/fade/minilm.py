"""3L on a real pretrained model: MiniLM on movie reviews, faded away and compared.

    python examples/fade/minilm.py                # under half an hour on 2 cores
    python examples/fade/minilm.py --quick        # every step of it in a minute

Ordinary LoRA keeps the encoder's 10.6 million weights. 3L ends without them: what is
deployed are the embeddings, the norms and the factors. The table in README.md says what
that costs in accuracy and what it buys in size.
"""

import argparse
import sys
import time
from pathlib import Path

import fading
import jax
import numpy as np
from fading import Variant

import jlora

sys.path.insert(0, str(Path(__file__).parents[1] / "minilm"))
import encoder
import sentences

WATCH = "encoder/layer_3/attention/value/kernel"
WIDTH = 32
"""In tokens; three sentences in ten are cut there. It is what the run's time is for."""
VARIANTS = [
    Variant("LoRA, the base kept", None, 32),
    Variant("decay", "decay", 32),
    Variant("decay + noise", "compensate", 32),
    Variant("decay + noise + C", "compensate", 32, lora_bias=True),
    Variant("decay + noise, cleared + C", "clear", 32, lora_bias=True),
    Variant("decay + noise + C", "compensate", 8, lora_bias=True),
    Variant("decay + noise + C", "compensate", 128, lora_bias=True),
]


def wrap(params, variant):
    """Every matrix of the encoder has factors; its norms and the head train whole."""
    return jlora.wrap(
        params,
        rank=variant.rank,
        targets="encoder/layer_*/**/kernel",
        train=["head/*", "encoder/layer_*/*_norm/*"],
        lora_bias=variant.lora_bias,
    )


def few(rows: np.ndarray, n: int) -> np.ndarray:
    """A sample of them: the sentences are in an order."""
    return np.random.default_rng(0).permutation(rows)[:n]


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
    parts = data.split()
    tokens = sentences.Tokens.encode(data.texts, base, [WIDTH])
    steps, size = 12 if args.quick else args.steps, 16
    if args.quick:
        parts = {name: few(rows, 64) for name, rows in parts.items()}
    parts["validation"] = few(parts["validation"], 128)  # it is looked at often
    per_epoch = len(parts["train"]) // size
    model, params = encoder.load(base, len(data.classes), jax.random.key(0))

    def logits(params, ids, mask):
        return model.apply({"params": params}, ids, mask)

    def batches(i):
        epoch, position = divmod(i, per_epoch)
        rng = np.random.default_rng([0, epoch])
        rows = tokens.epoch(parts["train"], size, rng)[position]
        return tokens.batch(rows), data.labels[rows]

    def accuracy(predict, part):
        right = 0
        for rows in tokens.batches(parts[part], size=64):
            right += (
                predict(*tokens.batch(rows)).argmax(-1) == data.labels[rows]
            ).sum()
        return float(right) / len(parts[part])

    results = [
        fading.train(
            logits,
            wrap(params, variant),
            variant,
            batches,
            steps,
            accuracy,
            watch=WATCH,
            learning_rate=1e-3,
        )
        for variant in (VARIANTS[:4] if args.quick else VARIANTS)
    ]
    majority = np.bincount(data.labels[parts["train"]]).argmax()
    majority = float((data.labels[parts["test"]] == majority).mean())
    kept, *faded = results
    total = sum(x.size for x in jax.tree.leaves(params))
    text = fading.table(faded, (kept.variant.name, total, kept.accuracy))
    text += f"\n\nThe majority class is {majority:.3f} of the test sentences."
    print(text)
    import pictures  # matplotlib, once it is needed

    pictures.draw(results, kept.accuracy, WATCH, args.out / "minilm.png")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    if not args.quick:
        fading.into_readme("minilm", text)


if __name__ == "__main__":
    main()
