"""PEFT's files: names by hand, portable files, and what people meet with real ones."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import peft_torch
import pytest
from helpers import close, normal, randomise, says
from jax import lax
from safetensors.numpy import load_file, save_file
from test_peft_files import known, same

import jlora
import jlora.peft
from jlora.peft.files import tensors as tensors_of
from jlora.peft.names import cut, matrix


def by_path(tree):
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys): x
        for keys, x in pairs
    }


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tree_of(**options):
    """A small adapted tree: a dense layer, heads in a stack, a table, a fused one."""
    params = {
        "fc": {"kernel": normal(6, 8), "bias": normal(8)},
        "emb": {"embedding": normal(13, 6)},
        "layers": {"q": {"kernel": normal(3, 6, 2, 4)}},
        "qkv": {"kernel": normal(6, 12)},
    }

    def fn(p, ids):
        h = p["emb"]["embedding"][ids]

        def layer(h, w):
            return h + jnp.einsum("td,dhk->thk", h, w).sum((1, 2))[:, None], None

        h, _ = lax.scan(layer, h, p["layers"]["q"]["kernel"])
        return h @ p["fc"]["kernel"] + p["fc"]["bias"], h @ p["qkv"]["kernel"]

    ids = jnp.arange(5)
    targets = ["**/kernel", "**/embedding"]
    plan = jlora.plan(fn, params, ids, targets=targets, rank=3, alpha=6)
    return params, fn, ids, randomise(jlora.wrap(params, plan=plan, **options))


BY_HAND = {
    "mapping": {
        "fc/kernel": "head",
        "emb/embedding": "words",
        "layers/q/kernel": "layers.{}.q",
        "qkv/kernel": ["a.q", "a.k", "a.v"],
    },
    "sizes": {
        "fc/kernel": "head.weight",
        "emb/embedding": "words",
        "layers/q/kernel": "layers.{}.q",
        "qkv/kernel": {"a.q": 6, "a.k": 3, "a.v": 3},
    },
    "pairs": [
        (r"layers/(\w+)/kernel", r"layers.{}.\1"),
        (r"(\w+)/(kernel|embedding)", r"m.\1"),
    ],
    "function": lambda p: (
        None if "bias" in p else p.replace("layers/q", "layers.{}.q").replace("/", "_")
    ),
}


@pytest.mark.parametrize("how", BY_HAND)
def test_names_by_hand(how, tmp_path):
    params, fn, ids, tree = tree_of()
    jlora.peft.save(tmp_path / "a", tree, names=BY_HAND[how])
    same(jlora.peft.load(tmp_path / "a", params), tree)
    same(jlora.peft.load(tmp_path / "a", params, names=BY_HAND[how]), tree)
    file = load_file(tmp_path / "a" / WEIGHTS)
    assert all(re.match(r"base_model\.model\.", key) for key in file)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["peft_type"] == "LORA"


def test_names_are_stored_and_mended_by_hand(tmp_path):
    params, args, plan, names = known("llama", "gemma")
    names.save(tmp_path / "n.json")
    back = jlora.peft.Names.load(tmp_path / "n.json")
    assert back.found == names.found and back.base == names.base
    assert str(back) == str(names)
    one = {"embed/embedding": "other.table"}
    mended = names | one
    assert "embed/embedding" not in mended.found and mended.said == one
    assert "by hand" in str(mended)
    renamed = names.renamed([("^model", "language_model.model")])
    assert renamed["norm/scale"][0].tensor == "language_model.model.norm.weight"
    assert (one_ := names | renamed)["norm/scale"] == renamed["norm/scale"], one_


# ---------------------------------------------------------------------------- portable


@pytest.mark.parametrize("layout", ["plain", "heads", "gemma"])
def test_portable(layout, tmp_path):
    """One rank, a scale of one, suffixes, and nothing that a server may ignore."""
    params, args, _, names = known("llama", layout)
    fn = peft_models.FUNCTIONS["llama"]
    rules = [jlora.Rule("layers/**/q*/**", rank=3, alpha=12)]
    rules += [jlora.Rule("layers/**/*down*/*", rank=5, rslora=True)]
    plan = jlora.plan(fn, params, *args, rules=rules, targets="layers/**/q*/**")
    tree = randomise(jlora.wrap(params, plan=plan))
    jlora.peft.save(tmp_path / "a", tree, names=names, portable=True)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["use_rslora"] is False and config["bias"] == "none"
    # q, k and v are one weight in servers: all three are there, some as zeros.
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
    file = load_file(tmp_path / "a" / WEIGHTS)
    assert len(file) == 2 * 4 * 3
    for server in ("vllm", "sglang", "tensorrt-llm"):
        report = jlora.peft.check(tmp_path / "a", server)
        assert report.ok and not len(report), report
    (finding,) = jlora.peft.check(tmp_path / "a", "transformers")
    assert finding.level == "needs" and "base_model_name_or_path" in finding.found
    again = jlora.peft.load(tmp_path / "a", params)
    close(jlora.lift(fn)(again, *args), jlora.lift(fn)(tree, *args), 1e-5)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"dora": True}, ["portable", "magnitude", "jlora.extract"]),
        ({"lora_bias": True}, ["portable", "output bias", "jlora.extract"]),
        ({"bias": "all"}, ["portable", "trains besides factors", "merge"]),
        ({}, ["portable", "is no Linear", "jlora.peft.check"]),
    ],
)
def test_what_is_not_portable(options, parts, tmp_path):
    params, fn, ids, tree = tree_of(**options)
    names = BY_HAND["mapping"]
    with pytest.raises(ValueError) as error:
        jlora.peft.save(tmp_path / "a", tree, names=names, portable=True)
    says(error, *parts)
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------- from the trenches


def fused():
    """A checkpoint with q, k and v, and a model in which they are one weight."""
    q, k, v = (normal(n, 6, seed=n + i) for i, n in enumerate((8, 4, 4)))
    sd = {f"attn.{n}_proj.weight": x for n, x in zip("qkv", (q, k, v), strict=True)}
    params = {"qkv": {"kernel": jnp.concatenate([q, k, v]).T}}
    return sd, params


def written(where, tensors, **config):
    """An adapter's directory, as peft writes it."""
    where.mkdir(parents=True)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": None}
    (where / CONFIG).write_text(json.dumps(said | config))
    own = {
        key if key.startswith("base") else f"base_model.model.{key}": np.asarray(x)
        for key, x in tensors.items()
    }
    save_file(own, where / WEIGHTS)
    return where


