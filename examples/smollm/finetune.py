"""Fine-tunes adapters on a frozen, perhaps quantised, base; can be stopped at any time.

The adapters are half of a pytree, and the base the other half. The step is given both
and returns the adapters alone.
"""

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from model import cross_entropy
from packing import Batch, Texts
from pinned import Stopped, checkpoints, claim, stop_requests
from tqdm import tqdm

import jlora
import jlora.checkpoint
import jlora.initializers

REST, SHOWS = (
    [f"layers/**/{name}/kernel" for name in names]
    for names in (("q", "k", "o", "gate"), ("v", "up", "down"))
)
"""The seven matrices of a layer: a mixed base has nf4 in the first, and int8 in those
in which the rounding of nf4 shows most."""

TARGETS = [*REST, *SHOWS]
EVALUATIONS = 3
"""How often a run looks at the held-out texts: at its start, halfway, at its end."""

SAVE_EVERY = 25
"""Steps between checkpoints: what a killed process loses at most."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; a run resumes only with an equal one."""

    base: str
    """"float", the qtype of `jlora.quantize`, or "mixed"."""
    block: int
    """How many numbers of a quantised base share a scale."""
    observed: int
    """Batches that show what enters each weight, so that a quantised base rounds where
    it shows least (GPTQ); 0: each number to the nearest."""
    steps: int
    rank: int
    alpha: float
    learning_rate: float
    rows: int
    width: int
    seed: int
    held_out: int
    """How many texts the perplexity is of."""
    weights: str
    """sha256 of the base's weights."""
    data: str
    """sha256 of the texts."""


class State(NamedTuple):
    """All that a step changes, and what was measured so far."""

    trainable: Any
    opt_state: Any
    step: int
    history: dict[str, np.ndarray]
    """`loss`, `tokens` and `seconds` of each step; `perplexity` after so many steps,
    `evaluated`."""


def call(model, ids, segments=None):
    """The function of the model that is planned and lifted."""
    return model(ids, segments)


def planned(model, config) -> jlora.Plan:
    """Adapters on all seven matrices of each layer."""
    ids = jnp.zeros((1, 8), jnp.int32)
    options = {"rank": config.rank, "alpha": config.alpha, "targets": TARGETS}
    return jlora.plan(call, model, ids, ids, **options)


def prepare(model, config: Config, batches: Iterable[Batch] = ()):
    """The model with its base quantised, if it is to be, and adapters on it."""
    plan, init = planned(model, config), "kaiming"
    if config.base == "float":
        return jlora.wrap(model, plan=plan, init=init, key=jax.random.key(config.seed))
    moments, model = observed(model, plan, batches), narrow(model)
    if moments is not None and config.base != "mixed":
        # The factors begin with what the rounding took.
        init = jlora.initializers.loftq(
            config.base, block=config.block, moments=moments
        )
    else:
        model = quantized(model, config, moments)
    return jlora.wrap(model, plan=plan, init=init, key=jax.random.key(config.seed))


def observed(model, plan: jlora.Plan, batches: Iterable[Batch]):
    """The second moments of what enters each matrix; None without batches."""
    observe, moments = jax.jit(partial(jlora.observe, call, plan=plan)), None
    for x in tqdm(list(batches), desc="observing", unit=" batches", ncols=88):
        own = observe(model, x.ids, x.segments)
        moments = own if moments is None else moments + own
    return moments


def narrow(model):
    """The model with its matrices in bfloat16, as the scales of blocks then are."""

    def leaf(path, x):
        kernel = "kernel" in jax.tree_util.keystr(path)
        return x.astype(jnp.bfloat16) if kernel else x

    return jax.tree_util.tree_map_with_path(leaf, model)


def quantized(model, config: Config, moments=None):
    """The model with the seven matrices of each layer in low bits."""
    quantize = partial(jlora.quantize, block=config.block, moments=moments)
    if config.base != "mixed":
        return quantize(model, config.base, targets=TARGETS)
    return quantize(quantize(model, "nf4", targets=REST), "int8", targets=SHOWS)


