"""DoRA, for every kind of weight: m * V / ‖V‖ for V = W + scale * a·b.

Against that formula on the dense matrix, with the norm detached.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    adapt,
    by_hand,
    check_lift,
    close,
    normal,
    primitives,
    randomise,
    same,
    says,
    silent,
)
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from uses import CASES, experts

import jlora
import jlora.checkpoint

MODES = "dense", "layers", "lookup and head", "conv in groups", "experts, all"


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    """With an output bias, which has no gain; without one in the layers."""
    fn, tree, x = CASES[name]
    tol = 3e-2 if name == "half precision" else 2e-5
    tree, plan = adapt(fn, tree, x, dora=True, lora_bias=name != "layers")
    if name.startswith("experts, "):
        tree, plan = experts(tree, plan)
    check_lift(fn, tree, plan, x, modes=name in MODES, tol=tol)
    close(silent(jlora.merge, tree), by_hand(tree, plan), tol)


def test_at_the_start_no_bit_changes():
    for name in ("dense", "heads", "conv in groups", "lookup", "layers"):
        fn, base, x = CASES[name]
        plan = jlora.plan(fn, base, x, targets="w")
        tree = jlora.wrap(base, plan=plan, dora=True)
        same(jlora.lift(fn)(tree, x), fn(base, x))
        np.testing.assert_allclose(
            tree["w"].m, magnitude(base["w"], plan["w"]), rtol=1e-6
        )


def magnitude(w, spec):
    return np.sqrt((np.asarray(w, np.float64) ** 2).sum(spec.in_axes))


# ------------------------------------------------------------ together with the rest

FN, BASE, X = CASES["dense"]


def tree_of(**options):
    return adapt(FN, BASE, X, dora=True, **options)[0]


def test_the_norm_has_no_gradient_and_the_magnitude_has():
    tree, plan = adapt(FN, BASE, X, dora=True)
    grads = jax.grad(lambda t: (jlora.lift(FN)(t, X) ** 2).sum())(tree)

    def norm_differentiated(a):
        leaf = dataclasses.replace(tree["w"], a=a)
        v = leaf.w + leaf.scale * leaf.a @ leaf.b
        w = leaf.m * v / jnp.linalg.norm(v, axis=0)
        return (FN({**tree, "w": w}, X) ** 2).sum()

    other = jax.grad(norm_differentiated)(tree["w"].a)
    assert np.abs(grads["w"].a - other).max() > 0.1  # so the tables above can fail
    assert np.abs(grads["w"].m).min() > 0


def test_rslora_divides_by_the_root_of_the_rank():
    tree = jlora.wrap(BASE, 9, alpha=6, targets="w", dora=True, rslora=True)
    assert float(tree["w"].scale) == 2.0
    rule = jlora.Rule("w", rank=16, alpha=4, rslora=True)
    assert float(jlora.wrap(BASE, rules=[rule])["w"].scale) == 1.0
    off = jlora.Rule("w", rslora=False, dora=False)
    plain = jlora.wrap(BASE, 4, alpha=8, rules=[off], rslora=True, dora=True)["w"]
    assert float(plain.scale) == 2.0 and plain.m is None


def test_dropout_drops_what_enters_the_factors_alone():
    tree = jlora.dropout(tree_of(), 0.5, jax.random.key(0))
    leaf = tree["w"]
    plain = {**tree, "w": dataclasses.replace(leaf, m=None)}  # with the same mask
    v = leaf.w + leaf.scale * leaf.a @ leaf.b
    gain = leaf.m / jnp.linalg.norm(v, axis=0)
    want = (jlora.lift(FN)(plain, X) - tree["bias"]) * gain + tree["bias"]
    close(jlora.lift(FN)(tree, X), want)
    assert np.abs(want - FN(jlora.merge(tree), X)).max() > 0.1


def test_a_scale_of_zero_turns_the_magnitude_off_as_well():
    for name in ("dense", "layers"):
        fn, base, x = CASES[name]
        tree = jlora.scaled(adapt(fn, base, x, dora=True)[0], 0.0)
        same(jlora.lift(fn)(tree, x), fn(base, x))
        same(jlora.merge(tree), base)


def test_fade_and_drop_base():
    tree = tree_of()
    for d in (0.7, 0.0):
        faded = jlora.fade(tree, d)
        leaf = faded["w"]
        v = d * tree["w"].w + leaf.scale * leaf.a @ leaf.b
        want = leaf.m * v / jnp.linalg.norm(v, axis=0)
        close(jlora.lift(FN)(faded, X), X @ want + faded["bias"])
        close(jlora.merge(faded)["w"], want)
    small = jlora.drop_base(faded)
    close(jlora.lift(FN)(small, X), jlora.lift(FN)(faded, X))
    close(jlora.merge(small)["w"], want)


def test_noise_keeps_the_norm_of_what_is_used():
    noisy = jlora.fade(tree_of(), 0.5, noise=1.0, key=jax.random.key(1))
    close(jlora.lift(FN)(noisy, X), FN(jlora.merge(noisy), X))
    w = jlora.merge(noisy)["w"]
    close(jnp.linalg.norm(w, axis=0), jnp.abs(noisy["w"].m))


def test_outputs_of_zeros_stay_and_learn():
    """An unused output, as a padded vocabulary has: its norm is zero."""
    base = {**BASE, "w": BASE["w"].at[:, 3].set(0)}
    tree = jlora.wrap(base, 2, targets="w", dora=True)
    close(jlora.lift(FN)(tree, X), FN(base, X))
    close(jlora.merge(tree)["w"], base["w"])
    grads = jax.grad(lambda t: (jlora.lift(FN)(t, X) ** 2).sum())(tree)["w"]
    assert all(np.isfinite(x).all() for x in (grads.a, grads.b, grads.m))
    assert np.abs(grads.b[:, 3]).max() > 0


def test_what_is_returned_has_its_magnitude():
    tree = tree_of()
    back = jax.jit(jlora.lift(lambda p, x: (p, x @ p["w"])))(tree, X)[0]
    same(back["w"].m, tree["w"].m)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    both = jlora.lift(lambda p, q, x: (q, p, x @ p["w"] + x @ q["w"]))
    other = jlora.scaled(tree_of(seed=3), 2.0)
    swapped = both(tree, other, X)
    same(swapped[0]["w"].m, other["w"].m)
    same(swapped[1]["w"].m, tree["w"].m)
    half = jlora.lift(lambda p, x: p["w"][:, :4])(tree, X)  # a leaf with a gain
    close(jlora.merge({"w": half})["w"], jlora.merge(tree)["w"][:, :4])


def test_it_trains_counts_is_saved_and_cannot_be_subtracted(tmp_path):
    fn, base, x = CASES["heads"]
    tree, plan = adapt(fn, base, x, dora=True)
    size = 3 * 5 + 3 * 14 + 14
    assert jlora.count({"w": tree["w"]})[0] == size
    assert jlora.labels(tree)["w"].m == "lora"
    assert "ioo, m" in str(jlora.summary(tree))
    rules = [jlora.Rule("w", dora=True, rslora=True, rank=3)]
    planned = jlora.plan(fn, base, x, rules=rules)
    assert planned["w"].size((5, 2, 7)) == size and "rslora, dora" in str(planned)

    grads = jax.grad(lambda t: (jlora.lift(fn)(t, x) ** 2).sum())(tree)
    tx = jlora.optimizer(optax.sgd(0.01), tree)
    moved = optax.apply_updates(tree, tx.update(grads, tx.init(tree), tree)[0])
    close(moved["w"].m, tree["w"].m - 0.01 * grads["w"].m)
    jlora.checkpoint.save(tmp_path / "adapter", moved)
    back = jlora.checkpoint.restore(tmp_path / "adapter", base)
    same(jlora.adapter(back), jlora.adapter(moved))
    same(jlora.merge(back), jlora.merge(moved))
    with pytest.raises(ValueError) as error:
        jlora.unmerge(jlora.merge(moved), jlora.adapter(moved))
    says(error, "'w' has a magnitude", "jlora.unwrap")


@pytest.mark.parametrize(
    "spec, sums", [(P(None, "d"), False), (P("d"), True)], ids=["out", "in"]
)
def test_shards(spec, sums):
    """Split along out or in axes: lifted outside of shard_map, and inside of it."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    base, x = {"w": normal(6, 10)}, normal(8, 6)
    tree = adapt(lambda p, x: x @ p["w"], base, x, dora=True)[0]

    def product(p, x):
        y = x @ p["w"]
        return lax.psum(y, "d") if sums else y

    specs = {"in_specs": ({"w": spec}, P(None, "d") if sums else P())}
    specs["out_specs"] = P() if sums else P(None, "d")
    outside = jlora.lift(jax.shard_map(product, mesh=mesh, **specs))
    want = x @ jlora.merge(tree)["w"]
    close(outside(tree, x), want)
    own = jlora.shardings(tree, {"w": spec})
    specs["in_specs"] = (own, specs["in_specs"][1])
    close(jax.shard_map(jlora.lift(product), mesh=mesh, **specs)(tree, x), want)

    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), tree, own
    )
    close(jax.jit(jlora.lift(lambda p, x: x @ p["w"]))(placed, x), want)
    close(jlora.merge(placed)["w"], jlora.merge(tree)["w"])
    wrapped = jlora.wrap({"w": placed["w"].w}, 2, targets="w", dora=True)
    assert wrapped["w"].m.sharding.spec == own["w"].m
    close(wrapped["w"].m, jnp.linalg.norm(base["w"], axis=0))


