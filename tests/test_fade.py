"""3L: fade, drop_base and their schedules.

The oracle of a faded weight is the formula in numpy's float64; that of its statistics
a confidence bound; that of a dropped base the tree whose base is zero.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    EMITTERS,
    adapted,
    close,
    integers,
    normal,
    primitives,
    randomise,
    same,
    says,
    silent,
)
from jax import lax

import jlora
import jlora.checkpoint
import jlora.linen
import jlora.schedules
from jlora.loralib import Blocks, Kernel

KEY = jax.random.key(5)
X = normal(11, 5)


def mlp(p, x):
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    return h @ p["down"]["kernel"] + p["down"]["bias"]


def mlp_params(sizes=(5, 13, 7)):
    a, b, c = sizes
    return {
        "up": {"kernel": normal(a, b) + 0.3, "bias": normal(b)},
        "down": {"kernel": normal(b, c) - 0.2, "bias": normal(c)},
    }


def stack(p, x):
    def layer(x, p):
        return jnp.tanh(x @ p["kernel"] + p["bias"]), None

    return lax.scan(layer, x, p)[0]


STACK = {"kernel": normal(3, 5, 5), "bias": normal(3, 5)}


def wrapped(fn, params, *args, **options):
    plan = jlora.plan(fn, params, *args, rank=2)
    return randomise(jlora.wrap(params, plan=plan, **options))


# ------------------------------------------------------------------------ the factor


@pytest.mark.parametrize("through", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("d", [0.0, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bases_and_their_biases_are_scaled(dtype, d, through):
    params = jax.tree.map(lambda x: x.astype(dtype), mlp_params())
    params["norm"] = jnp.ones(7)
    tree = jlora.wrap(params, rank=2)
    faded = through(jlora.fade)(tree, d)

    def scaled(x):  # rounded once, from float32
        return (np.asarray(x, np.float32) * np.float32(d)).astype(x.dtype)

    want = {
        **{k: jax.tree.map(scaled, params[k]) for k in ("up", "down")},
        "norm": params["norm"],
    }
    same(jlora.unwrap(faded), want)
    same(jlora.adapter(faded), jlora.adapter(tree))
    same(jlora.unwrap(tree), params)  # which stays as it is


def test_factor_one_without_noise_is_the_tree():
    tree = wrapped(mlp, mlp_params(), X)
    faded = jlora.fade(tree, 1.0)
    for path, leaf in adapted(tree).items():
        assert adapted(faded)[path].w is leaf.w
    traced = jax.jit(jlora.fade)(tree, 1.0)
    same(jlora.unwrap(traced), jlora.unwrap(tree))
    same(jlora.lift(mlp)(traced, X), jlora.lift(mlp)(tree, X))


def test_a_bias_that_trains_whole_is_left_to_training():
    tree = jlora.wrap(mlp_params(), rank=2, bias="lora_only")
    faded = jlora.fade(tree, 0.5)
    same(faded["up"]["bias"], tree["up"]["bias"])


def test_a_layer_fades_as_its_output_does():
    """d·(x·W + bias) + scale·(x·a)·b + scale·c, the whole of it."""
    params = {"kernel": normal(5, 7), "bias": normal(7)}
    fn = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731
    tree = wrapped(fn, params, X, lora_bias=True)
    leaf = tree["kernel"]
    want = 0.3 * fn(params, X) + leaf.scale * (X @ leaf.a @ leaf.b + leaf.c)
    close(jlora.lift(fn)(jlora.fade(tree, 0.3), X), want)


def test_a_step_trains_a_b_and_c_alone():
    tree = wrapped(mlp, mlp_params(), X, lora_bias=True)

    @functools.partial(jax.jit, static_argnames="noise")
    def grads(tree, d, noise):
        def loss(tree):
            faded = jlora.fade(tree, d, noise=noise, key=KEY)
            return (jlora.lift(mlp)(faded, X) ** 2).mean()

        return jax.grad(loss)(tree)

    for noise in (None, 1.0):
        found = grads(tree, 0.5, noise)
        for path, g in adapted(found).items():
            assert not np.any(g.w), path
            assert np.any(g.a) and np.any(g.b) and np.any(g.c)
        assert not np.any(found["up"]["bias"])
    want = jax.grad(lambda t: (jlora.lift(mlp)(jlora.fade(t, 0.5), X) ** 2).mean())
    close(adapted(grads(tree, 0.5, None)), adapted(want(tree)))


# ------------------------------------------------------------------------- the noise

# Standard errors that a statistic may be off: once in 10^9 by chance.
SURE = 6.2


def statistics(x, axes):
    x = np.asarray(x, np.float64)
    return x.mean(axes), x.std(axes)


@pytest.mark.parametrize("per", ["tensor", "output"])
@pytest.mark.parametrize(
    "shape, roles, kept",
    [
        ((96, 80), "io", {"tensor": (), "output": (1,)}),
        ((3, 64, 50), "bio", {"tensor": (0,), "output": (0, 2)}),
        ((64, 2, 50), "ioo", {"tensor": (), "output": (1, 2)}),
        ((50, 3, 64), "obi", {"tensor": (1,), "output": (1, 0)}),
    ],
)
def test_mean_and_spread_stay_over_the_whole_schedule(shape, roles, kept, per):
    """Within sampling error of the original's, and without noise they shrink.

    Each output has a mean and a spread of its own, far apart.
    """
    rng = np.random.default_rng(3)
    ones = [n if role != "i" else 1 for n, role in zip(shape, roles, strict=True)]
    w = rng.normal(size=shape) * rng.uniform(0.5, 2, ones) + rng.normal(size=ones)
    spec = jlora.Spec.of("dense", roles, 2)
    plan = jlora.Plan({"w": spec}, {"w": shape})
    tree = jlora.wrap({"w": jnp.asarray(w, jnp.float32)}, plan=plan)

    keep = kept[per]
    axes = tuple(k for k in range(len(shape)) if k not in keep)
    n = np.prod([shape[k] for k in axes])
    mean, std = statistics(w, axes)
    factor, noise = jlora.schedules.setting("compensate", 100)
    fade = jax.jit(functools.partial(jlora.fade, per=per))
    for step in range(0, 100, 7):
        key = jax.random.fold_in(KEY, step)
        d = factor(step)
        faded = fade(tree, d, noise=noise(step), key=key)
        m, s = statistics(faded["w"].w, axes)
        # The noise is what is sampled; it meets the weight by chance, too.
        drawn = np.sqrt(1 - float(d) ** 2) * std
        assert np.all(abs(m - mean) <= SURE * drawn / np.sqrt(n) + 1e-6)
        excess = SURE * np.sqrt(0.5 * drawn**4 + (float(d) * std * drawn) ** 2)
        assert np.all(abs(s - std) <= 1.5 * excess / std / np.sqrt(n) + 1e-6)
        if d < 0.5:
            without, shrunk = statistics(fade(tree, d)["w"].w, axes)
            close(jnp.asarray(shrunk), jnp.asarray(float(d) * std), 1e-5)
            close(jnp.asarray(without), jnp.asarray(float(d) * mean), 1e-5)


def test_noise_is_the_documents_distribution_times_the_multiplier():
    """The same draw: w' - d·w is the multiplier times N((1-d)·m, (1-d²)·δ²)."""
    params = {"kernel": normal(40, 30) * 2 + 1}
    tree, d = jlora.wrap(params, rank=2), 0.6
    w = np.asarray(params["kernel"], np.float64)
    one, half = (
        np.asarray(jlora.fade(tree, d, noise=k, key=KEY)["kernel"].w, np.float64)
        - d * w
        for k in (1.0, 0.5)
    )
    np.testing.assert_allclose(half, one / 2, atol=1e-6)
    z = (one - (1 - d) * w.mean()) / (np.sqrt(1 - d**2) * w.std())
    ordered, n = np.sort(z.ravel()), z.size
    normal_cdf = np.asarray(jax.scipy.stats.norm.cdf(ordered))
    distance = abs(normal_cdf - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / np.sqrt(n)  # Kolmogorov and Smirnov's at 0.1 %
    assert abs(np.corrcoef(z.ravel(), w.ravel())[0, 1]) < SURE / np.sqrt(n)


def test_noise_differs_by_key_and_by_leaf_and_is_the_same_under_jit():
    params = {"a": {"kernel": normal(8, 8)}, "b": {"kernel": normal(8, 8)}}
    tree = jlora.wrap(params, rank=2)
    faded = jlora.fade(tree, 0.5, noise=1.0, key=KEY)
    other = jlora.fade(tree, 0.5, noise=1.0, key=jax.random.key(6))
    assert np.all(faded["a"]["kernel"].w != faded["b"]["kernel"].w)
    assert np.all(faded["a"]["kernel"].w != other["a"]["kernel"].w)
    traced = jax.jit(jlora.fade)(tree, 0.5, noise=1.0, key=KEY)
    close(jlora.unwrap(traced), jlora.unwrap(faded))
    raw = jlora.fade(tree, 0.5, noise=1.0, key=jax.random.key_data(KEY))
    same(jlora.unwrap(raw), jlora.unwrap(faded))


def test_cleared_noise_is_zero_and_nothing_is_drawn():
    tree = wrapped(mlp, mlp_params(), X)
    factor, noise = jlora.schedules.setting("clear", 100)
    fade = jax.jit(jlora.fade)
    for step in range(100):
        if factor(step) < 0.2:
            faded = fade(tree, factor(step), noise=noise(step), key=KEY)
            same(jlora.unwrap(faded), jlora.unwrap(fade(tree, factor(step))))
    for path, leaf in adapted(faded).items():
        assert not np.any(leaf.w), path
    assert "random_bits" not in primitives(
        lambda t: jlora.fade(t, 0.5, noise=0.0), tree
    )
    assert "random_bits" not in primitives(lambda t: jlora.fade(t, 0.5), tree)


@pytest.mark.parametrize("per", ["tensor", "output"])
def test_statistics_are_computed_once_and_kept(per):
    """A first call with factor 1 leaves the weights, and spares steps a reduction."""
    tree = wrapped(stack, STACK, X)
    kept = jlora.fade(tree, 1.0, noise=1.0, per=per, key=KEY)
    axes = (1, 2) if per == "tensor" else (1,)
    mean, std = statistics(STACK["kernel"], axes)
    assert jlora.unwrap(kept)["kernel"] is tree["kernel"].w
    found = kept["kernel"].w
    np.testing.assert_allclose(found.mean.reshape(mean.shape), mean, atol=1e-6)
    np.testing.assert_allclose(found.std.reshape(std.shape), std, atol=1e-6)

    def step(t):
        return jlora.fade(t, 0.5, noise=1.0, per=per, key=KEY)

    assert "reduce_sum" in primitives(step, tree)
    assert "reduce_sum" not in primitives(step, kept)
    same(jlora.unwrap(step(kept)), jlora.unwrap(step(tree)))
    # They go where the stack goes, and not into adapters.
    one = jax.tree.map(lambda x: x[1], kept)["kernel"]
    assert one.w.mean.shape == found.mean.shape[1:]
    assert jlora.adapter(kept)["kernel"].w is None
    close(jlora.lift(stack)(kept, X), jlora.lift(stack)(tree, X))
    other = {"tensor": "output", "output": "tensor"}[per]
    again = jlora.fade(kept, 1.0, noise=1.0, per=other, key=KEY)["kernel"]
    assert again.w.mean.shape != found.mean.shape


def test_frameworks_own_trees():
    """A Linen model under nn.scan, and an NNX module, faded and dropped."""
    import flax.linen as nn
    from flax import nnx

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(5)(x)), None

    axes, rngs = {"params": 0}, {"params": True}
    model = nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=3)()
    variables = model.init(KEY, X, None)
    apply = model.apply
    tree = wrapped(apply, variables, X, None, lora_bias=True)
    faded = jlora.fade(tree, 0.0)
    close(
        jlora.lift(apply)(faded, X, None),
        jlora.lift(apply)(jlora.drop_base(faded), X, None),
    )

    module = jlora.wrap(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), rank=2, lora_bias=True)
    run = jlora.lift(lambda m, x: m(x))
    kept = jlora.fade(randomise(module), 1.0, noise=1.0, key=KEY)
    assert kept.kernel.get_raw_value().w.mean is not None
    half = jlora.fade(kept, 0.5, noise=1.0, key=KEY)
    gone = jlora.drop_base(jlora.fade(half, 0.0))
    close(run(gone, X), run(jlora.fade(half, 0.0), X))
    assert jlora.count(gone) == (5 * 2 + 2 * 7 + 7, 5 * 2 + 2 * 7 + 7 + 7)


