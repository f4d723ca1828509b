"""Variants and arithmetic on a mesh with explicit axes, against one device.

There the type of an array says how it is sharded, and every operation has to say how
its result is.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import close, normal, randomise, same
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint
from jlora._arithmetic.mix import METHODS

W, X = normal(8, 12), normal(4, 8, seed=1)
SPECS = [P("x"), P("x", "y")]


@pytest.fixture(params=SPECS, ids=str)
def placed(request):
    """The weight on a mesh."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield jax.device_put(W, NamedSharding(mesh, request.param))


def on_host(tree):
    return jax.tree.map(jnp.asarray, jax.device_get(tree))


def same_place(x, like, axis):
    """Whether x is sharded along one of its axes as another array is."""
    specs = [jax.typeof(y).sharding.spec for y in (x, like)]
    return specs[0][axis] == specs[1][axis]


def wrapped(w, **options):
    return jlora.wrap({"w": w}, 2, targets="w", **options)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_starts(placed, init):
    tree = wrapped(placed, init=init)
    assert same_place(tree["w"].a, placed, 0) and same_place(tree["w"].b, placed, 1)
    close(on_host(jlora.merge(tree)["w"]), W, 1e-6)
    one = wrapped(W, init=init)["w"]
    if init == "pissa":  # of which a mesh has another algorithm
        close(on_host(tree["w"].a @ tree["w"].b), one.a @ one.b, 1e-5)
    else:
        close(on_host((tree["w"].a, tree["w"].b)), (one.a, one.b))


def test_dora(placed):
    tree = wrapped(placed, dora=True)
    assert same_place(tree["w"].m, tree["w"].b, -1)
    close(on_host(tree["w"].m), jnp.linalg.norm(W, axis=0))
    tree, one = randomise(tree), randomise(wrapped(W, dora=True))
    tree = jax.device_put(tree, jlora.shardings(tree, {"w": placed.sharding}))
    ins, outs = placed.sharding.spec[0], jax.typeof(tree["w"].m).sharding.spec[0]

    def on_mesh(tree, x):
        y = jlora.lift(
            lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P(None, outs))
        )(tree, x)
        return (jnp.sin(y) ** 2).sum(), y

    def plain(tree, x):
        y = x @ jlora.merge(tree)["w"]
        return (jnp.sin(y) ** 2).sum(), y

    x = jax.device_put(X, NamedSharding(placed.sharding.mesh, P(None, ins)))
    (_, y), grads = jax.jit(jax.value_and_grad(on_mesh, has_aux=True))(tree, x)
    (_, want), _ = jax.value_and_grad(plain, has_aux=True)(one, X)
    close(on_host(y), want)
    close(on_host(jlora.merge(tree)["w"]), jlora.merge(one)["w"])
    lift = jax.grad(lambda t: (jnp.sin(jlora.lift(lambda p: X @ p["w"])(t)) ** 2).sum())
    for name in "abm":
        close(on_host(getattr(grads["w"], name)), getattr(lift(one)["w"], name))


def test_rows(placed):
    tree = jlora.wrap({"w": placed}, targets=[], train_rows={"w": [2, 5]})
    close(on_host(jlora.merge(jlora.scaled(tree, 0.5))["w"]), W)
    new = jax.tree.map(lambda x: x + 1, jlora.adapter(tree))
    new["w"] = jlora.scaled(new, 1 / 2)["w"]  # the scale grew by one, too
    merged = jlora.merge(jlora.attach({"w": placed}, new))["w"]
    close(on_host(merged), W.at[jnp.array([2, 5])].add(1))


@pytest.mark.parametrize("method", [m for m in METHODS if "dare" not in m])
def test_mix(placed, method):
    trees = [randomise(wrapped(placed), k) for k in (1, 2)]
    places = jlora.shardings(trees[0], {"w": placed.sharding})
    parts = [jlora.adapter(jax.device_put(t, places)) for t in trees]
    density = None if method in ("cat", "svd", "linear") else 0.5
    mixed = jlora.mix(parts, [0.7, -0.4], method, density=density)["w"]
    one = jlora.mix(on_host(parts), [0.7, -0.4], method, density=density)["w"]
    assert same_place(mixed.a, placed, 0) and same_place(mixed.b, placed, 1)
    close(on_host(mixed.a @ mixed.b), one.a @ one.b, 1e-5)


def test_truncate_spectrum_and_extract(placed):
    tree = randomise(wrapped(placed))
    tree = jax.device_put(tree, jlora.shardings(tree, {"w": placed.sharding}))
    adapter, one = jlora.adapter(tree), on_host(jlora.adapter(tree))
    close(jlora.spectrum(adapter)["w"], jlora.spectrum(one)["w"])
    small, other = jlora.truncate(adapter, 1)["w"], jlora.truncate(one, 1)["w"]
    close(on_host(small.a @ small.b), other.a @ other.b)
    found = jlora.extract({"w": placed}, jlora.merge(tree), 2, targets="w")
    assert same_place(found["w"].a, placed, 0) and same_place(found["w"].b, placed, 1)
    close(on_host(jlora.merge(jlora.attach({"w": placed}, found))), jlora.merge(tree))


def test_a_checkpoint_of_a_changed_base(placed, tmp_path):
    tree = wrapped(placed, init="pissa")
    jlora.checkpoint.save(tmp_path / "saved", tree)
    back = jlora.checkpoint.restore(tmp_path / "saved", jlora.unwrap(tree))
    same(on_host(jlora.merge(back)), on_host(jlora.merge(tree)))
    with pytest.raises(ValueError, match="'w' was trained on what 'pissa"):
        jlora.checkpoint.restore(tmp_path / "saved", {"w": placed})


@pytest.mark.parametrize("make", [jlora.riemannian, jlora.lora_fa])
def test_optimisers(placed, make):
    tree = randomise(wrapped(placed))
    tree = jax.device_put(tree, jlora.shardings(tree, {"w": placed.sharding}))

    def updated(tree):
        tx = jlora.optimizer(optax.chain(make(tree), optax.sgd(1.0)), tree)
        return tx.update(tree, tx.init(tree), tree)[0]["w"]

    got, want = updated(tree), updated(on_host(tree))
    close(on_host((got.a, got.b)), (want.a, want.b))
