"""Equinox: modules are the trees, with functions and booleans among their leaves.

Weights are (out, in), so their roles come from a plan.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    adapted,
    base_sized,
    check_model,
    close,
    filled,
    integers,
    normal,
    quiet,
    randomise,
    same,
    silent,
)

import jlora
import jlora.checkpoint

KEY = jax.random.key(0)


def made(module, *args):
    """A module with random arrays, which compiles none of its initialisers."""
    shapes = eqx.filter_eval_shape(module, *args, key=KEY)
    arrays, static = eqx.partition(
        shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )
    return eqx.combine(filled(arrays), static)


def run(module, *args):
    """The module on a batch."""
    return jax.vmap(module)(*args)


class Layer(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, key, inference=True):
        self.up = eqx.nn.Linear(7, 11, key=key)
        self.down = eqx.nn.Linear(11, 7, key=key)
        self.drop = eqx.nn.Dropout(0.5, inference=inference)

    def __call__(self, x, key=None):
        return x + self.down(self.drop(jax.nn.gelu(self.up(x)), key=key))


STACK = made(lambda key: eqx.filter_vmap(Layer)(jax.random.split(key, 5)))


def scanned(stack, x, run=run):
    """The stack's layers, one after another."""
    arrays, static = eqx.partition(stack, eqx.is_array)

    @eqx.filter_checkpoint
    def step(x, layer):
        return run(eqx.combine(layer, static), x), None

    return jax.lax.scan(step, x, arrays)[0]


def members(stack, x, run=run):
    """The stack as an ensemble, an input for each member."""
    return eqx.filter_vmap(run)(stack, x)


class Tied(eqx.Module):
    inner: eqx.nn.Linear
    shared: eqx.nn.Shared

    def __init__(self, key):
        embed = eqx.nn.Embedding(13, 7, key=key)
        head = eqx.nn.Linear(7, 13, use_bias=False, key=key)
        self.inner = eqx.nn.Linear(7, 7, key=key)
        self.shared = eqx.nn.Shared(
            (embed, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )

    def __call__(self, token):
        embed, head = self.shared()
        return head(jnp.tanh(self.inner(embed(token))))


class Images(eqx.Module):
    first: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    back: eqx.nn.ConvTranspose2d

    def __init__(self, key):
        self.first = eqx.nn.Conv2d(5, 14, (3, 2), stride=2, key=key)
        self.grouped = eqx.nn.Conv2d(14, 22, (1, 2), groups=2, key=key)
        self.back = eqx.nn.ConvTranspose2d(22, 13, (3, 2), stride=2, key=key)

    def __call__(self, x):
        return self.back(jnp.tanh(self.grouped(jnp.tanh(self.first(x)))))


def lstm(cell, x):
    def step(state, x):
        state = cell(x, state)
        return state, state[0]

    return jax.vmap(lambda x: jax.lax.scan(step, (jnp.zeros(11),) * 2, x)[1])(x)


def attend(module, x, y):
    return jax.vmap(module)(x, y, y)


HEADS = dict(key_size=13, value_size=13, output_size=17, qk_size=11, vo_size=11)
# A module, how it is called, with what, what is materialised.
WITH_OTHER_LEAVES = [
    pytest.param(made(eqx.nn.MLP, 7, 13, 11, 2), run, [normal(2, 7)], [], id="mlp"),
    pytest.param(STACK, scanned, [normal(2, 7)], [], id="scan-remat"),
    pytest.param(
        made(functools.partial(eqx.nn.MultiheadAttention, 5, 7, **HEADS)),
        attend,
        [normal(2, 3, 7), normal(2, 5, 13)],
        [],
        id="attention",
    ),
    pytest.param(made(Tied), run, [integers(5, below=13)], [], id="tied"),
    pytest.param(
        made(lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(7, 11, key=key))),
        run,
        [normal(2, 7)],
        ["layer/weight"],
        id="weight-norm",
    ),
]
CASES = [
    *WITH_OTHER_LEAVES,
    pytest.param(STACK, members, [normal(5, 2, 7)], [], id="vmap"),
    pytest.param(made(eqx.nn.LSTMCell, 7, 11), lstm, [normal(2, 5, 7)], [], id="lstm"),
    pytest.param(made(Images), run, [normal(2, 5, 5, 7)], [], id="conv"),
]