def test_explicit_meshes():
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    base, x = {"w": normal(6, 10), "v": normal(10, 6)}, normal(8, 6)

    def fn(p, x):
        x = jnp.tanh(x @ p["w"]) @ p["v"]
        return x @ p["v"].T

    tree = adapt(fn, base, x, dora=True)[0]
    want = fn(jlora.merge(tree), x)
    own = jlora.shardings(tree, {"w": P(None, "t"), "v": P(None, None)})
    put = lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s))  # noqa: E731
    with jax.set_mesh(mesh):
        y = jax.jit(jlora.lift(fn))(jax.tree.map(put, tree, own), put(x, P("d")))
    close(jax.device_get(y), want)


def test_many_layers_compute_one_norm_each():
    """Once for each leaf and call, however often the weight is used."""

    def fn(p, x):
        for _ in range(3):
            x = jnp.tanh(x @ p["w"] @ p["w"].T)
        return x

    tree = adapt(fn, {"w": normal(5, 7)}, X, dora=True)[0]
    assert primitives(jlora.lift(fn), tree, X).count("sqrt") == 1


def test_a_leaf_that_a_function_changes_keeps_its_magnitude():
    """What comes out of the lift is whole: its adapter fits its own base."""
    tree = randomise(jlora.wrap({"w": normal(6, 8)}, 2, targets="w", dora=True))
    turned = jlora.lift(lambda p: {"w": p["w"].T})(tree)
    assert turned["w"].gain is None
    close(jlora.merge(turned)["w"], jlora.merge(tree)["w"].T)
    again = jlora.attach(jlora.unwrap(turned), jlora.adapter(turned))
    close(jlora.merge(again)["w"], jlora.merge(tree)["w"].T)
