"""lora_bias: a trainable output bias of the low-rank branch, for every kind of weight.

Against the dense matrix and the layer's own bias with scale * c added to it, which is
also what merging makes of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    adapt,
    adapted,
    by_hand,
    check_lift,
    close,
    normal,
    randomise,
    same,
    says,
    silent,
)
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from uses import CASES, IDS, IMAGE, NHWC, X, conv, experts, params

import jlora
import jlora.checkpoint
import jlora.linen
import jlora.nnx
from jlora.loralib import Blocks, Kernel


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    fn, tree, x = CASES[name]
    rounding = 2e-2 if name == "half precision" else 1e-5
    tree, plan = adapt(fn, tree, x, lora_bias=True)
    if name.startswith("experts, "):
        tree, plan = experts(tree, plan)
    modes = name in ("dense", "layers", "lookup and head", "conv in groups", "fused")
    check_lift(fn, tree, plan, x, modes=modes, tol=rounding, eager=name == "dense")
    merged = silent(jlora.merge, tree)
    close(merged, by_hand(tree, plan), rounding)
    assert all(leaf.c.dtype == jnp.float32 for leaf in adapted(tree).values())


@pytest.mark.parametrize(
    "form, shape, x",
    [
        (Blocks((True, False, True)), (5, 6), X),
        (Kernel(), (3, 3, 4, 6), IMAGE),
        (Kernel(groups=2), (3, 3, 2, 6), IMAGE),
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_forms_of_loralib(form, shape, x, rate):
    groups = getattr(form, "groups", 1)
    fn = conv(NHWC, feature_group_count=groups) if x is IMAGE else CASES["dense"][0]
    base = params(shape, 6)
    plan = jlora.plan(fn, base, x, rank=2, rules=[jlora.Rule("w", form=form)])
    tree = randomise(jlora.wrap(base, plan=plan, lora_bias=True))
    c, scale = tree["w"].c, tree["w"].scale
    assert c.shape == (6,)
    bare = {**tree, "w": dataclasses.replace(tree["w"], c=None)}
    drop = (
        (lambda t: jlora.dropout(t, rate, jax.random.key(0))) if rate else lambda t: t
    )
    close(jlora.lift(fn)(drop(tree), x), jlora.lift(fn)(drop(bare), x) + scale * c)
    close(jlora.merge(tree)["bias"], base["bias"] + scale * c)


def test_at_the_start_no_bit_changes():
    for name in ("dense", "conv in groups", "lookup"):
        fn, base, x = CASES[name]
        plan = jlora.plan(fn, base, x, targets="w")
        tree = jlora.wrap(base, plan=plan, lora_bias=True)
        assert not np.any(tree["w"].c)
        same(jlora.lift(fn)(tree, x), fn(base, x))


def test_scale_zero_turns_it_off_and_unmerge_takes_it_out():
    fn, base, x = CASES["dense"]
    tree, _ = adapt(fn, base, x, lora_bias=True)
    close(jlora.lift(fn)(jlora.scaled(tree, 0.0), x), fn(base, x))
    close(jlora.unmerge(jlora.merge(tree), jlora.adapter(tree)), base)


def test_it_trains_counts_and_is_saved(tmp_path):
    fn, base, x = CASES["heads"]
    rule = jlora.Rule("w", lora_bias=True)
    plan = jlora.plan(fn, base, x, rank=2, rules=[rule])
    tree = jlora.wrap(base, plan=plan)
    size = 5 * 2 + 2 * 2 * 7
    assert jlora.count(tree)[0] == size + 14 == plan["w"].size((5, 2, 7))
    assert f"{size + 14:,} adapter parameters" in str(plan)
    assert jlora.labels(tree)["w"].c == "lora"
    assert jlora.partition(tree)[0]["w"].c is tree["w"].c

    grads = jax.grad(lambda t: (jlora.lift(fn)(t, x) ** 2).sum())(tree)
    tx = jlora.optimizer(optax.sgd(0.1), tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    moved = optax.apply_updates(tree, updates)
    close(moved["w"].c, -0.1 * grads["w"].c)
    same(jlora.unwrap(moved), base)

    jlora.checkpoint.save(tmp_path / "adapter", moved)
    back = jlora.checkpoint.restore(tmp_path / "adapter", base)
    same(jlora.adapter(back), jlora.adapter(moved))
    assert jax.tree.structure(back) == jax.tree.structure(moved)


def test_who_has_one():
    base = {"a": params((5, 7), 7), "b": params((5, 7), 7)}

    def fn(p, x):
        return x @ p["a"]["w"] + p["a"]["bias"] + x @ p["b"]["w"] + p["b"]["bias"]

    def having(rules=(), **said):
        tree = jlora.wrap(base, plan=jlora.plan(fn, base, X, rules=rules), **said)
        return [path for path, leaf in adapted(tree).items() if leaf.c is not None]

    not_a, only_a = (jlora.Rule("a/w", lora_bias=flag) for flag in (False, True))
    assert having() == []
    assert having([only_a]) == ["a/w"]
    assert having(lora_bias=True) == ["a/w", "b/w"]
    assert having([not_a], lora_bias=True) == ["b/w"]


def test_abstract_and_stacked_leaves():
    shapes = jax.eval_shape(lambda: params((3, 5, 7), 3, 7))
    fn = lambda p, x: jnp.einsum("bei,eio->beo", x, p["w"]) + p["bias"]  # noqa: E731
    plan = jlora.plan(fn, shapes, jax.ShapeDtypeStruct((2, 3, 5), jnp.float32))
    tree = jlora.wrap(shapes, plan=plan, lora_bias=True)
    assert tree["w"].c == jax.ShapeDtypeStruct((3, 7), jnp.float32)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
    assert one["w"].c.shape == (7,) and one["w"].axes == "io"


def test_a_bias_elsewhere_is_found_from_the_weight():
    base = {"weights": {"up": normal(5, 7)}, "offsets": {"up": normal(7)}}

    def fn(p, x):
        return x @ p["weights"]["up"] + p["offsets"]["up"]

    tree, plan = adapt(fn, base, X, lora_bias=True)
    assert plan["weights/up"].bias == "offsets/up"
    check_lift(fn, tree, plan, X)
    nested = jlora.merge({"params": tree})["params"]  # wherever the tree stands
    close(nested, by_hand(tree, plan))


# ------------------------------------------------- in the bias, wherever that is used

DENSE = params((5, 7), 7)


@pytest.mark.parametrize(
    "fn, shape, x",
    [
        (lambda p, x: jnp.tanh(x @ p["w"]) + p["bias"], (7,), X),
        (lambda p, x: (x @ p["w"]) * 0.5 + 2 * p["bias"], (7,), X),
        (lambda p, x: x @ p["w"] + x @ jnp.sin(p["w"]) + p["bias"], (7,), X),
        (lambda p, x: x[:, :2] @ p["w"][:2] + p["bias"], (7,), X),
        (lambda p, x: x @ p["w"][:, IDS % 7] + p["bias"][IDS % 7], (7,), X),
        (
            lambda p, x: jax.jvp(lambda x: x @ p["w"] + p["bias"], (x,), (x,)),
            (7,),
            X,
        ),
    ],
    ids=["later", "scaled", "formed", "some inputs", "some outputs", "tangent"],
)
def test_lift_and_merge_agree_whatever_the_layer_does(fn, shape, x):
    base = {"w": normal(5, 7), "bias": normal(*shape)}
    specs = {"w": jlora.Spec.of("dense", "io", 2, None, "bias")}
    plan = jlora.Plan(specs, {"w": (5, 7), "bias": shape})
    tree = randomise(jlora.wrap(base, plan=plan, lora_bias=True))

    def loss(call, trainable, frozen):
        out = silent(call, jlora.combine(trainable, frozen), x)
        return sum((y**2).sum() for y in jax.tree.leaves(out)), out

    halves = jlora.partition(tree)
    got, want = (
        jax.value_and_grad(lambda t, f: loss(call, t, f), has_aux=True)(*halves)  # noqa: B023
        for call in (jlora.lift(fn), lambda t, x: fn(jlora.merge(t), x))
    )
    close(got, want)


def test_a_row_parallel_layer_adds_it_once():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    part = jax.shard_map(
        lambda x, w: lax.psum(x @ w, "d"),
        mesh=mesh,
        in_specs=(P(None, "d"), P("d")),
        out_specs=P(),
    )

    def fn(p, x):
        return part(x, p["w"]) + p["bias"]

    tree, plan = adapt(fn, params((6, 10), 10), normal(8, 6), lora_bias=True)
    check_lift(fn, tree, plan, normal(8, 6), modes=False)
    bare = {"w": tree["w"], "b": jnp.zeros(10)}  # without a bias that could take it
    with pytest.raises(ValueError, match="output bias has no place"):
        jlora.lift(lambda p, x: part(x, p["w"]))(bare, normal(8, 6))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_products_that_add_it_themselves_on_a_mesh(kind):
    """Fully sharded by hand, and activations that are sharded by their type."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    base, x = {"w": normal(6, 10)}, normal(8, 6)
    tree = randomise(jlora.wrap(base, rank=2, targets="w", lora_bias=True))
    leaf = tree["w"]
    want = x @ (leaf.w + leaf.scale * leaf.a @ leaf.b) + leaf.scale * leaf.c

    def fn(p, x):
        if kind == AxisType.Explicit:
            return x @ p["w"]
        body = lambda x, w: x @ lax.all_gather(w, "d", axis=1, tiled=True)  # noqa: E731
        specs = P("d"), P(None, "d")
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("d"))(
            x, p["w"]
        )

    with jax.set_mesh(mesh):
        y = jlora.lift(fn)(tree, jax.device_put(x, jax.NamedSharding(mesh, P("d"))))
    close(jax.device_get(y), jax.device_get(want))


