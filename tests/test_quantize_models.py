"""Quantised bases in the models of Flax, Equinox and plain trees, and in training.

The oracle is the same model on the dequantised weights.
"""

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from helpers import close, normal, randomise, same
from jax import export
from safetensors.numpy import save_file

import jlora
import jlora.peft

X = normal(5, 64)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        box = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        h = nn.relu(nn.Dense(128, kernel_init=box)(x))
        return jnp.tanh(nn.Dense(64)(h)), None


class Layers(nn.Module):
    """Scanned and rematerialised, with boxes of axis names."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        return stack()(x, None)[0]


class Module(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = (
            nnx.Linear(64, 128, rngs=rngs),
            nnx.Linear(128, 64, rngs=rngs),
        )
        self.embed = nnx.Embed(64, 64, rngs=rngs)

    def __call__(self, x):
        h = self.down(jax.nn.relu(self.up(x))) + self.embed(jnp.arange(5))
        return self.embed.attend(h)


class Equinox(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.linear)(x)


def linen():
    model = Layers()
    return model.apply, model.init(jax.random.key(0), X)


def linen_one():
    model = Block()
    return lambda p, x: model.apply(p, x)[0], model.init(jax.random.key(0), X)


MODELS = {
    "Linen, scanned": linen,
    "Linen": linen_one,
    "NNX": lambda: (lambda m, x: m(x), Module(nnx.Rngs(0))),
    "Equinox": lambda: (
        lambda m, x: m(x),
        Equinox(eqx.nn.Linear(64, 32, key=jax.random.key(0))),
    ),
    "plain": lambda: (
        lambda p, x: x @ p["kernel"] + p["bias"],
        {"kernel": normal(64, 8), "bias": normal(8)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    fn, params = MODELS[name]()
    plan = jlora.plan(fn, params, X, rank=4)
    coded = jlora.quantize(params, "nf4", plan=plan)
    found = jax.tree.leaves(coded, is_leaf=lambda x: isinstance(x, qwix.QArray))
    assert sum(isinstance(x, qwix.QArray) for x in found) == len(plan)
    close(jlora.lift(fn)(coded, X), fn(jlora.merge(coded), X))
    tree = randomise(jlora.wrap(coded, plan=plan))
    close(jax.jit(jlora.lift(fn))(tree, X), fn(jlora.merge(tree), X), 2e-5)
    trains, frozen = jlora.partition(tree)

    def loss(trains, x):
        return (jlora.lift(fn)(jlora.combine(trains, frozen), x) ** 2).mean()

    tx = jlora.optimizer(optax.adamw(1e-2), trains)

    @jax.jit
    def step(trains, state):
        value, grads = jax.value_and_grad(loss)(trains, X)
        updates, state = tx.update(grads, state, trains)
        return optax.apply_updates(trains, updates), state, value

    state, first = tx.init(trains), loss(trains, X)
    for _ in range(5):
        trains, state, value = step(trains, state)
    assert value < first
    whole = jlora.combine(trains, frozen)
    close(jlora.lift(fn)(whole, X), fn(jlora.merge(whole), X), 2e-5)
    before = jax.tree.leaves(jlora.unwrap(whole))
    for x, y in zip(before, jax.tree.leaves(coded), strict=True):
        same(x, y)


def test_a_train_state_wants_floats_and_says_so():
    coded = jlora.quantize({"kernel": normal(64, 8)}, "int8")
    with pytest.raises(ValueError, match="optimizer: 'kernel' holds int8.*partition"):
        jlora.optimizer(optax.adamw(1e-3), jlora.wrap(coded, rank=2))


def test_names_of_torch_come_from_the_floats(tmp_path):
    """Only the factors are in PEFT's file; the values of a quantised base in none."""
    up, down = normal(64, 128), normal(128, 64, seed=2)
    file = {"up.weight": np.asarray(up.T), "down.weight": np.asarray(down.T)}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in file.items()},
        tmp_path / "model.safetensors",
    )
    params = {"up": up, "down": down}
    plan = jlora.plan(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, X, rank=2)
    names = jlora.peft.match(params, tmp_path, plan=plan)
    coded = jlora.quantize(params, "nf4", plan=plan)
    lost = jlora.peft.match(coded, tmp_path, plan=plan)
    assert "it is quantised: match the float params" in str(lost)
    tree = randomise(jlora.wrap(coded, plan=plan), scale=False)
    jlora.peft.save(tmp_path / "a", tree, names=names)
    same(jlora.peft.load(tmp_path / "a", coded, names=names), tree)


def test_what_else_writes_trees():
    """Flax's serialisation, jax.export, and the state of an NNX module."""
    fn, params = linen()
    coded = jlora.quantize(params, "nf4", plan=jlora.plan(fn, params, X))
    written = flax.serialization.to_bytes(coded)
    same(flax.serialization.from_bytes(coded, written), coded)
    coded = nn.unbox(coded)
    tree = randomise(jlora.wrap(coded, plan=jlora.plan(fn, coded, X, rank=2)))
    exported = export.export(jax.jit(jlora.lift(fn)))(tree, X)
    back = export.deserialize(exported.serialize())
    close(back.call(tree, X), jlora.lift(fn)(tree, X))
    fn, module = MODELS["NNX"]()
    whole = jlora.wrap(jlora.quantize(module, "int8"), rank=2)
    again = nnx.merge(*nnx.split(whole))
    close(jlora.lift(fn)(again, X), jlora.lift(fn)(whole, X))
