"""lift: every rule against the dense matrix, in value and in gradient.

The tolerance is 1e-5 of the largest magnitude in float32 (invariant 3): both sides
sum the same few hundred products in another order, which costs some 1e-6.
Dimensions are primes, so that an array of a weight's size is nothing else.
"""

import dataclasses
import functools
import re
import warnings

import flax.linen as nn
import flax.struct
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import models
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
    randomise,
    same,
    says,
    silent,
)
from jax import lax

import jlora


def einsum(form):
    return lambda p, x: jnp.einsum(form, x, p["w"])


def dot(dims, **kwargs):
    """lax.dot_general of (w, x) as given."""
    return lambda p, x: lax.dot_general(p["w"], x, dims, **kwargs)


# ---------------------------------------------------------------- dot_general

DOTS = [
    pytest.param(lambda p, x: x @ p["w"], (5, 7), (11, 5), id="right"),
    pytest.param(lambda p, x: p["w"] @ x, (7, 5), (5, 11), id="left"),
    pytest.param(lambda p, x: x @ p["w"], (5, 7), (5,), id="vector-right"),
    pytest.param(lambda p, x: p["w"] @ x, (7, 5), (5,), id="vector-left"),
    pytest.param(lambda p, x: x @ p["w"], (5, 7), (2, 3, 11, 5), id="leading-axes"),
    pytest.param(lambda p, x: x @ p["w"].T, (7, 5), (11, 5), id="torch-layout"),
    pytest.param(lambda p, x: jnp.dot(x, p["w"]), (5, 7), (11, 5), id="jnp-dot"),
    pytest.param(
        lambda p, x: jnp.tensordot(p["w"], x, ((1, 0), (0, 2))),
        (5, 7, 11),
        (7, 13, 5),
        id="tensordot-left-two-axes-crossed",
    ),
    pytest.param(einsum("bqe,ehd->bqhd"), (5, 3, 7), (2, 11, 5), id="heads-out"),
    pytest.param(einsum("bqhd,hde->bqe"), (3, 7, 5), (2, 11, 3, 7), id="heads-in"),
    pytest.param(einsum("bqhd,ehd->bqe"), (5, 3, 7), (2, 11, 3, 7), id="heads-in-last"),
    pytest.param(einsum("be,hed->bhd"), (3, 5, 7), (11, 5), id="in-the-middle"),
    pytest.param(einsum("bhd,hed->be"), (3, 5, 7), (11, 3, 7), id="out-in-the-middle"),
    pytest.param(einsum("abcd,cdxy->abxy"), (5, 3, 7, 2), (11, 2, 5, 3), id="two-two"),
    pytest.param(einsum("bei,eio->beo"), (3, 5, 7), (11, 3, 5), id="experts"),
    pytest.param(einsum("ebi,eio->ebo"), (3, 5, 7), (3, 11, 5), id="experts-lead"),
    pytest.param(einsum("bei,eio->boe"), (3, 5, 7), (11, 3, 5), id="experts-last-out"),
    pytest.param(einsum("bei,ieo->beo"), (5, 3, 7), (11, 3, 5), id="batch-in-middle"),
    pytest.param(einsum("bei,ioe->beo"), (5, 7, 3), (11, 3, 5), id="batch-last"),
    pytest.param(
        einsum("bgei,geio->bgeo"), (2, 3, 5, 7), (11, 2, 3, 5), id="two-batch-axes"
    ),
    pytest.param(
        einsum("bgei,geio->bego"), (2, 3, 5, 7), (11, 2, 3, 5), id="batch-axes-swapped"
    ),
    pytest.param(
        einsum("behd,ehdo->beo"), (2, 3, 5, 7), (11, 2, 3, 5), id="batch-and-heads"
    ),
    pytest.param(
        lambda p, x: jnp.matmul(x, p["w"]), (3, 5, 7), (2, 3, 11, 5), id="matmul-batch"
    ),
    pytest.param(
        lambda p, x: jnp.matmul(p["w"], x), (3, 7, 5), (2, 3, 5, 11), id="matmul-left"
    ),
    pytest.param(dot((((0, 2), (2, 0)), ((), ()))), (5, 7, 3), (3, 11, 5), id="raw"),
    pytest.param(
        dot((((2,), (0,)), ((0,), (2,)))), (3, 7, 5), (5, 11, 3), id="raw-batch-left"
    ),
    pytest.param(
        lambda p, x: lax.dot_general(x, p["w"], (((0,), (1,)), ((2,), (0,)))),
        (3, 5, 7),
        (5, 11, 3),
        id="raw-batch-right",
    ),
    pytest.param(
        lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), (3, 5, 7), (3, 11, 5), id="vmap"
    ),
    pytest.param(
        lambda p, x: jax.vmap(jnp.matmul, in_axes=(0, 2))(x, p["w"]),
        (5, 7, 3),
        (3, 11, 5),
        id="vmap-last-axis",
    ),
    pytest.param(
        lambda p, x: jnp.einsum("bi,io,bo->b", x, p["w"], x[:, :1] * jnp.ones((1, 7))),
        (5, 7),
        (11, 5),
        id="three-operands",
    ),
]


@pytest.mark.parametrize("fn, shape, x", DOTS)
def test_dot_general(fn, shape, x):
    params, x = {"w": normal(*shape)}, normal(*x, seed=1)
    check_lift(fn, *adapt(fn, params, x), x)


@pytest.mark.parametrize(
    "planned, used, shape, full, part",
    [
        pytest.param(
            "bhd,hdo->bo", "bh,hdo->bdo", (3, 5, 7), (11, 3, 5), (11, 3), id="first-in"
        ),
        pytest.param(
            "bhd,hdo->bo", "bd,hdo->bho", (3, 5, 7), (11, 3, 5), (11, 5), id="last-in"
        ),
        pytest.param(
            "bi,ihd->bhd", "bhd,ihd->bi", (7, 3, 5), (11, 7), (11, 3, 5), id="all-out"
        ),
        pytest.param(
            "bi,ihd->bhd", "bd,ihd->bhi", (7, 3, 5), (11, 7), (11, 5), id="some-out"
        ),
        pytest.param(
            "ebhd,ehdo->ebo",
            "ebd,ehdo->ebho",
            (2, 3, 5, 7),
            (2, 11, 3, 5),
            (2, 11, 5),
            id="some-in-with-batch",
        ),
        pytest.param(
            "ebi,eio->ebo", "bi,eio->ebo", (3, 5, 7), (3, 11, 5), (11, 5), id="no-batch"
        ),
    ],
)
def test_dot_general_with_roles_planned_on_another_use(
    planned, used, shape, full, part
):
    params = {"w": normal(*shape)}
    tree, plan = adapt(einsum(planned), params, normal(*full))
    check_lift(einsum(used), tree, plan, normal(*part, seed=1))


def test_dot_general_of_two_adapted_weights():
    """Whatever is materialised here, the result is that of the dense matrices."""

    def fn(p, x):
        return x @ (p["u"] @ p["v"]) + (x @ p["u"]) @ p["v"]

    params, x = {"u": normal(5, 7), "v": normal(7, 3)}, normal(11, 5, seed=1)
    tree, plan = adapt(lambda p, x: (x @ p["u"]) @ p["v"], params, x)
    check_lift(fn, tree, plan, x, factored=False)


def test_dot_general_of_a_weight_with_itself():
    def fn(p, x):
        return x @ p["w"] + x @ (p["w"] @ p["w"].T) @ p["w"]

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(lambda p, x: x @ p["w"], params, x)
    check_lift(fn, tree, plan, x, factored=False)


def test_one_weight_used_three_times():
    def fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.tanh(h @ p["w"].T) @ p["w"]

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(lambda p, x: x @ p["w"], params, x)
    check_lift(fn, tree, plan, x)


