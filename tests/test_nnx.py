"""Flax NNX: its state as the tree, and its modules as objects that are written to.

Of a module's variables those are counted that its call writes: running statistics,
random counts, caches. They have to end as the plain module's do.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    base_sized,
    bits,
    check_model,
    close,
    integers,
    normal,
    quiet,
    randomise,
    same,
    says,
    silent,
)

import jlora
import jlora.checkpoint
import jlora.nnx


def run(module, *args):
    return module(*args)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(7, 11, rngs=rngs)
        self.norm = nnx.BatchNorm(11, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(11, 7, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(jnp.tanh(self.norm(self.up(x)))))


class Images(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(5, 7, (3, 2), strides=2, rngs=rngs)
        self.back = nnx.ConvTranspose(7, 11, (3, 2), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.back(jnp.tanh(self.conv(x)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(13, 7, rngs=rngs)
        self.inner = nnx.Linear(7, 7, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.inner(self.embed(ids))))


class Shared(nnx.Module):
    """One variable in two places."""

    def __init__(self, rngs):
        self.first = nnx.Linear(7, 7, rngs=rngs)
        self.last = nnx.Linear(7, 7, rngs=rngs)
        self.last.kernel = self.first.kernel

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


@nnx.vmap(in_axes=0, out_axes=0)
def nets(rngs):
    return Net(rngs)


def stacked(rngs):
    return nets(rngs.split(5))


def layers(module, x, run=run):
    """The stack's layers, one after another."""
    body = nnx.remat(lambda x, layer: run(layer, x))
    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, module)


def members(module, x, run=run):
    """The stack as an ensemble, an input for each member."""
    return nnx.vmap(run)(module, x)


def attention(rngs, **options):
    options = dict(qkv_features=55, out_features=17, decode=False) | options
    return nnx.MultiHeadAttention(5, 7, rngs=rngs, **options)


def attend(module, *args):
    return module(*args, deterministic=False)


def lstm(rngs):
    return nnx.RNN(nnx.LSTMCell(7, 11, rngs=rngs), rngs=rngs)


across = functools.partial(attention, in_kv_features=13, dropout_rate=0.5)


def caching(rngs):
    module = attention(rngs, decode=True)
    module.init_cache((2, 3, 7))
    return module


def decode(module, x):
    return jnp.stack([module(x[:, i : i + 1]) for i in range(2)])


IDS = integers(2, 3, below=13)
CASES = [
    # How a module is made, how it is called, with what.
    pytest.param(stacked, layers, [normal(13, 7)], id="scan-remat"),
    pytest.param(stacked, members, [normal(5, 13, 7)], id="vmap"),
    pytest.param(across, attend, [normal(2, 3, 7), normal(2, 5, 13)], id="attention"),
    pytest.param(lstm, run, [normal(2, 5, 7)], id="lstm"),
    pytest.param(Images, run, [normal(2, 3, 5, 5)], id="conv"),
    pytest.param(Tied, run, [IDS], id="tied"),
    pytest.param(Shared, run, [normal(2, 7)], id="shared"),
]


# ------------------------------------------------------------ the functional API


@pytest.mark.parametrize("make, call, args", CASES)
def test_model(make, call, args):
    """State is the tree, and what is no parameter an argument: a call writes to it."""
    graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, rest, *args):
        return call(nnx.merge(graphdef, params, rest, copy=True), *args)

    check_model(fn, params, rest, *args)


# ---------------------------------------------------------------- the object API


def wrapped(make, call, *args):
    """A module with random factors, and the plain one that it has to be like."""
    plan = jlora.plan(call, make(nnx.Rngs(0)), *args, rank=3)
    module = randomise(jlora.wrap(make(nnx.Rngs(0)), plan=plan))
    return module, jlora.merge(module)


def written(module):
    """All variables that are no parameters, random keys among them."""
    state = nnx.state(module, nnx.Not(nnx.Param))
    return [jnp.asarray(bits(x)) for x in jax.tree.leaves(state)]


