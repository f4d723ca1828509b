"""Four adapters on four kinds of text, trained in one batch on one language model.

    python examples/many/domains.py            # a quarter of an hour on 2 cores
    python examples/many/domains.py --quick    # every step of it in a minute

Films, products, tweets and editorials each have an adapter of SmolLM2-135M. A batch has
rows of all four, each row with its own adapter, and the bank trains as one tree. Ends
with the perplexity of each kind of held-out text under each of the adapters, in which
every kind of text has to have its lowest under its own. Ctrl-C saves; the same command
goes on from there.
"""

import argparse
import dataclasses
import hashlib
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import charts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "smollm"))
import weights
from finetune import TARGETS
from model import cross_entropy
from packing import Batch, Texts
from pinned import Stopped, checkpoints, claim, own, stop_requests, to_the_end
from sentences import rated

import jlora
import jlora.checkpoint

DOMAINS = {
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}
SAVE_EVERY = 25


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; a run resumes only with an equal one."""

    steps: int
    rank: int
    alpha: float
    learning_rate: float
    rows: int
    """Of each kind of text in a batch."""
    width: int
    seed: int
    held_out: int
    weights: str
    data: str


class State(NamedTuple):
    """All that a step changes, and the losses (steps, kinds of text) so far."""

    trainable: Any
    opt_state: Any
    step: int
    losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class Domain:
    """One kind of text: to train on, and held out."""

    texts: Texts
    train: np.ndarray
    held_out: np.ndarray


def corpus(table: str) -> tuple[list[str], np.ndarray]:
    """The texts, and which are held out: a tenth, by the hash of what they are of.

    The sentences of one review, or of one article, have the same first half of an id.
    """
    found = rated(table)
    whole = [number.split("_")[0] for number, _, _ in found]
    byte = [hashlib.sha256(x.encode()).digest()[0] for x in whole]
    return [text for _, _, text in found], np.array(byte) < 26


def domain(texts: list[str], held_out: np.ndarray, source, config: Config) -> Domain:
    encoded = Texts.encode(
        texts, source.tokenizer, source.end, config.rows, config.width
    )
    rows = np.random.default_rng(0).permutation(np.flatnonzero(held_out))
    return Domain(encoded, np.flatnonzero(~held_out), rows[: config.held_out])


def one_row(model, ids, segments):
    """Logits (width, vocabulary) of one row: what `per_example` makes a batch of."""
    return model(ids[None], segments[None])[0]


def wrapped(model, config: Config, seed: int):
    ids = jnp.zeros(8, jnp.int32)
    options = {"rank": config.rank, "alpha": config.alpha, "targets": TARGETS}
    plan = jlora.plan(one_row, model, ids, ids, **options)
    return jlora.wrap(model, plan=plan, key=jax.random.key(seed))


def bank_of(model, config: Config, kinds: int) -> jlora.Bank:
    """An adapter for each kind of text, as they are before training."""
    seeds = range(config.seed, config.seed + kinds)
    return jlora.stack([jlora.adapter(wrapped(model, config, s)) for s in seeds])


def optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


@partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def train_step(trainable, opt_state, frozen, model, batch: Batch, config: Config):
    """A step of all adapters, on a batch (kinds × rows, width); losses (kinds,)."""
    kinds = len(batch.ids) // config.rows
    which = jnp.repeat(jnp.arange(kinds), config.rows)

    def loss(trainable):
        bank = jlora.combine(trainable, frozen)
        logits = jlora.per_example(one_row)(
            model, bank, which, batch.ids, batch.segments
        )
        of_each = jax.tree.map(
            lambda x: x.reshape(kinds, config.rows, *x.shape[1:]),
            (logits, batch.targets, batch.segments > 0),
        )
        losses = jax.vmap(cross_entropy)(*of_each)
        return losses.sum(), losses  # no adapter is in another's loss

    grads, losses = jax.grad(loss, has_aux=True)(trainable)
    # Each slot is clipped by its own norm.
    tx = optimizer(config)
    updates, opt_state = jax.vmap(tx.update)(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, losses


def begin(model, config: Config, kinds: int, folder: Path) -> tuple[State, Any]:
    """The state in the last checkpoint of `folder`, or that of step 0; what is frozen.

    A bank is saved by Orbax, as any tree is.
    """
    claim(folder, config)
    trainable, frozen = jlora.partition(bank_of(model, config, kinds))
    opt_state = jax.vmap(optimizer(config).init)(trainable)
    losses = np.full((config.steps, kinds), np.nan, np.float32)
    state = State(trainable, opt_state, 0, losses)
    if found := checkpoints(folder):
        with ocp.StandardCheckpointer() as checkpointer:
            like = jax.tree.map(_struct, state._asdict())
            state = State(**checkpointer.restore(found[-1].absolute(), like))
        state = state._replace(losses=np.array(state.losses), step=int(state.step))
    return state, frozen


def _struct(x: Any) -> Any:
    return x if isinstance(x, int) else jax.ShapeDtypeStruct(x.shape, x.dtype)


def save(folder: Path, state: State) -> None:
    older = checkpoints(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        path = (folder / "checkpoints" / str(state.step)).absolute()
        checkpointer.save(path, state._asdict())
    for path in older:
        shutil.rmtree(path)


def train(
    model, domains: dict[str, Domain], state: State, frozen, config: Config, folder
):
    """Trains from `state` to the end; saves in `folder`, also when asked to stop."""
    orders = [x.texts.epochs(x.train, config.seed) for x in domains.values()]
    bar = tqdm(total=config.steps, initial=state.step, unit=" steps", ncols=88)
    with bar, stop_requests() as stop:
        for done in range(1, config.steps + 1):
            batches = [next(order) for order in orders]
            if done <= state.step:
                continue  # of an earlier process
            batch = Batch(*map(np.concatenate, zip(*batches, strict=True)))
            trainable, opt_state, losses = train_step(
                state.trainable, state.opt_state, frozen, model, batch, config
            )
            state.losses[done - 1] = losses
            state = State(trainable, opt_state, done, state.losses)
            recent = state.losses[max(0, done - 20) : done].mean(0)
            said = (f"{name} {x:.2f}" for name, x in zip(domains, recent, strict=True))
            bar.set_postfix_str(", ".join(said), refresh=False)
            bar.update()
            if done % SAVE_EVERY == 0 or done == config.steps or stop.is_set():
                save(folder, state)
            if stop.is_set() and done < config.steps:
                raise Stopped(f"saved step {done} of {config.steps} in {folder}")
    return jlora.combine(state.trainable, frozen), state.losses


@jax.jit
def losses_of(model, bank, batch: Batch):
    """Losses (adapters + 1, rows, width): under no adapter, and under each."""
    slots = jnp.arange(-1, bank.slots)
    rows = len(batch.ids)
    ids, segments, targets = (
        jnp.tile(x, (len(slots), 1)) for x in (batch.ids, batch.segments, batch.targets)
    )
    which = jnp.repeat(slots, rows)
    logits = jlora.per_example(one_row)(model, bank, which, ids, segments)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.reshape(len(slots), rows, -1)


def perplexities(model, bank, domains: dict[str, Domain]) -> np.ndarray:
    """Of the words of the held-out texts: (adapters + 1, domains)."""
    columns = []
    for name, x in domains.items():
        batches = list(x.texts.batches(x.held_out))
        found = []
        for batch in tqdm(batches, desc=name, unit=" batches", ncols=88, leave=False):
            words = (batch.segments > 0) & (batch.targets != x.texts.end)
            found.append(np.asarray(losses_of(model, bank, batch))[:, words])
        columns.append(np.exp(np.concatenate(found, 1).mean(1)))
    return np.stack(columns, 1)


def report(table: np.ndarray, names: list[str]) -> str:
    lines = ["perplexity of " + "".join(f"{name:>12}" for name in names)]
    for name, row in zip(["no adapter", *names], table, strict=True):
        lines.append(f"{name:14}" + "".join(f"{x:12.2f}" for x in row))
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    own(args.out)
    source = weights.load(args.model)
    corpora = {name: corpus(table) for name, table in DOMAINS.items()}
    every = "".join(text for texts, _ in corpora.values() for text in texts)
    settings = {x.name: vars(args).get(x.name) for x in dataclasses.fields(Config)}
    settings["weights"] = weights.digest(args.model)
    settings["data"] = hashlib.sha256(every.encode()).hexdigest()
    config = Config(**settings)
    domains = {k: domain(*x, source, config) for k, x in corpora.items()}
    for name, x in domains.items():
        print(f"{name:12}{len(x.train):6,} texts, {len(x.held_out):4} held out")
    if args.fresh:
        shutil.rmtree(args.out, ignore_errors=True)
        own(args.out)
    model = source.model(scanned=True)
    state, frozen = begin(model, config, len(domains), args.out)
    bank = jlora.combine(state.trainable, frozen)
    print(jlora.summary(bank), flush=True)
    bank, losses = train(model, domains, state, frozen, config, args.out)

    for k, name in enumerate(domains):  # each is an adapter as any other
        folder = args.out / "adapters" / name
        shutil.rmtree(folder, ignore_errors=True)
        jlora.checkpoint.save(folder, jlora.attach(model, jlora.pick(bank, k)))
    table = perplexities(model, bank, domains)
    print(report(table, list(domains)))
    charts.heat_map(
        table, ["none", *domains], list(domains), args.out / "perplexities.png"
    )
    print(f"adapters: {args.out / 'adapters'}")
    print(f"picture: {args.out / 'perplexities.png'}")
    lowest = np.diag(table[1:])
    others = np.where(np.eye(len(lowest), dtype=bool), np.inf, table[1:]).min(0)
    if not args.quick and not (lowest < np.minimum(others, table[0])).all():
        raise SystemExit("some kind of text is not best under its own adapter")
    print(
        "RESULT "
        + " ".join(f"{name}={x:.2f}" for name, x in zip(domains, lowest, strict=True))
        + f" nearest_other={(others / lowest).min():.3f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="the run's folder (runs/domains)")
    add("--fresh", action="store_true", help="start anew, dropping what --out holds")
    add("--quick", action="store_true", help="a few steps")
    add("--model", type=Path, help="your own Llama: a GGUF file or a snapshot's folder")
    add("--steps", type=int, default=120)
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--learning-rate", type=float, default=2e-3)
    add("--rows", type=int, default=1, help="of each kind of text; texts are packed")
    add("--width", type=int, default=128, help="tokens in a row")
    add("--held-out", type=int, default=60, help="texts of each kind")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("steps", "rank", "rows", "held_out"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} {getattr(args, name)}: expected 1 or more")
    if args.width < 8:
        parser.error(f"--width {args.width}: expected 8 tokens or more")
    if args.quick:
        args.steps, args.width, args.held_out = 3, 48, 4
    args.out = args.out or Path("runs/domains-quick" if args.quick else "runs/domains")
    if args.model and args.out.absolute() in args.model.absolute().parents:
        parser.error(f"--model: {args.model} is a result in --out, which is replaced")
    return args


if __name__ == "__main__":
    to_the_end(main)
