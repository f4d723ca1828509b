"""plan: roles are observed, never guessed; rules, patterns; the table; the 70B tree."""

import re
import time
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import models
import pytest
from helpers import adapted, axes_of, integers, normal, says
from jax import lax

import jlora


def roles(spec, ndim):
    """One letter an axis."""
    letters = [""] * ndim
    for letter, axes in zip("bio", axes_of(spec, ndim), strict=True):
        for axis in axes:
            letters[axis] = letter
    return "".join(letters)


def conv(x, w, dims):
    strides = (1,) * (w.ndim - 2)
    return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=dims)


def through_scan(x, stack):
    return lax.scan(lambda c, w: (c, x @ w), 0, stack)[1]


USES = [
    pytest.param(lambda x, w: x @ w, (11, 5), (5, 7), "dense", "io", id="dense"),
    pytest.param(lambda x, w: w @ x, (5, 11), (7, 5), "dense", "oi", id="left"),
    pytest.param(lambda x, w: x @ w.T, (11, 5), (7, 5), "dense", "oi", id="torch"),
    pytest.param(lambda x, w: x @ w, (2, 3, 5), (5, 7), "dense", "io", id="leading"),
    pytest.param(
        lambda x, w: jnp.einsum("be,ehd->bhd", x, w),
        (11, 5),
        (5, 3, 7),
        "dense",
        "ioo",
        id="heads-out",
    ),
    pytest.param(
        lambda x, w: jnp.einsum("bhd,hde->be", x, w),
        (11, 3, 7),
        (3, 7, 5),
        "dense",
        "iio",
        id="heads-in",
    ),
    pytest.param(
        lambda x, w: jnp.einsum("be,hed->bhd", x, w),
        (11, 5),
        (3, 5, 7),
        "dense",
        "oio",
        id="in-the-middle",
    ),
    pytest.param(
        lambda x, w: jnp.einsum("bei,eio->beo", x, w),
        (11, 3, 5),
        (3, 5, 7),
        "dense",
        "bio",
        id="experts",
    ),
    pytest.param(through_scan, (11, 5), (3, 5, 7), "dense", "bio", id="scanned"),
    pytest.param(
        lambda x, w: lax.scan(lambda c, v: (c, through_scan(x, v)), 0, w)[1],
        (11, 5),
        (2, 3, 5, 7),
        "dense",
        "bbio",
        id="scanned-twice",
    ),
    pytest.param(
        lambda x, w: sum(x @ w[i] for i in range(3)),
        (11, 5),
        (3, 5, 7),
        "dense",
        "bio",
        id="indexed-by-layer",
    ),
    pytest.param(
        lambda x, w: lax.fori_loop(0, 3, lambda i, c: c + x @ w[i], jnp.zeros((11, 7))),
        (11, 5),
        (3, 5, 7),
        "dense",
        "bio",
        id="indexed-by-a-loop",
    ),
    pytest.param(
        lambda x, w: jax.vmap(lambda v: x @ v)(w),
        (11, 5),
        (3, 5, 7),
        "dense",
        "oio",
        id="vmapped-over-shared-data",
    ),
    pytest.param(
        lambda x, w: x @ w.reshape(5, 21),
        (11, 5),
        (5, 3, 7),
        "dense",
        "ioo",
        id="reshape",
    ),
    pytest.param(
        lambda x, w: conv(x, w, ("NWC", "WIO", "NWC")),
        (2, 11, 5),
        (3, 5, 7),
        "conv",
        "iio",
        id="conv-1d",
    ),
    pytest.param(
        lambda x, w: conv(x, w, ("NHWC", "HWIO", "NHWC")),
        (2, 11, 9, 5),
        (3, 2, 5, 7),
        "conv",
        "iiio",
        id="conv-2d",
    ),
    pytest.param(
        lambda x, w: conv(x, w, ("NCHW", "OIHW", "NCHW")),
        (2, 5, 11, 9),
        (7, 5, 3, 2),
        "conv",
        "oiii",
        id="conv-channels-first",
    ),
    pytest.param(
        lambda x, w: lax.scan(
            lambda c, v: (c, conv(x, v, ("NWC", "WIO", "NWC"))), 0, w
        )[1],
        (2, 11, 5),
        (4, 3, 5, 7),
        "conv",
        "biio",
        id="conv-scanned",
    ),
    pytest.param(
        lambda x, w: x @ (w * jnp.tri(5, 7)),
        (11, 5),
        (5, 7),
        "dense",
        "io",
        id="masked",
    ),
    pytest.param(
        lambda x, w: x @ (w / jnp.linalg.norm(w, axis=0)),
        (11, 5),
        (5, 7),
        "dense",
        "io",
        id="weight-norm",
    ),
    pytest.param(
        lambda x, w: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
        (11, 5),
        (5, 7),
        "dense",
        "io",
        id="cast",
    ),
    pytest.param(
        jax.checkpoint(
            jax.jit(
                lambda x, w: lax.cond(x[0, 0] > 0, jnp.dot, lambda x, w: x @ w, x, w)
            )
        ),
        (11, 5),
        (5, 7),
        "dense",
        "io",
        id="nested",
    ),
]


