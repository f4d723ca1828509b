"""A sweep as one run: learning rate × rank × seed, side by side on one base.

    python examples/many/sweep.py            # some minutes on 2 cores
    python examples/many/sweep.py --quick    # every step of it in a minute

The runs are the slots of a bank, and a step of all of them is a `vmap` of one: the
products of the base see the rows of all runs at once, and each run has its own factors,
head, order of sentences, learning rate, schedule and moments. At each evaluation the
runs that are behind stop (successive halving, arXiv:1502.07943): first by a mask, and
once half of the bank has stopped, the others move together. Ctrl-C ends it with what
there is.

The task is that of examples/minilm: whether a movie review is a good one.
"""

import argparse
import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import charts
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "minilm"))
import encoder
from sentences import Tokens, movie_reviews, read_tsv, snapshot
from training import logits, own, stop_requests

import jlora
import jlora.checkpoint

TARGETS = ["**/query/kernel", "**/value/kernel"]
WIDTH = 40
"""In tokens: of all batches, since those of all runs are one array."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of the grid."""

    rank: int
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"rank {self.rank}, learning rate {self.rate:g}, seed {self.seed}"


class Slots(NamedTuple):
    """What the runs are made of. The first axis of every array is the runs'."""

    trainable: Any
    frozen: Any
    opt_state: Any
    run: jax.Array
    """(slots,) which run of the grid it is."""
    active: jax.Array
    """(slots,) whether it goes on."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The model and the sentences."""

    model: Any
    params: Any
    tokens: Tokens
    labels: np.ndarray
    parts: dict[str, np.ndarray]

    def adapter(self, run: Run):
        """The adapter that a run starts with; its head is drawn by its seed."""
        key = jax.random.key(run.seed)
        like = self.params["head"]["kernel"]
        head = nn.Dense(like.shape[1]).init(key, jnp.zeros((1, like.shape[0])))
        options = {"rank": run.rank, "alpha": 2 * run.rank, "targets": TARGETS}
        params = self.params | {"head": head["params"]}
        return jlora.adapter(jlora.wrap(params, train="head/**", key=key, **options))

    def batches(self, seed: int, size: int) -> Iterator[np.ndarray]:
        """Rows of each step, without an end, in an order of the seed's own."""
        for epoch in itertools.count():
            rng = np.random.default_rng([seed, epoch])
            yield from self.tokens.epoch(self.parts["train"], size, rng)


def optimizer(rate, head_rate=5e-2):
    """AdamW on a's and b's with `rate`, which may be traced; the head has its own."""
    return {
        "adapter": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
        "head": optax.adamw(head_rate),
    }


def transformation(like):
    """With the learning rate as a part of its state, so that each slot has its own."""

    def make(rate):
        each = optimizer(rate)
        return jlora.optimizer(each["adapter"], like, full=each["head"])

    return optax.inject_hyperparams(make)(rate=0.0)


def begin(task: Task, runs: list[Run]) -> Slots:
    trainable, frozen = jlora.partition(jlora.stack([task.adapter(r) for r in runs]))
    tx = transformation(task.adapter(runs[0]))
    opt_state = jax.vmap(tx.init)(trainable)
    n = len(runs)
    return Slots(trainable, frozen, opt_state, jnp.arange(n), jnp.ones(n, bool))


def loss_of(task: Task, params, adapter, batch):
    """Of one run: the mean loss of a batch, and how much of it is right."""
    ids, mask, labels = batch
    tree = jlora.attach(params, adapter)
    scores = jlora.lift(task.model.apply)({"params": tree}, ids, mask)
    each = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return each.mean(), (scores.argmax(-1) == labels).mean()


def compiled_step(task: Task, like):
    """A step of all runs: (params, slots, rates, batch) to new slots and losses."""
    tx = transformation(like)

    def one(params, slot: Slots, rate, batch):
        def loss(trainable):
            adapter = jlora.combine(trainable, slot.frozen)
            return loss_of(task, params, adapter, batch)

        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(slot.trainable)
        state = slot.opt_state
        state = state._replace(hyperparams=state.hyperparams | {"rate": rate})
        updates, state = tx.update(grads, state, slot.trainable)
        new = optax.apply_updates(slot.trainable, updates), state
        old = slot.trainable, slot.opt_state
        # One that has stopped keeps what it has.
        trainable, state = jax.tree.map(
            lambda x, y: jnp.where(slot.active, x, y), new, old
        )
        return slot._replace(trainable=trainable, opt_state=state), value

    return jax.jit(jax.vmap(one, (None, 0, 0, 0)), donate_argnums=1)


