"""The counts that 3L was described with, of models as built; and a small run."""

import warnings

import bert_tiny
import fading
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vgg
from fading import Variant

import jlora


def test_bert_tiny():
    assert list(bert_tiny.counts().values()) == [
        4_385_920,
        4_386_178,
        167_168,
        165_120,
        142_592,
    ]
    params = jax.eval_shape(bert_tiny.init, jax.random.key(0))
    tree = bert_tiny.wrap(params)
    layer = {k: v for k, v in jlora.adapter(tree).items() if "/layer_0/" in k}
    low = [leaf for leaf in layer.values() if isinstance(leaf, jlora.LoRA)]
    assert sum(x.size for leaf in low for x in (leaf.a, leaf.b, leaf.c)) == 66_560
    # What is left once the base is dropped: the factors, and all that never faded.
    dropped = jlora.drop_base(tree, force=True)
    faded = 2 * (3 * 128 * 128 + 2 * 128 * 512)
    assert fading.deployed(dropped) == 4_386_178 - faded + 2 * 66_560


def test_vgg16():
    assert list(vgg.counts().values()) == [14_982_474, 2_290_656, 17_273_130, 1_209_312]


def test_the_network_of_vgg_runs_in_both_factorisations():
    model, x = vgg.VGG16(2), jnp.ones((2, 32, 32, 1))
    params = model.init(jax.random.key(0), x)["params"]

    def logits(params, x):
        return model.apply({"params": params}, x)

    unfused = {"xla_disable_hlo_passes": "fusion"}  # which rounds elsewhere
    want = jax.jit(logits, compiler_options=unfused)(params, x)

    for form, formed in ((None, "factored"), (vgg.Kernel(), "materialised")):
        tree = vgg.wrap(model, params, x, rank=2, form=form)
        got = jax.jit(jlora.lift(logits), compiler_options=unfused)(tree, x)
        np.testing.assert_allclose(got, want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = jlora.explain(logits, tree, x)
        assert {entry.status for entry in report} == {formed}
        assert len(report) == 13


@pytest.mark.parametrize("setting", ["decay", "compensate", "clear"])
def test_a_run_ends_without_its_base(setting, tmp_path):
    """On a problem that factors of this rank can solve."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 8)).astype(np.float32)
    labels = (x[:, :4].sum(1) > 0).astype(np.int32)

    def logits(params, x):
        h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
        return h @ params["down"]["kernel"] + params["down"]["bias"]

    key = jax.random.key(0)
    params = {
        "up": {"kernel": jax.random.normal(key, (8, 16)) / 3, "bias": jnp.zeros(16)},
        "down": {"kernel": jax.random.normal(key, (16, 2)) / 4, "bias": jnp.zeros(2)},
    }

    def batches(i):
        rows = np.random.default_rng(i).integers(512, size=64)
        return (x[rows],), labels[rows]

    def accuracy(predict, part):
        return float((predict(x).argmax(-1) == labels).mean())

    result = fading.train(
        logits,
        jlora.wrap(params, rank=4, lora_bias=True),
        Variant(setting, setting, 4, lora_bias=True),
        batches,
        160,
        accuracy,
        watch="up/kernel",
        learning_rate=2e-2,
    )
    assert result.accuracy > 0.9
    leaves = [x for x in jlora.adapter(result.tree).values()]
    assert all(isinstance(leaf.w, jlora.Dropped) for leaf in leaves)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert result.parameters == 8 * 4 + 4 * 16 + 16 + 16 * 4 + 4 * 2 + 2 + 16 + 2
    history = result.history
    assert history["factor"][0] == 1 and history["factor"][-1] == 0
    assert (history["noise"][-1] == 0) == (setting != "compensate")
    shrinks = history["spread"][-1] < 0.1 * history["spread"][0]
    assert shrinks == (setting != "compensate")

    with warnings.catch_warnings():  # matplotlib's own
        warnings.simplefilter("ignore", DeprecationWarning)
        import pictures

        pictures.draw([result], 0.9, "up/kernel", tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    text = fading.table([result], ("whole", 178, 0.9))
    assert f"| {setting} | 4 | {result.parameters:,} |" in text
