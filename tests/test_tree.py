"""Trees: wrap, merge, attach, partition, optimizers, dropout, counts; their algebra."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import (
    adapt,
    adapted,
    by_hand,
    close,
    equations,
    normal,
    paths,
    quiet,
    randomise,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jlora


def params(dtype=jnp.float32):
    return {
        "up": {"kernel": normal(5, 7, dtype=dtype), "bias": normal(7, dtype=dtype)},
        "norm": {
            "scale": normal(7, dtype=dtype),
            "bias": normal(7, seed=1, dtype=dtype),
        },
        "down": {"kernel": normal(7, 3, dtype=dtype), "bias": normal(3, dtype=dtype)},
    }


def mlp(p, x):
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    h = h * p["norm"]["scale"] + p["norm"]["bias"]
    return h @ p["down"]["kernel"] + p["down"]["bias"]


X = normal(11, 5, seed=2)


def tree_of(**kwargs):
    return randomise(jlora.wrap(params(), rank=2, **kwargs))


# ------------------------------------------------------------------- the leaf


def test_wrap_keeps_structure_and_paths():
    tree = jlora.wrap(params(), rank=2)
    shape = jax.tree.map(lambda leaf: 0, tree, is_leaf=jlora.is_adapted)
    assert shape == jax.tree.map(lambda leaf: 0, params())
    assert list(adapted(tree)) == ["down/kernel", "up/kernel"]
    leaf = tree["up"]["kernel"]
    assert (leaf.shape, leaf.ndim, leaf.dtype) == ((5, 7), 2, jnp.float32)
    assert jax.tree.leaves(leaf)[0] is leaf.w  # Linen's own shape check reads this one


def test_the_leaf_survives_tree_map_to_anything():
    tree = jlora.wrap(params(), rank=2, train=["norm/*"])
    struct = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)
    assert struct["up"]["kernel"].a.shape == (5, 2)
    for value in ("text", None, 3, jax.sharding.SingleDeviceSharding(jax.devices()[0])):
        mapped = jax.tree.map(lambda v, value=value: value, tree)
        assert mapped["up"]["kernel"].b == value
        assert mapped["norm"]["scale"].value == value
    leaves, treedef = jax.tree.flatten(tree)
    same(jax.tree.unflatten(treedef, leaves), tree)
    assert hash(treedef) == hash(
        jax.tree.structure(jlora.wrap(params(), rank=2, train=["norm/*"]))
    )


def test_every_leaf_has_a_scale_buffer_of_its_own():
    tree = jlora.wrap(params(), rank=2)
    scales = [leaf.scale for leaf in adapted(tree).values()]
    pointers = {scale.unsafe_buffer_pointer() for scale in scales}
    assert len(pointers) == len(scales)
    step = jax.jit(lambda tree: jax.tree.map(lambda v: v + 1, tree), donate_argnums=0)
    step(jax.tree.map(jnp.copy, tree))  # one buffer twice could not be donated


def test_abstract_params_give_abstract_leaves():
    shapes = jax.eval_shape(params)
    tree = jlora.wrap(shapes, rank=2, train=["norm/*"])
    concrete = jlora.wrap(params(), rank=2, train=["norm/*"])
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(tree))
    assert jax.tree.structure(tree) == jax.tree.structure(concrete)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(concrete), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


def test_the_dtype_of_abstract_factors_is_that_of_the_moment():
    """What makes them is kept from call to call, what JAX's settings say is not."""
    params = {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    for x64 in (True, False, True):
        with jax.enable_x64(x64), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that JAX narrows float64
            leaf = jlora.wrap(params, rank=2, dtype=np.float64)["kernel"]
        assert leaf.a.dtype == leaf.b.dtype == (np.float64 if x64 else np.float32)


def test_wrap_and_merge_run_under_jit():
    got = jax.jit(lambda p: jlora.merge(jlora.wrap(p, rank=2)))(params())
    same(got, params())


# ------------------------------------------------------------------------ init


def uniform_gap(sample, low, high):
    """Kolmogorov-Smirnov's D·sqrt(n) against a uniform distribution."""
    x = np.sort((np.asarray(sample, np.float64).ravel() - low) / (high - low))
    steps = np.arange(1, x.size + 1) / x.size
    gap = max(abs(steps - x).max(), abs(steps - 1 / x.size - x).max())
    return gap * np.sqrt(x.size)


@pytest.mark.parametrize(
    "use, shape, x, fan_in",
    [
        pytest.param(lambda x, w: x @ w, (64, 32), (2, 64), 64, id="dense"),
        pytest.param(lambda x, w: x @ w.T, (32, 64), (2, 64), 64, id="torch-layout"),
        pytest.param(
            lambda x, w: jnp.einsum("bhd,hde->be", x, w),
            (4, 16, 32),
            (2, 4, 16),
            64,
            id="heads-in",
        ),
        pytest.param(
            lambda x, w: lax.scan(lambda c, w: (c, x @ w), 0, w)[1],
            (3, 64, 32),
            (2, 64),
            64,
            id="stacked",
        ),
        pytest.param(
            lambda x, w: lax.conv_general_dilated(
                x,
                w,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=2,
            ),
            (3, 3, 8, 32),
            (2, 5, 5, 16),
            72,
            id="grouped-conv",
        ),
    ],
)
def test_kaiming_init(use, shape, x, fan_in):
    """a uniform within ±1/√fan_in: D·√n < 1.95 holds in 999 of 1000 draws, and this
    draw is fixed; a normal of the same variance would give more than 4."""
    p = {"w": normal(*shape)}
    plan = jlora.plan(lambda p, x: use(x, p["w"]), p, normal(*x), rank=16)
    leaf = jlora.wrap(p, plan=plan)["w"]
    assert not leaf.b.any()
    bound = 1 / np.sqrt(fan_in)
    assert 0.99 * bound < float(abs(leaf.a).max()) <= bound
    assert uniform_gap(leaf.a, -bound, bound) < 1.95
    other = np.random.default_rng(0).normal(size=leaf.a.shape) * bound / np.sqrt(3)
    assert uniform_gap(np.clip(other, -bound, bound), -bound, bound) > 1.95


def test_embedding_init_is_zero_and_normal():
    """The sum of squares of n standard normals is n, within 5·√(2n)."""
    leaf = jlora.wrap({"embedding": normal(101, 64)}, rank=16, targets=["embedding"])
    leaf = leaf["embedding"]
    assert not leaf.a.any()
    n = leaf.b.size
    assert abs(float((leaf.b**2).sum()) - n) < 5 * np.sqrt(2 * n)
    assert abs(float(leaf.b.sum())) < 5 * np.sqrt(n)
    assert abs(float((leaf.b**4).sum()) / (3 * n) - 1) < 5 * np.sqrt(96 / 9 / n)


def test_slices_of_a_stack_start_different():
    p = {"w": normal(3, 5, 7)}
    plan = jlora.plan(
        lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1], p, X
    )
    a = np.asarray(jlora.wrap(p, plan=plan)["w"].a)
    assert (a[0] != a[1]).all() and (a[1] != a[2]).all()


