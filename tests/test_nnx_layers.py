"""jlora.nnx: each layer is its Flax twin with an adapter, and says so to NNX's filters.

The oracle is the twin on the merged weight, and the lifted twin, which other tests hold
against the dense matrix.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import base_sized, close, integers, normal, same

import jlora
import jlora.nnx


class Case:
    """A layer by name and arguments, its twin, an input, and its factors' shapes."""

    def __init__(self, name, args, x, a, b, own=(), **kwargs):
        layer, twin = getattr(jlora.nnx, name), getattr(nnx, name.replace("Merged", ""))
        self.make = functools.partial(layer, *args, **kwargs, **dict(own))
        self.make_twin = functools.partial(twin, *args, **kwargs)
        self.x = integers(*x, below=args[0]) if name == "Embed" else normal(*x)
        self.a, self.b = a, b

    def layer(self, **kwargs):
        return self.make(rank=3, rngs=nnx.Rngs(0), **kwargs)

    def twin(self):
        return self.make_twin(rngs=nnx.Rngs(0))


CASES = {
    "linear": Case("Linear", (5, 7), (11, 5), (5, 3), (3, 7)),
    "linear-bfloat16": Case(
        "Linear", (5, 7), (11, 5), (5, 3), (3, 7), dtype=jnp.bfloat16, use_bias=False
    ),
    "general": Case("LinearGeneral", (5, (2, 7)), (11, 5), (5, 3), (3, 2, 7)),
    "general-in": Case(
        "LinearGeneral", ((2, 7), 5), (11, 2, 7), (2, 7, 3), (3, 5), axis=(-2, -1)
    ),
    "general-batch": Case(
        "LinearGeneral",
        (5, 7),
        (2, 11, 5),
        (2, 5, 3),
        (2, 3, 7),
        batch_axis={0: 2},
    ),
    "einsum": Case("Einsum", ("be,ehd->bhd", (5, 3, 7)), (11, 5), (5, 3), (3, 3, 7)),
    "einsum-experts": Case(
        "Einsum", ("bei,eio->beo", (2, 5, 7)), (11, 2, 5), (2, 5, 3), (2, 3, 7)
    ),
    "embed": Case("Embed", (13, 5), (2, 11), (13, 3), (3, 5)),
    "conv-1d": Case("Conv", (5, 7, (3,)), (2, 11, 5), (3, 5, 3), (3, 7)),
    "conv-2d-groups": Case(
        "Conv",
        (10, 14, (3, 3)),
        (2, 8, 9, 10),
        (3, 3, 5, 3),
        (3, 14),
        feature_group_count=2,
        kernel_dilation=2,
    ),
    "conv-depthwise": Case(
        "Conv",
        (5, 5, (3, 3)),
        (2, 8, 9, 5),
        (3, 3, 1, 3),
        (3, 5),
        feature_group_count=5,
        strides=2,
    ),
    "conv-circular": Case(
        "Conv", (5, 7, (3,)), (2, 8, 5), (3, 5, 3), (3, 7), padding="CIRCULAR"
    ),
    "conv-causal": Case(
        "Conv", (5, 7, (3,)), (2, 8, 5), (3, 5, 3), (3, 7), padding="CAUSAL"
    ),
    "conv-3d": Case(
        "Conv", (3, 7, (2, 2, 2)), (2, 4, 4, 4, 3), (2, 2, 2, 3, 3), (3, 7)
    ),
    "transpose": Case(
        "ConvTranspose", (5, 7, (3, 2)), (2, 5, 6, 5), (3, 2, 5, 3), (3, 7)
    ),
    "transpose-transposed": Case(
        "ConvTranspose",
        (5, 7, (3,)),
        (2, 8, 5),
        (3, 5, 3),
        (3, 7),
        strides=(2,),
        transpose_kernel=True,
    ),
}
for flags in itertools.product((False, True), repeat=3):
    if k := sum(flags):
        CASES[f"merged-{''.join(str(int(f)) for f in flags)}"] = Case(
            "MergedLinear",
            (5, 21),
            (11, 5),
            (k, 5, 3),
            (k, 3, 7),
            {"enable_lora": flags},
        )
