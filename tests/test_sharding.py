"""Adapters are born where their base lives, and move what has the rank for a size.

The oracle of a sharding is the base's own; that of a program's collectives is the
program without adapters.
"""

import collections
import functools

import flax.linen as nn
import hlo
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import EMITTERS, close, normal, randomise, same, says, silent
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jlora

AXES = ("fsdp", "tp")
AUTO, EXPLICIT = (
    jax.make_mesh((2, 4), AXES, axis_types=(kind,) * 2)
    for kind in (AxisType.Auto, AxisType.Explicit)
)
MESHES = pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def spec_of(x):
    return (
        None
        if x is None
        else P(*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))
    )


# ------------------------------------------------------------------------------ wrap

# roles, shape and spec of the base; specs of a, b and c
LEAVES = {
    "dense": ("io", (6, 8), P("fsdp", "tp"), ("fsdp", None), (None, "tp"), ("tp",)),
    "row": ("io", (8, 6), P("tp", "fsdp"), ("tp", None), (None, "fsdp"), ("fsdp",)),
    "both": (
        *("io", (16, 6), P(("fsdp", "tp"))),
        *((("fsdp", "tp"), None), (None, None), (None,)),
    ),
    "heads": (
        *("ioo", (6, 4, 5), P("fsdp", "tp")),
        *(("fsdp", None), (None, "tp", None), ("tp", None)),
    ),
    "of-heads": (
        *("iio", (4, 5, 6), P("tp", None, "fsdp")),
        *(("tp", None, None), (None, "fsdp"), ("fsdp",)),
    ),
    "layers": (
        *("bio", (3, 6, 8), P(None, "fsdp", "tp")),
        *((None, "fsdp", None), (None, None, "tp"), (None, "tp")),
    ),
    "experts": (
        *("bio", (4, 6, 8), P("tp", "fsdp")),
        *(("tp", "fsdp", None), ("tp", None, None), ("tp", None)),
    ),
    "middle": (
        *("ibo", (6, 4, 8), P("fsdp", "tp", None)),
        *(("tp", "fsdp", None), ("tp", None, None), ("tp", None)),
    ),
    "conv": (
        *("iiio", (3, 3, 4, 8), P(None, None, "fsdp", "tp")),
        *((None, None, "fsdp", None), (None, "tp"), ("tp",)),
    ),
}


def planned(name):
    roles, shape, spec, *_ = LEAVES[name]
    own = jlora.Spec.of("dense", roles, 3, lora_bias=True)
    return jlora.Plan({"w": own}, {"w": shape}), shape, spec


def expected(name):
    roles, *_, a, b, c = LEAVES[name]
    scale = c[: roles.count("b")]
    return {"a": P(*a), "b": P(*b), "c": P(*c), "scale": P(*scale)}


