"""The benchmarks measure what they say: their model, their ways, their tables."""

import dataclasses
import importlib.util
import pathlib
import re

import decoder
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import quantized_cost
import tables
import tpu_aot

SHAPE = decoder.Shape(d=32, ffn=48, vocab=64, heads=4, kv_heads=2, layers=1)


@pytest.fixture(scope="module")
def ways():
    model = decoder.Decoder(SHAPE, jnp.float32, "xla")
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), "int32")))
    return peers.ways(model, params), params


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 17)), "int32")


@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
def test_all_ways_compute_one_loss_and_train(ways):
    steps = {
        name: peers.stepping(jax.jit(way.fn, donate_argnums=0), way, IDS)
        for name, way in ways[0].items()
    }
    first = {name: float(step()) for name, step in steps.items()}
    np.testing.assert_allclose(list(first.values()), first["floor"], rtol=1e-6)
    for name, step in steps.items():
        for _ in range(9):
            last = float(step())
        assert name == "floor" or last < first[name] - 1e-4, name


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="no torch")
def test_the_model_in_torch_is_the_same(ways):
    import torch

    theirs = decoder.in_torch(SHAPE, ways[1](), "cpu", jnp.float32)
    want = theirs(torch.from_numpy(np.array(IDS, np.int64))).item()
    way = ways[0]["floor"]
    _, loss = jax.jit(way.fn)(way.state(), way.rest(), IDS)
    np.testing.assert_allclose(float(loss), want, rtol=1e-6)


def test_what_is_claimed():
    """Each claim is one that a run can fail."""

    def cost(n, seconds=()):
        return peers.Cost(n, n, n, n, 1.0, 1.0, list(seconds))

    sizes = {"floor": 100, "jlora": 110, "dora": 111, "merged": 200, "full": 200}
    sizes |= {"qwix": 110, "torch": 50, "peft": 60, "peft dora": 66}
    costs = {name: cost(n, [n / 1000]) for name, n in sizes.items()}
    said = peers.judged(costs, own=10)
    assert len(said) == 9 and "1.0000 (at most 1.005)" in said[0]
    _, _, *rows = peers.table(costs).splitlines()
    assert [row.split(" | ")[-1] for row in (rows[0], rows[7])] == [
        "100.0 |",
        "60.0 (1.200) |",
    ]
    for name, worse in (
        ("FLOPs, of the floor", {"floor": cost(90, [0.1])}),
        ("FLOPs, of those of W", {"merged": cost(115, [0.2])}),
        ("FLOPs of DoRA", {"dora": cost(112, [0.111])}),
        ("bytes", {"qwix": cost(109, [0.11])}),
        ("temporary", {"qwix": cost(109, [0.11])}),
        ("full fine-tuning", {"full": cost(200, [0.109])}),
        ("a step's time, of qwix", {"qwix": cost(110, [0.1])}),
        ("PEFT", {"peft": cost(60, [0.054])}),
        ("DoRA, of LoRA's, of the same", {"peft dora": cost(66, [0.06])}),
    ):
        with pytest.raises(AssertionError, match=f"what does not hold:(.|\n)*{name}"):
            peers.judged(costs | worse, own=10)
    # Where nobody counts FLOPs, nothing is claimed of them.
    uncounted = {k: dataclasses.replace(x, flops=None) for k, x in costs.items()}
    assert len(peers.judged(uncounted, own=10)) == 6


def test_a_section_replaces_the_one_of_its_title(tmp_path):
    path = tmp_path / "T.md"
    for section in ("## b\n\n1\n", "## a\n\n2\n", "## b\n\n3\n"):
        tables.record(path, "# head\n", section)
    assert path.read_text() == "# head\n\n## a\n\n2\n\n## b\n\n3\n"


@pytest.mark.parametrize(
    "shape, op, message",
    [
        ((16, 4096), "jvp()/x", "is forward"),
        ((16, 999_999), "", "not of the rank"),
        ((17, 4096), "", "not of the rank"),
        ((4, 128, 16), "jvp()/x", "11 sums of x·a"),
    ],
)
def test_what_a_pod_exchanges_is_explained(shape, op, message):
    def cost(*found):
        return tpu_aot.Cost(0, 0, 0.0, 0.0, list(found), 0.0)

    def reduced(shape, op):
        return hlo.Collective("all-reduce", "bf16", shape, op)

    floor = [hlo.Collective("all-reduce", "f32", ())]
    sums = [reduced((4, 128, 16), "transpose(jvp())/x")] * 9
    good = [*sums, reduced((16, 4096), ""), reduced((48, 7), "transpose(jvp())/x")]
    table, _, lacks = tpu_aot.explained(cost(*good), cost(*floor), 128, 2**20)
    assert ["all-reduce", "bf16[4,128,16]", "0.016", "", "", "9", ""] in [
        cells[:7] for cells in rows(table)
    ]
    assert lacks == "Of the floor's it lacks 1 all-reduce f32[]."
    worse = [reduced(shape, op)] * 2
    with pytest.raises(AssertionError, match=message):
        tpu_aot.explained(cost(*good, *worse), cost(*floor), 128, 2**20)


def rows(text):
    """The cells of a table's rows, without emphasis and without ratios."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    plain = [re.sub(r"\*\*| \([\d.]+\)", "", line) for line in lines]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in plain]


@pytest.mark.parametrize(
    "page, section, many",
    [
        pytest.param("README.md", "## What it costs", 5, id="readme"),
        pytest.param("docs/guides/costs.md", "## One training step", 7, id="guide"),
    ],
)
def test_the_readme_says_what_was_measured(page, section, many):
    """Each row ends with the name that it has in RESULTS.md."""
    readme = pathlib.Path(__file__).parents[1] / page
    said = readme.read_text(encoding="utf-8").split(section)[1]
    sections = re.split(r"(?m)^## ", peers.RESULTS.read_text("utf-8"))
    (measured,) = [text for text in sections if text.startswith("2 CPU cores:")]
    found = {name: cells for name, *cells in rows(measured)}
    head, *table = rows(said.split("\n## ")[0])
    assert len(table) == many
    for label, *cells in table:
        name = re.search(r"`(\w+)`$", label)[1]
        flops, accessed, temporary, _, _, _, seconds = found[name]
        assert cells == [flops, accessed, temporary, f"{float(seconds):.1f}"], name


@pytest.mark.parametrize("qtype", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["scanned", "chain"])
def test_a_step_keeps_no_dequantised_weight(name, qtype):
    """Temporaries beyond a bfloat16 base's: less than 1.2 weights, for any depth."""
    if name == "chain" and jax.__version_info__ < (0, 10, 1):
        pytest.skip("XLA for CPU merged the two dequantisations until jaxlib 0.10.1")
    fn = getattr(quantized_cost, name)
    made = {"scanned": quantized_cost.stacked, "chain": quantized_cost.squares}[name]
    x = jax.ShapeDtypeStruct((32, 256), jnp.float32)
    for layers in (4, 12):
        params = made(layers, 256)
        costs = {}
        for kind in ("bfloat16", qtype):
            halves = quantized_cost.halves(fn, params, x, kind)
            _, costs[kind] = quantized_cost.compiled(fn, *halves, x)
        quantized_cost.check_temporaries(costs, 1.2 * 2 * 256**2 / 1e6)
        rest = costs["bfloat16"].arguments - quantized_cost.base_bytes(params)
        share = (costs[qtype].arguments - rest) / quantized_cost.base_bytes(params)
        assert share <= quantized_cost.RESIDENT[qtype]
