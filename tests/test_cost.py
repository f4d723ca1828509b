"""What a training step costs, counted by XLA on an unrolled Llama-like model.

Nothing runs here: every step is compiled for abstract arrays and read. Sizes of base
weights are products of primes that no activation shares (models.py), so an
instruction whose result has as many elements as a weight has that weight's shape, in
some layout.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import EMITTERS, adapted, base_sized, hlo_count, is_adapted, paths

import jlora

MODEL = models.Llama()
BATCH, SEQ, RANK = 2, 96, 5
TOKENS = BATCH * SEQ
PARAMS = MODEL.shapes()
IDS = jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)
PATHS = [path for path in paths(PARAMS) if path.startswith("layer_")]
TARGETS = [path for path in PATHS if "norm" not in path]
SIZES = {int(np.prod(paths(PARAMS)[path].shape)) for path in TARGETS}
PRODUCTS = ["dot", "convolution", "custom-call"]


@pytest.fixture(scope="module")
def tree():
    plan = jlora.plan(
        MODEL, PARAMS, IDS, rank=RANK, alpha=2 * RANK, targets=models.LLAMA_TARGETS
    )
    assert set(plan) == set(TARGETS)
    return jlora.wrap(PARAMS, plan=plan)


def compiled(fn, *args, donate=()):
    lowered = jax.jit(fn, donate_argnums=donate).lower(*args)
    return lowered.compile(compiler_options=EMITTERS)


def flops(program):
    return program.cost_analysis()["flops"]


def materialised(tree):
    """W+BA in the loss, as a merging apply_fn would have it."""

    def one(leaf):
        if not is_adapted(leaf):
            return jax.lax.stop_gradient(leaf)
        return jax.lax.stop_gradient(leaf.w) + (leaf.a @ leaf.b) * leaf.scale

    return jax.tree.map(one, tree, is_leaf=is_adapted)


@pytest.fixture(scope="module")
def programs(tree):
    """Value and gradient of the loss, in five ways."""
    trainable, frozen = jlora.partition(tree)
    lifted = jlora.lift(MODEL.loss)

    def adapted_loss(trainable, frozen, ids):
        return lifted(jlora.combine(trainable, frozen), ids)

    def materialised_loss(trainable, frozen, ids):
        return MODEL.loss(materialised(jlora.combine(trainable, frozen)), ids)

    q, kv = MODEL.heads * MODEL.head_dim, MODEL.kv_heads * MODEL.head_dim
    bump = [jax.ShapeDtypeStruct((BATCH, SEQ, n), jnp.float32) for n in (q, kv, kv)]
    grad = jax.value_and_grad
    return {
        "lora": compiled(grad(adapted_loss), trainable, frozen, IDS),
        "whole tree": compiled(grad(lifted), tree, IDS),
        # The first adapted weights are the first layer's q, k and v: their gradient
        # wants the gradient at their outputs, and none at their input. A zero added
        # to those outputs, and the gradient with respect to it, is just that.
        "floor": compiled(grad(MODEL.loss, argnums=2), PARAMS, IDS, bump),
        "full": compiled(grad(MODEL.loss), PARAMS, IDS),
        "materialised": compiled(grad(materialised_loss), trainable, frozen, IDS),
    }


def adapter_flops():
    """6 * tokens * r * (in + out): two products forward, four backward."""
    sides = sum(sum(paths(PARAMS)[path].shape) for path in TARGETS)
    return 6 * TOKENS * RANK * sides


def test_floor_is_what_the_arithmetic_says(programs):
    """Two products per weight (forward, and back to the activation; the first
    layer's q, k and v and the embedding have the first alone) and attention's six;
    the rest, elementwise, is less than a hundredth."""
    q, kv = MODEL.heads * MODEL.head_dim, MODEL.kv_heads * MODEL.head_dim
    weights = sum(np.prod(paths(PARAMS)[path].shape) for path in TARGETS)
    weights += MODEL.d * MODEL.vocab
    once = MODEL.d * (q + 2 * kv)
    attention = 6 * MODEL.layers * BATCH * SEQ**2 * q
    products = 2 * TOKENS * (2 * weights - once) + 2 * attention
    assert products <= flops(programs["floor"]) <= 1.01 * products


@pytest.mark.parametrize("path", ["lora", "whole tree"])
def test_flops_stay_within_half_a_percent_of_the_floor(programs, path):
    floor = flops(programs["floor"]) + adapter_flops()
    assert flops(programs[path]) <= 1.005 * floor
    # Not less than the products alone either, or something was not counted.
    assert flops(programs[path]) >= 0.995 * floor


def test_the_flop_bar_can_fail(programs):
    """What the other ways to train cost, on the same model and by the same count."""
    floor = flops(programs["floor"]) + adapter_flops()
    assert flops(programs["materialised"]) > 1.2 * floor
    assert flops(programs["full"]) > 1.2 * floor


@pytest.mark.parametrize("path", ["lora", "whole tree"])
def test_no_product_has_the_shape_of_a_base_weight(programs, path):
    assert hlo_count(programs[path].as_text(), PRODUCTS, SIZES) == 0


def test_the_count_of_base_shaped_products_can_fail(programs):
    """One dW per weight; and with W+BA the product a·b too."""
    n = len(TARGETS)
    assert hlo_count(programs["full"].as_text(), PRODUCTS, SIZES) == n
    assert hlo_count(programs["materialised"].as_text(), PRODUCTS, SIZES) >= 2 * n


def test_the_jaxpr_itself_forms_no_array_of_a_base_weights_size(tree):
    """Before XLA removes anything; neither from the trainable half alone, nor when
    the user differentiates the whole tree."""
    lifted = jlora.lift(MODEL.loss)
    trainable, frozen = jlora.partition(tree)

    def half(trainable, frozen, ids):
        return lifted(jlora.combine(trainable, frozen), ids)

    jaxpr = jax.make_jaxpr(jax.grad(half))(trainable, frozen, IDS)
    assert base_sized(jaxpr, SIZES) == 0
    jaxpr = jax.make_jaxpr(jax.grad(lifted))(tree, IDS)
    assert base_sized(jaxpr, SIZES) == 0
    jaxpr = jax.make_jaxpr(jax.grad(MODEL.loss))(PARAMS, IDS)
    assert base_sized(jaxpr, SIZES) >= len(TARGETS)


# ------------------------------------------------------- both training paths


def train_state(tree):
    """The donated TrainState path: abstract state, and its step."""
    tx = jlora.optimizer(optax.adamw(1e-3), tree)
    make = functools.partial(TrainState.create, apply_fn=jlora.lift(MODEL.loss), tx=tx)
    state = jax.eval_shape(lambda params: make(params=params), tree)

    def step(state, ids):
        loss, grads = jax.value_and_grad(state.apply_fn)(state.params, ids)
        return state.apply_gradients(grads=grads), loss

    return step, state


def partition_step(tree):
    """The other path: the base goes in and never comes out."""
    trainable, frozen = jlora.partition(tree)
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(tx.init, trainable)
    lifted = jlora.lift(MODEL.loss)

    def step(trainable, state, frozen, ids):
        def loss(trainable):
            return lifted(jlora.combine(trainable, frozen), ids)

        loss, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    return step, (trainable, state, frozen)


@pytest.fixture(scope="module")
def steps(tree):
    by_state, state = train_state(tree)
    by_partition, args = partition_step(tree)
    return {
        "state": compiled(by_state, state, IDS, donate=0),
        "partition": compiled(by_partition, *args, IDS, donate=(0, 1)),
    }


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(lambda c: c.cost_analysis()["bytes accessed"], id="bytes"),
        pytest.param(lambda c: c.memory_analysis().temp_size_in_bytes, id="temporary"),
        pytest.param(flops, id="flops"),
    ],
)
def test_both_training_paths_cost_the_same(steps, measure):
    by_state, by_partition = measure(steps["state"]), measure(steps["partition"])
    assert abs(by_state - by_partition) <= 0.02 * by_partition


@pytest.mark.parametrize("path", ["state", "partition"])
def test_a_step_copies_no_more_base_weights_than_the_frozen_model(
    steps, programs, path
):
    copies = ["copy", "transpose"]
    frozen = hlo_count(programs["floor"].as_text(), copies, SIZES)
    assert hlo_count(steps[path].as_text(), copies, SIZES) <= frozen
    assert hlo_count(steps[path].as_text(), PRODUCTS, SIZES) == 0


@pytest.mark.parametrize("path", ["state", "partition"])
def test_a_step_costs_no_more_than_the_floor_and_its_optimizer(steps, programs, path):
    """Adam is at most 20 operations for each number of the adapter."""
    floor = flops(programs["floor"]) + adapter_flops()
    numbers = RANK * sum(sum(paths(PARAMS)[path].shape) for path in TARGETS)
    assert flops(steps[path]) <= 1.005 * floor + 20 * numbers


def test_a_full_step_is_seen_as_more(steps, programs):
    """The same bars on full fine-tuning: they would all fail."""
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(
        lambda params: TrainState.create(apply_fn=MODEL.loss, params=params, tx=tx),
        PARAMS,
    )

    def step(state, ids):
        loss, grads = jax.value_and_grad(state.apply_fn)(state.params, ids)
        return state.apply_gradients(grads=grads), loss

    full = compiled(step, state, IDS, donate=0)
    state = steps["state"]
    assert hlo_count(full.as_text(), PRODUCTS, SIZES) == len(TARGETS)
    for measure in "flops", "bytes accessed":
        assert full.cost_analysis()[measure] > 1.2 * state.cost_analysis()[measure]


# ------------------------------------------------------------- other platforms


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_whole_train_step_lowers_for(tree, platform):
    step, state = train_state(tree)
    traced = jax.jit(step, donate_argnums=0).trace(state, IDS)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" in text
    # No product of a base weight's shape before any compiler has seen it, either.
    shapes = ["x".join(map(str, paths(PARAMS)[path].shape)) for path in TARGETS]
    shapes += ["x".join(reversed(shape.split("x"))) for shape in shapes]
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            assert not any(f"-> tensor<{shape}xf32>" in line for shape in shapes), line


@pytest.mark.parametrize("make", [train_state, partition_step])
def test_the_whole_train_step_exports_for_tpu_and_cuda(tree, make):
    step, args = make(tree)
    args = args if isinstance(args, tuple) else (args,)
    export = jax.export.export(jax.jit(step), platforms=["tpu", "cuda"])
    assert export(*args, IDS).platforms == ("tpu", "cuda")


def test_adapters_of_the_whole_tree_are_what_was_planned(tree):
    assert set(adapted(tree)) == set(TARGETS)