def pair(name, out, in_, r=2, seed=0):
    a, b = normal(r, in_, seed=seed), normal(out, r, seed=seed + 1)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def test_a_fused_weight_of_which_q_and_v_are_adapted(tmp_path):
    sd, params = fused()
    save_file({k: np.asarray(x) for k, x in sd.items()}, tmp_path / "m.safetensors")
    own = pair("attn.q_proj", 8, 6) | pair("attn.v_proj", 4, 6, seed=5)
    where = written(tmp_path / "a", own, target_modules=["q_proj", "v_proj"])
    names = jlora.peft.match(params, tmp_path / "m.safetensors")
    leaf = jlora.peft.load(where, params, names=names)["qkv"]["kernel"]
    assert leaf.rank == 4  # the ranks of q and v; k gets none
    delta = jlora.merge({"w": leaf})["w"] - params["qkv"]["kernel"]
    parts = {
        n: own[f"attn.{n}_proj.lora_B.weight"] @ own[f"attn.{n}_proj.lora_A.weight"]
        for n in "qv"
    }
    want = jnp.concatenate([2 * parts["q"], jnp.zeros((4, 6)), 2 * parts["v"]]).T
    close(delta, want, 1e-5)
    # Written again, q and v get their own ranks back, to the byte; and k gets none.
    jlora.peft.save(tmp_path / "b", {"qkv": {"kernel": leaf}}, names=names)
    file = load_file(tmp_path / "b" / WEIGHTS)
    assert {k.removeprefix("base_model.model.") for k in file} == {*own}
    for key, x in own.items():
        np.testing.assert_array_equal(file[f"base_model.model.{key}"], x)