def test_a_leafs_start_depends_on_key_and_path_alone():
    alone = jlora.wrap({"up": {"kernel": normal(5, 7)}}, rank=2)["up"]["kernel"]
    among = jlora.wrap({"a": {"kernel": normal(5, 7)}, **params()}, rank=2)
    same(among["up"]["kernel"].a, alone.a)
    assert (among["a"]["kernel"].a != alone.a).all()
    default = jlora.wrap(params(), rank=2, key=jax.random.key(0))["up"]["kernel"]
    same(default.a, alone.a)
    other = jlora.wrap(params(), rank=2, key=jax.random.key(1))["up"]["kernel"]
    assert (other.a != alone.a).all()


def test_a_leafs_start_is_the_same_in_every_process():
    """Python's own hash of strings differs from process to process."""
    code = (
        "import jax.numpy as jnp, jlora, numpy as np;"
        "t = jlora.wrap({'up': {'kernel': jnp.ones((5, 7))}}, rank=2);"
        "print(np.asarray(t['up']['kernel'].a).tobytes().hex())"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(jlora.__file__).parent.parent),
        "PYTHONHASHSEED": "12345",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as here; XLA rounds otherwise else
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    here = jlora.wrap({"up": {"kernel": jnp.ones((5, 7))}}, rank=2)["up"]["kernel"].a
    assert run.stdout.strip() == np.asarray(here).tobytes().hex() != ""


# ------------------------------------------------------------- merge and back


def test_merge_is_the_dense_matrix():
    tree, plan = adapt(mlp, params(), X, rank=2)
    got, want = jlora.merge(tree), by_hand(tree, plan, np)
    for path, leaf in paths(want).items():
        np.testing.assert_allclose(paths(got)[path], leaf, rtol=0, atol=1e-6)
    for path, leaf in paths(params()).items():
        if path not in plan:
            same(paths(got)[path], leaf)


@pytest.mark.parametrize(
    "use, shape, x",
    [
        pytest.param(lambda x, w: x @ w.T, (7, 5), (11, 5), id="torch-layout"),
        pytest.param(
            lambda x, w: jnp.einsum("be,hed->bhd", x, w),
            (3, 5, 7),
            (11, 5),
            id="middle",
        ),
        pytest.param(
            lambda x, w: jnp.einsum("bei,ioe->beo", x, w),
            (5, 7, 3),
            (11, 3, 5),
            id="batch-last",
        ),
        pytest.param(
            lambda x, w: lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
            ),
            (7, 5, 3),
            (2, 5, 11),
            id="conv-channels-first",
        ),
    ],
)
def test_merge_of_other_layouts_is_the_dense_matrix(use, shape, x):
    p, x = {"w": normal(*shape)}, normal(*x)
    tree, plan = adapt(lambda p, x: use(x, p["w"]), p, x)
    want = by_hand(tree, plan, np)["w"]
    np.testing.assert_allclose(jlora.merge(tree)["w"], want, rtol=0, atol=1e-6)


def test_unmerge_subtracts_up_to_rounding():
    """Two roundings, of w + delta and of the difference: eps of the larger."""
    tree = tree_of()
    merged = jlora.merge(tree)
    back = jlora.unmerge(merged, jlora.adapter(tree))
    for path, leaf in paths(back).items():
        size = max(abs(paths(merged)[path]).max(), abs(paths(params())[path]).max())
        gap = abs(leaf - paths(params())[path]).max()
        assert gap <= 4 * np.finfo(np.float32).eps * size
    assert not np.array_equal(merged["up"]["kernel"], back["up"]["kernel"])


def test_merge_of_a_plain_tree_is_that_tree():
    p = params()
    assert jlora.merge(p)["up"]["kernel"] is p["up"]["kernel"]
    assert jlora.unwrap(p)["up"]["kernel"] is p["up"]["kernel"]


# --------------------------------------------------------- adapter and attach


