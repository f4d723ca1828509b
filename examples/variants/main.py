"""The variants of LoRA beside each other, on the MiniLM task of examples/minilm.

    python examples/variants/main.py            # an hour or two on 2 cores
    python examples/variants/main.py --quick    # every step of it in a few minutes

Each variant trains on the same sentences with each learning rate of one small grid. The
rate with the best accuracy on the validation sentences is its own; with that it trains
on more seeds, which are judged by the test sentences. Every run that has ended is noted
in the folder, so the same command goes on after Ctrl-C. Ends with a table, a picture
and one line.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "minilm"))
import encoder
from sentences import Tokens, movie_reviews, snapshot
from training import logits

import jlora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TARGETS = ["**/query/kernel", "**/value/kernel"]
WIDTHS = [24, 64]
"""In tokens; two, so that each variant compiles two steps."""

# What `wrap` gets besides rank and alpha, and what goes in front of the optimizer.
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"rslora": True},
    "DoRA": {"dora": True},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
    "orthogonal": {"init": "orthogonal"},
    "EVA": {"init": "eva"},
    "LoRA+": {"ratio": 16.0},
    "Riemannian": {"first": partial(jlora.riemannian, reg=1e-2)},
    "LoRA-FA": {"first": jlora.lora_fa},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """The sentences, the model, and how long a run is."""

    model: Any
    params: Callable[[int], Any]
    tokens: Tokens
    labels: np.ndarray
    parts: dict[str, np.ndarray]
    rank: int
    alpha: float
    batch: int
    steps: int

    def batches(self, seed: int) -> np.ndarray:
        """The rows of each step."""
        rng = np.random.default_rng(seed)
        found = []
        while len(found) < self.steps:
            found += list(self.tokens.epoch(self.parts["train"], self.batch, rng))
        return np.array(found[: self.steps])


def wrapped(task: Task, seed: int, init: Any = "kaiming", **options: Any) -> Any:
    """The adapted tree of one run; the head trains whole in each variant."""
    params = task.params(seed)
    apply = lambda p, *args: task.model.apply({"params": p}, *args)  # noqa: E731
    batch = task.tokens.batch(task.batches(seed)[0])
    plan = jlora.plan(
        apply, params, *batch, rank=task.rank, alpha=task.alpha, targets=TARGETS
    )
    if init == "eva":
        observe = jax.jit(lambda p, *args: jlora.observe(apply, p, *args, plan=plan))
        some = [observe(params, *task.tokens.batch(b)) for b in task.batches(seed)[:8]]
        moments = sum(some[1:], some[0])
        plan, init = jlora.redistribute(plan, moments), jlora.initializers.eva(moments)
    key = jax.random.key(seed)
    return jlora.wrap(params, plan=plan, train="head/**", init=init, key=key, **options)


class Trainer:
    """Trains one variant; all learning rates and seeds share what JAX compiles."""

    def __init__(self, task: Task, options: dict[str, Any]):
        self.task, self.options = task, dict(options)
        self.ratio = self.options.pop("ratio", None)
        self.first = self.options.pop("first", None)
        self.apply = jlora.lift(task.model.apply)
        self.scores = jax.jit(self.apply)
        self.compiled: dict[Any, Any] = {}

    def step(self, tree: Any) -> Any:
        """The optimizer and the jitted step for trees of this structure."""
        structure = jax.tree.structure(tree), *map(jnp.shape, jax.tree.leaves(tree))
        if structure in self.compiled:
            return self.compiled[structure]
        steps = self.task.steps
        warm = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 16, 1), steps)

        def chain(*first):
            return optax.chain(
                *first,
                optax.clip_by_global_norm(1.0),
                optax.inject_hyperparams(optax.adamw)(learning_rate=warm),
            )

        first = [self.first(tree)] if self.first else []
        tx = jlora.optimizer(chain(*first), tree, full=chain(), b_lr_ratio=self.ratio)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(tree, state, rates, ids, mask, labels):
            def loss(tree):
                found = self.apply({"params": tree}, ids, mask)
                own = optax.softmax_cross_entropy_with_integer_labels(found, labels)
                return own.mean()

            value, grads = jax.value_and_grad(loss)(tree)
            updates, state = tx.update(grads, state, tree)
            # The schedule inside goes from 0 over 1 to 0; the rates are data.
            kind = jlora.labels(updates)
            by = {"lora": rates[0], "full": rates[1], "frozen": 1.0}
            updates = jax.tree.map(lambda u, k: u * by[k], updates, kind)
            return optax.apply_updates(tree, updates), state, value

        self.compiled[structure] = tx, step
        return tx, step

    def run(self, rate: float, seed: int) -> dict[str, float]:
        """The accuracies of one run, and the loss at its end."""
        task = self.task
        tree = jax.tree.map(jnp.copy, wrapped(task, seed, **self.options))
        tx, step = self.step(tree)
        state, rates = tx.init(tree), jnp.array([rate, HEAD_RATE])
        losses = []
        for rows in task.batches(seed):
            batch = *task.tokens.batch(rows), task.labels[rows]
            tree, state, value = step(tree, state, rates, *batch)
            losses.append(value)
        out = {"loss": float(np.mean(jax.device_get(losses[-10:])))}
        for part in ("validation", "test"):
            rows = task.parts[part]
            found = logits(self.scores, tree, task.tokens, rows).argmax(-1)
            out[part] = float((found == task.labels[rows]).mean())
        return out


HEAD_RATE = 5e-2


def main() -> None:
    args = arguments()
    base, data = snapshot(None), movie_reviews()
    parts = data.split()
    rng = np.random.default_rng(0)
    limits = {"train": args.sentences, "validation": args.judges, "test": args.judges}
    parts = {k: rng.permutation(rows)[: limits[k]] for k, rows in parts.items()}

    def params(seed: int) -> Any:
        return encoder.load(base, len(data.classes), jax.random.key(seed))[1]

    task = Task(
        model=encoder.load(base, len(data.classes), jax.random.key(0))[0],
        params=params,
        tokens=Tokens.encode(data.texts, base, WIDTHS),
        labels=data.labels,
        parts=parts,
        rank=args.rank,
        alpha=args.alpha,
        batch=32,
        steps=args.steps,
    )
    results = Results(args)
    todo = len(args.variants) * (len(args.rates) + len(args.seeds) - 1)
    bar = tqdm(total=todo, desc="runs", unit=" run", dynamic_ncols=True)
    for name in args.variants:
        trainer = Trainer(task, VARIANTS[name])

        def run(rate: float, seed: int) -> dict[str, float]:
            bar.set_postfix_str(f"{name}, rate {rate:g}, seed {seed}")  # noqa: B023
            found = results.run(name, rate, seed, trainer)  # noqa: B023
            bar.update()
            return found

        for rate in args.rates:
            run(rate, args.seeds[0])
        for seed in args.seeds[1:]:
            run(results.best(name), seed)
    bar.close()
    print(results.table())
    picture = args.out / "variants.png"
    draw(results, picture)
    print(f"picture: {picture}")
    means = {name: np.mean(results.tests(name)) for name in args.variants}
    best = max(means, key=means.get)
    print(
        f"RESULT lora={means.get('LoRA', np.nan):.3f} best={means[best]:.3f}"
        f" best_variant={best} spread={max(means.values()) - min(means.values()):.3f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--sentences", type=int, default=3200, help="to train on")
    add("--judges", type=int, default=1000, help="validation and test sentences, each")
    add("--steps", type=int, default=100, help="of 32 sentences")
    add("--out", type=Path, help="the folder (runs/variants)")
    add("--quick", action="store_true", help="a few steps of each")
    args = parser.parse_args()
    if args.quick:
        args.rates, args.seeds = [1e-3, 3e-3], [0, 1]
        args.sentences, args.judges, args.steps = 128, 64, 4
    name = "variants-quick" if args.quick else "variants"
    args.out = args.out or Path("runs") / name
    return args


class Results:
    """What the runs gave, in a file; a run that is there is not made again."""

    def __init__(self, args: argparse.Namespace):
        self.rates, self.seeds = args.rates, args.seeds
        self.variants = args.variants
        own = "rank alpha sentences judges steps".split()
        self.settings = {name: getattr(args, name) for name in own}
        self.file = args.out / "results.json"
        self.found: dict[str, dict[str, float]] = {}
        if self.file.exists():
            said = json.loads(self.file.read_text())
            if said["settings"] != self.settings:
                raise SystemExit(
                    f"{self.file} holds runs with other settings, {said['settings']}:"
                    " name another folder with --out, or delete it."
                )
            self.found = said["runs"]

    def run(self, name: str, rate: float, seed: int, trainer: Trainer) -> dict:
        key = f"{name}, {rate:g}, {seed}"
        if key not in self.found:
            self.found[key] = trainer.run(rate, seed)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            said = {"settings": self.settings, "runs": self.found}
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(said, indent=1))
            new.replace(self.file)
        return self.found[key]

    def best(self, name: str) -> float:
        """The rate with the best validation accuracy; of equal ones the first."""
        at = self.seeds[0]
        return max(
            self.rates, key=lambda r: self.found[f"{name}, {r:g}, {at}"]["validation"]
        )

    def tests(self, name: str) -> list[float]:
        """The test accuracies of all seeds, with the variant's rate."""
        rate = self.best(name)
        return [self.found[f"{name}, {rate:g}, {seed}"]["test"] for seed in self.seeds]

    def table(self) -> str:
        """A table in Markdown: validation at each rate, and the test accuracies."""
        head = [
            "variant",
            *(f"rate {r:g}" for r in self.rates),
            "rate",
            "test",
            "± std",
        ]
        rows = [head, ["---"] * len(head)]
        for name in self.variants:
            at = self.seeds[0]
            tests = self.tests(name)
            spread = np.std(tests, ddof=1) if len(tests) > 1 else 0.0
            each = (
                self.found[f"{name}, {r:g}, {at}"]["validation"] for r in self.rates
            )
            row = [name, *(f"{x:.3f}" for x in each), f"{self.best(name):g}"]
            rows.append([*row, f"{np.mean(tests):.3f}", f"{spread:.3f}"])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(results: Results, file: Path) -> None:
    """Each variant's seeds as dots, and their mean, in the order of the means."""
    names = sorted(results.variants, key=lambda n: np.mean(results.tests(n)))
    figure, ax = plt.subplots(
        figsize=(7, 0.42 * len(names) + 1.2), layout="constrained"
    )
    for k, name in enumerate(names):
        tests = results.tests(name)
        ax.plot(tests, [k] * len(tests), "o", color="#8a8a8a", markersize=5, zorder=2)
        ax.plot(
            np.mean(tests), k, "|", color="#1f5fa8", markersize=16, markeredgewidth=3
        )
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("test accuracy: each seed, and the mean")
    ax.grid(axis="x", color="#e6e6e6")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on with the next run.")
        sys.exit(130)
