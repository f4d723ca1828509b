"""What always holds: the base is untouched, the start is exact, merging rounds once.

(Invariant 3 is test_lift.py, 4 and 5 are test_cost.py, 7 is test_checkpoint.py.)
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import (
    OPTIMISED,
    adapt,
    adapted,
    by_hand,
    close,
    delta,
    equations,
    integers,
    normal,
    quiet,
    randomise,
    same,
)

import jlora


@functools.cache
def lm():
    """A function, its params, an input, and the params as `wrap` leaves them."""
    model, params, ids = models.scanned_lm()

    def fn(params, ids):
        return model.apply({"params": params}, ids)

    targets = ["**/kernel", "**/embedding"]
    plan = jlora.plan(fn, params, ids, targets=targets)
    return fn, params, ids, jlora.wrap(params, plan=plan, train=["norm/*"])


@functools.cache
def net():
    model, variables, x = models.conv_net()
    plan = jlora.plan(model.apply, variables, x)
    tree = jlora.wrap(variables, plan=plan, train=["params/norm/*"])
    return model.apply, variables, x, tree


MODELS = [pytest.param(lm, id="scanned-lm"), pytest.param(net, id="conv-net")]


def low_rank_of(tree):
    """The adapter without what trains whole."""
    found = jlora.adapter(tree)
    return {path: leaf for path, leaf in found.items() if isinstance(leaf, jlora.LoRA)}


# ------------------------------------------------- 1: the same array objects


@pytest.mark.parametrize("make", MODELS)
def test_unwrap_returns_the_same_objects(make):
    _, params, _, tree = make()
    back = jlora.unwrap(tree)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert old is new
    assert any(isinstance(leaf, jlora.Full) for leaf in adapted(tree).values())
    for leaf in adapted(tree).values():
        assert any(leaf.w is old for old in jax.tree.leaves(params))
    for leaf in adapted(randomise(tree)).values():
        assert any(leaf.w is old for old in jax.tree.leaves(params))


@pytest.mark.parametrize("make", MODELS)
def test_no_operation_writes_or_casts_the_base(make):
    fn, params, x, tree = make()
    before = jax.tree.map(np.array, params)
    tree = randomise(tree)
    jlora.merge(tree)
    jlora.scaled(tree, 0.5)
    jlora.adapter(tree)
    jlora.attach(params, jlora.adapter(tree))
    jlora.unmerge(jlora.merge(tree), low_rank_of(tree))
    jlora.combine(*jlora.partition(tree))
    jax.jit(jlora.lift(fn))(jlora.dropout(tree, 0.1, jax.random.key(0)), x)
    same(jax.tree.map(np.array, params), before)


# --------------------------------------------------- 2: the start, bit for bit


@pytest.mark.parametrize("make", MODELS)
def test_at_the_start_the_model_is_unchanged_op_by_op(make):
    """b is zero, and adding a zero changes no bit of a non-zero number."""
    fn, params, x, tree = make()
    with jax.disable_jit():
        np.testing.assert_array_equal(quiet(jlora.lift(fn), tree, x), fn(params, x))


@pytest.mark.parametrize("make", MODELS)
def test_at_the_start_the_model_is_unchanged_under_jit_without_fusion(make):
    fn, params, x, tree = make()
    options = {**OPTIMISED, "xla_disable_hlo_passes": "fusion"}

    def run(fn, tree):
        return jax.jit(fn).lower(tree, x).compile(compiler_options=options)(tree, x)

    np.testing.assert_array_equal(run(jlora.lift(fn), tree), run(fn, params))
    # The comparison sees a delta of one part in 10^4.
    small = jlora.scaled(randomise(jlora.attach(params, low_rank_of(tree))), 1e-4)
    assert (np.asarray(run(jlora.lift(fn), small)) != run(fn, params)).any()


@pytest.mark.parametrize("make", MODELS)
def test_at_the_start_the_model_is_unchanged_under_ordinary_jit(make):
    """Within 1e-5: any added operation moves XLA's fusions, which round elsewhere."""
    fn, params, x, tree = make()
    got = jax.jit(jlora.lift(fn), compiler_options=OPTIMISED)(tree, x)
    close(got, jax.jit(fn, compiler_options=OPTIMISED)(params, x), 1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_merge_at_the_start_is_the_base_in_every_bit(make):
    _, params, _, tree = make()
    same(jlora.merge(tree), params)


# ------------------------------------------- 6: bit-identical after training


@pytest.mark.parametrize(
    "dtype, donate",
    [(jnp.float32, True), (jnp.bfloat16, False)],
    ids=["donated", "kept"],
)
def test_base_is_bit_identical_after_training_by_train_state(dtype, donate):
    fn, params, ids, _ = lm()
    params = jax.tree.map(lambda v: jnp.array(v, dtype, copy=True), params)
    before = jax.tree.map(np.array, params)
    plan = jlora.plan(fn, params, ids, targets=["**/kernel", "**/embedding"])
    tree = jlora.wrap(params, plan=plan, train=["norm/*"], bias="lora_only")
    started = jax.tree.map(np.array, jlora.partition(tree)[0])
    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1), tree)
    state = TrainState.create(apply_fn=jlora.lift(fn), params=tree, tx=tx)

    def step(state, ids):
        def loss(params):
            logits = state.apply_fn(params, ids[:, :-1]).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
            return losses.mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    step = jax.jit(step, donate_argnums=(0,) if donate else ())
    losses = []
    for _ in range(4):
        state, loss = step(state, ids)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    same(jlora.unwrap(state.params), before)
    ended = jlora.partition(state.params)[0]
    for old, new in zip(jax.tree.leaves(started), jax.tree.leaves(ended), strict=True):
        assert (old != np.asarray(new)).any()
    # Donating the state gave up the user's params, which are the same buffers.
    assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves(params))


