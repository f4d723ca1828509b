"""PEFT's files, both ways, on models of transformers and torch laid out in JAX."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import peft_torch
import pytest
from helpers import close, randomise
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft

LAYOUTS = {m: [*own] for m, own in peft_models.LAYOUTS.items()}
CASES = [
    (model, layout, case)
    for model, case in peft_torch.CASES
    for layout in LAYOUTS[model]
]


@functools.cache
def checkpoint(model):
    return load_file(peft_torch.FIXTURES / model / "model.safetensors")


@functools.cache
def known(model, layout):
    """(params, args, plan, names) of a model in a layout."""
    params = peft_models.LAYOUTS[model][layout](checkpoint(model))
    params = jax.tree.map(jnp.asarray, params)
    args = [jnp.asarray(x) for x in peft_torch.inputs(model)]
    fn = peft_models.FUNCTIONS[model]
    plan = jlora.plan(fn, params, *args, targets="**", rank=4)
    file = peft_torch.FIXTURES / model / "model.safetensors"
    return params, args, plan, jlora.peft.match(params, file, plan=plan)


@pytest.mark.parametrize("model, layout", peft_models.MODELS)
def test_match_finds_everything(model, layout):
    params, args, plan, names = known(model, layout)
    assert not names.missing, names
    used = {p.tensor for parts in names.values() for p in parts}
    assert used == {*checkpoint(model)}, names


@pytest.mark.parametrize("file", ["bfloat16", "float32"])
@pytest.mark.parametrize("model, layout", peft_models.MODELS)
def test_match_in_bfloat16_on_either_side(model, layout, file, tmp_path):
    """The names are those of float32, whichever side was rounded."""
    params = "float32" if file == "bfloat16" else "bfloat16"
    own, _, plan, names = known(model, layout)
    tensors = {k: x.astype(jnp.dtype(file)) for k, x in checkpoint(model).items()}
    save_file(tensors, tmp_path / "m.safetensors")
    own = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(params), own)
    found = jlora.peft.match(own, tmp_path / "m.safetensors", plan=plan)
    assert not found.missing and found.found == names.found


@pytest.mark.parametrize("model, layout, case", CASES)
def test_torch_writes_jax_reads(model, layout, case):
    params, args, _, names = known(model, layout)
    where = peft_torch.FIXTURES / model
    tree = jlora.peft.load(where / case, params, names=names)
    want = load_file(where / f"{case}.outputs.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = jlora.lift(peft_models.FUNCTIONS[model])(tree, *args)
    for k, x in enumerate(got):
        close(x, jnp.asarray(want[str(k)]), 1e-5, f"output {k}")


def test_the_attention_of_torch_is_as_peft_computes_it(tmp_path):
    """peft adds the delta of its output projection twice; the file has half of it.

    That torch's outputs are met with such a file is in the tests above and below.
    """
    params, args, _, names = known("convolutions", "flax")
    fn = peft_models.FUNCTIONS["convolutions"]
    plan = jlora.plan(fn, params, *args, targets="attn/*/kernel", rank=4)
    tree = randomise(jlora.wrap(params, plan=plan), scale=False)
    jlora.peft.save(tmp_path / "a", tree, names=names)
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    found = file["base_model.model.attn.base_layer.out_proj.lora_B.weight"]
    np.testing.assert_array_equal(found, tree["attn"]["o"]["kernel"].b.T / 2)


# ------------------------------------------------------------------------- round trips


def same(x, y):
    """Two adapters are equal, bit for bit."""
    x, y = jlora.adapter(x), jlora.adapter(y)
    assert x.keys() == y.keys()
    for path in x:
        a, b = jax.tree.flatten(x[path]), jax.tree.flatten(y[path])
        assert a[1] == b[1], f"{path}: {x[path]} and {y[path]}"
        for u, v in zip(a[0], b[0], strict=True):
            assert u.dtype == v.dtype, path
            np.testing.assert_array_equal(u, v, err_msg=path)


def rewritten(model, layout, case, tmp_path):
    """The tensors and config of an adapter, and what jlora makes of them."""
    params, _, _, names = known(model, layout)
    where = peft_torch.FIXTURES / model / case
    tree = jlora.peft.load(where, params, names=names)
    jlora.peft.save(tmp_path / "new", tree, names=names)
    files = [
        load_file(d / "adapter_model.safetensors") for d in (where, tmp_path / "new")
    ]
    same(jlora.peft.load(tmp_path / "new", params), tree)
    return files


@pytest.mark.parametrize("model, layout, case", CASES)
def test_peft_to_jlora_to_peft(model, layout, case, tmp_path):
    old, new = rewritten(model, layout, case, tmp_path)
    if case == "tables":  # peft adds the tables of the base, unasked
        old = {k: x for k, x in old.items() if not k.endswith("base_layer.weight")}
    if (model, layout) not in peft_models.PLAIN:
        return
    assert old.keys() == new.keys()
    for key, x in old.items():
        assert x.dtype == new[key].dtype
        np.testing.assert_array_equal(x, new[key], err_msg=key)


OPTIONS = {
    "plain": {},
    "dora": {"dora": True},
    "lora-bias": {"lora_bias": True},
    "rslora": {"rslora": True},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize(
    "option, drawn", [*((option, True) for option in OPTIONS), ("plain", False)]
)
@pytest.mark.parametrize("model, layout", peft_models.MODELS)
def test_save_and_load_changes_no_bit(model, layout, option, drawn, tmp_path):
    params, args, _, names = known(model, layout)
    targets = [p for p in names if names[p][0].kind != "vector"]
    if option == "bias" and model in ("llama", "convolutions"):
        pytest.skip("it has no bias, or one that peft does not train")
    if option == "lora-bias":
        targets = [p for p in targets if names[p][0].kind != "embed"]
    if option in ("dora", "lora-bias"):
        targets = [p for p in targets if "experts" not in p and "attn" not in p]
    if option == "dora":
        targets = [p for p in targets if p not in names.heads]
    fn = peft_models.FUNCTIONS[model]
    plan = jlora.plan(fn, params, *args, targets=targets, rank=4, alpha=6)
    tree = jlora.wrap(params, plan=plan, **OPTIONS[option])
    tree = randomise(tree, scale=False) if drawn else tree
    if jlora.is_adapted(tree.get("wte", {}).get("embedding")) and layout == "split":
        # The table has rows of padding.
        leaf = tree["wte"]["embedding"]
        a = leaf.a.at[40:].set(0)
        tree["wte"]["embedding"] = dataclasses.replace(leaf, a=a)
    jlora.peft.save(tmp_path / "a", tree, names=names, head="lm_head")
    same(jlora.peft.load(tmp_path / "a", params), tree)


# ----------------------------------------------------------------- peft reads it again


@pytest.fixture(scope="module")
def peft():
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def read_by_peft(peft, model, where):
    """peft's model with an adapter; every tensor of the file has a place, and back."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    base = peft_torch.torch_model(model)
    config = peft.LoraConfig.from_pretrained(where)
    config.inference_mode = False
    own = peft.get_peft_model(base, config)
    result = set_peft_model_state_dict(own, load_peft_weights(where, device="cpu"))
    assert not result.unexpected_keys, result.unexpected_keys
    trained = {k for k, p in own.named_parameters() if p.requires_grad}
    assert not trained & {*result.missing_keys}, trained & {*result.missing_keys}
    return own.eval()


