"""dm-haiku: its transformed functions, on params that keep their slashes."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    adapted,
    check_model,
    close,
    filled,
    integers,
    normal,
    quiet,
    randomise,
)

import jlora


def images(x):
    x = jnp.tanh(hk.Conv2D(7, (3, 2), stride=2)(x))
    x = jnp.tanh(hk.SeparableDepthwiseConv2D(1, (5, 2))(x))
    return hk.Conv2DTranspose(11, (3, 2), stride=2)(x)


def attention(x, y):
    init = hk.initializers.VarianceScaling(1.0)
    return hk.MultiHeadAttention(5, 11, w_init=init, model_size=17)(x, y, y)


def lstm(x):
    """Of (time, batch, features)."""
    core = hk.LSTM(11)
    return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]


def block(x):
    return x + hk.Linear(7)(jnp.tanh(hk.Linear(11)(x)))


def stack(x):
    return hk.experimental.layer_stack(5)(hk.remat(block))(x)


def tied(ids):
    embed = hk.Embed(13, 7)
    return jnp.tanh(hk.Linear(7, with_bias=False)(embed(ids))) @ embed.embeddings.T


def loop(x):
    """hk.scan over time, with one layer."""
    layer = hk.Linear(7)
    state = layer(x[0])
    return hk.scan(lambda c, x: (jnp.tanh(layer(c) + x), c), state, x)[1]


STACK = "__layer_stack_no_per_layer/"
CASES = [
    # A function of modules, its arguments, the roles of what is adapted.
    pytest.param(
        lambda x: hk.nets.MLP([11, 13])(x),
        [normal(2, 7)],
        {"mlp/~/linear_0/w": "io", "mlp/~/linear_1/w": "io"},
        id="mlp",
    ),
    pytest.param(
        attention,
        [normal(2, 3, 7), normal(2, 5, 13)],
        {f"multi_head_attention/{k}/w": "io" for k in "key linear query value".split()},
        id="attention",
    ),
    pytest.param(lstm, [normal(5, 2, 7)], {"lstm/linear/w": "io"}, id="lstm"),
    pytest.param(loop, [normal(5, 2, 7)], {"linear/w": "io"}, id="scan"),
    pytest.param(
        stack,
        [normal(2, 7)],
        {f"{STACK}linear/w": "bio", f"{STACK}linear_1/w": "bio"},
        id="layer-stack-remat",
    ),
    pytest.param(
        images,
        [normal(2, 3, 5, 5)],
        {
            "conv2_d/w": "iiio",
            "conv2_d_transpose/w": "iioi",
            "separable_depthwise_conv2_d/~/depthwise_conv2_d/w": "iiio",
            "separable_depthwise_conv2_d/~/depthwise_conv2_d_1/w": "iiio",
        },
        id="conv",
    ),
    pytest.param(
        tied,
        [integers(2, 3, below=13)],
        {"embed/embeddings": "io", "linear/w": "io"},
        id="tied",
    ),
]


def make(function, args):
    model = hk.without_apply_rng(hk.transform(function))
    return model, filled(jax.eval_shape(model.init, jax.random.key(0), *args))


@pytest.mark.parametrize("function, args, roles", CASES)
def test_model(function, args, roles):
    model, params = make(function, args)
    plan = jlora.plan(model.apply, params, *args, targets="**")
    assert {path: spec.axes for path, spec in plan.items()} == roles
    check_model(model.apply, params, *args)


@hk.transform_with_state
def net(x, training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(11)(x), training)
    if training:
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
    return hk.Linear(5)(x)


@pytest.mark.parametrize("training", [True, False])
def test_state_random_keys_and_booleans_go_through(training):
    x, key = normal(13, 7), jax.random.key(0)
    params, state = net.init(key, x, True)
    plan = jlora.plan(net.apply, params, state, key, x, training, rank=3)
    tree = randomise(jlora.wrap(params, plan=plan))
    want = net.apply(jlora.merge(tree), state, key, x, training)
    got = quiet(jlora.lift(net.apply), tree, state, key, x, training=training)
    close(got, want)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), got[1], state)
    assert any(jax.tree.leaves(moved)) == training


def test_linear_layers_are_known_by_name():
    _, params = make(CASES[0].values[0], CASES[0].values[1])
    tree = jlora.wrap(params, rank=3, rules=[jlora.Rule("**/linear_1/w", rank=2)])
    ranks = {path: leaf.rank for path, leaf in jlora.adapter(tree).items()}
    assert ranks == {"mlp/~/linear_0/w": 3, "mlp/~/linear_1/w": 2}


@pytest.mark.parametrize(
    "layer, roles",
    [(lambda x: hk.Conv1D(7, 3)(x), "iio"), (stack, "bio")],
    ids=["conv", "stack"],
)
def test_other_kernels_are_told_by_name_and_bias(layer, roles):
    _, params = make(lambda x: hk.Linear(11)(layer(x)), [normal(2, 5, 7)])
    tree = jlora.wrap(params, rank=3)
    found = [x.axes for x in adapted(tree).values() if x.ndim == 3]
    assert found == [roles] * len(found) and found
