"""What enters each weight, and EVA's factors and ranks: against numpy in float64."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, normal, same, says
from jax import lax

import jlora

X = normal(11, 6)


def moment(x):
    x = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    return x.T @ x


def observed(fn, params, *args, **options):
    plan = jlora.plan(fn, params, *args, rank=2, **options)
    return jlora.observe(fn, params, *args, plan=plan), plan


def layers(p, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return lax.scan(jax.checkpoint(layer), x, p["w"])[0]


def inputs_of_layers(p, x):
    out = []
    for w in p["w"]:
        out.append(np.asarray(x))
        x = jnp.tanh(x @ w)
    return np.stack([moment(x) for x in out])


def conv(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=dims)


def patches(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    own = lax.conv_general_dilated_patches(
        x, (3, 3), (2, 1), "SAME", dimension_numbers=dims
    )
    own = np.asarray(own).reshape(-1, 4, 9)  # channels first
    return moment(own.transpose(0, 2, 1).reshape(len(own), -1))


SIZES = jnp.array([4, 0, 7])

CASES = {
    "dense": (lambda p, x: x @ p["w"], (6, 8), X, lambda p, x: moment(x)),
    "transposed": (lambda p, x: x @ p["w"].T, (8, 6), X, lambda p, x: moment(x)),
    "twice": (
        lambda p, x: (x @ p["w"], jnp.sin(x) @ p["w"]),
        (6, 8),
        X,
        lambda p, x: moment(x) + moment(jnp.sin(x)),
    ),
    "of heads": (
        lambda p, x: jnp.einsum("bhi,hio->bo", x.reshape(11, 2, 3), p["w"]),
        (2, 3, 8),
        X,
        lambda p, x: moment(x),
    ),
    "of heads, in another order": (
        lambda p, x: jnp.einsum(
            "bih,iho->bo",
            x.reshape(11, 2, 3).transpose(0, 2, 1),
            p["w"].transpose(1, 0, 2),
        ),
        (2, 3, 8),
        X,
        lambda p, x: moment(x),
    ),
    "layers": (layers, (3, 6, 6), X, inputs_of_layers),
    "conv": (conv, (3, 3, 4, 5), normal(2, 6, 6, 4), patches),
    "experts": (
        lambda p, x: lax.ragged_dot(x, p["w"], SIZES),
        (3, 6, 8),
        X,
        lambda p, x: np.stack([moment(x[:4]), np.zeros((6, 6)), moment(x[4:])]),
    ),
    "fused": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"] * 2], axis=1),
        (6, 8),
        X,
        lambda p, x: 2 * moment(x),
    ),
    "scaled inputs": (
        lambda p, x: x @ (p["w"] * jnp.arange(6.0)[:, None]),
        (6, 8),
        X,
        lambda p, x: moment(x * np.arange(6)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_moments(name):
    fn, shape, x, want = CASES[name]
    params = {"w": normal(*shape, scale=0.5)}
    found, plan = observed(fn, params, x, targets="w")
    want = want(params, x)
    np.testing.assert_allclose(found["w"], want, atol=1e-5 * np.abs(want).max())
    under = jax.jit(lambda p, x: jlora.observe(fn, p, x, plan=plan))(params, x)
    close(under["w"], found["w"])


def test_half_precision_is_summed_in_float32():
    x = normal(4000, 6, dtype=jnp.bfloat16)
    params = {"w": normal(6, 8, dtype=jnp.bfloat16)}
    found, _ = observed(lambda p, x: x @ p["w"], params, x)
    want = moment(np.asarray(x, np.float64))
    np.testing.assert_allclose(found["w"], want, atol=1e-5 * np.abs(want).max())


def test_a_linen_model_in_batches():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(7)(x)
            return nn.Dense(3, use_bias=False)(nn.relu(x))

    params = Net().init(jax.random.key(0), X)
    plan = jlora.plan(Net().apply, params, X, rank=2)
    parts = [jlora.observe(Net().apply, params, x, plan=plan) for x in (X[:5], X[5:])]
    whole = jlora.observe(Net().apply, params, X, plan=plan)
    both = parts[0] + parts[1]
    for path in plan:
        close(both[path], whole[path])
    hidden = nn.relu(X @ params["params"]["Dense_0"]["kernel"])
    close(both["params/Dense_1/kernel"], jnp.asarray(moment(hidden), jnp.float32), 1e-5)
    assert "params/Dense_0/kernel" in str(both) and "90 %" in str(both)


def test_eva_takes_the_largest_directions():
    fn, shape, x, _ = CASES["of heads"]
    params = {"w": normal(*shape)}
    moments, plan = observed(fn, params, x, targets="w")
    init = jlora.initializers.eva(moments)
    tree = jlora.wrap(params, plan=plan, init=init, dora=True)
    _, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    a = np.asarray(tree["w"].a).reshape(6, 2)
    np.testing.assert_allclose(np.abs(vt[:2] @ a), np.eye(2), atol=1e-4)
    assert not tree["w"].b.any() and tree["w"].w is params["w"]
    same(jlora.lift(fn)(jlora.wrap(params, plan=plan, init=init), x), fn(params, x))
    stack = {"w": normal(3, 6, 6)}
    moments, plan = observed(layers, stack, X)
    leaf = jlora.wrap(stack, plan=plan, init=jlora.initializers.eva(moments))["w"]
    assert leaf.a.shape == (3, 6, 2)
    values = np.linalg.eigvalsh(np.asarray(moments["w"], np.float64))[:, ::-1][:, :2]
    got = np.einsum("lir,lij,ljr->lr", leaf.a, moments["w"], leaf.a)
    np.testing.assert_allclose(got, values, rtol=1e-4)


def test_redistribute_keeps_the_budget_and_the_scales():
    """One input has energy in one direction, the other in all."""
    params = {"q": normal(6, 8), "k": normal(6, 8), "v": normal(6, 8)}
    line = X[:, :1] * jnp.ones((1, 6))

    def fn(p, x):
        return line @ p["q"] + x @ p["k"] + (x * jnp.array([1, 1, 0, 0, 0, 0])) @ p["v"]

    plan = jlora.plan(fn, params, X, rank=2, alpha=6)
    moments = jlora.observe(fn, params, X, plan=plan)
    new = jlora.redistribute(plan, moments)
    ranks = {p: s.rank for p, s in new.items()}
    assert sum(ranks.values()) == 6 and ranks["q"] == 1 and ranks["k"] == 3
    assert {s.scale for s in new.values()} == {3.0}
    tree = jlora.wrap(params, plan=new, init=jlora.initializers.eva(moments))
    assert {p: tree[p].rank for p in ranks} == ranks
    same = jlora.redistribute(plan, moments, rho=1.0)
    assert {s.rank for s in same.values()} == {2}
    one = jlora.plan(fn, params, X, rank=1)
    zero = {**moments.found, "k": jnp.eye(6)}
    few = jlora.redistribute(one, jlora.Moments(zero), rho=3)
    assert "k" not in few and "less energy" in few.skipped["k"]
    assert sum(s.rank for s in few.values()) == 3


def test_a_stack_counts_once_for_each_layer():
    params = {"w": normal(3, 6, 6), "v": normal(6, 5)}
    fn = lambda p, x: layers(p, x) @ p["v"]  # noqa: E731
    plan = jlora.plan(fn, params, X, rank=2)
    new = jlora.redistribute(plan, jlora.observe(fn, params, X, plan=plan))
    assert 3 * new["w"].rank + new["v"].rank <= 8


@pytest.mark.parametrize("rslora", [False, True])
def test_redistributed_scales_stay(rslora):
    params = {"w": normal(6, 8), "v": normal(6, 8)}
    fn = lambda p, x: x @ p["w"] + (x * (jnp.arange(6) == 0)) @ p["v"]  # noqa: E731
    rule = jlora.Rule("*", rank=2, alpha=8, rslora=rslora)
    plan = jlora.plan(fn, params, X, rules=[rule])
    moments = jlora.observe(fn, params, X, plan=plan)
    new = jlora.redistribute(plan, moments)
    assert new["v"].rank != 2
    for spec in new.values():
        np.testing.assert_allclose(spec.scale, plan["w"].scale)


def test_bad_use():
    params = {"w": normal(6, 8), "e": normal(9, 6)}
    fn = lambda p, i: p["e"][i] @ p["w"]  # noqa: E731
    ids = jnp.arange(4)
    plan = jlora.plan(fn, params, ids, rank=2, targets=["w", "e"])
    moments = jlora.observe(fn, params, ids, plan=plan)
    assert [*moments] == ["w"]
    init = jlora.initializers.eva(moments)
    with pytest.raises(ValueError) as e:
        jlora.wrap(params, plan=plan, init=init)
    says(e, "eva: no moments of 'e'", "jlora.Rule")
    with pytest.raises(ValueError) as e:
        jlora.redistribute(plan, moments)
    says(e, "no moments of 'e'", "exclude embeddings")
    rule = jlora.Rule("e", init="gaussian")
    mixed = jlora.plan(fn, params, ids, rank=2, rules=[rule, jlora.Rule("w")])
    assert jlora.wrap(params, plan=mixed, init=init)["e"].b.any()
    with pytest.raises(ValueError, match="embeddings alone"):
        own = jlora.plan(fn, params, ids, rank=2, targets="e")
        jlora.observe(fn, params, ids, plan=own)
    with pytest.raises(ValueError, match="fn returns no floating-point array"):
        jlora.observe(lambda *args: fn(*args).argmax(-1), params, ids, plan=plan)
    with pytest.raises(ValueError, match="plan is of another tree"):
        jlora.observe(lambda p, x: x @ p["w"], {"v": normal(6, 8)}, X, plan=plan)
    with pytest.raises(ValueError, match="rho 0.5"):
        jlora.redistribute(plan, moments, rho=0.5)
    wrong = jlora.initializers.eva(jlora.Moments({"w": jnp.eye(5)}))
    only = dataclasses.replace(plan, specs={"w": plan.specs["w"]})
    with pytest.raises(ValueError) as e:
        jlora.wrap(params, plan=only, init=wrong)
    says(e, "'w'", "moments of shape (6, 6)", "found (5, 5)")
    with pytest.raises(ValueError, match="'w' have NaN"):
        jlora.redistribute(only, jlora.Moments({"w": jnp.full((6, 6), jnp.nan)}))
    with pytest.raises(ValueError, match="one of the two lacks 'v'"):
        moments + jlora.Moments({"v": moments["w"]})
    same(dict(sum([moments, moments])), dict(moments + moments))
    with pytest.raises(TypeError) as e:
        jlora.redistribute(moments, plan)
    says(e, "expected a plan, then its moments", "Moments, then a Plan")
    for name, value in (("init", "pissa"), ("train_rows", {"e": [1]})):
        with pytest.raises(TypeError) as e:
            jlora.plan(fn, params, ids, **{name: value})
        says(e, f"plan: {name}=", "jlora.wrap(params, plan=plan")
    with pytest.raises(TypeError, match="jlora.observe"):
        jlora.initializers.eva(3)
    big = dataclasses.replace(plan, specs={"w": plan.specs["w"].with_scale(7, 7)})
    with pytest.raises(ValueError) as e:
        jlora.wrap(params, plan=big, init=init)
    says(e, "'w'", "a rank of at most 6", "found 7")