def test_precision_and_accumulation_of_every_product_are_the_base_products():
    def fn(p, x):
        return lax.dot(
            x,
            p["w"],
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    params = {"w": normal(5, 7, dtype=jnp.bfloat16)}
    x = normal(11, 5, seed=1, dtype=jnp.bfloat16)
    tree, _ = adapt(fn, params, x)
    jaxpr = jax.make_jaxpr(jlora.lift(fn))(tree, x)
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 3  # x·W, x·a and (x·a)·b
    for eqn in products:
        assert set(eqn.params["precision"]) == {lax.Precision.HIGHEST}
        assert eqn.params["preferred_element_type"] == jnp.float32


# ------------------------------------------------- lookup and the tied attend


def attend(p, ids):
    return jnp.take(p["w"], ids, axis=0) @ p["w"].T


LOOKUPS = [
    pytest.param(lambda p, i: jnp.take(p["w"], i, axis=0), (13, 5), (11,), id="take"),
    pytest.param(lambda p, i: p["w"][i], (13, 5), (11,), id="index"),
    pytest.param(lambda p, i: p["w"][i], (13, 5), (2, 3), id="index-2d"),
    pytest.param(lambda p, i: p["w"][i], (13, 5), (2, 3, 7), id="index-3d"),
    pytest.param(lambda p, i: p["w"][i - 5], (13, 5), (11,), id="negative"),
    pytest.param(lambda p, i: p["w"].at[i].get(), (13, 5), (11,), id="at-get"),
    pytest.param(
        lambda p, i: jnp.take(p["w"], i + 4, axis=0, mode="clip"),
        (13, 5),
        (11,),
        id="clip",
    ),
    pytest.param(
        lambda p, i: jnp.take(p["w"], i + 4, axis=0, mode="fill", fill_value=0),
        (13, 5),
        (11,),
        id="fill-zero",
    ),
    pytest.param(
        lambda p, i: p["w"].at[i].get(mode="promise_in_bounds"),
        (13, 5),
        (11,),
        id="promised",
    ),
    pytest.param(
        lambda p, i: jnp.take(p["w"], i, axis=0), (13, 2, 5), (11,), id="rows-2d"
    ),
    pytest.param(lambda p, i: jax.nn.one_hot(i, 13) @ p["w"], (13, 5), (11,), id="hot"),
    pytest.param(attend, (13, 5), (11,), id="tied"),
    pytest.param(
        lambda p, i: jax.vmap(lambda i: p["w"][i])(i), (13, 5), (11,), id="vmap"
    ),
]


@pytest.mark.parametrize("fn, shape, ids", LOOKUPS)
def test_lookup(fn, shape, ids):
    params, ids = {"w": normal(*shape)}, integers(*ids, below=shape[0])
    check_lift(fn, *adapt(fn, params, ids), ids)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda p, i: jnp.take(p["w"], i, axis=1), id="axis-1"),
        pytest.param(
            lambda p, i: jnp.take(p["w"], i, axis=0, fill_value=1.0), id="fill-one"
        ),
        pytest.param(lambda p, i: jnp.take(p["w"], i + 4, axis=0), id="nan-outside"),
        pytest.param(lambda p, i: p["w"][i, :4], id="some-features"),
        pytest.param(lambda p, i: p["w"][i, i % 5], id="one-number-each"),
        pytest.param(lambda p, i: p["w"][i[0]], id="one-traced-row"),
        pytest.param(lambda p, i: p["w"][3] + p["w"][-2], id="fixed-rows"),
        pytest.param(lambda p, i: p["w"][2:9:3], id="strided-rows"),
        pytest.param(lambda p, i: p["w"][:, 1:4], id="columns"),
        pytest.param(
            lambda p, i: lax.dynamic_slice(p["w"], (i[0], 1), (2, 3)), id="dynamic"
        ),
    ],
)
def test_lookups_of_every_other_kind_are_right_whether_factored_or_not(fn):
    params, ids = {"w": normal(13, 13)}, integers(11, below=13)
    tree, plan = adapt(lambda p, i: p["w"][i], params, ids)

    def shifted(p, i):  # a bare slice would come back as an adapted leaf
        return fn(p, i) + jnp.sqrt(i[0] + 1.0)

    check_lift(shifted, tree, plan, ids, factored=False, modes=False)