@pytest.mark.parametrize("use, x, shape, kind, expected", USES)
def test_roles_are_observed(use, x, shape, kind, expected):
    params = {"w": normal(*shape)}
    plan = jlora.plan(lambda p, x: use(x, p["w"]), params, normal(*x), rank=3)
    spec = plan["w"]
    assert roles(spec, len(shape)) == expected
    assert (spec.kind, spec.rank, spec.alpha) == (kind, 3, 3)
    leaf = jlora.wrap(params, plan=plan)["w"]
    sizes = {
        letter: tuple(
            n for n, role in zip(shape, expected, strict=True) if role == letter
        )
        for letter in "bio"
    }
    assert leaf.a.shape == (*sizes["b"], *sizes["i"], 3)
    assert leaf.b.shape == (*sizes["b"], 3, *sizes["o"])
    assert leaf.scale.shape == sizes["b"] and leaf.scale.dtype == jnp.float32


@pytest.mark.parametrize(
    "lookup",
    [
        pytest.param(lambda w, i: w[i], id="index"),
        pytest.param(lambda w, i: jnp.take(w, i, axis=0), id="take"),
        pytest.param(lambda w, i: jnp.take(w, i, axis=0) @ w.T, id="tied"),
        pytest.param(
            lambda w, i: (jnp.ones((3, 5)) @ w.T).sum() + w[i], id="tied-first"
        ),
    ],
)
def test_embeddings_are_planned_when_named(lookup):
    params = {"table": normal(13, 5), "w": normal(5, 7)}
    ids = integers(3, below=13)

    def fn(p, ids):
        return (
            lookup(p["table"], ids).sum(axis=-1, keepdims=True) + jnp.ones(5) @ p["w"]
        )

    plan = jlora.plan(fn, params, ids, rank=3)
    assert list(plan) == ["w"]
    plan = jlora.plan(fn, params, ids, rank=3, targets=["table", "w"])
    assert plan["table"].kind == "embed"
    assert roles(plan["table"], 2) == "io"
    leaf = jlora.wrap(params, plan=plan)["table"]
    assert leaf.a.shape == (13, 3) and leaf.b.shape == (3, 5)


class Conv1D(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 5, 7))
        return conv(x, kernel, ("NWC", "WIO", "NWC"))


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 5, 7))
        return jnp.einsum("...i,iho->...ho", x[..., :3], kernel)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 5, 7))
        return through_scan(x, kernel)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 5, 7))
        return jnp.einsum("bei,eio->beo", x[:, :3], kernel)


