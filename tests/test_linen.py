"""jlora.linen: each layer is its Flax twin, with factors in a `lora` collection."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import (
    adapted,
    close,
    equations,
    integers,
    normal,
    paths,
    quiet,
    randomise,
    same,
    says,
    silent,
)

import jlora
import jlora.linen

KEY = jax.random.key(0)


class Case:
    """A layer by name and arguments, its twin, an input, and its factors' shapes."""

    def __init__(self, name, args, x, a, b, own=(), **kwargs):
        self.make = functools.partial(
            getattr(jlora.linen, name), *args, **kwargs, **dict(own)
        )
        self.twin = getattr(nn, name.replace("Merged", ""))(*args, **kwargs)
        self.x = integers(*x, below=args[0]) if name == "Embed" else normal(*x)
        self.layer, self.a, self.b = self.make(rank=3), a, b

    @functools.cached_property
    def variables(self):
        return jax.jit(self.layer.init)(KEY, self.x)

    @functools.cached_property
    def plain(self):
        return jax.jit(self.twin.init)(KEY, self.x)

    @functools.cached_property
    def moved(self):
        return moved(self.variables)


def cases():
    yield "dense", Case("Dense", (7,), (11, 5), (5, 3), (3, 7))
    yield (
        "dense-no-bias",
        Case("Dense", (7,), (2, 11, 5), (5, 3), (3, 7), use_bias=False),
    )
    yield (
        "dense-init",
        Case("Dense", (7,), (11, 5), (5, 3), (3, 7), kernel_init=nn.initializers.ones),
    )
    yield (
        "dense-bfloat16",
        Case("Dense", (7,), (11, 5), (5, 3), (3, 7), dtype=jnp.bfloat16),
    )
    yield (
        "dense-bfloat16-params",
        Case("Dense", (7,), (11, 5), (5, 3), (3, 7), param_dtype=jnp.bfloat16),
    )
    yield "general-out", Case("DenseGeneral", ((3, 7),), (11, 5), (5, 3), (3, 3, 7))
    yield (
        "general-in",
        Case("DenseGeneral", (5,), (11, 3, 7), (3, 7, 3), (3, 5), axis=(-2, -1)),
    )
    yield (
        "general-batch",
        Case("DenseGeneral", (7,), (2, 11, 5), (2, 5, 3), (2, 3, 7), batch_dims=(0,)),
    )
    yield (
        "einsum-out",
        Case("Einsum", ((5, 3, 7), "be,ehd->bhd"), (11, 5), (5, 3), (3, 3, 7)),
    )
    yield (
        "einsum-experts",
        Case("Einsum", ((2, 5, 7), "bei,eio->beo"), (11, 2, 5), (2, 5, 3), (2, 3, 7)),
    )
    yield (
        "einsum-bias",
        Case("Einsum", ((3, 7, 5), "bhd,hde->be"), (11, 3, 7), (3, 7, 3), (3, 5)),
    )
    yield "embed", Case("Embed", (13, 5), (2, 11), (13, 3), (3, 5))
    yield "conv-1d", Case("Conv", (7, (3,)), (2, 11, 5), (3, 5, 3), (3, 7))
    yield (
        "conv-2d",
        Case("Conv", (7, (3, 2)), (2, 8, 9, 5), (3, 2, 5, 3), (3, 7), strides=2),
    )
    yield (
        "conv-groups-dilated",
        Case(
            "Conv",
            (14, (3, 3)),
            (2, 8, 9, 10),
            (3, 3, 5, 3),
            (3, 14),
            feature_group_count=2,
            kernel_dilation=2,
        ),
    )
    yield (
        "conv-depthwise",
        Case(
            "Conv",
            (5, (3, 3)),
            (2, 8, 9, 5),
            (3, 3, 1, 3),
            (3, 5),
            feature_group_count=5,
        ),
    )
    yield (
        "conv-circular",
        Case("Conv", (7, (3,)), (2, 8, 5), (3, 5, 3), (3, 7), padding="CIRCULAR"),
    )
    yield (
        "conv-3d",
        Case("Conv", (7, (2, 2, 2)), (2, 4, 4, 4, 3), (2, 2, 2, 3, 3), (3, 7)),
    )

    yield (
        "conv-causal",
        Case("Conv", (7, (3,)), (2, 8, 5), (3, 5, 3), (3, 7), padding="CAUSAL"),
    )
    yield (
        "transpose",
        Case("ConvTranspose", (7, (3, 2)), (2, 5, 6, 5), (3, 2, 5, 3), (3, 7)),
    )
    yield (
        "transpose-transposed-strided",
        Case(
            "ConvTranspose",
            (7, (3,)),
            (2, 8, 5),
            (3, 5, 3),
            (3, 7),
            strides=(2,),
            transpose_kernel=True,
        ),
    )
    yield (
        "transpose-circular-dilated",
        Case(
            "ConvTranspose",
            (7, (3,)),
            (2, 8, 5),
            (3, 5, 3),
            (3, 7),
            padding="CIRCULAR",
            kernel_dilation=(2,),
        ),
    )
    for flags in itertools.product((False, True), repeat=3):
        if any(flags):
            k, own = sum(flags), {"enable_lora": flags}
            case = Case("MergedDense", (21,), (11, 5), (k, 5, 3), (k, 3, 7), own)
            yield f"merged-{''.join(str(int(f)) for f in flags)}", case


