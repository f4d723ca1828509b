"""What other libraries write of an adapted tree, and read again.

jax.export writes a function with the structure of its arguments.  Its oracle is the
function itself, under jit.  Flax's serialisation writes the tree.
"""

import os
import pathlib
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from bases import on_int8
from flax import nnx, serialization
from flax.training.train_state import TrainState
from helpers import normal, randomise, same, says
from jax import export

import jlora
import jlora.loralib

X = normal(11, 5, seed=1)


def params():
    return {
        "up": {"kernel": normal(5, 6), "bias": normal(6)},
        "down": {"kernel": normal(6, 5)},
    }


def mlp(p, x):
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    return h @ p["down"]["kernel"]


def wrapped(params=params, **kwargs):
    plan = jlora.plan(mlp, params(), X, rank=2, rules=kwargs.pop("rules", ()))
    return randomise(jlora.wrap(params(), plan=plan, **kwargs))


def stack():
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    p = {"w": normal(3, 5, 5)}
    tree = jlora.wrap(p, plan=jlora.plan(fn, p, X, rank=2))
    return randomise(tree), jlora.lift(fn)


def blocks():
    rule = jlora.Rule("up/kernel", form=jlora.loralib.Blocks((True, False, True)))
    return wrapped(rules=[rule, jlora.Rule("**/kernel")])


def convolution():
    def fn(p, x):
        images = jnp.resize(x, (2, 7, 7, 3))
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, p["kernel"], (1, 1), "SAME", dimension_numbers=dims
        )

    p = {"kernel": normal(3, 3, 3, 4)}
    rule = jlora.Rule("kernel", form=jlora.loralib.Kernel())
    plan = jlora.plan(fn, p, X, rank=2, rules=[rule])
    return randomise(jlora.wrap(p, plan=plan)), jlora.lift(fn)


def of_module():
    """The state of a module of NNX as a dict: jax.export does not know nnx.State."""
    module = jlora.wrap(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rank=2)
    tree = randomise(nnx.to_pure_dict(nnx.state(module)))
    return tree, jlora.lift(lambda p, x: x @ p["kernel"] + p["bias"])


def step(tree, x):
    """A training step: adapted leaves come out, too."""
    loss = jax.grad(lambda tree, x: (jlora.lift(mlp)(tree, x) ** 2).sum())
    return jax.tree.map(lambda w, g: w - 0.1 * g, tree, loss(tree, x))


def of_half(trainable, x):
    frozen = jlora.partition(wrapped())[1]
    return jlora.lift(mlp)(jlora.combine(trainable, frozen), x)


def of_adapter(adapter, x):
    return jlora.lift(mlp)(jlora.attach(params(), adapter), x)


def faded(tree):
    return jlora.fade(tree, 1.0, noise=1.0, key=jax.random.key(4))


LIFTED = jlora.lift(mlp)
# Makes a tree, and the function of it and of X.
CASES = {
    "dict": lambda: (wrapped(), LIFTED),
    "told": lambda: (randomise(jlora.wrap(params(), rank=2)), LIFTED),
    "full": lambda: (wrapped(train="up/bias"), LIFTED),
    "output-bias": lambda: (wrapped(lora_bias=True), LIFTED),
    "stack": stack,
    "blocks": lambda: (blocks(), LIFTED),
    "kernel": convolution,
    "dropout": lambda: (jlora.dropout(wrapped(), 0.5, jax.random.key(3)), LIFTED),
    "dropped": lambda: (jlora.drop_base(wrapped(), force=True), LIFTED),
    "statistics": lambda: (faded(wrapped()), LIFTED),
    "another-base": lambda: (wrapped(lambda: on_int8(params())[0]), LIFTED),
    "adapter": lambda: (jlora.adapter(wrapped()), of_adapter),
    "half": lambda: (jlora.partition(wrapped())[0], of_half),
    "nnx": of_module,
    "step": lambda: (wrapped(train="up/bias"), step),
}


@pytest.mark.parametrize("name", CASES)
def test_export(name):
    pytest.importorskip("flatbuffers")  # which jax.export needs to write
    tree, fn = CASES[name]()
    exported = export.export(jax.jit(fn))(tree, X)
    back = export.deserialize(exported.serialize())
    assert back.in_tree == exported.in_tree == jax.tree.structure(((tree, X), {}))
    same(back.call(tree, X), jax.jit(fn)(tree, X))


def elsewhere(code, *args):
    """Runs code in another process; returns what it printed."""
    here = pathlib.Path(__file__).parent
    places = os.pathsep.join(map(str, (here.parent, here, *sys.path)))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_export_to_another_process(tmp_path):
    pytest.importorskip("flatbuffers")
    tree, fn = CASES["step"]()
    (tmp_path / "step").write_bytes(export.export(jax.jit(fn))(tree, X).serialize())
    code = """
        import pathlib, sys
        import jax, jlora, test_written
        tree = test_written.CASES["step"]()[0]
        step = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
        for x in jax.tree.leaves(step.call(tree, test_written.X)):
            print(x.tobytes().hex())
    """
    want = jax.tree.leaves(jax.jit(fn)(tree, X))
    got = elsewhere(code, tmp_path / "step").split()
    assert got == [x.tobytes().hex() for x in want]