@pytest.mark.parametrize(
    "module, kind, expected",
    [
        pytest.param(Conv1D(), "conv", "iio", id="conv"),
        pytest.param(Heads(), "dense", "ioo", id="heads"),
        pytest.param(Stack(), "dense", "bio", id="stack"),
        pytest.param(Experts(), "dense", "bio", id="experts"),
    ],
)
def test_the_same_name_and_shape_in_four_roles(module, kind, expected):
    """What no rule on names and shapes can tell apart."""
    x = normal(2, 11, 5)
    variables = module.init(jax.random.key(0), x)
    (path,) = (plan := jlora.plan(module.apply, variables, x, rank=2))
    assert path == "params/kernel"
    assert (plan[path].kind, roles(plan[path], 3)) == (kind, expected)
    with pytest.raises(ValueError, match=r"params/kernel.*jlora\.plan"):
        jlora.wrap(variables, rank=2)


def test_plan_of_the_scanned_lm_and_of_the_conv_net():
    model, params, ids = models.scanned_lm()
    plan = jlora.plan(model.apply, {"params": params}, ids)
    found = {
        path: roles(spec, len(spec.batch_axes + spec.in_axes + spec.out_axes))
        for path, spec in plan.items()
    }
    assert found == {
        "params/blocks/query/kernel": "bioo",
        "params/blocks/key/kernel": "bioo",
        "params/blocks/value/kernel": "bioo",
        "params/blocks/out/kernel": "biio",
        "params/blocks/up/kernel": "bio",
        "params/blocks/down/kernel": "bio",
    }
    model, variables, x = models.conv_net()
    plan = jlora.plan(model.apply, variables, x)
    found = {path: spec.kind for path, spec in plan.items()}
    assert found == {
        "params/stem/kernel": "conv",
        "params/grouped/kernel": "conv",
        "params/depthwise/kernel": "conv",
        "params/upward/kernel": "conv",
        "params/head/kernel": "dense",
    }
    assert adapted(jlora.wrap(variables, plan=plan))[
        "params/depthwise/kernel"
    ].a.shape == (3, 3, 1, 8)


def test_plan_passes_keywords_on_and_traces_only():
    runs = []

    def fn(params, x, *, train, scale=1.0):
        runs.append(train)
        assert train is True and scale is None
        assert not hasattr(x, "__float__") or isinstance(x, jax.core.Tracer)
        return x @ params["w"]

    w = jax.ShapeDtypeStruct((5, 7), jnp.float32)
    plan = jlora.plan(
        fn, {"w": w}, jax.ShapeDtypeStruct((11, 5), jnp.float32), train=True, scale=None
    )
    assert runs == [True] and plan["w"].rank == 8


def test_a_plan_is_a_mapping():
    plan = jlora.plan(mlp, MLP, X)
    assert len(plan) == 3 and list(plan) == list(plan.keys()) and "up/kernel" in plan
    assert "up/bias" not in plan and plan.get("up/bias") is None
    assert all(isinstance(spec, jlora.Spec) for spec in plan.values())
    with pytest.raises(KeyError):
        plan["up/bias"]


# ---------------------------------------------------------------- Flax's names


def test_roles_from_flax_names_where_they_are_unambiguous():
    params = {
        "embed": {"embedding": normal(13, 5)},
        "attention": {
            "query": {"kernel": normal(5, 3, 7), "bias": normal(3, 7)},
            "key": {"kernel": normal(5, 3, 7)},
            "value": {"kernel": normal(5, 3, 7)},
            "out": {"kernel": normal(3, 7, 5), "bias": normal(5)},
        },
        "Dense_0": {"kernel": normal(5, 7), "bias": normal(7)},
        "Conv_0": {"kernel": normal(3, 5, 7)},
        "Conv_1": {"kernel": normal(3, 2, 5, 7)},
        "Conv_2": {"kernel": normal(2, 3, 2, 5, 7)},
        "LayerNorm_0": {"scale": normal(5), "bias": normal(5)},
    }
    tree = jlora.wrap(params, rank=2)
    shapes = {p: (leaf.a.shape, leaf.b.shape) for p, leaf in adapted(tree).items()}
    assert shapes == {
        "attention/query/kernel": ((5, 2), (2, 3, 7)),
        "attention/key/kernel": ((5, 2), (2, 3, 7)),
        "attention/value/kernel": ((5, 2), (2, 3, 7)),
        "attention/out/kernel": ((3, 7, 2), (2, 5)),
        "Dense_0/kernel": ((5, 2), (2, 7)),
        "Conv_0/kernel": ((3, 5, 2), (2, 7)),
        "Conv_1/kernel": ((3, 2, 5, 2), (2, 7)),
        "Conv_2/kernel": ((2, 3, 2, 5, 2), (2, 7)),
    }
    named = jlora.wrap(params, rank=2, targets=["**/embedding"])
    assert list(adapted(named)) == ["embed/embedding"]
    assert named["embed"]["embedding"].a.shape == (13, 2)