@MESHES
@pytest.mark.parametrize("name", LEAVES)
def test_every_field_is_sharded_as_its_own_axes_of_the_base(name, mesh):
    plan, shape, spec = planned(name)
    w = normal(*shape)
    here = jlora.wrap({"w": w}, plan=plan)["w"]
    base = put(w, mesh, *spec)
    there = jlora.wrap({"w": base}, plan=plan)["w"]
    assert there.w is base
    for field, want in expected(name).items():
        x = getattr(there, field)
        assert spec_of(x) == want, field
        assert x.sharding.mesh == mesh
        same(getattr(here, field), jax.device_get(x))  # the numbers know no mesh
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        parts = [
            np.prod([sizes[a] for a in ([k] if isinstance(k, str) else k or [])])
            for k in want
        ]
        small = tuple(int(n // k) for n, k in zip(x.shape, parts, strict=True))
        assert {s.data.shape for s in x.addressable_shards} == {small}


@MESHES
@pytest.mark.parametrize("name", LEAVES)
def test_shapes_and_trees_of_specs_say_the_same(name, mesh):
    plan, shape, spec = planned(name)
    sharding = NamedSharding(mesh, spec)
    abstract = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)}
    leaf = jlora.wrap(abstract, plan=plan)["w"]
    bare = jlora.wrap({"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}, plan=plan)
    assert bare["w"].a.sharding is None
    specs = jlora.shardings(bare, {"w": spec})["w"]
    shardings = jlora.shardings(bare, {"w": sharding})["w"]
    for field, want in expected(name).items():
        assert spec_of(getattr(leaf, field)) == want
        assert getattr(specs, field) == want
        assert getattr(shardings, field) == NamedSharding(mesh, want)
    assert specs.w == spec and shardings.w == sharding


@MESHES
@pytest.mark.parametrize("name", LEAVES)
def test_wrapped_under_jit(name, mesh):
    """Explicit axes are in the types; of others jit's out_shardings say it."""
    plan, shape, spec = planned(name)
    params = {"w": put(normal(*shape), mesh, *spec)}
    wrap = functools.partial(jlora.wrap, plan=plan)
    own = None
    if mesh is AUTO:
        own = jlora.shardings(jax.eval_shape(wrap, params), {"w": params["w"].sharding})
    with jax.set_mesh(mesh):
        tree = jax.jit(wrap, out_shardings=own)(params)
    for field, want in expected(name).items():
        assert spec_of(getattr(tree["w"], field)) == want
    want = jlora.wrap(params, plan=plan)
    same(jax.device_get(tree["w"].a), jax.device_get(want["w"].a))


def test_whole_leaves_and_single_devices():
    w, bias = normal(6, 8), normal(8)
    params = {"kernel": put(w, AUTO, "fsdp", "tp"), "bias": put(bias, AUTO, "tp")}
    tree = jlora.wrap(params, rank=2, bias="all")
    assert spec_of(tree["bias"].value) == P("tp")
    last = jax.devices()[-1]
    leaf = jlora.wrap({"kernel": jax.device_put(w, last)}, rank=2)["kernel"]
    assert {leaf.a.devices().pop(), leaf.scale.devices().pop()} == {last}
    # What is not committed to a device leaves the factors free as well.
    assert not jlora.wrap({"kernel": w}, rank=2)["kernel"].a.committed


@MESHES
def test_merging_keeps_the_shardings_of_the_base(mesh):
    params = {
        "kernel": put(normal(6, 8), mesh, "fsdp", "tp"),
        "bias": put(normal(8), mesh, "tp"),
    }
    tree = randomise(jlora.wrap(params, rank=2, lora_bias=True), scale=False)
    tree = jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding),
        tree,
        jlora.wrap(params, rank=2, lora_bias=True),
    )
    merged = jlora.merge(tree)
    with jax.set_mesh(mesh):
        traced = jax.jit(jlora.merge)(tree)
    back = jlora.unmerge(merged, jlora.adapter(tree))
    for other in (merged, back, jlora.unwrap(tree), traced):
        for name, x in other.items():
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim), name
    k = jax.device_get(tree["kernel"])
    close(jax.device_get(merged["kernel"]), k.w + k.scale * (k.a @ k.b))
    close(jax.device_get(back), jax.device_get(params))


HOSTS = {
    "auto": NamedSharding(AUTO, P("fsdp", None), memory_kind="pinned_host"),
    "explicit": NamedSharding(EXPLICIT, P("fsdp", None), memory_kind="pinned_host"),
    "one": SingleDeviceSharding(jax.devices()[1], memory_kind="pinned_host"),
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_base_in_the_memory_of_the_host(host):
    base = {"kernel": jax.device_put(normal(8, 16), host)}
    shape = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=host)}
    for options in ({"rank": 2}, {"rank": 2, "targets": [], "train": "kernel"}):
        tree = jlora.wrap(base, **options)
        places = jax.tree.map(lambda x: x.sharding, tree)
        abstract = jlora.wrap(shape, **options)
        for place in (
            places,
            jax.tree.map(lambda x: x.sharding, abstract),
            jlora.shardings(tree, host),
        ):
            kind, *kinds = [x.memory_kind for x in jax.tree.leaves(place)]
            assert kind == "pinned_host" and {*kinds} == {"device"}
        assert all(x.device_set == host.device_set for x in jax.tree.leaves(places))