def test_adapter_is_a_flat_dict_without_the_base():
    tree = tree_of(train=["norm/*"])
    adapter = jlora.adapter(tree)
    assert type(adapter) is dict
    assert sorted(adapter) == ["down/kernel", "norm/bias", "norm/scale", "up/kernel"]
    assert all(leaf.w is None for leaf in adapter.values())
    assert adapter["up/kernel"].a is tree["up"]["kernel"].a
    assert adapter["norm/bias"].value is tree["norm"]["bias"].value
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 2 * (12 + 10) + 14 + 2


def test_attach_gives_the_tree_back():
    tree = tree_of(train=["norm/*"])
    base = jlora.unwrap(tree)
    back = jlora.attach(base, jlora.adapter(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert got is want


def test_adapters_can_be_computed_with():
    """One dict for arithmetic: a mean of two adapters' factors, attached."""
    one, two = (jlora.adapter(randomise(tree_of(), seed)) for seed in (1, 2))
    mean = jax.tree.map(lambda *v: sum(v) / 2, one, two)
    tree = jlora.attach(params(), mean)
    want = (one["up/kernel"].a + two["up/kernel"].a) / 2
    close(tree["up"]["kernel"].a, want)


def test_renaming_moves_an_adapter_between_trees():
    adapter = jlora.adapter(tree_of())
    moved = {f"params/{path}": leaf for path, leaf in adapter.items()}
    tree = jlora.attach({"params": params()}, moved)
    same(jlora.merge(tree)["params"], jlora.merge(tree_of()))


# ----------------------------------------------------------------- partition


def test_partition_puts_what_trains_in_one_half():
    tree = tree_of(train=["norm/*"])
    trainable, frozen = jlora.partition(tree)
    none = {"is_leaf": lambda v: v is None}
    structure = jax.tree.structure(tree, **none)
    for half in (trainable, frozen):
        assert jax.tree.structure(half, **none) == structure
    assert sorted(paths(trainable)) == sorted(
        ["up/kernel/a", "up/kernel/b", "down/kernel/a", "down/kernel/b"]
        + ["norm/scale/value", "norm/bias/value"]
    )
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(tree)
    )
    whole = jlora.combine(trainable, frozen)
    for got, want in zip(jax.tree.leaves(whole), jax.tree.leaves(tree), strict=True):
        assert got is want
    assert jax.tree.structure(whole) == jax.tree.structure(tree)


def test_labels():
    found = paths(jlora.labels(tree_of(train=["norm/*"])))
    trained = {path: label for path, label in found.items() if label != "frozen"}
    assert trained == {
        "up/kernel/a": "lora",
        "up/kernel/b": "lora",
        "down/kernel/a": "lora",
        "down/kernel/b": "lora",
        "norm/scale/value": "full",
        "norm/bias/value": "full",
    }
    assert set(found) == set(paths(tree_of(train=["norm/*"])))


# -------------------------------------------------------------- train and bias


def test_train_makes_whole_arrays_train_from_where_they_are():
    p = params(jnp.bfloat16)
    tree = jlora.wrap(p, rank=2, train=["norm/*", "down/kernel"])
    leaf = tree["norm"]["scale"]
    assert isinstance(leaf, jlora.Full) and leaf.w is p["norm"]["scale"]
    assert leaf.value.dtype == jnp.float32
    same(leaf.value, p["norm"]["scale"].astype(jnp.float32))
    assert isinstance(tree["down"]["kernel"], jlora.Full)
    f32 = jlora.wrap(params(), rank=2, train=["norm/*"])["norm"]["scale"]
    assert f32.value.unsafe_buffer_pointer() != f32.w.unsafe_buffer_pointer()
    same(jlora.merge(tree), p)


@pytest.mark.parametrize(
    "bias, expected",
    [
        ("none", []),
        ("all", ["down/bias", "norm/bias", "up/bias"]),
        ("lora_only", ["up/bias"]),
    ],
)
@pytest.mark.parametrize("traced", [True, False], ids=["trace", "names"])
def test_bias_modes(bias, expected, traced):
    if traced:
        plan = jlora.plan(mlp, params(), X, rank=2, targets=["up/kernel"])
        tree = jlora.wrap(params(), plan=plan, bias=bias)
    else:
        tree = jlora.wrap(params(), rank=2, targets=["up/kernel"], bias=bias)
    full = [p for p, v in adapted(tree).items() if isinstance(v, jlora.Full)]
    assert sorted(full) == expected


def test_lora_only_trains_the_bias_that_was_seen_whatever_its_name():
    def fn(p, x):
        return x @ p["w"] + p["shift"]

    p = {"w": normal(5, 7), "shift": normal(7), "bias": normal(7)}
    tree = jlora.wrap(p, plan=jlora.plan(fn, p, X), bias="lora_only")
    assert isinstance(tree["shift"], jlora.Full) and tree["bias"] is p["bias"]


def layers(weight, bias):
    """Two layers in one dict, with names of this form."""
    return {
        weight.format(0): normal(5, 7),
        bias.format(0): normal(7),
        weight.format(1): normal(7, 3),
        bias.format(1): normal(3),
        "step": jnp.int32(3),
    }


NAMES = [
    ("{}/kernel", "{}/bias"),
    ("fc{}.weight", "fc{}.bias"),
    ("fc{}.linear.weight", "fc{}.linear.biases"),
    ("c_attn{}_w", "c_attn{}_b"),
    ("kernel_{}", "bias_{}"),
    ("w{}", "b{}"),
    ("w_{}", "b_{}"),
    ("block_{}_kernel", "block_{}_bias"),
]


@pytest.mark.parametrize("weight, bias", NAMES)
@pytest.mark.parametrize("targets", ["both", "one"])
@pytest.mark.parametrize("traced", [True, False], ids=["trace", "names"])
def test_all_biases_train_whatever_their_names(weight, bias, targets, traced):
    """All of them, also those of weights that are not adapted."""
    p = layers(weight, bias)
    names = [weight.format(k) for k in range(2)][: 2 if targets == "both" else 1]

    def fn(p, x):
        for k in range(2):
            x = x @ p[weight.format(k)] + p[bias.format(k)]
        return x

    plan = jlora.plan(fn, p, X, targets=names) if traced else None
    targets = None if traced else names
    tree = jlora.wrap(p, plan=plan, targets=targets, bias="all")
    full = {path for path, v in adapted(tree).items() if isinstance(v, jlora.Full)}
    assert full == {bias.format(0), bias.format(1)}
    assert isinstance(tree[names[0]], jlora.LoRA)


def test_all_biases_are_also_those_that_were_seen():
    def fn(p, x):
        return (x @ p["w"] + p["shift"]) * p["b_norm"]

    p = {"w": normal(5, 7), "shift": normal(7), "b_norm": normal(7), "mu": normal(7)}
    tree = jlora.wrap(p, plan=jlora.plan(fn, p, X), bias="all")
    full = {path for path, v in adapted(tree).items() if isinstance(v, jlora.Full)}
    assert full == {"shift", "b_norm"}


def test_what_is_no_parameter_is_no_bias():
    p = {"params": {"w": normal(5, 7), "b": normal(7)}, "stats": {"bias": normal(7)}}
    tree = jlora.wrap(p, targets="**/w", bias="all")
    assert isinstance(tree["params"]["b"], jlora.Full)
    assert tree["stats"]["bias"] is p["stats"]["bias"]


# --------------------------------------------------------------------- scaled


def test_scaled_by_zero_is_the_base_and_nothing_recompiles():
    tree, traces = tree_of(), []

    @jax.jit
    def run(tree, x):
        traces.append(1)
        return jlora.lift(mlp)(tree, x)

    full = run(tree, X)
    off = run(jlora.scaled(tree, 0.0), X)
    run(jlora.scaled(tree, 3), X)
    run(jlora.scaled(tree, jnp.float32(0.5)), X)
    assert len(traces) == 1
    close(off, mlp(params(), X))
    assert abs(full - off).max() > 0.1 * abs(off).max()
    same(jlora.merge(jlora.scaled(tree, 0.0)), params())


def test_scaled_keeps_the_base_and_the_factors():
    tree = tree_of()
    other = jlora.scaled(tree, 0.5)["up"]["kernel"]
    leaf = tree["up"]["kernel"]
    assert other.w is leaf.w and other.a is leaf.a and other.b is leaf.b
    same(other.scale, leaf.scale * 0.5)
    adapter = jlora.scaled(jlora.adapter(tree), 0.5)
    same(adapter["up/kernel"].scale, leaf.scale * 0.5)


# ------------------------------------------------------------------- optimizer


def grads_like(tree):
    return jax.tree.map(
        lambda v: jnp.cos(jnp.arange(v.size) + 1.0).reshape(v.shape), tree
    )


def test_optimizer_steps_the_adapters_alone():
    """SGD with decay in closed form; bases and scales do not move, whatever their
    gradients are."""
    tree = tree_of(train=["norm/*"])
    tx = jlora.optimizer(
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5)), tree
    )
    grads = grads_like(tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    new = optax.apply_updates(tree, updates)
    for path, label in paths(jlora.labels(tree)).items():
        old, grad = paths(tree)[path], paths(grads)[path]
        moved = old - 0.5 * (grad + 0.1 * old)
        if label == "frozen":
            same(paths(new)[path], old)
        else:
            close(paths(new)[path], moved, 1e-6)


def test_optimizer_takes_another_one_for_full_leaves():
    tree = tree_of(train=["norm/*"])
    tx = jlora.optimizer(optax.sgd(0.5), tree, full=optax.sgd(0.125))
    grads = grads_like(tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    rates = {"lora": -0.5, "full": -0.125, "frozen": 0}
    for path, label in paths(jlora.labels(tree)).items():
        close(paths(updates)[path], paths(grads)[path] * rates[label], 1e-6)


def test_optimizer_state_is_for_the_adapters_alone():
    tree = tree_of()
    state = jlora.optimizer(optax.adam(1e-3), tree).init(tree)
    numbers = sum(v.size for v in jax.tree.leaves(state) if v.ndim)
    assert numbers == 2 * jlora.count(tree)[0]


def test_clipping_inside_sees_the_adapters_alone():
    tree = tree_of()
    tx = jlora.optimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), tree
    )
    grads = jax.tree.map(lambda v: jnp.full(v.shape, 1e3), tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    close(optax.tree.norm(updates), jnp.float32(1), 1e-5)
    moved = updates["up"]["kernel"].a
    n = sum(v.size for v in jax.tree.leaves(jlora.partition(tree)[0]))
    close(moved, jnp.full(moved.shape, -1 / np.sqrt(n), jnp.float32), 1e-5)


def test_multi_steps_inside_accumulates():
    tree = tree_of()
    tx = jlora.optimizer(optax.MultiSteps(optax.sgd(1.0), 2), tree)
    grads = grads_like(tree)
    state = tx.init(tree)
    first, state = tx.update(grads, state, tree)
    assert not any(v.any() for v in jax.tree.leaves(first))
    second, _ = tx.update(jax.tree.map(lambda v: 3 * v, grads), state, tree)
    close(second["up"]["kernel"].a, -2 * grads["up"]["kernel"].a, 1e-6)
    assert not second["up"]["kernel"].w.any()


def test_schedules_and_injected_hyperparameters_work():
    tree = tree_of()
    tx = jlora.optimizer(
        optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 2)), tree
    )
    grads, state = grads_like(tree), tx.init(tree)
    for rate in (1.0, 0.5, 0.0):
        updates, state = tx.update(grads, state, tree)
        close(updates["up"]["kernel"].a, -rate * grads["up"]["kernel"].a, 1e-6)


