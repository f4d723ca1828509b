"""The initialisers of the family: what they draw, and what they take of the base.

Against numpy in float64, and against the model itself, which computes the same at the
start.
"""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, normal, randomise, same, says
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint
from jlora.loralib import Kernel

MOVE = ["pissa", "pissa_niter_8", "olora"]
ALL = [*MOVE, "kaiming", "gaussian", "orthogonal"]


def conv(p, x):
    return lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# A function of {"w": weight}, the weight, an input, and its axes as (batch, in, out).
KINDS = {
    "dense": (lambda p, x: x @ p["w"], normal(12, 17), normal(3, 12), "io"),
    "transposed": (lambda p, x: x @ p["w"].T, normal(17, 12), normal(3, 12), "oi"),
    "heads": (
        lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]),
        normal(12, 3, 5),
        normal(3, 12),
        "ioo",
    ),
    "of heads": (
        lambda p, x: jnp.einsum("bhi,hio->bo", x, p["w"]),
        normal(3, 5, 12),
        normal(2, 3, 5),
        "iio",
    ),
    "stack": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
        normal(3, 12, 12, scale=0.3),  # so that no layer amplifies the rounding
        normal(3, 12),
        "bio",
    ),
    "conv": (conv, normal(3, 3, 4, 14), normal(2, 6, 6, 4), "iiio"),
    "embedding": (lambda p, x: p["w"][x], normal(20, 12), jnp.array([3, 19, 0]), "io"),
}


def matrices(w, axes):
    """(batch, in, out) in float64."""
    order = [k for role in "bio" for k, c in enumerate(axes) if c == role]
    w = np.asarray(w, np.float64).transpose(order)
    n = [w.shape[k] for k in range(w.ndim)]
    b, i = axes.count("b"), axes.count("i")
    return w.reshape(int(np.prod(n[:b])), int(np.prod(n[b : b + i])), -1)


def tree_of(kind, **options):
    fn, w, x, axes = KINDS[kind]
    options = {"rank": 4, "alpha": 6.0} | options
    rank, alpha = options.pop("rank"), options.pop("alpha")
    plan = jlora.plan(fn, {"w": w}, x, targets="w", rank=rank, alpha=alpha)
    assert plan["w"].axes == axes
    return jlora.wrap({"w": w}, plan=plan, **options)