def graded(call):
    """As in a loss, with the outputs beside it."""

    def run(module, *args):
        def loss(module):
            out = call(module, *args)
            return (out**2).sum(), out

        return nnx.grad(loss, has_aux=True)(module)[1]

    return run


MODES = [
    pytest.param(lambda call: call, id="eager"),
    pytest.param(nnx.jit, id="jit"),
    pytest.param(lambda call: nnx.jit(graded(nnx.remat(call))), id="jit-grad-remat"),
]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_call_writes_is_in_the_module(mode):
    x = normal(13, 7)
    module, plain = wrapped(Net, run, x)
    before, lifted = written(module), mode(jlora.lift(run))
    for _ in range(3):
        close(quiet(lifted, module, x), mode(run)(plain, x))
        close(written(module), written(plain))
    assert module.drop.rngs.count[...] == 3
    assert (module.norm.mean[...] != 0).all()
    assert len(before) == 4
    for each in module, plain:
        each.eval()
    close(quiet(lifted, module, x), mode(run)(plain, x))
    close(written(module), written(plain))


@pytest.mark.parametrize(
    "make, call, args",
    [
        pytest.param(stacked, layers, [normal(13, 7)], id="scan-remat"),
        pytest.param(
            across, attend, [normal(2, 3, 7), normal(2, 5, 13)], id="attention-dropout"
        ),
        pytest.param(caching, decode, [normal(2, 3, 7)], id="attention-cache"),
        pytest.param(lstm, run, [normal(2, 5, 7)], id="lstm"),
    ],
)
def test_what_other_modules_write(make, call, args):
    module, plain = wrapped(make, call, *args)
    before = written(module)
    for _ in range(2):
        close(quiet(jlora.lift(call), module, *args), call(plain, *args))
        close(written(module), written(plain))
    assert any((x != y).any() for x, y in zip(before, written(module), strict=True))


@pytest.mark.parametrize(
    "through, x",
    [
        pytest.param(layers, normal(13, 7), id="scan"),
        pytest.param(members, normal(5, 13, 7), id="vmap"),
    ],
)
def test_lifted_inside_of_nnx_transformations(through, x):
    """The other way round: NNX slices the adapted modules, and each is lifted."""
    module, plain = wrapped(stacked, through, x)
    close(quiet(through, module, x, jlora.lift(run)), through(plain, x))
    close(written(module), written(plain))


def train(module, optimizer, x, y):
    """A user's own step."""

    def loss(module):
        return ((jlora.lift(run)(module, x) - y) ** 2).mean()

    value, grads = nnx.value_and_grad(loss)(module)
    optimizer.update(module, grads)
    return value