# --------------------------------------------------------------------- dropped bases


def conv(p, x, **options):
    return lax.conv_general_dilated(
        x,
        p["kernel"],
        **{"window_strides": (1, 1), "padding": "SAME"} | options,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def tied(p, ids):
    h = jnp.tanh(p["embed"][ids]) @ p["w"]
    return h @ p["embed"].T


def qkv(p, x):
    q, v = jnp.split(x @ jnp.concatenate([p["q"], p["v"]], 1), 2, axis=-1)
    h = jax.checkpoint(lambda q: jnp.einsum("bi,iho->bho", q, p["h"].reshape(7, 2, 3)))
    return h(q * 2.0), (v @ p["v"].T), lax.cond(x[0, 0] > 0, lambda: v, lambda: -v)


def ragged(p, x):
    sizes = jnp.array([4, 0, 7])
    y = lax.ragged_dot(x, p["w"], sizes)
    return y + jnp.einsum("bi,bio->bo", x, jnp.take(p["w"], integers(11, below=3), 0))


def half(p, x):
    w = p["w"].astype(jnp.bfloat16)
    return (
        x.astype(jnp.bfloat16) @ (w * 0.5),
        x @ lax.optimization_barrier((p["w"], x))[0],
    )


DROPPED = {
    "mlp": (mlp, mlp_params(), X, {}),
    "scan": (stack, STACK, X, {}),
    "tied": (
        tied,
        {"embed": normal(13, 5), "w": normal(5, 5)},
        integers(11, below=13),
        {},
    ),
    "structure": (
        qkv,
        {"q": normal(5, 7), "v": normal(5, 7), "h": normal(7, 6)},
        X,
        {},
    ),
    "experts": (ragged, {"w": normal(3, 5, 7)}, X, {}),
    "half": (half, {"w": normal(5, 7)}, X, {}),
    "conv": (conv, {"kernel": normal(3, 3, 4, 6)}, normal(2, 6, 6, 4), {}),
    "groups": (
        functools.partial(conv, feature_group_count=2),
        {"kernel": normal(3, 3, 2, 6)},
        normal(2, 6, 6, 4),
        {},
    ),
    "blocks": (
        lambda p, x: x @ p["w"],
        {"w": normal(5, 6)},
        X,
        {"form": Blocks((True, False, True))},
    ),
    "loralib's conv": (
        conv,
        {"kernel": normal(3, 3, 4, 6)},
        normal(2, 6, 6, 4),
        {"form": Kernel()},
    ),
}


def dropping(name):
    fn, params, x, said = DROPPED[name]
    rules = [jlora.Rule("**", **said)] if said else []
    plan = jlora.plan(fn, params, x, rank=2, targets="**", rules=rules)
    tree = randomise(jlora.wrap(params, plan=plan))
    faded = jlora.fade(tree, 0.0)
    return fn, x, faded, jlora.drop_base(faded)


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_base_gives_the_bits_of_the_faded_one(name):
    """Op by op: what is left is s·(x·a)·b, and zeros no longer are added to it."""
    fn, x, faded, dropped = dropping(name)
    got = silent(jlora.lift(fn), dropped, x)
    want = silent(jlora.lift(fn), faded, x)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g, w)  # but for the sign of zero
    close(jax.jit(jlora.lift(fn))(dropped, x), want)