@MESHES
def test_what_trains_whole_is_where_its_base_is(mesh):
    place = NamedSharding(mesh, P("fsdp", "tp"))
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place)
    for x in (shape, jax.device_put(normal(8, 16), place)):
        leaf = jlora.wrap({"kernel": x}, targets=[], train="kernel")["kernel"]
        assert leaf.value.sharding == place


def test_specs_that_do_not_fit():
    tree = jlora.wrap({"dense": {"kernel": normal(6, 8)}}, rank=2)
    whole = jlora.shardings(tree, P())["dense"]["kernel"]
    assert (whole.w, whole.a, whole.scale) == (P(), P(None, None), P())
    with pytest.raises(ValueError) as error:
        jlora.shardings(tree, {"dens": {"kernel": P("fsdp")}})
    says(error, "at 'dense/kernel' of base, found nothing", "'dens/kernel'")
    with pytest.raises(ValueError) as error:
        jlora.shardings(tree, {"dense": {"kernel": "fsdp"}})
    says(error, "at 'dense/kernel' of base, found a str")


# ------------------------------------------------------------------ Linen's own words


class Boxed(nn.Module):
    """Two layers whose params are in boxes, with plain names or logical ones."""

    logical: bool = False

    @nn.compact
    def __call__(self, x):
        box = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        init = nn.initializers.lecun_normal()
        a, b = self.names
        x = nn.Dense(16, kernel_init=box(init, (a, b)))(x)
        return nn.Dense(8, kernel_init=box(init, (b, a)))(nn.relu(x))

    @property
    def names(self):
        return ("embed", "mlp") if self.logical else AXES


RULES = (("embed", "fsdp"), ("mlp", "tp"))


@pytest.mark.parametrize("logical", [False, True])
def test_boxes_tell_flax_where_each_field_lives(logical):
    model, x = Boxed(logical), normal(4, 8)
    variables = model.init(jax.random.key(0), x)
    tree = randomise(jlora.wrap(variables, rank=3))
    tx = jlora.optimizer(optax.adam(1e-2), tree)
    state = TrainState.create(apply_fn=jlora.lift(model.apply), params=tree, tx=tx)
    specs = nn.get_partition_spec(state)
    found = jlora.adapter(specs.params)
    leaf, (a, b) = found["params/Dense_0/kernel"], model.names
    assert (leaf.a, leaf.b, leaf.scale) == (P(a, None), P(None, b), P())
    assert found["params/Dense_1/kernel"].a == P(b, None)
    mu = specs.opt_state.inner_states["lora"].inner_state[0].mu
    assert mu["params/Dense_0/kernel"] == {"a": P(a, None), "b": P(None, b)}

    if logical:
        shardings = nn.logical_to_mesh_sharding(specs, AUTO, RULES)
    else:
        shardings = jax.tree.map(lambda spec: NamedSharding(AUTO, spec), specs)
    placed = jax.device_put(state, shardings)
    second = jlora.adapter(placed.params)["params/Dense_1/kernel"]
    assert spec_of(second.a) == P("tp", None)

    @functools.partial(jax.jit, out_shardings=(shardings, None))
    def step(state, x):
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean(jnp.square(state.apply_fn(p, x)))
        )(state.params)
        return state.apply_gradients(grads=grads), loss

    with jax.set_mesh(AUTO), nn.logical_axis_rules(RULES):
        new, loss = step(placed, x)
    want, want_loss = jax.jit(step.__wrapped__)(state, x)
    close(jax.device_get(loss), jax.device_get(want_loss))
    close(jax.device_get(new.params), jax.device_get(want.params))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    merged = jlora.merge(new.params)
    assert jax.tree.structure(merged) == jax.tree.structure(variables)
    unboxed = nn.unbox(new.params)["params"]["Dense_0"]["kernel"]
    assert isinstance(unboxed, jlora.LoRA)