@pytest.mark.parametrize("module, call, args, formed", CASES)
def test_model(module, call, args, formed):
    """The arrays of the module are the tree, as jax.jit wants it."""
    params, static = eqx.partition(module, eqx.is_array)

    def fn(params, *args):
        return call(eqx.combine(params, static), *args)

    check_model(fn, params, *args, formed=formed)


# ------------------------------------------------- the module itself is the tree


def wrapped(module, call, *args):
    plan = jlora.plan(call, module, *args, rank=3, targets="**")
    return randomise(jlora.wrap(module, plan=plan))


@pytest.mark.parametrize("module, call, args, formed", WITH_OTHER_LEAVES)
def test_modules_are_trees(module, call, args, formed):
    tree, run = wrapped(module, call, *args), silent if formed else quiet
    assert type(tree) is type(module)
    leaves = map(jax.tree.leaves, (module, jlora.unwrap(tree)))
    assert all(old is new for old, new in zip(*leaves, strict=True))
    got = run(eqx.filter_jit(jlora.lift(call)), tree, *args)
    close(got, eqx.filter_jit(call)(jlora.merge(tree), *args))
    report = jlora.explain(call, tree, *args)
    assert {entry.status == "factored" for entry in report} == {not formed}


@eqx.filter_jit
def step(tree, state, tx, x, y):
    """Equinox's own training step, on the lifted function."""

    def loss(tree):
        return ((jlora.lift(run)(tree, x) - y) ** 2).mean()

    value, grads = eqx.filter_value_and_grad(loss)(tree)
    arrays = eqx.filter(tree, eqx.is_inexact_array)
    updates, state = tx.update(grads, state, arrays)
    return eqx.apply_updates(tree, updates), state, value


def test_training():
    module = eqx.nn.MLP(7, 13, 11, 1, key=KEY)
    x, y = normal(5, 7), normal(5, 13, seed=1)
    before = jax.tree.map(np.array, eqx.filter(module, eqx.is_array))
    plan = jlora.plan(run, module, x, rank=3)
    tree = jlora.wrap(module, plan=plan, bias="lora_only")
    assert set(adapted(tree)) == {
        f"layers/{i}/{name}" for i in range(2) for name in ("weight", "bias")
    }
    arrays = eqx.filter(tree, eqx.is_inexact_array)
    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1), arrays)
    state, history = tx.init(arrays), []
    jaxpr, *_ = eqx.filter_make_jaxpr(step)(tree, state, tx, x, y)
    assert base_sized(jaxpr, {7 * 11, 11 * 13}, ["dot_general"]) == 0
    for _ in range(4):
        tree, state, value = quiet(step, tree, state, tx, x, y)
        history.append(value)
    assert history[-1] < history[0]
    same(jax.tree.map(np.array, eqx.filter(jlora.unwrap(tree), eqx.is_array)), before)
    merged = jlora.merge(tree)
    assert merged.activation is module.activation
    close(run(merged, x), jlora.lift(run)(tree, x))


class Block(eqx.Module):
    """Functions with and without a rule, a flag, a rate and a name among its leaves."""

    layer: Layer
    out: eqx.nn.Linear
    activation: object
    name: str

    def __init__(self, key):
        self.layer = Layer(key, inference=False)
        self.out = eqx.nn.Linear(7, 3, key=key)
        self.activation, self.name = jax.nn.relu, "block"

    def __call__(self, x, key):
        return self.out(self.activation(self.layer(x, key=key)))


