"""Keras 3 on JAX: the values of a built model's variables are the tree.

`model.stateless_call(trainable, non_trainable, x)` takes them as a list in the order
of `model.trainable_variables`. A dict by `variable.path` says more to a reader, and to
patterns; a list has the paths "0", "1", … Layers are named: Keras numbers those that
are not by how many a process has made.
"""

import os
import warnings

os.environ["KERAS_BACKEND"] = "jax"
with warnings.catch_warnings():  # Pydot reads names that pyparsing deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    import keras

import numpy as np
import pytest
from helpers import (
    adapted,
    check_model,
    close,
    integers,
    normal,
    quiet,
    randomise,
    says,
)
from keras import layers

import jlora


def values(model):
    """The trainable variables' arrays by path, and the arrays of the others."""
    trainable = {v.path: v.value for v in model.trainable_variables}
    return trainable, [v.value for v in model.non_trainable_variables]


def call(model, **options):
    """A function of the dict and the inputs."""
    order = [v.path for v in model.trainable_variables]
    _, rest = values(model)

    def fn(params, *args):
        trainable = [params[path] for path in order]
        return model.stateless_call(trainable, rest, *args, **options)[0]

    return fn


def attention(inputs, memory):
    x, y = keras.Input(inputs), keras.Input(memory)
    layer = layers.MultiHeadAttention(5, 11, output_shape=17, name="attention")
    return keras.Model([x, y], layer(x, y))


CASES = [
    # A model, its inputs, the roles of what is adapted.
    pytest.param(
        lambda: keras.Sequential(
            [layers.Dense(11, "relu", name="up"), layers.Dense(13, name="down")],
            name="mlp",
        ),
        [normal(2, 7)],
        {"mlp/up/kernel": "io", "mlp/down/kernel": "io"},
        id="dense",
    ),
    pytest.param(
        lambda: layers.EinsumDense("bti,iod->btod", (None, 5, 11), name="heads"),
        [normal(2, 3, 7)],
        {"heads/kernel": "ioo"},
        id="einsum",
    ),
    pytest.param(
        lambda: keras.Sequential(
            [
                layers.Embedding(13, 7, name="embed"),
                layers.LSTM(11, return_sequences=True, name="lstm"),
            ],
            name="words",
        ),
        [integers(2, 5, below=13)],
        {
            "words/embed/embeddings": "io",
            "words/lstm/lstm_cell/kernel": "io",
            "words/lstm/lstm_cell/recurrent_kernel": "io",
        },
        id="embedding-lstm",
    ),
    pytest.param(
        lambda: attention((3, 7), (5, 13)),
        [[normal(2, 3, 7), normal(2, 5, 13)]],
        {
            "attention/query/kernel": "ioo",
            "attention/key/kernel": "ioo",
            "attention/value/kernel": "ioo",
            "attention/attention_output/kernel": "iio",
        },
        id="attention",
    ),
    pytest.param(
        lambda: keras.Sequential(
            [
                layers.Conv2D(7, (3, 5), strides=2, name="conv"),
                layers.DepthwiseConv2D((5, 2), name="depthwise"),
                layers.SeparableConv2D(11, (2, 3), name="separable"),
                layers.Conv2DTranspose(13, (3, 2), strides=2, name="back"),
            ],
            name="images",
        ),
        [normal(2, 17, 13, 5)],
        {
            "images/conv/kernel": "iiio",
            # One output a channel: no role can be seen of an axis of one element.
            "images/depthwise/kernel": "iiob",
            "images/separable/depthwise_kernel": "iiob",
            "images/separable/pointwise_kernel": "iiio",
            "images/back/kernel": "iioi",
        },
        id="conv",
    ),
]


@pytest.mark.parametrize("make, args, roles", CASES)
def test_model(make, args, roles):
    model = make()
    model(*args)
    params, _ = values(model)
    plan = jlora.plan(call(model), params, *args, targets="**")
    assert {path: spec.axes for path, spec in plan.items()} == roles
    check_model(call(model), params, *args)


def mlp():
    return keras.Sequential(
        [
            layers.Dense(11, name="up"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, seed=0, name="drop"),
            layers.Dense(5, name="down"),
        ],
        name="mlp",
    )


def built():
    model = mlp()
    model(normal(13, 7))
    return model


def test_the_list_of_values_is_a_tree_too():
    x, model = normal(13, 7), built()
    _, rest = values(model)
    params = [v.value for v in model.trainable_variables]
    plan = jlora.plan(model.stateless_call, params, rest, x, rank=3)
    assert list(plan) == ["0", "4"] and plan["0"].bias == "1"
    tree = randomise(jlora.wrap(params, plan=plan))
    apply = jlora.lift(model.stateless_call)
    for training in True, False:  # statistics and the seed are in what comes back
        got = quiet(apply, tree, rest, x, training=training)
        want = model.stateless_call(jlora.merge(tree), rest, x, training=training)
        close(got, want)
        moved = [bool((a != b).any()) for a, b in zip(got[1], rest, strict=True)]
        assert moved == [training] * 3


def test_merged_values_go_back_into_the_model():
    x, model = normal(13, 7), built()
    params, _ = values(model)
    tree = randomise(jlora.wrap(params, rank=3))
    want = jlora.lift(call(model))(tree, x)
    before = np.array(model(x))
    merged = jlora.merge(tree)
    for variable in model.trainable_variables:
        variable.assign(merged[variable.path])
    close(model(x), want)
    assert not np.allclose(model(x), before, atol=1e-3)
    for path, array in jlora.unwrap(tree).items():
        assert array is params[path]


def test_dense_kernels_are_known_by_name():
    params, _ = values(built())
    tree = jlora.wrap(params, rank=3, bias="lora_only", exclude="**/up/*")
    assert set(adapted(tree)) == {"mlp/down/kernel", "mlp/down/bias"}


@pytest.mark.parametrize(
    "params",
    [
        lambda model: values(model)[0],
        lambda model: list(values(model)[0].values()),
        lambda model: model,
    ],
    ids=["dict", "list", "model"],
)
@pytest.mark.parametrize(
    "use", [jlora.wrap, lambda tree: jlora.plan(lambda p, x: x, tree, normal(2, 7))]
)
def test_a_model_that_is_not_built_has_no_variables(use, params):
    with pytest.raises(ValueError) as error:
        use(params(mlp()))
    says(error, "nothing to adapt", "build the model", "v.path: v.value")


def test_a_model_is_the_dict_of_its_trainable_variables():
    model = built()
    params, _ = values(model)
    tree, want = jlora.wrap(model, rank=3), jlora.wrap(params, rank=3)
    assert {p: x.axes for p, x in adapted(tree).items()} == {
        p: x.axes for p, x in adapted(want).items()
    }
    assert all(jlora.unwrap(tree)[path] is params[path] for path in params)


def test_variables_instead_of_their_values_are_refused_or_read():
    model = built()
    variables = {v.path: v for v in model.trainable_variables}
    try:
        tree = jlora.wrap(variables, rank=3)
    except (TypeError, ValueError) as error:
        says(error, "mlp", "Variable", "variable.value")
    else:
        jlora.lift(call(model))(tree, normal(13, 7))