def test_linen_layer_with_boxed_params():
    """nn.with_partitioning keeps each param in a box, before and after."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model, x = nn.Dense(7, kernel_init=init), normal(11, 5)
    variables = model.init(jax.random.key(0), x)
    plan = jlora.plan(model.apply, variables, x, rank=3)
    tree = randomise(jlora.wrap(variables, plan=plan))
    assert isinstance(tree["params"]["kernel"], nn.Partitioned)
    got = quiet(jlora.lift(model.apply), tree, x)
    merged = jlora.merge(tree)
    assert isinstance(merged["params"]["kernel"], nn.Partitioned)
    close(got, model.apply(merged, x))


def test_linen_embed_and_attend():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(13, 5)
            return embed.attend(jnp.tanh(embed(ids)))

    ids = integers(2, 11, below=13)
    variables = Tied().init(jax.random.key(0), ids)
    tree, plan = adapt(Tied().apply, variables, ids)
    assert [spec.kind for spec in plan.values()] == ["embed"]
    check_lift(Tied().apply, tree, plan, ids)


# --------------------------------------------------------- conv_general_dilated


def conv(dims, **kwargs):
    kwargs = {"window_strides": (1,) * (len(dims[0]) - 2), "padding": "SAME"} | kwargs

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=dims, **kwargs)

    return fn


NWC, NCW = ("NWC", "WIO", "NWC"), ("NCH", "OIH", "NCH")
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
NDHWC = ("NDHWC", "DHWIO", "NDHWC")

CONVS = [
    pytest.param(conv(NWC), (3, 5, 7), (2, 11, 5), id="1d"),
    pytest.param(conv(NCW), (7, 5, 3), (2, 5, 11), id="1d-channels-first"),
    pytest.param(conv(NHWC), (3, 2, 5, 7), (2, 11, 9, 5), id="2d"),
    pytest.param(conv(NCHW), (7, 5, 3, 2), (2, 5, 11, 9), id="2d-channels-first"),
    pytest.param(
        conv(NHWC, window_strides=(2, 3)), (3, 3, 5, 7), (2, 11, 9, 5), id="strides"
    ),
    pytest.param(conv(NHWC, padding="VALID"), (3, 3, 5, 7), (2, 11, 9, 5), id="valid"),
    pytest.param(
        conv(NHWC, padding=((1, 2), (0, 3))), (3, 3, 5, 7), (2, 11, 9, 5), id="padding"
    ),
    pytest.param(
        conv(NHWC, rhs_dilation=(2, 3)), (3, 3, 5, 7), (2, 11, 9, 5), id="dilated"
    ),
    pytest.param(
        conv(NHWC, lhs_dilation=(2, 3), padding=((1, 1), (2, 0))),
        (3, 3, 5, 7),
        (2, 5, 4, 5),
        id="input-dilated",
    ),
    pytest.param(
        conv(
            NHWC,
            window_strides=(2, 1),
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 1),
            padding=((2, 1), (0, 1)),
        ),
        (3, 2, 5, 7),
        (2, 11, 6, 5),
        id="all-at-once",
    ),
    pytest.param(
        conv(NHWC, feature_group_count=2), (3, 3, 5, 14), (2, 11, 9, 10), id="groups"
    ),
    pytest.param(
        conv(NHWC, feature_group_count=3, rhs_dilation=(2, 2), window_strides=(2, 2)),
        (3, 3, 5, 21),
        (2, 11, 9, 15),
        id="groups-dilated-strided",
    ),
    pytest.param(
        conv(NCHW, feature_group_count=2),
        (14, 5, 3, 3),
        (2, 10, 11, 9),
        id="groups-nchw",
    ),
    pytest.param(
        conv(NHWC, feature_group_count=5), (3, 3, 1, 5), (2, 11, 9, 5), id="depthwise"
    ),
    pytest.param(
        conv(NHWC, feature_group_count=5),
        (3, 3, 1, 10),
        (2, 11, 9, 5),
        id="depthwise-multiplied",
    ),
    pytest.param(conv(NDHWC), (2, 3, 2, 5, 7), (2, 5, 6, 4, 5), id="3d"),
    pytest.param(
        conv(NDHWC, feature_group_count=2, rhs_dilation=(1, 2, 1), padding="VALID"),
        (2, 2, 2, 3, 14),
        (2, 5, 6, 4, 6),
        id="3d-groups-dilated",
    ),
    pytest.param(conv(NHWC), (1, 1, 5, 7), (2, 11, 9, 5), id="pointwise"),
    pytest.param(
        lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME"),
        (3, 3, 5, 7),
        (2, 5, 4, 5),
        id="transposed",
    ),
    pytest.param(
        lambda p, x: lax.conv_transpose(
            x, p["w"], (2, 2), "VALID", transpose_kernel=True
        ),
        (3, 3, 7, 5),
        (2, 5, 4, 5),
        id="transposed-kernel-flipped",
    ),
]


@pytest.mark.parametrize("fn, shape, x", CONVS)
def test_conv(fn, shape, x):
    params, x = {"w": normal(*shape)}, normal(*x, seed=1)
    tree, plan = adapt(fn, params, x)
    assert plan["w"].kind == "conv"
    check_lift(fn, tree, plan, x)


@pytest.mark.parametrize(
    "layer, x",
    [
        pytest.param(nn.Conv(7, (3,), padding="CAUSAL"), (2, 11, 5), id="causal"),
        pytest.param(
            nn.Conv(7, (3, 3), padding="CIRCULAR"), (2, 8, 9, 5), id="circular"
        ),
        pytest.param(nn.Conv(7, (3, 3), padding="REFLECT"), (2, 8, 9, 5), id="reflect"),
        pytest.param(
            nn.Conv(14, (3, 3), feature_group_count=2, kernel_dilation=2),
            (2, 8, 9, 10),
            id="groups-dilated",
        ),
        pytest.param(nn.Conv(7, (3, 3)), (8, 9, 5), id="unbatched"),
        pytest.param(nn.Conv(7, (3, 3)), (2, 3, 8, 9, 5), id="two-batch-axes"),
        pytest.param(
            nn.ConvTranspose(7, (3, 3), strides=(2, 2)), (2, 4, 5, 5), id="transpose"
        ),
        pytest.param(
            nn.ConvTranspose(7, (3, 3), transpose_kernel=True),
            (2, 4, 5, 5),
            id="transpose-kernel",
        ),
        pytest.param(
            nn.ConvTranspose(7, (3,), strides=(2,), padding="CIRCULAR"),
            (2, 6, 5),
            id="transpose-circular",
        ),
    ],
)
def test_linen_convolutions(layer, x):
    x = normal(*x)
    variables = layer.init(jax.random.key(0), x)
    targets = ["**/kernel"]
    check_lift(
        layer.apply, *adapt(layer.apply, variables, x, targets=targets), x, modes=False
    )


def test_conv_with_batch_groups_is_right_whether_factored_or_not():
    params, x = {"w": normal(3, 3, 5, 14)}, normal(4, 11, 9, 5, seed=1)
    tree, plan = adapt(conv(NHWC), params, x)
    fn = conv(NHWC, batch_group_count=2)
    check_lift(fn, tree, plan, x, factored=False, modes=False)


@pytest.mark.parametrize(
    "fn, shape, x",
    [
        pytest.param(lambda p, x: x @ p["w"], (5, 7), (11, 5), id="dot"),
        pytest.param(lambda p, x: x @ p["w"].T, (7, 5), (11, 5), id="dot-transposed"),
        pytest.param(einsum("bei,eio->beo"), (3, 5, 7), (11, 3, 5), id="experts"),
        pytest.param(conv(NHWC), (3, 2, 5, 7), (2, 11, 9, 5), id="conv"),
        pytest.param(
            lambda p, x: attend(p, x[0].astype(jnp.int32) % 13),
            (13, 5),
            (2, 11),
            id="tied",
        ),
        pytest.param(
            jax.checkpoint(jax.jit(einsum("bi,io->bo"))), (5, 7), (11, 5), id="nested"
        ),
        pytest.param(
            lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1],
            (3, 5, 7),
            (11, 5),
            id="scan",
        ),
    ],
)
def test_op_by_op(fn, shape, x):
    params, x = {"w": normal(*shape)}, normal(*x, seed=1)
    check_lift(fn, *adapt(fn, params, x), x, modes=False, eager=True)


# ------------------------------------------------------------ structural rules


def dense(p, x):
    return x @ p["w"]


def at(index):
    return lambda p, x: x @ p["w"][index]


def stacked(p, x):
    """A plan for (5, 7) kernels stacked in front."""
    return jnp.einsum("bi,lio->lbo", x, p["w"])


def on_one_device(w):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return lax.with_sharding_constraint(w, device)


STRUCTURAL = [
    pytest.param(lambda p, x: x @ p["w"].T, (7, 5), id="transpose"),
    pytest.param(
        lambda p, x: jnp.einsum("bi,hio->bho", x, jnp.transpose(p["w"], (2, 0, 1))),
        (5, 7, 3),
        id="transpose-3d",
    ),
    pytest.param(lambda p, x: x @ p["w"].reshape(5, 21), (5, 3, 7), id="merge-out"),
    pytest.param(lambda p, x: x @ p["w"].reshape(5, 7), (1, 5, 7), id="merge-in"),
    pytest.param(
        lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"].reshape(5, 3, 7)),
        (5, 21),
        id="split-out",
    ),
    pytest.param(
        lambda p, x: jnp.einsum("bhd,hdo->bo", x[:, :, None], p["w"].reshape(5, 1, 7)),
        (5, 7),
        id="split-in-unit",
    ),
    pytest.param(lambda p, x: x @ p["w"].squeeze(1), (5, 1, 7), id="squeeze"),
    pytest.param(
        lambda p, x: (x[None] @ jnp.expand_dims(p["w"], 0))[0], (5, 7), id="expand"
    ),
    pytest.param(
        lambda p, x: jnp.stack([x] * 3) @ jnp.broadcast_to(p["w"], (3, 5, 7)),
        (5, 7),
        id="broadcast",
    ),
    pytest.param(lambda p, x: x @ jnp.flip(p["w"], 0), (5, 7), id="flip-in"),
    pytest.param(lambda p, x: x @ p["w"][:, ::-1], (5, 7), id="flip-out"),
    pytest.param(lambda p, x: x @ jnp.array(p["w"], copy=True), (5, 7), id="copy"),
    pytest.param(lambda p, x: x @ p["w"].astype(jnp.float32), (5, 7), id="same-dtype"),
    pytest.param(
        lambda p, x: x @ lax.stop_gradient(p["w"]), (5, 7), id="stop-gradient"
    ),
    pytest.param(lambda p, x: x @ on_one_device(p["w"]), (5, 7), id="sharding"),
    pytest.param(
        lambda p, x: jnp.concatenate(
            [x @ w for w in jnp.split(p["w"], 3, axis=-1)], axis=0
        ),
        (5, 21),
        id="split-fused-qkv",
    ),
    pytest.param(
        lambda p, x: x @ p["w"][:, :7] + x @ p["w"][:, 7:14] * 2,
        (5, 21),
        id="slice-out",
    ),
    pytest.param(
        lambda p, x: x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:],
        (5, 7),
        id="slice-in",
    ),
    pytest.param(
        lambda p, x: x @ p["w"].T.reshape(7, 5).T[None].squeeze(0), (5, 7), id="chain"
    ),
]


@pytest.mark.parametrize("fn, shape", STRUCTURAL)
def test_structural_rules_keep_the_factors(fn, shape):
    params, x = {"w": normal(*shape)}, normal(11, 5, seed=1)
    check_lift(fn, *adapt(fn, params, x), x, modes=False)


BATCH_SLICES = [
    pytest.param(at(1), id="index"),
    pytest.param(at(-1), id="negative-index"),
    pytest.param(lambda p, x: x @ p["w"][1:3][1], id="slice-then-index"),
    pytest.param(lambda p, x: sum(x @ w for w in p["w"]), id="iterate"),
    pytest.param(
        lambda p, x: x @ lax.index_in_dim(p["w"], 2, keepdims=False), id="lax"
    ),
    pytest.param(
        lambda p, x: x @ lax.dynamic_index_in_dim(p["w"], 2, keepdims=False),
        id="dynamic",
    ),
    pytest.param(
        lambda p, x: lax.fori_loop(
            0, 3, lambda i, c: c + x @ p["w"][i], jnp.zeros((11, 7))
        ),
        id="traced-index",
    ),
    pytest.param(lambda p, x: sum(x @ w[0] for w in jnp.split(p["w"], 3)), id="split"),
    pytest.param(lambda p, x: x @ p["w"][::-1][0], id="reversed"),
    pytest.param(
        lambda p, x: jnp.einsum("bi,klio->klbo", x, p["w"].reshape(1, 3, 5, 7)),
        id="reshape-batch",
    ),
    pytest.param(
        lambda p, x: jnp.einsum("bi,lio->lbo", x, jnp.concatenate([p["w"], p["w"]])),
        id="concatenate-batch",
    ),
    pytest.param(
        lambda p, x: jnp.einsum("bi,iol->lbo", x, jnp.moveaxis(p["w"], 0, -1)),
        id="moveaxis",
    ),
]


@pytest.mark.parametrize("fn", BATCH_SLICES)
def test_slices_of_a_batch_axis_keep_the_factors(fn):
    params, x = {"w": normal(3, 5, 7)}, normal(11, 5, seed=1)
    plan = jlora.plan(scan_stack, params, x[:, :5], rank=3)
    tree = randomise(jlora.wrap(params, plan=plan))
    assert tree["w"].scale.shape == (3,)
    check_lift(fn, tree, plan, x, modes=False)


def scan_stack(p, x):
    return lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]


@pytest.mark.parametrize("axis", [-1, 0])
def test_concatenated_weights_keep_their_factors(axis):
    """A fused qkv made of three weights; stacked inputs made of two."""

    def fn(p, x):
        fused = jnp.concatenate([p["q"], p["k"], p["v"]], axis)
        return jnp.concatenate([x] * 3, -1) @ fused if axis == 0 else x @ fused

    params = {name: normal(5, 7, seed=i) for i, name in enumerate("qkv")}
    x = normal(11, 5, seed=1)
    tree, plan = adapt(lambda p, x: [x @ w for w in p.values()], params, x)
    check_lift(fn, tree, plan, x, modes=False)


def test_concatenating_an_adapted_and_a_plain_weight():
    def fn(p, x):
        return x @ jnp.concatenate([p["plain"], p["w"]], -1)

    params = {"w": normal(5, 7), "plain": normal(5, 3)}
    x = normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x, targets=["w"])
    check_lift(fn, tree, plan, x, modes=False)


def test_stacked_weights_keep_their_factors_through_jnp_stack():
    def fn(p, x):
        return jnp.einsum("bi,lio->lbo", x, jnp.stack([p["u"], p["v"]]))

    params, x = {"u": normal(5, 7), "v": normal(5, 7, seed=2)}, normal(11, 5, seed=1)
    tree, plan = adapt(lambda p, x: [x @ w for w in p.values()], params, x)
    check_lift(fn, tree, plan, x, modes=False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_astype_keeps_the_factors(dtype):
    """The usual mixed precision: float32 params, cast for the product. Compared in
    float64, since merged weights would be rounded once more than factors are; a
    half-precision result is off by its own rounding, eps/2, in each of the three
    products."""

    def fn(p, x):
        return x.astype(dtype) @ p["w"].astype(dtype)

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(fn, params, x)
    got = quiet(jlora.lift(fn), tree, x)
    assert got.dtype == dtype
    want = np.asarray(x, np.float64) @ by_hand(tree, plan, np)["w"]
    eps = float(jnp.finfo(dtype).eps)
    assert abs(np.asarray(got, np.float64) - want).max() <= 3 * eps * abs(want).max()
    jaxpr = jax.make_jaxpr(jlora.lift(fn))(tree, x)
    assert base_sized(jaxpr, {35}) == 0


# ---------------------------------------------------------------- higher order


def scan_consts(p, x):
    return lax.scan(
        lambda c, s: (jnp.tanh(c @ p["w"] + s), c.sum()), x, jnp.arange(3.0)
    )


def scan_carry(p, x):
    def body(carry, s):
        w, c = carry
        return (w, jnp.tanh(c @ w + s)), c

    (_, c), cs = lax.scan(body, (p["w"], x), jnp.arange(3.0))
    return c, cs


def while_consts(p, x):
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"] + i), x)


def while_carry(p, x):
    def body(carry):
        i, w, c = carry
        return i + 1, w, jnp.tanh(c @ w)

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, p["w"], x))[2]


def while_in_condition(p, x):
    def go_on(carry):
        return ((carry @ p["w"]) ** 2).sum() > 1e-3

    return lax.while_loop(go_on, lambda c: c * 0.5, x)


def branch(p, x):
    return lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: (x + 1) @ p["w"].T)


def one_branch(p, x):
    return lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x, p["w"])


def switch(p, x):
    index = (x[0, 0] * 3).astype(jnp.int32) % 3
    branches = [lambda w, k=k: jnp.tanh(x @ w) * k for k in (1.0, 2.0, 3.0)]
    return lax.switch(index, branches, p["w"])


def nested(p, x):
    @jax.jit
    @jax.checkpoint
    def block(w, c):
        def body(c, s):
            return lax.cond(s > 1, lambda: jnp.tanh(c @ w), lambda: c * s), None

        return lax.scan(body, c, jnp.arange(3.0))[0]

    return jax.jit(lambda c: block(p["w"], block(p["w"], c)))(x)


SQUARE = [
    pytest.param(jax.jit(dense), id="jit"),
    pytest.param(jax.jit(jax.jit(dense)), id="jit-of-jit"),
    pytest.param(lambda p, x: jax.jit(lambda x: x @ p["w"])(x), id="jit-closure"),
    pytest.param(jax.checkpoint(dense), id="remat"),
    pytest.param(
        lambda p, x: jax.checkpoint(lambda x: x @ p["w"])(x), id="remat-closure"
    ),
    pytest.param(scan_consts, id="scan-consts"),
    pytest.param(scan_carry, id="scan-unchanged-carry"),
    pytest.param(branch, id="cond"),
    pytest.param(one_branch, id="cond-one-branch"),
    pytest.param(switch, id="switch"),
    pytest.param(while_consts, id="fori-consts"),
    pytest.param(nested, id="nested"),
    pytest.param(lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), id="vmap"),
    pytest.param(
        lambda p, x: jax.grad(lambda x: jnp.tanh(x @ p["w"]).sum())(x), id="grad-of-x"
    ),
    pytest.param(
        lambda p, x: jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (x * 2,)), id="jvp"
    ),
]


@pytest.mark.parametrize("fn", SQUARE)
def test_higher_order(fn):
    params, x = {"w": normal(7, 7, scale=0.4)}, normal(3, 7, seed=1)
    check_lift(fn, *adapt(fn, params, x), x)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(while_carry, id="while-unchanged-carry"),
        pytest.param(while_in_condition, id="while-in-condition"),
    ],
)
def test_while_which_jax_does_not_differentiate_backwards(fn):
    """Compared in value, and forwards in the factors."""
    params, x = {"w": normal(7, 7, scale=0.4)}, normal(3, 7, seed=1)
    tree, plan = adapt(fn, params, x)
    trainable, frozen = jlora.partition(tree)
    direction = jax.tree.map(lambda v: v * 0.3, trainable)

    def ours(trainable):
        return jlora.lift(fn)(jlora.combine(trainable, frozen), x)

    def theirs(trainable):
        return fn(by_hand(jlora.combine(trainable, frozen), plan), x)

    want = jax.jvp(theirs, (trainable,), (direction,))
    close(quiet(jax.jvp, ours, (trainable,), (direction,)), want)
    close(quiet(jax.jit(ours), trainable), want[0])
    assert base_sized(jax.make_jaxpr(ours)(trainable), {49}) == 0


STACKED = [
    pytest.param(
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, p["w"]), id="xs"
    ),
    pytest.param(
        lambda p, x: lax.scan(
            lambda c, w: (jnp.tanh(c @ w), c), x, p["w"], reverse=True
        ),
        id="reverse",
    ),
    pytest.param(
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, p["w"], unroll=2),
        id="unroll",
    ),
    pytest.param(
        lambda p, x: lax.scan(
            lambda c, layer: (jnp.tanh(c @ layer["w"] + layer["s"]), None),
            x,
            {"w": p["w"], "s": jnp.arange(5.0)},
        ),
        id="beside-a-plain-array",
    ),
    pytest.param(
        lambda p, x: lax.scan(
            jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), c)), x, p["w"]
        ),
        id="remat-body",
    ),
    pytest.param(
        jax.checkpoint(
            lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, p["w"])
        ),
        id="remat-around",
    ),
    pytest.param(
        lambda p, x: lax.scan(
            lambda c, w: (lax.cond(c.sum() > 0, lambda: c @ w, lambda: c @ w.T), None),
            x,
            p["w"],
        ),
        id="cond-body",
    ),
    pytest.param(
        lambda p, x: lax.scan(
            lambda c, i: (jnp.tanh(c @ p["w"][i]), None), x, jnp.arange(5)
        ),
        id="indexed-by-the-step",
    ),
    pytest.param(
        lambda p, x: lax.map(lambda w: x @ w, p["w"]),
        id="map",
    ),
    pytest.param(
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"][1:4]),
        id="some-layers",
    ),
    pytest.param(
        lambda p, x: lax.scan(
            lambda c, w: (jnp.tanh(c @ w), None), x, p["w"].reshape(5, 1, 7, 7)[:, 0]
        ),
        id="reshaped-and-back",
    ),
    pytest.param(
        lambda p, x: jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"]), id="vmap-over-layers"
    ),
]


@pytest.mark.parametrize("fn", STACKED)
def test_scan_over_stacked_adapters(fn):
    params, x = {"w": normal(5, 7, 7, scale=0.4)}, normal(3, 7, seed=1)
    tree, plan = adapt(scan_stack, params, x)
    assert tree["w"].a.shape == (5, 7, 3) and tree["w"].scale.shape == (5,)
    check_lift(fn, tree, plan, x, modes=False)


def test_nested_scans_over_twice_stacked_adapters():
    def fn(p, x):
        def outer(c, ws):
            return lax.scan(lambda c, w: (jnp.tanh(c @ w), c), c, ws)

        return lax.scan(outer, x, p["w"])

    params, x = {"w": normal(2, 5, 7, 7, scale=0.4)}, normal(3, 7, seed=1)
    tree, plan = adapt(fn, params, x)
    assert tree["w"].a.shape == (2, 5, 7, 3) and tree["w"].scale.shape == (2, 5)
    check_lift(fn, tree, plan, x)


def test_scan_over_stacked_embeddings():
    def fn(p, ids):
        return lax.scan(lambda c, w: (c + w[ids], w[ids]), jnp.zeros((11, 5)), p["w"])

    params, ids = {"w": normal(3, 13, 5)}, integers(11, below=13)
    check_lift(fn, *adapt(fn, params, ids), ids)


def test_scan_over_stacked_convolutions():
    def fn(p, x):
        return lax.scan(
            lambda c, w: (jnp.tanh(conv(NWC)({"w": w}, c)), None), x, p["w"]
        )

    params, x = {"w": normal(2, 3, 5, 5, scale=0.3)}, normal(2, 11, 5, seed=1)
    tree, plan = adapt(fn, params, x)
    assert tree["w"].a.shape == (2, 3, 5, 3)
    check_lift(fn, tree, plan, x)


def test_a_carry_that_changes_is_materialised_and_right():
    def fn(p, x):
        def body(carry, _):
            w, c = carry
            return (w * 0.5, jnp.tanh(c @ w)), None

        return lax.scan(body, (p["w"], x), None, length=3)[0][1]

    params, x = {"w": normal(7, 7, scale=0.4)}, normal(3, 7, seed=1)
    tree, plan = adapt(dense, params, x)
    check_lift(fn, tree, plan, x, factored=False)
    with pytest.warns(UserWarning, match="w.*scan|scan.*w"):
        jlora.lift(fn)(tree, x)


def test_remat_keeps_its_policy_and_prevent_cse():
    policy = jax.checkpoint_policies.dots_saveable

    def fn(p, x):
        block = functools.partial(jax.checkpoint, policy=policy)
        x = block(lambda x: jnp.sin(x @ p["w"]), prevent_cse=False)(x)
        return block(lambda x: jnp.cos(x @ p["w"]), prevent_cse=True)(x)

    params, x = {"w": normal(7, 7)}, normal(3, 7, seed=1)
    tree, _ = adapt(fn, params, x)

    def remats(fn, tree):
        jaxpr = jax.make_jaxpr(fn)(tree, x)
        found = [e.params for e in equations(jaxpr) if "prevent_cse" in e.params]
        return [(p["policy"], p["prevent_cse"]) for p in found]

    assert remats(jlora.lift(fn), tree) == remats(fn, params)
    assert [kept for kept, _ in remats(jlora.lift(fn), tree)] == [policy, policy]


def test_remat_saves_no_more_than_the_block_inputs(capsys):
    """What passes from forward to backward beside the arguments of the loss."""

    def fn(p, x):
        for _ in range(3):
            x = jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(x)
        return x.sum()

    params, x = {"w": normal(7, 7)}, normal(3, 7, seed=1)
    tree, _ = adapt(fn, params, x)
    trainable, frozen = jlora.partition(tree)

    def loss(trainable, x):
        return jlora.lift(fn)(jlora.combine(trainable, frozen), x)

    jax.ad_checkpoint.print_saved_residuals(loss, trainable, x)
    lines = capsys.readouterr().out.splitlines()
    kept = [line for line in lines if "argument" not in line and "[3," in line]
    assert 0 < len(kept) <= 2, lines


def test_jit_keeps_its_name_and_inline():
    """Profiles and HLO name a user's own jitted functions; lifting must not undo it."""

    @jax.jit
    def users_own_block(w, x):
        return x @ w

    def fn(p, x):
        return users_own_block(p["w"], x)

    params, x = {"w": normal(5, 7)}, normal(3, 5, seed=1)
    tree, _ = adapt(fn, params, x)
    assert "users_own_block" in str(jax.make_jaxpr(jlora.lift(fn))(tree, x))


