"""Each variant on the whole way: plan, wrap, train under jit, save, restore, merge.

On Linen with scanned and rematerialised layers, on NNX, and on plain functions.  What
was saved is restored in another process, one for all, and gives the same bits.
"""

import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close, integers, normal, same

import jlora
import jlora.checkpoint

IDS, GOAL = integers(4, 6, below=11), integers(4, 6, below=11, seed=1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(12)(nn.gelu(nn.Dense(16)(x)))
        return x + y, None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 12)
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = layers()(embed(ids), None)
        return embed.attend(x)


class Object(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 12, rngs=rngs)
        self.up = nnx.Linear(12, 16, rngs=rngs)
        self.down = nnx.Linear(16, 12, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        return self.embed.attend(x + self.down(nnx.gelu(self.up(x))))


def plain(p, ids):
    x = p["embed"][ids]
    y = jax.nn.gelu(x @ p["up"]["w"] + p["up"]["bias"])
    return (x + y @ p["down"]["w"] + p["down"]["bias"]) @ p["embed"].T


def models():
    """A function of params, and the params, by name."""
    object_ = Object(nnx.Rngs(0))
    graph, state = nnx.split(object_)
    return {
        "linen": (Scanned().apply, Scanned().init(jax.random.key(0), IDS)),
        "nnx": (lambda s, ids: nnx.merge(graph, s)(ids), nnx.to_pure_dict(state)),
        "plain": (
            plain,
            {
                "embed": normal(11, 12),
                "up": {"w": normal(12, 16, scale=0.3), "bias": normal(16)},
                "down": {"w": normal(16, 12, scale=0.3), "bias": normal(12)},
            },
        ),
    }


# What `wrap` gets, and what the optimizer does.
VARIANTS = {
    "dora, rslora, lora_bias, orthogonal, lora+": dict(
        dora=True, rslora=True, lora_bias=True, init="orthogonal", b_lr_ratio=8
    ),
    "rows, pissa, dora": dict(
        train_rows={"**/embed*": [7, 3]}, init="pissa", dora=True
    ),
    "olora, lora_fa": dict(init="olora", first=jlora.lora_fa),
    "eva, riemannian": dict(init="eva", first=jlora.riemannian),
}


def trained(fn, params, options):
    """The tree after 20 steps, and the losses."""
    options = dict(options)
    ratio, first = options.pop("b_lr_ratio", None), options.pop("first", None)
    plan = jlora.plan(fn, params, IDS, rank=2, alpha=4)
    if options.get("init") == "eva":
        moments = jlora.observe(fn, params, IDS, plan=plan)
        plan = jlora.redistribute(plan, moments)
        options["init"] = jlora.initializers.eva(moments)
    tree = jlora.wrap(params, plan=plan, **options)
    lifted = jlora.lift(fn)
    tx = optax.adamw(1e-2)
    tx = optax.chain(first(tree), tx) if first else tx
    tx = jlora.optimizer(tx, tree, b_lr_ratio=ratio)

    def loss(tree):
        logits = lifted(tree, IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, GOAL).mean()

    @jax.jit
    def run(tree):
        def step(carry, _):
            tree, state = carry
            value, grads = jax.value_and_grad(loss)(tree)
            updates, state = tx.update(grads, state, tree)
            return (optax.apply_updates(tree, updates), state), value

        return jax.lax.scan(step, (tree, tx.init(tree)), length=20)

    (moved, _), values = run(tree)
    same(jlora.unwrap(moved), jlora.unwrap(tree))
    assert values[-1] < values[0] - 0.01, values
    return moved


def outputs(fn, tree):
    lifted = jlora.lift(fn)
    call = jax.jit(
        lambda t: {"lifted": lifted(t, IDS), "merged": fn(jlora.merge(t), IDS)}
    )
    return call(tree)


def restored(folder):
    """Run in another process: every saved adapter on its base, and what it gives."""
    for name, (fn, params) in models().items():
        for path in sorted(pathlib.Path(folder).glob(f"{name}-*")):
            base = params
            if (path.parent / f"base-{path.name}.npz").exists():
                arrays = np.load(path.parent / f"base-{path.name}.npz")
                leaves, treedef = jax.tree.flatten(params)
                base = treedef.unflatten(arrays[f"arr_{k}"] for k in range(len(leaves)))
            tree = jlora.checkpoint.restore(path, base)
            np.savez(f"{path}.out.npz", **outputs(fn, tree))


@pytest.mark.slow
def test_every_variant_on_every_model(tmp_path):
    want = {}
    for name, (fn, params) in models().items():
        for variant, options in VARIANTS.items():
            tree = trained(fn, params, options)
            path = tmp_path / f"{name}-{variant}"
            jlora.checkpoint.save(path, tree)
            if options.get("init") in ("pissa", "olora"):  # which change the base
                own = jlora.unwrap(tree)
                np.savez(tmp_path / f"base-{path.name}.npz", *jax.tree.leaves(own))
            want[path] = outputs(fn, tree)
            close(want[path]["lifted"], want[path]["merged"], 1e-5, path.name)
    code = f"import test_family; test_family.restored({str(tmp_path)!r})"
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    for path, outs in want.items():
        found = np.load(f"{path}.out.npz")
        for key, value in outs.items():
            np.testing.assert_array_equal(found[key], value, err_msg=path.name)
    assert jnp.size(outs["merged"]) == 4 * 6 * 11