USES = "dot_general", "conv_general_dilated", "gather", "ragged_dot_general"


@pytest.mark.parametrize("name", DROPPED)
def test_no_product_of_a_dropped_base_is_left(name):
    """A lifted use is the base's and the factors' own; one use a weight is saved."""
    fn, x, faded, dropped = dropping(name)
    left, were, plain = (
        sum(p in USES for p in silent(primitives, f, tree, x))
        for f, tree in (
            (jlora.lift(fn), dropped),
            (jlora.lift(fn), faded),
            (fn, jlora.unwrap(faded)),
        )
    )
    # Of a kernel whose delta is formed there is one convolution, with the sum.
    assert left == were - (0 if name == "loralib's conv" else plain)
    assert all(isinstance(x.w, jlora.Dropped) for x in adapted(dropped).values())


@pytest.mark.parametrize("name", ["mlp", "scan", "tied", "conv", "experts"])
def test_gradients_of_a_dropped_base(name):
    fn, x, faded, dropped = dropping(name)

    def loss(trainable, frozen):
        out = jlora.lift(fn)(jlora.combine(trainable, frozen), x)
        return sum((y**2).sum() for y in jax.tree.leaves(out))

    got, want = (jax.grad(loss)(*jlora.partition(t)) for t in (dropped, faded))
    close(jax.tree.leaves(got), jax.tree.leaves(want))


