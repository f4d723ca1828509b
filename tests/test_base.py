"""A base that the library does not know works wherever an array does.

`bases.Int8` is one of the tests' own.  The oracle is the same tree on the array that it
stands for, merged by hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from bases import AsItIs, ByRule, Int8, arrays, is_int8, on_int8
from helpers import (
    EMITTERS,
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
    silent,
    wrap_random,
)
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint

X = normal(11, 5, seed=1)
IDS = integers(11, below=13)


def based(tree):
    """The tree on arrays of a tree on `Int8`s."""

    def one(x):
        if jlora.is_adapted(x):
            return dataclasses.replace(x, w=arrays(x.w))
        return arrays(x)

    return jax.tree.map(one, tree, is_leaf=lambda x: jlora.is_adapted(x) or is_int8(x))


def tied(p, ids):
    h = jnp.tanh(jnp.take(p["embed"], ids, axis=0) @ p["w"])
    return h @ p["embed"].T


def layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def transposed_layers(p, x):
    stack = jnp.swapaxes(p["w"], 1, 2)
    return lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, stack)[0]


def conv(p, x, **options):
    given = {"window_strides": (1, 1), "padding": "SAME"} | options
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["w"], **given, dimension_numbers=numbers)


def fused(p, x):
    qkv = jnp.concatenate([p["q"], p["k"], p["plain"]], axis=1)
    return x @ qkv


def experts(p, x):
    own = jnp.take(p["w"], integers(11, below=3), axis=0)
    sizes = jnp.array([4, 0, 7])
    return jnp.einsum("bi,bio->bo", x, own) + lax.ragged_dot(x, p["w"], sizes)


def loop(p, x):
    return lax.fori_loop(0, 3, lambda k, x: jnp.tanh(x @ p["w"]), x)


def branch(p, x):
    return lax.cond(x[0, 0] > 9, lambda: x @ p["w"], lambda: x @ (p["w"] * 0.5))


def halves(p, x):
    w = lax.optimization_barrier((p["w"].astype(jnp.bfloat16), x))[0]
    return x.astype(jnp.bfloat16) @ w


def image(channels=4):
    return normal(2, 6, 6, channels, seed=3)


W, SQUARE = {"w": normal(5, 7)}, {"w": normal(5, 5)}
CASES = {
    "product": (lambda p, x: x @ p["w"], W, X),
    "weight first": (lambda p, x: p["w"].T @ x.T, W, X),
    "einsum": (
        lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]),
        {"w": normal(5, 2, 3)},
        X,
    ),
    "transpose": (lambda p, x: x @ jnp.transpose(p["w"]), {"w": normal(7, 5)}, X),
    "reshape": (
        lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"].reshape(5, 2, 3)),
        {"w": normal(5, 6)},
        X,
    ),
    "slice": (lambda p, x: x @ p["w"][1:6, 2:], {"w": normal(7, 7)}, X),
    "reversed": (lambda p, x: x @ jnp.flip(p["w"], 1), W, X),
    "scaled": (lambda p, x: x @ (p["w"] * 0.5), W, X),
    "broadcast": (
        lambda p, x: jnp.einsum("hbi,hio->hbo", x[None], p["w"][None]),
        W,
        X,
    ),
    "layer of a stack": (lambda p, x: x @ p["w"][1], {"w": normal(3, 5, 7)}, X),
    "row": (lambda p, x: x * p["w"][IDS[0]], {"w": normal(13, 5)}, X),
    "lookup": (lambda p, ids: jnp.take(p["w"], ids, axis=0), {"w": normal(13, 5)}, IDS),
    "tied head": (tied, {"embed": normal(13, 5), "w": normal(5, 5)}, IDS),
    "convolution": (conv, {"w": normal(3, 3, 4, 6)}, image()),
    "grouped convolution": (
        functools.partial(conv, feature_group_count=2),
        {"w": normal(3, 3, 2, 6)},
        image(),
    ),
    "concatenate": (
        fused,
        {"q": normal(5, 7), "k": normal(5, 3), "plain": normal(5, 2)},
        X,
    ),
    "experts": (experts, {"w": normal(3, 5, 7)}, X),
    "scan": (layers, {"w": normal(3, 5, 5)}, X),
    "scan of a transposed stack": (transposed_layers, {"w": normal(3, 5, 5)}, X),
    "loop": (loop, SQUARE, X),
    "branch": (branch, W, X),
    "remat": (jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"])), W, X),
    "jit": (jax.jit(lambda p, x: x @ p["w"]), W, X),
    "vmap": (
        jax.vmap(lambda p, x: x @ p["w"], in_axes=(0, None)),
        {"w": normal(3, 5, 7)},
        X,
    ),
    "half precision": (halves, W, X),
    "shared": (
        lambda p, x: (x @ p["q"], x @ p["k"]),
        {"q": normal(5, 7), "k": normal(5, 3)},
        X,
    ),
}


def wrapped(fn, params, *args, **options):
    """A tree on `Int8`s with random factors, and its plan."""
    coded, _ = on_int8(params)
    plan = jlora.plan(fn, coded, *args, rank=2, targets="**")
    return wrap_random(coded, plan, **options), plan


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    """As on the array, under jit and op by op, under vmap and scan; never formed."""
    fn, params, x = CASES[name]
    tree, plan = wrapped(fn, params, x)
    assert {path: dataclasses.replace(s, bias=None) for path, s in plan.items()} == {
        path: dataclasses.replace(s, bias=None)
        for path, s in jlora.plan(fn, params, x, rank=2, targets="**").items()
    }
    assert any(is_int8(leaf.w) for leaf in adapted(tree).values())
    report = jlora.explain(fn, tree, x)
    assert {entry.status for entry in report} == {"factored"}
    halves = jax.tree.map(lambda x: x, jlora.partition(tree))
    weights = cotangents(jax.eval_shape(fn, based(jlora.unwrap(tree)), x))

    def theirs(trainable, x):
        return fn(by_hand(based(jlora.combine(trainable, halves[1])), plan), x)

    def ours(trainable, x):
        return jlora.lift(fn)(jlora.combine(trainable, halves[1]), x)

    def all_ways(call, trainable, x):
        def loss(trainable):
            out = call(trainable, x)
            return dot_with(weights, out), out

        found = {"grad": jax.grad(loss, has_aux=True)(trainable)}
        if name != "experts":  # JAX has no vmap of a ragged product
            mapped = jax.vmap(lambda x: call(trainable, x))
            two = jnp.stack([x, x[::-1]])
            found["scan of vmap"] = lax.scan(lambda c, x: (c, mapped(x)), 0, two[None])
        return found

    def both(trainable, x):
        return all_ways(ours, trainable, x), all_ways(theirs, trainable, x)

    got, want = quiet(jax.jit(both), halves[0], x)
    tol = 2e-2 if name == "half precision" else 1e-5
    for way in want:
        close(got[way], want[way], tol, way)
    close(quiet(ours, halves[0], x), want["grad"][1], tol, "op by op")


def test_what_has_no_low_rank_form_is_formed_of_it():
    def fn(p, x):
        return x @ jnp.abs(p["w"])

    coded, params = on_int8(W)
    plan = jlora.plan(fn, coded, X, rank=2, targets="w")
    tree = randomise(jlora.wrap(coded, plan=plan))
    assert [e.status for e in silent(jlora.explain, fn, tree, X)] == ["materialised"]
    got = silent(jlora.lift(fn), tree, X)
    close(got, fn(by_hand(based(tree), plan), X))


def test_wrap_merge_unwrap_count_and_the_adapter():
    coded, params = on_int8({"dense": {"kernel": normal(5, 7), "bias": normal(7)}})
    tree = randomise(jlora.wrap(coded, rank=2, bias="all"))
    leaf, plain = tree["dense"]["kernel"], params["dense"]["kernel"]
    assert leaf.w is coded["dense"]["kernel"]
    assert (leaf.shape, leaf.dtype, leaf.rank) == ((5, 7), jnp.float32, 2)
    assert jlora.unwrap(tree)["dense"]["kernel"] is coded["dense"]["kernel"]
    assert jlora.count(tree) == jlora.count(based(tree))
    assert str(jlora.summary(tree)) == str(jlora.summary(based(tree)))
    merged = jlora.merge(tree)["dense"]["kernel"]
    want = np.asarray(plain, np.float64) + np.asarray(leaf.scale, np.float64) * (
        np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    )
    close(merged, jnp.asarray(want, jnp.float32))
    adapter = jlora.adapter(tree)
    assert all(x.w is None for x in adapter.values())
    same(jlora.attach(coded, adapter), tree)
    trained = jlora.wrap(coded, rank=2, train="**/kernel", targets=[])
    same(trained["dense"]["kernel"].value, plain)


def test_a_stack_is_sliced_as_arrays_are():
    tree, _ = wrapped(layers, {"w": normal(3, 5, 5)}, X)
    one = jax.tree.map(lambda x: x[1], tree)["w"]
    same(one.w.array, based(tree)["w"].w[1])
    assert one.shape == (5, 5)

    def unrolled(tree, x):
        for k in range(3):
            layer = jax.tree.map(lambda x, k=k: x[k], tree)
            x = jnp.tanh(jlora.lift(lambda p, x: x @ p["w"])(layer, x))
        return x

    close(unrolled(tree, X), jlora.lift(layers)(tree, X))


def test_a_checkpoint_knows_it_by_shape_and_dtype(tmp_path):
    coded, params = on_int8(W)
    tree = randomise(jlora.wrap(coded, rank=2, targets="w"))
    jlora.checkpoint.save(tmp_path / "adapter", tree)
    same(jlora.checkpoint.restore(tmp_path / "adapter", coded), tree)
    # The adapter is one for any base of that shape and dtype.
    back = jlora.checkpoint.restore(tmp_path / "adapter", params)
    same(back, based(tree))
    other = {"w": Int8.of(normal(5, 8))}
    with pytest.raises(
        ValueError, match=r"expected float32\[5,7\], found float32\[5,8"
    ):
        jlora.checkpoint.restore(tmp_path / "adapter", other)


def test_fading_and_dropping():
    coded, _ = on_int8(W)
    tree = randomise(jlora.wrap(coded, rank=2, targets="w"))

    def fn(p, x):
        return x @ p["w"]

    faded = jlora.fade(tree, 0.25)
    close(jlora.lift(fn)(faded, X), jlora.lift(fn)(jlora.fade(based(tree), 0.25), X))
    key = jax.random.key(0)
    noisy, want = (
        jlora.fade(jlora.fade(t, 1.0, noise=1.0, key=key), 0.5, noise=1.0, key=key)
        for t in (tree, based(tree))
    )
    close(jlora.lift(fn)(noisy, X), jlora.lift(fn)(want, X))
    with pytest.raises(ValueError, match="has not faded"):
        jlora.drop_base(tree)
    gone = jlora.drop_base(jlora.fade(tree, 0.0))
    close(jlora.lift(fn)(gone, X), jlora.lift(fn)(jlora.fade(tree, 0.0), X))


def test_a_function_of_plain_params_reads_it_too():
    coded, params = on_int8(W)
    fn = jlora.lift(lambda p, x: x @ p["w"])
    close(fn(coded, X), fn(params, X))


def test_on_a_mesh():
    """In a shard_map each field is sharded with the axes that it has."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    coded, _ = on_int8({"w": normal(4, 6)})

    def fn(p, x):
        def body(w, x):
            return lax.psum(x @ w, "x")

        specs = (P("x", "y"), P(None, "x"))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(None, "y"))(
            p["w"], x
        )

    x = normal(11, 4, seed=1)
    plan = jlora.plan(fn, coded, x, rank=2)
    tree = randomise(jlora.wrap(coded, plan=plan))
    assert [e.status for e in jlora.explain(fn, tree, x)] == ["factored"]
    close(jax.jit(jlora.lift(fn))(tree, x), fn(by_hand(based(tree), plan), x))
    own = jlora.shardings(tree, {"w": P("x", "y")})["w"]
    assert (own.w.words, own.w.factor) == (P("x", "y"), P("x", None))
    assert (own.a, own.b) == (P("x", None), P(None, "y"))


