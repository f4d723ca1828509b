"""A weight times something before its product: scales, masks, norms, experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    adapt,
    check_lift,
    close,
    integers,
    normal,
    quiet,
    randomise,
    says,
    silent,
)

import jlora

X = normal(11, 6)


def times(w, s):
    return s * w


def over(w, s):
    return w / (2.0 + jnp.abs(s))


OPS = [
    pytest.param(times, id="s*w"),
    pytest.param(lambda w, s: w * s, id="w*s"),
    pytest.param(over, id="w/s"),
]
# The shape of the scale of a (6, 4) weight, and whether the weight stays factored.
SCALES = [(), (1,), (4,), (1, 4), (6, 1), (1, 1)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SCALES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_scale_along_one_role_stays_factored(op, shape, transposed):
    """As a parameter and as an argument."""

    def product(x, w, s):
        return x @ (op(w.T, s.T).T if transposed else op(w, s))

    params, s = {"w": normal(6, 4)}, normal(*shape, seed=3)
    if transposed and len(shape) == 1:
        pytest.skip("the transpose of a vector is the vector")

    def argument(p, x, s):
        return product(x, p["w"], s)

    tree, plan = adapt(argument, params, X, s)
    assert plan["w"].axes == "io" and not plan.skipped
    check_lift(argument, tree, plan, X, s, modes=op is times and not transposed)

    def parameter(p, x):
        return product(x, p["w"], p["s"])

    tree, plan = adapt(parameter, params | {"s": s}, X)
    assert list(plan) == ["w"] and plan["w"].axes == "io"
    check_lift(parameter, tree, plan, X, modes=False)


@pytest.mark.parametrize(
    "text, x, roles",
    [
        ("btd,dnh->btnh", (3, 5, 6), "ioo"),
        ("btnh,dnh->btd", (3, 5, 2, 4), "oii"),
    ],
    ids=["out", "in"],
)
@pytest.mark.parametrize("scale", [(2, 1), (2, 4), (6, 1, 1), (4,)], ids=str)
def test_scales_of_heads(text, x, roles, scale):
    """Along in axes, along out axes, and the numbers of each head's features."""

    def run(p, x):
        return jnp.einsum(text, x, p["w"] * p["s"])

    params, x = {"w": normal(6, 2, 4), "s": normal(*scale, seed=3)}, normal(*x)
    tree, plan = adapt(run, params, x)
    assert {p: s.axes for p, s in plan.items()} == {"w": roles}
    check_lift(run, tree, plan, x, modes=False)


def test_a_scale_of_each_layer_and_of_each_expert():
    def layers(p, x):
        def step(x, layer):
            return jnp.tanh(x @ (layer["w"] * layer["s"][:, None])), None

        return jax.lax.scan(step, x, p)[0]

    params = {"w": normal(3, 6, 6), "s": normal(3, 6)}
    tree, plan = adapt(layers, params, X)
    assert {p: s.axes for p, s in plan.items()} == {"w": "bio"}
    check_lift(layers, tree, plan, X)

    def experts(p, x):
        return jnp.einsum("etd,edf->etf", x, p["w"] * p["s"][:, None, None])

    params, x = {"w": normal(3, 6, 4), "s": normal(3)}, normal(3, 5, 6)
    tree, plan = adapt(experts, params, x)
    check_lift(experts, tree, plan, x)


def test_a_scale_that_trains_has_the_gradient_of_the_merged_weight():
    def fn(p, x):
        return x @ (p["s"] * p["w"])

    params = {"w": normal(6, 4), "s": normal(4, seed=1)}
    plan = jlora.plan(fn, params, X, rank=2)
    tree = jlora.wrap(params, plan=plan, train="s")
    tree = jax.tree.map(lambda x: x + 0.1, tree)
    grad = jax.grad(lambda t: jnp.sin(jlora.lift(fn)(t, X)).sum())(tree)

    def merged(value):
        return jnp.sin(fn({**jlora.merge(tree), "s": value}, X)).sum()

    want = jax.grad(merged)(tree["s"].value)
    np.testing.assert_allclose(grad["s"].value, want, rtol=2e-5, atol=1e-5)