def test_what_a_smaller_model_is(tmp_path):
    tree = wrapped(mlp, mlp_params(), X, lora_bias=True)
    dropped = jlora.drop_base(jlora.fade(tree, 0.0))
    size = 5 * 2 + 2 * 13 + 13 + 13 * 2 + 2 * 7 + 7
    assert jlora.count(dropped) == (size, size + 13 + 7)  # and the biases, faded
    assert jlora.count(tree)[1] - jlora.count(dropped)[1] == 5 * 13 + 13 * 7
    assert "dropped" in str(jlora.summary(dropped))
    assert {e.status for e in jlora.explain(mlp, dropped, X)} == {"factored"}

    # It merges to what it computes, in full size.
    close(mlp(jlora.merge(dropped), X), jlora.lift(mlp)(dropped, X))

    # It trains on, and is as it was after a round trip.
    tx = jlora.optimizer(optax.adam(0.1), dropped)
    grads = jax.grad(lambda t: (jlora.lift(mlp)(t, X) ** 2).mean())(dropped)
    updates, _ = tx.update(grads, tx.init(dropped), dropped)
    moved = optax.apply_updates(dropped, updates)
    assert jax.tree.structure(moved) == jax.tree.structure(dropped)
    assert np.any(adapted(moved)["up/kernel"].a != adapted(dropped)["up/kernel"].a)

    jlora.checkpoint.save(tmp_path / "adapter", moved)
    back = jlora.checkpoint.restore(tmp_path / "adapter", jlora.unwrap(moved))
    assert jax.tree.structure(back) == jax.tree.structure(moved)
    same(back, moved)
    same(jlora.attach(jlora.unwrap(moved), jlora.adapter(moved)), moved)
    assert jlora.unwrap(moved)["up"]["kernel"] == jax.ShapeDtypeStruct(
        (5, 13), jnp.float32
    )
    with pytest.raises(
        ValueError, match=r"at 'up/kernel' expected float32\[5,13\], found"
    ):
        other = {
            **mlp_params((5, 13, 7)),
            "up": {"kernel": normal(5, 11), "bias": normal(13)},
        }
        jlora.checkpoint.restore(tmp_path / "adapter", other)


