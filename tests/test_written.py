"""What other libraries write of an adapted tree, and read again.

jax.export writes a function with the structure of its arguments.  Its oracle is the
function itself, under jit.
"""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from bases import on_int8
from flax import nnx
from helpers import normal, randomise, same
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


def test_export_to_another_process(tmp_path):
    pytest.importorskip("flatbuffers")
    tree, fn = CASES["step"]()
    (tmp_path / "step").write_bytes(export.export(jax.jit(fn))(tree, X).serialize())
    code = """
        import pathlib, sys
        sys.path[:0] = sys.argv[2:]
        import jax, jlora, test_written
        tree = test_written.CASES["step"]()[0]
        step = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
        for x in jax.tree.leaves(step.call(tree, test_written.X)):
            print(x.tobytes().hex())
    """
    here = pathlib.Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "step", here],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    want = jax.tree.leaves(jax.jit(fn)(tree, X))
    assert run.stdout.split() == [x.tobytes().hex() for x in want]


def test_export_of_what_told_the_roles():
    """It is static, but trees are not compared by it."""
    pytest.importorskip("flatbuffers")
    tree = CASES["told"]()[0]
    exported = export.export(jax.jit(lambda tree: tree))(tree)
    back = export.deserialize(exported.serialize()).call(tree)
    told = [str(t["up"]["kernel"].told) for t in (tree, back)]
    assert told == ["name or shape"] * 2