@pytest.mark.parametrize("through", [jax.jit, eqx.filter_jit])
def test_the_halves_train_under_jax_jit(through):
    """What is no array is static in the frozen half.  The oracle is a step by hand."""
    module, keys = made(Block), jax.random.split(KEY, 5)
    x, y = normal(5, 7), normal(5, 3, seed=1)

    def call(module, x):
        return jax.vmap(module)(x, keys)

    tree = wrapped(module, call, x)
    tx, traces = optax.sgd(1e-3), []

    def step(trainable, state, frozen):
        traces.append(1)

        def loss(trainable):
            out = jlora.lift(call)(jlora.combine(trainable, frozen), x)
            return ((out - y) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    trainable, frozen = jlora.partition(tree)
    assert all(map(eqx.is_array, jax.tree.leaves((trainable, frozen))))
    whole = jlora.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    leaves = map(jax.tree.leaves, (whole, tree))
    assert all(old is new for old, new in zip(*leaves, strict=True))
    run, state, values = through(step), tx.init(trainable), []
    for _ in range(3):
        trainable, state, value = run(trainable, state, frozen)
        values.append(value)
    assert len(traces) == 1 and values[-1] < values[0]
    close(values[0], ((call(jlora.merge(tree), x) - y) ** 2).mean())
    back = jlora.combine(trainable, frozen)
    assert back.activation is jax.nn.relu and back.layer.drop.inference is False
    # The flag is part of the structure.
    quiet_half = jlora.partition(eqx.nn.inference_mode(tree))[1]
    assert run(trainable, state, quiet_half)[2] != value and len(traces) == 2


def test_the_optimizer_takes_the_module_as_it_is():
    """Only its structure is read, and wrap, lift and merge take it too."""
    module = eqx.nn.MLP(7, 13, 11, 1, key=KEY)
    tree = jlora.wrap(module, plan=jlora.plan(run, module, normal(5, 7)))
    tx = jlora.optimizer(optax.adam(1e-2), tree)
    tx.init(eqx.filter(tree, eqx.is_inexact_array))


class Norm(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    layer: Layer

    def __init__(self, key):
        self.first = eqx.nn.Linear(5, 7, key=key)
        self.norm = eqx.nn.BatchNorm(7, axis_name="batch", mode="batch")
        self.layer = Layer(key, inference=False)

    def __call__(self, x, state, key):
        x, state = self.norm(self.first(x), state)
        return self.layer(x, key=key), state


def test_state_keys_and_inference_mode():
    def call(module, state, x, keys):
        axes = dict(in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
        return jax.vmap(module, **axes)(x, state, keys)

    module, state = eqx.nn.make_with_state(Norm)(KEY)
    args = normal(13, 5), jax.random.split(KEY, 13)
    tree = wrapped(module, call, state, *args)
    outs = []
    for each in tree, eqx.nn.inference_mode(tree):
        out = quiet(eqx.filter_jit(jlora.lift(call)), each, state, *args)
        close(out, eqx.filter_jit(call)(jlora.merge(each), state, *args))
        outs.append(out[0])
        state = out[1]
    assert not np.allclose(*outs, atol=1e-3)


@pytest.mark.parametrize(
    "through, x",
    [
        pytest.param(scanned, normal(2, 7), id="scan"),
        pytest.param(members, normal(5, 2, 7), id="vmap"),
    ],
)
def test_lifted_inside_of_the_users_own_loop(through, x):
    """Adapted modules are sliced as modules are, and each slice is lifted."""
    tree = wrapped(STACK, through, x)
    got = quiet(eqx.filter_jit(through), tree, x, jlora.lift(run))
    close(got, eqx.filter_jit(through)(jlora.merge(tree), x))


def test_checkpoint(tmp_path):
    module = eqx.nn.MLP(7, 13, 11, 1, key=KEY)
    tree = wrapped(module, run, normal(5, 7))
    jlora.checkpoint.save(tmp_path / "adapter", tree)
    back = jlora.checkpoint.restore(tmp_path / "adapter", module)
    assert isinstance(back, eqx.nn.MLP)
    same(jlora.adapter(back), jlora.adapter(tree))