def test_export_of_what_told_the_roles():
    """It is static, but trees are not compared by it."""
    pytest.importorskip("flatbuffers")
    tree = CASES["told"]()[0]
    exported = export.export(jax.jit(lambda tree: tree))(tree)
    back = export.deserialize(exported.serialize()).call(tree)
    told = [str(t["up"]["kernel"].told) for t in (tree, back)]
    assert told == ["name or shape"] * 2


# -------------------------------------------------------- Flax's serialisation


@pytest.mark.parametrize("name", CASES)
def test_state(name):
    """The template has the structure, and other numbers."""
    tree, _ = CASES[name]()
    template = jax.tree.map(lambda x: x if x.dtype.name == "key<fry>" else 0 * x, tree)
    same(serialization.from_bytes(template, serialization.to_bytes(tree)), tree)
    state = serialization.to_state_dict(tree)
    shapes = jax.eval_shape(lambda: tree)
    same(serialization.from_state_dict(shapes, state), tree)


def boxed():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    layer = nn.Dense(4, kernel_init=init)
    return jlora.wrap(layer.init(jax.random.key(0), X), rank=2)


@pytest.mark.parametrize("make", [wrapped, boxed])
def test_train_state(make):
    tree = make()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    tx = jlora.optimizer(tx, tree)
    old = TrainState.create(apply_fn=None, params=tree, tx=tx)
    new = old
    for _ in range(2):
        new = new.apply_gradients(grads=jax.tree.map(jnp.ones_like, new.params))
    back = serialization.from_bytes(old, serialization.to_bytes(new))
    assert jax.tree.structure(back) == jax.tree.structure(new)
    same(back.params, new.params), same(back.opt_state, new.opt_state)
    assert back.step == 2


PLAIN = "state of plain params", "jlora.unwrap(tree)", "jlora.attach(params, "


@pytest.mark.parametrize(
    "saved, template, parts",
    [
        pytest.param(
            params,
            wrapped,
            ["'down/kernel' is an array of shape (6, 5)", "w, a, b, scale", *PLAIN],
            id="plain",
        ),
        pytest.param(
            lambda: TrainState.create(apply_fn=None, params=params(), tx=optax.sgd(1)),
            lambda: TrainState.create(apply_fn=None, params=wrapped(), tx=optax.sgd(1)),
            ["'params/down/kernel' is an array", *PLAIN],
            id="train-state",
        ),
        pytest.param(
            params,
            lambda: jlora.wrap(params(), targets=[], train="up/bias"),
            ["'up/bias' is an array", "Full (w, value, on)", *PLAIN],
            id="full",
        ),
        pytest.param(
            lambda: jlora.wrap(params(), rank=3),
            wrapped,
            ["a of 'down/kernel'", "(6, 3) in the state", "(6, 2)", "as the saved one"],
            id="rank",
        ),
        pytest.param(
            lambda: wrapped(lora_bias=True),
            wrapped,
            ["c of 'down/kernel'", "(5,) in the state: expected nothing"],
            id="output-bias",
        ),
        pytest.param(
            wrapped,
            lambda: wrapped(lora_bias=True),
            ["c of 'down/kernel' is nothing", "expected an array of shape (5,)"],
            id="no-output-bias",
        ),
        pytest.param(
            wrapped,
            lambda: jlora.drop_base(wrapped(), force=True),
            ["'down/kernel/w' is an array of shape (6, 5)", "a Dropped"],
            id="dropped",
        ),
        pytest.param(
            lambda: wrapped(lambda: on_int8(params())[0]),
            wrapped,
            ["w of 'down/kernel' is a dict", "expected an array of shape (6, 5)"],
            id="another-base",
        ),
    ],
)
def test_state_of_another_tree(saved, template, parts):
    state = serialization.to_state_dict(saved())
    with pytest.raises(ValueError) as error:
        serialization.from_state_dict(template(), state)
    says(error, "from_state_dict", *parts)


def test_flax_may_be_imported_after_the_tree_was_made():
    code = """
        import sys
        import jax.numpy as jnp, jlora

        params = {"kernel": jnp.ones((3, 4))}
        tree = jlora.wrap(params, rank=2)
        finders = len(sys.meta_path)
        assert "flax" not in sys.modules

        import flax.serialization

        assert len(sys.meta_path) == finders - 1
        data = flax.serialization.to_bytes(tree)
        print(flax.serialization.from_bytes(tree, data)["kernel"].rank)
        try:
            flax.serialization.from_state_dict(tree, params)
        except ValueError as error:
            print(error)
    """
    says(elsewhere(code), "2\n", *PLAIN)
