"""Quantised bases on meshes: every device has its own shard, and the scales of that.

The oracle is the same tree on one device.
"""

import jax
import jax.numpy as jnp
import pytest
import qwix
from helpers import close, normal, randomise, same
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint

W, X = normal(16, 12), normal(4, 16, seed=1)
SPECS = [P("x"), P("x", "y"), P(None, "y"), P(("x", "y"))]
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.fixture(params=KINDS)
def mesh(request):
    kinds = (KINDS[request.param],) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds)
    with jax.set_mesh(mesh):
        yield mesh


def fn(p, x):
    return jnp.tanh(x @ p["w"])


def tree_of(w, qtype="nf4", block=4):
    coded = jlora.quantize({"w": w}, qtype, targets="w", block=block)
    return randomise(jlora.wrap(coded, rank=2, targets="w"))


def on_host(tree):
    return jax.tree.map(jnp.asarray, jax.device_get(tree))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("qtype", ["nf4", "int8"])
def test_each_device_quantises_its_shard(mesh, spec, qtype):
    place = NamedSharding(mesh, spec)
    coded = jlora.quantize(
        {"w": jax.device_put(W, place)}, qtype, targets="w", block=4
    )["w"]
    one = jlora.quantize({"w": W}, qtype, targets="w", block=4)["w"]
    same(on_host(coded), on_host(one))
    for field in jax.tree.leaves(coded):
        assert field.sharding.is_equivalent_to(place, 2), field.sharding
    shapes = jlora.quantize(
        {"w": jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=place)},
        qtype,
        targets="w",
        block=4,
    )["w"]
    for field in jax.tree.leaves(shapes):
        assert field.sharding.is_equivalent_to(place, 2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_used_wrapped_and_merged(mesh, spec):
    place = NamedSharding(mesh, spec)
    one, plan = tree_of(W), jlora.plan(fn, {"w": W}, X, rank=2)
    with jax.set_mesh(mesh):
        coded = jlora.quantize(
            {"w": jax.device_put(W, place)}, "nf4", plan=plan, block=4
        )
        tree = jlora.wrap(coded, plan=plan)
        a, b = tree["w"].a, tree["w"].b
        specs = [*spec, None, None][:2]
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, P(specs[0])), 2)
        assert b.sharding.is_equivalent_to(NamedSharding(mesh, P(None, specs[1])), 2)
        put = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), one, tree)
        x = jax.device_put(X, NamedSharding(mesh, P()))

        explicit = mesh.axis_types[0] == AxisType.Explicit

        def placed(p, x):
            w = p["w"]
            if spec == P(("x", "y")):
                w = jax.sharding.reshard(w, P(None, None))
            return jnp.tanh(jnp.dot(x, w, out_sharding=P(None, None)))

        def loss(t, f, x):
            lifted = jlora.lift(placed if explicit else fn)
            return (lifted(jlora.combine(t, f), x) ** 2).sum()

        got = jax.jit(jax.value_and_grad(loss))(*jlora.partition(put), x)
        merged = jlora.merge(put)["w"]
        again = jlora.merge(put, requantize=True)["w"]
    want = jax.jit(
        jax.value_and_grad(
            lambda t, f: (jlora.lift(fn)(jlora.combine(t, f), X) ** 2).sum()
        )
    )(*jlora.partition(one))
    close(on_host(got), on_host(want))
    close(on_host(merged), on_host(jlora.merge(one)["w"]))
    assert merged.sharding.is_equivalent_to(place, 2)
    assert again.scale.sharding.is_equivalent_to(place, 2)


def test_a_block_across_two_devices(mesh):
    w = jax.device_put(W, NamedSharding(mesh, P(("x", "y"))))
    with pytest.raises(ValueError, match="'w': a device's shard, 4 of the 16 along ax"):
        jlora.quantize({"w": w}, "nf4", targets="w", block=8)
    whole = jlora.quantize({"w": w}, "nf4", targets="w", block=None)["w"]
    one = jlora.quantize({"w": W}, "nf4", targets="w", block=None)["w"]
    same(on_host(whole), on_host(one))
    assert whole.scale.sharding.is_fully_replicated