def test_names_and_the_trace_agree_on_linen_attention():
    layer = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=21)
    x = normal(2, 11, 5)
    variables = layer.init(jax.random.key(0), x)
    plan = jlora.plan(layer.apply, variables, x, rank=2)
    observed, named = jlora.wrap(variables, plan=plan), jlora.wrap(variables, rank=2)
    assert jax.tree.structure(observed) == jax.tree.structure(named)
    assert len(adapted(named)) == 4


@pytest.mark.parametrize(
    "path, shape",
    [
        pytest.param("layers/kernel", (3, 5, 7), id="three-axes"),
        pytest.param("layers/query/kernel", (3, 5, 2, 7), id="stacked-query"),
        pytest.param("experts/out/kernel", (3, 5, 2, 7), id="stacked-out"),
    ],
)
def test_ambiguous_names_are_refused(path, shape):
    params = normal(*shape)
    for key in reversed(path.split("/")):
        params = {key: params}
    with pytest.raises(ValueError) as error:
        jlora.wrap(params, rank=2)
    says(error, path, str(shape[0]), "jlora.plan", "exclude")
    params["other"] = {"kernel": normal(5, 7)}
    assert list(adapted(jlora.wrap(params, exclude=[path]))) == ["other/kernel"]


# ----------------------------------------------------------- rules and patterns

MLP = {
    "up": {"kernel": normal(5, 7), "bias": normal(7)},
    "deep": {"layer_0": {"mid": {"kernel": normal(7, 7), "bias": normal(7)}}},
    "kernel": normal(7, 3),
}
X = normal(11, 5, seed=1)
ALL = ["deep/layer_0/mid/kernel", "kernel", "up/kernel"]


def mlp(p, x):
    x = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    mid = p["deep"]["layer_0"]["mid"]
    return jnp.tanh(x @ mid["kernel"] + mid["bias"]) @ p["kernel"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        pytest.param(None, ALL, id="default"),
        pytest.param("**", ALL, id="one-string"),
        pytest.param(["**/kernel"], ALL, id="double-star-is-zero-or-more-keys"),
        pytest.param(["*/kernel"], ["up/kernel"], id="star-is-one-key"),
        pytest.param(["*"], ["kernel"], id="star-alone"),
        pytest.param(["kernel"], ["kernel"], id="whole-path"),
        pytest.param(["**/mid/kernel"], ALL[:1], id="double-star-in-front"),
        pytest.param(["deep/**"], ALL[:1], id="double-star-behind"),
        pytest.param(["deep/**/kernel"], ALL[:1], id="double-star-within"),
        pytest.param(["deep/**/layer_0/**/mid/kernel"], ALL[:1], id="zero-keys-within"),
        pytest.param(["up/**/kernel"], ["up/kernel"], id="zero-keys"),
        pytest.param(["deep/layer_*/mid/k*l"], ALL[:1], id="star-in-a-key"),
        pytest.param([re.compile(r".*/kernel")], [ALL[0], ALL[2]], id="regex"),
        pytest.param([re.compile(r"(up|down)/kernel")], ["up/kernel"], id="regex-or"),
        pytest.param(re.compile(r"\w+"), ["kernel"], id="regex-full-match"),
        pytest.param(
            [lambda path, w: w.shape[1:] == (7,)], [ALL[0], ALL[2]], id="callable"
        ),
        pytest.param(lambda path, w: path == "kernel", ["kernel"], id="one-callable"),
        pytest.param(["up/*", "kernel"], ["kernel", "up/kernel"], id="several"),
    ],
)
@pytest.mark.parametrize("traced", [True, False], ids=["trace", "names"])
def test_patterns(targets, expected, traced):
    if traced:
        tree = jlora.wrap(MLP, plan=jlora.plan(mlp, MLP, X, targets=targets))
    else:
        tree = jlora.wrap(MLP, targets=targets)
    assert sorted(adapted(tree)) == expected


