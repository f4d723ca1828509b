"""Rounding by second moments (GPTQ), against the paper's elimination in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from helpers import close, normal, randomise, same, wrap_random
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint
from jlora._init.gptq import DAMPING, PARTS
from jlora._leaf.quantized import NF4

# The function, its weight, its input, and the weight's axes in the order b, i, o.
CASES = {
    "dense": (lambda p, x: x @ p["w"], normal(8, 6), normal(30, 8), (0, 1)),
    "torch's order": (lambda p, x: x @ p["w"].T, normal(6, 8), normal(30, 8), (1, 0)),
    "heads": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]),
        normal(8, 2, 3),
        normal(30, 8),
        (0, 1, 2),
    ),
    "several in axes": (
        lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"]),
        normal(4, 2, 3),
        normal(30, 4, 2),
        (0, 1, 2),
    ),
    "out before in": (
        lambda p, x: jnp.einsum("bhd,hod->bo", x, p["w"]),
        normal(2, 3, 4),
        normal(30, 2, 4),
        (0, 2, 1),
    ),
    "stack": (
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0],
        normal(3, 8, 8, scale=0.3),
        normal(30, 8),
        (0, 1, 2),
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        normal(2, 1, 4, 3),
        normal(2, 5, 5, 4),
        (0, 1, 2, 3),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]),
        normal(3, 8, 5),
        normal(3, 20, 8),
        (0, 1, 2),
    ),
}


def zeros(x):
    return jnp.zeros(x.shape, x.dtype)


BATCHED = {"stack", "experts"}


def observed(name):
    fn, w, x, order = CASES[name]
    plan = jlora.plan(fn, {"w": w}, x, rank=2, targets="**")
    moments = jlora.observe(fn, {"w": w}, x, plan=plan)
    n = moments["w"].shape[-1]

    def matrices(array):
        array = np.asarray(array, np.float64).transpose(order)
        return array.reshape(len(w) if name in BATCHED else 1, n, -1)

    return plan, moments, matrices


def levels(qtype):
    """The numbers that a block with a scale of 1 can have, and the largest magnitude.

    That of integers is between the last and the one after it.  They are symmetric.
    """
    if qtype == "nf4":
        return np.array(NF4), 1.0
    top = 2 ** (int(qtype[3:]) - 1)
    return np.arange(1 - top, top), top - 0.5


def distance(x, scale, qtype):
    """Of each number to the nearest that its block has."""
    numbers = levels(qtype)[0] * np.asarray(scale)[..., None]
    return abs(np.asarray(x)[..., None] - numbers).min(-1)


def check_elimination(w, moment, qtype, scale, got):
    """The paper's section 3.1: all inverses anew, of the inputs that are still floats.

    w, scale and got (in, out).  Each number got is one of the nearest to what the
    elimination has made of w, given the numbers got before it; so either of two may be
    had where a float lies between them.
    """
    w, largest = w.copy(), scale * levels(qtype)[1]
    h = moment / np.mean(np.diag(moment)) + DAMPING * np.eye(len(moment))
    order = np.argsort(-np.diag(moment), kind="stable")
    for n, i in enumerate(order):
        inside = np.clip(w[i], -largest[i], largest[i])
        least = distance(inside, scale[i], qtype)
        assert (distance(got[i], scale[i], qtype) <= 1e-5 * largest[i]).all()
        assert (abs(got[i] - inside) <= least + 1e-5 * largest[i]).all()
        left = order[n:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        w[left] -= np.outer(inverse[0] / inverse[0, 0], w[i] - got[i])


def check_scales(w, moment, qtype, scale, block):
    """The best of `PARTS` of each block, by the moments on the diagonal."""
    shape = -1, block, w.shape[1]
    seen = np.diag(moment).reshape(-1, block, 1)
    whole, blocks = abs(w.reshape(shape)).max(1), w.reshape(shape)

    def error(part):
        own = (part * whole / levels(qtype)[1])[:, None]
        return (seen * distance(blocks, own, qtype) ** 2).sum(1)

    errors = np.stack([error(part) for part in PARTS])
    found = scale.reshape(shape)[:, 0] * levels(qtype)[1] / whole
    chosen = abs(found - np.array(PARTS)[:, None, None]).argmin(0)
    assert (abs(found - np.array(PARTS)[chosen]) < 1e-5).all()
    least = errors.min(0)
    assert (
        np.take_along_axis(errors, chosen[None], 0)[0] <= least * 1.001 + 1e-9
    ).all()


@pytest.mark.parametrize("qtype", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers(name, qtype):
    _, w, _, _ = CASES[name]
    plan, moments, matrices = observed(name)
    got = jlora.quantize({"w": w}, qtype, plan=plan, block=4, moments=moments)["w"]
    found = np.asarray(moments["w"], np.float64)
    assert got.qtype == qtype and (got.shape, got.dtype) == (w.shape, w.dtype)
    scale = np.asarray(got.scale)
    for axis, n in enumerate(w.shape):
        scale = np.repeat(scale, n // scale.shape[axis], axis)
    for matrix, moment, own, new in zip(
        matrices(w),
        found.reshape(-1, *found.shape[-2:]),
        matrices(scale),
        matrices(qwix.dequantize(got)),
        strict=True,
    ):
        check_elimination(matrix, moment, qtype, own, new)
        check_scales(matrix, moment, qtype, own, 4)
    plain = jlora.quantize({"w": w}, qtype, plan=plan, block=4)["w"]
    same(jax.tree.map(zeros, got), jax.tree.map(zeros, plain))


@pytest.mark.parametrize("qtype", ["int2", "int3", "float8_e4m3fn", "float4_e2m1fn"])
@pytest.mark.parametrize("block", [8, 32, None])
def test_the_outputs_change_less(qtype, block):
    """Than with each number rounded to the nearest; most where inputs go together."""
    x = normal(200, 4) @ normal(4, 32, seed=1) + 0.1 * normal(200, 32, seed=2)
    params = {"kernel": normal(32, 16, seed=3)}
    plan = jlora.plan(lambda p, x: x @ p["kernel"], params, x)
    moments = {"kernel": x.T @ x}

    def off(**options):
        coded = jlora.quantize(params, qtype, plan=plan, block=block, **options)
        new = qwix.dequantize(coded["kernel"])
        return float(jnp.linalg.norm(x @ (new - params["kernel"])))

    assert off(moments=moments) < 0.7 * off()


@pytest.mark.parametrize(
    ("qtype", "block"), [("mxfp8", 32), ("mxfp4", 32), ("nvfp4", 16)]
)
def test_formats_with_blocks_of_their_own(qtype, block):
    x = normal(200, 4) @ normal(4, 64, seed=1) + 0.1 * normal(200, 64, seed=2)
    params = {"kernel": normal(64, 16, seed=3)}

    def off(**options):
        coded = jlora.quantize(params, qtype, block=block, **options)["kernel"]
        return float(jnp.linalg.norm(x @ (qwix.dequantize(coded) - params["kernel"])))

    assert off(moments={"kernel": x.T @ x}) < 0.8 * off()


def test_inputs_that_were_never_seen():
    """Such as those of an expert that had no token: each number is the nearest."""
    params = {"kernel": normal(2, 64, 8)}

    def fn(p, x):
        return jnp.einsum("ebi,eio->ebo", x, p["kernel"])

    plan = jlora.plan(fn, params, normal(2, 2, 64))
    moments = jnp.stack([jnp.zeros((64, 64)), 1e6 * jnp.eye(64)])
    options = {"plan": plan, "block": 32}
    plain = jlora.quantize(params, "nf4", **options)
    got = jlora.quantize(params, "nf4", moments={"kernel": moments}, **options)
    got, plain = (jax.tree.map(jnp.array, x["kernel"]) for x in (got, plain))
    same(jax.tree.map(lambda x: x[0], got), jax.tree.map(lambda x: x[0], plain))
    error = [qwix.dequantize(x)[1] - params["kernel"][1] for x in (got, plain)]
    assert jnp.linalg.norm(error[0]) < jnp.linalg.norm(error[1])  # by its scales alone


def test_half_precision_and_dead_inputs():
    """Two inputs that are equal, and one that is always zero."""
    x = normal(50, 16).at[:, 3].set(0).at[:, 5].set(normal(50, 16)[:, 6])
    params = {"kernel": normal(16, 8, dtype=jnp.bfloat16)}
    coded = jlora.quantize(params, "nf4", block=8, moments={"kernel": x.T @ x})
    new = qwix.dequantize(coded["kernel"])
    assert coded["kernel"].scale.dtype == new.dtype == jnp.bfloat16
    plain = qwix.dequantize(jlora.quantize(params, "nf4", block=8)["kernel"])

    def off(w):
        return jnp.linalg.norm(x @ (w - params["kernel"]).astype(jnp.float32))

    assert off(new) < off(plain)


def test_shapes_alone_and_under_jit():
    x, params = normal(30, 8), {"kernel": normal(8, 6)}
    moments = {"kernel": x.T @ x}

    def make(params):
        return jlora.quantize(params, "int8", block=4, moments=moments)

    coded = make(params)
    same(jax.jit(make)(params), coded)
    shapes = make(jax.eval_shape(lambda: params))
    same(jax.tree.map(zeros, shapes), jax.tree.map(zeros, coded))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x"), P("x", "y"), P(None, "y")], ids=str)
def test_on_a_mesh(spec, kind):
    """As on one device, with scales that lie where their numbers do."""
    x, w = normal(30, 16), normal(16, 12)
    moments = {"kernel": x.T @ x}
    want = jlora.quantize({"kernel": w}, "nf4", block=4, moments=moments)["kernel"]
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        params = {"kernel": jax.device_put(w, NamedSharding(mesh, spec))}
        got = jlora.quantize(params, "nf4", block=4, moments=moments)["kernel"]
        for field in (got.qvalue, got.scale):
            assert field.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    close(
        qwix.dequantize(jax.tree.map(jnp.asarray, jax.device_get(got))),
        qwix.dequantize(want),
        1e-6,
    )


def test_bases_of_an_adapted_tree():
    """The paths are the same; the roles are those of the leaves."""
    x, params = normal(30, 8), {"kernel": normal(8, 6)}
    plan = jlora.plan(lambda p, x: x @ p["kernel"], params, x, rank=2)
    tree = wrap_random(params, plan)
    options = {"block": 4, "moments": {"kernel": x.T @ x}}
    got = jlora.quantize(tree, "int4", **options)["kernel"]
    same(got.w, jlora.quantize(params, "int4", plan=plan, **options)["kernel"])
    same((got.a, got.b), (tree["kernel"].a, tree["kernel"].b))


def test_a_checkpoint_knows_how_its_base_was_rounded(tmp_path):
    x, params = normal(30, 64), {"kernel": normal(64, 8), "bias": normal(8)}
    base = jlora.quantize(params, "nf4", moments={"kernel": x.T @ x})
    tree = randomise(jlora.wrap(base, rank=2))
    jlora.checkpoint.save(tmp_path / "a", tree)
    same(jlora.checkpoint.restore(tmp_path / "a", base), tree)
    other = jlora.quantize(params, "nf4")
    with pytest.raises(ValueError, match="rounded otherwise, as by other moments"):
        jlora.checkpoint.restore(tmp_path / "a", other)
    # Of eight bits the norm alone would tell nothing.
    by_moments = (
        jlora.quantize(params, "int8", moments={"kernel": y.T @ y})
        for y in (x, normal(31, 64))
    )
    same_norm, another = (jlora.wrap(x, rank=2) for x in by_moments)
    jlora.checkpoint.save(tmp_path / "b", same_norm)
    with pytest.raises(ValueError, match="of another model, or was rounded otherwise"):
        jlora.checkpoint.restore(tmp_path / "b", jlora.unwrap(another))
    for params in (other, jlora.merge(base)):
        back = jlora.checkpoint.restore(tmp_path / "a", params, any_qtype=True)
        same(back, jlora.attach(params, jlora.adapter(tree)))
    floats = {"kernel": normal(64, 8), "bias": normal(8)}
    jlora.checkpoint.save(tmp_path / "c", jlora.wrap(floats, rank=2, init="loftq"))
    with pytest.raises(ValueError, match=r"trained on, quantised as they were\.$"):
        jlora.checkpoint.restore(tmp_path / "c", floats)


def test_embeddings_have_no_moments():
    params = {"embed": normal(7, 8), "kernel": normal(8, 6)}

    def fn(p, ids):
        return p["embed"][ids] @ p["kernel"]

    ids = jnp.arange(6)
    plan = jlora.plan(fn, params, ids, targets="**")
    moments = jlora.observe(fn, params, ids, plan=plan)
    got = jlora.quantize(params, "nf4", plan=plan, block=4, moments=moments)
    plain = jlora.quantize(params, "nf4", plan=plan, block=4)
    same(got["embed"], plain["embed"])
    assert (got["kernel"].qvalue != plain["kernel"].qvalue).any()


def test_bad_moments():
    """For `quantize` and for `loftq`, with the path."""
    params = {"kernel": normal(8, 6)}
    x = normal(30, 8) @ normal(8, 8, seed=1)
    good = x.T @ x
    for found, what in [
        (good.at[1, 2].set(jnp.inf), "have NaN or infinities"),
        (np.asarray(good, np.float64) * 1e60, "have NaN or infinities"),
        (normal(8, 8), "are not symmetric"),
        (jnp.triu(good), "are not symmetric"),
        (-good, "are not those of any inputs"),
        (good * 1j, r"are complex64\[8, 8\]: expected an array \(\*batch, in, in\)"),
        (None, "are nothing of the kind"),
        ("abc", "are nothing of the kind"),
        (normal(8), r"are float32\[8\]"),
    ]:
        moments = {"kernel": found}
        with pytest.raises(
            ValueError, match=f"quantize: the moments of 'kernel' {what}"
        ):
            jlora.quantize(params, "nf4", block=4, moments=moments)
        init = jlora.initializers.loftq(block=4, moments=moments)
        with pytest.raises(ValueError, match=f"loftq: the moments of 'kernel' {what}"):
            jlora.wrap(params, rank=2, init=init)
    for moments, error, what in [
        (3, TypeError, "quantize: expected moments by path"),
        ({"kernle": good}, ValueError, "no moments of 'kernel'; near .*kernle.*plan"),
        ({}, ValueError, "near paths: none, there are no moments"),
        ({"kernel": jnp.eye(6)}, ValueError, r"expected moments of shape \(8, 8\)"),
    ]:
        with pytest.raises(error, match=what):
            jlora.quantize(params, "nf4", block=4, moments=moments)


def test_moments_that_were_rounded():
    """In bfloat16 they may have no inverse: they are damped more."""
    x = 0.5 * normal(4000, 512) + 1 + normal(512, seed=3)
    params, moments = {"kernel": normal(512, 16, seed=1)}, x.T @ x
    half = moments.astype(jnp.bfloat16)
    least = jnp.linalg.eigvalsh(half.astype(jnp.float32))[0]
    assert least < -DAMPING * jnp.trace(moments) / 512

    def off(moments):
        coded = jlora.quantize(params, "int4", moments={"kernel": moments})["kernel"]
        return jnp.linalg.norm(x @ (qwix.dequantize(coded) - params["kernel"]))

    assert off(half) < 1.2 * off(moments)


def test_shapes_of_moments_and_where_they_are():
    params = {"kernel": normal(8, 6)}
    shapes = jax.eval_shape(lambda: {"kernel": jnp.eye(8)})
    got = jlora.quantize(jax.eval_shape(lambda: params), "nf4", block=4, moments=shapes)
    assert got["kernel"].scale.shape == (2, 6)
    got = jlora.quantize(params, "nf4", block=4, moments={"kernel": jnp.eye(8)})
    traced = jax.jit(lambda m: jlora.quantize(params, "nf4", block=4, moments=m))
    same(traced({"kernel": jnp.eye(8)}), got)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    split = {"kernel": jax.device_put(params["kernel"], NamedSharding(mesh, P("x")))}
    other = jax.device_put(jnp.eye(8), jax.devices()[3])
    want = jlora.quantize(params, "nf4", block=4, moments={"kernel": jnp.eye(8)})
    for own in (params, split):
        got = jlora.quantize(own, "nf4", block=4, moments={"kernel": other})
        same(jax.device_get(dict(got)), jax.device_get(dict(want)))
