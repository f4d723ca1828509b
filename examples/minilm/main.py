"""LoRA on a real pretrained model: MiniLM learns to tell good reviews from bad ones.

    python examples/minilm/main.py                  # one seed: minutes on 2 cores
    python examples/minilm/main.py --seeds 0 1 2    # the mean and the spread
    python examples/minilm/main.py --quick          # every step of it in under a minute

Fetches a pinned copy of the model and of the sentences on first use, trains LoRA on
the queries and values of every layer together with a new head, compares with training
the head alone, and checks that the adapter survives saving and merging. Ctrl-C saves;
the same command goes on from there.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import baseline
import encoder
import figure
import jax
import numpy as np
from sentences import Labelled, Tokens, movie_reviews, read_tsv, snapshot
from training import Config, Run, logits, own, to_the_end, train, wrap

import jlora
import jlora.checkpoint

WIDTHS = [16, 24, 32, 40, 48, 64]
"""In tokens. Half the movie sentences fit in 24, 99 % in 54; nine are cut at 64."""


def main() -> None:
    args = arguments()
    own(args.out)
    base = snapshot(args.model)
    data = read_tsv(args.data) if args.data else movie_reviews()
    parts = data.split()
    if args.limit:
        rng = np.random.default_rng(0)
        parts = {k: rng.permutation(rows)[: args.limit] for k, rows in parts.items()}
    tokens = Tokens.encode(data.texts, base, args.widths)
    sizes = ", ".join(f"{len(rows):,} {name}" for name, rows in parts.items())
    print(f"{len(data.texts):,} sentences, {len(data.classes)} classes: {sizes}")

    runs, accuracies = [], []
    for i, seed in enumerate(args.seeds):
        config = Config(
            seed=seed,
            rank=args.rank,
            alpha=args.alpha,
            learning_rate=args.learning_rate,
            head_learning_rate=args.head_learning_rate,
            batch=args.batch,
            epochs=args.epochs,
            widths=args.widths,
            limit=args.limit,
            classes=list(data.classes),
            weights=encoder.digest(base),
            data=data.digest(),
        )
        folder = args.out / f"seed{seed}"
        if args.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        model, params = encoder.load(base, len(data.classes), jax.random.key(seed))
        apply = jax.jit(jlora.lift(model.apply))
        if i == 0:
            print(jlora.summary(wrap(params, config)), flush=True)
        run = train(apply, params, tokens, data.labels, parts, config, folder)
        scores = logits(apply, run.tree, tokens, parts["test"])
        check_saved(run, scores, data, parts["test"], folder, base)
        check_merged(model, run, scores, tokens, parts["test"])
        accuracies.append(accuracy(scores, data.labels[parts["test"]]))
        print(f"seed {seed}: test accuracy {accuracies[-1]:.3f}", flush=True)
        runs.append(run)

    head_only = train_head(model, runs[0], data, tokens, parts)
    majority = np.bincount(data.labels[parts["train"]]).argmax()
    majority = (data.labels[parts["test"]] == majority).mean()
    picture = args.out / "run.png"
    figure.draw(runs, args.batch, head_only, majority, picture)
    print(f"picture: {picture}")
    if len(runs) > 1:
        print(
            f"{len(runs)} seeds: mean {np.mean(accuracies):.4f}, standard deviation"
            f" {np.std(accuracies, ddof=1):.4f}, from {min(accuracies):.3f} to"
            f" {max(accuracies):.3f}"
        )
    print(
        f"RESULT test_accuracy={np.mean(accuracies):.3f} head_only={head_only:.3f}"
        f" majority={majority:.3f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0])
    add("--out", type=Path, help="the runs' folder (runs/minilm)")
    add("--fresh", action="store_true", help="start anew, dropping what --out holds")
    add("--quick", action="store_true", help="a few steps on few sentences")
    add("--model", type=Path, help="your own Hugging Face BERT snapshot")
    add("--data", type=Path, help="your own sentences, a file of label<TAB>text")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--learning-rate", type=float, default=3e-3)
    add("--head-learning-rate", type=float, default=5e-2)
    add("--batch", type=int, default=32, help="sentences a step")
    add("--epochs", type=int, default=1)
    args = parser.parse_args()
    args.widths, args.limit = WIDTHS, None
    if args.quick:
        args.widths, args.limit, args.epochs = [32], 160, 1
    args.out = args.out or Path("runs/minilm-quick" if args.quick else "runs/minilm")
    return args


def check_saved(run: Run, scores, data, rows, folder: Path, base: Path) -> None:
    """Saves the adapter; another process must find the same logits for `rows`."""
    saved = folder / "adapter"
    if not saved.exists():
        jlora.checkpoint.save(saved, run.tree)
    with tempfile.TemporaryDirectory() as scratch:
        texts, output = Path(scratch) / "texts.txt", Path(scratch) / "logits.npy"
        texts.write_text("\n".join(data.texts[row] for row in rows), encoding="utf-8")
        options = ["--file", texts, "--logits", output, "--model", base]
        script = Path(__file__).with_name("predict.py")
        subprocess.run([sys.executable, script, folder, *options], check=True)
        restored = np.load(output)
    if not np.array_equal(scores, restored):
        raise SystemExit(
            "the adapter restored in a fresh process gives other logits, by up to"
            f" {np.abs(scores - restored).max():.1e}"
        )
    print(f"restored in a fresh process: {scores.size:,} logits, bit-identical")


def check_merged(model, run: Run, scores, tokens, rows) -> None:
    """Merges the adapter; the plain model must agree on `rows`."""
    merged = logits(jax.jit(model.apply), jlora.merge(run.tree), tokens, rows)
    difference = np.abs(merged - scores).max() / np.abs(scores).max()
    if difference > 1e-5 or (merged.argmax(-1) != scores.argmax(-1)).any():
        raise SystemExit(f"merging moves the logits by {difference:.1e} relative")
    print(f"merged: the same predictions, logits within {difference:.1e} relative")


def train_head(model, run: Run, data: Labelled, tokens: Tokens, parts) -> float:
    """The baseline's test accuracy."""
    print("head only: embedding every sentence with the frozen encoder", flush=True)
    embed = jax.jit(lambda *args: model.apply(*args, method="embed"))
    params = jlora.unwrap(run.tree)
    found, penalty = baseline.head_only(
        {part: logits(embed, params, tokens, rows) for part, rows in parts.items()},
        {part: data.labels[rows] for part, rows in parts.items()},
        len(data.classes),
    )
    print(f"head only: test accuracy {found:.3f} (L2 penalty {penalty})")
    return found


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(-1) == labels).mean())


if __name__ == "__main__":
    to_the_end(main)
