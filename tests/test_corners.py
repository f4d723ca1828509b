"""Corners that an attack on the lift found; each gave a wrong number in silence."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import normal
from jax import lax

import jlora
import jlora.linen

X = normal(8, 4, seed=1)
STACK, SQUARE = {"w": normal(3, 4, 4)}, {"w": normal(4, 4)}
UNIT = {"w": normal(8, 1)}


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
            lambda p, x: x + p["w"][jnp.arange(8) % 4, :, None][..., 0],
            SQUARE,
            "io",
            id="rows-with-a-unit-axis",
        ),
        pytest.param(
            lambda p, x: x + p["w"][jnp.arange(8), 0][:, None],
            UNIT,
            "io",
            id="unit-column",
        ),
        pytest.param(
            lambda p, x: jax.vmap(
                lambda x, n: lax.fori_loop(0, n, lambda i, y: jnp.tanh(y @ p["w"]), x)
            )(x, jnp.arange(8) % 3),
            SQUARE,
            "io",
            id="loops-of-different-lengths-under-vmap",
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


def test_a_static_argument_that_is_changed_in_place_is_traced_anew():
    tree, seen = adapt(SQUARE, "io"), {1}
    lifted = jlora.lift(lambda p, x, seen: (x @ p["w"]) * len(seen))
    once = lifted(tree, X, seen)
    seen.add(2)
    assert jnp.allclose(lifted(tree, X, seen), 2 * once)


def test_dropout_of_rate_zero_ends_an_earlier_one():
    dropped = jlora.dropout(adapt(SQUARE, "io"), 0.5, jax.random.key(0))
    leaf = jlora.dropout(dropped, 0.0, jax.random.key(0))["w"]
    assert leaf.dropout is None


def test_half_precision_factors_under_strict_promotion():
    tree = adapt(SQUARE, "io", dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        jlora.merge(tree)


def test_linen_embed_of_one_row_gives_an_array():
    layer = jlora.linen.Embed(1, 5, rank=2)
    ids = jnp.zeros(3, int)
    variables = layer.init(jax.random.key(0), ids)
    assert layer.apply(variables, ids).shape == (3, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"a": normal(4, 3)}, "b of shape .* rank 3", id="ranks"),
        pytest.param({"scale": normal(2)}, "scale of shape", id="scale"),
    ],
)
def test_an_adapter_whose_factors_do_not_go_together(change, message):
    leaf = jlora.adapter(adapt(SQUARE, "io"))["w"]
    with pytest.raises(ValueError, match=message):
        jlora.attach(SQUARE, {"w": dataclasses.replace(leaf, **change)})


def test_an_integer_base_for_an_adapter():
    adapter = jlora.adapter(adapt(SQUARE, "io"))
    with pytest.raises(ValueError, match="'w' is int8 in the tree: expected"):
        jlora.attach({"w": jnp.ones((4, 4), jnp.int8)}, adapter)


def test_a_number_for_a_scale():
    leaf = dataclasses.replace(adapt(SQUARE, "io")["w"], scale=2.0)
    with pytest.raises(ValueError, match=r"'w' has scale=2.0: expected arrays"):
        jlora.lift(lambda p, x: x @ p["w"])({"w": leaf}, X)


def test_a_rank_and_an_alpha_that_are_said_beside_a_plan():
    def fn(p, x):
        return x @ p["w"]

    plan = jlora.plan(fn, SQUARE, X, rank=4)
    assert jlora.wrap(SQUARE, plan=plan)["w"].rank == 4
    assert jlora.wrap(SQUARE, rank=8, plan=plan)["w"].rank == 8
    for alpha in (7, 8, 9):
        plan = jlora.plan(fn, SQUARE, X, rank=8, alpha=alpha)
        assert float(jlora.wrap(SQUARE, rank=2, plan=plan)["w"].scale) == alpha / 2
    with pytest.raises(TypeError, match="a plan goes in by keyword"):
        jlora.wrap(SQUARE, plan)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: jlora.wrap(SQUARE, targets="*", key=0), "expected a PRNG key"),
        (lambda: jlora.wrap(SQUARE, targets=3), "expected a pattern or several"),
        (lambda: jlora.wrap(SQUARE, targets="*", dtype=int), "a floating-point one"),
        (lambda: jlora.wrap({"a": SQUARE}, targets="w"), r"mean '\*\*/w'\?"),
        (lambda: jlora.wrap({"a": SQUARE}, targets="a"), r"mean 'a/\*\*'\?"),
        (
            lambda: jlora.wrap({"a": SQUARE}, targets=re.compile("w")),
            "regular expression has to match the whole path",
        ),
    ],
)
def test_errors_that_newcomers_meet(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_merged_full_leaf_has_a_buffer_of_its_own():
    tree = jlora.wrap({"w": normal(4, 4), "b": normal(4)}, train=["b"], targets=["w"])
    merged = jlora.merge(tree)["b"]
    assert merged.unsafe_buffer_pointer() != tree["b"].value.unsafe_buffer_pointer()