@pytest.mark.parametrize("block", [4, None])
def test_gathered_by_the_function_itself(block):
    """FSDP by hand: the low-bit numbers are gathered, and not the weight."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def sharded(p, x):
        def body(w, x):
            w = lax.all_gather(w, "x", axis=0, tiled=True)
            return jnp.tanh(x @ w)

        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P("x", "y"), P()),
            out_specs=P(None, "y"),
            check_vma=False,
        )(p["w"], x)

    coded = jlora.quantize({"w": W}, "int8", targets="w", block=block)
    plan = jlora.plan(sharded, coded, X, rank=2)
    tree = randomise(jlora.wrap(coded, plan=plan))
    lifted = jax.jit(jlora.lift(sharded))
    assert [e.status for e in jlora.explain(sharded, tree, X)] == ["factored"]
    close(lifted(tree, X), fn(jlora.merge(tree), X))
    close(jax.jit(jlora.lift(sharded))(coded, X), fn(jlora.merge(coded), X))
    text = lifted.lower(tree, X).as_text()
    gathers = [line for line in text.splitlines() if "all_gather" in line]
    assert any("i8>" in line for line in gathers)
    assert not any("tensor<16x6xf32>" in line.split("->")[-1] for line in gathers)


def test_a_partial_sum_over_shards():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def sharded(p, x):
        def body(w, x):
            return lax.psum(x @ w, "x")

        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P("x", "y"), P(None, "x")),
            out_specs=P(None, "y"),
        )(p["w"], x)

    for block in (4, None):
        tree = tree_of(W, "int8", block)
        want = X @ jlora.merge(tree)["w"]
        close(jax.jit(jlora.lift(sharded))(tree, X), want)


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_shard_map_in_a_scan(gathers, adapted):
    """The stack stays whole in the scan, and its layer is sharded in each step."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def body(w, x):
        if gathers:
            return jnp.tanh(x @ lax.all_gather(w, "x", axis=0, tiled=True))
        at = lax.axis_index("x") * 4
        part = lax.dynamic_slice_in_dim(x, at, 4, 1)
        return jnp.tanh(lax.psum(part @ w, "x"))

    def layers(p, x):
        def step(x, w):
            mapped = jax.shard_map(
                body,
                mesh=mesh,
                in_specs=(P("x", "y"), P()),
                out_specs=P(None, "y"),
                check_vma=False,
            )
            return mapped(w, x), None

        return lax.scan(step, x, p["w"])[0]

    def plain(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    stack, x = normal(3, 8, 8), normal(5, 8)
    plan = jlora.plan(plain, {"w": stack}, x, rank=2)
    tree = jlora.quantize({"w": stack}, "nf4", plan=plan, block=2)
    if adapted:
        tree = randomise(jlora.wrap(tree, plan=plan))
    close(jax.jit(jlora.lift(layers))(tree, x), plain(jlora.merge(tree), x))


def test_shardings_and_a_checkpoint(tmp_path):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    tree = tree_of(W)
    own = jlora.shardings(tree, {"w": P("x", "y")})["w"]
    assert (own.w.scale, own.a, own.b) == (P("x", "y"), P("x", None), P(None, "y"))
    whole = jlora.shardings(tree_of(W, block=None), {"w": P("x", "y")})["w"]
    assert whole.w.scale == P(None, "y")
    jlora.checkpoint.save(tmp_path / "a", tree)
    place = NamedSharding(mesh, P("x", "y"))
    coded = jlora.quantize({"w": jax.device_put(W, place)}, "nf4", targets="w", block=4)
    back = jlora.checkpoint.restore(tmp_path / "a", coded)
    same(on_host(back), on_host(tree))
    assert back["w"].a.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)


@pytest.mark.parametrize("init", ["loftq"])
def test_starts_on_a_mesh(mesh, init):
    w = jax.device_put(normal(64, 8), NamedSharding(mesh, P(None, "y")))
    tree = jlora.wrap({"w": w}, 4, targets="w", init=init)
    assert tree["w"].w.scale.sharding.is_equivalent_to(w.sharding, 2)

    def off(t):
        return float(jnp.linalg.norm(on_host(jlora.merge(t)["w"]) - normal(64, 8)))

    one = jlora.wrap({"w": normal(64, 8)}, 4, targets="w", init=init)
    assert off(tree) < 1.05 * off(one)
    assert isinstance(tree["w"].w, qwix.QArray)