@pytest.mark.parametrize(
    "fn, want",
    [
        pytest.param(
            lambda p, x: jax.nn.gelu(x @ p["w"]) @ p["v"] + p["bias"], None, id="of-v"
        ),
        pytest.param(lambda p, x: (x + p["bias"]) @ p["w"], None, id="before"),
        pytest.param(lambda p, x: x @ p["w"] * p["bias"], None, id="a-factor"),
        pytest.param(lambda p, x: x @ p["w"], None, id="never-read"),
        pytest.param(lambda p, x: x @ p["w"] + p["bias"], "bias", id="added"),
        pytest.param(
            lambda p, x: (x @ p["w"]) * p["g"] + p["bias"], "bias", id="after-a-factor"
        ),
        pytest.param(
            lambda p, x: jax.nn.standardize(x @ p["w"]) + p["bias"], "bias", id="norm"
        ),
    ],
)
def test_a_bias_is_what_was_seen_and_its_name_only_where_that_may_be(fn, want):
    base = {**{"w": normal(5, 5), "v": normal(5, 5), "bias": normal(5), "g": normal(5)}}
    plan = jlora.plan(fn, base, X, targets="w")
    assert plan["w"].bias == want
    tree = randomise(jlora.wrap(base, plan=plan))
    assert np.any(jlora.fade(tree, 0.0)["bias"]) == (want is None)
    again = jlora.attach(base, jlora.adapter(tree))  # which knows no more
    assert np.any(jlora.fade(again, 0.0)["bias"]) == (want is None)