def test_float8_with_its_own_scale():
    def fn(p, x):
        return x @ (p["w"].astype(jnp.float32) * p["scale"])

    w = normal(6, 4).astype(jnp.float8_e4m3fn)
    params = {"w": w, "scale": normal(4, seed=2)}
    tree, plan = adapt(fn, params, X)
    assert list(plan) == ["w"]
    leaf = tree["w"]
    # The delta is one of the weight that the function makes of the codes.
    exact = w.astype(jnp.float32) * params["scale"] + leaf.scale * leaf.a @ leaf.b
    np.testing.assert_allclose(
        quiet(jlora.lift(fn), tree, X), X @ exact, rtol=1e-5, atol=1e-5
    )


def test_integers_that_the_function_uses_as_integers_say_so():
    def fn(p, x):
        return (x.astype(jnp.int8) @ p["w"]) * p["scale"]

    params = {"w": jnp.ones((6, 4), jnp.int8), "scale": normal(4)}
    with pytest.raises(ValueError) as error:
        jlora.plan(fn, params, X)
    says(error, "w: its dtype is int8", "dequantised")
    plan = jlora.plan(
        lambda p, x: fn(p, x) @ p["v"], params | {"v": normal(4, 3)}, X, rank=2
    )
    assert list(plan) == ["v"] and "int8" in plan.skipped["w"]
    with pytest.raises(ValueError, match="dtype is int8"):
        jlora.wrap({"kernel": jnp.ones((6, 4), jnp.int8)})


NORMS = [
    pytest.param(lambda v, g: g * (v - v.mean(0)) / v.std(0), (4,), id="standardised"),
    pytest.param(lambda v, g: g * v / jnp.linalg.norm(v, axis=0), (4,), id="g*v/norm"),
    pytest.param(
        lambda v, g: v / jnp.linalg.norm(v, axis=0, keepdims=True) * g, (4,), id="last"
    ),
    pytest.param(
        lambda v, g: v * (g * jax.lax.rsqrt((v * v).sum(0))), (4,), id="one-factor"
    ),
    pytest.param(
        lambda v, g: (g[:, None] * v) / jnp.linalg.norm(v), (6,), id="whole-norm"
    ),
]


@pytest.mark.parametrize("norm, shape", NORMS)
def test_weight_norm_by_hand_is_planned_and_materialised(norm, shape):
    def fn(p, x):
        return x @ norm(p["v"], p["g"])

    params = {"v": normal(6, 4), "g": normal(*shape)}
    tree, plan = adapt(fn, params, X)
    assert {p: s.axes for p, s in plan.items()} == {"v": "io"}
    check_lift(fn, tree, plan, X, factored=False, modes=False)
    (entry,) = jlora.explain(fn, tree, X)
    assert entry.status == "materialised"