def boxed():
    """A tree of Linen's boxes with axis names, and its function."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    layer = nn.Dense(7, kernel_init=init)
    tree = jlora.wrap(layer.init(jax.random.key(0), X), rank=2, bias="all")

    def fn(p, x):
        return layer.apply(nn.unbox(p), x)

    return tree, fn


@pytest.mark.parametrize(
    "make, full",
    [
        pytest.param(lambda: (tree_of(train=["norm/*"]), mlp), None, id="dict"),
        pytest.param(boxed, optax.sgd(0.1), id="boxes-and-another-for-full"),
    ],
)
def test_lbfgs_goes_the_way_of_the_trainable_half(make, full):
    """Its line search calls a function of the params, and gets trees of gradients."""
    tree, fn = make()
    goal, lifted = jnp.cos(fn(jlora.merge(tree), X)), jlora.lift(fn)

    def loss(tree, goal):
        return ((lifted(tree, X) - goal) ** 2).mean()

    def steps(update, params):
        values, step = [], jax.jit(update)
        state = None
        for _ in range(4):
            params, state, value = step(params, state)
            values.append(value)
        return params, jnp.stack(values)

    tx = jlora.optimizer(optax.lbfgs(memory_size=3), tree, full=full)

    def ours(params, state):
        state = tx.init(params) if state is None else state
        value, grad = jax.value_and_grad(loss)(params, goal)
        given = dict(value=value, grad=grad, value_fn=loss, goal=goal)
        updates, state = tx.update(grad, state, params, **given)
        return optax.apply_updates(params, updates), state, value

    def part(names):
        return jax.tree.map(
            lambda x, label: x if label in names else None, tree, jlora.labels(tree)
        )

    names = [("lora", "full")] if full is None else [("lora",), ("full",)]
    txs, frozen = [optax.lbfgs(memory_size=3), full], part(["frozen"])

    def theirs(parts, states):
        """Each part moves with the others as they were."""
        new = []
        for k, (own, tx) in enumerate(zip(parts, txs, strict=False)):
            others = [frozen, *(x for i, x in enumerate(parts) if i != k)]

            def value_fn(own, others=others):
                for other in others:
                    own = jlora.combine(own, other)
                return loss(own, goal)

            state = tx.init(own) if states is None else states[k]
            value, grad = jax.value_and_grad(value_fn)(own)
            tx = optax.with_extra_args_support(tx)
            given = dict(value=value, grad=grad, value_fn=value_fn)
            updates, state = tx.update(grad, state, own, **given)
            new.append((optax.apply_updates(own, updates), state))
        return [x for x, _ in new], [state for _, state in new], value

    got, values = steps(ours, tree)
    want, expected = steps(theirs, [part(own) for own in names])
    assert values[-1] < 0.8 * values[0]
    close(values, expected, 1e-4)
    for own in want:
        frozen = jlora.combine(own, frozen)
    close(got, frozen, 1e-3)
    same(jlora.unwrap(got), jlora.unwrap(tree))


def test_a_function_that_gives_gradients_is_passed_on():
    """As optax.contrib.sam calls it, which takes two steps in each update."""
    tree, lifted = tree_of(), jlora.lift(mlp)

    def grad_fn(params, _=None):
        return jax.grad(lambda p: (lifted(p, X) ** 2).mean())(params)

    def moved(params, wrap, grad_fn):
        sam = optax.contrib.sam(
            optax.sgd(0.1), optax.sgd(0.05), sync_period=2, opaque_mode=True
        )
        tx = wrap(sam)
        updates, _ = tx.update(
            grad_fn(params), tx.init(params), params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates)

    got = moved(tree, lambda tx: jlora.optimizer(tx, tree), grad_fn)
    half, frozen = jlora.partition(tree)

    def of_half(half, _=None):
        return jlora.partition(grad_fn(jlora.combine(half, frozen)))[0]

    close(got, jlora.combine(moved(half, lambda tx: tx, of_half), frozen), 1e-5)


def test_the_four_lines():
    """The README's loop: loss falls, the merged params are a plain model's."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(jnp.tanh(nn.Dense(7)(x)))

    model, y = Net(), normal(11, 3, seed=5)
    base = model.init(jax.random.key(0), X)["params"]
    lora = jlora.wrap(base, rank=2)
    apply = jlora.lift(model.apply)
    tx = jlora.optimizer(optax.adamw(1e-2), lora)
    state = TrainState.create(apply_fn=apply, params=lora, tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            return ((state.apply_fn({"params": params}, X) - y) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(40):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    merged = jlora.merge(state.params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    close(model.apply({"params": merged}, X), apply({"params": state.params}, X))


# --------------------------------------------------------------------- dropout
#
# With a = b = 1 (the identity) the low-rank branch of y = x·W is the dropped x itself,
# so that y - x·W shows the mask: 0, or 1/(1 - rate) of x.

IDENTITY = jnp.eye(16)


def visible(w=None, **batch):
    """A wrapped 16 x 16 kernel whose branch is the identity."""
    tree = jlora.wrap({"kernel": normal(16, 16) if w is None else w}, rank=16)
    leaf = tree["kernel"]
    return {"kernel": dataclasses.replace(leaf, a=IDENTITY, b=IDENTITY)}


def mask_of(y, tree, x):
    """The dropped x over x, from the output."""
    return np.asarray((y - x @ tree["kernel"].w) / x)


def dense(p, x):
    return x @ p["kernel"]


ONES = jnp.ones((64, 16))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_the_activation_before_a(rate):
    """Each number is dropped or divided by 1 - rate; the share kept is within five
    standard errors of a binomial's."""
    tree = visible()
    y = quiet(jlora.lift(dense), jlora.dropout(tree, rate, jax.random.key(3)), ONES)
    mask = mask_of(y, tree, ONES)
    kept = abs(mask) > 0.5
    np.testing.assert_allclose(mask[kept], 1 / (1 - rate), rtol=1e-4)
    np.testing.assert_allclose(mask[~kept], 0, atol=1e-5)
    error = np.sqrt(rate * (1 - rate) / mask.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error


def test_dropout_leaves_the_base_product_alone():
    tree = jlora.scaled(visible(), 0.0)
    y = jlora.lift(dense)(jlora.dropout(tree, 0.5, jax.random.key(3)), ONES)
    close(y, ONES @ tree["kernel"].w, 1e-6)


def test_dropout_is_right_on_average():
    """The mean over 4,000 keys is the output without dropout, within five standard
    errors that are estimated from the same sample."""
    tree = tree_of()["up"]
    x = X[:2]
    run = jax.vmap(
        lambda key: jlora.lift(dense)(
            jlora.dropout({"kernel": tree["kernel"]}, 0.3, key), x
        )
    )
    ys = np.asarray(run(jax.random.split(jax.random.key(0), 4000)), np.float64)
    want = np.asarray(jlora.lift(dense)({"kernel": tree["kernel"]}, x))
    error = ys.std(axis=0) / np.sqrt(len(ys))
    assert error.min() > 0
    assert (abs(ys.mean(axis=0) - want) < 5 * error + 1e-6).all()


def test_rate_zero_is_no_dropout():
    tree = tree_of()
    dropped = jlora.dropout(tree, 0.0, jax.random.key(0))
    same(jlora.lift(mlp)(dropped, X), jlora.lift(mlp)(tree, X))


def test_the_same_key_gives_the_same_mask_and_another_key_another():
    tree = visible()

    def run(seed):
        return jlora.lift(dense)(jlora.dropout(tree, 0.5, jax.random.key(seed)), ONES)

    same(run(0), run(0))
    assert (run(0) != run(1)).any()
    legacy = jlora.lift(dense)(jlora.dropout(tree, 0.5, jax.random.PRNGKey(0)), ONES)
    same(legacy, run(0))


def agreement(one, two):
    """Share of positions with the same fate; 1/2 for independent masks at rate 1/2,
    and 5 standard errors of 1024 positions are 0.08."""
    return np.mean((abs(one) > 0.5) == (abs(two) > 0.5))


INDEPENDENT = pytest.approx(0.5, abs=0.08)


def test_masks_differ_from_leaf_to_leaf():
    tree = {"one": visible(), "two": visible()}
    dropped = jlora.dropout(tree, 0.5, jax.random.key(0))
    ys = jlora.lift(lambda p, x: (dense(p["one"], x), dense(p["two"], x)))(
        dropped, ONES
    )
    masks = [mask_of(y, visible(), ONES) for y in ys]
    assert agreement(*masks) == INDEPENDENT


def test_masks_differ_from_use_to_use():
    dropped = jlora.dropout(visible(), 0.5, jax.random.key(0))
    ys = jlora.lift(lambda p, x: (dense(p, x), dense(p, x)))(dropped, ONES)
    masks = [mask_of(y, visible(), ONES) for y in ys]
    assert agreement(*masks) == INDEPENDENT


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(
            lambda p, x: lax.scan(lambda c, _: (c, dense(p, x)), 0, None, length=3)[1],
            id="scan-consts",
        ),
        pytest.param(
            lambda p, x: lax.scan(lambda p, _: (p, dense(p, x)), p, None, length=3)[1],
            id="scan-carry",
        ),
        pytest.param(
            lambda p, x: lax.scan(
                jax.checkpoint(lambda c, _: (c, dense(p, x))), 0, None, length=3
            )[1],
            id="remat-in-scan",
        ),
        pytest.param(
            lambda p, x: lax.fori_loop(
                0, 3, lambda i, ys: ys.at[i].set(dense(p, x)), jnp.zeros((3, 64, 16))
            ),
            id="fori",
        ),
        pytest.param(
            lambda p, x: lax.map(lambda x: dense(p, x), jnp.stack([x] * 3)), id="map"
        ),
        pytest.param(
            lambda p, x: jnp.stack([jax.checkpoint(dense)(p, x) for _ in range(3)]),
            id="three-remats",
        ),
        pytest.param(
            lambda p, x: jnp.stack([jax.jit(dense)(p, x) for _ in range(3)]),
            id="three-jits",
        ),
        pytest.param(
            lambda p, x: lax.scan(
                lambda c, _: (c, lax.cond(x[0, 0] > 0, dense, dense, p, x)),
                0,
                None,
                length=3,
            )[1],
            id="cond-in-scan",
        ),
    ],
)
def test_masks_differ_from_step_to_step(fn):
    dropped = jlora.dropout(visible(), 0.5, jax.random.key(0))
    ys = jlora.lift(fn)(dropped, ONES)
    masks = [mask_of(y, visible(), ONES) for y in ys]
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert agreement(masks[one], masks[two]) == INDEPENDENT


def test_masks_differ_from_slice_to_slice_of_a_stack():
    def fn(p, x):
        return lax.scan(lambda c, w: (c, x @ w), 0, p["kernel"])[1]

    p = {"kernel": normal(3, 16, 16)}
    tree = jlora.wrap(p, plan=jlora.plan(fn, p, ONES, rank=16))
    eye = jnp.stack([IDENTITY] * 3)
    tree = {"kernel": dataclasses.replace(tree["kernel"], a=eye, b=eye)}
    dropped = jlora.dropout(tree, 0.5, jax.random.key(0))
    ys = jlora.lift(fn)(dropped, ONES)
    masks = [np.asarray(y - ONES @ w) for y, w in zip(ys, p["kernel"], strict=True)]
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert agreement(masks[one], masks[two]) == INDEPENDENT
    one_slice = jax.tree.map(lambda v: v[1], dropped)
    y = jlora.lift(lambda p, x: x @ p["kernel"])(one_slice, ONES)
    assert (abs(np.asarray(y - ONES @ p["kernel"][1])) > 0.5).any()


@pytest.mark.parametrize(
    "wrapper", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "remat", "jit"]
)
def test_the_backward_pass_uses_the_forward_passs_mask(wrapper):
    """The gradients of sum(c·y) for a and b in closed form, from the mask that the
    same forward pass shows; a rematerialised pass must draw the same one again."""
    tree, weights = visible(), normal(64, 16, seed=4)
    dropped = jlora.dropout(tree, 0.5, jax.random.key(0))

    def loss(tree):
        y = jlora.lift(wrapper(dense))(tree, ONES)
        return (weights * y).sum(), y

    grads, y = jax.grad(loss, has_aux=True, allow_int=True)(dropped)
    mask = mask_of(y, tree, ONES)
    want = jnp.asarray(mask.T @ np.asarray(weights), jnp.float32)
    close(grads["kernel"].a, want, 1e-4)
    close(grads["kernel"].b, want, 1e-4)


def test_dropout_of_the_loss_trains_through_a_train_state():
    tree = tree_of()
    tx = jlora.optimizer(optax.sgd(0.1), tree)
    state = TrainState.create(apply_fn=jlora.lift(mlp), params=tree, tx=tx)

    @jax.jit
    def step(state, key):
        def loss(params):
            return (state.apply_fn(jlora.dropout(params, 0.5, key), X) ** 2).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = step(state, jax.random.key(1))
    assert jax.tree.structure(state.params) == jax.tree.structure(tree)
    same(jlora.unwrap(state.params), params())


def test_dropout_keeps_half_precision():
    p = {"kernel": normal(16, 16, dtype=jnp.bfloat16)}
    dropped = jlora.dropout(jlora.wrap(p, rank=2), 0.5, jax.random.key(0))
    x = ONES.astype(jnp.bfloat16)
    assert jlora.lift(dense)(dropped, x).dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(jlora.lift(dense))(dropped, x)
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


def test_dropout_on_convolutions():
    """With one group, kernel size 1 and the identity as factors, the mask is seen."""

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    p, x = {"kernel": normal(1, 16, 16)}, jnp.ones((2, 32, 16))
    tree = jlora.wrap(p, plan=jlora.plan(fn, p, x, rank=16))
    leaf = dataclasses.replace(tree["kernel"], a=IDENTITY[None], b=IDENTITY)
    dropped = jlora.dropout({"kernel": leaf}, 0.5, jax.random.key(0))
    mask = np.asarray(jlora.lift(fn)(dropped, x) - fn(p, x))
    assert set(np.round(mask.ravel(), 3)) == {0.0, 2.0}


# ------------------------------------------------------------ count and summary


def test_count_by_hand():
    tree = jlora.wrap(params(), rank=2, train=["norm/*"])
    base = 35 + 7 + 7 + 7 + 21 + 3
    trainable = 2 * (5 + 7) + 2 * (7 + 3) + 14
    assert jlora.count(tree) == (trainable, base + trainable)
    dropped = jlora.dropout(tree, 0.5, jax.random.key(0))
    assert jlora.count(dropped) == jlora.count(tree)
    assert jlora.count(params()) == (0, base)


def test_summary_has_a_row_for_each_adapted_leaf_and_the_totals():
    text = str(jlora.summary(jlora.wrap(params(), rank=2, train=["norm/*"])))
    rows = text.splitlines()
    for path, number in [
        ("up/kernel", "24"),
        ("down/kernel", "20"),
        ("norm/scale", "7"),
        ("norm/bias", "7"),
    ]:
        (row,) = [row for row in rows if row.split()[:1] == [path]]
        assert number in row.replace("×", " ").split(), row
    assert "up/bias" not in text
    assert "58" in text and "138" in text


# ----------------------------------------------------------- algebra, by property

SIZES = st.sampled_from([1, 3, 4])  # few, since every shape is compiled
RANKS = st.sampled_from([1, 2])
KERNELS = st.dictionaries(
    st.sampled_from(["a", "b", "c/d", "c/e/f"]),
    st.tuples(SIZES, SIZES, st.booleans()),
    min_size=1,
)
SETTINGS = settings(max_examples=20, deadline=None, derandomize=True)


def build(spec, seed):
    """A nested tree with a kernel, and perhaps a bias, at each of the paths."""
    p = {}
    for i, (path, (rows, columns, bias)) in enumerate(sorted(spec.items())):
        node = p
        for key in path.split("/"):
            node = node.setdefault(key, {})
        node["kernel"] = normal(rows, columns, seed=seed + i)
        if bias:
            node["bias"] = normal(columns, seed=seed + i)
    return p


def mode(spec, bias):
    """The mode; "none" for a tree without a bias, which refuses the others."""
    return bias if any(has for *_, has in spec.values()) else "none"


@SETTINGS
@given(
    KERNELS, RANKS, st.integers(0, 99), st.sampled_from(["none", "all", "lora_only"])
)
def test_property_adapter_and_attach_are_inverse(spec, rank, seed, bias):
    p = build(spec, seed)
    tree = randomise(jlora.wrap(p, rank=rank, bias=mode(spec, bias)), seed)
    adapter = jlora.adapter(tree)
    same(jlora.attach(p, adapter), tree)
    same(jlora.adapter(jlora.attach(p, adapter)), adapter)
    same(jlora.unwrap(tree), p)


@SETTINGS
@given(KERNELS, RANKS, st.integers(0, 99), st.sampled_from(["none", "all"]))
def test_property_partition_and_combine_are_inverse(spec, rank, seed, bias):
    p = build(spec, seed)
    tree = randomise(jlora.wrap(p, rank=rank, bias=mode(spec, bias)), seed)
    halves = jlora.partition(tree)
    same(jlora.combine(*halves), tree)
    again = jlora.partition(jlora.combine(*halves))
    same(again[0], halves[0])
    same(again[1], halves[1])
    assert jlora.count(tree)[0] == sum(v.size for v in jax.tree.leaves(halves[0]))


POWERS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, -1.0, -4.0])


