"""wrap without a plan: classes, biases and names tell roles; the lift holds them to it.

The oracle is `jlora.plan`, which sees the use.
"""

import os
import warnings

os.environ["KERAS_BACKEND"] = "jax"
with warnings.catch_warnings():  # Pydot reads names that pyparsing deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    import keras

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import integers, normal, quiet, says
from jax import lax

import jlora

KEY = jax.random.key(0)


def agree(told, seen, shapes):
    """Whether two dicts of roles are the same, but for axes of size one."""
    assert told.keys() == seen.keys()
    for path, shape in shapes.items():
        if path in told:
            pairs = zip(told[path], seen[path], shape, strict=True)
            assert all(t == s for t, s, n in pairs if n != 1), (path, told[path])


def check_told(fn, params, *args, targets=None):
    """The roles that wrap tells are those of the plan, and the lift agrees."""
    plan = jlora.plan(fn, params, *args, rank=2, targets=targets)
    tree = jlora.wrap(params, rank=2, targets=targets)
    found = {path: x.axes for path, x in jlora.adapter(tree).items()}
    agree(found, {path: s.axes for path, s in plan.items()}, plan.shapes)
    quiet(jlora.explain, fn, tree, *args)  # as lift, but nothing is compiled
    return tree


# ----------------------------------------------------------------------- classes


def call(module, x):
    return module(x)


def rngs():
    return nnx.Rngs(0)


NNX = [
    pytest.param(lambda: nnx.Linear(5, 7, rngs=rngs()), (3, 5), id="linear"),
    pytest.param(
        lambda: nnx.LinearGeneral(5, (2, 7), rngs=rngs()), (3, 5), id="general-out"
    ),
    pytest.param(
        lambda: nnx.LinearGeneral((2, 5), 7, axis=(-2, -1), rngs=rngs()),
        (3, 2, 5),
        id="general-in",
    ),
    pytest.param(
        lambda: nnx.LinearGeneral(5, 7, batch_axis={0: 3}, rngs=rngs()),
        (3, 4, 5),
        id="general-batch",
    ),
    *(
        pytest.param(
            lambda text=text, shape=shape: nnx.Einsum(text, shape, rngs=rngs()),
            x,
            id=text,
        )
        for text, shape, x in [
            ("btd,dnh->btnh", (5, 2, 7), (3, 4, 5)),
            ("btnh,nhd->btd", (2, 7, 5), (3, 4, 2, 7)),
            ("btd,ndh->btnh", (2, 5, 7), (3, 4, 5)),
            ("ebd,edf->ebf", (2, 5, 7), (2, 4, 5)),
            ("...td,...df->...tf", (5, 7), (3, 4, 5)),
        ]
    ),
    pytest.param(lambda: nnx.Conv(5, 7, (3,), rngs=rngs()), (2, 9, 5), id="conv-1d"),
    pytest.param(
        lambda: nnx.Conv(6, 4, (3, 3), feature_group_count=2, rngs=rngs()),
        (2, 9, 9, 6),
        id="conv-2d-grouped",
    ),
    pytest.param(
        lambda: nnx.ConvTranspose(5, 7, (3, 2), rngs=rngs()), (2, 9, 9, 5), id="up"
    ),
    pytest.param(
        lambda: nnx.ConvTranspose(5, 7, (3,), transpose_kernel=True, rngs=rngs()),
        (2, 9, 5),
        id="up-transposed",
    ),
    pytest.param(
        lambda: nnx.MultiHeadAttention(3, 21, decode=False, rngs=rngs()),
        (2, 4, 21),
        id="attention",
    ),
]


@pytest.mark.parametrize("make, x", NNX)
def test_classes_of_nnx(make, x):
    check_told(call, nnx.eval_shape(make), jnp.zeros(x))


def test_an_embedding_of_nnx_is_told_when_it_is_named():
    module = nnx.Embed(11, 5, rngs=rngs())
    check_told(call, module, integers(3, below=11), targets="embedding")
    # Used by a tied head only, its roles are the other way round, and that may be.
    tree = jlora.wrap(module, rank=2, targets="embedding")
    quiet(jlora.explain, lambda m, x: m.attend(x), tree, normal(3, 5))


@pytest.mark.parametrize(
    "layer, x",
    [
        (lambda r: nnx.Linear(5, 5, rngs=r), (3, 5)),
        (lambda r: nnx.LinearGeneral(5, (1, 5), rngs=r), (3, 5)),
        (lambda r: nnx.Conv(5, 5, (3,), rngs=r), (2, 9, 5)),
    ],
    ids=["linear", "general", "conv"],
)
def test_stacks_of_nnx(layer, x):
    stack = nnx.vmap(layer)(rngs().split(4))

    def run(stack, x):
        graph, state = nnx.split(stack)

        def step(x, state):
            return nnx.merge(graph, state)(x).reshape(x.shape), None

        return lax.scan(step, x, state)[0]

    tree = check_told(run, stack, normal(*x))
    assert [leaf.axes[0] for leaf in jlora.adapter(tree).values()] == ["b"]


