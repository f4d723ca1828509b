"""The training loop of 3L and its table, for any model and any data.

A run starts from a trained model. With a setting, the base of every adapted weight
fades while the adapters train, is dropped at the end, and what is left is evaluated;
without one it is ordinary LoRA.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import jlora
import jlora.schedules

VALIDATIONS = 8


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train: the name of a setting (None for ordinary LoRA), and C."""

    name: str
    setting: str | None
    rank: int
    lora_bias: bool = False


def variants(rank: int, kept_c: bool = True) -> list[Variant]:
    """What 3L was compared by; `kept_c` gives ordinary LoRA a C as well."""
    return [
        Variant("LoRA, the base kept", None, rank, kept_c),
        Variant("decay", "decay", rank),
        Variant("decay + noise", "compensate", rank),
        Variant("decay + noise + C", "compensate", rank, lora_bias=True),
        Variant("decay + noise, cleared + C", "clear", rank, lora_bias=True),
    ]


@dataclasses.dataclass
class Result:
    """What came of a variant.

    `history` has an array a step: `loss`, `accuracy` (of its batch), `factor`, `noise`
    (its spread, as a share of the weight's), and `mean` and `spread` of the faded
    weight that was watched; and `validation` accuracies after `validated` steps.
    """

    variant: Variant
    tree: Any
    history: dict[str, np.ndarray]
    accuracy: float
    parameters: int


# Inputs of the model, and labels.
Batch = tuple[tuple[Any, ...], Any]