def test_scan_keeps_length_reverse_and_unroll():
    def fn(p, x):
        def body(c, w):
            return c @ w, None

        return lax.scan(body, x, p["w"], reverse=True, unroll=2)[0]

    params, x = {"w": normal(5, 7, 7)}, normal(3, 7, seed=1)
    tree, _ = adapt(fn, params, x)
    (found,) = [
        e.params
        for e in equations(jax.make_jaxpr(jlora.lift(fn))(tree, x))
        if e.primitive.name == "scan"
    ]
    assert (found["length"], found["reverse"], found["unroll"]) == (5, True, 2)


def test_vmap_over_stacked_trees_is_one_model_per_slice():
    """An ensemble: the user's own vmap over adapted leaves."""
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    trees = [
        randomise(jlora.wrap(params, plan=jlora.plan(dense, params, x)), s)
        for s in (1, 2)
    ]
    both = jax.tree.map(lambda *v: jnp.stack(v), *trees)
    got = jax.jit(jax.vmap(jlora.lift(dense), in_axes=(0, None)))(both, x)
    close(got, jnp.stack([jlora.lift(dense)(tree, x) for tree in trees]))


def test_lift_inside_the_users_own_scan_over_adapted_leaves():
    """The scan outside of lift slices every field of the leaf."""
    params, x = {"w": normal(5, 7, 7, scale=0.4)}, normal(3, 7, seed=1)
    tree, plan = adapt(scan_stack, params, x)
    step = jlora.lift(lambda w, c: jnp.tanh(c @ w))
    got, _ = quiet(lax.scan, lambda c, w: (step(w, c), None), x, tree["w"])
    want, _ = lax.scan(
        lambda c, w: (jnp.tanh(c @ w), None), x, by_hand(tree, plan)["w"]
    )
    close(got, want)