def test_a_fused_weight_that_was_trained_shares_a(tmp_path):
    sd, params = fused()
    save_file({k: np.asarray(x) for k, x in sd.items()}, tmp_path / "m.safetensors")
    names = jlora.peft.match(params, tmp_path / "m.safetensors")
    tree = randomise(jlora.wrap(params, rank=3, targets="**"))
    jlora.peft.save(tmp_path / "a", tree, names=names)
    file = load_file(tmp_path / "a" / WEIGHTS)
    a = [x for k, x in file.items() if "lora_A" in k]
    assert len(a) == 3 and all((x == a[0]).all() for x in a)
    same(jlora.peft.load(tmp_path / "a", params), tree)


def llama_adapter(tmp_path, prefix):
    """A copy of a fixture whose tensors have another prefix."""
    where = peft_torch.FIXTURES / "llama" / "all"
    shutil.copytree(where, tmp_path / "a")
    file = load_file(where / WEIGHTS)
    new = {
        k.replace("base_model.model.", f"base_model.model.{prefix}"): x
        for k, x in file.items()
    }
    save_file(new, tmp_path / "a" / WEIGHTS)
    return tmp_path / "a"


@pytest.mark.parametrize("prefix", ["language_model.", "a.b.", ""])
def test_an_adapter_of_a_checkpoint_with_a_prefix(prefix, tmp_path):
    params, args, _, names = known("llama", "heads")
    tree = jlora.peft.load(llama_adapter(tmp_path, prefix), params, names=names)
    want = jlora.peft.load(peft_torch.FIXTURES / "llama" / "all", params, names=names)
    same(tree, want)


def test_tied_embeddings(tmp_path):
    """An adapter of the table is one of the head, too, in a tied model."""
    params, args, plan, names = known("gpt2", "plain")
    fn = peft_models.FUNCTIONS["gpt2"]
    assert names.heads == {"wte/embedding": ""}
    plan = jlora.plan(fn, params, *args, targets="wte/embedding", rank=3)
    tree = randomise(jlora.wrap(params, plan=plan))
    with pytest.raises(ValueError) as error:
        jlora.peft.save(tmp_path / "a", tree, names=names)
    says(error, "'wte/embedding'", "tied", "head='lm_head'")
    jlora.peft.save(tmp_path / "a", tree, names=names, head="lm_head")
    file = load_file(tmp_path / "a" / WEIGHTS)
    assert len(file) == 4
    same(jlora.peft.load(tmp_path / "a", params), tree)
    # One that peft made for lookups alone is another model's.
    lookups = {k: x for k, x in file.items() if "lm_head" not in k}
    save_file(lookups, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError) as error:
        jlora.peft.load(tmp_path / "a", params)
    says(error, "in lookups only", "(tied)")


def test_targets_that_are_a_pattern(tmp_path):
    """``target_modules`` may be a pattern: the tensors say what is adapted."""
    params, _, _, names = known("llama", "plain")
    where = peft_torch.FIXTURES / "llama" / "qv"
    said = json.loads((where / CONFIG).read_text())
    assert said["target_modules"] == r".*\.(q|v)_proj"
    tree = jlora.peft.load(where, params, names=names)
    assert {p.split("/")[-2] for p in jlora.adapter(tree)} == {*"qv"}


def test_biases_all(tmp_path):
    params, _, _, names = known("bert", "heads")
    where = peft_torch.FIXTURES / "bert" / "bias-all"
    own = jlora.adapter(jlora.peft.load(where, params, names=names))
    biases = [p for p in own if isinstance(own[p], jlora.Full)]
    assert len(biases) == 9, biases  # every bias of the model, in stacks
    assert own["layers/attention/q/bias"].value.shape == (2, 4, 4)


def test_embeddings_resized_by_added_tokens(tmp_path):
    """The file has a larger table than params: params have to get the tokens first."""
    params, args, _, names = known("llama", "plain")
    table = normal(43, 16)
    own = pair("model.layers.0.self_attn.q_proj", 16, 16)
    own["model.embed_tokens.weight"] = table
    where = written(
        tmp_path / "a", own, target_modules=["q_proj"], layers_to_transform=[0]
    )
    with pytest.raises(ValueError) as error:
        jlora.peft.load(where, params, names=names)
    says(error, "'model.embed_tokens.weight'", "(43, 16)", "tokens were added")
    larger = jax.tree.map(lambda x: x, params)
    larger["embed"] = {
        "embedding": jnp.pad(params["embed"]["embedding"], ((0, 3), (0, 0)))
    }
    grown = dataclasses.replace(
        names | {"embed/embedding": "model.embed_tokens"},
        base={},
        tensors={k: v for k, v in names.tensors.items() if "embed" not in k},
    )
    with pytest.warns(UserWarning, match=r"'model\.embed_tokens\.weight', which"):
        tree = jlora.peft.load(where, larger, names=grown)
    leaf = tree["embed"]["embedding"]
    assert isinstance(leaf, jlora.Full)
    np.testing.assert_array_equal(leaf.value, table)


