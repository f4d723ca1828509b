"""Corners of PEFT's files and of `match`, each against the dense weight."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, randomise, says
from jax import lax
from safetensors.numpy import load_file, save_file
from test_peft_cases import CONFIG, WEIGHTS, written
from test_peft_files import same

import jlora
import jlora.peft

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape, np.float32)


@pytest.fixture
def matched(tmp_path):
    """A function from a checkpoint and params to their names."""

    def match(tensors, params, **options):
        save_file(tensors, tmp_path / "m.safetensors")
        params = jax.tree.map(jnp.asarray, params)
        return params, jlora.peft.match(params, tmp_path / "m.safetensors", **options)

    return match


def factors(module, out, in_, rank=2):
    return {
        f"{module}.lora_A.weight": draw(rank, in_),
        f"{module}.lora_B.weight": draw(out, rank),
    }


def merged(tree):
    return jax.tree.map(np.asarray, jlora.merge(tree))


# -------------------------------------------------------------------------- save, load


@pytest.mark.parametrize("dora", [True, False])
def test_a_stack_of_which_some_layers_are_adapted(matched, tmp_path, dora):
    """The others stay as they are, with a magnitude or without."""
    w = [draw(4, 4) for _ in range(3)]
    params = {"l": {"q": {"kernel": np.stack([x.T for x in w])}}}

    def fn(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, p["l"]["q"]["kernel"])[0]

    plan = jlora.plan(fn, params, jnp.ones((2, 4)), rank=2)
    params, names = matched(
        {f"l.{k}.q.weight": x for k, x in enumerate(w)}, params, plan=plan
    )
    own = {}
    for k in (0, 2):
        own |= {
            f"l.{k}.q.lora_A.weight": draw(2, 4),
            f"l.{k}.q.lora_B.weight": draw(4, 2),
        }
        if dora:
            own[f"l.{k}.q.lora_magnitude_vector"] = np.abs(draw(4))
    where = written(
        tmp_path / "a",
        own,
        use_dora=dora,
        target_modules=["q"],
        layers_to_transform=[0, 2],
    )
    tree = jlora.peft.load(where, params, names=names)
    close(
        merged(tree)["l"]["q"]["kernel"][1], np.asarray(params["l"]["q"]["kernel"][1])
    )
    jlora.peft.save(tmp_path / "b", tree, names=names)
    same(jlora.peft.load(tmp_path / "b", params), tree)


@pytest.mark.parametrize("field, option", [("c", "lora_bias"), ("m", "dora")])
def test_what_trains_beside_the_factors_of_a_part_is_kept(
    matched, tmp_path, field, option
):
    q, k = draw(4, 6), draw(4, 6)
    params, names = matched(
        {"q.weight": q, "k.weight": k}, {"qk": {"kernel": np.concatenate([q, k]).T}}
    )
    tree = jlora.wrap(params, rank=2, **{option: True})
    leaf = tree["qk"]["kernel"]
    leaf = dataclasses.replace(
        leaf,
        b=leaf.b.at[:, :4].set(draw(2, 4)),
        **{field: getattr(leaf, field) + 1},
    )
    tree = {"qk": {"kernel": leaf}}
    jlora.peft.save(tmp_path / "a", tree, names=names)
    same(jlora.peft.load(tmp_path / "a", params), tree)


@pytest.mark.parametrize("off", ["q", "k", "qk"])
def test_parts_that_are_turned_off(matched, tmp_path, off):
    q, k = draw(4, 6), draw(4, 6)
    params, names = matched(
        {"q.weight": q, "k.weight": k}, {"qk": {"kernel": np.concatenate([q, k]).T}}
    )
    own = factors("q", 4, 6) | factors("k", 4, 6)
    where = written(
        tmp_path / "a",
        own,
        alpha_pattern=dict.fromkeys(off, 0),
        target_modules=["q", "k"],
    )
    tree = jlora.peft.load(where, params, names=names)
    deltas = [
        (0 if m in off else 2) * own[f"{m}.lora_B.weight"] @ own[f"{m}.lora_A.weight"]
        for m in "qk"
    ]
    want = np.asarray(params["qk"]["kernel"]) + np.concatenate(deltas).T
    close(merged(tree)["qk"]["kernel"], want.astype(np.float32))


@pytest.mark.parametrize("scales", [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0), (1.0, -3.0)])
def test_weights_of_one_tensor_with_scales_of_their_own(matched, tmp_path, scales):
    w = draw(8, 6)
    params, names = matched(
        {"qk.weight": w}, {"q": {"kernel": w[:4].T}, "k": {"kernel": w[4:].T}}
    )
    tree = randomise(jlora.wrap(params, rank=2))
    for name, s in zip("qk", scales, strict=True):
        own = dataclasses.replace(tree[name]["kernel"], scale=jnp.float32(s))
        tree[name] = {"kernel": own}
    jlora.peft.save(tmp_path / "a", tree, names=names)
    close(merged(jlora.peft.load(tmp_path / "a", params)), merged(tree))


@pytest.mark.filterwarnings("ignore:wrap. dtype")
def test_weights_of_one_tensor_in_other_dtypes(matched, tmp_path):
    w = draw(8, 6)
    params, names = matched(
        {"qk.weight": w}, {"q": {"kernel": w[:4].T}, "k": {"kernel": w[4:].T}}
    )
    tree = {
        n: randomise(jlora.wrap({n: params[n]}, rank=2, dtype=t))[n]
        for n, t in (("q", jnp.float16), ("k", jnp.bfloat16))
    }
    jlora.peft.save(tmp_path / "a", tree, names=names)
    close(merged(jlora.peft.load(tmp_path / "a", params)), merged(tree))


def test_a_weight_that_is_two_tensors_along_its_inputs(matched, tmp_path):
    x, y = draw(4, 3), draw(4, 5)
    params, names = matched(
        {"x.weight": x, "y.weight": y}, {"xy": {"kernel": np.concatenate([x, y], 1).T}}
    )
    tree = randomise(jlora.wrap(params, rank=2))
    jlora.peft.save(tmp_path / "a", tree, names=names)
    same(jlora.peft.load(tmp_path / "a", params), tree)
    for option in ("dora", "lora_bias"):  # each of the two would have all of it
        tree = randomise(jlora.wrap(params, rank=2, **{option: True}))
        with pytest.raises(ValueError, match="some of its inputs only"):
            jlora.peft.save(tmp_path / option, tree, names=names)


def test_two_weights_are_not_one_module(tmp_path):
    params = {
        "q": {"kernel": jnp.asarray(draw(6, 4))},
        "k": {"kernel": jnp.asarray(draw(6, 4))},
    }
    tree = randomise(jlora.wrap(params, rank=2))
    for names in (
        {"q/kernel": "attn", "k/kernel": "attn"},
        {"q/kernel": ["a", "a"], "k/kernel": "k"},
    ):
        with pytest.raises(ValueError, match="are both '(attn|a).weight'"):
            jlora.peft.save(tmp_path / "a", tree, names=names)


@pytest.mark.parametrize("head", [None, "lm_head"])
def test_a_head_that_the_checkpoint_ties_and_the_model_does_not(
    matched, tmp_path, head
):
    table = draw(11, 6)
    params = {"embed": {"embedding": table}, "head": {"kernel": table.T}}
    params, names = matched({"model.embed.weight": table}, params)
    assert {*names.heads} == {"head/kernel"}
    tree = randomise(jlora.wrap(params, rank=2, targets="head/*"))
    if head is None:
        with pytest.raises(ValueError) as error:
            jlora.peft.save(tmp_path / "a", tree, names=names)
        says(error, "'head/kernel'", "(tied)", "head='lm_head'")
        return
    jlora.peft.save(tmp_path / "a", tree, names=names, head=head)
    file = load_file(tmp_path / "a" / WEIGHTS)
    assert {k.split(".")[2] for k in file} == {"lm_head"}
    same(jlora.peft.load(tmp_path / "a", params), tree)
    same(jlora.peft.load(tmp_path / "a", params, names=names, head=head), tree)
    with pytest.raises(
        ValueError, match="if it is the head, which is tied: pass head="
    ):
        jlora.peft.load(tmp_path / "a", params, names=names)


def test_a_module_whose_path_ends_another_ones(matched, tmp_path):
    """peft takes a path for a suffix, so the targets are a pattern there."""
    a, b = draw(4, 6), draw(4, 6)
    params, names = matched(
        {"l.0.q.weight": a, "aux.l.0.q.weight": b},
        {"m": {"kernel": a.T}, "x": {"kernel": b.T}},
    )
    tree = randomise(jlora.wrap(params, rank=2, targets="m/**"))
    jlora.peft.save(tmp_path / "a", tree, names=names)
    same(jlora.peft.load(tmp_path / "a", params), tree)
    said = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert said["target_modules"] == r"l\.0\.q"


def test_hints_that_leave_ranks_out_are_not_believed(matched, tmp_path):
    x = draw(4, 6)
    params, names = matched({"x.weight": x}, {"x": {"kernel": x.T}})
    where = written(
        tmp_path / "a", {"x.lora_A.weight": draw(2, 6), "x.lora_B.weight": draw(4, 2)}
    )
    file = load_file(where / WEIGHTS)
    hint = json.dumps({"ranks": {"x.weight": [["x/kernel", [], [], 0, 1]]}})
    save_file(file, where / WEIGHTS, metadata={"jlora": hint})
    assert jlora.peft.load(where, params, names=names)["x"]["kernel"].rank == 2


def test_a_prefix_that_could_be_several_is_not_chosen(tmp_path):
    base = {f"{p}.l.q.weight": draw(4, 6) for p in ("audio", "text")}
    save_file(base, tmp_path / "m.safetensors")
    where = written(tmp_path / "a", factors("l.q", 4, 6), target_modules=["q"])
    with pytest.raises(ValueError, match=r"may be under any of 'audio', 'text'"):
        jlora.peft.merge(tmp_path / "m.safetensors", where, tmp_path / "o.safetensors")


def test_one_expert(matched, tmp_path):
    w = draw(1, 8, 4)
    call = lambda p, x: jnp.einsum("etd,edf->etf", x, p["e"])  # noqa: E731
    params = {"e": w.swapaxes(1, 2)}
    plan = jlora.plan(call, params, jnp.ones((1, 3, 4)), rank=2, targets="e")
    params, names = matched({"m.experts.w": w}, params, plan=plan)
    tree = randomise(jlora.wrap(params, plan=plan))
    jlora.peft.save(tmp_path / "a", tree, names=names)
    same(jlora.peft.load(tmp_path / "a", params), tree)
    jlora.peft.merge(
        tmp_path / "m.safetensors", tmp_path / "a", tmp_path / "o.safetensors"
    )
    found = load_file(tmp_path / "o.safetensors")["m.experts.w"].swapaxes(1, 2)
    close(found, merged(tree)["e"])


# ------------------------------------------------------------------------------- match


def test_padding_is_no_row_of_another_tensor(matched):
    w, e = draw(4, 8), draw(11, 6)
    e[0] = 0
    kernel = np.pad(w.T, ((0, 0), (0, 1)))
    _, names = matched(
        {"fc.weight": w, "emb.weight": e},
        {"fc": {"kernel": kernel}, "emb": {"embedding": e}},
    )
    (part,) = names["fc/kernel"]
    assert part.tensor == "fc.weight" and part.columns.whole(4)


def test_a_part_of_zeros_is_not_taken_for_padding(matched):
    a, b = draw(4, 6), np.zeros((4, 6), np.float32)
    _, names = matched(
        {"a.weight": a, "b.weight": b}, {"ab": {"kernel": np.concatenate([a, b]).T}}
    )
    says(names.missing["ab/kernel"], "4 of its lines are zero", "'b.weight'")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["equal", "zero"])
def test_equal_lines_follow_the_regular_order_of_the_others(matched, kind, axis):
    w = draw(16, 12)
    lines = w if axis == 0 else w.T
    lines[9] = lines[2] if kind == "equal" else 0
    lines[5] = lines[2] if kind == "equal" else 0
    order = np.arange(len(lines)).reshape(2, 2, -1).swapaxes(1, 2).reshape(-1)
    kernel = (w[order] if axis == 0 else w[:, order]).T
    _, names = matched({"q.weight": w}, {"q": {"kernel": kernel}})
    (part,) = names["q/kernel"]
    mine, theirs = (
        (part.columns, part.tensor_columns)
        if axis == 0
        else (part.rows, part.tensor_rows)
    )
    at = np.empty(len(order), int)
    at[mine.positions] = theirs.positions
    np.testing.assert_array_equal(at, order)


def test_equal_lines_in_no_regular_order_are_not_guessed(matched):
    w = draw(7, 6)
    w[4] = w[1]
    _, names = matched({"q.weight": w}, {"q": {"kernel": w[[3, 4, 0, 6, 1, 2, 5]].T}})
    says(names.missing["q/kernel"], "nothing tells their order")


def test_float16_params_of_a_bfloat16_checkpoint(matched):
    w = (draw(64, 256) * 0.02).astype(jnp.bfloat16)
    w[0, :8] = 1e-6  # below the normal numbers of float16
    _, names = matched({"q.weight": w}, {"q": {"kernel": w.T.astype(np.float16)}})
    assert names["q/kernel"][0].tensor == "q.weight"


def test_each_weight_is_compared_in_its_own_precision(matched):
    """A bfloat16 weight beside them does not make two float32 vectors one."""
    s1, s2 = (1 + draw(8) * 1e-4 for _ in "ab")
    w = draw(4, 6)
    half = {"w": {"kernel": w.T.astype(jnp.bfloat16)}}
    both = {"n1": {"scale": s1}, "n2": {"scale": s2}} | half
    _, names = matched({"n1.weight": s1, "n2.weight": s2, "w.weight": w}, both)
    assert not names.missing
    _, names = matched({"n1.weight": s1, "w.weight": w}, {"n1": {"scale": s2}} | half)
    says(names.missing["n1/scale"], "in no tensor")


@pytest.mark.parametrize(
    "shape", [(6, 1, 3), (5, 1, 3), (1, 4, 3), (1, 4, 3, 3), (4, 1, 1)]
)
def test_convolutions_that_read_in_several_ways(matched, shape):
    w = draw(*shape)
    kernel = w.transpose(*range(2, w.ndim), 1, 0)
    rule = jlora.Rule("c/kernel", axes="i" * (w.ndim - 1) + "o")
    plan = jlora.plan(
        lambda p, x: jnp.tensordot(x, p["c"]["kernel"], w.ndim - 1),
        {"c": {"kernel": kernel}},
        jnp.ones((2, *kernel.shape[:-1])),
        rules=[rule],
    )
    plan = jlora.Plan(
        {p: dataclasses.replace(s, kind="conv") for p, s in plan.specs.items()},
        plan.shapes,
    )
    _, names = matched({"c.weight": w}, {"c": {"kernel": kernel}}, plan=plan)
    (part,) = names["c/kernel"]
    np.testing.assert_array_equal(
        part.take(w), kernel.reshape(-1, kernel.shape[-1])[part.rows.positions]
    )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_symmetric_matrices_are_transposed(matched, n):
    w = draw(n, n)
    w = w + w.T
    _, names = matched({"s.weight": w}, {"s": {"kernel": w}})
    assert names["s/kernel"][0].tensor_axes == "oi"


def test_what_has_no_tensor_says_why(matched):
    w = draw(4, 6)
    params = {
        "a": {"kernel": np.zeros((6, 4), np.float32)},
        "b": {"kernel": draw(2, 6, 4)},
        "step": np.float32(3.0),
        "other": np.float32(4.0),
        "q": {"kernel": w.T},
    }
    _, names = matched({"q.weight": w, "s": np.asarray(3.0, np.float32)}, params)
    assert names["step"][0].tensor == "s" and names["q/kernel"]
    says(names.missing["a/kernel"], "all of it is zero")
    says(names.missing["other"], "in no tensor")
    says(names.missing["b/kernel"], "in no tensor", "pass plan=")


def test_an_adapter_is_no_base(tmp_path):
    where = written(
        tmp_path / "a", {"x.lora_A.weight": draw(2, 6), "x.lora_B.weight": draw(4, 2)}
    )
    params = {"x": {"kernel": draw(6, 4)}}
    with pytest.raises(ValueError, match="is an adapter: expected the base"):
        jlora.peft.match(params, where)
    with pytest.raises(TypeError, match="found a path first"):
        jlora.peft.match(str(where), params)
    with pytest.raises(TypeError, match="base is a int"):
        jlora.peft.match(params, 3)


# ---------------------------------------------------------------------- names, written


@pytest.mark.parametrize(
    "said, parts",
    [
        ("a{0}", ["'a{0}'", "the path of a module"]),
        ("a{x}", ["the path of a module"]),
        ("a{", ["the path of a module"]),
        ("", ["the path of a module"]),
        ("..", ["the path of a module"]),
        ("a b", ["the path of a module"]),
        ((), ["the path of a module"]),
        ({"a": "x"}, ["a positive number of columns", "'x'"]),
        ({"a": -1, "b": 5}, ["a positive number of columns", "-1"]),
        ({"a": 0, "b": 4}, ["a positive number of columns"]),
        ({"a": 3, "b": 3}, ["expected 4 in all"]),
    ],
)
def test_wrong_names(said, parts, tmp_path):
    params = {"fc": {"kernel": jnp.asarray(draw(6, 4))}}
    with pytest.raises(ValueError) as error:
        jlora.peft.save(
            tmp_path / "a", jlora.wrap(params, rank=2), names={"fc/kernel": said}
        )
    says(error, *parts)


def test_wrong_names_after_a_match(matched, tmp_path):
    w = draw(4, 6)
    params, names = matched({"fc.weight": w}, {"fc": {"kernel": w.T}})
    tree = jlora.wrap(params, rank=2)
    part = names["fc/kernel"][0]
    part = dataclasses.replace(part, columns=jlora.peft.Order.of([0, 1, 2, 9]))
    beyond = dataclasses.replace(names, base={}, found={"fc/kernel": (part,)})
    for given, parts in [
        (names | {"fc/kernl": "x"}, ["'fc/kernl'", "near paths: 'fc/kernel'"]),
        ([("(.*)/kernel", r"\2")], ["does not fit"]),
        (beyond, ["'fc/kernel'", "expected those of shape (6, 4)"]),
    ]:
        with pytest.raises(ValueError) as found:
            jlora.peft.save(tmp_path / "a", tree, names=given)
        says(found, *parts)
    for how in ([("(", "x")], "abc"):
        with pytest.raises(ValueError, match="Names.renamed"):
            names.renamed(how)
    with pytest.warns(UserWarning, match=r"'fcc.weight', which the checkpoint has not"):
        jlora.peft.save(tmp_path / "b", tree, names=names | {"fc/kernel": "fcc"})
    pairs = [("(.*)/kernel", lambda m: m[1].upper())]
    jlora.peft.save(tmp_path / "c", tree, names=pairs)
    assert "base_model.model.FC.lora_A.weight" in load_file(tmp_path / "c" / WEIGHTS)


def test_stacked_norms_by_hand(tmp_path):
    params = {"layers": {"n": {"scale": jnp.asarray(draw(3, 5))}}}
    tree = jlora.wrap(params, targets=[], train="**/scale")
    names = {"layers/n/scale": "model.layers.{}.norm"}
    jlora.peft.save(tmp_path / "a", tree, names=names)
    file = load_file(tmp_path / "a" / WEIGHTS)
    key = "base_model.model.model.layers.1.norm.weight"
    np.testing.assert_array_equal(file[key], params["layers"]["n"]["scale"][1])
    same(jlora.peft.load(tmp_path / "a", params, names=names), tree)


def test_places_that_cannot_be_written(tmp_path):
    params = {"fc": {"kernel": jnp.asarray(draw(6, 4))}}
    tree, names = jlora.wrap(params, rank=2), {"fc/kernel": "fc"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"peft\.save: .*file.a cannot be written"):
        jlora.peft.save(tmp_path / "file" / "a", tree, names=names)
    with pytest.raises(
        TypeError, match=r"peft\.save: expected the path of a directory"
    ):
        jlora.peft.save(tree, tmp_path / "a", names=names)
    with pytest.raises(
        TypeError, match=r"peft\.load: expected the path of a directory"
    ):
        jlora.peft.load(params, tmp_path / "a", names=names)
    for config in (3, {"x": object()}, {3: 4}):
        with pytest.raises(TypeError, match=r"peft\.save: config"):
            jlora.peft.save(tmp_path / "a", tree, names=names, config=config)
    with pytest.raises(ValueError, match="use_qalora"):
        jlora.peft.save(tmp_path / "a", tree, names=names, config={"use_qalora": True})
    jlora.peft.save(tmp_path / "b", tree, names=names)
    stored = jlora.peft.Names.load(tmp_path / "b" / "jlora_names.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"Names\.save: .*folder cannot be written"):
        stored.save(tmp_path / "folder")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "b", "folder"}


@pytest.mark.parametrize("seed", range(60))
def test_property_what_is_found_is_what_was_laid_out(matched, seed):
    """Random tensors, fused, permuted, padded, with zero and equal rows.

    Each number of a weight that is found comes from where it was taken; what is left
    out is padding.  A weight that cannot be told is missing, with a reason.
    """
    rng = np.random.default_rng(seed)
    n, in_ = rng.integers(2, 5), int(rng.integers(2, 7))
    tensors = {f"t{k}.weight": draw(int(rng.integers(1, 6)), in_) for k in range(n)}
    for x in tensors.values():
        if rng.random() < 0.3:
            x[rng.integers(len(x))] = 0 if rng.random() < 0.5 else x[0]
    params, truth = {}, {}
    for k, own in enumerate(([*tensors][:2], [*tensors][2:])):
        if not own:
            continue
        columns = [(name, i) for name in own for i in range(len(tensors[name]))]
        order = np.arange(len(columns)), np.arange(in_)
        if rng.random() < 0.4:
            order = rng.permutation(len(columns)), rng.permutation(in_)
        kernel = np.concatenate([tensors[name] for name in own])[order[0]][
            :, order[1]
        ].T
        pads = rng.integers(0, 2, 2) if rng.random() < 0.4 else (0, 0)
        params[f"w{k}"] = {"kernel": np.pad(kernel, [(0, pads[0]), (0, pads[1])])}
        truth[f"w{k}/kernel"] = order[1], [columns[c] for c in order[0]]
    _, names = matched(tensors, params)
    assert {*names} | {*names.missing} == {*truth}
    for path, parts in names.items():
        rows, columns = truth[path]
        found = {}
        for part in parts:
            ours = np.ix_(part.rows.positions, part.columns.positions)
            theirs = np.ix_(part.tensor_rows.positions, part.tensor_columns.positions)
            turned = part.tensor_axes == "io"
            for i, j, a, b in zip(
                *(np.broadcast_arrays(*ours)[k].ravel() for k in (0, 1)),
                *(np.broadcast_arrays(*theirs)[k].ravel() for k in (0, 1)),
                strict=True,
            ):
                assert (i, j) not in found
                found[int(i), int(j)] = part.tensor, *((a, b) if turned else (b, a))
        want = {
            (i, j): (name, at, row)
            for j, (name, at) in enumerate(columns)
            for i, row in enumerate(rows)
        }
        assert {*found} == {*want}, (path, names)
        for at, (name, row, column) in found.items():
            # Of rows that are equal, and of which no other row tells the order, any.
            x, own = tensors[name], want[at]
            same = own[0] == name and own[2] == column
            assert same and (x[own[1]] == x[row]).all(), (path, names)
            assert own[1] == row or len({*map(bytes, x)}) < len(x)


def test_suffixes_that_name_a_list_of_layers_are_not_used(matched, tmp_path):
    """peft adapts every module whose path ends in a target: 0 is a whole layer, too."""
    each = [(k, n) for k in range(2) for n in (0, 2)]
    tensors = {f"layers.{k}.mlp.{n}.weight": draw(6, 6) for k, n in each}
    params = {}
    for k in range(2):
        params[f"layer_{k}"] = {
            f"d{n}": {"kernel": tensors[f"layers.{k}.mlp.{n}.weight"].T} for n in (0, 2)
        }
    params, names = matched(tensors, params)
    tree = randomise(jlora.wrap(params, rank=2))
    for portable in (False, True):
        where = tmp_path / f"a{portable}"
        jlora.peft.save(where, tree, names=names, portable=portable)
        said = json.loads((where / CONFIG).read_text())
        assert said["target_modules"] == sorted(names.modules)
        close(merged(jlora.peft.load(where, params)), merged(tree))