def test_second_derivatives():
    """A Hessian-vector product through the lift, in the factors."""

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    params, x = {"w": normal(5, 7)}, normal(3, 5, seed=1)
    tree, plan = adapt(fn, params, x)
    trainable, frozen = jlora.partition(tree)
    direction = jax.tree.map(jnp.sin, trainable)

    def hvp(call):
        def loss(trainable):
            return (call(jlora.combine(trainable, frozen)) ** 2).sum()

        return jax.jvp(jax.grad(loss), (trainable,), (direction,))[1]

    want = hvp(lambda tree: fn(by_hand(tree, plan), x))
    # Second derivatives of a squared output add up terms of opposite sign; 1e-4 is
    # ten times what one of them loses.
    close(hvp(lambda tree: jlora.lift(fn)(tree, x)), want, 1e-4)


# ----------------------------------------- custom rules are kept, not inlined


@jax.custom_jvp
def with_own_jvp(x, w):
    return x @ w


@with_own_jvp.defjvp
def _with_own_jvp(primals, tangents):
    """Twice the true derivative, so that a lost rule is seen."""
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2 * (dx @ w + x @ dw)


@jax.custom_vjp
def with_own_vjp(x, w):
    return x @ w


with_own_vjp.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (3 * g @ saved[1].T, 3 * saved[0].T @ g),
)


@pytest.mark.parametrize(
    "rule, name",
    [
        pytest.param(with_own_jvp, "custom_jvp_call", id="jvp"),
        pytest.param(with_own_vjp, "custom_vjp_call", id="vjp"),
    ],
)
def test_custom_derivative_of_a_weight_is_kept_and_the_weight_materialised(rule, name):
    def fn(p, x):
        return rule(x @ p["v"], p["deep"]["w"])

    params = {"v": normal(5, 5), "deep": {"w": normal(5, 7)}}
    x = normal(11, 5, seed=1)
    tree, plan = adapt(lambda p, x: (x @ p["v"]) @ p["deep"]["w"], params, x)
    check_lift(fn, tree, plan, x, factored=False)
    with pytest.warns(UserWarning) as caught:
        jlora.lift(fn)(tree, x)
    (warning,) = caught
    says(warning.message, "deep/w", name)
    with pytest.raises(ValueError) as error:
        jlora.lift(fn, strict=True)(tree, x)
    says(error, "deep/w", name)


@pytest.mark.parametrize(
    "act", [pytest.param(jax.nn.relu, id="jvp"), pytest.param(jax.nn.silu, id="jit")]
)
def test_custom_derivatives_of_activations_are_kept_without_a_word(act):
    def fn(p, x):
        return act(with_own_vjp(act(x @ p["w"]), jnp.ones((7, 3))))

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    check_lift(fn, *adapt(fn, params, x), x)


# -------------------------------------------------------------------- fallback

FALLBACKS = [
    pytest.param(lambda w: jnp.sin(w), "sin", id="sin"),
    pytest.param(lambda w: jnp.cumsum(w, axis=0), "cumsum", id="cumsum"),
    pytest.param(lambda w: w * jnp.tri(5, 7), "mul", id="mul"),
    pytest.param(
        lambda w: w / jnp.linalg.norm(w), "(square|mul|integer_pow)", id="weight-norm"
    ),
    pytest.param(lambda w: jnp.where(w > 0, w, 0.0), "gt", id="mask"),
]


@pytest.mark.parametrize("use, name", FALLBACKS)
def test_fallback_materialises_with_a_warning_and_strict_raises(use, name):
    def fn(p, x):
        return x @ p["layer"]["v"] @ use(p["layer"]["w"])

    params = {"layer": {"v": normal(5, 5), "w": normal(5, 7)}}
    x = normal(11, 5, seed=1)
    tree, plan = adapt(lambda p, x: x @ p["layer"]["v"] @ p["layer"]["w"], params, x)
    check_lift(fn, tree, plan, x, factored=False)
    with pytest.warns(UserWarning) as caught:
        jlora.lift(fn)(tree, x)
    text = " ".join(str(w.message) for w in caught)
    assert "layer/w" in text and "layer/v" not in text
    assert re.search(rf"'{name}'", text), text
    with pytest.raises(ValueError) as error:
        jlora.lift(fn, strict=True)(tree, x)
    says(error, "layer/w", re.compile(name), "strict")


