"""How far perplexity ends from a float base's: examples/smollm, many seeds at once.

    pip install ".[quant,examples]"
    python benchmarks/smollm_seeds.py            # on a GPU: five minutes on an H200
    python benchmarks/smollm_seeds.py --quick    # two steps of two seeds, on a CPU

One run is a draw, and moves by as much as four bits cost. Here the seeds of a base
train together, in one `vmap` over adapters that share it: each has its own order of the
texts, and, where factors start at random, its own of those. The base is rounded by what
the first seed's texts send through it. On a GPU float32 products are in TF32.
"""

import argparse
import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.append(str(Path(__file__).parents[1] / "examples" / "smollm"))

import finetune
import jax
import jax.numpy as jnp
import numpy as np
import weights
from finetune import Config
from packing import Batch, Texts
from pinned import movie_reviews
from tqdm import tqdm

import jlora

CHUNK = 50
"""Steps in one call."""


class Data(NamedTuple):
    """The texts, and which of them are for what."""

    texts: Texts
    train: np.ndarray
    held_out: np.ndarray


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bases", nargs="+", default=["float", "int8", "nf4"], metavar="BASE")
    add("--seeds", type=int, default=8)
    add("--block", type=int, default=16)
    add("--learning-rate", type=float, default=1e-3)
    add("--rank", type=int, default=32)
    add("--steps", type=int, default=450, help=f"a multiple of {CHUNK}, or less")
    add("--quick", action="store_true")
    args = parser.parse_args()
    args.observed, args.held_out = 64, 2000
    if args.quick:
        args.seeds, args.steps, args.observed, args.held_out = 2, 2, 1, 8
    return args


def stacked(trees: list[Any]) -> Any:
    """Trees of arrays as one tree with a leading axis."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def start(model: Any, data: Data, config: Config, seeds: range) -> tuple[Any, Any]:
    """What trains, with an axis of seeds, and the base that they share."""

    def one(seed: int) -> Any:
        order = data.texts.epochs(data.train, seeds[0])
        batches = list(itertools.islice(order, config.observed))
        with jax.default_matmul_precision("highest"):
            own = dataclasses.replace(config, seed=seed)
            return finetune.prepare(model, own, batches)

    first, frozen = jlora.partition(one(seeds[0]))
    if config.base != "float":  # the factors start as what the rounding took
        return stacked([first] * len(seeds)), frozen
    rest = [jlora.partition(one(seed))[0] for seed in seeds[1:]]
    return stacked([first, *rest]), frozen


def trained(trainable: Any, frozen: Any, data: Data, config: Config, seeds: range):
    """What trains, after the steps."""
    own = finetune.training_step(config)

    def step(state: tuple[Any, Any], batch: Batch) -> tuple[Any, jax.Array]:
        trainable, opt_state, loss = own(*state, frozen, batch)
        return (trainable, opt_state), loss

    @jax.jit
    def chunk(state: Any, batches: Batch) -> tuple[Any, jax.Array]:
        return jax.lax.scan(jax.vmap(step), state, batches)

    orders = [data.texts.epochs(data.train, seed) for seed in seeds]
    state = trainable, jax.vmap(finetune.optimizer(config).init)(trainable)
    size = min(CHUNK, config.steps)
    for _ in tqdm(range(config.steps // size), desc=config.base, unit=" chunks"):
        batches = stacked([stacked([next(x) for x in orders]) for _ in range(size)])
        state, losses = chunk(state, batches)
        tqdm.write(f"loss {losses[-1].mean():.3f}")
    return state[0]


@jax.jit
def summed(trainable: Any, frozen: Any, batches: Batch, words: jax.Array) -> jax.Array:
    """For each seed, the negative log likelihood of the words."""

    def of_batch(pair: tuple[Batch, jax.Array]) -> jax.Array:
        batch, words = pair

        def one(trainable: Any) -> jax.Array:
            tree = jlora.combine(trainable, frozen)
            return jnp.where(words, finetune.losses(tree, batch), 0).sum()

        return jax.vmap(one)(trainable)

    return jax.lax.map(of_batch, (batches, words)).sum(0)


def perplexities(trainable: Any, frozen: Any, data: Data) -> np.ndarray:
    """Of the held-out words, for each seed."""
    batches = stacked(list(data.texts.batches(data.held_out)))
    words = (batches.segments > 0) & (batches.targets != data.texts.end)
    return np.exp(np.asarray(summed(trainable, frozen, batches, words)) / words.sum())


def main() -> None:
    args = arguments()
    source, labelled = weights.load(None), movie_reviews()
    texts = Texts.encode(labelled.texts, source.tokenizer, source.end, 4, 128)
    parts = labelled.split()
    held_out = np.random.default_rng(0).permutation(parts["test"])[: args.held_out]
    data, seeds = Data(texts, parts["train"], held_out), range(args.seeds)
    print(jax.devices()[0].device_kind, flush=True)
    fixed = {
        x.name: vars(args).get(x.name)
        for x in dataclasses.fields(Config)
        if x.name != "base"
    } | {"rows": 4, "width": 128, "alpha": 2.0 * args.rank}
    ends: dict[str, np.ndarray] = {}
    for base in args.bases:
        config = Config(base=base, **fixed)
        trainable, frozen = start(source.model(scanned=True), data, config, seeds)
        before = perplexities(trainable, frozen, data).mean()
        trainable = trained(trainable, frozen, data, config, seeds)
        ends[base] = perplexities(trainable, frozen, data)
        each = " ".join(f"{x:.2f}" for x in ends[base])
        print(f"{base}: {before:.2f} before; after {ends[base].mean():.2f}: {each}")
        if base != "float" and "float" in ends:
            above = 100 * (ends[base] / ends["float"] - 1)
            error = above.std(ddof=1) / len(above) ** 0.5
            print(f"{base}: {above.mean():+.2f} ± {error:.2f} % of float's", flush=True)


if __name__ == "__main__":
    main()