@pytest.mark.parametrize(
    "key, pattern, hit",
    [
        pytest.param("w.a", "w.a", True, id="dot"),
        pytest.param("wxa", "w.a", False, id="dot-is-no-wildcard"),
        pytest.param("w+(a)", "w+(a)", True, id="regex-characters"),
        pytest.param("w", "W", False, id="case"),
        pytest.param("kernel_2", "kernel", False, id="no-prefix-match"),
    ],
)
def test_globs_are_literal_but_for_their_stars(key, pattern, hit):
    params = {key: {"kernel": normal(5, 7)}, "other": {"kernel": normal(5, 7)}}
    if hit:
        tree = jlora.wrap(params, targets=[f"{pattern}/kernel"])
        assert list(adapted(tree)) == [f"{key}/kernel"]
    else:
        with pytest.raises(ValueError, match="matches no"):
            jlora.wrap(params, targets=[f"{pattern}/kernel"])


def test_exclude_wins_over_targets():
    tree = jlora.wrap(MLP, targets=["**"], exclude=["up/**"])
    assert sorted(adapted(tree)) == ALL[:2]


@pytest.mark.parametrize("traced", [True, False], ids=["trace", "names"])
def test_first_matching_rule_wins(traced):
    rules = [
        jlora.Rule("up/kernel", rank=2),
        jlora.Rule("up/**", rank=3),
        jlora.Rule(re.compile(".*mid.*kernel"), rank=4, alpha=12),
        jlora.Rule(lambda path, w: "mid" in path, rank=5),
    ]
    given = dict(rank=6, alpha=18, rules=rules, targets=["**/kernel"])
    if traced:
        plan = jlora.plan(mlp, MLP, X, **given)
        assert plan["up/kernel"].rank == 2 and plan[ALL[0]].alpha == 12
        tree = jlora.wrap(MLP, plan=plan)
    else:
        tree = jlora.wrap(MLP, **given)
    leaves = adapted(tree)
    assert {path: leaf.a.shape[-1] for path, leaf in leaves.items()} == {
        "up/kernel": 2,
        "deep/layer_0/mid/kernel": 4,
        "kernel": 6,
    }
    assert float(leaves[ALL[0]].scale) == 3
    assert float(leaves["kernel"].scale) == 3


def test_alpha_none_is_a_scale_of_one_and_alpha_is_divided_by_rank():
    for rank in (1, 3, 8):
        assert float(jlora.wrap(MLP, rank=rank)["kernel"].scale) == 1
    assert float(jlora.wrap(MLP, rank=8, alpha=4)["kernel"].scale) == 0.5
    plan = jlora.plan(mlp, MLP, X, rank=4, alpha=1)
    assert float(jlora.wrap(MLP, plan=plan)["kernel"].scale) == 0.25


def test_matched_leaves_that_are_no_weights_are_skipped_and_listed():
    plan = jlora.plan(mlp, MLP, X, targets=["**"])
    assert sorted(plan) == ALL
    tail = str(plan).split("kernel")[-1]
    assert "up/bias" in tail and "deep/layer_0/mid/bias" in tail
    with pytest.raises(ValueError, match="up/bias"):
        jlora.plan(mlp, MLP, X, targets=["up/bias"])