def test_a_weight_is_materialised_once_for_all_its_uses():
    def fn(p, x):
        return x @ jnp.sin(p["w"]) + x @ jnp.cos(p["w"]) + x @ jnp.exp(p["w"])

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x)
    jaxpr = silent(jax.make_jaxpr(jlora.lift(fn)), tree, x)
    assert base_sized(jaxpr, {35}, ["dot_general"]) == 1  # a·b, once


def test_a_weight_materialised_for_one_use_stays_factored_for_the_other():
    def fn(p, x):
        return x @ p["w"] + jnp.sin(p["w"]).sum()

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x)
    jaxpr = silent(jax.make_jaxpr(jlora.lift(fn)), tree, x)
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert sorted(e.outvars[0].aval.size for e in products) == [33, 35, 77, 77]


def test_reading_shape_and_dtype_is_no_use():
    def fn(p, x):
        assert p["w"].ndim == 2
        return x @ p["w"] * p["w"].shape[0] + jnp.zeros(p["w"].shape[1], p["w"].dtype)

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    check_lift(fn, *adapt(fn, params, x), x)


# --------------------------------------------------------------------- explain


def test_explain_tells_factored_materialised_and_unused():
    def fn(p, x):
        h = x @ p["first"]["w"]
        h = lax.scan(lambda c, w: (c @ w, None), h, p["stack"])[0]
        return jnp.take(p["table"], jnp.array([1, 2]), axis=0), h @ jnp.sin(p["last"])

    params = {
        "first": {"w": normal(5, 7)},
        "stack": normal(3, 7, 7),
        "table": normal(13, 5),
        "last": normal(7, 5),
        "spare": normal(5, 5),
    }
    x = normal(11, 5, seed=1)

    def planned(p, x):
        out = fn({**p, "last": jnp.zeros((7, 5))}, x)
        return out, x @ p["spare"], (x @ p["first"]["w"]) @ p["last"]

    tree, _ = adapt(planned, params, x)
    report = silent(jlora.explain, fn, tree, x)
    found = {entry.path: entry for entry in report}
    assert set(found) == {"first/w", "stack", "table", "last", "spare"}
    status = {path: entry.status for path, entry in found.items()}
    assert status == {
        "first/w": "factored",
        "stack": "factored",
        "table": "factored",
        "last": "materialised",
        "spare": "unused",
    }
    assert "dot_general" in found["first/w"].where
    assert "dot_general" in found["stack"].where
    assert "gather" in found["table"].where
    assert "sin" in found["last"].where
    assert not found["spare"].where
    text = str(report)
    for path, entry in found.items():
        assert re.search(rf"{path}.*{entry.status}", text), text


def test_explain_costs_nothing_and_accepts_abstract_trees():
    model = models.LLAMA_70B
    model = models.Llama(*list(vars(model).values())[:-1], layers=1)
    params = model.shapes()
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    plan = jlora.plan(model, params, ids, targets=models.LLAMA_TARGETS)
    tree = jlora.wrap(params, plan=plan)
    report = list(jlora.explain(model, tree, ids))
    assert len(report) == 7
    assert {entry.status for entry in report} == {"factored"}


def test_explain_of_a_weight_followed_through_elementwise_operations():
    """Weight norm: planned, since its roles are seen, and reported as materialised."""

    def fn(p, x):
        return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(fn, params, x)
    (entry,) = silent(jlora.explain, fn, tree, x)
    assert (entry.path, entry.status) == ("w", "materialised")
    check_lift(fn, tree, plan, x, factored=False)


# ----------------------------------------------------- called as the original


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(7)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def small():
    x = normal(11, 5)
    return Small(), Small().init(jax.random.key(0), x, train=False), x


@pytest.mark.parametrize(
    "make, jit",
    [
        pytest.param(models.conv_net, True, id="conv-net-jit"),
        pytest.param(small, False, id="dense-eager"),
    ],
)
def test_rngs_mutable_and_static_booleans(make, jit):
    model, variables, x = make()
    plan = jlora.plan(model.apply, variables, x, train=False, rank=3)
    tree = randomise(jlora.wrap(variables, plan=plan))
    rngs = {"dropout": jax.random.key(5)}

    def calls(apply, tree):
        def train(tree, x, rngs):
            return apply(tree, x, train=True, rngs=rngs, mutable=["batch_stats"])

        def test(tree, x):
            return apply(tree, x, train=False)

        if jit:
            train, test = jax.jit(train), jax.jit(test)
        return train(tree, x, rngs), test(tree, x)

    want = calls(model.apply, by_hand(tree, plan))
    close(quiet(calls, jlora.lift(model.apply), tree), want)
    (y, state), other = want
    assert not np.allclose(y, other, atol=1e-3)
    statistics = {"batch_stats": variables["batch_stats"]}
    assert jax.tree.structure(state) == jax.tree.structure(statistics)
    assert not np.allclose(*(jax.tree.leaves(v)[0] for v in (state, statistics)))


def test_mutable_true_gives_the_adapted_params_back():
    model, variables, x = small()
    tree, _ = adapt(model.apply, variables, x, train=False, targets=["params/**"])
    _, state = jlora.lift(model.apply)(
        tree, x, train=True, mutable=True, rngs={"dropout": jax.random.key(0)}
    )
    assert set(adapted(state)) == set(adapted(tree))
    same(state["params"], tree["params"])


@pytest.mark.parametrize("method", ["encode", models.ScannedLM.encode])
def test_scanned_lm_by_method(method):
    model, params, ids = models.scanned_lm()
    variables = {"params": params}
    tree, plan = adapt(
        model.apply, variables, ids, targets=["**/kernel", "**/embedding"]
    )
    want = jax.jit(functools.partial(model.apply, method=method))(
        by_hand(tree, plan), ids
    )
    lifted = functools.partial(jlora.lift(model.apply), method=method)
    close(quiet(jax.jit(lifted), tree, ids), want)


def test_scanned_lm_in_value_and_gradient():
    """nn.scan, nn.remat with a policy, attention, tied embedding: nothing falls back.

    Gradients of three layers in float32: 3e-5, since each is a longer chain of
    products than the values' 1e-5 is stated for.
    """
    model, params, ids = models.scanned_lm()

    def fn(params, ids):
        return model.apply({"params": params}, ids)

    tree, plan = adapt(fn, params, ids, targets=["**/kernel", "**/embedding"])
    assert tree["blocks"]["query"]["kernel"].a.shape == (3, 24, 3)
    assert tree["blocks"]["query"]["kernel"].b.shape == (3, 3, 3, 8)
    assert tree["blocks"]["out"]["kernel"].a.shape == (3, 3, 8, 3)
    values = jax.jit(
        lambda tree, ids: (jlora.lift(fn)(tree, ids), fn(by_hand(tree, plan), ids))
    )
    close(*quiet(values, tree, ids))
    check_lift(fn, tree, plan, ids, tol=3e-5)
    statuses = {entry.status for entry in jlora.explain(fn, tree, ids)}
    assert statuses == {"factored"}


def test_conv_net_in_value_and_gradient():
    """3e-5 for the gradients: four layers."""
    model, variables, x = models.conv_net()
    tree, plan = adapt(model.apply, variables, x, targets=["params/**"])
    assert len(adapted(tree)) == 5
    check_lift(model.apply, tree, plan, x, tol=3e-5, modes=False)


@flax.struct.dataclass
class Output:
    y: jax.Array
    note: str = flax.struct.field(pytree_node=False)


class Marker:
    """Not a pytree and not hashable by value: must pass as the same object."""


def test_everything_but_arrays_stays_what_it_is_in_and_out():
    marker = Marker()
    seen = []

    def fn(p, x, count, *rest, flag=None, act=None, extra=None, **kwargs):
        seen.append((count, rest, flag, act, extra, kwargs))
        assert type(count) is int and flag is True and act is jnp.tanh
        assert rest == ("text", None, 2.5) and extra["marker"] is marker
        out = act(x @ p["w"])[:count]
        return (
            Output(out, "note"),
            {"flag": flag, "none": None, "text": rest[0]},
            marker,
        )

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    args = (x, 3, "text", None, 2.5)
    kwargs = dict(flag=True, act=jnp.tanh, extra={"marker": marker, "x": x}, more=())
    want = fn(by_hand(tree, plan), *args, **kwargs)
    for _ in range(2):
        out, plain, same_marker = quiet(jlora.lift(fn), tree, *args, **kwargs)
        assert isinstance(out, Output) and out.note == "note"
        close(out.y, want[0].y)
        assert plain == want[1] and plain["flag"] is True and same_marker is marker