def test_base_is_bit_identical_after_training_by_partition():
    fn, params, x, tree = net()
    before = jax.tree.map(np.array, params)
    trainable, frozen = jlora.partition(tree)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return (jlora.lift(fn)(jlora.combine(trainable, frozen), x) ** 2).mean()

        grads = jax.grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(3):
        trainable, state = step(trainable, state)
    tree = jlora.combine(trainable, frozen)
    same(jax.tree.map(np.array, jlora.unwrap(tree)), before)
    for old, new in zip(
        jax.tree.leaves(params), jax.tree.leaves(jlora.unwrap(tree)), strict=True
    ):
        assert old is new


# ------------------------------------------------- 8: merge rounds once


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_merge_rounds_half_precision_once(dtype):
    """Computed in float32 and cast: at most the float32 error of a·b can tip a value
    that lies within 1e-6 of the middle between two neighbours, some 1 in 10^4.
    Rounding the delta first would be wrong in a fifth of all values."""
    params = {"w": normal(211, 199, dtype=dtype)}
    x = normal(3, 211, dtype=dtype)
    tree, plan = adapt(lambda p, x: x @ p["w"], params, x, rank=5)
    merged = jlora.merge(tree)["w"]
    assert merged.dtype == dtype
    exact = by_hand(tree, plan, np)["w"]
    right = np.asarray(jnp.asarray(exact, jnp.float32).astype(dtype), np.float32)
    wrong = np.mean(right != np.asarray(merged, np.float32))
    assert wrong < 1e-3
    part = jnp.asarray(delta(tree["w"], plan["w"]), dtype)
    twice = np.asarray(params["w"] + part, np.float32)
    assert np.mean(right != twice) > 0.05


def experts(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([4, 0, 7], jnp.int32))


def convolved(p, x):
    images = jnp.resize(x, (2, 5, 7, 3))
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        images, p["w"], (1, 1), "SAME", dimension_numbers=dims
    )


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