def test_a_bias_that_was_seen_of_several_weights_is_that_of_each():
    """Of a fused product with one bias, and of two layers that share theirs."""

    def fused(p, x):
        return x @ jnp.concatenate([p["q"], p["k"]], 1) + p["shift"]

    def shared(p, x):
        return jnp.tanh(x @ p["q"] + p["shift"]) @ p["k"] + p["shift"]

    for fn, size in ((fused, 10), (shared, 5)):
        base = {"q": normal(5, 5), "k": normal(5, 5), "shift": normal(size)}
        plan = jlora.plan(fn, base, X)
        assert {path: spec.bias for path, spec in plan.items()} == {
            "q": "shift",
            "k": "shift",
        }
        assert not np.any(jlora.fade(jlora.wrap(base, plan=plan), 0.0)["shift"])


def test_an_indexed_stack_of_biases_is_of_its_weights():
    def fn(p, x):
        def layer(i, x):
            q = jax.tree.map(lambda a: a[i], p)
            return jnp.tanh(x @ q["w"] + q["bias"])

        return lax.fori_loop(0, 3, layer, x)

    base = params((3, 5, 5), 3, 5)
    plan = jlora.plan(fn, base, X)
    assert list(plan) == ["w"] and plan["w"].bias == "bias"
    tree = randomise(jlora.wrap(base, plan=plan, lora_bias=True))
    close(jlora.lift(fn)(tree, X), fn(jlora.merge(tree), X))
    assert not np.any(jlora.fade(tree, 0.0)["bias"])


