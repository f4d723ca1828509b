"""LoRA+, Riemannian preconditioning and LoRA-FA: against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import adapted, close, normal, randomise, same, says
from jax import lax

import jlora
from jlora.loralib import Blocks, Kernel

X = normal(11, 5)


def layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def conv(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=dims)


# A function, its weight, an input, and the form.
CASES = {
    "dense": (lambda p, x: x @ p["w"], (5, 7), X, None),
    "heads": (lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]), (5, 2, 7), X, None),
    "stack": (layers, (3, 5, 5), X, None),
    "conv": (conv, (3, 3, 4, 6), normal(2, 6, 6, 4), None),
    "blocks": (lambda p, x: x @ p["w"], (5, 6), X, Blocks((True, False, True))),
    "kernel": (conv, (3, 3, 4, 6), normal(2, 6, 6, 4), Kernel()),
}


def setup(name, **options):
    fn, shape, x, form = CASES[name]
    base = {"w": normal(*shape, scale=0.5)}
    rules = [jlora.Rule("w", rank=2, alpha=6, form=form)]
    plan = jlora.plan(fn, base, x, rules=rules)
    tree = randomise(jlora.wrap(base, plan=plan, **options), scale=name != "blocks")
    grads = jax.grad(lambda t: (jlora.lift(fn)(t, x) ** 2).sum())(tree)
    return tree, grads


def update(tx, tree, grads):
    tx = jlora.optimizer(tx, tree)
    return jax.jit(tx.update)(grads, tx.init(tree), tree)[0]["w"]


def matrices(name, a, b):
    """Stacks of (in, r) and (r, out), in float64."""
    n = {"stack": 1, "blocks": 1}.get(name, 0)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (
        a.reshape(*a.shape[:n], -1, a.shape[-1]),
        b.reshape(*b.shape[:n], b.shape[n], -1),
    )


@pytest.mark.parametrize("reg", [1e-6, 1e-2])
@pytest.mark.parametrize("name", CASES)
def test_riemannian(name, reg):
    tree, grads = setup(name, lora_bias=name != "kernel")
    got = update(optax.chain(jlora.riemannian(tree, reg), optax.sgd(1.0)), tree, grads)
    (a, b), (ga, gb) = (matrices(name, t["w"].a, t["w"].b) for t in (tree, grads))
    eye = reg * np.eye(a.shape[-1])
    want_a = ga @ np.linalg.inv(b @ np.swapaxes(b, -1, -2) + eye)
    want_b = np.linalg.inv(np.swapaxes(a, -1, -2) @ a + eye) @ gb
    for found, want in ((got.a, want_a), (got.b, want_b)):
        np.testing.assert_allclose(
            np.ravel(found), -np.ravel(want), atol=2e-4 * np.abs(want).max()
        )
    if got.c is not None:
        close(got.c, -grads["w"].c)


@pytest.mark.parametrize("name", CASES)
def test_lora_fa(name):
    tree, grads = setup(name)
    tx = optax.chain(
        jlora.lora_fa(tree), optax.add_decayed_weights(0.5), optax.sgd(1.0)
    )
    got = update(tx, tree, grads)
    assert not got.a.any()  # weight decay would have moved it
    (a, b), (_, gb) = (matrices(name, t["w"].a, t["w"].b) for t in (tree, grads))
    s = np.asarray(tree["w"].scale, np.float64)
    s = s.reshape(s.shape + (1,) * (gb.ndim - s.ndim))
    eye = 1e-8 * np.eye(a.shape[-1])
    want = np.linalg.inv(np.swapaxes(a, -1, -2) @ a + eye) @ gb / s**2 + 0.5 * b
    np.testing.assert_allclose(
        np.ravel(got.b), -np.ravel(want), atol=2e-4 * np.abs(want).max()
    )


def test_lora_plus():
    tree, grads = setup("dense", lora_bias=True, dora=True)
    tx = optax.adamw(0.1, weight_decay=0.5)
    plain = update(tx, tree, grads)
    opt = jlora.optimizer(tx, tree, b_lr_ratio=16)
    plus = opt.update(grads, opt.init(tree), tree)[0]["w"]
    close(plus.a, plain.a)
    for name in "bcm":
        close(getattr(plus, name), 16 * getattr(plain, name))
    assert not plus.w.any()
    ratio = jnp.float32(4.0)  # a traced one, as in a sweep
    swept = jlora.optimizer(tx, tree, b_lr_ratio=ratio)
    close(swept.update(grads, swept.init(tree), tree)[0]["w"].b, 4 * plain.b)


def test_clipping_and_full_leaves_see_what_trains_only():
    base = {"w": normal(5, 7), "head": normal(7, 3)}
    fn = lambda p, x: x @ p["w"] @ p["head"]  # noqa: E731
    tree = randomise(jlora.wrap(base, 2, targets="w", train="head"))
    grads = jax.grad(lambda t: (jlora.lift(fn)(t, X) ** 2).sum())(tree)
    for first in (jlora.riemannian(tree), jlora.lora_fa(tree)):
        tx = optax.chain(first, optax.clip_by_global_norm(1.0), optax.sgd(1.0))
        opt = jlora.optimizer(tx, tree, full=optax.sgd(0.5), b_lr_ratio=1.0)
        updates, _ = opt.update(grads, opt.init(tree), tree)
        own = jax.tree.leaves([updates["w"].a, updates["w"].b])
        np.testing.assert_allclose(optax.tree.norm(own), 1.0, rtol=1e-5)
        close(updates["head"].value, -0.5 * grads["head"].value)
        assert not updates["w"].w.any()


def test_on_the_half_that_trains():
    tree, grads = setup("dense")
    own, _ = jlora.partition(tree)
    half, _ = jlora.partition(grads)
    tx = optax.chain(jlora.riemannian(tree), optax.sgd(1.0))
    got = tx.update(half, tx.init(own), own)[0]["w"]
    want = update(tx, tree, grads)
    close((got.a, got.b), (want.a, want.b))
    assert got.w is None


@pytest.mark.parametrize("make", [jlora.riemannian, jlora.lora_fa])
def test_trains_in_half_precision_and_with_donated_trees(make):
    tree, _ = setup("dense", dtype=jnp.bfloat16)
    fn = CASES["dense"][0]
    goal = normal(11, 7, seed=9)
    opt = jlora.optimizer(optax.chain(make(tree), optax.adam(0.05)), tree)

    @jax.jit
    def step(tree, state):
        def loss(tree):
            return ((jlora.lift(fn)(tree, X) - goal) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = opt.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    state, values = opt.init(tree), []
    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(8):
        tree, state, value = step(tree, state)
        values.append(float(value))
    assert values[-1] < values[0] and np.isfinite(values).all()
    assert tree["w"].a.dtype == jnp.bfloat16


def test_with_nnx():
    model = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    model = jlora.wrap(model, 2)
    tx = optax.chain(jlora.lora_fa(model), optax.adamw(1e-2))
    opt = nnx.Optimizer(model, jlora.optimizer(tx, model, b_lr_ratio=2), wrt=nnx.Param)
    before = adapted(nnx.to_pure_dict(nnx.state(model)))["kernel"]
    a = np.array(before.a)

    def loss(model):
        return (jlora.lift(lambda m, x: m(x))(model, X) ** 2).mean()

    for _ in range(2):
        opt.update(model, nnx.grad(loss)(model))
    after = adapted(nnx.to_pure_dict(nnx.state(model)))["kernel"]
    same(after.a, a)
    assert after.b.any()


def test_labels_by_field():
    tree, _ = setup("dense", lora_bias=True, dora=True)
    found = jlora.labels({**tree, "x": X}, by="field")
    leaf = found["w"]
    assert (leaf.a, leaf.b, leaf.c, leaf.m) == tuple("abcm")
    assert leaf.w == leaf.scale == found["x"] == "frozen"
    assert (
        jlora.labels(jlora.wrap({"v": X}, targets=[], train="v"), by="field")["v"].value
        == "full"
    )
    each = {"a": optax.sgd(0.1), "b": optax.sgd(0.2), "c": optax.sgd(0.3)}
    each |= {"m": optax.sgd(0.4), "frozen": optax.set_to_zero()}
    tx = optax.multi_transform(each, jlora.labels(tree, by="field"))
    grads = jax.tree.map(jnp.ones_like, tree)
    new = tx.update(grads, tx.init(tree), tree)[0]["w"]
    got = [float(x.ravel()[0]) for x in (new.a, new.b, new.c, new.m, new.w)]
    np.testing.assert_allclose(got, [-0.1, -0.2, -0.3, -0.4, 0])


def test_a_scale_of_zero():
    tree, grads = setup("dense")
    off = jlora.scaled(tree, 0.0)
    got = update(optax.chain(jlora.lora_fa(off), optax.sgd(1.0)), off, grads)
    assert not got.b.any() and np.isfinite(got.b).all()


def test_lora_plus_leaves_replaced_rows_at_their_rate():
    tree = jlora.wrap({"e": X}, targets=[], train_rows={"e": [1]})
    grads = jax.tree.map(jnp.ones_like, tree)
    tx = jlora.optimizer(optax.sgd(1.0), tree, b_lr_ratio=16)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    close(updates["e"].b, -grads["e"].b)


def test_lora_fa_of_an_embedding():
    """Its a is zero at the start, and would stay so."""
    fn = lambda p, i: p["e"][i]  # noqa: E731
    plan = jlora.plan(fn, {"e": X}, jnp.arange(2), rank=2, targets="e")
    with pytest.raises(ValueError) as e:
        jlora.lora_fa(jlora.wrap({"e": X}, plan=plan))
    says(e, "lora_fa: the a of 'e' is zero", "init='orthogonal'")
    jlora.lora_fa(jlora.wrap({"e": X}, plan=plan, init="orthogonal"))


def without(tree, path):
    return {k: v for k, v in tree.items() if k != path}


def test_bad_use():
    tree, grads = setup("dense")
    plain = {"w": X}
    for make in (jlora.riemannian, jlora.lora_fa):
        name = make.__name__
        with pytest.raises(ValueError) as e:
            make(plain)
        says(e, name, "expected a tree with low-rank leaves", "dict")
        tx = make(tree)
        with pytest.raises(ValueError) as e:
            tx.update(grads, tx.init(tree))
        says(e, name, "expected the params beside the gradients")
        with pytest.raises(ValueError) as e:
            tx.update({"v": {"a": X}}, tx.init(tree), plain)
        says(e, name, "of other leaves", "jlora.optimizer")
        with pytest.raises(ValueError) as e:  # it would get the base's gradients
            tx.update(tree, tx.init(tree), tree)
        says(e, name, "of other leaves", "jlora.optimizer")
        two = jlora.wrap({"w": X, "v": X}, rank=2, targets="*")
        with pytest.raises(ValueError) as e:  # made for one of the two weights
            update(optax.chain(make(without(two, "v")), optax.sgd(1.0)), two, two)
        says(e, name, "'v' has factors, and had none")
        for half in jlora.partition(tree):
            with pytest.raises(ValueError) as e:
                make(half)
            says(e, name, "half of a partition", "jlora.combine")
    with pytest.raises(ValueError, match="reg -1"):
        jlora.riemannian(tree, reg=-1)
    for ratio in (0, -1.0, "16", True, [1, 2]):
        with pytest.raises(TypeError) as e:
            jlora.optimizer(optax.sgd(1.0), tree, b_lr_ratio=ratio)
        says(e, "b_lr_ratio", "expected a positive number")
    with pytest.raises(ValueError, match="by='name'"):
        jlora.labels(tree, by="name")
    shapes = jax.eval_shape(lambda: tree)
    tx = jlora.lora_fa(shapes)
    with pytest.raises(ValueError, match="made of shapes"):
        update(optax.chain(tx, optax.sgd(1.0)), tree, grads)
    close(
        update(optax.chain(jlora.riemannian(shapes), optax.sgd(1.0)), tree, grads).a,
        update(optax.chain(jlora.riemannian(tree), optax.sgd(1.0)), tree, grads).a,
    )