def test_a_base_with_a_derivative_of_its_own():
    """A custom rule forbids functions that close over traced values."""
    coded = {"w": ByRule(normal(7, 5))}

    def fn(p, x):
        return jnp.tanh(x @ p["w"].T)

    plan = jlora.plan(fn, coded, X, rank=2)
    tree = randomise(jlora.wrap(coded, plan=plan))
    plain = {"w": dataclasses.replace(tree["w"], w=tree["w"].w.array)}

    def loss(tree, x):
        return jlora.lift(fn)(tree, x).sum()

    got, want = (jax.grad(loss, argnums=1)(t, X) for t in (tree, plain))
    close(got, want)
    with jax.checking_leaks():
        jax.jit(jlora.lift(fn))(tree, X)


def test_half_of_a_partition_is_without_its_base():
    coded, _ = on_int8(W)
    half, _ = jlora.partition(jlora.wrap(coded, rank=2, targets="w"))
    assert jlora.count(half) == (24, 24) and "trainable" in jlora.summary(half)
    assert jlora.shardings(half, {"w": P("x", None)})["w"].a == P("x", None)
    for call in (jlora.merge, lambda t: jlora.lift(lambda p, x: x @ p["w"])(t, X)):
        with pytest.raises(ValueError, match="w=None|lacks w"):
            call(half)