@pytest.mark.parametrize("init", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_same_at_the_start(kind, init):
    fn, w, x, _ = KINDS[kind]
    dora = kind in ("heads", "stack", "conv")
    tree = tree_of(kind, init=init, dora=dora, rslora=dora)
    tol = 3e-6 if kind == "stack" else 1e-6  # of three layers, one after the other
    close(jlora.lift(fn)(tree, x), fn({"w": w}, x), tol)
    close(jlora.merge(tree)["w"], w, 1e-6)
    moved = init in MOVE
    assert (tree["w"].w is w) != moved
    assert bool(jnp.any(tree["w"].b)) == (moved or init == "orthogonal") or (
        kind == "embedding"
    )


@pytest.mark.parametrize("init", MOVE)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_of_the_base(kind, init):
    _, w, _, axes = KINDS[kind]
    rslora = kind in ("heads", "conv")
    leaf = tree_of(kind, init=init, rslora=rslora)["w"]
    scale = 6 / (2 if rslora else 4)
    w, left = matrices(w, axes), matrices(leaf.w, axes)
    a = np.asarray(leaf.a, np.float64).reshape(len(w), -1, 4)
    b = np.asarray(leaf.b, np.float64).reshape(len(w), 4, -1)
    for k in range(len(w)):
        if init == "olora":
            q, r = np.linalg.qr(w[k].T)
            sign = np.sign(np.diag(r[:4, :4]))
            np.testing.assert_allclose(
                b[k], (q[:, :4] * sign).T * sign[:, None], atol=1e-5
            )
            np.testing.assert_allclose(
                a[k], (r[:4] * sign[:, None]).T * sign, atol=1e-5
            )
            want = w[k] - scale * (q[:, :4] @ r[:4]).T
        else:
            u, s, vt = np.linalg.svd(w[k], full_matrices=False)
            want = w[k] - (u[:, :4] * s[:4]) @ vt[:4]
            exact = init == "pissa"
            np.testing.assert_allclose(
                np.linalg.norm(a[k], axis=0) ** 2,
                s[:4] / scale,
                rtol=1e-5 if exact else 0.02,
            )
            np.testing.assert_allclose(
                np.linalg.norm(b[k], axis=1) ** 2,
                s[:4] / scale,
                rtol=1e-5 if exact else 0.02,
            )
        tol = 3e-5 if init != "pissa_niter_8" else 0.3
        np.testing.assert_allclose(left[k], want, atol=tol)


def test_more_iterations_come_closer():
    w = normal(60, 40)
    s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    left = []
    for init in ["pissa_niter_0", "pissa_niter_2", "pissa_niter_16", "pissa"]:
        leaf = jlora.wrap({"w": w}, 6, targets="w", init=init)["w"]
        rest = np.asarray(leaf.w, np.float64)
        left.append((rest**2).sum() / (s[6:] ** 2).sum())
    assert left[0] > left[1] > left[2] > left[3] - 1e-6
    assert left[0] > 1.01 and left[2] < 1.001 and abs(left[3] - 1) < 1e-5
    same(
        jlora.wrap({"w": w}, 6, targets="w", init="pissa_niter_2")["w"].a,
        jlora.wrap({"w": w}, 6, targets="w", init=jlora.initializers.pissa(2))["w"].a,
    )
    same(
        jlora.wrap({"w": w}, 6, targets="w", init=jlora.initializers.pissa)["w"].a,
        jlora.wrap({"w": w}, 6, targets="w", init="pissa")["w"].a,
    )


@pytest.mark.parametrize("init", MOVE)
def test_weights_that_are_not_of_full_rank(init):
    """Zeros, equal columns, and columns of zeros first: no NaN, and the same model."""
    low = normal(12, 2) @ normal(2, 17)
    for w in (jnp.zeros((12, 17)), low, low.at[:3].set(0), jnp.ones((12, 17))):
        tree = jlora.wrap({"w": w}, 4, targets="w", init=init)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
        close(jlora.merge(tree)["w"], w, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("init", MOVE)
def test_half_precision_is_rounded_once(init, dtype):
    w = normal(12, 17, dtype=dtype)
    leaf = jlora.wrap({"w": w}, 4, targets="w", init=init)["w"]
    exact = np.asarray(w, np.float64) - np.asarray(leaf.a, np.float64) @ np.asarray(
        leaf.b, np.float64
    )
    ulp = float(jnp.finfo(dtype).eps)
    assert np.abs(np.asarray(leaf.w, np.float64) - exact).max() <= (
        0.51 * ulp * 2 ** np.ceil(np.log2(np.abs(exact).max()))
    )
    assert leaf.w.dtype == dtype and leaf.a.dtype == jnp.float32


def test_draws():
    """By their distribution: kaiming is in test_tree."""
    leaf = jlora.wrap({"w": jnp.ones((400, 300))}, 10, targets="w", init="gaussian")[
        "w"
    ]
    np.testing.assert_allclose(leaf.a.std(), 1 / 10, rtol=0.05)
    np.testing.assert_allclose(leaf.a.mean(), 0, atol=0.01)
    assert not leaf.b.any()
    leaf = jlora.wrap({"w": jnp.ones((400, 300))}, 10, targets="w", init="orthogonal")[
        "w"
    ]
    # peft's: N(0, 1) of r/2 columns times an orthonormal half, over 10.
    for factor in (leaf.a, leaf.b):
        np.testing.assert_allclose(factor.std(), np.sqrt(0.5) / 10, rtol=0.1)
    assert np.linalg.matrix_rank(leaf.a) == np.linalg.matrix_rank(leaf.b) == 5
    assert np.abs(leaf.a @ leaf.b).max() < 1e-6
    fn, w, x, _ = KINDS["embedding"]
    table = tree_of("embedding", init="gaussian")["w"]
    assert not table.a.any() and 0.7 < table.b.std() < 1.3
    layers = tree_of("stack", init="orthogonal")["w"]
    assert np.abs(layers.a[0] - layers.a[1]).max() > 0.01


def test_by_rule():
    params = {"q": normal(6, 8), "k": normal(6, 8), "v": normal(6, 8)}
    rules = [jlora.Rule("q", init="pissa"), jlora.Rule("k", init="orthogonal", rank=2)]
    tree = jlora.wrap(params, rank=3, rules=[*rules, jlora.Rule("v")], init="gaussian")
    assert tree["q"].w is not params["q"] and tree["k"].w is params["k"]
    assert tree["k"].rank == 2 and tree["k"].b.any() and not tree["v"].b.any()
    fn = lambda p, x: x @ p["q"] + x @ p["k"] + x @ p["v"]  # noqa: E731
    plan = str(jlora.plan(fn, params, normal(2, 6), rules=rules))
    assert "dense, pissa" in plan and "dense, orthogonal" in plan


def test_abstract_weights_and_jit():
    w = normal(12, 17)
    for init in [*MOVE, "orthogonal"]:
        shapes = jlora.wrap(
            {"w": jax.eval_shape(lambda: w)}, 4, targets="w", init=init, dora=True
        )
        real = jlora.wrap({"w": w}, 4, targets="w", init=init, dora=True)
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, real)
        traced = jax.jit(
            lambda p: jlora.wrap(p, 4, targets="w", init=init, dora=True)  # noqa: B023
        )({"w": w})
        close(jlora.merge(traced)["w"], w)


@pytest.mark.parametrize(
    "init, spec",
    [
        *((init, P("x", "y")) for init in [*MOVE, "orthogonal"]),
        *((init, P("y")) for init in MOVE),
        ("pissa", P(None, "y")),
    ],
    ids=str,
)
def test_no_device_gets_the_whole_weight(init, spec):
    """On a mesh: by the program of the initialiser, and by what comes out."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    host = normal(24, 16)
    w = jax.device_put(host, NamedSharding(mesh, spec))
    tree = jlora.wrap({"w": w}, rank=2, targets="w", init=init, dora=True)
    leaf = tree["w"]
    assert leaf.w.sharding.is_equivalent_to(w.sharding, 2)
    assert leaf.a.sharding.spec[0] == (spec[0] if spec else None)
    close(jax.device_get(jlora.merge(tree)["w"]), np.asarray(host), 1e-5)
    if init == "pissa":
        s = np.linalg.svd(np.asarray(host, np.float64), compute_uv=False)
        found = np.linalg.norm(np.asarray(leaf.a, np.float64), axis=0) ** 2
        np.testing.assert_allclose(found, s[:2], rtol=1e-3)

    if init in MOVE:
        text = program_of(init, w, leaf)
        gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
        sizes = [int(np.prod([int(n) for n in g.split(",") if n])) for g in gathered]
        assert all(n < host.size for n in sizes), sizes


def program_of(init, w, leaf):
    from jlora._init.make import initialiser

    spec = jlora.Spec.of("dense", "io", rank=2)
    start = initialiser(init)
    start = start.on_mesh() if hasattr(start, "on_mesh") else start
    places = tuple(x.sharding for x in (leaf.w, leaf.a, leaf.b))
    call = jax.jit(lambda key, w: start(key, w, spec), out_shardings=places)
    return call.lower(jax.random.key(0), w).compile().as_text()


@pytest.mark.parametrize(
    "init, kind, options, parts",
    [
        ("orthogonal", "dense", {"rank": 3}, ["'w'", "an even rank", "found 3"]),
        ("pissa", "dense", {"rank": 13}, ["'w'", "at most 12", "12 × 17", "found 13"]),
        ("olora", "stack", {"rank": 13}, ["'w'", "at most 12", "(3, 12, 12)"]),
        ("pissa", "dense", {"alpha": 0.0}, ["'w'", "a positive alpha", "found 0"]),
        ("pissa", "dense", {"alpha": -1.0}, ["'w'", "a positive alpha", "found -1"]),
        ("pisa", "dense", {}, ["'pisa'", "near names: 'pissa'"]),
        ("pissa_niter_", "dense", {}, ["'pissa_niter_'", "pissa_niter_4"]),
        ("orthogonl", "dense", {}, ["'orthogonl'", "'orthogonal'"]),
        ("eva", "dense", {}, ["'eva'", "from data", "jlora.initializers.eva("]),
        ("orthogonal", "dense", {"rank": 1}, ["jlora.Rule('w', ...)", "exclude"]),
    ],
)
def test_bad_starts(init, kind, options, parts):
    with pytest.raises(ValueError) as error:
        tree_of(kind, init=init, **options)
    says(error, *parts)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_checkpoint_knows_what_was_left_of_the_base(init, tmp_path):
    """It restores on that base, and not on the one before."""
    params = {"w": normal(12, 17), "e": normal(5, 3)}
    tree = jlora.wrap(params, rank=2, targets="w", init=init)
    start, trained = jlora.adapter(tree), randomise(tree, scale=False)
    jlora.checkpoint.save(tmp_path / "left", trained)
    left = jlora.unwrap(jlora.wrap(params, rank=2, targets="w", init=init))
    same(
        jlora.merge(jlora.checkpoint.restore(tmp_path / "left", left)),
        jlora.merge(trained),
    )
    gone = jlora.drop_base(trained, force=True)
    jlora.checkpoint.save(tmp_path / "gone", gone)  # it fits any base
    jlora.checkpoint.restore(tmp_path / "gone", params)
    shapes = jax.eval_shape(lambda: params)  # which have no values to compare
    jlora.checkpoint.restore(tmp_path / "left", shapes)
    with pytest.raises(ValueError) as e:
        jlora.checkpoint.restore(tmp_path / "left", params)
    says(e, "'w' was trained on what", init[:5], "jlora.unwrap", "jlora.mix(")
    plain = jlora.mix([jlora.adapter(trained), start], [1, -1])
    jlora.checkpoint.save(tmp_path / "plain", jlora.attach(params, plain))
    again = jlora.checkpoint.restore(tmp_path / "plain", params)
    close(jlora.merge(again), jlora.merge(trained), 1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.filterwarnings("ignore:wrap. dtype")
def test_factors_of_few_bits_leave_their_rounding_in_the_base(init, dtype):
    w = normal(12, 17)
    tree = jlora.wrap({"w": w}, rank=4, targets="w", init=init, dtype=dtype)
    assert tree["w"].a.dtype == dtype
    close(jlora.merge(tree)["w"], w, 1e-6)


@pytest.mark.filterwarnings("ignore:wrap. dtype")
def test_a_magnitude_has_no_fewer_bits_than_float32():
    w = normal(12, 17)
    tree = jlora.wrap({"w": w}, rank=4, targets="w", dora=True, dtype=jnp.bfloat16)
    assert tree["w"].m.dtype == jnp.float32 and tree["w"].b.dtype == jnp.bfloat16
    close(jlora.merge(tree)["w"], w, 1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
def test_a_base_without_numbers(init, number):
    with pytest.raises(ValueError) as e:
        jlora.wrap({"w": normal(6, 5).at[2, 3].set(number)}, 2, targets="w", init=init)
    says(e, "'w' has NaN or infinities", init, "jlora.Rule('w', ...)")


def test_eva_without_moments_is_no_initialiser():
    with pytest.raises(TypeError, match="expected eva.moments."):
        jlora.wrap({"w": normal(3, 4)}, init=jlora.initializers.eva)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_form_that_is_no_plain_product(init):
    fn, w, x, _ = KINDS["conv"]
    rule = jlora.Rule("w", rank=2, form=Kernel(), init=init)
    plan = jlora.plan(fn, {"w": w}, x, rules=[rule])
    with pytest.raises(ValueError) as error:
        jlora.wrap({"w": w}, plan=plan)
    says(error, "'w'", "a weight whose delta is a plain a·b", init)


@pytest.mark.parametrize("niter", [-1, 1.5, True, "4"])
def test_bad_iterations(niter):
    with pytest.raises(ValueError, match="niter"):
        jlora.initializers.pissa(niter)


def test_dora_of_a_moved_base_starts_at_the_norm_of_the_weight():
    leaf = tree_of("dense", init="pissa", dora=True)["w"]
    close(leaf.m, jnp.linalg.norm(KINDS["dense"][1], axis=0), 1e-5)
    plain = dataclasses.replace(leaf, m=None)
    close(jlora.merge({"w": leaf})["w"], jlora.merge({"w": plain})["w"], 1e-5)
