"""The lift beyond one device and one matrix: experts, meshes, barriers, kernels.

Against the dense matrix, in value and gradient, as in `test_lift`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    adapt,
    adapted,
    base_sized,
    by_hand,
    check_lift,
    close,
    equations,
    integers,
    normal,
    quiet,
)
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora


def statuses(fn, tree, *args):
    return {e.path: e.status for e in quiet(jlora.explain, fn, tree, *args)}


def check(fn, params, *args, roles, **options):
    """Planned as expected, factored, and right."""
    tree, plan = adapt(fn, params, *args, rank=2)
    assert {path: spec.axes for path, spec in plan.items()} == roles
    assert set(statuses(fn, tree, *args).values()) == {"factored"}
    check_lift(fn, tree, plan, *args, **options)


# --------------------------------------------------------------------- experts

SIZES = jnp.array([4, 0, 7])
STACK = {"w": normal(3, 5, 7)}
TOKENS = normal(11, 5, seed=1)
EXPERT = integers(11, below=3)
TOKEN_IDS = integers(11, below=13)


def ragged(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


def ragged_both_ways(p, x, sizes):
    """Up and down by one tied stack: the second contracts the out axes."""
    return lax.ragged_dot(ragged(p, x, sizes), jnp.swapaxes(p["w"], 1, 2), sizes)


def ragged_mlp(p, x, sizes):
    h = jax.nn.relu(lax.ragged_dot(x, p["up"], sizes))
    return lax.ragged_dot(h, p["down"], sizes)


@pytest.mark.parametrize(
    "fn, params, roles",
    [
        pytest.param(ragged, STACK, {"w": "bio"}, id="one"),
        pytest.param(ragged_both_ways, STACK, {"w": "bio"}, id="tied"),
        pytest.param(
            ragged_mlp,
            {"up": normal(3, 5, 7), "down": normal(3, 7, 5)},
            {"up": "bio", "down": "bio"},
            id="mlp",
        ),
    ],
)
def test_ragged_dot(fn, params, roles):
    # JAX has no vmap of a ragged product whose weights are not mapped.
    check(fn, params, TOKENS, SIZES, roles=roles, modes=False)


def test_ragged_dot_in_a_scan_over_layers():
    def fn(p, x, sizes):
        def layer(x, w):
            return jnp.tanh(lax.ragged_dot(x, w, sizes)), None

        return lax.scan(jax.checkpoint(layer), x, p["w"])[0]

    params = {"w": normal(2, 3, 5, 5)}
    check(fn, params, TOKENS, SIZES, roles={"w": "bbio"}, modes=False)


def gathered(p, x, expert):
    return jnp.einsum("ti,tio->to", x, p["w"][expert])


def gathered_by_vmap(p, x, expert):
    return jax.vmap(lambda x, e: x @ p["w"][e])(x, expert)


def gathered_with_bias(p, x, expert):
    return gathered(p, x, expert) + jnp.take(p["bias"], expert, axis=0)


@pytest.mark.parametrize("fn", [gathered, gathered_by_vmap, gathered_with_bias])
def test_a_matrix_for_each_token(fn):
    params = dict(STACK)
    roles = {"w": "bio"}
    if fn is gathered_with_bias:
        params["bias"], roles["bias"] = normal(3, 7), "io"  # rows: a lookup
    check(fn, params, TOKENS, EXPERT, roles=roles)


def test_rows_of_a_table_that_meet_weights_are_a_lookup():
    def fn(p, ids):
        h = p["table"][ids]
        h = h * (1 + p["gain"]) / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1)
        return h @ p["w"] @ p["table"].T

    params = {"table": normal(13, 5), "w": normal(5, 5), "gain": normal(5)}
    plan = jlora.plan(fn, params, EXPERT, targets=["table", "w"])
    assert {path: s.kind for path, s in plan.items()} == {
        "table": "embed",
        "w": "dense",
    }
    assert plan["table"].axes == "io"


@pytest.mark.parametrize(
    "words",
    [lambda p, ids: p["table"][ids], lambda p, ids: jnp.tanh(p["table"][ids] * 2.0)],
)
def test_experts_of_words(words):
    """A table's rows meet a stack's: those that are matrices are of the stack."""

    def fn(p, ids):
        return gathered(p, words(p, ids), ids % 3) @ p["out"]

    params = {"w": STACK["w"], "table": normal(13, 5), "out": normal(7, 5)}
    plan = jlora.plan(fn, params, TOKEN_IDS)
    assert {path: spec.axes for path, spec in plan.items()} == {"w": "bio", "out": "io"}
    assert list(plan.skipped) == ["table"]
    assert "rules=[jlora.Rule('table')]" in plan.skipped["table"]
    plan = jlora.plan(fn, params, TOKEN_IDS, rules=[jlora.Rule("table")])
    assert sorted(plan) == ["out", "table", "w"] and not plan.skipped


def test_experts_of_data_that_is_closed_over():
    plan = jlora.plan(lambda p: gathered(p, TOKENS, EXPERT), STACK)
    assert plan["w"].axes == "bio"


def test_an_expert_axis_that_is_contracted_is_refused():
    plan = jlora.Plan({"w": jlora.Spec.of("dense", "ibo", 2)}, {"w": (3, 5, 7)})
    tree = jlora.wrap(STACK, plan=plan)
    with pytest.raises(ValueError, match=r"'w' was planned .* groups axes \(0,\)"):
        jlora.lift(ragged)(tree, TOKENS, SIZES)


# ------------------------------------------- a convolution from outputs to inputs


@pytest.mark.parametrize("strides, dilation", [((1,), (1,)), ((2,), (2,))])
def test_the_gradient_of_a_convolution_inside_the_function(strides, dilation):
    def fn(p, x):
        def energy(x):
            y = lax.conv_general_dilated(
                x,
                p["w"],
                strides,
                [(1, 0)],
                rhs_dilation=dilation,
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            return jnp.tanh(y).sum()

        return jax.grad(energy)(x)

    check(fn, {"w": normal(3, 5, 7)}, normal(2, 9, 5), roles={"w": "iio"})


# ------------------------------------------------------------------------- meshes

MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
map_ = functools.partial(jax.shard_map, mesh=MESH)


def gather(w, axis=0):
    return lax.all_gather(w, "d", axis=axis, tiled=True)


MAPPED = {
    "replicated": (
        map_(lambda x, w: x @ w, in_specs=(P("d"), P()), out_specs=P("d")),
        "io",
    ),
    "column-parallel": (
        map_(lambda x, w: x @ w, in_specs=(P(), P(None, "d")), out_specs=P(None, "d")),
        "io",
    ),
    "row-parallel": (
        map_(
            lambda x, w: lax.psum(x @ w, "d"),
            in_specs=(P(None, "d"), P("d")),
            out_specs=P(),
        ),
        "io",
    ),
    "fsdp": (
        map_(lambda x, w: x @ gather(w), in_specs=(P("d"), P("d")), out_specs=P("d")),
        "io",
    ),
    "fsdp-out": (
        map_(
            lambda x, w: jnp.tanh(x @ gather(w, 1)) @ gather(w, 1).T,
            in_specs=(P("d"), P(None, "d")),
            out_specs=P("d"),
        ),
        "io",
    ),
    "unchecked": (
        map_(
            lambda x, w: x @ gather(w),
            in_specs=(P("d"), P("d")),
            out_specs=P("d"),
            check_vma=False,
        ),
        "io",
    ),
    "slices of its own": (
        map_(
            lambda x, w: (
                x @ lax.dynamic_slice_in_dim(w, 5 * (lax.axis_index("d") % 2), 5, 1)
            ),
            in_specs=(P("d"), P()),
            out_specs=P("d"),
        ),
        "io",
    ),
    "layers": (
        map_(
            lambda x, w: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0],
            in_specs=(P("d"), P()),
            out_specs=P("d"),
        ),
        "bio",
    ),
    "experts": (
        map_(
            lambda x, w: jnp.einsum("eti,eio->eto", x, w),
            in_specs=(P("d"), P("d")),
            out_specs=P("d"),
        ),
        "bio",
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_shard_map(name):
    mapped, roles = MAPPED[name]
    shape = (4, 6, 6) if "b" in roles else (6, 10)
    check(
        lambda p, x: mapped(x, p["w"]),
        {"w": normal(*shape)},
        normal(4, 8, 6) if name == "experts" else normal(8, 6),
        roles={"w": roles},
        modes=False,
    )


def test_a_table_that_is_sharded_over_its_features():
    look = map_(lambda i, w: w[i], in_specs=(P(), P(None, "d")), out_specs=P(None, "d"))
    check(
        lambda p, ids: look(ids, p["w"]),
        {"w": normal(13, 6)},
        integers(7, below=13),
        roles={"w": "io"},
        modes=False,
    )


def test_fully_sharded_weights_are_gathered_as_they_were_and_factors_by_rank():
    mapped, _ = MAPPED["fsdp"]

    def fn(p, x):
        return mapped(x, p["w"])

    params, x = {"w": normal(6, 10)}, normal(8, 6)
    tree, _ = adapt(fn, params, x, rank=3)
    shapes = [
        eqn.outvars[0].aval.shape
        for eqn in equations(jax.make_jaxpr(jlora.lift(fn))(tree, x))
        if eqn.primitive.name == "all_gather"
    ]
    assert sorted(shapes) == [(6, 3), (6, 10)]


def test_what_a_shard_map_returns_is_an_array():
    twice = map_(lambda w: w * 2.0, in_specs=P("d"), out_specs=P("d"))

    def fn(p, x):
        return x @ twice(p["w"])

    tree, plan = adapt(fn, {"w": normal(6, 10)}, normal(8, 6))
    with pytest.warns(UserWarning, match="'w' is used by 'shard_map"):
        got = jlora.lift(fn)(tree, normal(8, 6))
    close(got, fn(by_hand(tree, plan), normal(8, 6)))


# ------------------------------------------- barriers, constraints, own kernels


def test_an_expert_of_its_own_for_each_device():
    def body(x, w):
        return x @ lax.dynamic_index_in_dim(w, lax.axis_index("d"), 0, keepdims=False)

    mapped = map_(body, in_specs=(P("d"), P()), out_specs=P("d"))
    params = {"w": normal(2, 6, 10)}
    check(
        lambda p, x: mapped(x, p["w"]),
        params,
        normal(8, 6),
        roles={"w": "bio"},
        modes=False,
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_inner_jit_keeps_its_shardings_and_scopes_their_names(kind):
    """Also eagerly, where the sharding of a result is seen."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    sharding = jax.sharding.NamedSharding(mesh, P("d"))

    @functools.partial(jax.jit, out_shardings=sharding)
    def fn(p, x):
        with jax.named_scope("of_the_model"):
            return x @ p["w"]

    params, x = {"w": normal(6, 10)}, normal(8, 6)
    tree, _ = adapt(fn, params, x, rank=2)
    with jax.set_mesh(mesh):
        for lifted in (jlora.lift(fn), jax.jit(jlora.lift(fn))):
            assert lifted(tree, x).sharding.is_equivalent_to(sharding, 2)
        text = jax.jit(jlora.lift(fn)).lower(tree, x).compile().as_text()
    assert "of_the_model" in text