@SETTINGS
@given(KERNELS, RANKS, st.integers(0, 99), POWERS, POWERS)
def test_property_scaled_composes_and_scales_the_delta(spec, rank, seed, s, t):
    """Powers of two, so that equality is exact; then merge is linear in the scale."""
    p = build(spec, seed)
    tree = randomise(jlora.wrap(p, rank=rank), seed)
    same(jlora.scaled(jlora.scaled(tree, s), t), jlora.scaled(tree, s * t))
    merged, one = jlora.merge(jlora.scaled(tree, s)), jlora.merge(tree)
    for path, w in paths(p).items():
        w = np.asarray(w, np.float64)
        want = w + s * (np.asarray(paths(one)[path], np.float64) - w)
        size = max(abs(want).max(), abs(w).max(), 1e-6)
        # Three roundings to float32, one of them times |s|.
        gap = abs(np.asarray(paths(merged)[path]) - want).max()
        assert gap <= (4 + 4 * abs(s)) * np.finfo(np.float32).eps * 4 * size


@settings(SETTINGS, max_examples=10)
@given(st.integers(1, 3), SIZES, SIZES, RANKS, st.integers(0, 99))
def test_property_slicing_a_stacked_tree_is_wrapping_the_slices(
    n, rows, columns, rank, seed
):
    """Same static part, so one slice is a leaf like any other; and slice and merge
    commute, whoever slices: indexing, tree.map, scan or vmap."""

    def fn(p, x):
        return lax.scan(lambda c, w: (c, x @ w), 0, p["kernel"])[1]

    p, x = {"kernel": normal(n, rows, columns, seed=seed)}, normal(2, rows)
    tree, _ = adapt(fn, p, x, rank=rank, seed=seed)
    merged = jlora.merge(tree)["kernel"]
    for i in range(n):
        one = jax.tree.map(lambda v, i=i: v[i], tree)
        plain = jlora.wrap({"kernel": p["kernel"][i]}, rank=rank)
        assert jax.tree.structure(one) == jax.tree.structure(plain)
        assert [v.shape for v in jax.tree.leaves(one)] == [
            v.shape for v in jax.tree.leaves(plain)
        ]
        close(jlora.merge(one)["kernel"], merged[i], 1e-6)
        close(jlora.lift(lambda p, x: x @ p["kernel"])(one, x), x @ merged[i])
    close(jax.vmap(jlora.merge)(tree)["kernel"], merged, 1e-6)


@SETTINGS
@given(KERNELS, RANKS, st.integers(0, 99))
def test_property_unmerge_undoes_merge(spec, rank, seed):
    p = build(spec, seed)
    tree = randomise(jlora.wrap(p, rank=rank), seed)
    back = jlora.unmerge(jlora.merge(tree), jlora.adapter(tree))
    for path, w in paths(p).items():
        size = max(abs(paths(jlora.merge(tree))[path]).max(), abs(w).max())
        assert abs(paths(back)[path] - w).max() <= 1e-6 * size


def test_whole_leaves_attach_to_another_base():
    p = {"d": {"kernel": jnp.ones((3, 4)), "bias": jnp.full(4, 5.0)}}
    leaf = jlora.wrap(p, rank=2)["d"]["kernel"]
    other = jax.tree.map(lambda x: 2 * x, p)
    tree = jlora.attach(other, {"d/kernel": leaf})
    assert tree["d"]["kernel"].w is other["d"]["kernel"]
    assert tree["d"]["bias"] is other["d"]["bias"]
