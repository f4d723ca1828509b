"""A variant trains a small model, and what has run is not run again."""

import argparse
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

spec = importlib.util.spec_from_file_location(
    "variants_main", Path(__file__).with_name("main.py")
)
variants = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = variants  # its dataclasses ask for it
with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
    spec.loader.exec_module(variants)  # matplotlib's imports
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def task():
    """Sentences of eight tokens, of one or of the other half of all tokens."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 2
    ids = rng.integers(0, 20, (96, 8)).astype(np.int32) + 20 * labels[:, None]
    encoder = variants.encoder.Encoder(40, 8, 1, 16, 1, 2, 32, 1e-5)
    model = variants.encoder.Classifier(encoder, 2)

    def params(seed):
        one = jnp.ones((1, 8), jnp.int32)
        return model.init(jax.random.key(0), one, one > 0)["params"]

    return variants.Task(
        model=model,
        params=params,
        tokens=variants.Tokens(ids, np.full(96, 8), (8,)),
        labels=labels,
        parts={
            "train": np.arange(64),
            "validation": np.arange(64, 80),
            "test": np.arange(80, 96),
        },
        rank=2,
        alpha=4.0,
        batch=16,
        steps=24,
    )


@pytest.mark.parametrize(
    "name", ["EVA", "LoRA+", "LoRA-FA"]
)  # each in a way of its own
def test_a_variant_learns(task, name):
    trainer = variants.Trainer(task, variants.VARIANTS[name])
    found = trainer.run(1e-2, 0)
    assert found["loss"] < np.log(2)
    assert found["test"] > 0.8 and found["validation"] > 0.8  # of guesses half
    assert len(trainer.compiled) == 1
    trainer.run(1e-3, 1)
    assert len(trainer.compiled) == 1, "a rate or a seed compiled another step"


def test_what_a_variant_changes_is_what_it_says(task):
    def tree(name):
        options = dict(variants.VARIANTS[name])
        options = {k: v for k, v in options.items() if k not in ("ratio", "first")}
        return jlora.adapter(variants.wrapped(task, 0, **options))

    plain = tree("LoRA")
    assert {x.m is None for x in plain.values() if isinstance(x, jlora.LoRA)} == {True}
    assert any(isinstance(x, jlora.Full) for x in plain.values())
    dora = tree("DoRA")
    assert all(x.m is not None for x in dora.values() if isinstance(x, jlora.LoRA))
    scales = [
        next(float(x.scale) for x in tree(name).values() if isinstance(x, jlora.LoRA))
        for name in ("LoRA", "rsLoRA")
    ]
    np.testing.assert_allclose(scales, [2.0, 4 / np.sqrt(2)])


class Counting:
    """A trainer whose accuracy is a function of the rate, and that counts its runs."""

    def __init__(self):
        self.runs = 0

    def run(self, rate, seed):
        self.runs += 1
        good = 1 - abs(np.log10(rate) + 2) / 4
        return {"loss": 0.5, "validation": good, "test": good - 0.01 * seed}


def test_runs_are_kept_and_the_rate_is_chosen_by_validation(tmp_path):
    args = argparse.Namespace(
        rates=[1e-3, 1e-2, 1e-1],
        seeds=[0, 1, 2],
        variants=["LoRA", "DoRA"],
        out=tmp_path / "runs",
        **{"rank": 2, "alpha": 4.0, "sentences": 64, "judges": 16, "steps": 3},
    )

    def all_of_them(trainer):
        results = variants.Results(args)
        for name in args.variants:
            for rate in args.rates:
                results.run(name, rate, 0, trainer)
            for seed in args.seeds[1:]:
                results.run(name, results.best(name), seed, trainer)
        return results

    first, second = Counting(), Counting()
    results = all_of_them(first)
    assert (first.runs, results.best("LoRA")) == (10, 1e-2)
    np.testing.assert_allclose(results.tests("DoRA"), [1.0, 0.99, 0.98])
    row = "| LoRA | 0.750 | 1.000 | 0.750 | 0.01 | 0.990 | 0.010 |"
    assert row in results.table()
    again = all_of_them(second)
    assert second.runs == 0 and again.table() == results.table()
    assert len(json.loads(results.file.read_text())["runs"]) == 10
    variants.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    args.steps = 4
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        variants.Results(args)