def test_a_barrier_keeps_the_factors():
    def fn(p, x):
        w, x = lax.optimization_barrier((p["w"], x))
        return x @ w

    check(fn, {"w": normal(5, 7)}, normal(11, 5), roles={"w": "io"})


def test_a_sharding_constraint_keeps_the_factors():
    def fn(p, x):
        sharding = jax.NamedSharding(MESH, P())
        return x @ lax.with_sharding_constraint(p["w"], sharding)

    check(fn, {"w": normal(5, 7)}, normal(11, 5), roles={"w": "io"}, modes=False)


def double_kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2


def test_a_pallas_kernel_that_takes_activations_beside_adapted_weights():
    @jax.custom_jvp
    def double(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(double_kernel, out_shape=shape, interpret=True)(x)

    double.defjvp(lambda x, t: (double(*x), 2 * t[0]))

    def fn(p, x):
        return double(x @ p["up"]) @ p["down"]

    params = {"up": normal(5, 7), "down": normal(7, 3)}
    roles = {"up": "io", "down": "io"}
    check(fn, params, normal(11, 5), roles=roles, modes=False)


def test_a_custom_vjp_attention_beside_adapted_weights():
    """Flash attention is such a function: its own rule stays, and is used."""
    ran = []

    def attend(q, k, v):
        return jax.nn.softmax(q @ k.T) @ v

    @jax.custom_vjp
    def attention(q, k, v):
        return attend(q, k, v)

    def backward(saved, g):
        ran.append(1)
        return jax.vjp(attend, *saved)[1](g)

    attention.defvjp(lambda *qkv: (attend(*qkv), qkv), backward)

    def fn(p, x):
        return attention(*(x @ p[name] for name in "qkv"))

    params = {name: normal(5, 7, seed=i) for i, name in enumerate("qkv")}
    check(fn, params, normal(11, 5), roles=dict.fromkeys("qkv", "io"), modes=False)
    assert ran


# ------------------------------------------------------ stacks, carries, adapters


def test_vmap_over_adapters_on_one_base():
    """A batch of adapters: each example by its own, the base shared."""
    params, x = {"w": normal(5, 7)}, normal(3, 11, 5)
    trees = [adapt(lambda p, x: x @ p["w"], params, x[0], seed=s)[0] for s in range(3)]
    leaves = [tree["w"] for tree in trees]
    stack = jax.tree.map(lambda *f: jnp.stack(f), *leaves)
    axes = jlora.LoRA(None, 0, 0, 0)
    lifted = jlora.lift(lambda w, x: x @ w)

    def one(a, b, scale, x):
        return lifted(jlora.LoRA(params["w"], a, b, scale), x)

    got = jax.vmap(one)(stack.a, stack.b, stack.scale, x)
    want = [x[i] @ jlora.merge(tree)["w"] for i, tree in enumerate(trees)]
    close(got, jnp.stack(want))
    shared = jlora.LoRA(params["w"], stack.a, stack.b, stack.scale)
    close(jax.vmap(lifted, in_axes=(axes, 0))(shared, x), got)


def test_a_fused_projection_by_concatenation_and_by_split():
    def concatenated(p, x):
        w = jnp.concatenate([p[name] for name in "qkv"], 1)
        return jnp.split(x @ w, 3, axis=1)

    params = {name: normal(5, 7, seed=i) for i, name in enumerate("qkv")}
    check(concatenated, params, normal(11, 5), roles=dict.fromkeys("qkv", "io"))

    def split(p, x):
        return [x @ w for w in jnp.split(p["qkv"], 3, axis=1)]

    check(split, {"qkv": normal(5, 21)}, normal(11, 5), roles={"qkv": "io"})


def test_no_array_of_a_weights_size_in_a_step_of_experts():
    params, x = {"w": normal(3, 5, 7)}, TOKENS
    tree, _ = adapt(ragged, params, x, SIZES)
    trainable, frozen = jlora.partition(tree)

    def loss(trainable):
        tree = jlora.combine(trainable, frozen)
        return jlora.lift(ragged)(tree, x, SIZES).sum()

    sizes = {leaf.w.size for leaf in adapted(tree).values()}
    names = ["ragged_dot_general", "dot_general", "add", "mul"]
    step = jax.make_jaxpr(jax.grad(loss))(trainable)
    assert base_sized(step, sizes, names) == 0
    dense = jax.make_jaxpr(jax.grad(lambda p: ragged(p, x, SIZES).sum()))(params)
    assert base_sized(dense, sizes, names) > 0


def test_the_first_axis_of_a_batch_of_adapters_may_be_sliced_by_data():
    def fn(p, x, i):
        return x @ lax.dynamic_index_in_dim(p["w"], i, 1, keepdims=False)

    params = {"w": normal(5, 3, 7)}
    tree, plan = adapt(fn, params, TOKENS, jnp.int32(1))
    assert plan["w"].axes == "ibo"
    np.testing.assert_allclose(
        jlora.lift(fn)(tree, TOKENS, jnp.int32(2)),
        fn(by_hand(tree, plan), TOKENS, jnp.int32(2)),
        rtol=1e-5,
        atol=1e-5,
    )
