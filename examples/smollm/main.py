"""QLoRA on a small language model: SmolLM2-135M learns to write as film critics do.

    python examples/smollm/main.py              # less than 20 minutes on 2 cores
    python examples/smollm/main.py --quick      # every step of it in a minute
    python examples/smollm/main.py --compare    # float, int8, nf4: three times that

Fetches a pinned copy of the model and of the sentences on first use, quantises the
base, trains adapters on all seven matrices of every layer, and writes what Hugging
Face's libraries and their servers load: the base as a folder, the adapter beside it.
Ctrl-C saves; the same command goes on from there.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import curves
import finetune
import numpy as np
import weights
from finetune import Config, megabytes
from packing import Texts
from pinned import Labelled, movie_reviews, own, to_the_end

import jlora
import jlora.checkpoint
import jlora.peft

MODEL = (
    "your own Llama with tied embeddings and no rope scaling: a snapshot's folder, or"
    " a GGUF file with SmolLM's tokenizer"
)
PROMPTS = ["The film is", "A comedy that", "The acting", "If you like"]
BASES = ["float", "int8", "mixed", "nf4"]
COMPARED = ["float", "int8", "nf4"]
CLOSE = {"int8": 0.01, "nf4": 0.02}
"""How far the perplexity on each base may end above that on the float one, with the
settings that it was measured with, which are the defaults."""


def main() -> None:
    args = arguments()
    own(args.out)
    source = weights.load(args.model)
    data = read_texts(args.data) if args.data else movie_reviews()
    texts = Texts.encode(
        data.texts, source.tokenizer, source.end, args.rows, args.width
    )
    parts = data.split()
    held_out = np.random.default_rng(0).permutation(parts["test"])[: args.held_out]
    parts = {"train": parts["train"], "held out": held_out}
    print(", ".join(f"{len(rows):,} texts {name}" for name, rows in parts.items()))
    settings = {x.name: vars(args).get(x.name) for x in dataclasses.fields(Config)}
    settings |= {"weights": weights.digest(args.model), "data": data.digest()}

    results = {}
    bases = dict.fromkeys([*COMPARED * args.compare, args.base])
    for base in bases:
        config = Config(**settings | {"base": base})
        results[base] = run(source, texts, parts, config, args)
    curves.draw({k: x.history for k, x in results.items()}, args.out / "run.png")
    print(f"picture: {args.out / 'run.png'}")
    result = results[args.base]
    show(result.tree, source, args.new)
    border(result.tree, source, texts, parts, args)
    missed = compare(results) if args.compare else []
    print(
        f"RESULT perplexity_before={result.before:.2f}"
        f" perplexity_after={result.after:.2f} base_mb={result.base_mb:.1f}"
        f" float_base_mb={result.float_base_mb:.1f}"
    )
    if missed and args.as_measured:
        raise SystemExit("; ".join(missed))


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {least} or more")
        return int(text)

    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", choices=BASES, default="nf4", help="how the base is kept (nf4)")
    add("--block", type=at_least(1), default=16, help="numbers that share a scale")
    add(
        "--observed", type=at_least(0), default=64, help="batches seen for the rounding"
    )
    add("--compare", action="store_true", help="train on float, int8 and nf4 bases")
    add("--out", type=Path, help="the runs' folder (runs/smollm)")
    add("--fresh", action="store_true", help="start anew, dropping what --out holds")
    add("--quick", action="store_true", help="a few steps on few texts")
    add("--model", type=Path, help=MODEL)
    add("--data", type=Path, help="your own texts, one a line")
    add("--steps", type=at_least(1), default=450)
    add("--rank", type=at_least(1), default=32)
    add("--alpha", type=float, default=64.0)
    add("--learning-rate", type=float, default=1e-3)
    add("--rows", type=at_least(1), default=4, help="of a batch; texts are packed")
    add("--width", type=at_least(8), default=128, help="tokens in a row")
    add(
        "--held-out",
        type=at_least(1),
        default=2000,
        help="at most so many texts that perplexity is of (2000, which are all)",
    )
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    free = {"base", "compare", "out", "fresh"}
    args.as_measured = all(
        value == parser.get_default(name)
        for name, value in vars(args).items()
        if name not in free
    )
    args.new = 24
    if args.quick:
        args.steps, args.rows, args.width, args.held_out, args.new = 4, 2, 64, 8, 4
        args.observed = 0
    args.out = args.out or Path("runs/smollm-quick" if args.quick else "runs/smollm")
    if args.model and args.out.absolute() in args.model.absolute().parents:
        parser.error(f"--model: {args.model} is a result in --out, which is replaced")
    return args


def read_texts(path: Path) -> Labelled:
    """The user's own texts, one a line."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; expected one text a line")
    try:
        texts = [x.strip() for x in path.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: no text in UTF-8 ({error})") from None
    texts = [x for x in texts if x]
    data = Labelled(texts, np.zeros(len(texts), int), ("text",))
    if min(map(len, data.split().values())) < 8:
        raise SystemExit(f"{path}: {len(texts)} texts are too few to hold some out")
    return data


@dataclasses.dataclass(frozen=True)
class Result:
    """A run that has ended."""

    tree: Any
    history: dict[str, np.ndarray]
    base_mb: float
    float_base_mb: float

    @property
    def before(self) -> float:
        return float(self.history["perplexity"][0])

    @property
    def after(self) -> float:
        return float(self.history["perplexity"][-1])


def run(source, texts: Texts, parts, config: Config, args) -> Result:
    """Trains on one kind of base, in a folder of its own."""
    folder = args.out / config.base
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    model = source.model(scanned=True)
    float_mb = megabytes(model)
    print(f"\n{config.base} base", flush=True)
    state, frozen = finetune.begin(model, texts, parts, config, folder)
    del model
    tree = jlora.combine(state.trainable, frozen)
    base_mb = megabytes(jlora.unwrap(tree))
    print(jlora.summary(tree))
    print(f"base            {base_mb:8.1f} MB ({float_mb:.1f} MB in float32)")
    print(f"adapters        {megabytes(state.trainable):8.1f} MB")
    print(f"optimizer       {megabytes(state.opt_state):8.1f} MB", flush=True)
    if state.step < config.steps:
        step = finetune.compiled_step(state, frozen, config)
        memory = step.memory_analysis()
        print(f"step, arguments {memory.argument_size_in_bytes / 1e6:8.1f} MB")
        print(f"step, temporary {memory.temp_size_in_bytes / 1e6:8.1f} MB", flush=True)
        state = finetune.train(step, state, frozen, texts, parts, config, folder)
    tree = jlora.combine(state.trainable, frozen)
    result = Result(tree, state.history, base_mb, float_mb)
    print(
        f"{config.base} base: perplexity {result.before:.2f} before and"
        f" {result.after:.2f} after {config.steps} steps"
    )
    if not args.quick and not result.after < result.before:
        raise SystemExit("training has not lowered the perplexity")
    return result


def show(tree, source, new: int) -> None:
    """Prints what the model says after some prompts, without and with its adapters."""
    for words, t in (("before", jlora.scaled(tree, 0.0)), ("after", tree)):
        said = finetune.continuations(t, PROMPTS, source.tokenizer, source.end, new)
        print(f"\nthe most likely words, {words}:")
        for prompt, text in zip(PROMPTS, said, strict=True):
            print(f"  {prompt} |{text!r}")
    print()


def border(tree, source, texts: Texts, parts, args) -> None:
    """Writes base and adapter for Hugging Face's libraries, and reads the latter back.

    The base is what the adapter was trained on: the quantised numbers, as floats.
    """
    base, adapter = args.out / "base", args.out / "peft"
    trained, tree = tree, finetune.in_floats(tree)
    model = jlora.unwrap(tree)
    weights.write(source.replace(model), base)
    names = jlora.peft.match(model, base, plan=finetune.planned(model, args))
    shutil.rmtree(adapter, ignore_errors=True)
    config = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    options = {"portable": True, "config": config, "own_base": True}
    jlora.peft.save(adapter, tree, names=names, **options)
    print(f"for transformers, vLLM and others: {base} and {adapter}")
    print(jlora.peft.check(adapter, server="vllm"))
    served = jlora.peft.load(adapter, model)
    some = parts["held out"][:200]
    own, written = (finetune.perplexity(x, texts, some) for x in (trained, served))
    print(
        f"perplexity of {len(some)} texts: {own:.2f}, and of what was written"
        f" {written:.2f}"
    )


def compare(results: dict[str, Result]) -> list[str]:
    """Prints a line for each base; returns which end too far above the float one."""
    missed = []
    print("base      MB    perplexity before  after  against float")
    for base, x in results.items():
        above = x.after / results["float"].after - 1
        print(
            f"{base:6} {x.base_mb:6.1f} {x.before:15.2f} {x.after:10.2f} {above:+.2%}"
        )
        if base in CLOSE and above > CLOSE[base]:
            missed.append(
                f"{base}: {above:.2%} above the float base, expected {CLOSE[base]:.0%}"
                " at most"
            )
    return missed


if __name__ == "__main__":
    to_the_end(main)