def agrees(peft, model, layout, tree, where):
    params, args, _, names = known(model, layout)
    jlora.peft.save(where, tree, names=names, head="lm_head")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = read_by_peft(peft, model, where)
        got = jlora.lift(peft_models.FUNCTIONS[model])(tree, *args)
    want = peft_torch.outputs(theirs, peft_torch.inputs(model))
    for k, (x, y) in enumerate(zip(got, want, strict=True)):
        close(x, jnp.asarray(y), 1e-5, f"output {k}")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model, layout", peft_models.MODELS)
def test_jax_writes_torch_reads(peft, model, layout, option, tmp_path):
    params, args, _, names = known(model, layout)
    if option == "bias" and model in ("llama", "convolutions"):
        pytest.skip("it has no bias, or one that peft does not train")
    targets = [p for p in names if names[p][0].kind != "vector"]
    if option in ("dora", "lora-bias"):  # peft has neither for these
        targets = [p for p in targets if "experts" not in p and "attn" not in p]
    if option == "lora-bias":
        targets = [p for p in targets if names[p][0].kind != "embed"]
    if option == "dora":
        targets = [p for p in targets if p not in names.heads]
    fn = peft_models.FUNCTIONS[model]
    plan = jlora.plan(fn, params, *args, targets=targets, rank=4, alpha=6)
    tree = randomise(jlora.wrap(params, plan=plan, **OPTIONS[option]))
    agrees(peft, model, layout, tree, tmp_path / "a")


@pytest.mark.parametrize("model, case", peft_torch.CASES)
def test_merged_files_are_those_of_peft(peft, model, case, tmp_path):
    """To one rounding: DoRA's norms are summed in another order, for one."""
    where = peft_torch.FIXTURES / model
    out = tmp_path / "m.safetensors"
    jlora.peft.merge(where / "model.safetensors", where / case, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_torch.adapted(model, case).merge_and_unload().state_dict()
    for name, x in load_file(out).items():
        close(jnp.asarray(x), jnp.asarray(np.asarray(theirs[name])), 2e-7, name)