def test_the_adapted_tree_may_come_by_keyword_or_in_several_arguments():
    def fn(x, *, params, more):
        return x @ params["w"] + x @ more[0]

    w, v, x = normal(5, 7), normal(5, 7, seed=1), normal(11, 5, seed=2)
    one, plan = adapt(dense, {"w": w}, x)
    other = randomise(jlora.wrap({"w": v}, plan=plan), seed=9)
    want = fn(x, params=by_hand(one, plan), more=[by_hand(other, plan)["w"]])
    got = quiet(jlora.lift(fn), x, params=one, more=[other["w"]])
    close(got, want)


def test_numpy_arrays_and_random_keys_are_arrays():
    def fn(p, x, key):
        return x @ p["w"] + jax.random.normal(key, (7,))

    params, x = {"w": np.asarray(normal(5, 7))}, np.asarray(normal(11, 5, seed=1))
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        tree, plan = adapt(fn, params, x, key)
        close(quiet(jlora.lift(fn), tree, x, key), fn(by_hand(tree, plan), x, key))


def test_without_adapted_leaves_it_is_the_original_function():
    def fn(p, x):
        return float(x.sum()) + float(p["w"].sum())  # only concrete arrays can do this

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    assert jlora.lift(fn)(params, x) == fn(params, x)
    assert jlora.lift(fn)(params, x=x) == fn(params, x)


def test_lift_keeps_name_and_docstring():
    def fn(p, x):
        """What it does."""
        return x @ p["w"]

    lifted = jlora.lift(fn)
    assert (lifted.__name__, lifted.__doc__) == ("fn", "What it does.")


def test_lift_of_a_lifted_function_is_right():
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    close(jlora.lift(jlora.lift(dense))(tree, x), dense(by_hand(tree, plan), x))


def test_lifted_function_inside_a_lifted_function():
    inner = jlora.lift(dense)

    def fn(p, x):
        return jnp.tanh(inner(p, x)) @ p["w"].T

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    check_lift(lambda p, x: jlora.lift(fn)(p, x), tree, plan, x)


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit, jax.checkpoint])
def test_an_adapted_leaf_that_is_returned_comes_back_as_one(wrapper):
    def fn(p, x):
        return {"p": p, "y": x @ p["w"]}

    params, x = {"w": normal(5, 7), "bias": normal(7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x, targets=["w"])
    got = quiet(jlora.lift(wrapper(fn)), tree, x)
    assert isinstance(got["p"]["w"], jlora.LoRA)
    same(got["p"], tree)


def test_a_stacked_leaf_that_a_scan_returns_comes_back_right():
    def fn(p, x):
        return lax.scan(lambda c, w: (c @ w, w), x, p["w"])

    params, x = {"w": normal(5, 7, 7)}, normal(3, 7, seed=1)
    tree, plan = adapt(scan_stack, params, x)
    y, back = silent(jlora.lift(fn), tree, x)
    want, stack = fn(by_hand(tree, plan), x)
    close(y, want)
    close(jlora.merge({"w": back})["w"], stack)


# ---------------------------------------------------------------- trace cache


def counting():
    """A function, and the list of the argument shapes it was executed with."""
    runs = []

    def fn(p, x, flag=True):
        runs.append((x.shape, x.dtype, flag))
        return x @ p["w"] if flag else x @ p["w"] * 2

    return fn, runs


def test_a_second_eager_call_does_not_retrace():
    fn, runs = counting()
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    lifted = jlora.lift(fn)
    lifted(tree, x)
    runs.clear()
    first = lifted(tree, x)
    other = randomise(tree, seed=11)
    second = lifted(other, x + 1)
    assert runs == []
    close(first, x @ by_hand(tree, plan)["w"])
    close(second, (x + 1) @ by_hand(other, plan)["w"])


def test_training_eagerly_does_not_retrace():
    fn, runs = counting()
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x)
    trainable, frozen = jlora.partition(tree)
    lifted = jlora.lift(fn)

    def loss(trainable):
        return (lifted(jlora.combine(trainable, frozen), x) ** 2).mean()

    jax.grad(loss)(trainable)
    runs.clear()
    for _ in range(3):
        grads = jax.grad(loss)(trainable)
        trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)
    assert runs == []


def test_what_changes_the_trace_makes_a_new_one():
    fn, runs = counting()
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    lifted = jlora.lift(fn)
    lifted(tree, x)

    def traced_again(*args, **kwargs):
        runs.clear()
        out = lifted(*args, **kwargs)
        return bool(runs), out

    again, out = traced_again(tree, x[:3])
    assert again and out.shape == (3, 7)
    again, out = traced_again(tree, x, flag=False)
    assert again
    close(out, x @ by_hand(tree, plan)["w"] * 2)
    again, out = traced_again(tree, x, False)
    close(out, x @ by_hand(tree, plan)["w"] * 2)
    again, out = traced_again(tree, x.astype(jnp.bfloat16))
    assert again
    again, out = traced_again({"w": tree["w"], "spare": x}, x)
    assert again


def test_the_matmul_precision_context_is_part_of_the_trace():
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x)
    lifted = jlora.lift(dense)

    def precisions():
        jaxpr = jax.make_jaxpr(lifted)(tree, x)
        dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        return {e.params["precision"] for e in dots}

    default = precisions()
    with jax.default_matmul_precision("highest"):
        assert precisions() == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
    assert precisions() == default == {None}


def test_the_device_is_not_part_of_what_is_cached():
    """The same eager call on one device, and then on another."""
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    lifted, want = jlora.lift(dense), dense(by_hand(tree, plan), x)
    for device in jax.devices()[:2]:
        got = lifted(*jax.device_put((tree, x), device))
        assert got.devices() == {device}
        close(got, want)


def test_weak_types_are_part_of_the_trace():
    """A traced Python scalar is weak: it must not widen a bfloat16 result."""

    def fn(p, s):
        return p["x"] @ p["w"] * s

    params = {k: normal(5, 5, dtype=jnp.bfloat16, seed=i) for i, k in enumerate("wx")}
    tree, _ = adapt(fn, params, 1.0, targets=["w"])
    lifted = jlora.lift(fn)
    assert jax.jit(lifted)(tree, jnp.float32(2)).dtype == jnp.float32
    assert jax.jit(lifted)(tree, 2.0).dtype == jnp.bfloat16
    assert jax.jit(lifted)(tree, jnp.float32(2)).dtype == jnp.float32


def test_no_tracer_leaks_through_the_cache():
    """One lifted closure, called inside a scan, then outside, then inside a grad."""

    @jax.jit
    def outer(tree, shift, x):
        lifted = jlora.lift(lambda p, x: jnp.tanh(x @ p["w"]) * shift + jnp.arange(7.0))
        _, ys = lax.scan(lambda c, x: (c, lifted(tree, x)), 0, jnp.stack([x, x + 1]))
        grad = jax.grad(lambda x: lifted(tree, x).sum())(x)
        return ys, lifted(tree, x), grad

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    ys, y, grad = outer(tree, jnp.float32(1.5), x)

    def want(x):
        return jnp.tanh(x @ by_hand(tree, plan)["w"]) * 1.5 + jnp.arange(7.0)

    close(ys, jnp.stack([want(x), want(x + 1)]))
    close(y, want(x))
    close(grad, jax.grad(lambda x: want(x).sum())(x))


def test_a_closure_over_changed_outer_values_is_traced_where_it_is_called():
    """grad over a value that the lifted closure captures, outside of any jit."""
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)

    def loss(shift):
        return jlora.lift(lambda p, x: (x @ p["w"] * shift).sum())(tree, x)

    want = (x @ by_hand(tree, plan)["w"]).sum()
    close(jax.grad(loss)(2.0), want)
    close(jax.vmap(jax.grad(loss))(jnp.ones(3)), jnp.full(3, want))


# --------------------------------------------------------- what does not train


def test_nothing_but_factors_gets_a_gradient():
    """The user differentiates the whole tree: bases, plain leaves and scales get
    zeros, and no product of a base's shape is formed."""

    def fn(p, x):
        return ((x @ p["w"] + p["bias"]) ** 2).sum()

    params, x = {"w": normal(5, 7), "bias": normal(7)}, normal(11, 5, seed=1)
    tree, plan = adapt(fn, params, x, targets=["w"])
    lifted = jlora.lift(fn)
    grads = jax.grad(lifted)(tree, x)
    assert not grads["w"].w.any() and not grads["bias"].any()
    assert not grads["w"].scale.any()
    trainable, frozen = jlora.partition(tree)
    want = jax.grad(lambda t: fn(by_hand(jlora.combine(t, frozen), plan), x))(trainable)
    close(grads["w"].a, want["w"].a)
    close(grads["w"].b, want["w"].b)
    assert base_sized(jax.make_jaxpr(jax.grad(lifted))(tree, x), {35}) == 0


