"""A quantised base: made, used in every way, never kept.

The oracle is the dequantised weight, by qwix's own `dequantize`, merged by hand.
"""

import dataclasses
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix
from helpers import (
    adapted,
    by_hand,
    close,
    cotangents,
    dot_with,
    integers,
    normal,
    quiet,
    randomise,
    same,
    wrap_random,
)
from jax import lax
from test_base import CASES

import jlora
import jlora.checkpoint
from jlora._leaf.quantized import NF4, dequantized

QTYPES = ["int8", "int4", "nf4", "float8_e4m3fn"]
OTHERS = ["int2", "int5", "float8_e5m2", "float4_e2m1fn", jnp.int8, jnp.float8_e3m4]


def is_q(x):
    return isinstance(x, qwix.QArray)


def floats(tree):
    """The tree on the arrays that its quantised ones stand for."""

    def one(x):
        if jlora.is_adapted(x):
            return dataclasses.replace(x, w=floats(x.w))
        return qwix.dequantize(x) if is_q(x) else x

    return jax.tree.map(one, tree, is_leaf=lambda x: jlora.is_adapted(x) or is_q(x))


def blocked(fn, params, *args, qtype="int8", block=None, **options):
    """The params with every weight quantised."""
    plan = jlora.plan(fn, params, *args, rank=2, targets="**")
    return jlora.quantize(params, qtype, plan=plan, block=block, **options)


# ------------------------------------------------------------------ every use


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    """With adapters, under jit, op by op and vmap, against the float weight."""
    fn, params, x = CASES[name]
    coded = blocked(fn, params, x, qtype="nf4" if len(name) % 2 else "int8")
    plan = jlora.plan(fn, coded, x, rank=2, targets="**")
    tree = wrap_random(coded, plan)
    assert any(is_q(leaf.w) for leaf in adapted(tree).values())
    assert {e.status for e in jlora.explain(fn, tree, x)} == {"factored"}
    trains, frozen = jlora.partition(tree)
    weights = cotangents(jax.eval_shape(fn, floats(coded), x))

    def theirs(trains, x):
        return fn(by_hand(floats(jlora.combine(trains, frozen)), plan), x)

    def ours(trains, x):
        return jlora.lift(fn)(jlora.combine(trains, frozen), x)

    def all_ways(call, trains, x):
        def loss(trains):
            out = call(trains, x)
            return dot_with(weights, out), out

        found = {"grad": jax.grad(loss, has_aux=True)(trains)}
        if name != "experts":  # JAX has no vmap of a ragged product
            two = jnp.stack([x, x[::-1]])
            found["vmap"] = jax.vmap(lambda x: call(trains, x))(two)
        return found

    got, want = quiet(
        jax.jit(lambda t, x: (all_ways(ours, t, x), all_ways(theirs, t, x))), trains, x
    )
    tol = 2e-2 if name == "half precision" else 1e-5
    for way in want:
        close(got[way], want[way], tol, way)
    close(quiet(ours, trains, x), want["grad"][1], tol, "op by op")


@pytest.mark.parametrize("name", CASES)
def test_without_an_adapter(name):
    """A quantised weight is read by the lift wherever a float one would be."""
    fn, params, x = CASES[name]
    coded = blocked(fn, params, x, qtype="nf4")
    want = fn(floats(coded), x)
    tol = 2e-2 if name == "half precision" else 1e-5
    close(jax.jit(jlora.lift(fn))(coded, x), want, tol)
    close(jlora.lift(fn)(coded, x), want, tol)
    if x.dtype == jnp.float32:
        weights = cotangents(want)
        got, want = (
            jax.grad(lambda x, p=p, f=f: dot_with(weights, f(p, x)))(x)
            for f, p in ((jlora.lift(fn), coded), (fn, floats(coded)))
        )
        close(got, want, tol)


@pytest.mark.parametrize("name", ["tied head", "concatenate", "scan", "shared"])
def test_half_of_the_weights_adapted(name):
    """Adapted and bare quantised weights meet in one function."""
    fn, params, x = CASES[name]
    coded = blocked(fn, params, x, qtype="int8")
    first = next(iter(jlora.plan(fn, coded, x, targets="**")))
    plan = jlora.plan(fn, coded, x, rank=2, targets=first)
    tree = wrap_random(coded, plan)
    assert sum(map(is_q, jax.tree.leaves(tree, is_leaf=is_q))) >= 1
    close(jlora.lift(fn)(tree, x), fn(by_hand(floats(tree), plan), x))


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("scanned", [False, True])
def test_a_bfloat16_weight_in_use_is_the_one_that_is_merged(qtype, scanned):
    """To the bit, where wider activations would let XLA leave its rounding out."""

    def fn(p, x):
        if scanned:
            return lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
        return x @ p["w"][0] @ p["w"][1]

    params, x = {"w": normal(2, 64, 64).astype("bfloat16") / 8}, normal(5, 64)
    coded = jlora.quantize(params, qtype, plan=jlora.plan(fn, params, x))
    same(jax.jit(jlora.lift(fn))(coded, x), jax.jit(fn)(jlora.merge(coded), x))


def test_int4_is_not_converted_at_once():
    """A bare conversion is one that XLA for GPU may get wrong; see `_dequantized`."""
    coded = jlora.quantize({"w": normal(8, 8)}, "int4", targets="w", block=4)
    fn = jax.jit(jlora.lift(lambda p, x: x @ p["w"]))
    text = jax.export.export(fn, platforms=["cuda"])(coded, normal(5, 8)).mlir_module()
    assert "tensor<8x8xi4>) -> tensor<8x8xi8>" in text
    assert "tensor<8x8xi4>) -> tensor<8x8xf32>" not in text


@pytest.mark.parametrize("adapted", [False, True])
def test_a_scan_in_a_scan(adapted):
    def layers(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], None

    def fn(p, x):
        return lax.scan(lambda x, w: layers(x, w), x, p["w"])[0]

    params, x = {"w": normal(3, 2, 8, 8, scale=0.4)}, normal(5, 8)
    plan = jlora.plan(fn, params, x, rank=2, targets="**")
    tree = jlora.quantize(params, "int4", plan=plan, block=4)
    tree = wrap_random(tree, plan) if adapted else tree
    dense = jlora.merge(tree)

    def loss(call, p):
        return lambda x: jnp.sum(call(p, x) ** 2)

    close(jax.jit(jlora.lift(fn))(tree, x), fn(dense, x))
    got = jax.jit(jax.grad(loss(jlora.lift(fn), tree)))(x)
    close(got, jax.grad(loss(fn, dense))(x), 1e-4)