def compiled_evaluation(task: Task):
    """(params, bank, batch) to losses and accuracies (slots,), on one batch for all."""

    def one(params, adapter, batch):
        return loss_of(task, params, adapter, batch)

    return jax.jit(jax.vmap(one, (None, 0, None)))


def validate(evaluation, task: Task, slots: Slots, size: int = 64):
    """The loss and accuracy of each slot on the validation sentences."""
    bank = jlora.combine(slots.trainable, slots.frozen)
    part, found = task.parts["validation"], []
    size = min(size, len(part))
    for rows in task.tokens.batches(part[: len(part) // size * size], size):
        batch = *task.tokens.batch(rows), task.labels[rows]
        found.append(np.asarray(evaluation(task.params, bank, batch)))
    return np.mean(found, 0)


@dataclasses.dataclass
class History:
    """What was measured of each run; NaN once it has stopped."""

    loss: np.ndarray
    """(steps, runs) in training."""
    evaluated: list[int]
    validation: np.ndarray
    """(evaluations, runs) the loss."""
    accuracy: np.ndarray
    """(evaluations, runs)"""
    seconds: float = 0.0
    last: int = -1
    """The last evaluation that there was."""

    @classmethod
    def empty(cls, steps: int, evaluations: int, runs: int):
        evaluated = np.linspace(0, steps, evaluations + 1).astype(int)[1:].tolist()
        nothing = [np.full((n, runs), np.nan) for n in (steps, *[evaluations] * 2)]
        return cls(nothing[0], evaluated, nothing[1], nothing[2])


def behind(losses: np.ndarray, keep: float) -> np.ndarray:
    """Which of some runs stop: all but the best part of them, and what is no number."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    kept = np.argsort(losses, kind="stable")[: max(1, round(keep * len(losses)))]
    stops = np.ones(len(losses), bool)
    stops[kept] = losses[kept] == np.inf
    return stops


def stop(slots: Slots, losses: np.ndarray, keep: float) -> Slots:
    """The slots after an evaluation: without those that are behind."""
    active = np.array(slots.active)
    rows = np.flatnonzero(active)
    active[rows[behind(losses[rows], keep)]] = False
    slots = slots._replace(active=jnp.asarray(active))
    if 0 < active.sum() <= len(active) / 2:  # the others move together
        slots = jax.tree.map(lambda x: x[np.flatnonzero(active)], slots)
    return slots


def train(task: Task, runs: list[Run], options) -> tuple[Slots, History]:
    """All runs, until the steps are done or the user asks to stop."""
    if len(task.parts["train"]) < options.batch:
        raise SystemExit(
            f"{len(task.parts['train'])} sentences do not fill a batch of "
            f"{options.batch}: choose a smaller --batch"
        )
    slots = begin(task, runs)
    step = compiled_step(task, task.adapter(runs[0]))
    evaluation = compiled_evaluation(task)
    history = History.empty(options.steps, options.evaluations, len(runs))
    orders = [task.batches(run.seed, options.batch) for run in runs]
    # Each run has its own schedule: a warm-up, then a cosine to zero, from its rate.
    schedules = [
        optax.warmup_cosine_decay_schedule(
            0.0, run.rate, options.steps // 16, options.steps
        )
        for run in runs
    ]
    bar = tqdm(total=options.steps, unit=" steps", ncols=88)
    began = time.perf_counter()
    with bar, stop_requests() as asked:
        for done in range(1, options.steps + 1):
            which = np.asarray(slots.run)
            rows = np.stack([next(order) for order in orders])[which]
            ids, mask = task.tokens.ids[rows], None
            mask = np.arange(WIDTH) < task.tokens.lengths[rows][..., None]
            rates = jnp.stack([schedules[k](done - 1) for k in which])
            batch = ids, mask, task.labels[rows]
            slots, losses = step(task.params, slots, rates, batch)
            going = np.asarray(slots.active)
            history.loss[done - 1, which[going]] = np.asarray(losses)[going]
            best = np.nanmin(history.loss[max(0, done - 10) : done].mean(0))
            bar.set_postfix_str(f"{going.sum()} runs, best loss {best:.3f}")
            bar.update()
            if done in history.evaluated:
                at = history.last = history.evaluated.index(done)
                losses, accuracies = validate(evaluation, task, slots)
                history.validation[at, which[going]] = losses[going]
                history.accuracy[at, which[going]] = accuracies[going]
                if done < options.steps:
                    slots = stop(slots, losses, options.keep)
                tqdm.write(table(runs, slots, history, at))
            if asked.is_set() or not np.asarray(slots.active).any():
                break
    history.seconds = time.perf_counter() - began
    return slots, history


def table(runs: list[Run], slots: Slots, history: History, at: int) -> str:
    """The validation losses of an evaluation; those in brackets have stopped."""
    going = set(np.asarray(slots.run)[np.asarray(slots.active)].tolist())
    rates = sorted({run.rate for run in runs})
    lines = [f"\nstep {history.evaluated[at]}: loss of the validation sentences"]
    lines.append("rank seed" + "".join(f"{rate:>13g}" for rate in rates))
    for rank, seed in sorted({(run.rank, run.seed) for run in runs}):
        cells = []
        for rate in rates:
            k = runs.index(Run(rank, rate, seed))
            seen = history.validation[: at + 1, k]
            seen = seen[~np.isnan(seen)]
            text = f"{seen[-1]:.4f}" if len(seen) else "no number"
            cells.append(f"{text if k in going else f'({text})':>13}")
        lines.append(f"{rank:4} {seed:4}" + "".join(cells))
    return "\n".join(lines)


def best_of(history: History) -> int:
    """The run with the lowest loss in the last evaluation that there was."""
    losses = history.validation[history.last]
    if history.last < 0 or not np.isfinite(losses).any():
        raise SystemExit(
            "no run has a loss that is a number in the last evaluation: there is no "
            "best one"
        )
    return int(np.where(np.isfinite(losses), losses, np.inf).argmin())


def main() -> None:
    options = arguments()
    own(options.out)
    base = snapshot(options.model)
    data = read_tsv(options.data) if options.data else movie_reviews()
    model, params = encoder.load(base, len(data.classes), jax.random.key(0))
    parts = data.split()
    rng = np.random.default_rng(0)
    for name in ("validation", "test"):
        parts[name] = rng.permutation(parts[name])[: options.held_out]
    tokens = Tokens.encode(data.texts, base, [WIDTH])
    task = Task(model, params, tokens, data.labels, parts)
    grid = itertools.product(options.ranks, options.rates, range(options.seeds))
    runs = [Run(*point) for point in grid]
    print(f"{len(runs)} runs at once, {options.batch} sentences of each in a step")

    slots, history = train(task, runs, options)
    k = best_of(history)
    charts.sweep(runs, history, k, options.out / "sweep.png")
    if not np.isfinite(history.validation[-1]).any():
        print("stopped before the end; the best of what was evaluated:")
    bank = jlora.combine(slots.trainable, slots.frozen)
    slot = int(np.flatnonzero(np.asarray(slots.run) == k)[0])
    # The bank has the highest rank of all; what is above the run's own is zero.
    adapter = jlora.truncate(jlora.pick(bank, slot), runs[k].rank)
    shutil.rmtree(options.out / "best", ignore_errors=True)
    jlora.checkpoint.save(options.out / "best", jlora.attach(params, adapter))
    tree = jlora.checkpoint.restore(options.out / "best", params)
    apply = jax.jit(jlora.lift(model.apply))
    found = logits(apply, tree, tokens, parts["test"]).argmax(-1)
    accuracy = float((found == data.labels[parts["test"]]).mean())
    print(f"\nthe best run: {runs[k]}; saved in {options.out / 'best'}")
    print(f"picture: {options.out / 'sweep.png'}")
    print(
        f"RESULT runs={len(runs)} seconds={history.seconds:.0f} best_rank="
        f"{runs[k].rank} best_rate={runs[k].rate:g} test_accuracy={accuracy:.3f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2, 16])
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    add("--seeds", type=int, default=2)
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=16, help="sentences of each run in a step")
    add("--evaluations", type=int, default=5)
    add("--keep", type=float, default=0.6, help="the part that goes on after each")
    add("--held-out", type=int, default=256, help="sentences to validate, and to test")
    add("--out", type=Path, default=Path("runs/sweep"))
    add("--quick", action="store_true", help="a few steps of a small grid")
    add("--model", type=Path, help="your own Hugging Face BERT snapshot")
    add("--data", type=Path, help="your own sentences, a file of label<TAB>text")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batch, options.evaluations = 6, 4, 2
        options.rates, options.held_out, options.seeds = [1e-3, 1e-2], 64, 1
    least = min(options.steps, options.batch, options.evaluations, options.seeds)
    if min(least, options.held_out, *options.ranks) < 1:
        parser.error(
            "expected 1 or more of --steps, --batch, --evaluations, --seeds, --held-out"
            " and --ranks"
        )
    if not 0 < options.keep <= 1:
        parser.error(f"--keep {options.keep}: expected a part of the runs, in (0, 1]")
    if options.evaluations > options.steps:
        parser.error("--evaluations: expected at most one a step")
    return options


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