def test_nothing_that_is_called_changes_what_trains():
    """No flags, no modes: compiling, training and merging leave the tree as it is.

    In Keras, where 3L was first written, flags came back after compiling, and merging
    was a side effect of leaving the training mode.
    """
    tree = wrapped(mlp, mlp_params(), X, lora_bias=True)
    before = jax.tree.map(np.asarray, tree)
    said = jax.tree.leaves(jlora.labels(tree))
    step = jax.jit(jax.grad(lambda t: (jlora.lift(mlp)(jlora.fade(t, 0.5), X)).sum()))
    for use in (step, jlora.merge, jlora.lift(lambda t: mlp(t, X)), jlora.unwrap):
        use(tree)
        assert jax.tree.leaves(jlora.labels(tree)) == said
        same(jax.tree.map(np.asarray, tree), before)


def test_a_dropped_model_is_restored_on_the_pretrained_params(tmp_path):
    """Whose biases have not faded."""
    params = mlp_params()
    tree = wrapped(mlp, params, X, lora_bias=True)
    dropped = jlora.drop_base(jlora.fade(tree, 0.0))
    jlora.checkpoint.save(tmp_path / "adapter", dropped)
    for back in (
        jlora.checkpoint.restore(tmp_path / "adapter", params),
        jlora.attach(params, jlora.adapter(dropped)),
    ):
        same(back, dropped)
        same(jlora.lift(mlp)(back, X), jlora.lift(mlp)(dropped, X))