def keep(folder: Path, tree):
    """Writes the arrays of a base; `kept` reads them."""
    arrays = dict(enumerate(jax.tree.leaves(jlora.unwrap(tree))))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "base", arrays)


def kept(folder: Path, model, config: Config):
    """The quantised model that `keep` wrote."""
    shapes = jax.eval_shape(lambda: narrow(model))
    shapes, treedef = jax.tree.flatten(quantized(shapes, config))
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(
            folder.absolute() / "base", dict(enumerate(shapes))
        )
    # By NumPy, so that no device is asked for, which a compiled step minds in JAX 0.10.
    arrays = [jnp.asarray(np.asarray(arrays[k])) for k in range(len(shapes))]
    return jax.tree.unflatten(treedef, arrays)


def in_floats(tree):
    """The same adapters, on the base that they were trained on, as floats."""
    base = jax.tree.map(jnp.float32, jlora.merge(jlora.unwrap(tree)))
    return jlora.attach(base, jlora.adapter(tree))


def optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def training_step(config: Config) -> Callable:
    """A training step.

    It maps trainable, opt_state, frozen and a batch to new ones of the first two and
    the loss.
    """
    tx = optimizer(config)

    def step(trainable, opt_state, frozen, batch: Batch):
        def loss(trainable):
            tree = jlora.combine(trainable, frozen)
            logits = jlora.lift(call)(tree, batch.ids, batch.segments)
            return cross_entropy(logits, batch.targets, batch.segments > 0)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return step


def compiled_step(state: State, frozen, config: Config) -> Callable:
    """A training step, compiled."""
    batch = Batch(*[jax.ShapeDtypeStruct((config.rows, config.width), jnp.int32)] * 3)
    args = state.trainable, state.opt_state, frozen, batch
    return jax.jit(training_step(config)).lower(*args).compile()


@jax.jit
def losses(tree, batch: Batch):
    logits = jlora.lift(call)(tree, batch.ids, batch.segments)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)


def perplexity(tree, texts: Texts, part: np.ndarray) -> float:
    """Of the words in the texts of `part`: that a text ends is learnt, but no word."""
    found = []
    batches = list(texts.batches(part))
    for batch in tqdm(batches, desc="held out", unit=" batches", ncols=88, leave=False):
        words = (batch.segments > 0) & (batch.targets != texts.end)
        found.append(np.asarray(losses(tree, batch))[words])
    return float(np.exp(np.concatenate(found).mean()))


@partial(jax.jit, static_argnames="new")
def greedy(tree, ids, lengths, new: int):
    """Fills `new` more tokens in after the first `lengths` of each row of `ids`.

    What stands behind them is not seen. All of it is computed again for each token.
    """
    row = jnp.arange(len(ids))

    def extend(i, ids):
        logits = jlora.lift(call)(tree, ids)[row, lengths + i - 1]
        return ids.at[row, lengths + i].set(logits.argmax(-1).astype(ids.dtype))

    return jax.lax.fori_loop(0, new, extend, ids)


def continuations(tree, prompts: list[str], tokenizer, end: int, new: int) -> list[str]:
    """What the model says after each of the prompts, up to the end of the text."""
    rows = [[end, *tokenizer.encode(x, add_special_tokens=False).ids] for x in prompts]
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max() + new), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    filled = np.asarray(greedy(tree, ids, lengths, new))
    said = []
    for row, n in zip(filled, lengths, strict=True):
        words = row[n : n + new].tolist()
        words = words[: words.index(end)] if end in words else words
        said.append(tokenizer.decode(words))
    return said