def test_shapes_alone_give_shapes():
    coded = jax.eval_shape(lambda: on_int8(W)[0])
    tree = jlora.wrap(coded, rank=2, targets="w")
    assert isinstance(tree["w"].a, jax.ShapeDtypeStruct)
    with pytest.raises(ValueError, match="has only shapes"):
        jlora.fade(tree, 0.5)
    with pytest.raises(ValueError, match="are not known here"):
        jlora.drop_base(tree)


def test_its_arrays_are_not_printed():
    coded, _ = on_int8(W)
    tree = jlora.wrap(coded, rank=2, targets="w")
    assert "w=Int8(int8[5,7], float32[5,1])" in repr(tree["w"])
    assert "'lora'" in repr(jlora.labels(jlora.fade(tree, 0.5)))


# ----------------------------------------------------------------------------- cost


def counts(loss, trainable, frozen, x):
    """FLOPs, bytes and temporaries of a compiled gradient, by XLA's own count."""
    lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen, x)
    compiled = lowered.compile(compiler_options=EMITTERS)
    counted = compiled.cost_analysis()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return counted["flops"], counted["bytes accessed"], temporaries


def test_the_interface_itself_costs_nothing():
    model, ids = models.Llama(64, 96, 64, 4, 2, 16, layers=3), integers(2, 33, below=64)
    params = jax.tree.map(
        lambda x: normal(*x.shape, dtype=x.dtype, scale=0.1), model.shapes()
    )
    plan = jlora.plan(model.loss, params, ids, rank=4, targets=models.LLAMA_TARGETS)

    def on(kind):
        leaves = [kind(x) if path in plan else x for path, x in flat(params)]
        base = jax.tree.unflatten(jax.tree.structure(params), leaves)
        halves = jlora.partition(jlora.wrap(base, plan=plan))

        def loss(trainable, frozen, ids):
            return jlora.lift(model.loss)(jlora.combine(trainable, frozen), ids)

        return counts(loss, *halves, ids)

    assert on(AsItIs) == pytest.approx(on(jnp.asarray), rel=0.01)


def test_a_base_costs_its_own_decoding_and_nothing_else():
    """As the same layers by hand, each with the very decoding at its product."""
    depth, params = 6, {f"w{k}": normal(64, 64, seed=k, scale=0.1) for k in range(6)}
    x, (coded, _) = normal(33, 64), on_int8(params)

    def fn(p, x):
        for k in range(depth):
            x = jnp.tanh(x @ p[f"w{k}"])
        return x.sum()

    def ours(trainable, frozen, x):
        return jlora.lift(fn)(jlora.combine(trainable, frozen), x)

    def by_hand(factors, rest, x):
        for k in range(depth):
            (a, b), (w, scale) = factors[f"w{k}"], rest[f"w{k}"]
            y = w.use(lambda w, x: x @ w, x)
            x = jnp.tanh(y + (x @ a) @ (scale * b))
        return x.sum()

    tree = jlora.wrap(coded, rank=4, targets="*")
    factors = {path: (x.a, x.b) for path, x in tree.items()}
    rest = {path: (x.w, x.scale) for path, x in tree.items()}
    mine = counts(ours, *jlora.partition(tree), x)
    assert mine == pytest.approx(counts(by_hand, factors, rest, x), rel=0.01)


def flat(params):
    return [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), x)
        for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