def test_layers_that_read_their_base_refuse_to_lose_it():
    layer, x = jlora.linen.Dense(7, rank=2), normal(11, 5)
    variables = layer.init(KEY, x)
    tree = jlora.wrap({"params": variables["params"]}, rank=2)
    dropped = jlora.adapter(jlora.drop_base(tree, force=True))
    with pytest.raises(ValueError, match="'params/kernel' was dropped"):
        jlora.linen.attach(variables, dropped)


def test_adapters_from_elsewhere_know_the_bias_beside_their_weight():
    import jlora.loralib

    file = {"up.lora_A": normal(2, 5), "up.lora_B": normal(13, 2)}
    params = {"up": mlp_params()["up"]}
    for adapter in (jlora.loralib.load(file), jlora.loralib.load(file, params)):
        tree = jlora.attach(params, adapter)
        assert not np.any(jlora.fade(tree, 0.0)["up"]["bias"])


def test_the_noise_is_not_what_the_factors_began_with():
    """Both are drawn by key and path; here of one shape, from the same key."""
    key = jax.random.key(0)  # also wrap's
    spec = jlora.Spec.of("embed", "io", 8)
    plan = jlora.Plan({"w": spec}, {"w": (8, 64)})
    tree = jlora.wrap({"w": normal(8, 64)}, plan=plan)
    noise = jlora.fade(tree, 0.0, noise=1.0, key=key)["w"].w
    assert tree["w"].b.shape == noise.shape
    correlation = np.corrcoef(noise.ravel(), tree["w"].b.ravel())[0, 1]
    assert abs(correlation) < SURE / np.sqrt(noise.size)


def test_what_trains_whole_goes_without_its_base_too(tmp_path):
    params = mlp_params()
    tree = jlora.wrap(params, rank=2, targets="up/*", train="down/*")
    change = jax.tree.map(lambda x: x + 0.5, tree["down"]["kernel"].value)
    head = dataclasses.replace(tree["down"]["kernel"], value=change)
    tree = {**tree, "down": {**tree["down"], "kernel": head}}
    small = jlora.drop_base(jlora.fade(tree, 0.0))
    size = 2 * (5 + 13) + 13 + 13 * 7 + 7  # factors, the faded bias, and the head
    assert jlora.count(small) == (size - 13, size)
    for t in (small, jax.jit(lambda t: t)(small)):
        same(jlora.lift(mlp)(t, X), jlora.lift(mlp)(jlora.fade(tree, 0.0), X))
        assert t["down"]["kernel"].dtype == jnp.float32
    same(jlora.merge(small)["down"]["kernel"], head.value)
    path = tmp_path / "small"
    jlora.checkpoint.save(path, small)
    again = jlora.checkpoint.restore(path, params)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    jax.tree.map(same, again, small)