IN_64 = [
    pytest.param(lambda p, x: x @ p["w"] + p["b"], (5, 7), id="dense"),
    pytest.param(lambda p, x: x @ p["w"].T + p["b"], (7, 5), id="transposed"),
    pytest.param(lambda p, x: p["w"][jnp.arange(3)], (5, 7), id="lookup"),
    pytest.param(experts, (3, 5, 7), id="experts"),
    pytest.param(convolved, (3, 3, 3, 4), id="convolution"),
    pytest.param(scanned, (3, 5, 5), id="stack"),
    pytest.param(
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((5, 2))], 1),
        (5, 7),
        id="beside-an-array",
    ),
    pytest.param(
        lambda p, x: jnp.einsum(
            "bi,kio->bko", x, jnp.stack([p["w"], jnp.ones((5, 7))])
        ),
        (5, 7),
        id="stacked-with-an-array",
    ),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("fn, shape", IN_64)
def test_a_float64_base_gets_a_float64_delta(fn, shape, dtype):
    """The factors are narrower; what is computed with them is not."""
    with jax.enable_x64(True):
        shapes = {"w": shape, "b": (7,)}
        params = {k: normal(*s, dtype=jnp.float64) for k, s in shapes.items()}
        x = normal(11, 5, seed=1, dtype=jnp.float64)
        for rank, alpha in ((2, 3), (3, 1)):
            plan = jlora.plan(fn, params, x, rank=rank, alpha=alpha, targets="w")
            tree = jlora.wrap(params, plan=plan, dtype=dtype)
            assert (tree["w"].scale == alpha / rank).all()
            tree = randomise(tree, scale=False)
            want = by_hand(tree, plan, np)
            merged = jlora.merge(tree)
            assert merged["w"].dtype == jnp.float64
            close(merged, jax.tree.map(jnp.asarray, want), 1e-15)
            got = quiet(jax.jit(jlora.lift(fn)), tree, x)
            close(got, jax.jit(fn)(merged, x), 1e-14)
            back = jlora.unmerge(merged, jlora.adapter(tree))
            close(back, params, 1e-15)


def test_full_values_merge_back_to_the_base_dtype():
    params = {"w": normal(5, 7, dtype=jnp.bfloat16), "b": normal(7, dtype=jnp.bfloat16)}
    tree = jlora.wrap({"kernel": params["w"], "bias": params["b"]}, train=["bias"])
    assert tree["bias"].value.dtype == jnp.float32
    same(jlora.merge(tree)["bias"], params["b"])
    moved = randomise(tree)
    want = np.asarray(moved["bias"].value).astype(jnp.bfloat16)
    same(jlora.merge(moved)["bias"], jnp.asarray(want))


# ------------------------------------------------------------- dtype rules

HALF = [jnp.bfloat16, jnp.float16]


def mixed(dtype):
    return [
        pytest.param(dtype, dtype, id=f"{dtype.__name__}-both"),
        pytest.param(jnp.float32, dtype, id=f"{dtype.__name__}-activation"),
        pytest.param(dtype, jnp.float32, id=f"{dtype.__name__}-base"),
    ]