def test_weight_norm_of_flax_is_planned():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(4))(x)

    variables = Net().init(jax.random.key(0), X)
    plan = jlora.plan(Net().apply, variables, X, rank=2)
    assert [s.axes for s in plan.values()] == ["io"]
    module = nnx.WeightNorm(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    plan = jlora.plan(lambda m, x: m(x), module, X, rank=2)
    assert [s.axes for s in plan.values()] == ["io"]


# ------------------------------------------------------------------------- masks

MASKED = [
    pytest.param(lambda m, w: m * w, id="m*w"),
    pytest.param(lambda m, w: w * m, id="w*m"),
    pytest.param(lambda m, w: w / m, id="w/m"),
    pytest.param(lambda m, w: jnp.where(m > 0, w, 0.0), id="where"),
]


@pytest.mark.parametrize("mask", MASKED[:3])
def test_neither_a_weight_nor_its_mask_is_guessed(mask):
    def fn(p, x):
        return x @ mask(p["m"], p["w"]) @ p["v"]

    params = {"m": normal(6, 4, seed=5), "w": normal(6, 4), "v": normal(4, 3)}
    plan = jlora.plan(fn, params, X, rank=2)
    assert list(plan) == ["v"]
    assert "multiplied by w" in plan.skipped["m"]
    assert "multiplied by m" in plan.skipped["w"]
    tree, plan = adapt(fn, params, X, targets=["w", "v"])
    assert {p: s.axes for p, s in plan.items()} == {"w": "io", "v": "io"}
    check_lift(fn, tree, plan, X, factored=False, modes=False)
    del params["v"]
    with pytest.raises(ValueError, match=r"m: multiplied by w.*\n.*w: multiplied by m"):
        jlora.plan(lambda p, x: x @ mask(p["m"], p["w"]), params, X)


@pytest.mark.parametrize("mask", MASKED)
def test_a_weight_is_planned_under_a_mask_that_is_an_argument(mask):
    def fn(p, x, m):
        return x @ mask(m, p["w"])

    args = X, normal(6, 4, seed=5)
    tree, plan = adapt(fn, {"w": normal(6, 4)}, *args)
    assert plan["w"].axes == "io"
    check_lift(fn, tree, plan, *args, factored=False, modes=False)
    with pytest.raises(ValueError, match="strict"):
        jlora.lift(fn, strict=True)(tree, *args)


ACTIVATIONS = [
    pytest.param(lambda x, g: x * g, (6,), id="vector"),
    pytest.param(lambda x, g: x * g, (11, 6), id="of-its-shape"),
    pytest.param(lambda x, g: g * x, (11, 1), id="of-each-row"),
    pytest.param(lambda x, g: x / (1 + g * g), (6,), id="quotient"),
    pytest.param(lambda x, g: x + g, (11, 6), id="positions"),
]


@pytest.mark.parametrize("op, shape", ACTIVATIONS)
def test_the_scale_of_an_activation_is_no_weight(op, shape):
    def fn(p, x):
        return op(x, p["g"]) @ p["w"]

    params = {"g": normal(*shape), "w": normal(6, 4)}
    tree, plan = adapt(fn, params, X)
    assert {p: s.axes for p, s in plan.items()} == {"w": "io"}
    check_lift(fn, tree, plan, X, modes=False)


THROUGH = [
    pytest.param(lambda w: jnp.clip(w, -1, 1), id="clip"),
    pytest.param(jnp.tanh, id="tanh"),
    pytest.param(lambda w: jnp.where(w > 0.5, w, 0), id="threshold"),
    pytest.param(lambda w: w * w, id="square"),
]


@pytest.mark.parametrize("through", THROUGH)
def test_what_would_be_materialised_is_planned_when_named(through):
    def fn(p, x):
        return x @ through(p["w"]) @ p["v"]

    params = {"w": normal(6, 4), "v": normal(4, 3)}
    plan = jlora.plan(fn, params, X, rank=2)
    assert list(plan) == ["v"] and "no low-rank form" in plan.skipped["w"]
    tree, plan = adapt(fn, params, X, targets=["w", "v"])
    check_lift(fn, tree, plan, X, factored=False, modes=False)


def test_one_warning_for_all_that_is_materialised():
    def fn(p, x):
        for k in range(7):
            x = x @ jnp.tanh(p[f"w{k}"])
        return x @ jnp.sin(p["last"])

    params = {f"w{k}": normal(6, 6, seed=k) for k in range(7)} | {"last": normal(6, 4)}
    tree, _ = adapt(fn, params, X, targets="*")
    with pytest.warns(UserWarning) as caught:
        jlora.lift(fn)(tree, X)
    (warning,) = caught
    says(
        warning.message, "'w0', 'w1'", "and 2 more are used by 'tanh'", "'last' is used"
    )


# ----------------------------------------------------------------------- experts

E = integers(5, 2, below=3)
EXPERTS = [
    pytest.param(
        lambda w, h, e, g: jnp.einsum("tkh,tkhd->td", h, w[e]), (5, 2, 6), id="summed"
    ),
    pytest.param(
        lambda w, h, e, g: jnp.einsum("tk,tkh,tkhd->td", g, h, w[e]),
        (5, 2, 6),
        id="gated",
    ),
    pytest.param(
        lambda w, h, e, g: jnp.einsum("tkhd,tkh->td", w[e] * g[..., None, None], h),
        (5, 2, 6),
        id="gated-weights",
    ),
    pytest.param(
        lambda w, h, e, g: jax.vmap(
            lambda h, e, g: jnp.einsum("k,kh,khd->d", g, h, w[e])
        )(h, e, g),
        (5, 2, 6),
        id="vmapped",
    ),
    pytest.param(
        lambda w, h, e, g: jnp.einsum("th,tk,tkhd->td", h, g, w[e]), (5, 6), id="shared"
    ),
    pytest.param(
        lambda w, h, e, g: jnp.einsum("tkh,tkdh->td", h, w.transpose(0, 2, 1)[e]),
        (5, 2, 6),
        id="transposed",
    ),
]


@pytest.mark.parametrize("use, shape", EXPERTS)
def test_experts_that_are_summed_in_their_product(use, shape):
    def fn(p, h, g):
        return use(p["w"], h, E, g)

    args = normal(*shape), jax.nn.softmax(normal(5, 2, seed=4))
    tree, plan = adapt(fn, {"w": normal(3, 6, 4)}, *args)
    assert plan["w"].axes == "bio"
    trainable, frozen = jlora.partition(tree)

    def loss(call, trainable):
        return jnp.sin(call(jlora.combine(trainable, frozen), *args)).sum()

    got = jax.value_and_grad(lambda t: loss(jlora.lift(fn), t))(trainable)
    want = jax.value_and_grad(lambda t: loss(lambda t, *a: fn(jlora.merge(t), *a), t))(
        trainable
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    (entry,) = jlora.explain(fn, tree, *args)
    assert entry.status == "factored"


def test_the_sum_over_a_stack_of_layers_contradicts_a_plan():
    """It is none over the experts of a token."""
    params = {"w": normal(3, 6, 4)}

    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]

    tree, _ = adapt(scanned, params, X)
    with pytest.raises(ValueError, match="planned otherwise than it is used"):
        jlora.lift(lambda p, x: jnp.einsum("ltd,ldf->tf", x, p["w"]))(
            tree, normal(3, 5, 6)
        )


@pytest.mark.parametrize("roles", ["bio", "oio", "iio"])
def test_experts_planned_from_a_dense_dispatch_run_ragged(roles):
    def dense(p, x):
        spec = {"bio": "etd,edf->etf", "oio": "td,edf->etf", "iio": "etd,edf->tf"}
        return jnp.einsum(spec[roles], x, p["w"])

    def ragged(p, x):
        return jax.lax.ragged_dot(x, p["w"], jnp.array([3, 1, 4], jnp.int32))

    x = normal(5, 6) if roles == "oio" else normal(3, 5, 6)
    tree, plan = adapt(dense, {"w": normal(3, 6, 4)}, x)
    assert plan["w"].axes == roles
    check_lift(ragged, tree, plan, normal(8, 6), modes=False)


def test_what_nobody_reads_is_no_use():
    """As haliax takes the first layer of every stack, to know its shape."""

    @jax.jit
    def first_and_all(w, x):
        return jnp.take(w, 0, axis=0), jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), x, w
        )[0]

    def fn(p, x):
        return first_and_all(p["w"], x)[1]

    tree, plan = adapt(fn, {"w": normal(3, 6, 6)}, X)
    assert plan["w"].axes == "bio"
    check_lift(fn, tree, plan, X)
    (entry,) = jlora.explain(fn, tree, X)
    assert (entry.status, entry.where) == ("factored", ("dot_general",))