def test_a_boxed_tree_through_every_function_of_trees():
    model, x = Boxed(), normal(4, 8)
    variables = model.init(jax.random.key(0), x)
    tree = randomise(jlora.wrap(variables, rank=3, train="**/bias"))
    halves = jlora.partition(tree)
    nn.get_partition_spec(halves)
    whole = jlora.combine(*halves)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    again = jlora.attach(variables, jlora.adapter(tree))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert jax.tree.structure(jlora.unwrap(tree)) == jax.tree.structure(variables)
    for other in (whole, again, jlora.scaled(tree, 1.0)):
        close(jlora.lift(model.apply)(other, x), model.apply(jlora.merge(tree), x))
    assert jlora.count(tree)[0] == 3 * 2 * (16 + 8) + 24
    small = jlora.drop_base(jlora.fade(jlora.wrap(variables, rank=3), 0.0))
    jlora.lift(model.apply)(small, x)
    assert jax.tree.structure(jlora.labels(tree)) == jax.tree.structure(tree)


# -------------------------------------------------------------------------------- NNX


def test_nnx_metadata_and_its_arrays():
    def layer(rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tp"))
        return nnx.Linear(8, 16, kernel_init=init, rngs=rngs)

    with jax.set_mesh(AUTO):
        model = layer(nnx.Rngs(0))
        sharded = nnx.get_partition_spec(nnx.state(model))
        nnx.update(model, jax.lax.with_sharding_constraint(nnx.state(model), sharded))
    tree = jlora.wrap(model, rank=3)
    leaf = jlora.adapter(tree)["kernel"]
    assert (spec_of(leaf.a), spec_of(leaf.b)) == (P("fsdp", None), P(None, "tp"))
    specs = jlora.adapter(jlora.shardings(nnx.state(tree), sharded))["kernel"]
    assert (specs.a, specs.b) == (P("fsdp", None), P(None, "tp"))


# ---------------------------------------------------------------------- explicit axes


def looked_up(w, x):
    ids = (jnp.abs(x[:, 0]) * 3).astype(int)
    return w.at[ids].get(out_sharding=P("fsdp", "tp"))


@pytest.mark.parametrize(
    "fn, specs, x_spec, want",
    [
        pytest.param(
            lambda w, x: x @ w,
            *(P(None, "tp"), P("fsdp", None), P("fsdp", "tp")),
            id="columns",
        ),
        pytest.param(
            lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P("fsdp", None)),
            *(P("tp", None), P("fsdp", "tp"), P("fsdp", None)),
            id="rows",
        ),
        pytest.param(
            lambda w, x: x @ jax.sharding.reshard(w, P(None, "tp")),
            *(P("fsdp", "tp"), P("fsdp", None), P("fsdp", "tp")),
            id="fsdp",
        ),
        pytest.param(
            lambda w, x: jnp.einsum("oi,bo->bi", w, x, out_sharding=P("fsdp", "tp")),
            *(P(None, "tp"), P("fsdp", None), P("fsdp", "tp")),
            id="weight-first",
        ),
        pytest.param(
            lambda w, x: jnp.einsum("bi,oi->bo", x, w, out_sharding=P("fsdp", None)),
            *(P(None, "tp"), P("fsdp", "tp"), P("fsdp", None)),
            id="transposed",
        ),
        pytest.param(
            *(looked_up, P(None, "tp"), P("fsdp", None), P("fsdp", "tp")), id="lookup"
        ),
    ],
)
def test_explicit_axes_are_those_that_the_base_has(fn, specs, x_spec, want):
    w, x = normal(8, 8), normal(4, 8)
    plan = jlora.Plan({"w": jlora.Spec.of("dense", "io", 3)}, {"w": w.shape})
    tree = randomise(jlora.wrap({"w": w}, plan=plan))
    placed = jax.device_put(
        tree, jlora.shardings(tree, {"w": NamedSharding(EXPLICIT, specs)})
    )
    x_placed = put(x, EXPLICIT, *x_spec)
    lifted = jlora.lift(lambda p, x: fn(p["w"], x), strict=True)

    def loss(tree, x):
        y = lifted(tree, x)
        assert jax.typeof(y).sharding.spec == want
        return jnp.sum(jnp.sin(y)), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    with jax.set_mesh(EXPLICIT):
        (_, got), grads = step(placed, x_placed)
        base = fn(jlora.merge(placed)["w"], x_placed)
    close(jax.device_get(got), jax.device_get(base))
    assert spec_of(grads["w"].a) == spec_of(placed["w"].a)
    assert spec_of(grads["w"].b) == spec_of(placed["w"].b)


