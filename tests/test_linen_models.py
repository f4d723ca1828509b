"""Models of Flax Linen's own layers: loops, ensembles, recurrence, attention, boxes.

`check_model` is what must hold of a model of any framework; the modules of the others
import it from here. (What jlora.linen has of its own is test_linen.py.)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    EVERYTHING,
    adapt,
    adapted,
    base_sized,
    check_lift,
    close,
    normal,
    quiet,
    same,
    silent,
)

import jlora


def check_model(fn, params, *args, formed=(), targets=EVERYTHING):
    """All that must hold of `fn(params, *args)`, whatever it was written in.

    `formed` are the paths that have to be materialised. No activation and no factor
    may have as many elements as an adapted weight, or as a layer of a stacked one.
    """
    tree, plan = adapt(fn, params, *args, targets=targets)
    status = {path: "materialised" if path in formed else "factored" for path in plan}
    report = jlora.explain(fn, tree, *args)
    assert {entry.path: entry.status for entry in report} == status
    # Boxes and NNX's variables, which a path leaves out, are seen by the oracle.
    roles = {path: plan[path.removesuffix("/value")] for path in adapted(tree)}
    assert len(roles) == len(plan)
    check_lift(fn, tree, roles, *args, factored=not formed, modes=False)

    forward = jax.jit(fn).trace(params, *args)
    plain, lifted, tx = forward.lower().compile(), jlora.lift(fn), optax.adam(1e-2)
    # What another adapter makes of the same input is something that can be learnt.
    goal = jax.tree.leaves(plain(jlora.merge(tree), *args))

    def step(trainable, state, frozen, *args):
        def loss(trainable):
            out = lifted(jlora.combine(trainable, frozen), *args)
            pairs = zip(jax.tree.leaves(out), goal, strict=True)
            return sum(jnp.mean((y - z) ** 2) for y, z in pairs), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value, out

    trainable, frozen = jlora.partition(jlora.wrap(params, plan=plan, rank=3))
    state, before = tx.init(trainable), jax.tree.map(np.array, params)
    run = silent if formed else quiet
    traced = run(jax.jit(step).trace, trainable, state, frozen, *args)
    leaves = adapted(tree).values()
    sizes = {n for x in leaves for n in (x.w.size, x.w.size // x.scale.size)}
    count, allowed = (base_sized(x.jaxpr, sizes) for x in (traced, forward))
    assert allowed < count if formed else allowed == count == 0, (allowed, count)

    step, history = traced.lower().compile(), []
    for _ in range(4):
        tree = jlora.combine(trainable, frozen)
        trainable, state, *seen = step(trainable, state, frozen, *args)
        history.append(seen)
    close(history[0][1], plain(params, *args), what="at the start")
    assert history[-1][0] < history[0][0]
    close(plain(jlora.merge(tree), *args), history[-1][1], what="merged")
    same(jax.tree.map(np.array, jlora.unwrap(tree)), before)


class Block(nn.Module):
    """With the (carry, xs) signature of nn.scan; the ys are of one number a layer."""

    boxed: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, ("in", "out"))
        h = jnp.tanh(nn.Dense(11, kernel_init=init, name="up")(x))
        return x + nn.Dense(7, kernel_init=init, name="down")(h), h.mean()


def stack(remat=True, **options):
    return nn.scan(nn.remat(Block) if remat else Block, length=5, **options)


def ensemble(**options):
    return nn.vmap(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, **options
    )


LAYERS = dict(variable_axes={"params": 0}, split_rngs={"params": True})
MIDDLE = dict(variable_axes={"params": 1}, split_rngs={"params": True})
TIED = dict(variable_broadcast="params", split_rngs={"params": False})
BOXED = LAYERS | {"metadata_params": {nn.PARTITION_NAME: "layers"}}
HEADS = dict(num_heads=5, qkv_features=55, out_features=17)
CASES = [
    # A model, the shapes of its arguments, what is materialised.
    pytest.param(stack(**LAYERS)(), [(2, 7)], [], id="scan-remat"),
    pytest.param(stack(remat=False, **MIDDLE)(), [(2, 7)], [], id="scan-over-axis-1"),
    pytest.param(stack(**TIED)(), [(2, 7)], [], id="scan-one-layer-5-times"),
    pytest.param(ensemble()(), [(5, 2, 7)], [], id="vmap"),
    pytest.param(ensemble(in_axes=None, axis_size=5)(), [(2, 7)], [], id="vmap-one-x"),
    pytest.param(
        nn.Bidirectional(nn.RNN(nn.LSTMCell(11)), nn.RNN(nn.OptimizedLSTMCell(11))),
        [(2, 5, 7)],
        [],
        id="lstm",
    ),
    pytest.param(nn.MultiHeadAttention(**HEADS), [(2, 3, 7)], [], id="self-attention"),
    pytest.param(
        nn.MultiHeadDotProductAttention(**HEADS),
        [(2, 3, 7), (2, 11, 13)],
        [],
        id="cross-attention",
    ),
    pytest.param(
        nn.ConvTranspose(7, (3, 2), strides=(2, 3)), [(2, 3, 5, 11)], [], id="conv-up"
    ),
    pytest.param(
        nn.ConvTranspose(7, (3, 2), strides=(2, 3), transpose_kernel=True),
        [(2, 3, 5, 11)],
        [],
        id="conv-up-transposed",
    ),
    pytest.param(
        nn.WeightNorm(nn.Dense(11)),
        [(2, 7)],
        ["params/layer_instance/kernel"],
        id="weight-norm",
    ),
    pytest.param(stack(**BOXED)(boxed=True), [(2, 7)], [], id="boxed-scan"),
]


def filled(shapes):
    """Random arrays of these shapes, which compiles nothing."""
    leaves, treedef = jax.tree.flatten(shapes)
    draws = [normal(*x.shape, seed=k, scale=0.5) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)


def make(model, shapes):
    args = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return filled(jax.eval_shape(model.init, jax.random.key(0), *args)), args


@pytest.mark.parametrize("model, shapes, formed", CASES)
def test_model(model, shapes, formed):
    variables, args = make(model, shapes)
    check_model(model.apply, variables, *args, formed=formed)


@pytest.mark.parametrize(
    "model, shape, roles",
    [
        pytest.param(stack(**LAYERS)(), (2, 7), ["bio", "bio"], id="scan"),
        pytest.param(stack(**MIDDLE)(), (2, 7), ["ibo", "ibo"], id="scan-over-axis-1"),
        pytest.param(stack(**TIED)(), (2, 7), ["io", "io"], id="scan-one-layer"),
        pytest.param(ensemble()(), (5, 2, 7), ["bio", "bio"], id="vmap"),
        # What all members read is one product, as heads are: `a` is theirs together.
        pytest.param(
            ensemble(in_axes=None, axis_size=5)(), (2, 7), ["oio", "bio"], id="one-x"
        ),
    ],
)
def test_layers_and_members_are_batch_axes_where_that_can_be_seen(model, shape, roles):
    variables, args = make(model, [shape])
    plan = jlora.plan(model.apply, variables, *args)
    found = {path.split("/")[-2]: spec.axes for path, spec in plan.items()}
    assert [found["up"], found["down"]] == roles


def test_boxes_keep_their_names():
    model = stack(**BOXED)(boxed=True)
    variables, args = make(model, [(2, 7)])
    tree = jlora.wrap(variables, plan=jlora.plan(model.apply, variables, *args))
    spec = nn.get_partition_spec(variables)
    assert nn.get_partition_spec(jlora.merge(tree)) == spec
    for name in ("up", "down"):
        box = tree["params"][name]["kernel"]
        assert box.names == ("layers", "in", "out")
        assert isinstance(box.value, jlora.LoRA)
        assert list(jlora.adapter({name: box})) == [name]