def test_training():
    x, y = normal(13, 7), normal(13, 7, seed=1)
    plain = Net(nnx.Rngs(0))
    module = jlora.wrap(plain, rank=3, train=["norm/scale"], bias="lora_only")
    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1), module)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.state(plain, nnx.Param))
    frozen, mean = np.array(module.norm.bias[...]), np.array(module.norm.mean[...])

    def step(state, x, y):
        return train(*nnx.merge(graphdef, state), x, y)

    graphdef, state = nnx.split((module, optimizer))
    jaxpr = quiet(jax.make_jaxpr(step), state, x, y)
    assert base_sized(jaxpr, {7 * 11}, ["dot_general"]) == 0

    def evaluate(module, call):
        module.eval()
        value = float(((call(module, x) - y) ** 2).mean())
        module.train()
        return value

    first, step = evaluate(module, jlora.lift(run)), nnx.jit(train)
    for _ in range(8):
        quiet(step, module, optimizer, x, y)
    last = evaluate(module, jlora.lift(run))
    assert last < first
    same(jax.tree.map(np.array, nnx.state(jlora.unwrap(module), nnx.Param)), before)
    same(np.array(module.norm.bias[...]), frozen)
    assert (module.norm.mean[...] != mean).all()
    merged = jlora.merge(module)
    assert isinstance(merged, Net)
    np.testing.assert_allclose(evaluate(merged, run), last, rtol=1e-5)
    # The module that was wrapped has variables of its own.
    same(np.array(plain.norm.mean[...]), mean)
    same(jax.tree.map(np.array, nnx.state(plain, nnx.Param)), before)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda m: jlora.optimizer(optax.MultiSteps(optax.adam(1e-2), 2), m),
            id="steps-inside",
        ),
        pytest.param(
            lambda m: jlora.optimizer(optax.apply_if_finite(optax.adam(1e-2), 2), m),
            id="finite-inside",
        ),
        pytest.param(
            lambda m: optax.chain(
                optax.clip(0.1), jlora.optimizer(optax.adam(1e-2), m), optax.scale(0.5)
            ),
            id="chain-outside",
        ),
    ],
)
@pytest.mark.parametrize("jit", [nnx.jit, lambda fn: fn], ids=["jit", "eager"])
def test_wrappers_of_optax(make, jit):
    """Those that keep trees go inside; several steps, since NNX keeps their state."""
    x, y = normal(5, 7), normal(5, 11, seed=1)
    plain = nnx.Linear(7, 11, rngs=nnx.Rngs(0))
    module = jlora.wrap(plain, rank=3)
    optimizer = nnx.Optimizer(module, make(module), wrt=nnx.Param)
    step = jit(train)
    values = [quiet(step, module, optimizer, x, y) for _ in range(5)]
    assert values[-1] < values[0]
    same(module.kernel.get_value().w, plain.kernel[...])


def test_lbfgs():
    """Its line search calls a function of the module's state."""
    x, y = normal(5, 7), normal(5, 11, seed=1)
    module = jlora.wrap(nnx.Linear(7, 11, rngs=nnx.Rngs(0)), rank=3)
    graph, state = nnx.split(module)
    before = nnx.as_pure(state)["kernel"]

    def loss(state):
        return ((jlora.lift(run)(nnx.merge(graph, state), x) - y) ** 2).mean()

    def step(module, optimizer):
        state = nnx.state(module)
        value, grads = jax.value_and_grad(loss)(state)
        optimizer.update(module, grads, value=value, grad=grads, value_fn=loss)
        return value

    tx = jlora.optimizer(optax.lbfgs(memory_size=2), module)
    optimizer, jitted = nnx.Optimizer(module, tx, wrt=nnx.Param), nnx.jit(step)
    got = [quiet(jitted, module, optimizer) for _ in range(4)]

    half, frozen = jlora.partition({"kernel": before})
    bias = nnx.as_pure(state)["bias"]

    def of_half(half):
        tree = jlora.combine(half, frozen)
        out = jlora.lift(lambda p, x: x @ p["kernel"] + bias)(tree, x)
        return ((out - y) ** 2).mean()

    tx, want = optax.lbfgs(memory_size=2), []
    opt_state = tx.init(half)

    @jax.jit
    def step_of_half(half, opt_state):
        value, grad = jax.value_and_grad(of_half)(half)
        updates, opt_state = tx.update(
            grad, opt_state, half, value=value, grad=grad, value_fn=of_half
        )
        return optax.apply_updates(half, updates), opt_state, value

    for _ in range(4):
        half, opt_state, value = step_of_half(half, opt_state)
        want.append(value)
    assert got[-1] < 0.9 * got[0]
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_a_bare_optimizer_would_decay_the_base():
    x, y = normal(5, 7), normal(5, 11, seed=1)
    plain = nnx.Linear(7, 11, rngs=nnx.Rngs(0))
    adamw = optax.adamw(1e-2, weight_decay=0.1)

    def moved(choose):
        module = jlora.wrap(plain, rank=3)
        optimizer = nnx.Optimizer(module, choose(module), wrt=nnx.Param)
        quiet(nnx.jit(train), module, optimizer, x, y)
        return np.abs(module.kernel.get_value().w - plain.kernel[...]).max()

    assert moved(lambda module: adamw) > 1e-4
    assert moved(lambda module: jlora.optimizer(adamw, module)) == 0