EQUINOX = [
    pytest.param(lambda: eqx.nn.Linear(5, 7, key=KEY), (5,), id="linear"),
    pytest.param(lambda: eqx.nn.MLP(5, 7, 11, 2, key=KEY), (5,), id="mlp"),
    pytest.param(lambda: eqx.nn.Conv1d(5, 7, 3, key=KEY), (5, 9), id="conv-1d"),
    pytest.param(
        lambda: eqx.nn.Conv2d(6, 4, 3, groups=2, use_bias=False, key=KEY),
        (6, 9, 9),
        id="conv-2d-grouped",
    ),
    pytest.param(
        lambda: eqx.nn.ConvTranspose2d(5, 7, 3, key=KEY), (5, 9, 9), id="up-2d"
    ),
    pytest.param(
        lambda: eqx.nn.MultiheadAttention(3, 21, key=KEY), (4, 21), id="attention"
    ),
    pytest.param(lambda: eqx.nn.GRUCell(5, 7, key=KEY), (5,), id="gru"),
    pytest.param(lambda: eqx.nn.LSTMCell(5, 7, key=KEY), (5,), id="lstm"),
]


@pytest.mark.parametrize("make, x", EQUINOX)
def test_classes_of_equinox(make, x):
    def run(module, x):
        if isinstance(module, eqx.nn.MultiheadAttention):
            return module(x, x, x)
        if isinstance(module, eqx.nn.GRUCell):
            return module(x, jnp.ones(7))
        if isinstance(module, eqx.nn.LSTMCell):
            return module(x, (jnp.ones(7), jnp.ones(7)))
        return module(x)

    check_told(run, eqx.filter_eval_shape(make), jnp.zeros(x))


def test_stacks_of_equinox():
    keys = jax.random.split(KEY, 4)
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 5, key=key))(keys)
    assert stack.weight.shape == (4, 5, 5)
    check_told(
        lambda m, x: lax.scan(lambda x, m: (m(x), None), x, m)[0], stack, normal(5)
    )


L = keras.layers
KERAS = [
    pytest.param(lambda: L.Dense(7), (3, 5), id="dense"),
    pytest.param(
        lambda: L.EinsumDense("abc,cde->abde", (None, 3, 4)), (2, 6, 5), id="einsum"
    ),
    pytest.param(lambda: L.Conv1D(7, 3), (2, 9, 5), id="conv-1d"),
    pytest.param(lambda: L.Conv3D(7, 3), (2, 5, 5, 5, 3), id="conv-3d"),
    pytest.param(lambda: L.Conv2DTranspose(7, 3), (2, 9, 9, 5), id="up"),
    pytest.param(
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (2, 9, 9, 5), id="depthwise"
    ),
    pytest.param(lambda: L.SeparableConv2D(7, 3), (2, 9, 9, 5), id="separable"),
    pytest.param(lambda: L.LSTM(7), (2, 6, 5), id="lstm"),
]


@pytest.mark.parametrize("make, shape", KERAS)
def test_classes_of_keras(make, shape):
    x = keras.Input(shape[1:])
    model = keras.Model(x, make()(x))

    def run(params, x):
        values = [params[v.path] for v in model.trainable_variables]
        rest = [v.value for v in model.non_trainable_variables]
        return model.stateless_call(values, rest, x)[0]

    tree = check_told(run, model, normal(*shape))
    assert set(tree) == {v.path for v in model.trainable_variables}


# --------------------------------------------------------------- biases and names


def layer(shape, bias=None, names=("kernel", "bias")):
    out = {names[0]: normal(*shape)}
    return out if bias is None else out | {names[1]: normal(*bias)}