def test_an_adapter_that_is_larger_than_its_weight_is_pointed_out():
    def fn(p, x):
        return x @ p["router"] @ p["up"]

    params = {"router": normal(6, 4), "up": normal(4, 64)}
    plan = jlora.plan(fn, params, X, rank=3)
    tree = jlora.wrap(params, plan=plan)
    for text in (str(plan), jlora.summary(tree), jlora.summary(jlora.adapter(tree))):
        (line,) = [x for x in text.splitlines() if "no fewer parameters" in x]
        assert "weights: router 30 of 24: lower the rank" in line


# ------------------------------------------------------------------------- rules


def test_a_rule_may_say_the_roles():
    """Experts that meet one activation share a, unless a rule says that they do not."""

    def fn(p, x):
        return jnp.einsum("td,edf->etf", x, p["w"])

    params = {"w": normal(3, 6, 4)}
    assert jlora.plan(fn, params, X)["w"].axes == "oio"
    rules = [jlora.Rule("w", axes="bio")]
    tree, plan = adapt(fn, params, X, rules=rules)
    assert plan["w"].axes == "bio" and tree["w"].a.shape == (3, 6, 3)
    check_lift(fn, tree, plan, X, modes=False)
    told = jlora.wrap(params, rank=2, rules=rules)
    assert told["w"].axes == "bio"
    quiet(jlora.lift(fn), told, X)


@pytest.mark.parametrize("axes", ["iio", "ooi", "ioo"])
def test_a_rule_with_other_roles_than_the_use(axes):
    def fn(p, x):
        return jnp.einsum("td,edf->etf", x, p["w"])

    params, rules = {"w": normal(3, 6, 4)}, [jlora.Rule("w", axes=axes)]
    with pytest.raises(ValueError) as error:
        jlora.plan(fn, params, X, rules=rules)
    says(error, f"Rule('w', axes={axes!r})", "(3, 6, 4)", "'oio'")
    with pytest.raises(ValueError) as error:
        jlora.lift(fn)(jlora.wrap(params, rules=rules), X)
    says(error, "'w'", "rule told the roles", repr(axes), "'oio'", "jlora.plan")