def test_a_weight_whose_uses_contradict_each_other_is_skipped_and_listed():
    def fn(p, x):
        first = jnp.einsum("ab,abc->c", x, p["w"])
        return first + jnp.einsum("bc,abc->a", x, p["w"]) @ p["v"]

    params = {"v": normal(5, 5), "w": normal(5, 5, 5)}
    plan = jlora.plan(fn, params, normal(5, 5))
    assert list(plan) == ["v"] and "contradict" in plan.skipped["w"]
    assert "contradict" in str(plan)


class Pair(NamedTuple):
    first: dict
    second: dict


@flax.struct.dataclass
class Tower:
    inner: dict
    depth: int = flax.struct.field(pytree_node=False, default=2)


@pytest.mark.parametrize(
    "nest, path",
    [
        pytest.param(lambda k: {"a": {"kernel": k}}, "a/kernel", id="dict"),
        pytest.param(lambda k: [{}, {"kernel": k}], "1/kernel", id="list"),
        pytest.param(lambda k: ({"kernel": k},), "0/kernel", id="tuple"),
        pytest.param(lambda k: {7: {"kernel": k}}, "7/kernel", id="number"),
        pytest.param(lambda k: Pair({}, {"kernel": k}), "second/kernel", id="named"),
        pytest.param(lambda k: Tower({"kernel": k}), "inner/kernel", id="attribute"),
        pytest.param(
            lambda k: {"kernel": nn.Partitioned(k, ("x", None))}, "kernel", id="boxed"
        ),
    ],
)
def test_paths_are_what_a_user_would_write(nest, path):
    """Keys, indices and attributes joined by `/`; no trailing `value` of a box."""
    tree = jlora.wrap(nest(normal(5, 7)), rank=2, targets=[path])
    (leaf,) = jax.tree.leaves(tree, is_leaf=jlora.is_adapted)
    assert isinstance(leaf, jlora.LoRA)
    assert list(jlora.adapter(tree)) == [path]
    plan = jlora.plan(
        lambda p, x: x @ jax.tree.leaves(p)[0], nest(normal(5, 7)), X, rank=2
    )
    assert list(plan) == [path]


# ----------------------------------------------------------------------- table


def test_the_table_shows_every_column_and_the_totals():
    plan = jlora.plan(
        mlp, MLP, X, rank=4, alpha=6, rules=[jlora.Rule("up/kernel", rank=2)]
    )
    text = str(plan)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    # r * (in + out): 2 * 12, 4 * 14 and 4 * 10.
    for path, shape, rank, size in [
        ("up/kernel", (5, 7), 2, 24),
        ("deep/layer_0/mid/kernel", (7, 7), 4, 56),
        ("kernel", (7, 3), 4, 40),
    ]:
        row = rows[path]
        assert re.search(rf"\b{shape[0]}\D{{1,3}}{shape[1]}\b", row), row
        assert "dense" in row
        assert re.search(rf"\b{rank}\b", row) and re.search(rf"\b{size}\b", row), row
    header = text.splitlines()[0].lower()
    for word in ("path", "shape", "kind", "roles", "rank", "parameters"):
        assert word in header
    assert re.search(r"\b120\b", text)


# ------------------------------------------------------------------ Spec.bias


