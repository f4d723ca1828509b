"""Models of Flax Linen's own layers: loops, ensembles, recurrence, attention, boxes.

(What jlora.linen has of its own is test_linen.py.)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import check_model, filled, normal

import jlora


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
