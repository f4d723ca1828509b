"""The port gives the pretrained model's numbers, and a stopped run loses nothing."""

import dataclasses
import functools
import os
import signal

import encoder
import jax
import numpy as np
import pytest
import sentences
import training
from sentences import Tokens, pretrained, read_tsv

import jlora
import jlora.peft

WIDTHS = [16, 64]


@pytest.fixture(scope="module")
def snapshot():
    return pretrained()


@pytest.fixture(scope="module")
def loaded(snapshot):
    """The pretrained classifier and its params."""
    return encoder.load(snapshot, 2, jax.random.key(0))


def test_sentence_embeddings_are_minilms(snapshot, loaded):
    texts = [
        "A man is eating food.",
        "Someone is having a meal.",
        "The stock market fell sharply.",
    ]
    model, params = loaded
    ids, mask = Tokens.encode(texts, snapshot, WIDTHS).batch(np.arange(3))
    x = model.apply({"params": params}, ids, mask, method="embed")
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(x[0] @ x[1:].T, [0.6888, -0.0044], atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_are_found_by_the_values(snapshot, loaded, dtype):
    """Every array of the encoder is a tensor of its file; the new head is none."""
    model, params = loaded
    params = {"params": jax.tree.map(lambda x: x.astype(dtype), params)}
    ids, mask = np.zeros((1, 8), int), np.ones((1, 8), bool)
    plan = jlora.plan(model.apply, params, ids, mask, targets="**")
    names = jlora.peft.match(params, snapshot / "model.safetensors", plan=plan)
    assert {p.split("/")[1] for p in names.missing} == {"head"}, names
    query = names["params/encoder/layer_0/attention/query/kernel"]
    assert query[0].tensor == "encoder.layer.0.attention.self.query.weight"
    spare = {*names.tensors} - {p.tensor for own in names.values() for p in own}
    pooler = {"pooler.dense.bias", "pooler.dense.weight"}
    assert spare == {"embeddings.position_ids"} | pooler


@pytest.fixture(scope="module")
def wrapped(snapshot, loaded):
    """The pretrained classifier, its params, the demo's adapted tree, and inputs."""
    model, params = loaded
    tokens = Tokens.encode(["A fine film.", "Not very good."], snapshot, WIDTHS)
    return model, params, training.wrap(params, CONFIG), tokens.batch(np.arange(2))


def test_wrapping_changes_no_bit_of_the_model(wrapped):
    """Of its first two layers: without jit each takes seconds."""
    whole, params, _, inputs = wrapped
    model = whole.clone(encoder=whole.encoder.clone(layers=2))
    layers = {k: v for k, v in params["encoder"].items() if k[:6] != "layer_"}
    layers |= {name: params["encoder"][name] for name in ("layer_0", "layer_1")}
    params = {**params, "encoder": layers}
    tree = training.wrap(params, CONFIG)
    same = jax.tree.map(lambda x, y: x is y, jlora.unwrap(tree), params)
    assert jax.tree.all(same)

    def plain(params):
        return model.apply({"params": params}, *inputs)

    lifted = jlora.lift(plain)
    with jax.disable_jit():
        np.testing.assert_array_equal(lifted(tree), plain(params))
    unfused = {"xla_disable_hlo_passes": "fusion"}
    np.testing.assert_array_equal(
        jax.jit(lifted, compiler_options=unfused)(tree),
        jax.jit(plain, compiler_options=unfused)(params),
    )
    # Any added operation moves XLA's fusions, which round elsewhere.
    fused = jax.jit(lifted)(tree)
    np.testing.assert_allclose(fused, jax.jit(plain)(params), rtol=1e-5, atol=1e-6)


def test_lifted_is_the_merged_model(wrapped):
    model, _, tree, inputs = wrapped
    rng = np.random.default_rng(0)

    def learnt(x):  # a delta that is seen: b starts at zero
        if not isinstance(x, jlora.LoRA):
            return x
        return dataclasses.replace(x, b=rng.normal(0, 0.05, x.b.shape).astype("f4"))

    tree = jax.tree.map(learnt, tree, is_leaf=jlora.is_adapted)

    @jax.jit
    def apply(params):
        return model.apply({"params": params}, *inputs)

    got, want = jlora.lift(apply)(tree), apply(jlora.merge(tree))
    assert abs(want - apply(jlora.unwrap(tree))).max() > 0.01
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_padding_changes_nothing(snapshot, loaded):
    model, params = loaded
    tokens = Tokens.encode(["Short.", "Rather longer. " * 9], snapshot, WIDTHS)
    apply = jax.jit(model.apply)
    alone = apply({"params": params}, *tokens.batch(np.array([0])))
    padded = apply({"params": params}, *tokens.batch(np.array([0, 1])))
    np.testing.assert_allclose(padded[:1], alone, atol=1e-5)


def test_batches_hold_every_row_and_an_epoch_none_twice():
    lengths = np.random.default_rng(0).integers(1, 64, 101)
    tokens = Tokens(np.zeros((101, 64), np.int32), lengths, tuple(WIDTHS))
    rows = np.arange(1, 100)
    assert set(tokens.batches(rows, 8).flat) == set(rows)
    epoch = tokens.epoch(rows, 8, np.random.default_rng(1))
    assert epoch.shape == (12, 8)
    assert len(set(epoch.flat)) == 96 and set(epoch.flat) <= set(rows)


def test_split_goes_by_the_sentence(tmp_path):
    file = tmp_path / "mine.tsv"
    lines = [f"{'ab'[i % 2]}\tsentence {i % 900}" for i in range(1800)]
    file.write_text("\n".join(lines) + "\n\n")
    data = read_tsv(file)
    assert data.classes == ("a", "b") and len(data.texts) == 1800
    parts = [{data.texts[i] for i in rows} for rows in data.split().values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 900


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param("good\tfine\nno tab here\n", r"mine.tsv:2: expected", id="tab"),
        pytest.param("good\tfine\n", "at least 2 labels and 32", id="few"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    file = tmp_path / "mine.tsv"
    file.write_text(content)
    with pytest.raises(SystemExit, match=message):
        read_tsv(file)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no config.json: expected a BERT"):
        sentences.snapshot(tmp_path)


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))
    (tmp_path / sentences.VADER.file).write_text("not the archive")
    with pytest.raises(SystemExit, match=r"its sha256 is .* Delete the file"):
        sentences.movie_reviews()


TINY = encoder.Encoder(
    vocabulary=50,
    positions=8,
    segments=1,
    features=16,
    layers=1,
    heads=2,
    ffn=32,
    eps=1e-12,
)
CONFIG = training.Config(
    seed=0,
    rank=2,
    alpha=4.0,
    learning_rate=1e-2,
    head_learning_rate=1e-2,
    batch=8,
    epochs=2,
    widths=[8],
    limit=None,
    classes=["a", "b"],
    weights="",
    data="",
)


@functools.cache
def tiny_model():
    """Its init and its lifted apply: all runs share what is compiled of them."""
    model = encoder.Classifier(TINY, 2)
    return jax.jit(model.init), jax.jit(jlora.lift(model.apply))


def tiny_run(folder, config=CONFIG):
    """Trains for 12 steps on noise, in `folder`."""
    rng = np.random.default_rng(0)
    tokens = Tokens(rng.integers(1, 50, (80, 8)), np.full(80, 8), (8,))
    init, apply = tiny_model()
    params = init(jax.random.key(0), *tokens.batch(np.arange(8)))["params"]
    parts = {"train": np.arange(48), "validation": np.arange(48, 80)}
    labels = rng.integers(0, 2, 80)
    return training.train(apply, params, tokens, labels, parts, config, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    return tiny_run(tmp_path_factory.mktemp("run") / "whole")


def assert_same(run, other):
    assert not np.isnan(run.history["loss"]).any()
    for ours, theirs in ((run.tree, other.tree), (run.history, other.history)):
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def interrupt(monkeypatch, step, action):
    """Does `action` at the start of the training step number `step`."""
    train_step, calls = training.train_step, []

    def step_with_action(*args):
        calls.append(1)
        if len(calls) == step:
            action()
        return train_step(*args)

    monkeypatch.setattr(training, "train_step", step_with_action)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_to_the_bit(tmp_path, monkeypatch, whole, number):
    with monkeypatch.context() as patch:
        interrupt(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(training.Stopped, match="saved step 5 of 12"):
            tiny_run(tmp_path)
    assert_same(tiny_run(tmp_path), whole)


def test_a_killed_run_resumes_from_the_last_checkpoint(tmp_path, monkeypatch, whole):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    with monkeypatch.context() as patch:
        interrupt(patch, 8, kill)
        with pytest.raises(Killed):
            tiny_run(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["6"]
    assert_same(tiny_run(tmp_path), whole)


def test_a_run_with_other_settings_is_refused(tmp_path):
    tiny_run(tmp_path)
    other = dataclasses.replace(CONFIG, rank=3)
    with pytest.raises(SystemExit, match="rank: 2 there, 3 asked for"):
        tiny_run(tmp_path, other)