LAYERS = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in cases()]
)


def moved(variables, seed=7):
    """The variables with random factors."""
    return {**variables, "lora": randomise(variables["lora"], seed)}


def tolerance(*arrays):
    """1e-5 in float32; a rounding to bfloat16 of each of three products, or of the
    merged weight, where anything is bfloat16."""
    if all(y.dtype == jnp.float32 for y in arrays):
        return 1e-5
    return 3 * float(jnp.finfo(jnp.bfloat16).eps)


@LAYERS
def test_params_are_the_twins(case):
    """Names, shapes, dtypes and initial values: pretrained checkpoints load."""
    assert set(case.variables) == {"params", "lora"}
    same(case.variables["params"], case.plain["params"])
    (leaf,) = adapted(case.variables["lora"]).values()
    assert (leaf.a.shape, leaf.b.shape) == (case.a, case.b)
    assert leaf.a.dtype == leaf.b.dtype == leaf.scale.dtype == jnp.float32
    batch = case.a[: leaf.scale.ndim]
    assert leaf.scale.shape == batch
    assert (leaf.scale == 1).all()
    assert leaf.b.any() != leaf.a.any()  # one of the two is zero: so is the delta


@LAYERS
def test_rank_zero_is_the_twin(case):
    layer = case.make(rank=0)
    jaxprs = [jax.make_jaxpr(m.init)(KEY, case.x) for m in (layer, case.twin)]
    assert str(jaxprs[0]) == str(jaxprs[1])
    shapes = [jax.eval_shape(m.init, KEY, case.x) for m in (layer, case.twin)]
    assert shapes[0] == shapes[1]
    jaxprs = [jax.make_jaxpr(m.apply)(case.plain, case.x) for m in (layer, case.twin)]
    assert str(jaxprs[0]) == str(jaxprs[1])


@LAYERS
def test_at_the_start_it_computes_what_the_twin_does(case):
    y = quiet(case.layer.apply, case.variables, case.x)
    want = case.twin.apply(case.plain, case.x)
    assert y.dtype == want.dtype
    np.testing.assert_array_equal(y, want)


@LAYERS
def test_adapter_goes_to_the_plain_twin_and_back(case):
    """Same outputs: the layer, the lifted twin with the adapter attached, the twin
    on merged params; and the layer again, with the adapter put back."""
    variables, x = case.moved, case.x
    run = jax.jit(case.layer.apply)
    y = quiet(run, variables, x)
    adapter = jlora.linen.adapter(variables)
    (path,) = adapter
    assert path in paths({"params": variables["params"]})
    assert adapter[path].w is None
    tree = jlora.attach({"params": variables["params"]}, adapter)
    lifted = quiet(jax.jit(jlora.lift(case.twin.apply)), tree, x)
    np.testing.assert_array_equal(lifted, y)
    merged, start = (case.twin.apply(f(tree), x) for f in (jlora.merge, jlora.unwrap))
    close(y, merged, tolerance(y, *jax.tree.leaves(variables["params"])))
    gap = np.abs(np.asarray(y, np.float32) - np.asarray(start, np.float32)).max()
    assert gap > 0.05 * float(jnp.abs(y).max())
    back = jlora.linen.attach(case.variables, adapter)
    same(back["lora"], variables["lora"])
    same(quiet(run, back, x), y)
    again = jlora.linen.adapter(jlora.linen.attach(variables, jlora.adapter(tree)))
    same(again, adapter)


