"""Runs side by side are what each is alone: in a sweep, in training, in serving."""

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "smollm"))
with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
    import decode  # matplotlib's imports
    import domains
    import serve
    import sweep
from pinned import Stopped
from sentences import Tokens
from test_smollm import END, SIZES, tiny  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# -------------------------------------------------------------------------- a sweep


@pytest.fixture(scope="module")
def task():
    """Sentences of one or of the other half of all tokens, and a small encoder."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    ids = rng.integers(1, 8, (120, sweep.WIDTH)) + 8 * labels[:, None]
    tokens = Tokens(ids.astype(np.int32), rng.integers(4, 9, 120), (sweep.WIDTH,))
    model = sweep.encoder.Classifier(
        sweep.encoder.Encoder(16, sweep.WIDTH, 1, 8, 1, 2, 16, 1e-6), 2
    )
    ids, mask = tokens.batch(np.arange(2))
    params = model.init(jax.random.key(0), ids, mask)["params"]
    rows = np.arange(120)
    parts = {"train": rows[:80], "validation": rows[80:]}
    return sweep.Task(model, params, tokens, labels, parts)


def options(**changes):
    own = {"steps": 20, "batch": 4, "evaluations": 4, "keep": 1.0}
    return argparse.Namespace(**own | changes)


GRID = [
    sweep.Run(rank, rate, seed)
    for rank in (1, 3)
    for rate in (1e-3, 1e-1)
    for seed in (0, 1)
]


def test_a_run_of_a_sweep_is_the_run_alone(task):
    _, together = sweep.train(task, GRID, options())
    assert np.isfinite(together.loss).all()
    for k in (3, 6):
        slots, alone = sweep.train(task, GRID[k : k + 1], options())
        np.testing.assert_allclose(alone.loss[:, 0], together.loss[:, k], rtol=1e-5)
        np.testing.assert_allclose(
            alone.validation[:, 0], together.validation[:, k], rtol=1e-5
        )
        assert slots.trainable["head/kernel"].value.shape == (1, 8, 2)


def test_what_has_stopped_changes_nothing(task):
    _, whole = sweep.train(task, GRID, options())
    slots, halved = sweep.train(task, GRID, options(keep=0.6))
    seen = np.isfinite(halved.validation)
    assert seen.sum(1).tolist() == [8, 5, 3, 2]
    assert slots.run.shape == (3,)  # five: by the mask; then three moved together
    np.testing.assert_allclose(
        halved.loss[np.isfinite(halved.loss)],
        whole.loss[np.isfinite(halved.loss)],
        rtol=1e-5,
    )
    for at in range(3):  # those that went on were ahead
        went = halved.validation[at, seen[at + 1]]
        stopped = halved.validation[at, seen[at] & ~seen[at + 1]]
        assert went.max() <= stopped.min()
    assert sweep.best_of(halved) == np.nanargmin(halved.validation[3])


def test_a_slot_that_has_stopped_keeps_what_it_has(task):
    slots = sweep.begin(task, GRID[:2])
    step = sweep.compiled_step(task, task.adapter(GRID[0]))
    rows = task.parts["train"][:8].reshape(2, 4)
    mask = np.arange(sweep.WIDTH) < task.tokens.lengths[rows][..., None]
    batch = task.tokens.ids[rows], mask, task.labels[rows]
    slots = slots._replace(active=jnp.array([True, False]))
    before = jax.tree.map(np.array, slots)
    after, _ = step(task.params, slots, jnp.array([1e-2, 1e-2]), batch)
    for x, y in zip(
        jax.tree.leaves((before.trainable, before.opt_state)),
        jax.tree.leaves((after.trainable, after.opt_state)),
        strict=True,
    ):
        assert np.array_equal(x[1], y[1])
    moved = (
        after.trainable["head/kernel"].value[0]
        != before.trainable["head/kernel"].value[0]
    )
    assert moved.any()


@pytest.mark.parametrize(
    ("losses", "keep", "stops"),
    [
        ([3.0, 1.0, 2.0, 4.0], 0.5, [1, 0, 0, 1]),
        ([3.0, 1.0, 2.0, 4.0], 1.0, [0, 0, 0, 0]),
        ([3.0, 1.0, 2.0, 4.0], 0.01, [1, 0, 1, 1]),  # one always goes on
        ([np.nan, 1.0, np.inf], 1.0, [1, 0, 1]),
        ([np.nan, np.nan], 0.5, [1, 1]),  # but not one that is no number
        ([1.0, 1.0], 0.5, [0, 1]),
    ],
)
def test_which_runs_are_behind(losses, keep, stops):
    assert sweep.behind(np.array(losses), keep).tolist() == list(map(bool, stops))


def test_a_sweep_in_words_and_as_a_picture(task, tmp_path):
    slots, history = sweep.train(task, GRID, options(steps=4, evaluations=2, keep=0.5))
    text = sweep.table(GRID, slots, history, at=1)
    assert text.count("(") == 4 and "0.001          0.1" in text
    sweep.charts.sweep(GRID, history, sweep.best_of(history), tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").stat().st_size > 10_000


# ----------------------------------------------------------- several kinds of text

KINDS = {
    "letters": [f"{'abc'[i % 3] * 3}{'bca'[i % 3] * 2}" for i in range(60)],
    "digits": [f"{i % 5}{i % 3}0{i % 2}1" for i in range(60)],
    "signs": ["+-" * (2 + i % 3) + "*" for i in range(60)],
}
CONFIG = domains.Config(40, 2, 4.0, 3e-2, 2, 16, 0, 8, "", "")


@pytest.fixture(scope="module")
def corpora(tiny):  # noqa: F811
    held_out = np.arange(60) % 5 == 0
    return {
        name: domains.domain(texts, held_out, tiny, CONFIG)
        for name, texts in KINDS.items()
    }


def trained(tiny, corpora, folder, config=CONFIG):  # noqa: F811
    model = tiny.model(scanned=True)
    state, frozen = domains.begin(model, config, len(corpora), folder)
    bank, losses = domains.train(model, corpora, state, frozen, config, folder)
    return model, bank, losses


def test_each_kind_of_text_is_best_under_its_own(tiny, corpora, tmp_path):  # noqa: F811
    model, bank, losses = trained(tiny, corpora, tmp_path / "run")
    table = domains.perplexities(model, bank, corpora)
    assert table.shape == (4, 3)
    assert table.argmin(0).tolist() == [1, 2, 3], table
    for k, (name, x) in enumerate(corpora.items()):  # as each adapter alone has it
        tree = jlora.attach(model, jlora.pick(bank, k))
        found = []
        for batch in x.texts.batches(x.held_out):
            logits = jlora.lift(type(model).__call__)(tree, batch.ids, batch.segments)
            scores = jax.nn.log_softmax(logits)
            own = np.take_along_axis(np.asarray(scores), batch.targets[..., None], -1)
            found.append(own[..., 0][(batch.segments > 0) & (batch.targets != 0)])
        want = np.exp(-np.concatenate(found).mean())
        np.testing.assert_allclose(table[k + 1, k], want, rtol=1e-4, err_msg=name)
    path = tmp_path / "map.png"
    domains.charts.heat_map(table, ["none", *corpora], list(corpora), path)
    assert path.stat().st_size > 10_000
    assert f"{table[1, 0]:12.2f}" in domains.report(table, list(corpora))


def test_a_run_goes_on_from_there(tiny, corpora, tmp_path, monkeypatch):  # noqa: F811
    config = dataclasses.replace(CONFIG, steps=6)
    _, whole, losses = trained(tiny, corpora, tmp_path / "whole", config)

    class Asked:
        def is_set(self):
            return True

    class After:
        def __enter__(self):
            return Asked()

        def __exit__(self, *_):
            pass

    for _ in range(2):  # each process has one step, and is stopped
        with monkeypatch.context() as patch:
            patch.setattr(domains, "stop_requests", After)
            with pytest.raises(Stopped, match="saved step"):
                trained(tiny, corpora, tmp_path / "run", config)
    _, bank, again = trained(tiny, corpora, tmp_path / "run", config)
    np.testing.assert_array_equal(again, losses)
    jax.tree.map(np.testing.assert_array_equal, bank, whole)
    with pytest.raises(SystemExit, match="rank: 2 there, 3 asked for"):
        trained(tiny, corpora, tmp_path / "run", dataclasses.replace(config, rank=3))


# ---------------------------------------------------------------------------- serving


def adapters_of(model, count):
    """Adapters large enough to change what is said."""
    out = {}
    for k in range(count):
        tree = domains.wrapped(model, dataclasses.replace(CONFIG, rank=k % 2 + 1), k)
        keys = iter(jax.random.split(jax.random.key(k), 99))

        def filled(x, keys=keys):
            return dataclasses.replace(
                x, b=jax.random.normal(next(keys), x.b.shape) / 2
            )

        out[f"adapter {k}"] = {p: filled(x) for p, x in jlora.adapter(tree).items()}
    return out


def test_a_step_of_a_row_is_the_model(tiny):  # noqa: F811
    model = tiny.model(scanned=True)
    ids = np.random.default_rng(0).integers(0, SIZES.vocabulary, 9).astype(np.int32)
    want = jax.jit(domains.one_row)(model, ids, np.ones_like(ids))
    cache, step = decode.empty(model, 12), jax.jit(decode.step)
    for at, token in enumerate(ids):
        got, cache = step(model, cache, token, jnp.int32(at))
        np.testing.assert_allclose(got, want[at], atol=1e-5 * abs(want).max())


@pytest.mark.parametrize(("rows", "slots"), [(3, 2), (16, 2), (1, 1)])
def test_answers_are_those_of_each_adapter(
    tiny,  # noqa: F811
    rows,
    slots,
    monkeypatch,
):
    """Token by token, while slots are replaced and others decode."""
    traced, own = [], jlora.per_example

    def per_example(*args):
        traced.append(args)
        return own(*args)

    monkeypatch.setattr(jlora, "per_example", per_example)
    model = tiny.model(scanned=True)
    adapters = adapters_of(model, 5)
    blank = jlora.stack([adapters["adapter 1"]] * slots)
    server = serve.Server(model, serve.Slots(blank, adapters.get), rows, 14, end=0)
    rng = np.random.default_rng(0)
    names = [*adapters, None]
    requests = [
        serve.Request([0, *rng.integers(1, 99, 1 + k % 3).tolist()], names[k % 6], 10)
        for k in range(18)
    ]
    serve.serve(server, requests)
    different = 0
    for request in requests:
        own = model
        if request.adapter is not None:
            own = jlora.merge(jlora.attach(model, adapters[request.adapter]))
        want = serve.greedy(own, request, 14, end=0)
        assert request.said == want, request
        different += want != serve.greedy(model, request, 14, end=0)
    assert different >= 10  # of the fifteen that do not ask for the base
    assert server.slots.loaded > slots
    assert max(x.waited for x in requests) > 0
    assert len(traced) == 1, "a step was compiled anew"
    assert not any(server.slots.users.values())


def test_what_a_server_cannot_do(tiny):  # noqa: F811
    model = tiny.model(scanned=True)
    bank = jlora.stack(list(adapters_of(model, 1).values()))
    server = serve.Server(model, serve.Slots(bank, {}.get), 2, 8, end=0)
    with pytest.raises(
        ValueError, match="3 tokens of prompt and 6 new ones.*at most 8"
    ):
        server.ask(serve.Request([0, 1, 2], None, 6))
    with pytest.raises(ValueError, match="3 tokens of prompt and 0 new ones.*at least"):
        server.ask(serve.Request([0, 1, 2], None, 0))


def test_the_last_used_slot_stays(tiny):  # noqa: F811
    model = tiny.model(scanned=True)
    adapters = adapters_of(model, 4)
    bank = jlora.stack([adapters["adapter 1"]] * 2)
    slots = serve.Slots(bank, adapters.get)
    first, second = slots.take("adapter 0"), slots.take("adapter 1")
    assert slots.take("adapter 2") is None  # both are in use
    slots.leave("adapter 0")
    slots.leave("adapter 1")
    assert slots.take("adapter 0") == first  # it is still there
    slots.leave("adapter 0")
    assert slots.take("adapter 2") == second and slots.loaded == 3
    own = jlora.pick(slots.bank, second)["layers/q/kernel"].b
    want = adapters["adapter 2"]["layers/q/kernel"].b
    np.testing.assert_array_equal(own[:, : want.shape[1]], want)


def test_an_adapter_that_does_not_fit_leaves_the_slots(tiny):  # noqa: F811
    model = tiny.model(scanned=True)
    adapters = adapters_of(model, 2)
    higher = jlora.wrap(model, rank=64, targets="layers/q/kernel")
    adapters["higher"] = jlora.adapter(higher)
    bank = jlora.stack([adapters["adapter 0"], adapters["adapter 1"]])
    slots = serve.Slots(bank, adapters.get)
    for _ in range(2):
        with pytest.raises(ValueError, match="put: .*a rank of at most"):
            slots.take("higher")
    assert {slots.take("adapter 0"), slots.take("adapter 1")} == {0, 1}
    slots.leave("adapter 0")
    with pytest.raises(ValueError, match="put: .*a rank of at most"):
        slots.take("higher")
    assert slots.take("adapter 0") in (0, 1) and slots.loaded == 2


def test_throughput_in_numbers_and_as_a_picture(tiny, tmp_path):  # noqa: F811
    model = tiny.model(scanned=True)
    adapters = list(adapters_of(model, 2).values())
    found = serve.measured(model, adapters, rows=4, steps=2)
    assert [row["distinct"] for row in found] == [1, 2]
    assert [row["product"] for row in found] == ["joined", "gathered"]
    assert all(row[k] > 0 for row in found for k in ("base", "mixed", "apart"))
    serve.charts.throughput(found, 4, tmp_path / "throughput.png")
    assert (tmp_path / "throughput.png").stat().st_size > 10_000