TOLD = [
    # A tree of shapes, and the roles that it tells.
    ({"up": layer((5, 7), (7,))}, {"up/kernel": "io"}),
    ({"up": layer((7, 5), (7,))}, {"up/kernel": "oi"}),
    ({"up": layer((7, 5), (7,), ("weight", "bias"))}, {"up/weight": "oi"}),
    ({"up": layer((5, 7), (7,), ("weight", "bias"))}, {"up/weight": "io"}),
    ({"w1": normal(5, 7), "b1": normal(7)}, {"w1": "io"}),
    ({"w1": normal(7, 5), "b1": normal(7)}, {"w1": "oi"}),
    ({"fc.weight": normal(7, 5), "fc.bias": normal(7)}, {"fc.weight": "oi"}),
    ({"any": layer((5, 2, 7), (2, 7))}, {"any/kernel": "ioo"}),
    ({"any": layer((2, 7, 5), (5,))}, {"any/kernel": "iio"}),
    ({"any": layer((3, 3, 5, 7), (7,))}, {"any/kernel": "iiio"}),
    ({"up_conv": layer((3, 3, 7, 5), (7,))}, {"up_conv/kernel": "iioi"}),
    (
        {"any": layer((7, 5, 3, 3), (7, 1, 1), ("weight", "bias"))},
        {"any/weight": "oiii"},
    ),
    # A square matrix has the roles that its name has elsewhere in the tree.
    (
        {"a": layer((5, 5), (5,)), "b": layer((7, 5), (7,))},
        {"a/kernel": "oi", "b/kernel": "oi"},
    ),
    ({"a": layer((5, 5), (5,))}, {"a/kernel": "io"}),
    # A norm that is conditioned has a kernel; what else it has is a vector.
    ({"ada_norm": layer((5, 7), (7,))}, {"ada_norm/kernel": "io"}),
    (
        {"l": {"ada_ln": layer((3, 5, 7), (3, 7)), "ln": {"weight": normal(3, 5)}}},
        {"l/ada_ln/kernel": "bio"},
    ),
    # Names.
    ({"attn": {"q_proj": layer((5, 2, 7))}}, {"attn/q_proj/kernel": "ioo"}),
    ({"attn": {"wo": normal(2, 7, 5)}}, {"attn/wo": "iio"}),
    ({"attn": {"q_einsum": {"w": normal(2, 5, 7)}}}, {"attn/q_einsum/w": "oio"}),
    (
        {"attn": {"kv_einsum_1": {"w": normal(2, 3, 5, 7)}}},
        {"attn/kv_einsum_1/w": "ooio"},
    ),
    ({"patch_embed": layer((4, 4, 3, 7))}, {"patch_embed/kernel": "iiio"}),
    ({"conv2_d_transpose": {"w": normal(3, 3, 7, 5)}}, {"conv2_d_transpose/w": "iioi"}),
    ({"mlp": {"gate_proj": normal(3, 5, 7)}}, {"mlp/gate_proj": "bio"}),
    # Stacks: all arrays below a node have one first axis, or one second axis.
    (
        {"layers": {"up": layer((3, 5, 7), (3, 7)), "norm": {"scale": normal(3, 5)}}},
        {"layers/up/kernel": "bio"},
    ),
    (
        {
            "layers": {
                "up": layer((5, 3, 7)),
                "down": layer((7, 3, 5)),
                "norm": {"scale": normal(5, 3)},
            }
        },
        {"layers/up/kernel": "ibo", "layers/down/kernel": "ibo"},
    ),
    (
        {"layers": {"up": layer((3, 5, 7)), "down": layer((3, 7, 5))}},
        {"layers/up/kernel": "bio", "layers/down/kernel": "bio"},
    ),
    (
        {
            "layers": {
                "query": layer((3, 5, 2, 7), (3, 2, 7)),
                "out": layer((3, 2, 7, 5), (3, 5)),
            }
        },
        {"layers/query/kernel": "bioo", "layers/out/kernel": "biio"},
    ),
]


@pytest.mark.parametrize("params, roles", TOLD, ids=lambda x: "-".join(x)[:40])
def test_biases_and_names(params, roles):
    tree = jlora.wrap(params, rank=2)
    assert {path: leaf.axes for path, leaf in jlora.adapter(tree).items()} == roles


def test_the_summary_lists_every_matrix_that_was_left():
    """A scale by its own name is none; what stands in a norm may be one."""
    p = {
        "up": layer((5, 7), (7,)),
        "norm": {"mix": normal(5, 6), "scale": normal(3, 5), "bias": normal(3, 5)},
    }
    (line,) = [
        x
        for x in jlora.summary(jlora.wrap(p, rank=2)).splitlines()
        if x.startswith("left as they are")
    ]
    assert line == "left as they are: norm/mix 5×6"


UNTOLD = [
    # What neither shapes nor names tell.
    {"any": layer((3, 5, 7))},
    {"any": layer((5, 7), names=("weight", "bias"))},
    {"any": layer((5, 5), (5,), ("weight", "bias"))},
    {"stack": layer((3, 5, 7), (3, 7))},
    {"blocks": layer((3, 5, 2, 7))},
]


@pytest.mark.parametrize("params", UNTOLD, ids=str)
def test_doubt_is_an_error_with_the_line_to_type(params):
    params |= {"known": layer((5, 7), (7,))}
    (path,) = (
        f"{key}/{x}"
        for key in params
        for x in params[key]
        if x != "bias" and key != "known"
    )
    with pytest.raises(ValueError) as error:
        jlora.wrap(params, rank=2)
    says(error, path, "jlora.plan(fn, params, *args)", "jlora.Rule(path, axes=")
    tree = jlora.wrap(params, rank=2, exclude=path)
    assert list(jlora.adapter(tree)) == ["known/kernel"]


def test_several_doubts_are_one_error():
    params = {f"layer_{k}": layer((3, 5, 7)) for k in range(9)}
    with pytest.raises(ValueError) as error:
        jlora.wrap(params, rank=2)
    says(error, "layer_0/kernel", "layer_4/kernel", "4 more")