def train(
    fn: Callable[..., jax.Array],
    tree: Any,
    variant: Variant,
    batches: Callable[[int], Batch],
    steps: int,
    accuracy: Callable[..., float],
    *,
    watch: str,
    learning_rate: float,
    per: str = "tensor",
    seed: int = 0,
) -> Result:
    """Trains a wrapped tree of the logits `fn(params, *inputs)`.

    `batches` gives the batch of a step; `accuracy(predict, part)` evaluates a jitted
    function of the inputs on the sentences or images of "validation" or "test".
    """
    lifted = jlora.lift(fn)
    predict = jax.jit(lifted)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, max(1, steps // 16)),
            optax.cosine_decay_schedule(learning_rate, max(1, steps // 4)),
        ],
        [steps - steps // 4],
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    key = jax.random.key(seed)
    factor, noise = optax.constant_schedule(1.0), optax.constant_schedule(0.0)
    if variant.setting:
        factor, noise = jlora.schedules.setting(variant.setting, steps)
    noisy = variant.setting not in (None, "decay")
    if noisy:  # the statistics of the bases are computed once, here
        tree = jlora.fade(tree, 1.0, noise=1.0, per=per, key=key)

    @jax.jit
    def step(trainable, opt_state, frozen, i, inputs, labels):
        def loss(trainable):
            tree = jlora.combine(trainable, frozen)
            if variant.setting:
                strength = noise(i) if noisy else None
                now = jax.random.fold_in(key, i)
                tree = jlora.fade(tree, factor(i), noise=strength, per=per, key=now)
            scores = lifted(tree, *inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            w = at(tree, watch).w
            seen = (scores.argmax(-1) == labels).mean(), w.mean(), w.std()
            return losses.mean(), seen

        (value, seen), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return trainable, opt_state, (value, *seen)

    trainable, frozen = jlora.partition(tree)
    opt_state = tx.init(trainable)
    names = "loss", "accuracy", "mean", "spread"
    history = {name: np.full(steps, np.nan) for name in names}
    history["factor"] = np.asarray([factor(i) for i in range(steps)], float)
    strength = np.asarray([noise(i) for i in range(steps)], float)
    history["noise"] = strength * np.sqrt(1 - history["factor"] ** 2)
    history["validated"] = np.linspace(0, steps, VALIDATIONS + 1, dtype=int)[1:]
    history["validation"] = np.full(VALIDATIONS, np.nan)
    bar = tqdm(range(steps), desc=variant.name, unit=" steps", dynamic_ncols=True)
    for i in bar:
        inputs, labels = batches(i)
        trainable, opt_state, seen = step(
            trainable, opt_state, frozen, i, inputs, labels
        )
        for name, value in zip(names, seen, strict=True):
            history[name][i] = value
        if i + 1 in history["validated"]:
            now = jlora.fade(jlora.combine(trainable, frozen), history["factor"][i])
            found = accuracy(lambda *x: predict(now, *x), "validation")  # noqa: B023
            history["validation"][history["validated"] == i + 1] = found
        recent = slice(max(0, i - 30), i + 1)
        bar.set_postfix(
            factor=f"{history['factor'][i]:.2f}",
            loss=f"{history['loss'][recent].mean():.3f}",
            accuracy=f"{history['accuracy'][recent].mean():.3f}",
        )
    tree = jlora.combine(trainable, frozen)
    if variant.setting:
        tree = jlora.drop_base(jlora.fade(tree, factor(steps - 1)))
    test = accuracy(lambda *x: predict(tree, *x), "test")
    return Result(variant, tree, history, test, deployed(tree))


def train_whole(
    fn: Callable[..., jax.Array],
    params: Any,
    batches: Callable[[int], Batch],
    steps: int,
    learning_rate: float,
) -> Any:
    """The base, where none is pretrained: every parameter trains."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 16, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

    @jax.jit
    def step(params, opt_state, inputs, labels):
        def loss(params):
            scores = fn(params, *inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            return losses.mean(), (scores.argmax(-1) == labels).mean()

        grads, seen = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, seen

    opt_state, seen = tx.init(params), []
    bar = tqdm(range(steps), desc="the base", unit=" steps", dynamic_ncols=True)
    for i in bar:
        params, opt_state, found = step(params, opt_state, *batches(i))
        seen.append(float(found))
        bar.set_postfix(accuracy=f"{np.mean(seen[-30:]):.3f}")
    return params


def at(tree: Any, path: str) -> Any:
    """The leaf at a path of nested dicts."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def deployed(tree: Any) -> int:
    """Parameters of what is deployed: merged weights, or the factors left of them."""
    adapter = jlora.adapter(tree).values()
    merged = all(x.w is None for x in adapter)
    return jlora.count(jlora.unwrap(tree) if merged else tree)[1]


def table(results: Sequence[Result], reference: tuple[str, int, float]) -> str:
    """Markdown: what each variant reaches, and what is left of the model."""
    name, size, accuracy = reference
    rows = [
        "| | rank | parameters left | of the whole | test accuracy |",
        "|---|---|---|---|---|",
        f"| {name} | | {size:,} | 100 % | {accuracy:.3f} |",
    ]
    rows += [
        f"| {r.variant.name} | {r.variant.rank} | {r.parameters:,} "
        f"| {100 * r.parameters / size:.1f} % | {r.accuracy:.3f} |"
        for r in results
    ]
    return "\n".join(rows)


def show(
    name: str,
    results: Sequence[Result],
    reference: tuple[str, int, float],
    watch: str,
    out: Path,
    *,
    record: bool,
    words: str = "",
) -> None:
    """Prints the table, draws the picture and, to record them, writes into README.

    `reference` is the name, size and accuracy of what the variants are compared with.
    """
    import pictures  # and matplotlib, once they are needed

    text = table([r for r in results if r.variant.name != reference[0]], reference)
    text = f"{text}\n\n{words}".rstrip()
    print(text)
    pictures.draw(results, reference[2], watch, out / f"{name}.png")
    if record:
        into_readme(name, text)


def into_readme(name: str, text: str) -> None:
    """Puts text between the markers of this name in the README beside this file."""
    path = Path(__file__).with_name("README.md")
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = path.read_text(encoding="utf-8")
    pattern = rf"(?s)({re.escape(marks[0])}\n).*?({re.escape(marks[1])})"
    if not re.search(pattern, old):
        raise SystemExit(f"{path} has no {marks[0]} … {marks[1]} to write between")
    new = re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", old)
    path.write_text(new, encoding="utf-8")
    print(f"written into {path}")