def test_a_rule_with_too_few_roles():
    with pytest.raises(ValueError, match=r"\(3, 6, 4\) has 3 axes"):
        jlora.wrap({"w": normal(3, 6, 4)}, rules=[jlora.Rule("w", axes="io")])
    for axes in ("", "ix", 3, "io ", "bbi", "boo"):
        with pytest.raises(ValueError, match="expected one letter for each axis"):
            jlora.Rule("w", axes=axes)


# ---------------------------------------------------------------- told, and held to it


@pytest.mark.parametrize(
    "fn, params, x, roles, seen",
    [
        pytest.param(
            lambda p, x: x @ p["kernel"].T,
            {"kernel": (6, 6)},
            (5, 6),
            "io",
            "oi",
            id="T",
        ),
        pytest.param(
            lambda p, x: jnp.einsum("td,edf->etf", x, p["gate_proj"]),
            {"gate_proj": (3, 6, 4)},
            (5, 6),
            "bio",
            "oio",
            id="experts",
        ),
        pytest.param(
            lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["query"]["kernel"]),
            {"query": {"kernel": (3, 6, 4)}},
            (5, 6),
            "ioo",
            "bio",
            id="scan",
        ),
        pytest.param(
            lambda p, x: jnp.einsum("td,nhd->tnh", x, p["out"]["kernel"]),
            {"out": {"kernel": (3, 4, 6)}},
            (5, 6),
            "iio",
            "ooi",
            id="heads",
        ),
    ],
)
def test_roles_that_were_told_are_held_to_the_use(fn, params, x, roles, seen):
    params = jax.tree.map(
        lambda s: normal(*s), params, is_leaf=lambda s: isinstance(s, tuple)
    )
    tree = jlora.wrap(params, rank=2)
    (path,) = jlora.adapter(tree)
    for call in (jlora.lift(fn), jax.jit(jlora.lift(fn))):
        with pytest.raises(ValueError) as error:
            silent(call, tree, normal(*x))
        says(error, repr(path), repr(roles), repr(seen), "jlora.plan(fn, params")
    with pytest.raises(ValueError, match="told the roles"):
        jlora.explain(fn, tree, normal(*x))
    plan = jlora.plan(fn, params, normal(*x))
    silent(jlora.lift(fn), jlora.wrap(params, plan=plan), normal(*x))


def test_what_is_left_out_is_said():
    params = {
        "up": {"kernel": normal(6, 4), "bias": normal(4)},
        "mystery": normal(6, 4),
        "pos_embedding": normal(11, 6),
        "norm": {"scale": normal(6)},
    }
    with pytest.warns(UserWarning) as caught:
        tree = jlora.wrap(params, rank=2)
    (warning,) = caught
    says(warning.message, "'mystery' (6, 4)", "jlora.plan(fn, params, *args)")
    assert "pos_embedding" not in str(warning.message)
    assert "mystery" in str(jlora.summary(tree))
    quiet(jlora.wrap, params, rank=2, exclude="mystery")
    assert "mystery" in jlora.adapter(quiet(jlora.wrap, params, targets=["mystery"]))


def test_a_vmap_over_scales_is_planned_when_named():
    """Each of many multiples of a weight meets the data: it is formed, and said so."""

    def over_scales(p, x, s):
        return jax.vmap(lambda s: x @ (s * p["w"]))(s)

    def over_parameters(p, x):
        return over_scales(p, x, p["s"])

    def over_rows(p, x):
        return jax.vmap(lambda x: x @ (p["w"] * x[:, None]))(x)

    w, s = {"w": normal(6, 4)}, normal(3)
    cases = [(over_scales, w, (X, s)), (over_scales, w, (X, normal(3, 4)))]
    cases += [(over_parameters, w | {"s": s}, (X,)), (over_rows, w, (X,))]
    for fn, params, args in cases:
        other = {**params, "out": normal(4, 2)}

        def whole(p, *args, fn=fn):
            return fn(p, *args) @ p["out"]

        plan = jlora.plan(whole, other, *args)
        assert list(plan) == ["out"] and "jlora.Rule" in plan.skipped["w"]
        plan = jlora.plan(fn, params, *args, rank=2, targets="w")
        assert plan["w"].axes == "io"
        tree = randomise(jlora.wrap(params, plan=plan))
        with pytest.warns(UserWarning, match="'w' is used by 'mul'"):
            got = jlora.lift(fn)(tree, *args)
        close(got, fn(jlora.merge(tree), *args))
        assert jlora.explain(fn, tree, *args).entries[0].status == "materialised"