def test_the_llama_of_the_example_on_a_mesh():
    """In value and gradients the same as on one device."""
    model, tree, ids = small_llama()
    specs = jax.tree.map(lambda s: NamedSharding(AUTO, s), model.specs())
    placed = jax.device_put(tree, jlora.shardings(tree, specs))
    step = jax.jit(jax.value_and_grad(jlora.lift(model.loss)))
    with jax.set_mesh(AUTO):
        got = step(placed, put(ids, AUTO, "fsdp"))
    close(jax.device_get(got), jax.device_get(step(tree, ids)), tol=1e-4)


# ------------------------------------------------------------------------- shard_map


def test_specs_of_a_shard_map():
    model_in = {"up": P(None, "tp"), "down": P("tp", None)}
    params = {"up": normal(6, 8), "down": normal(8, 6)}

    def mlp(p, x):
        return jax.lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "tp")

    tree = randomise(jlora.wrap(params, rank=3, targets="*"))
    x = normal(4, 6)
    inside = jax.shard_map(
        jlora.lift(mlp),
        mesh=AUTO,
        in_specs=(jlora.shardings(tree, model_in), P("fsdp")),
        out_specs=P("fsdp"),
    )
    outside = jlora.lift(
        jax.shard_map(
            mlp, mesh=AUTO, in_specs=(model_in, P("fsdp")), out_specs=P("fsdp")
        )
    )
    merged = jlora.merge(tree)
    want = jnp.tanh(x @ merged["up"]) @ merged["down"]
    for fn in (inside, outside):
        close(jax.device_get(jax.jit(fn)(tree, x)), jax.device_get(want))


def through_sin(params, x):
    return jnp.tanh(x @ params["up"]) + jnp.sin(params["up"]).sum(0)


USES = {
    "product": jlora.lift(lambda params, x: jnp.tanh(x @ params["up"])),
    "merged": lambda tree, x: jnp.tanh(x @ jlora.merge(tree)["up"]),
    "materialised": lambda tree, x: silent(jlora.lift(through_sin), tree, x),
}


@pytest.mark.parametrize("dropped", [False, True], ids=["base", "dropped"])
@pytest.mark.parametrize("use", USES)
def test_gradients_inside_of_a_shard_map(use, dropped):
    """Of a weight whose columns are split, of an activation that is not."""
    tree = randomise(jlora.wrap({"up": normal(6, 64)}, rank=3, targets="*"))
    tree = jlora.drop_base(tree, force=True) if dropped else tree
    split, x = {"up": P(None, "tp")}, normal(4, 6)
    specs = jlora.shardings(tree, split)

    def gradients(tree, x):
        def loss(trainable):
            return USES[use](jlora.combine(trainable, frozen), x).sum()

        trainable, frozen = jlora.partition(tree)
        grads = jax.grad(loss)(trainable)["up"]
        return grads.a, grads.b

    inside = jax.shard_map(
        gradients,
        mesh=AUTO,
        in_specs=(specs, P()),
        out_specs=(specs["up"].a, specs["up"].b),
    )
    got = jax.jit(inside)(tree, x)
    close(jax.device_get(got), jax.device_get(gradients(tree, x)))


# ----------------------------------------------------------------------- collectives

RANK = 7  # a size that nothing else has, nor two or three times it


def small_llama():
    model = llama.Llama(d=48, ffn=136, vocab=200, heads=8, kv_heads=4, head_dim=10)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (16, 33), 0, model.vocab)
    plan = jlora.plan(model.loss, params, ids, rank=RANK, targets=llama.TARGETS)
    return model, randomise(jlora.wrap(params, plan=plan)), ids