def test_the_base_arrays_are_the_modules_own():
    plain = Net(nnx.Rngs(0))
    module = jlora.wrap(plain, rank=3)
    assert module.up.kernel.get_value().w is plain.up.kernel[...]
    assert jlora.unwrap(module).up.kernel[...] is plain.up.kernel[...]
    assert list(jlora.adapter(module)) == ["down/kernel", "up/kernel"]


def test_statistics_are_no_weights():
    def norm(module, x):
        return module(x)

    module = nnx.SpectralNorm(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert list(jlora.plan(norm, module, normal(7, 5))) == ["layer_instance/kernel"]


def test_a_call_that_writes_into_an_adapted_variable():
    def norm(module, x):
        return module(x)

    module = nnx.WeightNorm(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    tree = jlora.wrap(module, plan=jlora.plan(norm, module, normal(7, 5)))
    with pytest.raises(ValueError, match=r"norm writes .* \(5, 3\).*Exclude its path"):
        silent(jlora.lift(norm), tree, normal(7, 5))


def test_filters_that_select_no_adapter():
    wrapped = jlora.wrap(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), rank=2)
    tx = jlora.optimizer(optax.adam(0.1), wrapped)
    with pytest.raises(ValueError, match="wrapped module is optimised wrt=nnx.Param"):
        nnx.Optimizer(wrapped, tx, wrt=nnx.LoRAParam)
    layer = jlora.nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="by plain optax, wrt=nnx.LoRAParam"):
        jlora.optimizer(optax.adam(0.1), layer)
    for said in ({"targets": nnx.Param}, {"train": nnx.BatchStat}):
        with pytest.raises(TypeError, match="a glob.*Filters of NNX are for its own"):
            jlora.wrap(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), **said)


def test_a_call_without_lift_says_so():
    with pytest.raises(TypeError) as error:
        jlora.wrap(Net(nnx.Rngs(0)), rank=3)(normal(5, 7))
    says(error, "jlora.lift", "adapted leaf")


def test_abstract_modules_are_planned_and_explained():
    module = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    tree = jlora.wrap(module, plan=jlora.plan(run, module, normal(5, 7)))
    report = jlora.explain(run, tree, normal(5, 7))
    assert {entry.status for entry in report} == {"factored"}


def test_checkpoint_of_a_module_with_random_keys(tmp_path):
    module = randomise(jlora.wrap(Net(nnx.Rngs(0)), rank=3))
    jlora.checkpoint.save(tmp_path / "adapter", module)
    back = jlora.checkpoint.restore(tmp_path / "adapter", Net(nnx.Rngs(1)))
    same(jlora.adapter(back), jlora.adapter(module))


def test_dropout_in_the_loss_keeps_what_the_call_writes():
    x, module = normal(13, 7), jlora.wrap(Net(nnx.Rngs(0)), rank=3)

    def loss(module):
        dropped = jlora.dropout(module, 0.1, jax.random.key(0))
        return (jlora.lift(run)(dropped, x) ** 2).mean()

    nnx.grad(loss)(module)
    assert module.drop.rngs.count[...] == 1
    assert (module.norm.mean[...] != 0).all()


def test_a_variable_in_two_places_stays_one_or_is_refused():
    with contextlib.suppress(ValueError):
        module = jlora.wrap(Shared(nnx.Rngs(0)), rank=3)
        assert module.first.kernel is module.last.kernel


def test_variables_that_a_call_makes_are_kept_or_refused():
    def first(module, x):
        module.init_cache(x.shape)
        return module(x[:, :1])

    make = functools.partial(attention, decode=True)
    with contextlib.suppress(ValueError):
        module, _ = wrapped(make, first, normal(2, 3, 7))
        jlora.lift(first)(module, normal(2, 3, 7))
        assert module.cache_index[...] == 1