def test_other_arguments_are_differentiated_as_ever():
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, plan = adapt(dense, params, x)
    got = jax.grad(lambda x: (jlora.lift(dense)(tree, x) ** 2).sum())(x)
    want = jax.grad(lambda x: (dense(by_hand(tree, plan), x) ** 2).sum())(x)
    close(got, want)


def test_full_leaves_are_the_array_that_trains():
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["bias"]) @ p["head"] / jnp.linalg.norm(p["head"])

    params = {"w": normal(5, 7), "bias": normal(7), "head": normal(7, 3)}
    x = normal(11, 5, seed=1)
    plan = jlora.plan(fn, params, x, targets=["w"], rank=3)
    tree = jlora.wrap(params, plan=plan, train=["head", "bias"])
    tree = randomise(tree)
    assert isinstance(tree["head"], jlora.Full) and isinstance(tree["bias"], jlora.Full)
    lifted = jlora.lift(fn)
    close(quiet(lifted, tree, x), fn(by_hand(tree, plan), x))
    trainable, frozen = jlora.partition(tree)
    got = jax.grad(lambda t: lifted(jlora.combine(t, frozen), x).sum())(trainable)
    want = jax.grad(lambda t: fn(by_hand(jlora.combine(t, frozen), plan), x).sum())(
        trainable
    )
    close(got, want)
    assert got["head"].value.any() and got["bias"].value.any()


def test_lift_in_float64():
    """With x64 on, both sides agree to float64's own rounding: no hidden cast."""
    with jax.enable_x64(True):
        params = {"w": normal(5, 7, dtype=jnp.float64)}
        x = normal(11, 5, seed=1, dtype=jnp.float64)
        tree, plan = adapt(dense, params, x)
        one = jnp.ones((), jnp.float32)  # times b is exact
        tree = {"w": dataclasses.replace(tree["w"], scale=one)}
        assert tree["w"].a.dtype == jnp.float32
        got = jlora.lift(dense)(tree, x)
        assert got.dtype == jnp.float64
        want = np.asarray(x) @ by_hand(tree, plan, np)["w"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * abs(want).max())


def test_lift_warns_once_per_use_and_not_at_every_eager_call():
    def fn(p, x):
        return x @ jnp.sin(p["w"])

    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x)
    lifted = jlora.lift(fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            lifted(tree, x)
    assert len(caught) == 1


# --------------------------------------------------- activations that weights share


def shared_products(fn, *args):
    """How many products of an activation with several a at once a function makes."""
    wide = {2 * 5, 3 * 5}  # ranks of 5
    return sum(
        eqn.primitive.name == "dot_general"
        and bool(wide & {*eqn.outvars[0].aval.shape})
        for eqn in equations(jax.make_jaxpr(fn)(*args))
    )


def swapped(w, x):
    """(x @ w).T, with the weight as the first operand."""
    dims = (((0,), (1,)), ((), ()))
    return lax.dot_general(w, x, dims, preferred_element_type=jnp.float32)


SHARED = {
    "qkv": (lambda p, x: (x @ p["q"]) * (x @ p["k"]) + x @ p["v"], 1),
    "either-side": (lambda p, x: x @ p["q"] + swapped(p["k"], x).T, 1),
    "transposed": (lambda p, x: x @ p["q"] + x @ p["k"].T, 1),
    "converted": (
        lambda p, x: (
            x.astype(jnp.bfloat16) @ p["q"].astype(jnp.bfloat16)
            + x.astype(jnp.bfloat16) @ p["k"].astype(jnp.bfloat16)
        ).astype(jnp.float32),
        1,
    ),
    "two-groups": (lambda p, x: jnp.tanh(x @ p["q"] + x @ p["k"]) @ p["v"] @ p["k"], 1),
    "dtypes": (lambda p, x: x @ p["q"] + (x.astype(jnp.float16) @ p["k"]), 0),
    "precisions": (
        lambda p, x: x @ p["q"] + jnp.dot(x, p["k"], precision="highest"),
        0,
    ),
    "one-is-plain": (lambda p, x: x @ p["q"] + x @ p["plain"], 0),
    "inside-and-after": (
        lambda p, x: (
            lax.scan(lambda c, _: (jnp.tanh(c + x @ p["q"]), None), x, None, 3)[0]
            + x @ p["k"]
            + x @ p["v"]
        ),
        1,
    ),
    "in-a-condition": (
        lambda p, x: (
            lax.while_loop(
                lambda c: jnp.sum(x @ p["q"]) + c < 5, lambda c: c + 40.0, 0.0
            )
            + x @ p["k"]
        ),
        0,
    ),
    "in-branches": (
        lambda p, x: (
            lax.cond(x[0, 0] > 0, lambda: x @ p["q"] + x @ p["k"], lambda: x @ p["v"])
            + x @ p["q"]
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_weights_of_one_activation_share_its_first_product(name):
    fn, shares = SHARED[name]
    params = {n: normal(6, 6, seed=i) for i, n in enumerate(["q", "k", "v", "plain"])}
    x = normal(11, 6, seed=9)
    plan = jlora.plan(fn, params, x, rank=5, targets="?")
    tree = randomise(jlora.wrap(params, plan=plan))
    assert shared_products(jlora.lift(fn), tree, x) == shares
    tol = 5e-2 if name in ("converted", "dtypes") else 1e-5
    for run in (jlora.lift(fn), jax.jit(jlora.lift(fn))):
        close(run(tree, x), fn(jlora.merge(tree), x), tol=tol)


def test_no_sharing_under_dropout_whose_masks_are_its_own():
    fn, _ = SHARED["qkv"]
    params = {n: normal(6, 6, seed=i) for i, n in enumerate("qkv")}
    tree = randomise(jlora.wrap(params, rank=5, targets="*"))
    dropped = jlora.dropout(tree, 0.5, jax.random.key(0))
    assert shared_products(jlora.lift(fn), dropped, normal(11, 6)) == 0


# ------------------------------------------------------- jax_debug_nans, as eager code

LOW = 1e3  # below all products here
WITH_NAN = {
    "log": lambda p, x: jnp.log(x @ p["w"] - LOW),
    "then-a-number": lambda p, x: jnp.where(True, 0.0, jnp.log(x @ p["w"] - LOW)),
    "jit": lambda p, x: jax.jit(lambda y: jnp.sqrt(y - LOW) + 1)(x @ p["w"]),
    "scan": lambda p, x: lax.scan(
        lambda y, _: (jnp.log(y @ p["w"] @ p["w"].T - LOW), None), x, length=2
    )[0],
    "cond": lambda p, x: lax.cond(
        x[0, 0] < LOW, lambda y: jnp.log(y - LOW), lambda y: y, x @ p["w"]
    ),
    "remat": lambda p, x: jax.checkpoint(lambda y: jnp.log(y @ p["w"] - LOW))(x),
    "variance-of-nothing": lambda p, x: jnp.var((x @ p["w"])[:0], 0),
    "chosen": lambda p, x: jnp.where(x[:, :1] < LOW, jnp.nan, x @ p["w"]),
    "times-nan": lambda p, x: (x @ p["w"]) * jnp.nan,
}
WITHOUT_NAN = {
    "variance": lambda p, x: jnp.std(x @ p["w"], 0) + jnp.median(x),
    "softmax": lambda p, x: jax.nn.softmax(x @ p["w"]) + jax.nn.logsumexp(x),
    "not-chosen": lambda p, x: jnp.where(x[:, :1] < LOW, x @ p["w"], jnp.nan),
}


def found(fn, *args):
    """What is said of the NaN that is made; nothing if none is."""
    try:
        with jax.debug_nans(True):
            jax.block_until_ready(fn(*args))
    except FloatingPointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [*WITH_NAN, *WITHOUT_NAN])
def test_a_nan_is_found_as_in_eager_code(name):
    fn = (WITH_NAN | WITHOUT_NAN)[name]
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x)
    lifted = jlora.lift(fn)

    def grad(fn):
        return jax.grad(lambda p: fn(p, x).sum())

    got = found(lifted, tree, x), found(grad(lifted), tree)
    want = found(fn, params, x), found(grad(fn), params)
    assert [*map(bool, got)] == [*map(bool, want)] == [name in WITH_NAN] * 2
    # Where it was made; of a constant JAX says that it was cast.
    assert name in ("chosen", "times-nan") or got[0] == want[0]
    jax.block_until_ready(lifted(tree, x))  # nobody looks


def test_an_infinity_is_found_as_in_eager_code():
    params, x = {"w": normal(5, 7)}, normal(11, 5, seed=1)
    tree, _ = adapt(dense, params, x)
    lifted = jlora.lift(lambda p, x: jax.jit(jnp.exp)(x @ p["w"] + LOW))
    with jax.debug_infs(True):
        with pytest.raises(FloatingPointError, match=r"\(inf\) encountered in exp"):
            lifted(tree, x)
        jlora.lift(lambda p, x: jax.nn.softmax(x @ p["w"]))(tree, x)