def test_dropped_leaves_slice_and_stack():
    dropped = jlora.drop_base(jlora.fade(wrapped(stack, STACK, X), 0.0))
    one = jax.tree.map(lambda x: x[1], dropped)
    assert one["kernel"].shape == (5, 5) and one["kernel"].dtype == jnp.float32

    def layers(tree, x):
        for i in range(3):
            p = jax.tree.map(lambda x: x[i], tree)  # noqa: B023
            x = jlora.lift(lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"]))(p, x)
        return x

    close(layers(dropped, X), jlora.lift(stack)(dropped, X))


# -------------------------------------------------------------------- what it costs


def test_a_fading_step_costs_no_product_and_little_else():
    """FLOPs that XLA counts at 1,024 tokens a step; the figures are in guides/fade.md.

    Normals are drawn once a weight, whatever the number of tokens.
    """
    n, depth = 128, 4
    params = {f"{i}": {"kernel": normal(n, n), "bias": normal(n)} for i in range(depth)}

    def model(p, x):
        for i in range(depth):
            x = jnp.tanh(x @ p[f"{i}"]["kernel"] + p[f"{i}"]["bias"])
        return x

    trainable, frozen = jlora.partition(jlora.wrap(params, rank=4))
    x = jax.ShapeDtypeStruct((1024, n), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def step(fade):
        def loss(trainable, frozen, x, *now):
            tree = fade(jlora.combine(trainable, frozen), *now)
            return (jlora.lift(model)(tree, x) ** 2).mean()

        run = jax.jit(jax.value_and_grad(loss))
        args = trainable, frozen, x, scalar, scalar, KEY
        dots = primitives(run, *args).count("dot_general")
        compiled = run.lower(*args).compile(compiler_options=EMITTERS)
        return compiled.cost_analysis()["flops"], dots

    plain, dots = step(lambda tree, *_: tree)
    decay, same_dots = step(lambda tree, d, *_: jlora.fade(tree, d))
    noisy, as_many = step(lambda tree, d, k, key: jlora.fade(tree, d, noise=k, key=key))
    assert dots == same_dots == as_many
    assert decay <= 1.002 * plain
    assert noisy <= 1.05 * plain


# ------------------------------------------------------------------------- schedules


def test_settings():
    for name, begin, end in (
        ("decay", 10, 90),
        ("compensate", 10, 90),
        ("clear", 5, 85),
    ):
        factor, noise = jlora.schedules.setting(name, 100)
        values = [float(factor(step)) for step in range(100)]
        want = np.clip((end - np.arange(100)) / (end - begin), 0, 1)
        np.testing.assert_allclose(values, want, atol=1e-6)
        assert values[: begin + 1] == [1.0] * (begin + 1)
        assert values[end:] == [0.0] * (100 - end)
        noises = [float(noise(step)) for step in range(100)]
        clear = np.where(np.asarray(values) < 0.2, 0.0, 1.0)
        want = {"decay": np.zeros(100), "compensate": np.ones(100), "clear": clear}
        assert noises == list(want[name])
        traced = jax.jit(lambda step: (factor(step), noise(step)))(50)  # noqa: B023
        close(traced, (jnp.float32(values[50]), jnp.float32(noises[50])))


# ------------------------------------------------------------------------- bad input


TREE = jlora.wrap(mlp_params(), rank=2)


@pytest.mark.parametrize(
    "call, parts",
    [
        (lambda: jlora.fade(TREE, 1.5), ["factor 1.5", "[0, 1]"]),
        (lambda: jlora.fade(TREE, -0.1), ["factor -0.1", "[0, 1]"]),
        (lambda: jlora.fade(TREE, jnp.nan), ["factor nan", "[0, 1]"]),
        (lambda: jlora.fade(TREE, jnp.ones(3)), ["factor", "a number in [0, 1]"]),
        (lambda: jax.jit(jlora.fade)(TREE, jnp.ones(3)), ["factor of shape (3,)"]),
        (lambda: jlora.fade(TREE, 0.5, noise=-1, key=KEY), ["noise -1", "[0, ∞)"]),
        (lambda: jlora.fade(TREE, 0.5, noise=1.0), ["noise without a key", "fold_in"]),
        (lambda: jlora.fade(TREE, 0.5, per="row"), ["per='row'", "'output'"]),
        (lambda: jlora.fade(TREE, 0.5, noise=jnp.inf, key=KEY), ["noise", "[0, ∞)"]),
        (
            lambda: jlora.fade(jlora.partition(TREE)[1], 0.5, noise=1.0, key=KEY),
            ["'down/kernel' has a=None, b=None"],
        ),
        (
            lambda: jlora.fade(jax.eval_shape(lambda: TREE), 0.5),
            ["only shapes", "eval_shape"],
        ),
        (lambda: jlora.fade(mlp_params(), 0.5), ["fade: the tree has no adapted leaf"]),
        (
            lambda: jlora.fade(jlora.adapter(TREE), 0.5),
            ["'down/kernel' has w=None", "whole adapted tree"],
        ),
        (
            lambda: jlora.fade(jlora.drop_base(jlora.fade(TREE, 0.0)), 0.5),
            ["the base of 'down/kernel' was dropped"],
        ),
        (
            lambda: jlora.drop_base(TREE),
            ["'down/kernel' has not faded", "up to 3.18", "force"],
        ),
        (lambda: jax.jit(jlora.drop_base)(TREE), ["not known here", "force=True"]),
        (lambda: jlora.drop_base(mlp_params()), ["drop_base: the tree has no adapted"]),
        (lambda: jlora.drop_base(jlora.adapter(TREE)), ["has w=None"]),
        (
            lambda: jlora.schedules.decay(100, 0.1, 1.0),
            ["ends at step 100", "after the last of 100"],
        ),
        (lambda: jlora.schedules.decay(100, 0.1, 1.2), ["ends at step 120"]),
        (lambda: jlora.schedules.decay(100, 0.9, 0.1), ["0 <= begin < end"]),
        (lambda: jlora.schedules.decay(1), ["ends at step 1, after"]),
        (lambda: jlora.schedules.decay(10, 0.5, 0.51), ["too few to decay"]),
        (lambda: jlora.schedules.clear(lambda s: s, 2), ["below 2", "(0, 1]"]),
        (lambda: jlora.schedules.setting("grow", 9), ["'grow'", "decay, compensate"]),
        (lambda: jlora.schedules.setting("clear", 1), ["1 steps", "enough to fade"]),
        (lambda: jlora.schedules.setting("decay", 10.5), ["10.5 steps", "whole"]),
        (
            lambda: jlora.drop_base(jlora.fade(TREE, jlora.schedules.decay(9)(5))),
            ["has not faded", "fade(tree, factor(step))"],
        ),
        (
            lambda: jlora.fade(
                jlora.linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 2))), 0.5
            ),
            ["'lora/kernel' has w=None", "jlora.linen.adapter(variables)"],
        ),
    ],
)
def test_bad_input(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    says(error, *parts)


@pytest.mark.parametrize("factor", [jlora.schedules.decay(10), None, "0.5"])
def test_a_factor_that_is_no_number(factor):
    with pytest.raises(
        TypeError, match=r"expected a number, such as .* schedule\(step"
    ):
        jlora.fade(TREE, factor)


def test_a_bias_that_has_not_faded():
    tree = jlora.fade(TREE, 0.0)
    tree["up"]["bias"] = jnp.ones(13)
    with pytest.raises(ValueError, match="the base of 'up/bias' has not faded"):
        jlora.drop_base(tree)


def test_a_base_may_be_dropped_by_force():
    dropped = jax.jit(functools.partial(jlora.drop_base, force=True))(TREE)
    assert jlora.count(dropped)[0] == jlora.count(TREE)[0]
    assert not np.any(dropped["up"]["bias"])
    assert "nan" in str(
        pytest.raises(
            ValueError,
            jlora.drop_base,
            jax.tree.map(lambda x: x * jnp.nan, TREE),
        ).value
    )


def test_a_slice_of_a_dropped_stack_is_as_a_layer_that_was_dropped():
    stacked = jlora.drop_base(jlora.fade(wrapped(stack, STACK, X), 0.0))
    one = jax.tree.map(lambda x: x[1], stacked)
    layer = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), STACK)
    layer = jlora.drop_base(jlora.wrap(layer, rank=2))
    both = jax.tree.map(lambda x, y: jnp.stack([x, y]), one, layer)
    assert both["kernel"].shape == (2, 5, 5)
    assert jlora.unwrap(both)["kernel"].shape == (2, 5, 5)
