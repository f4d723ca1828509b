"""Corners that an attack on the lift found; each gave a wrong number in silence."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import normal
from jax import lax

import jlora

X = normal(8, 4, seed=1)
STACK, SQUARE = {"w": normal(3, 4, 4)}, {"w": normal(4, 4)}


def adapt(params, axes, **kwargs):
    plan = jlora.Plan({"w": jlora.Spec.of("dense", axes, 2)}, {"w": params["w"].shape})
    leaf = jlora.wrap(params, plan=plan, **kwargs)["w"]
    b = normal(*leaf.b.shape, seed=5).astype(leaf.b.dtype)
    return {"w": dataclasses.replace(leaf, b=b)}


@pytest.mark.parametrize(
    "fn, params, axes",
    [
        pytest.param(
            lambda p, x: x @ lax.reshape(p["w"], (4, 4), dimensions=(1, 0)),
            SQUARE,
            "io",
            id="reshape-with-an-order",
        ),
        pytest.param(
            lambda p, x: x @ p["w"][jnp.int32(-5)], STACK, "bio", id="index-far-below"
        ),
        pytest.param(
            lambda p, x: x @ (p["w"] * (1 + 2j)), SQUARE, "io", id="complex-number"
        ),
        pytest.param(
            lambda p, x: x @ jax.device_put({"w": p["w"], "x": x})["w"],
            SQUARE,
            "io",
            id="device-put-of-a-tree",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:'w' is used by")
def test_value(fn, params, axes):
    tree = adapt(params, axes)
    want = fn(jlora.merge(tree), X)
    assert jnp.abs(want - fn(params, X)).max() > 0.1
    assert jnp.allclose(jlora.lift(fn)(tree, X), want, atol=1e-4)


def test_a_number_is_not_rounded_to_the_factors_dtype():
    def fn(p, x):
        return x @ (p["w"] * jnp.float32(1.01))

    tree = adapt(SQUARE, "io", dtype=jnp.bfloat16)
    # The factors are widened before the number is in; only their product rounds.
    want = fn(jlora.merge(jax.tree.map(lambda v: v.astype(jnp.float32), tree)), X)
    assert jnp.allclose(jlora.lift(fn)(tree, X), want, atol=1e-5)


def test_dropout_scales_integer_activations():
    tree = jlora.dropout(adapt({"w": normal(64, 4)}, "io"), 0.25, jax.random.key(0))
    whole = adapt({"w": normal(64, 4)}, "io")
    x = jnp.ones((2000, 64), jnp.int32)

    def fn(p, x):
        return lax.dot_general(
            x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    base = fn({"w": whole["w"].w}, x)
    got = (jlora.lift(fn)(tree, x) - base).mean(0)
    want = (jlora.lift(fn)(whole, x) - base).mean(0)
    # The mean of 2,000 rows of 64 masks; five standard errors.
    spread = jnp.linalg.norm(jlora.merge(whole)["w"] - whole["w"].w, axis=0)
    error = 5 * spread * (0.25 / 0.75) ** 0.5 / 2000**0.5
    assert bool((jnp.abs(got - want) < error).all())


@pytest.mark.parametrize(
    "stacked",
    [
        pytest.param(lambda w: jnp.stack([w] * 3), id="stack"),
        pytest.param(lambda w: jnp.broadcast_to(w, (3, *w.shape)), id="broadcast"),
    ],
)
def test_masks_of_a_shared_weight_differ_from_step_to_step(stacked):
    tree = jlora.dropout(adapt(SQUARE, "io"), 0.5, jax.random.key(0))

    def fn(p, x):
        return lax.scan(lambda c, w: (c, x @ w), 0, stacked(p["w"]))[1]

    steps = jlora.lift(fn)(tree, X)
    assert jnp.abs(steps[0] - steps[1]).max() > 0.1


def test_masks_of_a_weight_and_of_its_concatenation_differ():
    tree = jlora.dropout(adapt(SQUARE, "io"), 0.5, jax.random.key(0))

    def fn(p, x):
        return x @ p["w"], x @ jnp.concatenate([p["w"], jnp.ones((4, 2))], 1)

    alone, joined = jlora.lift(fn)(tree, X)
    assert jnp.abs(alone - joined[:, :4]).max() > 0.1


def test_half_precision_factors_join_plain_arrays():
    tree = adapt(SQUARE, "io", dtype=jnp.bfloat16)

    def fn(p, x):
        return x @ jnp.concatenate([p["w"], jnp.ones((4, 2))], 1)

    assert jnp.allclose(jlora.lift(fn)(tree, X), fn(jlora.merge(tree), X), atol=1e-4)


@pytest.mark.parametrize(
    "fn, extra",
    [
        pytest.param(lambda p, x: x @ p["w"] + p["pos"], (8, 4), id="positions"),
        pytest.param(
            lambda p, x: (x @ p["w"]) * x + p["pos"], (4,), id="product-as-data"
        ),
    ],
)
def test_not_every_parameter_that_is_added_is_a_bias(fn, extra):
    params = {"w": normal(4, 4), "pos": normal(*extra)}
    assert jlora.plan(fn, params, X)["w"].bias is None


def test_a_bias_is_still_seen():
    params = {"w": normal(4, 4), "shift": normal(4)}
    plan = jlora.plan(lambda p, x: x @ p["w"] + p["shift"], params, X)
    assert plan["w"].bias == "shift"


@pytest.mark.parametrize(
    "path, kernel, bias",
    [
        pytest.param("query", (3, 8, 4), (3, 4), id="scanned-dense-named-query"),
        pytest.param("Conv_0", (6, 3, 8, 4), (6, 4), id="scanned-conv"),
    ],
)
def test_a_stacked_bias_makes_a_kernels_name_ambiguous(path, kernel, bias):
    params = {path: {"kernel": normal(*kernel), "bias": normal(*bias)}}
    with pytest.raises(ValueError, match="jlora.plan"):
        jlora.wrap(params)


def test_static_floats_are_compared_by_their_bits():
    tree, calls = adapt(SQUARE, "io"), []

    def fn(p, x, c):
        calls.append(c)
        return x @ p["w"] * jnp.copysign(1.0, c)

    lifted = jlora.lift(fn)
    assert jnp.array_equal(lifted(tree, X, 0.0), -lifted(tree, X, -0.0))
    nan = float("nan")
    lifted(tree, X, nan), lifted(tree, X, float("nan"))
    assert len(calls) == 3


def test_a_merged_full_leaf_has_a_buffer_of_its_own():
    tree = jlora.wrap({"w": normal(4, 4), "b": normal(4)}, train=["b"], targets=["w"])
    merged = jlora.merge(tree)["b"]
    assert merged.unsafe_buffer_pointer() != tree["b"].value.unsafe_buffer_pointer()