def linen_mlp():
    """Boxes and logical axes, as Linen's own guide has them."""

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                init = nn.initializers.lecun_normal()
                up = nn.with_logical_partitioning(init, ("embed", "mlp"))
                down = nn.with_logical_partitioning(init, ("mlp", "embed"))
                h = nn.Dense(136, kernel_init=up, name=f"up_{i}")(x)
                h = nn.Dense(48, kernel_init=down, name=f"down_{i}")(nn.silu(h))
                x = nn.with_logical_constraint(x + h, ("batch", None))
            return x

    model = Mlp()
    return model.apply, model.init(jax.random.key(0), jnp.ones((1, 48)))


def test_collectives_of_linen():
    apply, variables = linen_mlp()
    rules = (*RULES, ("batch", "fsdp"))
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(variables), AUTO, rules)
    with nn.logical_axis_rules(rules):
        check_collectives(apply, nn.unbox(variables), specs, normal(64, 48))


def test_collectives_of_a_plain_function():
    model, tree, ids = small_llama()
    specs = jax.tree.map(lambda s: NamedSharding(AUTO, s), model.specs())

    def moved(params, ids, z):
        layers = params["layers"]
        norm = layers["norm_attention"] + z
        return {**params, "layers": {**layers, "norm_attention": norm}}, ids

    check_collectives(model, jlora.unwrap(tree), specs, ids, moved)


def test_collectives_of_nnx():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            init = nnx.initializers.lecun_normal()
            up = nnx.with_partitioning(init, ("fsdp", "tp"))
            down = nnx.with_partitioning(init, ("tp", "fsdp"))
            self.up = nnx.List(
                nnx.Linear(48, 136, kernel_init=up, rngs=rngs) for _ in range(2)
            )
            self.down = nnx.List(
                nnx.Linear(136, 48, kernel_init=down, rngs=rngs) for _ in range(2)
            )

        def __call__(self, x):
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(nnx.silu(up(x)))
                x = jax.lax.with_sharding_constraint(x, P("fsdp"))
            return x

    with jax.set_mesh(AUTO):
        graph, state = nnx.split(Mlp(nnx.Rngs(0)))
        specs = nnx.get_partition_spec(state)
    params = nnx.to_pure_dict(state)
    specs = jax.tree.map(lambda s: NamedSharding(AUTO, s), nnx.to_pure_dict(specs))

    def apply(params, x):
        new = nnx.merge(graph, jax.tree.map(lambda x: x, state))
        nnx.update(new, params)
        return new(x)

    with jax.set_mesh(AUTO):
        check_collectives(apply, params, specs, normal(64, 48))


def check_collectives(apply, params, specs, x, moved=lambda p, x, z: (p, x + z)):
    """Those of the step beyond the base's forward and backward all have the rank."""
    params = jax.device_put(params, specs)
    plan = jlora.plan(apply, params, x, rank=RANK)
    trainable, frozen = jlora.partition(jlora.wrap(params, plan=plan))
    lifted = jlora.lift(apply)

    def loss(y):
        return jnp.mean(jnp.square(y))

    def adapted(trainable, frozen, x):
        return jax.value_and_grad(lambda t: loss(lifted(jlora.combine(t, frozen), x)))(
            trainable
        )

    def floor(params, x):
        """Frozen, but for a number that the first weight's input depends on."""
        return jax.value_and_grad(lambda z: loss(apply(*moved(params, x, z))))(0.0)

    def found(fn, *args):
        with jax.set_mesh(AUTO):
            compiled = jax.jit(fn).lower(*args).compile(compiler_options=EMITTERS)
        text = compiled.as_text()
        return collections.Counter(hlo.collectives(text))

    x = put(x, AUTO, "fsdp")
    ranks = {RANK, 2 * RANK, 3 * RANK}  # weights that share an activation share x·a
    got, want = found(adapted, trainable, frozen, x), found(floor, params, x)
    assert any(c.kind == "all-gather" for c in want)  # or there is nothing to see
    more = got - want
    assert more and all(ranks & {*c.shape} for c in more), more
    wrong = found(
        lambda t, f, x: jax.value_and_grad(
            lambda t: loss(apply(jlora.merge(jlora.combine(t, f)), x))
        )(t),
        trainable,
        frozen,
        x,
    )
    assert not all(ranks & {*c.shape} for c in wrong - want)  # W + BA in the loss