@pytest.mark.parametrize("base, activation", mixed(jnp.bfloat16) + mixed(jnp.float16))
def test_results_keep_the_dtype_they_had(base, activation):
    def fn(p, x, ids):
        with jax.numpy_dtype_promotion("standard"):
            dims = (((2,), (0,)), ((), ()))
            raw = jax.lax.dot_general(x, p["u"].astype(x.dtype), dims)
            wide = jax.lax.dot_general(
                x, p["u"].astype(x.dtype), dims, preferred_element_type=jnp.float32
            )
            image = jax.lax.conv_general_dilated(
                x,
                p["k"].astype(x.dtype),
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            return x @ p["w"], p["e"][ids], raw, wide, image

    params = {
        "w": normal(5, 7, dtype=base),
        "u": normal(5, 7, seed=1, dtype=base),
        "e": normal(13, 5, dtype=base),
        "k": normal(3, 5, 7, dtype=base),
    }
    x, ids = normal(2, 11, 5, seed=1, dtype=activation), integers(11, below=13)
    tree, plan = adapt(fn, params, x, ids)
    for leaf in adapted(tree).values():
        assert leaf.a.dtype == leaf.b.dtype == jnp.float32
    got = quiet(jlora.lift(fn), tree, x, ids)
    plain = fn(params, x, ids)
    assert [y.dtype for y in got] == [y.dtype for y in plain]
    # Against float64: each of W, a and b, the activation times a, and the sum are
    # rounded to the result's precision once, and errors add up over 5 products.
    exact = fn64(by_hand(tree, plan, np), np.asarray(x, np.float64), ids)
    for y, want in zip(got, exact, strict=True):
        half = {jnp.dtype(base), jnp.dtype(activation)} - {jnp.dtype(jnp.float32)}
        eps = float(jnp.finfo(half.pop()).eps)
        gap = abs(np.asarray(y, np.float64) - want).max()
        assert gap <= 4 * eps * abs(want).max()


def fn64(p, x, ids):
    """The function above in numpy, in float64."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    image = sum(padded[:, i : i + x.shape[1]] @ p["k"][i] for i in range(3))
    return x @ p["w"], p["e"][ids], x @ p["u"], x @ p["u"], image


@pytest.mark.parametrize("dtype", HALF)
def test_factors_train_in_float32_under_a_half_precision_base(dtype):
    params = {"kernel": normal(5, 7, dtype=dtype)}
    x = normal(11, 5, seed=1, dtype=dtype)
    tree = randomise(jlora.wrap(params, rank=3))

    def loss(tree):
        return jlora.lift(lambda p, x: (x @ p["kernel"]).sum())(tree, x)

    grads = jax.grad(loss)(tree)["kernel"]
    assert grads.a.dtype == grads.b.dtype == jnp.float32
    assert grads.w.dtype == dtype


def test_no_product_is_wider_than_the_models():
    """In a bfloat16 model no dot runs in float32: the factors are cast, not x."""
    params = {"kernel": normal(5, 7, dtype=jnp.bfloat16)}
    x = normal(11, 5, dtype=jnp.bfloat16)
    tree = jlora.wrap(params, rank=3)
    jaxpr = jax.make_jaxpr(jlora.lift(lambda p, x: x @ p["kernel"]))(tree, x)
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


def test_what_float16_makes_of_adam_is_said_once():
    """Its eps is zero there: the warning is true, and so is its advice."""
    params, x, y = {"kernel": normal(5, 7)}, normal(11, 5), normal(11, 7)
    f = jlora.lift(lambda p, x: x @ p["kernel"])

    def trained(tree, tx):
        trainable, frozen = jlora.partition(tree)
        state = tx.init(trainable)

        def loss(trainable):
            return ((f(jlora.combine(trainable, frozen), x) - y) ** 2).mean()

        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return loss(trainable)

    with pytest.warns(
        UserWarning, match="dtype=float16: .*6e-08.*eps of 1e-08"
    ) as said:
        tree = jlora.wrap(params, rank=2, dtype=jnp.float16)
    assert len(said) == 1 and said[0].filename == __file__
    assert jnp.isnan(trained(tree, optax.adamw(1e-2)))
    assert trained(tree, optax.adamw(1e-2, eps=1e-4)) < 10
    for dtype in (jnp.bfloat16, jnp.float32):
        tree = quiet(jlora.wrap, params, rank=2, dtype=dtype)
        assert trained(tree, optax.adamw(1e-2)) < 10


def test_dtype_of_the_factors_can_be_chosen():
    params = {"kernel": normal(5, 7)}
    leaf = jlora.wrap(params, rank=3, dtype=jnp.bfloat16)["kernel"]
    assert leaf.a.dtype == leaf.b.dtype == jnp.bfloat16
    assert leaf.scale.dtype == jnp.float32


def test_the_library_runs_without_implicit_promotion_of_dtype_or_rank():
    params = {"kernel": normal(5, 7, dtype=jnp.bfloat16)}
    x = normal(11, 5, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        tree = randomise(jlora.wrap(params, rank=3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dropped = jlora.dropout(tree, 0.5, jax.random.key(0))
            jlora.lift(lambda p, x: x @ p["kernel"])(dropped, x)
            jlora.merge(tree)
            jlora.unmerge(jlora.merge(tree), jlora.adapter(tree))
            jlora.scaled(tree, 0.5)