@LAYERS
def test_gradients_are_those_of_the_lifted_twin(case):
    variables, x = case.moved, case.x
    adapter = jlora.linen.adapter(variables)
    tree = jlora.attach({"params": variables["params"]}, adapter)

    def ours(variables):
        y = case.layer.apply(variables, x)
        return (y.astype(jnp.float32) ** 2).sum(), y

    def theirs(tree):
        y = jlora.lift(case.twin.apply)(tree, x)
        return (y.astype(jnp.float32) ** 2).sum(), y

    def both(variables, tree):
        return jax.grad(ours, has_aux=True)(variables), jax.grad(theirs, has_aux=True)(
            tree
        )

    (got, y), (want, _) = jax.jit(both)(variables, tree)
    (got,), (want,) = adapted(got["lora"]).values(), adapted(want).values()
    close(got.a, want.a, tolerance(y))
    close(got.b, want.b, tolerance(y))


def test_merged_dense_leaves_the_other_slices_alone():
    x, flags = normal(11, 5), (True, False, True)
    layer = jlora.linen.MergedDense(21, rank=3, enable_lora=flags)
    variables = moved(layer.init(KEY, x))
    change = layer.apply(variables, x) - nn.Dense(21).apply(
        {"params": variables["params"]}, x
    )
    moves = np.abs(change).reshape(11, 3, 7).max((0, 2))
    np.testing.assert_array_equal(moves > 0.1, flags)
    np.testing.assert_array_equal(moves[1], 0)


def test_merged_dense_with_nothing_enabled_is_the_twin():
    x = normal(11, 6)
    layer = jlora.linen.MergedDense(6, rank=3, enable_lora=(False, False, False))
    variables = layer.init(KEY, x)
    assert set(variables) == {"params"}
    same(layer.apply(variables, x), nn.Dense(6).apply(variables, x))


def test_merged_dense_with_a_wrong_number_of_flags():
    layer = jlora.linen.MergedDense(21, rank=3, enable_lora=(True,) * 4)
    with pytest.raises(ValueError, match=r"flags that divides 21.*first out axis"):
        layer.init(KEY, normal(11, 5))


def test_factors_of_another_rank():
    layer = jlora.linen.Dense(7, rank=3)
    variables = layer.init(KEY, normal(11, 5))
    with pytest.raises(ValueError, match=r"rank 3, expected 2"):
        jlora.linen.Dense(7, rank=2).apply(variables, normal(11, 5))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jlora.linen.Dense(5, rank=2)(x), None


def test_variables_without_the_factors():
    """The pretrained params alone, another name of the collection, a bare nn.scan."""
    x, layer = normal(11, 5), jlora.linen.Dense(7, rank=2)
    params, lora = layer.init(KEY, x).values()
    for variables in ({"params": params}, {"params": params, "adapters": lora}):
        with pytest.raises(ValueError, match="no factors of 'kernel': expected .*lora"):
            layer.apply(variables, x)
    axes, rngs = {"params": 0}, {"params": True}
    model = nn.scan(Step, variable_axes=axes, split_rngs=rngs, length=3)()
    with pytest.raises(ValueError, match=r"variable_axes \({'params': 0, 'lora': 0}"):
        model.init(KEY, x, None)


def test_factors_of_another_layer():
    """They could broadcast to its outputs."""
    x, one = normal(11, 5), jlora.linen.Dense(1, rank=2)
    layer = jlora.linen.Dense(7, rank=2)
    params, _ = layer.init(KEY, x).values()
    variables = {"params": params, "lora": one.init(KEY, x)["lora"]}
    with pytest.raises(ValueError, match=r"of shape \(5, 1\), and one of .*\(5, 7\)"):
        layer.apply(variables, x)


def test_attach_of_leaves_that_no_layer_reads():
    layer, x = jlora.linen.Dense(7, rank=2), normal(11, 5)
    variables = layer.init(KEY, x)
    adapter = jlora.linen.adapter(variables)
    bias = {"params/bias": jlora.Full(None, jnp.ones(7))}
    with pytest.raises(ValueError, match="'params/bias' belongs to no layer"):
        jlora.linen.attach(variables, adapter | bias)
    with pytest.raises(ValueError, match="'params/bias' was trained whole"):
        jlora.linen.attach({"params": variables["params"]}, adapter | bias)
    with pytest.raises(ValueError, match="expected variables with 'params'"):
        jlora.linen.attach({}, adapter)