@pytest.mark.parametrize(
    "fn, params, expected",
    [
        pytest.param(
            lambda p, x: x @ p["w"] + p["shift"],
            {"w": (5, 7), "shift": (7,)},
            "shift",
            id="seen-added",
        ),
        pytest.param(
            lambda p, x: jnp.tanh(p["shift"] + x @ p["w"]),
            {"w": (5, 7), "shift": (7,)},
            "shift",
            id="added-from-the-left",
        ),
        pytest.param(
            lambda p, x: (x @ p["w"] + p["shift"]) * p["bias"],
            {"w": (5, 7), "shift": (7,), "bias": (7,)},
            "shift",
            id="seen-before-sibling",
        ),
        pytest.param(
            lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]) + p["shift"],
            {"w": (5, 3, 7), "shift": (3, 7)},
            "shift",
            id="heads",
        ),
        pytest.param(
            lambda p, x: x @ p["w"].reshape(5, 21) + p["shift"].reshape(21),
            {"w": (5, 3, 7), "shift": (3, 7)},
            "shift",
            id="reshaped",
        ),
        pytest.param(
            lambda p, x: jnp.tanh(x @ p["w"]) + p["bias"],
            {"w": (5, 7), "bias": (7,)},
            "bias",
            id="sibling-bias",
        ),
        pytest.param(
            lambda p, x: jnp.tanh(x @ p["w"]) + p["b"],
            {"w": (5, 7), "b": (7,)},
            "b",
            id="sibling-b",
        ),
        pytest.param(
            lambda p, x: jnp.tanh(x @ p["w"]) + p["shift"],
            {"w": (5, 7), "shift": (7,)},
            None,
            id="none",
        ),
        pytest.param(
            lambda p, x: x @ p["w"] + x @ p["v"],
            {"w": (5, 7), "v": (5, 7)},
            None,
            id="two-products",
        ),
        pytest.param(
            lambda p, x: x @ p["w"] + x[:, :1], {"w": (5, 7)}, None, id="residual"
        ),
    ],
)
def test_bias_is_what_is_added_to_the_product(fn, params, expected):
    params = {name: normal(*shape) for name, shape in params.items()}
    assert jlora.plan(fn, params, X, rank=2)["w"].bias == expected


def test_bias_of_linen_layers_scanned_and_not():
    model, params, ids = models.scanned_lm()
    plan = jlora.plan(lambda p, i: model.apply({"params": p}, i), params, ids)
    assert plan["blocks/query/kernel"].bias == "blocks/query/bias"
    assert plan["blocks/key/kernel"].bias is None
    assert plan["blocks/up/kernel"].bias == "blocks/up/bias"
    model, variables, x = models.conv_net()
    plan = jlora.plan(model.apply, variables, x)
    for path, spec in plan.items():
        assert spec.bias == path.replace("kernel", "bias")


# ------------------------------------------------------------------------- 70B


def test_plan_and_wrap_of_an_abstract_70b_llama():
    """80 layers, unrolled, nothing allocated: under 20 s on two cores, most of it
    the model's own trace."""
    model = models.LLAMA_70B
    params = model.shapes()
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    start = time.perf_counter()
    plan = jlora.plan(model, params, ids, rank=16, targets=models.LLAMA_TARGETS)
    tree = jlora.wrap(params, plan=plan)
    assert time.perf_counter() - start < 20
    assert len(plan) == 7 * 80
    leaf = tree["layer_79"]["wk"]
    assert leaf.w is params["layer_79"]["wk"]
    assert isinstance(leaf.a, jax.ShapeDtypeStruct)
    assert (leaf.a.shape, leaf.b.shape) == ((8192, 16), (16, 1024))
    sides = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    trainable, total = jlora.count(tree)
    assert trainable == 80 * 16 * sides == 207_093_760
    base = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total == base + trainable and 70e9 < base < 71e9
    assert "207,093,760" in str(plan)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weights_that_are_stacked_along_any_axis(axis):
    """The new axis is nobody's, wherever it stands."""

    def fn(p, x):
        w = jnp.stack([p["a"], p["b"]], axis=axis)
        return jnp.einsum("bi,iko->bko", x, jnp.moveaxis(w, axis, 1))

    params = {"a": normal(5, 4), "b": normal(5, 4)}
    plan = jlora.plan(fn, params, normal(3, 5))
    assert {path: spec.axes for path, spec in plan.items()} == {"a": "io", "b": "io"}