def test_a_table_that_peft_saved_unasked_is_not_trained(tmp_path):
    params, _, _, names = known("llama", "plain")
    where = peft_torch.FIXTURES / "llama" / "tables"
    tree = jlora.peft.load(where, params, names=names)
    assert isinstance(tree["embed"]["embedding"], jlora.LoRA)
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(ValueError) as error:
        jlora.peft.load(where, other, names=names)
    says(error, "table of other values", "the base is another one")


def test_a_grouped_convolution(tmp_path):
    """peft has ranks of their own for each group; one a for all of them is exact."""
    w = normal(3, 3, 2, 8)
    call = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x,
        p["conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    params, x = {"conv": {"kernel": w}}, normal(2, 5, 5, 8)
    save_file(
        {"conv.weight": np.asarray(w.transpose(3, 2, 0, 1)).copy()},
        tmp_path / "m.safetensors",
    )
    plan = jlora.plan(call, params, x, rank=3)
    names = jlora.peft.match(params, tmp_path / "m.safetensors", plan=plan)
    assert names["conv/kernel"][0].groups == 4
    tree = randomise(jlora.wrap(params, plan=plan))
    jlora.peft.save(tmp_path / "a", tree, names=names)
    file = load_file(tmp_path / "a" / WEIGHTS)
    shapes = {k.split(".")[-2]: x.shape for k, x in file.items()}
    assert shapes == {"lora_A": (12, 8, 3, 3), "lora_B": (8, 3, 1, 1)}
    same(jlora.peft.load(tmp_path / "a", params), tree)
    # torch: A reads all channels, B is grouped.  The delta is that of the kernel.
    a, b = (file[f"base_model.model.conv.lora_{n}.weight"] for n in "AB")
    h = lax.conv_general_dilated(x.transpose(0, 3, 1, 2), a, (1, 1), "SAME")
    y = lax.conv_general_dilated(h, b, (1, 1), "SAME", feature_group_count=4)
    scale = json.loads((tmp_path / "a" / CONFIG).read_text())["lora_alpha"] / 12
    want = call(params, x) + scale * y.transpose(0, 2, 3, 1)
    close(jlora.lift(call)(tree, x), want, 1e-5)
    dense = dict(file) | {"base_model.model.conv.lora_A.weight": np.ones_like(a)}
    save_file(dense, tmp_path / "a" / WEIGHTS)
    with pytest.raises(jlora.peft.FormatError) as error:
        jlora.peft.load(tmp_path / "a", params)
    says(error, "4 groups", "reads all channels")


def test_a_stack_of_which_some_layers_are_adapted(tmp_path):
    params, args, _, names = known("llama", "heads")
    where = peft_torch.FIXTURES / "llama" / "some-layers"
    leaf = jlora.peft.load(where, params, names=names)["layers"]["attention"]["q"][
        "kernel"
    ]
    assert not leaf.a[1].any() and not leaf.b[1].any() and leaf.a[0].any()


def test_on_a_mesh_the_factors_are_where_the_base_is(tmp_path):
    devices = np.array(jax.devices()[:2])
    mesh = jax.sharding.Mesh(devices, "x")
    P = jax.sharding.PartitionSpec
    params, fn, ids, tree = tree_of()
    jlora.peft.save(tmp_path / "a", tree, names=BY_HAND["mapping"])
    place = jax.sharding.NamedSharding(mesh, P(None, "x"))
    sharded = {**params, "fc": jax.tree.map(lambda x: x, params["fc"])}
    sharded["fc"]["kernel"] = jax.device_put(params["fc"]["kernel"], place)
    leaf = jlora.peft.load(tmp_path / "a", sharded)["fc"]["kernel"]
    if len(devices) > 1:
        assert leaf.b.sharding.spec == P(None, "x"), leaf.b.sharding
    same({"w": dataclasses.replace(leaf, w=None)}, {"w": tree["fc"]["kernel"]})


def test_dtypes(tmp_path):
    """The file's dtype is kept, unless another one is asked for."""
    params, fn, ids, _ = tree_of()
    plan = jlora.plan(fn, params, ids, rank=2)
    tree = randomise(jlora.wrap(params, plan=plan, dtype=jnp.bfloat16))
    names = {k: v for k, v in BY_HAND["mapping"].items() if "emb" not in k}
    jlora.peft.save(tmp_path / "a", tree, names=names)
    same(jlora.peft.load(tmp_path / "a", params), tree)
    wide = jlora.peft.load(tmp_path / "a", params, dtype=jnp.float32)
    assert wide["fc"]["kernel"].a.dtype == jnp.float32
    assert wide["fc"]["kernel"].scale.dtype == jnp.float32


# --------------------------------------------------------------------------- bad input


def test_what_save_refuses(tmp_path):
    params, fn, ids, tree = tree_of()
    names = BY_HAND["mapping"]
    (tmp_path / "there").mkdir()
    dropped = jlora.drop_base(jlora.fade(tree, 0.0))
    cases = [
        (tree, {"fc/kernel": "fc"}, {}, ["names have nothing for", "names |"]),
        (tree, {"fc/kernl": "fc"}, {}, ["which the tree has not", "near"]),
        (tree, 3, {}, ["names is a int", "match"]),
        (tree, [("(", "x")], {}, ["pairs of (regular expression"]),
        (tree, names | {"layers/q/kernel": "q"}, {}, ["1 times {}"]),
        (tree, names | {"qkv/kernel": {"q": 6, "k": 3}}, {}, ["[6, 3] columns"]),
        (tree, names | {"fc/kernel": 3}, {}, ["'fc/kernel'", "a module"]),
        (jlora.partition(tree)[0], names, {}, ["lacks", "combine"]),
        (params, names, {}, ["no adapted leaf"]),
        (tree, names, {"config": {"r": 3}}, ["'r'", "follow from"]),
        (dropped, names, {}, ["lost its base"]),
    ]
    with pytest.raises(FileExistsError, match="exists: expected a new directory"):
        jlora.peft.save(tmp_path / "there", tree, names=names)
    for own, given, options, parts in cases:
        with pytest.raises((ValueError, TypeError)) as error:
            jlora.peft.save(tmp_path / "new", own, names=given, **options)
        says(error, *parts)
        assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def moved(init):
    params = {"fc": {"kernel": normal(6, 8)}}
    return jlora.wrap(params, rank=2, init=init)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_moved_its_base_is_for_no_other(init, tmp_path):
    tree = moved(init)
    with pytest.raises(ValueError) as error:
        jlora.peft.save(tmp_path / "a", tree, names={"fc/kernel": "fc"})
    says(error, init, "jlora.mix([trained, start], [1, -1])", "own_base=True")
    start = jlora.adapter(tree)
    trained = randomise(tree)
    plain = jlora.mix([jlora.adapter(trained), start], [1, -1])
    jlora.peft.save(tmp_path / "a", plain, names={"fc/kernel": "fc"})
    options = {"names": {"fc/kernel": "fc"}, "own_base": True}
    jlora.peft.save(tmp_path / "b", trained, **options)
    again = jlora.peft.load(tmp_path / "b", jlora.unwrap(trained))
    got, want = (jlora.merge(x)["fc"]["kernel"] for x in (again, trained))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


LOADS = [
    ({"peft_type": "LOHA"}, ["peft_type is 'LOHA'"]),
    ({"peft_type": None}, ["peft_type is None"]),
    ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens", "not supported"]),
    ({"layer_replication": [[0, 1]]}, ["layer_replication", "not supported"]),
    ({"use_qalora": True}, ["use_qalora"]),
    ({"use_bdlora": {"a": 1}}, ["use_bdlora"]),
    ({"arrow_config": {"a": 1}}, ["arrow_config"]),
    ({"init_lora_weights": "pissa_niter_4"}, ["changes the base", "path_initial"]),
    ({"init_lora_weights": "olora"}, ["olora", "changes the base"]),
    ({"bias": "some"}, ["bias is 'some'"]),
    ({"r": 3}, ["rank 2", "expected 3 by the config"]),
    ({"r": 0}, ["r is 0", "positive integer"]),
    ({"r": True}, ["r is True"]),
    ({"lora_alpha": "4"}, ["lora_alpha is '4'", "a number"]),
    ({"lora_alpha": float("nan")}, ["lora_alpha is nan"]),
    ({"rank_pattern": {"(": 2}}, ["the pattern '('"]),
    ({"rank_pattern": {"(a+)+$": 2}}, ["repeats a group"]),
    ({"alpha_pattern": [1]}, ["alpha_pattern is [1]"]),
    ({"use_dora": True}, ["use_dora", "no magnitude"]),
    ({"use_dora": "yes"}, ["use_dora is 'yes'"]),
    ({"target_modules": 3}, ["target_modules is 3"]),
    ({"target_modules": ["fc", "other"]}, ["'other' is among target_modules"]),
]


@pytest.mark.parametrize("config, parts", LOADS, ids=lambda x: str(x)[:40])
def test_what_load_refuses_of_a_config(config, parts, tmp_path):
    where = written(tmp_path / "a", pair("fc", 8, 6), **config)
    params = {"fc": {"kernel": normal(6, 8)}, "other": {"kernel": normal(6, 8)}}
    names = {"fc/kernel": "fc", "other/kernel": "other"}
    with pytest.raises(ValueError) as error:
        jlora.peft.load(where, params, names=names)
    says(error, *parts)


TENSORS = [
    ({"fc.lora_B.weight": None}, ["'fc' has no lora_B"]),
    ({"fc.lora_B.weight": (8, 3)}, ["do not fit each other"]),
    ({"fc.lora_A.weight": (2, 7)}, ["of shape (6, 8) does not fit 'fc' (7, 8)"]),
    ({"gc.lora_A.weight": (2, 6), "gc.lora_B.weight": (8, 2)}, ["'gc.weight'", "near"]),
    ({"fc.lora_magnitude_vector": (8,)}, ["magnitude", "no use_dora"]),
    ({"fc.lora_C.weight": (2, 6)}, ["'base_model.model.fc.lora_C.weight'"]),
    ({"fc.lora_B.bias": (7,)}, ["bias of shape (7,)", "8 outputs"]),
    ({"e.token_adapter.trainable_tokens_delta": (2, 6)}, ["trainable_token_indices"]),
    ({"gc.bias": (8,)}, ["'gc.bias' has no array in names"]),
]


@pytest.mark.parametrize("change, parts", TENSORS, ids=lambda x: str(x)[:40])
def test_what_load_refuses_of_tensors(change, parts, tmp_path):
    own = pair("fc", 8, 6)
    for key, shape in change.items():
        own.pop(key, None)
        if shape is not None:
            own[key] = normal(*shape)
    where = written(tmp_path / "a", own, target_modules=["fc"])
    params = {"fc": {"kernel": normal(6, 8)}}
    with pytest.raises(ValueError) as error:
        jlora.peft.load(where, params, names={"fc/kernel": "fc"})
    says(error, *parts)


def test_what_does_not_fit_is_left_out_if_asked(tmp_path):
    own = pair("fc", 8, 6) | pair("gc", 8, 6)
    where = written(tmp_path / "a", own, target_modules=["fc"], new_key=3)
    params = {"fc": {"kernel": normal(6, 8)}}
    with pytest.warns(UserWarning) as warned:
        tree = jlora.peft.load(where, params, names={"fc/kernel": "fc"}, strict=False)
    assert list(jlora.adapter(tree)) == ["fc/kernel"]
    texts = [str(w.message) for w in warned]
    assert any("'gc.weight' has no weight" in t for t in texts)
    assert any("new_key" in t and "ignored" in t for t in texts)


def test_files_that_are_not_there(tmp_path):
    params = {"fc": {"kernel": normal(6, 8)}}
    names = {"fc/kernel": "fc"}
    with pytest.raises(FileNotFoundError, match="no directory"):
        jlora.peft.load(tmp_path / "none", params, names=names)
    where = written(tmp_path / "a", pair("fc", 8, 6))
    with pytest.raises(ValueError, match=r"jlora_names\.json.*expected names="):
        jlora.peft.load(where, params)
    (where / WEIGHTS).rename(where / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle, which is not read"):
        jlora.peft.load(where, params, names=names)
    with pytest.raises(FileNotFoundError, match=r"There is one in 'a'"):
        jlora.peft.load(tmp_path, params, names=names)
    with pytest.raises(ValueError, match=r"server 'vlm': expected one of vllm, sglang"):
        jlora.peft.check(where, "vlm")


def test_square_weights_of_unknown_roles_are_not_guessed(tmp_path):
    where = written(tmp_path / "a", pair("fc", 6, 6), target_modules=["fc"])
    params = {"fc": {"weight": normal(6, 6)}}
    names = {"fc/weight": "fc"}
    with pytest.raises(ValueError) as error:
        jlora.peft.load(where, params, names=names)
    says(error, "io or oi", "plan=jlora.plan(fn, params, *args)")
    fn = lambda p, x: x @ p["fc"]["weight"].T  # noqa: E731
    plan = jlora.plan(fn, params, normal(3, 6))
    leaf = jlora.peft.load(where, params, names=names, plan=plan)["fc"]["weight"]
    file = load_file(where / WEIGHTS)
    b, a = (file[f"base_model.model.fc.lora_{n}.weight"] for n in "BA")
    close(jlora.merge({"w": leaf})["w"], params["fc"]["weight"] + 2 * b @ a, 1e-5)


# ----------------------------------------------------------------------------- merging


@pytest.mark.parametrize("model, case", peft_torch.CASES)
def test_merged_files_are_what_merge_gives(model, case, tmp_path):
    """Of the model that `match` and `load` give; peft's own merge is compared, too."""
    layout = {"experts": "fused", "convolutions": "flax"}.get(model, "plain")
    params, _, _, names = known(model, layout)
    where = peft_torch.FIXTURES / model
    changed = jlora.peft.merge(
        where / "model.safetensors", where / case, tmp_path / "m.safetensors"
    )
    got = load_file(tmp_path / "m.safetensors")
    old = load_file(where / "model.safetensors")
    tree = jlora.peft.load(where / case, params, names=names)
    leaves = {p: x for p, x in jlora.adapter(tree).items()}
    merged = by_path(jlora.merge(tree))
    for path in leaves:
        for part in names[path]:
            x = part.take(got[part.tensor])
            y = np.asarray(merged[path])
            mine = cut(matrix(y, part.axes, part.at), part.rows, part.columns)
            close(jnp.asarray(x), jnp.asarray(mine), 3e-7, path)
    for name, x in old.items():
        if name not in changed:
            np.testing.assert_array_equal(got[name], x)


def test_merge_keeps_shards_index_and_metadata(tmp_path):
    old = load_file(peft_torch.FIXTURES / "llama" / "model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    shards = {f"model-{k}-of-2.safetensors": {} for k in (1, 2)}
    for k, (name, x) in enumerate(old.items()):
        shards[[*shards][k % 2]][name] = x.astype(jnp.bfloat16)
    for file, own in shards.items():
        save_file(own, base / file, metadata={"format": "pt", "made": file})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {n: f for f, o in shards.items() for n in o},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"no")
    seen = []
    jlora.peft.merge(
        base, peft_torch.FIXTURES / "llama" / "all", tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", *shards, "model.safetensors.index.json"
    ]  # fmt: skip
    assert seen[-1][0] == seen[-1][1]
    tensors = tensors_of(tmp_path / "out")
    assert {m["made"] for m in tensors.metadata.values()} == {*shards}
    exact = tmp_path / "exact.safetensors"
    wide = {n: x.astype(np.float32) for o in shards.values() for n, x in o.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    jlora.peft.merge(
        tmp_path / "wide.safetensors", peft_torch.FIXTURES / "llama" / "all", exact
    )
    for name, x in load_file(exact).items():  # rounded once
        np.testing.assert_array_equal(tensors.read(name), x.astype(jnp.bfloat16))
    with pytest.raises(FileExistsError):
        jlora.peft.merge(base, peft_torch.FIXTURES / "llama" / "all", tmp_path / "out")
    with pytest.raises(ValueError, match="which the base has not"):
        jlora.peft.merge(base, peft_torch.FIXTURES / "bert" / "plain", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