def test_the_base_has_no_gradient_where_all_variables_are_differentiated():
    layer, x = jlora.linen.Dense(7, rank=2), normal(11, 5)
    variables = moved(layer.init(KEY, x))
    grads = jax.grad(lambda v: (layer.apply(v, x) ** 2).sum())(variables)
    same(grads["params"]["kernel"], jnp.zeros((5, 7)))
    assert (grads["params"]["bias"] != 0).all()
    assert (grads["lora"]["kernel"].a != 0).all()


def test_collections_beside_the_params_reach_the_twin():
    """Such as the scales of float8, which nn.Dense reads at every call."""
    x = normal(16, 16)
    float8 = {"dot_general_cls": nn.Fp8DirectDotGeneralOp}
    layer = jlora.linen.Dense(16, rank=2, **float8)
    variables = layer.init(KEY, x)
    lora = variables.pop("lora")
    same(
        silent(layer.apply, {**variables, "lora": lora}, x),
        nn.Dense(16, **float8).apply(variables, x),
    )


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1])
def test_a_dropout_rate_that_is_none(rate):
    layer = jlora.linen.Dense(7, dropout_rate=rate, deterministic=True)
    with pytest.raises(ValueError, match=r"dropout_rate .*expected a number in"):
        layer.init(KEY, normal(11, 5))


def test_alpha_is_divided_by_rank():
    layer = jlora.linen.Dense(7, rank=4, alpha=2)
    variables = layer.init(KEY, normal(11, 5))
    assert float(variables["lora"]["kernel"].scale) == 0.5
    assert float(jlora.linen.adapter(variables)["params/kernel"].scale) == 0.5


def test_attend_is_tied():
    layer = jlora.linen.Embed(13, 5, rank=3)
    variables = moved(layer.init(KEY, integers(3, below=13)))
    table = jlora.merge(
        jlora.attach({"params": variables["params"]}, jlora.linen.adapter(variables))
    )["params"]["embedding"]
    x = normal(11, 5)
    close(layer.apply(variables, x, method="attend"), x @ table.T)
    ids = integers(4, below=13)
    close(layer.apply(variables, ids), table[ids])


# --------------------------------------------------------------------- dropout


def test_dropout_by_the_dropout_rng_and_deterministic():
    """With the identity as factors the branch is the dropped activation itself."""
    x = jnp.ones((64, 16))
    layer = jlora.linen.Dense(16, rank=16, dropout_rate=0.5)
    variables = layer.init({"params": KEY, "dropout": KEY}, x, deterministic=True)
    eye = jnp.eye(16)
    leaf = variables["lora"]["kernel"]
    leaf = dataclasses.replace(leaf, a=eye, b=eye)
    variables = {**variables, "lora": {"kernel": leaf}}
    plain = nn.Dense(16).apply({"params": variables["params"]}, x)

    def run(seed, **kwargs):
        rngs = {"dropout": jax.random.key(seed)}
        y = layer.apply(variables, x, deterministic=False, rngs=rngs)
        return np.asarray(y - plain)

    mask = run(1)
    assert set(np.round(mask.ravel(), 3)) == {0.0, 2.0}
    # 1,024 positions kept with probability 1/2: 5 standard errors are 0.08.
    assert abs((mask > 1).mean() - 0.5) < 0.08
    same(run(1), mask)
    assert (run(2) != mask).any()
    fixed = layer.apply(variables, x, deterministic=True)
    close(fixed - plain, x)
    by_field = jlora.linen.Dense(16, rank=16, dropout_rate=0.5, deterministic=True)
    same(by_field.apply(variables, x), fixed)
    with pytest.raises(Exception, match="dropout"):
        layer.apply(variables, x, deterministic=False)


def test_rate_zero_needs_no_rng_and_no_word():
    layer = jlora.linen.Dense(7, rank=3)
    variables = layer.init(KEY, normal(11, 5))
    layer.apply(variables, normal(11, 5))


# ------------------------------------------------------------------ in a model