def test_a_bias_that_trains_whole_takes_it_and_is_rounded_once():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DENSE)
    plan = jlora.plan(CASES["dense"][0], base, X)
    tree = randomise(jlora.wrap(base, plan=plan, bias="all", lora_bias=True))
    w = tree["w"]
    want = (tree["bias"].value + w.scale * w.c).astype(jnp.bfloat16)
    same(jlora.merge(tree)["bias"], want)
    close(jlora.lift(lambda p, x: p["bias"] * 1)(tree, X), want)


# ------------------------------------------------------------------------- bad input


def test_a_layer_without_a_bias_cannot_be_merged():
    base = {"layer": {"kernel": normal(5, 7)}}
    tree = jlora.wrap(base, rank=2, lora_bias=True)
    y = jlora.lift(lambda p, x: x @ p["layer"]["kernel"])(tree, X)
    close(y, X @ base["layer"]["kernel"])
    for use in (jlora.merge, lambda t: jlora.unmerge(base, jlora.adapter(t))):
        with pytest.raises(ValueError) as error:
            use(tree)
        says(error, "'layer/kernel' has an output bias", "no bias", "bias of zeros")


def test_a_bias_of_another_shape():
    base = {"kernel": normal(5, 7), "bias": normal(1)}
    tree = jlora.wrap(base, rank=2, lora_bias=True)
    with pytest.raises(
        ValueError, match=r"'kernel' has .*'bias' has shape \(1,\).* \(7,\)"
    ):
        jlora.merge(tree)


@pytest.mark.parametrize(
    "fn, shape",
    [
        (lambda p, x: x @ jnp.sin(p["w"]), (5, 7)),
        (lambda p, x: x[:, :2] @ p["w"][:2], (5, 7)),
        (lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]).sum(1), (5, 2, 7)),
    ],
    ids=["formed", "some inputs", "partly contracted"],
)
def test_uses_where_it_has_no_place(fn, shape):
    spec = jlora.Spec.of("dense", "io" if len(shape) == 2 else "iio", 2, None)
    specs = {"w": dataclasses.replace(spec, lora_bias=True)}
    tree = jlora.wrap({"w": normal(*shape)}, plan=jlora.Plan(specs, {"w": shape}))
    for call in (jlora.lift(fn), jax.jit(jlora.lift(fn))):
        with pytest.raises(ValueError) as error:
            call(tree, X)
        says(error, "'w' is used by", "output bias has no place", "lora_bias=False")


def test_an_output_bias_that_does_not_fit():
    tree = jlora.wrap(params((5, 7), 7), rank=2, targets="w", lora_bias=True)
    adapter = {"w": dataclasses.replace(jlora.adapter(tree)["w"], c=jnp.zeros(5))}
    with pytest.raises(ValueError, match=r"'w' has c of shape \(5,\): expected \(7,\)"):
        jlora.attach(params((5, 7), 7), adapter)


@pytest.mark.parametrize(
    "use",
    [
        lambda: jlora.wrap(DENSE, targets="w", lora_bias="no"),
        lambda: jlora.Rule("w", lora_bias="yes"),
    ],
)
def test_an_option_that_is_no_boolean(use):
    with pytest.raises(TypeError, match="lora_bias 'no'|lora_bias 'yes'"):
        use()


def test_the_layers_have_none():
    from flax import nnx

    layer = jlora.nnx.Linear(5, 7, rank=2, rngs=nnx.Rngs(0))
    tree = jlora.wrap(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), rank=2, lora_bias=True)
    with pytest.raises(ValueError, match="'kernel' .* has an output bias"):
        jlora.nnx.attach(layer, jlora.adapter(tree))