LAYERS = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items()]
)
call = jlora.lift(lambda module, x: module(x))


def moved(layer, seed=7):
    """The layer with random factors."""
    shapes = layer.lora_a.shape, layer.lora_b.shape
    a, b = (normal(*s, seed=seed, scale=s[-2] ** -0.5) for s in shapes)
    layer.lora_a[...], layer.lora_b[...] = a, b
    return layer


def base(model):
    """The parameters that are the twin's, by path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {k: v[...] for k, v in state if not isinstance(v, nnx.LoRAParam)}


@LAYERS
def test_params_are_the_twins(case):
    """Names, shapes, dtypes and initial values: pretrained states load."""
    layer = case.layer()
    same(base(layer), base(case.twin()))
    assert (layer.lora_a.shape, layer.lora_b.shape) == (case.a, case.b)
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.float32
    assert layer.lora_a[...].any() != layer.lora_b[...].any()  # the delta is zero
    assert (layer.lora_scale[...] == 1).all()
    same(base(case.make(rank=0, rngs=nnx.Rngs(0))), base(case.twin()))


@LAYERS
def test_at_the_start_and_with_rank_zero_it_computes_what_the_twin_does(case):
    want = case.twin()(case.x)
    for rank in (0, 3):
        y = case.make(rank=rank, rngs=nnx.Rngs(0))(case.x)
        assert y.dtype == want.dtype
        np.testing.assert_array_equal(y, want)


@LAYERS
def test_adapter_goes_to_the_plain_twin_and_back(case):
    layer, twin = moved(case.layer()), case.twin()
    y = layer(case.x)
    wrapped = jlora.attach(twin, jlora.nnx.adapter(layer))
    np.testing.assert_array_equal(call(wrapped, case.x), y)
    merged = jlora.merge(wrapped)(case.x)
    # A rounding to bfloat16 of each of three products, or of the merged weight.
    tol = 1e-5 if y.dtype == jnp.float32 else 3 * float(jnp.finfo(y.dtype).eps)
    close(y, merged, tol)
    gap = jnp.abs(y - twin(case.x)).max()
    assert gap > 0.05 * jnp.abs(y).max()
    back = jlora.nnx.attach(case.layer(), jlora.adapter(wrapped))
    same(back(case.x), y)
    same(jlora.nnx.adapter(back), jlora.nnx.adapter(layer))


@LAYERS
def test_gradients_are_those_of_the_lifted_twin_and_of_the_factors_alone(case):
    layer = moved(case.layer())
    wrapped = jlora.attach(case.twin(), jlora.nnx.adapter(layer))

    def loss(fn, model):
        return (fn(model, case.x).astype(jnp.float32) ** 2).sum()

    ours = nnx.grad(
        lambda m: loss(lambda m, x: m(x), m), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(layer)
    assert {path[-1] for path, _ in nnx.to_flat_state(ours)} == {"lora_a", "lora_b"}
    theirs = jax.grad(lambda t: loss(call, t))(wrapped)
    (want,) = jlora.adapter(theirs).values()
    tol = 1e-5 if case.twin()(case.x).dtype == jnp.float32 else 0.03
    close(ours["lora_a"][...], want.a, tol)
    close(ours["lora_b"][...], want.b, tol)


def test_alpha_is_divided_by_rank():
    layer = jlora.nnx.Linear(5, 7, rank=4, alpha=2, rngs=nnx.Rngs(0))
    assert float(layer.lora_scale[...]) == 0.5


def test_attend_is_tied():
    layer = moved(CASES["embed"].layer())
    twin = jlora.merge(jlora.attach(CASES["embed"].twin(), jlora.nnx.adapter(layer)))
    x = normal(11, 5)
    close(layer.attend(x), twin.attend(x))


# ---------------------------------------------------------------- in a model


class Net(nnx.Module):
    """A stack of blocks made by vmap and run by scan, between tied embeddings."""

    def __init__(self, lib, rngs, **lora):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def blocks(rngs):
            return lib.Linear(7, 7, rngs=rngs, **lora)

        self.embed = lib.Embed(13, 7, rngs=rngs, **lora)
        self.blocks = blocks(rngs)
        self.last = lib.Linear(7, 7, rngs=rngs, **lora)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return x + jnp.tanh(block(x))

        return self.embed.attend(self.last(run(self.embed(ids), self.blocks)))


IDS = integers(2, 5, below=13)


def training(model):
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)

    def loss(model):
        logits = model(IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS).mean()

    wrt = nnx.DiffState(0, nnx.LoRAParam)

    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, grads)
        return value

    return step, optimizer


def test_a_model_trains_its_factors_alone():
    model = Net(jlora.nnx, nnx.Rngs(0), rank=2)
    same(base(model), base(Net(nnx, nnx.Rngs(0))))
    assert model.blocks.lora_a.shape == (3, 7, 2)
    before, scales = base(model), model.blocks.lora_scale[...]
    step, optimizer = training(model)
    step = nnx.jit(step)
    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
    same(base(model), before)
    same(model.blocks.lora_scale[...], scales)
    twin = jlora.merge(jlora.attach(Net(nnx, nnx.Rngs(0)), jlora.nnx.adapter(model)))
    close(model(IDS), twin(IDS))


def test_no_gradient_of_the_base_is_formed():
    model = Net(jlora.nnx, nnx.Rngs(0), rank=2)
    graph, state = nnx.split(model)

    def base_gradients(kind):
        wrt = nnx.DiffState(0, kind)

        def gradients(state):
            grads = nnx.grad(lambda m: (m(IDS) ** 2).sum(), argnums=wrt)
            return nnx.as_pure(grads(nnx.merge(graph, state)))

        return base_sized(jax.make_jaxpr(gradients)(state), {7 * 7, 13 * 7, 3 * 7 * 7})

    assert base_gradients(nnx.LoRAParam) == 0
    assert base_gradients(nnx.Param) > 0  # the count sees them where they are


def test_dropout_by_a_stream_and_deterministic():
    """With the identity as factors the branch is the dropped activation itself."""
    x = jnp.ones((64, 16))
    layer = jlora.nnx.Linear(16, 16, rank=16, dropout_rate=0.5, rngs=nnx.Rngs(0))
    layer.lora_a[...] = layer.lora_b[...] = jnp.eye(16)
    plain = x @ layer.kernel[...]
    first, second = (np.asarray(layer(x) - plain) for _ in range(2))
    assert set(np.round(first.ravel(), 3)) == {0.0, 2.0}
    # 1,024 positions kept with probability 1/2: 5 standard errors are 0.08.
    assert abs((first > 1).mean() - 0.5) < 0.08
    assert (first != second).any()
    close(layer(x, deterministic=True) - plain, x)
    layer.eval()
    close(layer(x) - plain, x)
    layer.train()
    assert (np.asarray(layer(x) - plain) == 0).any()
    view = nnx.view(layer, deterministic=True)
    close(view(x) - plain, x)


def test_dropout_moves_no_initial_value_and_every_layer_has_its_own_stream():
    ours, theirs = nnx.Rngs(0), nnx.Rngs(0)
    layers = [jlora.nnx.Linear(8, 8, dropout_rate=0.1, rngs=ours) for _ in range(2)]
    for layer in layers:
        same(layer.kernel[...], nnx.Linear(8, 8, rngs=theirs).kernel[...])
    rngs = nnx.Rngs(params=0, dropout=1)
    layers += [jlora.nnx.Linear(8, 8, dropout_rate=0.1, rngs=rngs) for _ in range(2)]
    keys = [x.dropout_rngs.key[...] for x in layers]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 4
    same(nnx.Dropout(0.5, rngs=rngs).rngs(), nnx.Dropout(0.5, rngs=nnx.Rngs(1)).rngs())


class Tied(nnx.Module):
    def __init__(self):
        self.first = jlora.nnx.Linear(8, 8, rank=2, rngs=nnx.Rngs(0))
        self.second = self.first

    def __call__(self, x):
        return self.second(self.first(x))


def test_attach_keeps_modules_shared_and_the_old_one_as_it_was():
    model, x = Tied(), normal(5, 8)
    adapter = jlora.nnx.adapter(randomise_layer(model))
    fresh = Tied()
    before = fresh(x)
    new = jlora.nnx.attach(fresh, adapter)
    assert new.first is new.second
    close(new(x), model(x))
    same(fresh(x), before)


def randomise_layer(model):
    model.first.lora_b[...] = normal(*model.first.lora_b.shape)
    return model


def test_einsum_with_an_ellipsis():
    layer = jlora.nnx.Einsum("...ti,...io->...to", (7, 3, 4), None, rngs=nnx.Rngs(0))
    assert layer.lora_a.shape == (7, 3, 8) and layer.lora_b.shape == (7, 8, 4)
    assert layer(normal(7, 5, 3)).shape == (7, 5, 4)


# ------------------------------------------------------------------ bad input


def test_a_module_of_layers_is_no_wrapped_tree():
    """Its factors are variables: nothing may leave them behind without a word."""
    layer = jlora.nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    uses = {
        "wrap": jlora.wrap,
        "merge": jlora.merge,
        "unwrap": jlora.unwrap,
        "adapter": jlora.adapter,
        "partition": jlora.partition,
        "scaled": lambda m: jlora.scaled(m, 0.0),
        "dropout": lambda m: jlora.dropout(m, 0.1, jax.random.key(0)),
    }
    for name, use in uses.items():
        with pytest.raises(ValueError, match=rf"^{name}: .*jlora.nnx.adapter\(module"):
            use(layer)


def test_a_leaf_that_trained_whole_is_no_factor():
    layer = jlora.nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    whole = {"kernel": jlora.Full(None, jnp.zeros((5, 3)))}
    with pytest.raises(ValueError, match="'kernel' was trained whole"):
        jlora.nnx.attach(layer, whole)


@pytest.mark.parametrize(
    "make, message",
    [
        pytest.param(dict(rank=-1), "rank -1: expected a positive integer", id="rank"),
        pytest.param(dict(dropout_rate=1.0), r"expected a number in \[0, 1\)", id="p"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        jlora.nnx.Linear(5, 7, rngs=nnx.Rngs(0), **make)


def test_enable_lora_of_the_wrong_length_and_none_of_it():
    def make(**kwargs):
        return jlora.nnx.MergedLinear(5, 21, rngs=nnx.Rngs(0), **kwargs)

    with pytest.raises(ValueError, match=r"divides 21, its first out axis"):
        make(enable_lora=(True,) * 4)
    layer, twin = make(enable_lora=(False,) * 3), nnx.Linear(5, 21, rngs=nnx.Rngs(0))
    same(layer(normal(11, 5)), twin(normal(11, 5)))
    assert not nnx.to_flat_state(nnx.state(layer, nnx.LoRAParam))


def test_adapters_that_do_not_fit():
    layer = CASES["linear"].layer()
    adapter = jlora.nnx.adapter(layer)
    with pytest.raises(ValueError, match="no layer of jlora.nnx with an adapter"):
        jlora.nnx.adapter(CASES["linear"].twin())
    with pytest.raises(
        ValueError, match="which the tree has not; near paths: 'kernel'"
    ):
        jlora.nnx.attach(layer, {"other/kernel": adapter["kernel"]})
    merged = CASES["merged-111"].layer()
    plain = jlora.nnx.Linear(5, 21, rank=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="roles and form"):
        jlora.nnx.attach(plain, jlora.nnx.adapter(merged))
    turned = dataclasses.replace(adapter["kernel"], roles="oi")
    with pytest.raises(ValueError, match="shape|roles and form"):
        jlora.nnx.attach(layer, {"kernel": turned})