class Net(nn.Module):
    """A scanned, rematerialised stack between an embedding and its tied head."""

    lib: object
    lora: tuple = ()

    @nn.compact
    def __call__(self, ids):
        lib, lora = self.lib, dict(self.lora)
        embed = lib.Embed(13, 8, name="embed", **lora)

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = lib.DenseGeneral((2, 6), name="up", **lora)(nn.LayerNorm()(x))
                h = jax.nn.gelu(h)
                return x + lib.DenseGeneral(8, axis=(-2, -1), name="down", **lora)(
                    h
                ), None

        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="blocks")(embed(ids), None)
        return embed.attend(lib.Dense(8, name="last", **lora)(x))


PLAIN = Net(nn)
ADAPTED = Net(jlora.linen, (("rank", 3),))
IDS = integers(2, 7, below=13)


@pytest.fixture(scope="module")
def variables():
    return moved(jax.jit(ADAPTED.init)(KEY, IDS))


def test_a_scanned_model_has_the_params_of_its_plain_twin(variables):
    same(variables["params"], jax.jit(PLAIN.init)(KEY, IDS)["params"])
    leaf = variables["lora"]["blocks"]["up"]["kernel"]
    assert (leaf.a.shape, leaf.b.shape) == ((3, 8, 3), (3, 3, 2, 6))
    assert leaf.scale.shape == (3,)
    assert (leaf.a[0] != leaf.a[1]).all()


def test_a_scanned_model_is_its_plain_twin_with_the_adapter(variables):
    adapter = jlora.linen.adapter(variables)
    tree = jlora.attach({"params": variables["params"]}, adapter)
    y = quiet(jax.jit(ADAPTED.apply), variables, IDS)
    close(quiet(jax.jit(jlora.lift(PLAIN.apply)), tree, IDS), y)
    close(jax.jit(PLAIN.apply)(jlora.merge(tree), IDS), y)
    statuses = {e.path: e.status for e in jlora.explain(PLAIN.apply, tree, IDS)}
    assert set(statuses) == set(adapter) and set(statuses.values()) == {"factored"}


def test_an_adapter_of_the_plain_model_moves_into_the_layers(variables):
    base = {"params": variables["params"]}
    targets = ["**/kernel", "**/embedding"]
    plan = jlora.plan(PLAIN.apply, base, IDS, rank=3, targets=targets)
    tree = randomise(jlora.wrap(base, plan=plan), seed=11)
    moved_in = jlora.linen.attach(variables, jlora.adapter(tree))
    y = quiet(jax.jit(ADAPTED.apply), moved_in, IDS)
    close(y, jax.jit(PLAIN.apply)(jlora.merge(tree), IDS))


def test_training_the_variables_moves_the_factors_alone(variables):
    """The variables are an adapted tree: the usual TrainState loop trains them."""
    before = jax.tree.map(np.array, variables["params"])
    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1), variables)
    state = TrainState.create(apply_fn=ADAPTED.apply, params=variables, tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn(params, IDS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, IDS).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(5):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    same(state.params["params"], before)
    old, new = (adapted(t["lora"]) for t in (variables, state.params))
    for path, leaf in old.items():
        same(new[path].scale, leaf.scale)
        assert (new[path].a != leaf.a).any() and (new[path].b != leaf.b).any()
    trainable, _ = jlora.count(variables)
    sizes = [leaf.a.size + leaf.b.size for leaf in old.values()]
    assert trainable == sum(sizes)


def test_layers_form_no_array_of_a_weights_size():
    layer, x = jlora.linen.Dense(7, rank=3), normal(11, 5)
    variables = layer.init(KEY, x)
    jaxpr = jax.make_jaxpr(layer.apply)(variables, x)
    products = [
        eqn.outvars[0].aval.size
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert sorted(products) == [33, 77, 77]


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize("rank", [-1, 2.5, "8"])
def test_bad_rank(rank):
    with pytest.raises((ValueError, TypeError)) as error:
        jlora.linen.Dense(7, rank=rank).init(KEY, normal(11, 5))
    says(error, "Dense", "rank", repr(rank), "positive integer")


def test_adapter_of_plain_variables():
    variables = nn.Dense(7).init(KEY, normal(11, 5))
    with pytest.raises(ValueError, match="lora") as error:
        jlora.linen.adapter(variables)
    says(error, "params", "jlora.linen")


def test_attach_of_what_does_not_fit(variables):
    adapter = jlora.linen.adapter(variables)
    adapter["params/lats/kernel"] = adapter.pop("params/last/kernel")
    with pytest.raises(ValueError) as error:
        jlora.linen.attach(variables, adapter)
    says(error, "params/lats/kernel", "params/last/kernel")