def begin(model, texts: Texts, parts, config: Config, folder: Path):
    """The state in the last checkpoint of `folder`, or that of step 0; and the base.

    The base is the half of the tree that is frozen.
    """
    claim(folder, config)
    found = checkpoints(folder)
    if found and config.base != "float":
        model = kept(folder, model, config)
    if found:
        tree = jlora.wrap(model, plan=planned(model, config))
    else:
        shapes = jax.eval_shape(lambda: model)
        if config.base != "float":  # an error of --block now, and not after observing
            try:
                quantized(shapes, config)
            except ValueError as error:
                raise SystemExit(f"--block {config.block}: {error}") from None
        epochs = texts.epochs(parts["train"], config.seed)
        tree = prepare(model, config, itertools.islice(epochs, config.observed))
        if config.base != "float":
            shutil.rmtree(folder / "base", ignore_errors=True)
            keep(folder, tree)
    trainable, frozen = jlora.partition(tree)
    steps = config.steps
    history = {
        "loss": np.full(steps, np.nan, np.float32),
        "tokens": np.zeros(steps, np.int32),
        "seconds": np.zeros(steps, np.float32),
        "perplexity": np.full(EVALUATIONS, np.nan, np.float32),
        "evaluated": np.linspace(0, steps, EVALUATIONS, dtype=np.int32),
    }
    state = State(trainable, optimizer(config).init(trainable), 0, history)
    if not found:
        return state, frozen
    like = {"opt_state": state.opt_state, "step": 0, "history": history}
    tree, extra = jlora.checkpoint.restore(found[-1], jlora.unwrap(tree), extra=like)
    extra["history"] = jax.tree.map(np.array, extra["history"])
    trainable, frozen = jlora.partition(tree)
    return State(trainable, **extra), frozen


def train(
    step: Callable, state: State, frozen, texts: Texts, parts, config: Config, folder
) -> State:
    """Trains from `state` to the end; saves in `folder`, also when asked to stop.

    The order of the texts is a function of the seed and the epoch alone, so the step's
    number is the whole position in the data.
    """
    trainable, opt_state, start, history = state
    epochs = texts.epochs(parts["train"], config.seed)
    batches = itertools.islice(epochs, start, config.steps)
    total = config.steps
    if start == 0:  # of the base alone
        alone = jlora.scaled(jlora.combine(trainable, frozen), 0.0)
        evaluate(*jlora.partition(alone), texts, parts, history, 0)
    bar = tqdm(total=total, initial=start, desc=config.base, unit=" steps", ncols=88)
    with bar, stop_requests() as stop:
        for done, batch in enumerate(batches, start + 1):
            began = time.perf_counter()
            trainable, opt_state, loss = step(trainable, opt_state, frozen, batch)
            history["loss"][done - 1] = loss
            history["seconds"][done - 1] = time.perf_counter() - began
            history["tokens"][done - 1] = (batch.segments > 0).sum()
            recent = slice(max(0, done - 20), done)
            speed = history["tokens"][recent].sum() / history["seconds"][recent].sum()
            mean = history["loss"][recent].mean()
            bar.set_postfix_str(f"loss {mean:.3f}, {speed:.0f} tokens/s", refresh=False)
            bar.update()
            evaluate(trainable, frozen, texts, parts, history, done)
            if done % SAVE_EVERY == 0 or done == total or stop.is_set():
                state = State(trainable, opt_state, done, history)
                save(folder, state, frozen)
            if stop.is_set() and done < total:
                raise Stopped(f"saved step {done} of {total} in {folder}")
    return state


def evaluate(trainable, frozen, texts: Texts, parts, history, step: int) -> None:
    """Notes the perplexity of the held-out texts, if this is a step to look at it."""
    for i in np.flatnonzero(history["evaluated"] == step):
        tree = jlora.combine(trainable, frozen)
        found = perplexity(tree, texts, parts["held out"])
        history["perplexity"][i] = found
        tqdm.write(f"step {step}: perplexity {found:.2f}")


def save(folder: Path, state: State, frozen) -> None:
    """Writes a checkpoint named after its step, then drops the older ones."""
    older = checkpoints(folder)
    jlora.checkpoint.save(
        folder / "checkpoints" / str(state.step),
        jlora.combine(state.trainable, frozen),
        extra={k: getattr(state, k) for k in ("opt_state", "step", "history")},
    )
    for path in older:
        shutil.rmtree(path)


def megabytes(tree) -> float:
    """Of the arrays in a tree. Two numbers of four bits are a byte."""
    bits = [x.size * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree)]
    return sum(bits) / 8e6
