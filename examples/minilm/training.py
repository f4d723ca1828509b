"""A plain TrainState loop that can be stopped at any moment and goes on to the bit."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sentences import Tokens
from tqdm import tqdm

import jlora
import jlora.checkpoint

EVALUATIONS = 4
"""How often a run looks at the validation sentences."""

SAVE_EVERY = 50
"""Steps between checkpoints: what a killed process loses at most."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; a run resumes only with an equal one."""

    seed: int
    rank: int
    alpha: float
    learning_rate: float
    head_learning_rate: float
    batch: int
    epochs: int
    widths: list[int]
    """`Tokens.widths`."""
    limit: int | None
    """Use only so many sentences of each part."""
    classes: list[str]
    weights: str
    """sha256 of the base's weights file."""
    data: str
    """`Labelled.digest` of the sentences."""


class Stopped(Exception):
    """The user asked to stop; the run is saved."""


def to_the_end(main: Callable[[], None]) -> None:
    """Calls main; if the user stops it, says how to go on, and exits with 130."""
    try:
        main()
    except Stopped as stop:
        print(f"{stop}. The same command goes on from there.")
        sys.exit(130)
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on from the last checkpoint.")
        sys.exit(130)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained tree, and how it got there."""

    tree: Any
    history: dict[str, np.ndarray]
    """`loss` and `accuracy` of each step's batch; `validation` accuracies, each after
    so many `validated` steps."""


def wrap(params: Any, config: Config) -> Any:
    """LoRA on the queries and values of every layer; the head trains whole."""
    return jlora.wrap(
        params,
        rank=config.rank,
        alpha=config.alpha,
        targets=["**/query/kernel", "**/value/kernel"],
        train=["head/**"],
        key=jax.random.key(config.seed),
    )


def logits(apply: Any, params: Any, tokens: Tokens, rows: np.ndarray) -> np.ndarray:
    """What `apply` (jitted) says about the sentences `rows`, in their order."""
    out = {}
    for batch in tokens.batches(rows, size=64):
        found = np.asarray(apply({"params": params}, *tokens.batch(batch)))
        out.update(zip(batch.tolist(), found, strict=True))
    return np.stack([out[row] for row in rows.tolist()])


@partial(jax.jit, donate_argnums=0)
def train_step(state, ids, mask, labels):
    """One step on one batch: the state after it, the loss and the accuracy before."""

    def loss_fn(params):
        scores = state.apply_fn({"params": params}, ids, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return losses.mean(), (scores.argmax(-1) == labels).mean()

    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), loss, accuracy


def begin(apply, params, config: Config, steps: int) -> tuple[TrainState, dict]:
    """The state before the first step, and a history to be filled."""

    def adamw(peak):
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 16, steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    tree = wrap(params, config)
    tx = jlora.optimizer(
        adamw(config.learning_rate), tree, full=adamw(config.head_learning_rate)
    )
    state = TrainState.create(apply_fn=apply, params=tree, tx=tx)
    # An array from the start, so that a restored state has the same type.
    state = state.replace(step=jnp.zeros((), jnp.int32))
    history = {
        "loss": np.full(steps, np.nan, np.float32),
        "accuracy": np.full(steps, np.nan, np.float32),
        "validation": np.full(EVALUATIONS, np.nan, np.float32),
        "validated": np.linspace(0, steps, EVALUATIONS + 1, dtype=np.int32)[1:],
    }
    return state, history


def train(apply, params, tokens, labels, parts, config: Config, folder: Path) -> Run:
    """Fine-tunes in `folder`, from its last checkpoint if it holds one.

    The order of the sentences is a function of the seed and the epoch alone, so the
    step's number is the whole position in the data. `apply` is the model's, lifted and
    jitted. `params` is given up: its buffers are donated to the training step.
    """
    per_epoch = len(parts["train"]) // config.batch
    if not per_epoch:
        raise SystemExit(
            f"{len(parts['train'])} training sentences do not fill one batch of"
            f" {config.batch}: choose a smaller --batch"
        )
    claim(folder, config)
    steps = config.epochs * per_epoch
    state, history = begin(apply, params, config, steps)
    state, history = _restore(folder, params, state, history)
    start = int(state.step)
    bar = tqdm(
        total=steps * config.batch,
        initial=start * config.batch,
        desc=f"seed {config.seed}",
        unit=" examples",
        dynamic_ncols=True,
    )
    with bar, stop_requests() as stop:
        for step in range(start, steps):
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == start:
                rng = np.random.default_rng([config.seed, epoch])
                order = tokens.epoch(parts["train"], config.batch, rng)
            rows = order[position]
            state, *metrics = train_step(state, *tokens.batch(rows), labels[rows])
            history["loss"][step], history["accuracy"][step] = metrics

            done = step + 1
            if done in history["validated"]:
                rows = parts["validation"]
                found = logits(apply, state.params, tokens, rows).argmax(-1)
                accuracy = (found == labels[rows]).mean()
                history["validation"][history["validated"] == done] = accuracy

            recent = slice(max(0, done - 50), done)
            bar.set_postfix(
                {k: f"{history[k][recent].mean():.3f}" for k in ("loss", "accuracy")},
                refresh=False,
            )
            bar.update(config.batch)
            if done % SAVE_EVERY == 0 or done == steps or stop.is_set():
                _save(folder, state, history)
            if stop.is_set() and done < steps:
                raise Stopped(f"saved step {done} of {steps} in {folder}")
    return Run(state.params, history)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turns Ctrl-C and SIGTERM into an event; a second one acts at once."""
    requested = threading.Event()

    def request(number, frame):
        requested.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        tqdm.write("stopping after this step ...")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own(out: Path) -> None:
    """Makes the folder of an example's results; refuses one that holds anything else.

    What is in it may be replaced later.
    """
    mark = out / ".jlora-example"
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out: {out} is a file; expected a folder")
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise SystemExit(
            f"--out: {out} holds files that are no results of an example, which might "
            "be replaced: expected a new folder, or an empty one"
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def claim(folder: Path, config: Config) -> None:
    """Notes the configuration in `folder`; refuses one that holds another's run."""
    wanted = dataclasses.asdict(config)
    note = folder / "config.json"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(".new")
        fresh.write_text(json.dumps(wanted, indent=1))
        os.replace(fresh, note)
    found = json.loads(note.read_text())
    differences = [
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} asked for"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise SystemExit(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(differences)
            + "\nName another folder with --out, or start anew with --fresh."
        )


def _save(folder: Path, state: TrainState, history: dict[str, np.ndarray]) -> None:
    """Writes a checkpoint named after its step, then drops the older ones."""
    extra = {"opt_state": state.opt_state, "step": state.step, "history": history}
    older = list(folder.glob("checkpoints/*"))
    path = folder / "checkpoints" / str(int(state.step))
    jlora.checkpoint.save(path, state.params, extra=extra)
    for path in older:
        shutil.rmtree(path)


def _restore(folder: Path, params: Any, state: TrainState, history: dict):
    """The state and history of the last checkpoint, or those given where none is."""
    saved = checkpoints(folder)
    if not saved:
        return state, history
    extra = {"opt_state": state.opt_state, "step": state.step, "history": history}
    tree, extra = jlora.checkpoint.restore(saved[-1], params, extra=extra)
    history = jax.tree.map(np.array, extra.pop("history"))
    return state.replace(params=tree, **extra), history


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))
