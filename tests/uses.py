"""One use of a weight, with its layer's bias, of every kind: for tests of variants."""

import dataclasses

import jax
import jax.numpy as jnp
from helpers import integers, normal
from jax import lax

import jlora

X = normal(11, 5)
IDS = integers(11, below=13)
SIZES = jnp.array([4, 0, 7])


def params(shape, *bias, seed=0):
    return {"w": normal(*shape, seed=seed), "bias": normal(*bias, seed=1)}


def conv(dims, **options):
    options = {"window_strides": (1,) * (len(dims[0]) - 2), "padding": "SAME"} | options

    def fn(p, x):
        y = lax.conv_general_dilated(x, p["w"], dimension_numbers=dims, **options)
        return y + p["bias"]

    return fn


def ragged(p, x):
    experts = jnp.repeat(jnp.arange(3), SIZES, total_repeat_length=len(x))
    return lax.ragged_dot(x, p["w"], SIZES) + p["bias"][experts]


def layers(p, x):
    def layer(x, p):
        return jnp.tanh(x @ p["w"] + p["bias"]), None

    return lax.scan(jax.checkpoint(layer), x, p)[0]


def fused(p, x):
    w = jnp.concatenate([p["q"]["w"], p["v"]["w"]], axis=1)
    return x @ w + jnp.concatenate([p["q"]["bias"], p["v"]["bias"]])


def stacked(p, x):
    w = jnp.stack([p["q"]["w"], p["v"]["w"]])
    bias = jnp.stack([p["q"]["bias"], p["v"]["bias"]])
    return jnp.einsum("bi,lio->lbo", x, w) + bias[:, None]


def inputs_in_two(p, x):
    """Two weights, one above the other: their output biases are summed."""
    w = jnp.concatenate([p["q"]["w"][:3], p["v"]["w"]])
    return jnp.concatenate([x[:, :3], x], 1) @ w + p["q"]["bias"] + p["v"]["bias"]


def row(p, x):
    return lax.dynamic_index_in_dim(p["w"], x[0], keepdims=False) + p["bias"]


TWO = {"q": params((5, 7), 7), "v": params((5, 7), 7, seed=2)}
IMAGE = normal(2, 6, 6, 4)
NHWC = ("NHWC", "HWIO", "NHWC")

# A function, its params, what it is called with.
CASES = {
    "dense": (lambda p, x: x @ p["w"] + p["bias"], params((5, 7), 7), X),
    "weight first": (
        lambda p, x: p["w"].T @ x.T + p["bias"][:, None],
        params((5, 7), 7),
        X,
    ),
    "half precision": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"] + p["bias"],
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params((5, 7), 7)),
        X,
    ),
    "heads": (
        lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]) + p["bias"],
        params((5, 2, 7), 2, 7),
        X,
    ),
    "of heads": (
        lambda p, x: jnp.einsum("bhi,hio->bo", x, p["w"]) + p["bias"],
        params((2, 5, 7), 7),
        normal(11, 2, 5),
    ),
    "experts, all": (
        lambda p, x: jnp.einsum("bei,eio->beo", x, p["w"]) + p["bias"],
        params((2, 5, 7), 2, 7),
        normal(11, 2, 5),
    ),
    "experts, ragged": (ragged, params((3, 5, 7), 3, 7), X),
    "experts, each token's": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][IDS % 3]) + p["bias"][IDS % 3],
        params((3, 5, 7), 3, 7),
        X,
    ),
    "layers": (layers, params((3, 5, 5), 3, 5), X),
    "lookup": (lambda p, x: p["w"][x] + p["bias"], params((13, 7), 7), IDS),
    "lookup of columns": (
        lambda p, x: jnp.take(p["w"], x, 1).T + p["bias"],
        params((7, 13), 7),
        IDS,
    ),
    "lookup of a row": (row, params((13, 7), 7), IDS),
    "lookup and head": (
        lambda p, x: jnp.tanh(p["w"][x] + p["bias"]) @ p["w"].T,
        params((13, 7), 7),
        IDS,
    ),
    "conv 1-D": (conv(("NWC", "WIO", "NWC")), params((3, 4, 6), 6), normal(2, 9, 4)),
    "conv 2-D": (conv(NHWC, padding="VALID"), params((3, 3, 4, 6), 6), IMAGE),
    "conv in groups": (
        conv(NHWC, feature_group_count=2, rhs_dilation=(1, 2)),
        params((3, 3, 2, 6), 6),
        IMAGE,
    ),
    "conv, depthwise": (
        conv(NHWC, feature_group_count=4),
        params((3, 3, 1, 8), 8),
        IMAGE,
    ),
    "conv, channels first": (
        lambda p, x: lax.conv(x, p["w"], (1, 1), "SAME") + p["bias"][:, None, None],
        params((7, 4, 3, 3), 7),
        IMAGE.transpose(0, 3, 1, 2),
    ),
    "fused": (fused, TWO, X),
    "stacked": (stacked, TWO, X),
    "split": (
        lambda p, x: [
            x @ w + b
            for w, b in zip(
                jnp.split(p["w"], 2, 1), jnp.split(p["bias"], 2), strict=True
            )
        ],
        params((5, 14), 14),
        X,
    ),
    "reshaped": (
        lambda p, x: x @ p["w"].reshape(5, 14) + p["bias"].reshape(14),
        params((5, 2, 7), 2, 7),
        X,
    ),
    "times a number": (
        lambda p, x: x @ (p["w"] * 0.5) + p["bias"],
        params((5, 7), 7),
        X,
    ),
    "flipped": (
        lambda p, x: x @ p["w"][::-1, ::-1] + p["bias"][::-1],
        params((5, 7), 7),
        X,
    ),
    "branches": (
        lambda p, x: (
            lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: -x @ p["w"]) + p["bias"]
        ),
        params((5, 7), 7),
        X,
    ),
}


def experts(tree, plan):
    """With a bias that is a bias: a lookup of each token's is planned as a table."""
    specs = {"w": dataclasses.replace(plan["w"], bias="bias")}
    w = dataclasses.replace(tree["w"], bias_path="bias")
    bias = tree["bias"].w if jlora.is_adapted(tree["bias"]) else tree["bias"]
    return {"w": w, "bias": bias}, dataclasses.replace(plan, specs=specs)