BLOCKS = {
    "dense": (lambda p, x: x @ p["w"], {"w": normal(8, 6)}, normal(3, 8), (2, 6)),
    "heads": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]),
        {"w": normal(8, 2, 3)},
        normal(3, 8),
        (2, 2, 3),
    ),
    "several in axes": (
        lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"]),
        {"w": normal(4, 2, 3)},
        normal(5, 4, 2),
        (2, 1, 3),
    ),
    "stack": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
        {"w": normal(3, 8, 8)},
        normal(5, 8),
        (3, 2, 8),
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        {"w": normal(3, 3, 8, 5)},
        normal(2, 6, 6, 8),
        (3, 3, 2, 5),
    ),
    "embedding": (
        lambda p, ids: jnp.take(p["w"], ids, axis=0),
        {"w": normal(7, 8)},
        integers(4, below=7),
        (7, 2),
    ),
    "torch's order": (
        lambda p, x: x @ p["w"].T,
        {"w": normal(6, 8)},
        normal(3, 8),
        (6, 2),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]),
        {"w": normal(3, 8, 5)},
        normal(3, 4, 8),
        (3, 2, 5),
    ),
}


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_along_the_in_axes(name, qtype):
    """The scales, and the numbers by the definition, in numpy."""
    fn, params, x, scales = BLOCKS[name]
    coded = blocked(fn, params, x, qtype=qtype, block=4)["w"]
    assert is_q(coded) and coded.scale.shape == scales
    assert (coded.shape, coded.dtype) == (params["w"].shape, jnp.float32)
    w = np.asarray(params["w"], np.float64)
    cut = [(m, n // m) for n, m in zip(w.shape, scales, strict=True)]
    parts = w.reshape([n for pair in cut for n in pair])
    largest = abs(parts).max(tuple(range(1, 2 * w.ndim, 2)), keepdims=True)
    got = np.asarray(qwix.dequantize(coded), np.float64).reshape(parts.shape)
    error = abs(got - parts)  # a number that lies between two may fall either way
    if qtype == "nf4":
        values = np.array(NF4) * largest[..., None]
        assert (error <= abs(parts[..., None] - values).min(-1) + 1e-6 * largest).all()
        assert (abs(got[..., None] - values).min(-1) <= 1e-6 * largest).all()
    elif qtype.startswith("int"):
        step = largest / (2 ** (int(qtype[3:]) - 1) - 0.5)
        assert (error <= 0.5 * step + 4 * 2**-24 * largest).all()  # float32 of each
        assert (abs(got / step - np.round(got / step)) <= 1e-4).all()
    else:  # three bits of mantissa; below 2^-6 of the scale its numbers are even
        step = largest / 448
        assert (error <= np.maximum(abs(parts) * 2**-4, step * 2**-10)).all()
        codes = jnp.asarray(got / step, jnp.float32)
        same(codes.astype(jnp.float8_e4m3fn), coded.qvalue.reshape(codes.shape))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_use(name):
    fn, params, x, _ = BLOCKS[name]
    coded = blocked(fn, params, x, qtype="nf4", block=4)
    plan = jlora.plan(fn, coded, x, rank=2, targets="**")
    tree = wrap_random(coded, plan)
    want = fn(by_hand(floats(tree), plan), x)
    close(jlora.lift(fn)(tree, x), want)
    close(jax.jit(jlora.lift(fn))(tree, x), want)
    close(jax.jit(jlora.lift(fn))(coded, x), fn(floats(coded), x))


@pytest.mark.parametrize("qtype", [*QTYPES, *OTHERS])
def test_dequantised_as_qwix_does(qtype):
    w = normal(64, 6)
    coded = jlora.quantize({"kernel": w}, qtype, block=16)["kernel"]
    same(dequantized(coded), qwix.dequantize(coded))
    same(jax.jit(dequantized)(coded), qwix.dequantize(coded))
    half = jlora.quantize({"kernel": w.astype(jnp.bfloat16)}, qtype, block=16)["kernel"]
    assert half.dtype == half.scale.dtype == jnp.bfloat16


@pytest.mark.parametrize("qtype, block", [("mxfp8", 32), ("mxfp4", 32), ("nvfp4", 16)])
def test_formats_with_blocks_of_their_own(qtype, block):
    coded = jlora.quantize({"kernel": normal(64, 6)}, qtype, block=block)["kernel"]
    same(dequantized(coded), qwix.dequantize(coded))
    alone = jlora.quantize({"kernel": normal(block, 6)}, qtype, block=block)["kernel"]
    assert alone.scale.shape == (1, 6)
    with pytest.raises(ValueError, match=f"{qtype} has blocks of {block}, found block"):
        jlora.quantize({"kernel": normal(64, 6)}, qtype)


# ------------------------------------------------- forward mode, second derivatives


def test_derivatives_of_every_kind():
    """jvp, hessian, vmap of grad, and a remat policy."""
    fn, params, x, _ = BLOCKS["dense"]
    coded = blocked(fn, params, x, qtype="nf4", block=4)
    plan = jlora.plan(fn, coded, x, rank=2)
    trains, frozen = jlora.partition(wrap_random(coded, plan))

    def loss(lifted, trains, x):
        tree = jlora.combine(trains, frozen)
        if lifted:
            return jnp.tanh(jlora.lift(fn)(tree, x)).sum()
        return jnp.tanh(fn(by_hand(floats(tree), plan), x)).sum()

    def ways(lifted):
        def one(trains):
            return loss(lifted, trains, x)

        saved = jax.checkpoint(one, policy=jax.checkpoint_policies.dots_saveable)
        return {
            "jvp": jax.jvp(one, (trains,), (trains,)),
            "hessian": jax.hessian(one)(trains),
            "policy": jax.grad(saved)(trains),
            "vmap": jax.vmap(jax.grad(lambda x: loss(lifted, trains, x)))(
                jnp.stack([x, 2 * x])
            ),
            "of x": jax.jacfwd(jax.grad(lambda x: loss(lifted, trains, x)))(x),
        }

    got, want = jax.jit(lambda: (ways(True), ways(False)))()
    for way in want:
        close(got[way], want[way], 2e-5, way)


def test_gradients_of_scales_are_never_computed():
    fn, params, x, _ = BLOCKS["dense"]
    coded = blocked(fn, params, x, qtype="int8", block=4)
    tree = wrap_random(coded, jlora.plan(fn, coded, x, rank=2))

    def loss(scale):
        w = dataclasses.replace(tree["w"].w, scale=scale)
        leaf = dataclasses.replace(tree["w"], w=w)
        return jlora.lift(fn)({"w": leaf}, x).sum()

    assert not jax.grad(loss)(tree["w"].w.scale).any()

    def bare(scale):
        return jlora.lift(fn)({"w": dataclasses.replace(coded["w"], scale=scale)}, x)

    assert not jax.grad(lambda s: bare(s).sum())(coded["w"].scale).any()


# ------------------------------------------------------------------ qwix's own arrays


def test_arrays_that_qwix_made_are_taken_as_they_are():
    """Asymmetric, one scale for a whole stack, and blocks along any axis."""
    w = normal(3, 8, 8) + 0.3
    made = {
        "asymmetric": qwix.quantize(
            w, jnp.int8, channelwise_axes=(0, 2), calibration_method="minmax"
        ),
        "one scale": qwix.quantize(w, jnp.int8),
        "blocks of outputs": qwix.quantize(w, "nf4", tiled_axes={1: 4, 2: 4}),
        "half": qwix.quantize(w.astype(jnp.bfloat16), "nf4", channelwise_axes=(0,)),
    }

    def scanned(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for k in range(3):
            x = jnp.tanh(x @ p["w"][k].T)
        return x

    def taken(p, x):
        ids = integers(5, below=3)
        return jnp.einsum("bi,bio->bo", x, p["w"][ids]) + p["w"][:, 1:5, 2][ids, :1]

    x = normal(5, 8)

    def both(fn, tree, exact, tol, name):
        close(*jax.jit(lambda t: (jlora.lift(fn)(t, x), exact(t)))(tree), tol, name)

    for name, q in made.items():
        tol = 3e-2 if name == "half" else 1e-5  # three layers, each rounded to 2^-8
        for fn in (scanned, unrolled, taken):
            both(fn, {"w": q}, lambda p, fn=fn: fn(floats(p), x), tol, name)
        for fn in (scanned, unrolled):
            plan = jlora.plan(fn, {"w": q}, x, rank=2)
            tree = wrap_random({"w": q}, plan)
            assert tree["w"].w is q

            def exact(t, fn=fn, plan=plan):
                return fn(by_hand(floats(t), plan), x)

            both(fn, tree, exact, tol, name)


def test_lookups_out_of_bounds():
    """As in the float table, whatever the mode and wherever the blocks are."""
    table, ids = normal(12, 8), jnp.array([0, 11, -1, 12, 40, -13])
    made = [
        qwix.quantize(table, "nf4", channelwise_axes=(0,), tiled_axes={1: 4}),
        qwix.quantize(table, jnp.int8, channelwise_axes=(1,), tiled_axes={0: 4}),
        qwix.quantize(table, jnp.float8_e4m3fn),
    ]
    for mode, fill in (
        ("fill", None),
        ("fill", 0),
        ("fill", 5),
        ("clip", None),
        ("promise_in_bounds", None),
    ):
        at = ids % 12 if mode == "promise_in_bounds" else ids

        def fn(p, ids, **how):
            return p["w"].at[ids].get(**how), p["w"].at[:, ids % 8].get(**how)

        fn = functools.partial(fn, mode=mode, fill_value=fill)

        def both(q, at, fn=fn):
            return jlora.lift(fn)({"w": q}, at), fn({"w": qwix.dequantize(q)}, at)

        for q in made:
            for got, want in zip(*jax.jit(both)(q, at), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-6)


# ------------------------------------------------------------------------- trees


def test_a_lookup_dequantises_its_rows_alone():
    """Whatever is indexed: words of a table, and experts of a stack."""
    table = qwix.quantize(normal(13, 8), "nf4", channelwise_axes=(0,))
    stack = qwix.quantize(normal(13, 8, 4), jnp.int8, channelwise_axes=(0, 2))
    uses = {
        "take": (lambda p, ids: jnp.take(p["w"], ids, axis=0), table),
        "index": (lambda p, ids: p["w"][ids], table),
        "one": (lambda p, ids: p["w"][ids[0]], table),
        "slice": (lambda p, ids: p["w"][2:5], table),
        "experts": (lambda p, ids: jnp.einsum("bio->bo", p["w"][ids]), stack),
        "layer": (lambda p, ids: p["w"][3] * 2.0, stack),
    }
    for name, (fn, q) in uses.items():
        text = str(jax.make_jaxpr(jlora.lift(fn))({"w": q}, jnp.arange(3)))
        assert not re.search(r":f32\[13,8(,4)?\]", text), name
        tree = (
            wrap_random(
                {"w": q}, jlora.plan(fn, {"w": q}, jnp.arange(3), targets="w", rank=2)
            )
            if name in ("take", "index")
            else {"w": q}
        )
        text = str(jax.make_jaxpr(jlora.lift(fn))(tree, jnp.arange(3)))
        assert not re.search(r":f32\[13,8(,4)?\]", text), name


def model(p, ids):
    h = jnp.take(p["embed"]["embedding"], ids, axis=0)
    h = jnp.tanh(h @ p["up"]["kernel"] + p["up"]["bias"])
    return h @ p["embed"]["embedding"].T


PARAMS = {
    "embed": {"embedding": normal(12, 64)},
    "up": {"kernel": normal(64, 64), "bias": normal(64)},
}
IDS = integers(5, below=12)


def test_what_is_quantised():
    plan = jlora.plan(model, PARAMS, IDS, rank=2)
    assert [*plan] == ["up/kernel"]
    coded = jlora.quantize(PARAMS, "nf4", plan=plan)
    assert is_q(coded["up"]["kernel"])
    assert coded["up"]["bias"] is PARAMS["up"]["bias"]
    assert coded["embed"]["embedding"] is PARAMS["embed"]["embedding"]
    told = jlora.quantize(PARAMS, "nf4")
    same(told["up"]["kernel"], coded["up"]["kernel"])
    both = jlora.quantize(PARAMS, jnp.int8, targets=["**/kernel", "**/embedding"])
    assert both["embed"]["embedding"].scale.shape == (12, 1)
    assert both["up"]["kernel"].qtype == "int8"
    close(
        jlora.lift(model)(both, IDS),
        model(floats(both), IDS),
    )
    tree = wrap_random(PARAMS, plan)
    own = jlora.quantize(tree, "nf4")
    same(own["up"]["kernel"].w, coded["up"]["kernel"])
    assert own["up"]["kernel"].a is tree["up"]["kernel"].a
    same(own, jlora.attach(coded, jlora.adapter(tree)))


def test_tables_say_what_is_quantised():
    coded = jlora.quantize(PARAMS, "nf4")
    tree = jlora.wrap(coded, rank=2)
    assert "io, nf4 in blocks of 64" in str(jlora.summary(tree))
    assert jlora.count(tree) == jlora.count(jlora.wrap(PARAMS, rank=2))
    assert repr(coded["up"]["kernel"]) == "QArray(float32[64,64], nf4 in blocks of 64)"
    assert "QArray(int4[64,64], float32[1,64])" in repr(tree["up"]["kernel"])
    found = jlora.rounding(PARAMS, coded)
    w = np.asarray(PARAMS["up"]["kernel"], np.float64)
    error = np.asarray(floats(coded)["up"]["kernel"], np.float64) - w
    want = np.linalg.norm(error) / np.linalg.norm(w)
    assert found["up/kernel"] == pytest.approx(want, rel=1e-5)
    assert f"up/kernel  {100 * want:.3g} %" in str(found)
    with pytest.raises(ValueError, match="'up/kernel' is quantised in after, and befo"):
        jlora.rounding({"up": {"bias": normal(64)}}, coded)


def test_shapes_alone_and_under_jit():
    abstract = jax.eval_shape(lambda: PARAMS)
    plan = jlora.plan(model, abstract, jax.eval_shape(lambda: IDS), rank=2)
    shapes = jlora.quantize(abstract, "nf4", plan=plan)
    whole = jlora.quantize(PARAMS, "nf4", plan=plan)
    assert jax.tree.structure(shapes) == jax.tree.structure(whole)
    for x, y in zip(jax.tree.leaves(shapes), jax.tree.leaves(whole), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    inside = jax.jit(lambda p: jlora.quantize(p, "nf4", plan=plan))(PARAMS)
    close(inside["up"]["kernel"].scale, whole["up"]["kernel"].scale)
    tree = jlora.wrap(shapes, plan=plan)
    assert jax.eval_shape(jlora.lift(model), tree, IDS).shape == (5, 12)


def test_calls_that_cannot_be_meant():
    params = {"kernel": normal(64, 8)}
    with pytest.raises(TypeError, match="donate 'no': expected True or False"):
        jlora.quantize(params, "int8", donate="no")
    with pytest.raises(ValueError, match="targets is empty: expected patterns"):
        jlora.quantize(params, "int8", targets=[])
    given = jax.tree.map(jnp.array, params)
    coded = jlora.quantize(given, "int8", donate=True)
    with pytest.raises(ValueError, match="'kernel' was freed, as donate=True does"):
        jlora.quantize(given, "int8")
    with pytest.raises(ValueError, match="rounding: after has no quantised weight"):
        jlora.rounding(coded, params)


def test_donated_leaf_by_leaf():
    given = jax.tree.map(jnp.array, PARAMS)
    kernel, bias = given["up"]["kernel"], given["up"]["bias"]
    coded = jlora.quantize(given, "int8", donate=True)
    assert kernel.is_deleted() and not bias.is_deleted()
    same(coded["up"]["kernel"], jlora.quantize(PARAMS, "int8")["up"]["kernel"])


def test_large_arrays_are_quantised_in_parts(monkeypatch):
    from jlora import _qwix

    w = {"kernel": normal(3, 128, 6)}
    plan = jlora.plan(BLOCKS["experts"][0], {"w": w["kernel"]}, normal(3, 4, 128))
    whole = jlora.quantize({"w": w["kernel"]}, "nf4", plan=plan)["w"]
    flat = jlora.quantize({"kernel": w["kernel"][0]}, "nf4")["kernel"]
    monkeypatch.setattr(_qwix, "_LARGE", 100)
    assert _qwix._parts((3, 128, 6), (1, 64, 1)) == 3
    assert _qwix._parts((128, 6), (64, 1)) == 2
    same(jlora.quantize({"w": w["kernel"]}, "nf4", plan=plan)["w"], whole)
    same(jlora.quantize({"kernel": w["kernel"][0]}, "nf4")["kernel"], flat)


def test_it_survives_what_trees_go_through():
    coded = jlora.quantize(PARAMS, "nf4")
    tree = randomise(jlora.wrap(coded, rank=2))
    same(pickle.loads(pickle.dumps(coded)), coded)
    same(jax.tree.map(lambda x: x, tree), tree)
    same(jlora.combine(*jlora.partition(tree)), tree)
    assert jlora.unwrap(tree)["up"]["kernel"] is coded["up"]["kernel"]
    names = jlora.labels(tree)["up"]["kernel"]
    assert (names.w.qvalue, names.w.scale, names.a) == ("frozen", "frozen", "lora")
    same(
        jlora.attach(coded, jlora.adapter(tree)),
        tree,
    )


# ------------------------------------------------- codes that the function dequantises


def int8(w, axis=0):
    """Codes and scales, one for each output."""
    scale = abs(w).max(axis, keepdims=True) / 127
    return jnp.round(w / scale).astype(jnp.int8), scale


def coded_scan(p, x):
    def body(x, layer):
        w, scale = layer
        return jnp.tanh(x @ (w.astype(x.dtype) * scale)), None

    return lax.scan(body, x, (p["w"], p["scale"]))[0]


def in_blocks(p, x):
    w = p["w"].astype(jnp.float32).reshape(2, 4, 6) * p["scale"]
    return x @ w.reshape(8, 6)


# The function, its codes and scales, x, and the weight that it makes of them.
CODES = {
    "int8": (
        lambda p, x: x @ (p["w"].astype(jnp.float32) * p["scale"]),
        int8(normal(8, 6)),
        normal(3, 8),
        lambda w, s: w * s,
    ),
    "scale first": (
        lambda p, x: jnp.einsum(
            "bi,io->bo", x, p["scale"] * p["w"].astype(jnp.float32)
        ),
        int8(normal(8, 6)),
        normal(3, 8),
        lambda w, s: w * s,
    ),
    "transposed": (
        lambda p, x: x @ (p["w"].astype(jnp.float32) * p["scale"]).T,
        int8(normal(6, 8), 1),
        normal(3, 8),
        lambda w, s: w * s,
    ),
    "zero point": (
        lambda p, x: x @ ((p["w"].astype(jnp.float32) - 3) / p["scale"]),
        int8(normal(8, 6)),
        normal(3, 8),
        lambda w, s: (w - 3) / s,
    ),
    "zero point first": (
        lambda p, x: x @ ((7 - p["w"].astype(jnp.float32)) * p["scale"]),
        int8(normal(8, 6)),
        normal(3, 8),
        lambda w, s: (7 - w) * s,
    ),
    "in integers": (
        lambda p, x: x @ ((p["w"] - jnp.int8(1)).astype(jnp.float32) * p["scale"]),
        int8(normal(8, 6) / 2),
        normal(3, 8),
        lambda w, s: (w - 1) * s,
    ),
    "blocks": (
        in_blocks,
        (int8(normal(8, 6))[0], abs(normal(2, 1, 6))),
        normal(3, 8),
        lambda w, s: (w.reshape(2, 4, 6) * s).reshape(8, 6),
    ),
    "scan": (
        coded_scan,
        int8(normal(3, 8, 8), 1),
        normal(5, 8),
        lambda w, s: w * s,
    ),
    "float8": (
        lambda p, x: x @ (p["w"].astype(jnp.float32) * p["scale"]),
        (normal(8, 6).astype(jnp.float8_e4m3fn), abs(normal(6))),
        normal(3, 8),
        lambda w, s: w * s,
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x,
            p["w"].astype(x.dtype) * p["scale"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        int8(normal(3, 3, 4, 5), (0, 1, 2)),
        normal(2, 6, 6, 4),
        lambda w, s: w * s,
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_the_delta_is_one_of_the_weight_that_the_function_makes(name):
    fn, (codes, scale), x, made = CODES[name]
    params = {"w": codes, "scale": scale}
    plan = jlora.plan(fn, params, x, rank=2)
    assert list(plan) == ["w"]
    tree = wrap_random(params, plan)
    assert tree["w"].w is codes
    assert {e.status for e in jlora.explain(fn, tree, x)} == {"factored"}
    w = made(codes.astype(jnp.float32), scale)
    ones = jnp.ones((3, 1, 1) if name == "scan" else ())

    def exact(leaf):
        """The function of the float weight, for which the scale is one."""
        (merged,) = by_hand({"w": dataclasses.replace(leaf, w=w)}, plan).values()
        if name in ("zero point", "zero point first", "in integers", "blocks"):
            return x @ merged
        if name == "transposed":
            return x @ merged.T
        return fn({"w": merged, "scale": ones}, x)

    trains, frozen = jlora.partition(tree)

    def ours(trains):
        return jlora.lift(fn)(jlora.combine(trains, frozen), x)

    def theirs(trains):
        return exact(jlora.combine(trains, frozen)["w"])

    weights = cotangents(theirs(trains))
    close(ours(trains), theirs(trains), 1e-5)
    got, want = (
        jax.jit(jax.grad(lambda t, f=f: dot_with(weights, f(t))))(trains)
        for f in (ours, theirs)
    )
    close(got, want, 2e-5)
    with pytest.raises(ValueError, match=r"merge: 'w' is .*floats=\{'w': w\}"):
        jlora.merge(tree)
    merged = jlora.merge(tree, floats={"w": w})
    close(merged["w"], by_hand({"w": dataclasses.replace(tree["w"], w=w)}, plan)["w"])
    assert merged["scale"] is scale


def test_codes_in_the_wrong_place():
    fn, (codes, scale), x, _ = CODES["int8"]
    params = {"w": codes, "scale": scale}
    plan = jlora.plan(fn, params, x, rank=2)
    tree = wrap_random(params, plan)
    with pytest.raises(ValueError, match="'w' is used by 'max'.*array of codes"):
        jlora.lift(lambda p, x: fn({**p, "w": jnp.maximum(p["w"], 0)}, x))(tree, x)
    with pytest.raises(ValueError, match="floats has 'scale', which is no adapted"):
        jlora.merge(tree, floats={"w": normal(8, 6), "scale": scale})
    with pytest.raises(ValueError, match="of shape .8, 5. at 'w': expected a float"):
        jlora.merge(tree, floats={"w": normal(8, 5)})
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="'w' is int8: expected floats for "):
            jlora.wrap(params, plan=plan, init=init)
    with pytest.raises(ValueError, match="'w' is int8, which.*dora=True"):
        jlora.wrap(params, plan=plan, dora=True)
    with pytest.raises(
        ValueError, match="'w' is int8: expected a float|int8: expected"
    ):
        jlora.quantize(params, "nf4", plan=plan)


# ------------------------------------------------------------ variants, merge, starts


def test_merged_to_floats_or_quantised_again(caplog):
    coded = jlora.quantize(PARAMS, "int8")
    plan = jlora.plan(model, coded, IDS, rank=2)
    tree = wrap_random(coded, plan)
    merged = jlora.merge(tree)
    close(merged, by_hand(floats(tree), plan))
    assert not caplog.records
    again = jlora.merge(tree, requantize=True)
    kernel = again["up"]["kernel"]
    assert is_q(kernel) and kernel.qtype == "int8"
    same(kernel, jlora.quantize(merged, "int8")["up"]["kernel"])
    assert jax.tree.structure(again) == jax.tree.structure(coded)
    (record,) = caplog.records
    wide = np.asarray(merged["up"]["kernel"], np.float64)
    error = np.linalg.norm(np.asarray(qwix.dequantize(kernel), np.float64) - wide)
    moved = wide - np.asarray(qwix.dequantize(coded["up"]["kernel"]), np.float64)
    said = f"{100 * error / np.linalg.norm(wide):.3g} %"
    assert said in record.message and "up/kernel" in record.message
    assert f"{100 * error / np.linalg.norm(moved):.3g} %" in record.message
    inside = jax.jit(lambda t: jlora.merge(t, requantize=True))(tree)
    close(inside["up"]["kernel"].scale, kernel.scale)


@pytest.mark.parametrize("qtype", ["nf4", "int8"])
def test_dora_on_a_quantised_base(qtype):
    """The norm is one of the dequantised weight."""
    coded = jlora.quantize(PARAMS, qtype)
    plan = jlora.plan(model, coded, IDS, rank=2)
    tree = jlora.wrap(coded, plan=plan, dora=True)
    close(
        tree["up"]["kernel"].m,
        jnp.linalg.norm(qwix.dequantize(coded["up"]["kernel"]), axis=0),
    )
    tree = wrap_random(coded, plan, dora=True)
    got = jax.jit(jlora.lift(model))(tree, IDS)
    close(got, model(by_hand(floats(tree), plan), IDS))
    close(got, model(jlora.merge(tree), IDS))


@pytest.mark.parametrize(
    "options",
    [{"bias": "all"}, {"lora_bias": True}, {"train": "**/kernel", "targets": []}],
)
def test_other_options_on_a_quantised_base(options):
    coded = jlora.quantize(PARAMS, "nf4")
    tree = randomise(jlora.wrap(coded, rank=2, **options))
    merged = jlora.merge(tree)
    close(jlora.lift(model)(tree, IDS), model(merged, IDS), 2e-5)
    noisy = jlora.dropout(tree, 0.5, jax.random.key(0))
    assert jnp.isfinite(jlora.lift(model)(noisy, IDS)).all()
    close(
        jlora.lift(model)(jlora.scaled(tree, 0.0), IDS),
        model(jlora.merge(jlora.scaled(tree, 0.0)), IDS),
        2e-5,
    )


def test_rows_of_a_quantised_table_train():
    both = jlora.quantize(PARAMS, "int8", targets=["**/kernel", "**/embedding"])
    tree = jlora.wrap(both, rank=2, train_rows={"embed/embedding": [1, 4]})
    same(tree["embed"]["embedding"].b[0], floats(both)["embed"]["embedding"][1])
    tree = randomise(tree)
    close(jlora.lift(model)(tree, IDS), model(jlora.merge(tree), IDS), 2e-5)


@pytest.mark.parametrize("name", ["dense", "several in axes", "stack", "embedding"])
def test_loftq_takes_the_error_of_quantising(name):
    """Algorithm 1 of the paper, in numpy on each matrix; and closer than without.

    In nf4, which has a block's largest number itself: integers have it between two.
    """
    fn, params, x, _ = BLOCKS[name]
    plan = jlora.plan(fn, params, x, rank=2, targets="**")
    w, roles = params["w"], plan["w"].axes
    order = sorted(range(w.ndim), key=lambda k: ("bio".index(roles[k]), k))
    sizes = [int(np.prod([w.shape[k] for k in order if roles[k] == r])) for r in "bio"]

    def turn(rest):
        """The quantised rest, and the best matrices of rank 2 for what it lacks."""
        q = jlora.quantize({"w": rest}, "nf4", plan=plan, block=4)["w"]
        error = np.asarray(w - qwix.dequantize(q), np.float64)
        u, s, vt = np.linalg.svd(error.transpose(order).reshape(sizes))
        best = (u[:, :, :2] * s[:, None, :2]) @ vt[:, :2]
        best = best.reshape([w.shape[k] for k in order]).transpose(np.argsort(order))
        return qwix.dequantize(q), jnp.asarray(best, jnp.float32)

    def off(v):
        return float(jnp.linalg.norm((v - w).ravel()))

    def merged(steps):
        init = jlora.initializers.loftq("nf4", steps, block=4)
        tree = jlora.wrap(params, plan=plan, init=init)
        assert is_q(tree["w"].w) and str(tree["w"].moved) == "loftq"
        close(jlora.lift(fn)(tree, x), fn(jlora.merge(tree), x), 2e-5)
        return jlora.merge(tree)["w"]

    q, best = turn(w)
    close(merged(1), q + best, 1e-4)
    assert off(merged(1)) < 0.9 * off(q)
    for _ in range(2):
        q, best = turn(w - best)
    close(merged(3), q + best, 1e-4)


@pytest.mark.parametrize("name", ["dense", "several in axes", "stack", "torch's order"])
def test_loftq_with_moments_changes_the_outputs_least(name):
    """The closed form, by the square root of the moments in numpy."""
    fn, params, x, _ = BLOCKS[name]
    plan = jlora.plan(fn, params, x, rank=2, targets="**")
    moments = jlora.observe(fn, params, x, plan=plan)
    found = np.asarray(moments["w"], np.float64)
    found = found + 0.1 * np.eye(found.shape[-1])  # so that it has an inverse
    init = jlora.initializers.loftq("int4", block=4, moments={"w": found})
    tree = jlora.wrap(params, plan=plan, init=init)
    w, roles = params["w"], plan["w"].axes
    order = sorted(range(w.ndim), key=lambda k: ("bio".index(roles[k]), k))
    sizes = [int(np.prod([w.shape[k] for k in order if roles[k] == r])) for r in "bio"]

    def matrices(v):
        return np.asarray(v, np.float64).transpose(order).reshape(sizes)

    q = qwix.dequantize(tree["w"].w)
    alone = jlora.quantize(params, "int4", plan=plan, block=4, moments={"w": found})
    same(q, qwix.dequantize(alone["w"]))
    values, vectors = np.linalg.eigh(found.reshape(-1, *found.shape[-2:]))
    root = vectors * np.sqrt(values)[:, None] @ vectors.swapaxes(1, 2)
    u, s, vt = np.linalg.svd(root @ matrices(w - q))
    best = np.linalg.solve(root, (u[:, :, :2] * s[:, None, :2]) @ vt[:, :2])
    close(matrices(jlora.merge(tree)["w"] - q), best, 1e-4)
    with pytest.raises(ValueError, match="loftq: no moments of 'w'; near paths: 'v'"):
        init = jlora.initializers.loftq(block=4, moments={"v": found})
        jlora.wrap(params, plan=plan, init=init)
    with pytest.raises(ValueError, match="expected moments of shape .* for 'loftq'"):
        init = jlora.initializers.loftq(block=4, moments={"w": found[..., :3, :3]})
        jlora.wrap(params, plan=plan, init=init)


def test_starts_that_move_the_base():
    """On floats that are quantised then; a quantised base is not moved in silence."""
    tree = jlora.wrap(PARAMS, rank=4, init="pissa")
    coded = jlora.quantize(tree, "nf4")
    same(
        coded["up"]["kernel"].w,
        jlora.quantize({"kernel": tree["up"]["kernel"].w}, "nf4")["kernel"],
    )
    own = jlora.quantize(PARAMS, "nf4")
    for init in ("pissa", "olora", "loftq"):
        with pytest.raises(ValueError, match="is nf4 in blocks of 64: expected floats"):
            jlora.wrap(own, rank=4, init=init)
    named = jlora.wrap(PARAMS, rank=4, init="loftq")["up"]["kernel"]
    assert named.w.qtype == "nf4" and named.w.scale.shape == (1, 64)
    same(
        jlora.wrap(PARAMS, rank=4, init=jlora.initializers.loftq)["up"]["kernel"], named
    )
    shapes = jax.eval_shape(lambda: jlora.wrap(PARAMS, rank=4, init="loftq"))
    assert jax.tree.structure(shapes["up"]["kernel"]) == jax.tree.structure(named)
    abstract = jlora.wrap(jax.eval_shape(lambda: PARAMS), rank=4, init="loftq")
    assert jax.tree.structure(abstract["up"]["kernel"]) == jax.tree.structure(named)
    with pytest.raises(ValueError, match="steps 0: expected a number of turns"):
        jlora.initializers.loftq(steps=0)
    with pytest.raises(TypeError, match="loftq: expected moments by path"):
        jlora.initializers.loftq(moments=3)
    with pytest.raises(ValueError, match="qtype 'nf5'"):
        jlora.initializers.loftq("nf5")
    with pytest.raises(ValueError, match="in axes that blocks of 24 divide"):
        jlora.wrap(PARAMS, rank=4, init=jlora.initializers.loftq(block=24))


# ----------------------------------------------------------------------- checkpoints


def test_a_checkpoint_knows_how_its_base_was_quantised(tmp_path):
    coded = jlora.quantize(PARAMS, "nf4")
    tree = randomise(jlora.wrap(coded, rank=2))
    jlora.checkpoint.save(tmp_path / "a", tree)
    same(jlora.checkpoint.restore(tmp_path / "a", coded), tree)
    abstract = jax.eval_shape(lambda: coded)
    same(
        jlora.checkpoint.restore(tmp_path / "a", abstract)["up"]["kernel"].a,
        tree["up"]["kernel"].a,
    )
    others = {
        "nf4 with scales .1, 64., found float32.64,64..$": PARAMS,
        "found float32.64,64., int8 with": jlora.quantize(PARAMS, "int8"),
        "found float32.64,64., nf4 with scales .2, 64.": jlora.quantize(
            PARAMS, "nf4", block=32
        ),
    }
    for match, params in others.items():
        with pytest.raises(ValueError, match=match.removesuffix("$")) as error:
            jlora.checkpoint.restore(tmp_path / "a", params)
        assert "any_qtype=True to put it on these" in str(error.value)
        back = jlora.checkpoint.restore(tmp_path / "a", params, any_qtype=True)
        same(back, jlora.attach(params, jlora.adapter(tree)))
    with pytest.raises(ValueError, match="found float32.64,32."):
        other = {**PARAMS, "up": {"kernel": normal(64, 32), "bias": normal(64)}}
        jlora.checkpoint.restore(tmp_path / "a", other, any_qtype=True)
    floats_ = randomise(jlora.wrap(PARAMS, rank=2))
    jlora.checkpoint.save(tmp_path / "b", floats_)
    with pytest.raises(ValueError, match="found float32.64,64., nf4.*any_qtype"):
        jlora.checkpoint.restore(tmp_path / "b", coded)


def test_a_loftq_checkpoint_belongs_to_its_base(tmp_path):
    init = jlora.initializers.loftq("nf4", 2)  # with one turn it is quantize's own
    tree = jlora.wrap(PARAMS, rank=2, init=init)
    jlora.checkpoint.save(tmp_path / "a", tree)
    same(jlora.checkpoint.restore(tmp_path / "a", jlora.unwrap(tree)), tree)
    with pytest.raises(ValueError, match="'loftq' had left of it"):
        jlora.checkpoint.restore(tmp_path / "a", jlora.quantize(PARAMS, "nf4"))


def test_orbax_saves_the_quantised_tree(tmp_path):
    coded = jlora.quantize(PARAMS, "nf4")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", coded)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "base", jax.eval_shape(lambda: coded))
    same(back, coded)


# ---------------------------------------------------------------------- bad input


def raises(match, tree, qtype="int8", **options):
    with pytest.raises(ValueError, match=match):
        jlora.quantize(tree, qtype, **options)


def test_bad_input():
    tree = {"dense": {"kernel": normal(64, 6)}}
    raises("qtype 'int9': expected one of int8, .*near names: 'int", tree, "int9")
    raises("qtype 'nf5'.*near names: 'nf4'", tree, "nf5")
    raises("qtype .*bfloat16", tree, jnp.bfloat16)
    raises("qtype 4: expected", tree, 4)
    odd = {"k": {"kernel": normal(65, 6)}}
    raises("blocks of 64 do not divide 'k/kernel': its in axes of 65", odd)
    raises("blocks of 128 do not divide 'dense/kernel'", tree, block=128)
    raises("block=0: expected a number", tree, block=0)
    raises("block=True: expected a number", tree, block=True)
    raises("target 'dens/kernel' matches no path", tree, targets="dens/kernel")
    plan = jlora.plan(lambda p, x: x @ p["dense"]["kernel"], tree, normal(3, 64))
    raises("nothing to quantise", tree, exclude="**", plan=plan)
    ints = {"dense": {"kernel": jnp.ones((64, 6), jnp.int8)}}
    raises("'dense/kernel'.*int8: expected", ints, targets="**/kernel")
    coded = jlora.quantize(tree, "nf4")
    raises("'dense/kernel' is nf4 in blocks of 64 already: expected a float", coded)
    raises("already", jlora.wrap(coded, rank=2))
    for bad in (jnp.nan, jnp.inf):
        wrong = {"dense": {"kernel": normal(64, 6).at[3, 2].set(bad)}}
        raises("'dense/kernel' has NaN or infinities", wrong)
    with pytest.raises(TypeError, match="quantize: plan is a dict: expected the res"):
        jlora.quantize(tree, "nf4", plan={"dense/kernel": 64})
    empty = {"dense": {"kernel": jnp.zeros((64, 0))}}
    assert jlora.quantize(empty, "nf4")["dense"]["kernel"] is empty["dense"]["kernel"]
    jlora.quantize(tree, "nf4", block=np.int64(32))
    other = jlora.plan(lambda p, x: x @ p["w"], {"w": normal(64, 6)}, normal(3, 64))
    raises("the plan is of another tree", tree, plan=other)


def test_nothing_is_given_up_before_all_is_checked():
    def leaves():
        return {"a": {"kernel": normal(64, 8)}, "b": {"kernel": normal(64, 8)}}

    bad = leaves()
    bad["b"]["kernel"] = bad["b"]["kernel"].at[3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match="'b/kernel' has NaN or infinities"):
        jlora.quantize(bad, "int4", donate=True)
    assert not bad["a"]["kernel"].is_deleted()
    params = leaves()
    with pytest.raises(ValueError, match="no moments of 'b/kernel'"):
        moments = {"a/kernel": jnp.eye(64)}
        jlora.quantize(params, "int4", donate=True, moments=moments)
    assert not params["a"]["kernel"].is_deleted()
    with pytest.raises(ValueError, match="'b/kernel' is a weight of shape.*moments of"):
        moments = {"a/kernel": jnp.eye(64), "b/kernel": jnp.eye(32)}
        jlora.quantize(params, "int4", donate=True, moments=moments)
    assert not params["a"]["kernel"].is_deleted()
    shared = normal(64, 8)
    twice = {"a": {"kernel": shared}, "b": {"kernel": shared}}
    got = jlora.quantize(twice, "int4", donate=True)
    assert shared.is_deleted()
    same(got["a"], got["b"])
    held = normal(64, 64)
    jlora.quantize(
        {"kernel": held, "also": held}, "int4", targets="kernel", donate=True
    )
    assert not held.is_deleted()


@pytest.mark.parametrize(
    "scale, qtype", [(1e-3, "float8_e5m2"), (1e-6, "float8_e4m3fn"), (1e-6, "int8")]
)
def test_numbers_too_small_for_a_scale_in_float16(scale, qtype):
    params = {"kernel": (normal(64, 8) * scale).astype(jnp.float16)}
    with pytest.raises(
        ValueError, match="'kernel' has numbers whose block has no scale"
    ):
        jlora.quantize(params, qtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert jlora.rounding(wide, jlora.quantize(wide, qtype))["kernel"] < 0.1


def test_rounding_of_zeros_and_of_other_trees():
    def coded(w):
        return jlora.quantize({"kernel": w}, "int8")

    w = normal(64, 8)
    assert jlora.rounding({"kernel": 0 * w}, coded(0 * w))["kernel"] == 0
    large = jlora.rounding({"kernel": 1e30 * w}, coded(1e30 * w))["kernel"]
    assert large == pytest.approx(jlora.rounding({"kernel": w}, coded(w))["kernel"])
    for other in (normal(1, 8), normal(8, 64), jax.eval_shape(lambda: w)):
        with pytest.raises(ValueError, match="rounding: 'kernel' is of shape"):
            jlora.rounding({"kernel": other}, coded(w))
    tree = jlora.wrap(coded(w), rank=2)
    broken = dataclasses.replace(tree["kernel"], b=tree["kernel"].b + jnp.nan)
    with pytest.raises(ValueError, match="merge: 'kernel' cannot be quantised again"):
        jlora.merge({"kernel": broken}, requantize=True)


def test_blocks_and_steps_of_loftq():
    params = {"kernel": normal(64, 8)}
    assert jlora.wrap(params, 2, init=jlora.initializers.loftq("nf4", np.int64(1)))
    for options, message in [
        ({"qtype": "mxfp4"}, "loftq: mxfp4 has blocks of 32, found block=64"),
        ({"block": "x"}, "loftq: block='x': expected a number of weights"),
        ({"block": 0}, "loftq: block=0: expected"),
        ({"block": True}, "loftq: block=True: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            jlora.initializers.loftq(**options)
    with pytest.raises(ValueError, match="'kernel' is float8_e4m3fn: expected a float"):
        jlora.quantize({"kernel": normal(64, 8).astype(jnp.float8_e4m3fn)}, "int4")


def test_outside_of_lift():
    coded = jlora.quantize({"kernel": normal(64, 6)}, "nf4")["kernel"]
    x = normal(3, 64)
    uses = {
        "operator": lambda: x @ coded,
        "numpy": lambda: np.asarray(coded),
        "jnp": lambda: jnp.dot(x, coded),
        "sum": lambda: coded + 1,
    }
    for name, use in uses.items():
        with pytest.raises(TypeError, match="is a quantised array.*jlora.lift"):
            use()
            pytest.fail(name)
    with pytest.raises(AttributeError, match="no attribute 'at'; it is a quantised"):
        coded.at  # noqa: B018


def test_without_qwix(monkeypatch):
    from jlora import _qwix

    monkeypatch.setattr(
        _qwix.importlib,
        "import_module",
        lambda name: (_ for _ in ()).throw(ImportError(name)),
    )
    with pytest.raises(ImportError, match=r'pip install "jlora\[quant\]"'):
        jlora.quantize({"kernel": normal(64, 6)}, "nf4")
