"""Many adapters at once: every example equals the model with its adapter merged."""

import dataclasses
import functools
import pickle
import warnings

import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import (
    by_hand,
    close,
    cotangents,
    dot_with,
    integers,
    normal,
    randomise,
    wrap_random,
)
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint
import jlora.peft
from jlora._algebra import slots

N = 4  # slots


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(6)(nn.relu(nn.Dense(9)(x)))), None


class Layers(nn.Module):
    """Scanned and rematerialised."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack()(x, None)[0]


class Module(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        return self.embed.attend(x + self.down(nnx.relu(self.up(x))))


def haiku_model(x):
    return hk.Linear(5)(jax.nn.relu(hk.Linear(8)(x)))


HAIKU = hk.without_apply_rng(hk.transform(haiku_model))


def experts(p, x):
    """Each token to all, by weights of its own."""
    gates = jax.nn.softmax(x @ p["router"])
    h = jnp.einsum("ti,eio->teo", x, p["up"])
    return jnp.einsum("teo,te->to", h, gates)


def convolution(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x[None], p["w"], (1, 1), "SAME", dimension_numbers=numbers
    )
    return y[0].mean((0, 1)) @ p["head"]


# fn of one example; its params; a batch of examples
CASES = {
    "plain": (
        lambda p, x: jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"],
        {"up": normal(6, 8), "bias": normal(8), "down": normal(8, 5, seed=1)},
        normal(9, 3, 6),
    ),
    "linen": (
        Layers().apply,
        Layers().init(jax.random.key(0), normal(6)),
        normal(9, 6),
    ),
    "nnx": (lambda m, ids: m(ids), Module(), integers(9, 3, below=7)),
    "haiku": (
        HAIKU.apply,
        HAIKU.init(jax.random.key(0), normal(3, 6)),
        normal(9, 3, 6),
    ),
    "equinox": (
        lambda m, x: jax.vmap(m)(x),
        eqx.nn.MLP(6, 5, 8, 2, key=jax.random.key(0)),
        normal(9, 3, 6),
    ),
    "experts": (
        experts,
        {"router": normal(6, 3), "up": normal(3, 6, 5)},
        normal(9, 4, 6),
    ),
    "convolution": (
        convolution,
        {"w": normal(3, 3, 4, 5), "head": normal(5, 2)},
        normal(9, 6, 6, 4),
    ),
}
IDS = jnp.array([2, 0, -1, 3, 3, 1, 0, -1, 2])
OPTIONS = [{}, {"dora": True}, {"lora_bias": True}, {"rslora": True}]


def adapters_of(fn, params, example, args=(), **shared):
    """Of ranks, alphas and targets of their own, with random numbers."""
    made = []
    whole = jlora.plan(fn, params, example, *args, targets="**")
    for k in range(N):
        paths = list(whole)
        targets = paths if k != 1 else paths[:1]
        own = {"rank": 1 + k % 3, "alpha": 2.0 + k, "targets": targets}
        plan = jlora.plan(fn, params, example, *args, **own)
        if callable(params):  # a module of Equinox holds functions
            tree = randomise(jlora.wrap(params, plan=plan, **shared), k)
        else:
            tree = wrap_random(params, plan, seed=k, **shared)
        made.append(tree)
    return made


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: next(iter(x), "lora"))
@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch(name, options):
    """Values and gradients, against each adapter merged by hand."""
    fn, params, x = CASES[name]
    if "lora_bias" in options and name in ("experts", "nnx"):
        pytest.skip("no bias, or no layer that would add one")
    if options and name in ("equinox", "haiku"):
        options = {}
    made = adapters_of(fn, params, x[0], **options)
    bank = jlora.stack([jlora.adapter(tree) for tree in made])
    assert isinstance(bank, jlora.Bank) and bank.slots == N
    weights = cotangents(jax.eval_shape(jax.vmap(lambda x: fn(params, x)), x))

    def ours(bank, x):
        out = jlora.per_example(fn)(params, bank, IDS, x)
        return dot_with(weights, out), out

    (_, out), grads = jax.jit(jax.value_and_grad(ours, has_aux=True, allow_int=True))(
        bank, x
    )
    for k, i in enumerate(IDS.tolist()):
        if i >= 0 and "lora_bias" in options:  # plain params have no place for it
            want = jlora.lift(fn)(made[i], x[k])
        else:
            want = fn(params if i < 0 else jlora.merge(made[i]), x[k])
        close(out[k], want, 2e-5, f"example {k}")

    for i, tree in enumerate(made):
        trains, frozen = jlora.partition(tree)
        rows = np.flatnonzero(np.asarray(IDS) == i)

        def alone(trains, rows=rows, frozen=frozen):
            tree = jlora.combine(trains, frozen)
            outs = [jlora.lift(fn)(tree, x[k]) for k in rows]
            return sum(
                dot_with([w[k] for w in weights], y)
                for k, y in zip(rows, outs, strict=True)
            )

        want = dict(jlora.adapter(jlora.combine(jax.grad(alone)(trains), frozen)))
        for path, leaf in want.items():
            for field in ("a", "b", "c", "m"):
                g, own = getattr(leaf, field), getattr(grads[path], field)
                if g is None:
                    continue
                at = tuple(slice(0, n) for n in g.shape)
                close(own[i][at], g, 1e-4, f"{path} {field} of slot {i}")


def test_slots_that_are_not_used_have_no_gradient():
    fn, params, x = CASES["plain"]
    made = adapters_of(fn, params, x[0], dora=True, lora_bias=True)
    bank = jlora.stack([jlora.adapter(tree) for tree in made])

    def loss(bank):
        return jnp.sum(
            jlora.per_example(fn)(params, bank, jnp.array([0, 2, -1]), x[:3])
        )

    for leaf in jax.grad(loss)(bank).values():
        for name in ("a", "b", "c", "m"):
            g = getattr(leaf, name)
            assert (g[1] == 0).all() and (g[3] == 0).all() and (g[0] != 0).any()


def test_padding_stays_zero_in_training():
    """A slot's rank is its adapter's, also under Adam with weight decay."""
    fn, params, x = CASES["plain"]
    plans = [jlora.plan(fn, params, x[0], rank=r) for r in (1, 3)]
    bank = jlora.stack([jlora.adapter(wrap_random(params, p)) for p in plans])
    trains, frozen = jlora.partition(bank)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state, ids = tx.init(trains), jnp.array([0, 1, 0])

    @jax.jit
    def step(trains, state):
        def loss(trains):
            bank = jlora.combine(trains, frozen)
            return jnp.sum(jlora.per_example(fn)(params, bank, ids, x[:3]) ** 2)

        updates, state = tx.update(jax.grad(loss)(trains), state, trains)
        return optax.apply_updates(trains, updates), state

    for _ in range(3):
        trains, state = step(trains, state)
    for path, leaf in trains.items():
        assert (leaf.a[0][..., 1:] == 0).all() and (leaf.b[0][1:] == 0).all()
        assert (leaf.a[0][..., 0] != bank[path].a[0][..., 0]).all()


def test_whole_arrays_and_rows_that_train():
    fn, params, ids = CASES["nnx"]
    model = params
    plan = jlora.plan(fn, model, ids[0], rank=2)
    rows = {"embed/embedding": [1, 4]}
    trees = [
        jlora.wrap(model, plan=plan, train="down/bias", train_rows=rows),
        jlora.wrap(model, plan=plan, train_rows=rows),
        jlora.wrap(model, plan=plan),
    ]
    rng = np.random.default_rng(0)

    def moved(tree):
        halves = jlora.partition(tree)
        noisy = jax.tree.map(
            lambda x: x + rng.normal(size=x.shape).astype("f4"), halves[0]
        )
        return jlora.combine(noisy, halves[1])

    trees = [moved(tree) for tree in trees]
    bank = jlora.stack([jlora.adapter(tree) for tree in trees])
    which = jnp.array([0, 1, 2, -1, 0])
    got = jax.jit(jlora.per_example(fn))(model, bank, which, ids[:5])
    for k, i in enumerate(which.tolist()):
        own = model if i < 0 else jlora.merge(trees[i])
        close(got[k], fn(own, ids[k]), 2e-5, f"slot {i}")


def test_a_vmap_over_a_bank_gives_its_adapters():
    fn, params, x = CASES["plain"]
    made = adapters_of(fn, params, x[0])
    bank = jlora.stack([jlora.adapter(tree) for tree in made])

    def one(adapter, x):
        return jlora.lift(fn)(jlora.attach(params, adapter), x)

    got = jax.vmap(one, (0, None))(bank, x[0])
    for k, tree in enumerate(made):
        close(got[k], fn(jlora.merge(tree), x[0]), 2e-5)
        close(one(jlora.pick(bank, k), x[0]), got[k], 1e-6)


def test_put_replaces_a_slot_without_compiling_anew():
    fn, params, x = CASES["plain"]
    made = adapters_of(fn, params, x[0])
    bank = jlora.stack([jlora.adapter(tree) for tree in made])
    plans = [jlora.plan(fn, params, x[0], rank=2, alpha=k + 1.0) for k in range(3)]
    trees = [wrap_random(params, plan, seed=9 + k) for k, plan in enumerate(plans)]
    traced = []

    def served(bank, ids, x):
        traced.append("served")
        return jlora.per_example(fn)(params, bank, ids, x)

    def replaced(bank, i, adapter):
        traced.append("put")
        return jlora.put(bank, i, adapter)

    served, replaced = jax.jit(served), jax.jit(replaced, donate_argnums=0)
    ids = jnp.array([0, 1, 2, 3])
    before = served(bank, ids, x[:4])
    for k, tree in enumerate(trees):
        bank = replaced(bank, k % 2 + 1, jlora.adapter(tree))
    after = served(bank, ids[::-1], x[:4][::-1])[::-1]
    assert traced == ["served", "put"] and isinstance(bank, jlora.Bank)
    close(after[0], before[0], 1e-6)
    close(after[3], before[3], 1e-6)
    close(after[1], fn(by_hand(trees[2], plans[2]), x[1]), 2e-5)
    close(after[2], fn(by_hand(trees[1], plans[1]), x[2]), 2e-5)


def test_on_a_quantised_base():
    fn, params, x = CASES["plain"]
    plan = jlora.plan(fn, params, x[0], rank=2)
    coded = jlora.quantize(params, "nf4", plan=plan, block=None)
    trees = [wrap_random(coded, plan, seed=k) for k in range(2)]
    bank = jlora.stack([jlora.adapter(tree) for tree in trees])
    got = jax.jit(jlora.per_example(fn))(coded, bank, jnp.array([1, 0, -1]), x[:3])
    for k, i in enumerate([1, 0]):
        close(got[k], fn(jlora.merge(trees[i]), x[k]), 2e-5)
    close(got[2], fn(jlora.merge(coded), x[2]), 2e-5)


def test_arguments_for_all_examples():
    fn, params, x = CASES["plain"]
    bank = jlora.stack(
        [jlora.adapter(wrap_random(params, jlora.plan(fn, params, x[0])))]
    )

    def shifted(p, x, shift, sign=1.0):
        return fn(p, x) * sign + shift

    ids = jnp.array([0, -1])
    got = jlora.per_example(shifted, in_axes=(0, None), out_axes=1)(
        params, bank, ids, x[:2], 3.0
    )
    want = jlora.per_example(fn)(params, bank, ids, x[:2])
    close(got, jnp.moveaxis(want, 0, 1) + 3)


@pytest.mark.parametrize("slots", [1, 8, 64])
def test_it_costs_what_one_adapter_costs(slots):
    """By the compiler's count of FLOPs, in training and inference."""
    d, rows = 128, 16
    params = {"w": normal(d, d), "v": normal(d, d)}

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    tree = jlora.wrap(params, rank=4, targets="*", plan=None)
    bank = jlora.stack([jlora.adapter(tree)] * slots)
    ids, x = jnp.arange(rows) % slots, normal(rows, 32, d)

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    def many(bank, ids, x):
        return jlora.per_example(fn)(params, bank, ids, x).sum()

    def one(adapter, x):
        return jlora.lift(fn)(jlora.attach(params, adapter), x).sum()

    adapter = jlora.adapter(tree)
    assert flops(many, bank, ids, x) <= 1.01 * flops(one, adapter, x)
    if slots <= 8:
        with_grads = flops(jax.grad(many, allow_int=True), bank, ids, x)
        assert with_grads <= 1.02 * flops(jax.grad(one, allow_int=True), adapter, x)


# --------------------------------------------------------------------- what is around


def plain_bank(*options):
    """Adapters of the plain function, each with its own options of `wrap`."""
    fn, params, x = CASES["plain"]
    plan = jlora.plan(fn, params, x[0], rank=2)
    trees = [
        randomise(jlora.wrap(params, plan=plan, **own), k)
        for k, own in enumerate(options)
    ]
    return fn, params, x, [jlora.adapter(tree) for tree in trees]


class Decoder(nn.Module):
    """Packed documents: attention within each, scanned layers, a tied head."""

    @nn.compact
    def __call__(self, ids, segments):
        embed = nn.Embed(7, 8)
        x = embed(ids)
        mask = (segments[:, None] == segments) & jnp.tri(len(ids), dtype=bool)
        layers = nn.scan(
            nn.remat(Attention),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = layers()(x, mask)
        return embed.attend(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
        scores = jnp.where(mask, jnp.einsum("qhd,khd->hqk", q, k), -1e9)
        y = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="o")(y)
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(x))), None


def test_ids_of_tokens():
    """Packed documents have the logits that each has with its adapter for the row."""
    fn = Decoder().apply
    segments = jnp.array([[0] * 4 + [1] * 3 + [2] * 3, [0] * 2 + [1] * 8])
    which = jnp.array([[2] * 4 + [0] * 3 + [-1] * 3, [1] * 2 + [2] * 8])
    ids, weights = integers(2, 10, below=7), normal(2, 10, 7)
    params = Decoder().init(jax.random.key(0), ids[0], segments[0])
    made = adapters_of(fn, params, ids[0], args=(segments[0],))[:3]
    bank = jlora.stack([jlora.adapter(tree) for tree in made])

    def with_row_of_one(params, ids, segments):
        return jax.vmap(fn, (None, 0, 0))(params, ids[None], segments[None])[0]

    def by_token(fn):
        def out(bank):
            y = jlora.per_example(fn)(params, bank, which, ids, segments)
            return jnp.sum(y * weights), y

        return out

    def by_example(bank):
        """Both rows with each adapter; of which every token takes its own."""
        slots = jnp.arange(-1, 3)
        of = jnp.repeat(slots, 2)
        rows = jnp.tile(ids, (4, 1)), jnp.tile(segments, (4, 1))
        y = jlora.per_example(fn)(params, bank, of, *rows).reshape(4, 2, 10, 7)
        y = jnp.where((which == slots[:, None, None])[..., None], y, 0).sum(0)
        return jnp.sum(y * weights), y

    (_, want), wanted = jax.jit(jax.value_and_grad(by_example, has_aux=True))(bank)
    call = jax.jit(jax.value_and_grad(by_token(fn), has_aux=True))
    (_, got), grads = call(bank)
    close(got, want, 3e-5)
    for path, leaf in grads.items():
        close((leaf.a, leaf.b), (wanted[path].a, wanted[path].b), 1e-4, path)
    close(by_token(fn)(bank)[1], want, 3e-5, "op by op")
    close(jax.jit(by_token(with_row_of_one))(bank)[1], want, 3e-5, "a row of one")


def test_ids_of_tokens_where_they_cannot_be_told():
    fn, params, x, adapters = plain_bank({}, {})
    bank, ids = jlora.stack(adapters), jnp.array([[0, 1, -1]])

    def last(p, x):
        return jnp.broadcast_to(x, (6, *x.shape)) @ p["up"]

    with pytest.raises(
        ValueError, match=r"'up'.*whose axes are \(6, 3\).*the 3 tokens"
    ):
        jlora.per_example(last)(params, bank, ids, x[:1])
    with pytest.raises(
        ValueError, match="'up' is used by 'tanh'.*of its own: expected"
    ):
        jlora.per_example(lambda p, x: x @ jnp.tanh(p["up"]))(params, bank, ids, x[:1])
    for options, what in [
        ({"dora": True}, "has m"),
        ({"lora_bias": True}, "has c"),
        ({"train": "bias"}, "'bias' is no pair of factors"),
    ]:
        bank = jlora.stack(plain_bank(options, options)[3])
        with pytest.raises(ValueError, match=what):
            jlora.per_example(fn)(params, bank, ids, x[:1])
    got = jlora.per_example(fn)(params, jlora.stack(adapters), ids, x[:1])
    for k, i in enumerate(ids[0].tolist()):
        own = jlora.pick(jlora.stack(adapters), i)
        close(got[0, k], fn_of(fn, params, own, x[0])[k])


def test_a_slot_of_nan_is_its_own_matter():
    fn, params, x, adapters = plain_bank({}, {})
    bank = jlora.stack(adapters)
    broken = jax.tree.map(lambda x: x + jnp.nan, adapters[0])
    bank = jlora.put(bank, 0, broken)
    ids = jnp.array([-1, 1, 7])

    got = jax.jit(lambda bank, ids: jlora.per_example(fn)(params, bank, ids, x[:3]))(
        bank, ids
    )
    close(got[0], fn(params, x[0]))
    close(got[2], fn(params, x[2]))
    grads = jax.grad(
        lambda bank, ids: jlora.per_example(fn)(params, bank, ids, x[:3]).sum()
    )(bank, jnp.array([-1, 1, -1]))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))
    close(fn_of(fn, params, jlora.pick(bank, -1), x[0]), fn(params, x[0]))


@pytest.mark.parametrize("ids", [[0, 1, -1, 2], [[0], [1], [-1], [2]]], ids=str)
def test_a_slot_of_nan_beside_others(ids):
    """Where slots are side by side, its examples are NaN, and no others are."""
    fn, params, x, adapters = plain_bank({}, {})
    bank = jlora.stack([*adapters, adapters[0]])
    ids, x = jnp.array(ids), x[:1, :1].repeat(4, 0)
    out = jlora.per_example(fn, product=None if ids.ndim == 2 else "joined")

    def loss(bank, x):
        y = out(params, bank, ids, x)
        return y[jnp.array([0, 1, 2])].sum(), y

    for factor in ("a", "b"):
        leaf = bank["up"]
        bad = getattr(leaf, factor).at[2].set(jnp.nan)
        broken = jlora.Bank(
            bank | {"up": dataclasses.replace(leaf, **{factor: bad})}, bank.ndims
        )
        (_, got), grad = jax.value_and_grad(loss, 1, has_aux=True)(broken, x)
        close(got[:3], out(params, bank, ids, x)[:3], 1e-6)
        assert jnp.isnan(got[3]).all()
        assert jnp.isfinite(grad[:3]).all()


@pytest.mark.parametrize(
    ("n", "examples", "tokens", "options", "want"),
    [
        (2, 16, 2, {}, "joined"),
        (2, 16, 3, {}, "gathered"),  # too many tokens
        (4, 16, 1, {}, "joined"),
        (5, 16, 1, {}, "gathered"),  # too few examples for so many slots
        (16, 64, 1, {}, "joined"),
        (17, 99, 1, {}, "gathered"),  # too many slots
        (2, 16, 1, {"dora": True}, "gathered"),  # magnitudes
        (2, 16, 1, {"train": "bias"}, "gathered"),  # whole arrays
    ],
)
def test_the_product_is_chosen_by_shapes(n, examples, tokens, options, want):
    fn, params, _, adapters = plain_bank(options, options)
    bank = jlora.stack([adapters[k % 2] for k in range(n)])
    x, ids = normal(examples, tokens, 6), jnp.arange(examples) % (n + 1) - 1
    call = jlora.per_example(fn)
    said = jlora.explain(call, params, bank, ids, x)
    assert said.product == want
    assert f"{want}: {examples} examples, {n} slots" in str(said)
    assert [e.path for e in said] == sorted(bank)
    shapes = jax.eval_shape(lambda *args: args, params, bank, ids, x)
    assert jlora.explain(call, *shapes) == said
    wanted = jlora.per_example(fn, product="gathered")

    def out(call, bank):
        y = call(params, bank, ids, x)
        return jnp.sum(jnp.sin(y)), y

    grad = jax.value_and_grad(out, 1, has_aux=True)
    for run in (grad, jax.jit(grad, static_argnums=0)):
        (_, got), grads = run(call, bank)
        (_, y), want_grads = run(wanted, bank)
        close(got, y, 2e-6)
        close(jax.tree.leaves(grads), jax.tree.leaves(want_grads), 1e-5)


JOINED = [(name, "joined") for name in CASES if name != "convolution"]
KERNEL = [(name, "kernel") for name in CASES]  # the gather, on another device than TPU


@pytest.mark.parametrize(("name", "product"), JOINED + KERNEL)
def test_each_product_is_the_gathered_one(name, product):
    """Values, gradients in both modes, with and without derivatives."""
    fn, params, x = CASES[name]
    made = adapters_of(fn, params, x[0])
    bank = jlora.stack([jlora.adapter(tree) for tree in made])
    weights = cotangents(jax.eval_shape(jax.vmap(lambda x: fn(params, x)), x))

    def loss(bank, product):
        out = jlora.per_example(fn, product=product)(params, bank, IDS, x)
        return dot_with(weights, out), out

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, want), wanted = grad(bank, "gathered")
    (_, got), grads = grad(bank, product)
    close(got, want, 1e-5)
    close(jax.jit(loss, static_argnums=1)(bank, product)[1], want, 1e-5)
    for path, leaf in wanted.items():
        own = grads[path]
        close((own.a, own.b, own.scale), (leaf.a, leaf.b, leaf.scale), 1e-4, path)
    (_, want), (_, tangents) = jax.jvp(lambda b: loss(b, "gathered"), [bank], [bank])
    (_, got), (_, ours) = jax.jvp(lambda b: loss(b, product), [bank], [bank])
    close((got, ours), (want, tangents), 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "sizes"), [(1, (9, 5)), (3, (16, 8)), (16, (8, 24))], ids=str
)
def test_the_kernel(tokens, sizes, dtype):
    """Interpreted, against NumPy in float64."""
    n, out = sizes
    ids = np.array([2, 0, -1, 2, 2, 1])
    x, a, b = normal(6, tokens, n), normal(3, n, 2), normal(3, 2, out, seed=1)
    x, a, b = (y.astype(dtype) for y in (x, a, b))
    got = slots.read(x, a, b, jnp.asarray(ids), interpret=True)
    x, a, b = (np.asarray(y.astype("float32"), np.float64) for y in (x, a, b))
    at = np.maximum(ids, 0)
    want = (x @ a[at] @ b[at]).astype(np.float32)
    close(got, want, 1e-6 if dtype == "float32" else 2e-2)
    assert got.dtype == jnp.float32


def test_where_the_kernel_is(monkeypatch):
    """In products of untouched weights with few tokens, without derivatives."""
    fn, params, x, adapters = plain_bank({}, {})
    bank, ids = jlora.stack(adapters), jnp.array([1, 0, -1])
    call = jlora.per_example(fn, product="kernel")

    def loss(bank, x):
        return call(params, bank, ids, x).sum()

    def kernels(fn, *args):
        return str(jax.make_jaxpr(jax.jit(fn))(*args)).count("pallas_call")

    assert kernels(loss, bank, x[:3]) == 2  # up and down
    assert kernels(jax.grad(loss), bank, x[:3]) == 0
    many = jnp.tile(x[:3], (1, 6, 1))  # 18 tokens
    assert kernels(loss, bank, many) == 0
    dora = jlora.stack(plain_bank({"dora": True}, {"dora": True})[3])
    assert kernels(loss, dora, x[:3]) == 0
    said = jlora.explain(call, params, bank, ids, x[:3])
    assert said.product == "kernel"

    def interpreted(*args, tpu, default):
        return tpu(*args)

    want = jlora.per_example(fn)(params, bank, ids, x[:3])
    monkeypatch.setattr(slots.lax, "platform_dependent", interpreted)
    monkeypatch.setattr(slots, "read", functools.partial(slots.read, interpret=True))
    close(jax.jit(call)(params, bank, ids, x[:3]), want, 1e-5)


def two_ways(p, x, e):
    return jnp.einsum("ti,tio->to", x, p["up"][e])


OUT_OF_ORDER = {
    "concatenated": lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1),
    "below": lambda p, x: jnp.tile(x, 2) @ jnp.concatenate([p["q"], p["k"]], 0),
    "rolled": lambda p, x: x @ jnp.roll(p["q"], 2, 1) + x @ p["k"],
    "stacked": lambda p, x: jnp.einsum("i,kio->ko", x, jnp.stack([p["q"], p["k"]])),
    "returned": lambda p, x: (x @ p["k"], p["q"]),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_ranks_that_are_no_longer_in_the_order_of_slots(name):
    """They are gathered; joined by order, and by token, they are an error."""
    fn = OUT_OF_ORDER[name]
    params = {"q": normal(4, 5), "k": normal(4, 5, seed=1)}
    rules = [jlora.Rule("q", rank=1), jlora.Rule("k", rank=2)]
    trees = [
        randomise(jlora.wrap(params, rank=1, rules=rules, key=jax.random.key(s)), s)
        for s in range(2)
    ]
    bank = jlora.stack([jlora.adapter(tree) for tree in trees])
    ids, x = jnp.arange(16) % 2, normal(16, 4)
    call = jlora.per_example(fn)
    assert jlora.explain(call, params, bank, ids, x).product == "gathered"
    got = call(params, bank, ids, x)
    for k in range(3):
        want = fn(jlora.merge(trees[k % 2]), x[k])
        own = jax.tree.map(lambda y, k=k: y[k], got)
        own = jlora.merge(own) if name == "returned" else own
        close(own, want, 1e-5)
    with pytest.raises(ValueError, match=r"'q( \+ k)?' is used by.*of its own"):
        jlora.per_example(fn, product="joined")(params, bank, ids, x)


def test_an_expert_for_each_token_is_gathered():
    params = {"up": normal(3, 4, 4)}
    x, e = normal(16, 1, 4), integers(16, 1, below=3)
    plan = jlora.plan(two_ways, params, x[0], e[0], rank=2)
    trees = [randomise(jlora.wrap(params, plan=plan), s) for s in range(2)]
    bank, ids = jlora.stack([jlora.adapter(t) for t in trees]), jnp.arange(16) % 2
    got = jlora.per_example(two_ways)(params, bank, ids, x, e)
    for k in range(3):
        close(got[k], two_ways(jlora.merge(trees[k % 2]), x[k], e[k]), 1e-5)


@pytest.mark.parametrize("product", ["gathered", "kernel"])
def test_no_slot_and_nan_in_the_first_one(product):
    fn, params, x, adapters = plain_bank({}, {})
    bank = jlora.stack(adapters)
    bank = jlora.put(bank, 0, jax.tree.map(lambda x: x + jnp.nan, adapters[0]))
    call = jlora.per_example(fn, product=product)
    grads = jax.grad(lambda b, x: call(params, b, jnp.array([-1, 1]), x).sum(), (0, 1))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads(bank, x[:2])))
    assert call(params, bank, jnp.array([-1, 1]), x[:2, :0]).shape == (2, 0, 5)


def test_a_use_that_cannot_be_joined_is_gathered():
    fn, params, x, adapters = plain_bank({}, {})
    bank, ids = jlora.stack(adapters[:1]), jnp.zeros(8, jnp.int32)

    def other(params, x):
        return x @ jnp.tanh(params["up"])

    call = jlora.per_example(other)
    args = params, bank, ids, x[:1].repeat(8, 0)
    assert jlora.explain(call, *args).product == "gathered"
    with pytest.warns(UserWarning, match="'up' is used by 'tanh'"):
        call(*args)
    joined = jlora.per_example(other, product="joined")
    for call in (joined, functools.partial(jlora.explain, joined)):
        with pytest.raises(ValueError, match="'up' is used by 'tanh'.*of its own"):
            call(*args)
    with pytest.raises(ValueError, match="product is 'ragged': expected 'gathered'"):
        jlora.per_example(other, product="ragged")
    with pytest.raises(ValueError, match="product='joined' with ids.*of tokens"):
        jlora.per_example(fn, product="joined")(params, bank, ids[:, None], args[3])
    dora = jlora.stack(plain_bank({"dora": True}, {"dora": True})[3])
    with pytest.raises(ValueError, match="has m: expected plain factors.*no product"):
        jlora.per_example(fn, product="joined")(params, dora, *args[2:])


def fn_of(fn, params, adapter, x):
    return jlora.lift(fn)(jlora.attach(params, adapter), x)


def test_put_at_a_slot_that_is_not_there():
    """Writes nothing, and not the last one."""
    _, _, _, adapters = plain_bank({}, {})
    bank = jlora.stack([adapters[0]] * 3)
    for i in (-1, -3, 3, 9):
        got = jax.jit(jlora.put)(bank, i, adapters[1])
        close(dict(got), dict(bank), 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64])
def test_ids_of_any_integer_type(dtype):
    """Also of one that cannot hold the number of slots."""
    fn, params, x, adapters = plain_bank({})
    bank = jlora.stack(adapters * 300)
    want = fn_of(fn, params, adapters[0], x[0])
    close(jlora.per_example(fn)(params, bank, np.array([5], dtype), x[:1])[0], want)
    close(fn_of(fn, params, jlora.pick(bank, dtype(5)), x[0]), want)
    jax.jit(jlora.put)(bank, dtype(5), adapters[0])


def test_lists_of_ids():
    fn, params, x, adapters = plain_bank({}, {})
    bank = jax.device_get(jlora.stack(adapters))  # NumPy's arrays will do
    call = jlora.per_example(fn)
    close(call(params, bank, [1, 0], x[:2])[1], fn_of(fn, params, adapters[0], x[1]))
    assert call(params, bank, [], x[:0]).shape == (0, 3, 5)
    jlora.put(bank, 0, adapters[1])


def test_a_picked_adapter_has_its_own_paths():
    fn, params, x = CASES["plain"]
    made = adapters_of(fn, params, x[0], dora=True)
    bank = jlora.stack([jlora.adapter(tree) for tree in made])
    for k, tree in enumerate(made):
        assert {*jlora.pick(bank, k)} == {*jlora.adapter(tree)}
    off = jlora.adapter(jlora.scaled(made[0], 0.0))  # turned off is not the same
    again = jlora.pick(jlora.put(bank, 0, off), 0)
    assert {*again} == {*off} and all(x.a.any() for x in again.values())


def test_whole_arrays_in_what_trees_go_through():
    """The gate of a `Full` leaf is a float, as a scale is."""
    fn, params, x, adapters = plain_bank({"train": "bias"}, {})
    bank = jlora.stack(adapters)
    mean = optax.incremental_update(bank, bank, 0.1)
    call = jlora.per_example(fn)
    ids = jnp.array([0, 1])
    close(call(params, mean, ids, x[:2]), call(params, bank, ids, x[:2]))
    assert jlora.pick(bank, 0)["bias"].on is None and "bias" not in jlora.pick(bank, 1)
    jax.grad(lambda bank: call(params, bank, ids, x[:2]).sum())(bank)
    half = jlora.put(
        bank, 0, jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters[0])
    )
    close(call(params, half, -jnp.ones(2, int), x[:2])[0], fn(params, x[0]), 0)
    jlora.optimizer(optax.adam(1e-2), bank)


def test_dropout_has_a_mask_for_each_example():
    fn, params, x, adapters = plain_bank({}, {})
    bank = jlora.dropout(jlora.stack(adapters), 0.5, jax.random.key(0))
    same_x = jnp.stack([x[0]] * 3)
    out = jax.jit(jlora.per_example(fn))(params, bank, jnp.array([0, 0, -1]), same_x)
    assert abs(out[0] - out[1]).max() > 0.1
    close(out[2], fn(params, x[0]))
    with pytest.raises(ValueError, match="put: the bank has dropout keys"):
        jlora.put(bank, 0, adapters[0])


def test_a_function_that_writes_is_refused():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(6, 8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.a(x))

    model = Noisy(nnx.Rngs(0))
    bank = jlora.stack([jlora.adapter(jlora.wrap(model, rank=2))])
    call, x = jlora.per_example(lambda model, x: model(x)), normal(2, 6)
    with pytest.raises(ValueError, match="fn writes into 'drop/rngs.*eval"):
        call(model, bank, [0, 0], x)
    model.eval()
    close(call(model, bank, [0, -1], x), model(x))


def test_options_of_jit_and_vmap():
    fn, params, x, adapters = plain_bank({})
    bank, ids = jlora.stack(adapters), jnp.zeros(2, int)
    want = jlora.per_example(fn)(params, bank, ids, x[:2])
    call = jax.jit(jlora.per_example(fn), donate_argnums=3)
    with warnings.catch_warnings(action="ignore"):  # of a donation without use
        close(call(params, bank, ids, jnp.array(x[:2])), want)

    def centred(params, x):
        return fn(params, x) - lax.pmean(fn(params, x), "batch")

    got = jlora.per_example(centred, axis_name="batch")(params, bank, ids, x[:2])
    close(got, want - want.mean(0), 1e-5)

    def formed(params, x):
        return x @ jnp.tanh(params["up"])

    with pytest.raises(ValueError, match="'up' is used by 'tanh'.*strict=True"):
        jlora.per_example(formed, strict=True)(params, bank, ids, x[:2])


def test_a_sweep_has_the_losses_of_its_runs():
    """Own learning rates under a vmap over slots; against one run after another."""
    fn, params, x, adapters = plain_bank({}, {}, {})
    y = jnp.tanh(normal(9, 3, 5, seed=4))
    rates = jnp.array([1e-3, 1e-2, 3e-2])
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0)

    def begin(trainable, rate):
        state = tx.init(trainable)
        hyper = state.hyperparams | {"learning_rate": rate}
        return state._replace(hyperparams=hyper)

    def step(trainable, frozen, state):
        def loss(trainable):
            adapter = jlora.combine(trainable, frozen)
            return jnp.mean((fn_of(fn, params, adapter, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    def losses(begin, step, adapters, rates):
        trainable, frozen = jlora.partition(adapters)
        state, found = begin(trainable, rates), []
        step = jax.jit(step)
        for _ in range(20):
            trainable, state, value = step(trainable, frozen, state)
            found.append(value)
        return jnp.stack(found)

    bank = jlora.stack(adapters)
    got = losses(jax.vmap(begin), jax.vmap(step), bank, rates)
    for k, adapter in enumerate(adapters):
        close(got[:, k], losses(begin, step, adapter, rates[k]), 1e-5)
    assert got[-1].min() < 0.5 * got[0].min()


def test_what_explain_is_asked():
    """It says what a call does: also of what is no array, and raises what it raises."""
    fn, params, x, adapters = plain_bank({}, {"dora": False})
    bank, ids = jlora.stack(adapters), jnp.array([0, 1, -1])

    def named(p, x, scaled, how):
        y = how(x) if scaled else x
        return jax.lax.pmean(fn(p, y), "batch")

    axes = {"in_axes": (0, None, None), "axis_name": "batch"}
    call = jlora.per_example(named, **axes)
    args = params, bank, ids, x[:3], True, jnp.tanh
    assert [e.status for e in jlora.explain(call, *args)] == ["factored"] * 2
    plain = jlora.per_example(fn)
    assert jlora.explain(jax.jit(plain), params, bank, ids, x[:3]).product == "gathered"
    assert jlora.explain(plain, params, bank, ids[:0], x[:0]).product == "gathered"
    model = eqx.nn.MLP(6, 5, 8, 2, key=jax.random.key(0))
    made = adapters_of(lambda m, x: jax.vmap(m)(x), model, x[0])
    own = jlora.stack([jlora.adapter(tree) for tree in made])
    said = jlora.explain(
        jlora.per_example(lambda m, x: jax.vmap(m)(x)), model, own, ids, x[:3]
    )
    assert {e.status for e in said} == {"factored"}
    with pytest.raises(ValueError, match="ids has 7, and the bank has 2 slots"):
        jlora.explain(plain, params, bank, jnp.array([7, 0, 0]), x[:3])
    dora = jlora.stack(plain_bank({"dora": True}, {"dora": True})[3])
    joined = jlora.per_example(fn, product="joined")
    for call, own in ((plain, ids[:, None]), (joined, ids)):
        with pytest.raises(ValueError, match="has m: expected plain factors"):
            jlora.explain(call, params, dora, own, x[:3])


def test_an_id_that_int32_does_not_hold():
    fn, params, x, adapters = plain_bank({}, {})
    bank = jlora.stack(adapters)
    with pytest.raises(ValueError, match="ids has 4294967296"):
        jlora.per_example(fn)(params, bank, np.array([2**32]), x[:1])
    with jax.enable_x64(True):
        ids = jnp.array([2**32, 1], jnp.int64)
        got = jax.jit(jlora.per_example(fn))(params, bank, ids, x[:2])
    close(got[0], fn(params, x[0]), 1e-5)


def test_a_slot_in_peft_files(tmp_path):
    """It is what the adapter's own files are, with the bank's rank."""
    fn, params, x = CASES["plain"]
    made = adapters_of(fn, params, x[0], dora=True)
    bank = jlora.stack([jlora.adapter(tree) for tree in made])
    names = {"up": "layers.up", "down": "layers.down"}
    for k, tree in enumerate(made):
        one = jlora.attach(params, jlora.pick(bank, k))
        jlora.peft.save(tmp_path / str(k), one, names=names)
        back = jlora.peft.load(tmp_path / str(k), params, names=names)
        close(jlora.merge(back), jlora.merge(tree), 1e-5)


@pytest.mark.parametrize("product", [None, "gathered", "kernel"])
def test_rows_that_train_in_each_product(product):
    params = {"e": normal(6, 4), "w": normal(4, 3)}
    tree = randomise(jlora.wrap(params, rank=2, targets="w", train_rows={"e": [1, 3]}))
    bank = jlora.stack([jlora.adapter(tree)] * 2)

    def fn(p, i):
        return p["e"][i] @ p["w"]

    ids, i = jnp.array([0, -1, 1]), jnp.array([1, 1, 2])
    got = jlora.per_example(fn, product=product)(params, bank, ids, i)
    merged = jlora.merge(tree)
    close(got, jnp.stack([fn(merged, 1), fn(params, 1), fn(merged, 2)]), 1e-5)


def test_a_table_of_one_slot():
    _, _, _, adapters = plain_bank({}, {}, {})
    bank = jlora.stack(adapters)
    text = jlora.summary(bank)
    assert text.endswith("of each of 3 slots")
    assert str(jlora.summary(adapters[0])) in text
    with pytest.raises(ValueError, match="found a bank of adapters.*StandardCheckpoin"):
        jlora.checkpoint.save("nowhere", bank)


def test_written_and_read_again(tmp_path):
    fn, params, x, adapters = plain_bank({}, {})
    bank, ids = jlora.stack(adapters), jnp.array([1, -1])
    call = jax.jit(jlora.per_example(fn))
    want = call(params, bank, ids, x[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "bank", bank)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "bank", jax.eval_shape(lambda: bank))
    close(call(params, back, ids, x[:2]), want, 0)
    data = flax.serialization.to_bytes(bank)
    empty = jax.tree.map(jnp.zeros_like, bank)
    back = flax.serialization.from_bytes(empty, data)
    close(call(params, back, ids, x[:2]), want, 0)
    text = export.export(call)(params, bank, ids, x[:2]).serialize()
    served = export.deserialize(bytearray(text))
    close(served.call(params, bank, ids, x[:2]), want, 1e-6)
    assert isinstance(pickle.loads(pickle.dumps(bank)), jlora.Bank)


# ------------------------------------------------------------------------- bad input


def test_what_cannot_be_stacked():
    fn, params, x = CASES["plain"]
    tree = jlora.wrap(params, rank=2, targets="up")
    one = jlora.adapter(tree)
    other = jlora.adapter(jlora.wrap(params | {"up": normal(6, 7)}, 2, targets="up"))
    dora = jlora.adapter(jlora.wrap(params, rank=2, targets="up", dora=True))
    full = jlora.adapter(jlora.wrap(params, rank=2, targets="down", train="up"))
    moved = jlora.adapter(jlora.wrap(params, rank=2, targets="up", init="pissa"))
    bank = jlora.stack([one, one])
    for adapters, message in [
        ([], "stack: expected a list of adapters.*found none"),
        (one, "stack: expected a list of adapters.*found one"),
        ([one, tree], "stack: adapter 1 is an adapted tree: expected what jlora.adap"),
        ([one, {"up": 1}], "stack: adapter 1 is a dict: expected what jlora.adapter"),
        ([one, bank], "stack: adapter 1: found a bank of 2 adapters: expected one"),
        ([one, other], r"'up' of adapter 1: expected a weight of shape \(6, 8\)"),
        ([one, dora], r"'up' of adapter 1: expected a magnitude \(DoRA\) in all"),
        ([one, full], "'up' of adapter 1: expected factors that train, as in"),
        (
            [one, moved],
            "'up' of adapter 1: expected one base for all: 'pissa' has moved",
        ),
        ([jlora.partition(one)[1]], "has 'up' without a, b: expected a whole adapter"),
    ]:
        with pytest.raises(ValueError, match=message):
            jlora.stack(adapters)


def test_a_bank_and_an_adapter_are_not_mistaken():
    fn, params, x = CASES["plain"]
    one = jlora.adapter(jlora.wrap(params, rank=2, targets="up"))
    bank = jlora.stack([one, one])
    for call, message in [
        (lambda: jlora.attach(params, bank), "attach: found a bank of 2 adapters"),
        (lambda: jlora.unmerge(params, bank), "unmerge: found a bank of 2 adapters"),
        (lambda: jlora.merge(bank), "merge: found a bank of 2 adapters"),
        (lambda: jlora.unwrap(bank), "unwrap: found a bank of 2 adapters"),
        (lambda: jlora.fade(bank, 0.5), "fade: found a bank of 2 adapters"),
        (lambda: jlora.drop_base(bank), "drop_base: found a bank of 2 adapters"),
        (lambda: jlora.mix([one, bank], [1, 1]), "mix: found a bank of 2 adapters"),
        (lambda: jlora.lift(fn)(bank, x[0]), "lift: found a bank of 2 adapters"),
        (
            lambda: jlora.peft.save("unwritten", bank, names={"up": "up"}),
            "peft.save: found a bank of 2 adapters",
        ),
        (lambda: jlora.pick(one, 0), "pick: expected a bank of adapters, found one ad"),
        (
            lambda: jlora.put(bank, one, 0),
            "put: found a dict: expected the index of one slot",
        ),
        (lambda: jlora.put(one, 0, one), "put: expected a bank of adapters, found one"),
        (
            lambda: jlora.put(bank, 0, bank),
            "put: the adapter: found a bank of 2 adapters",
        ),
        (
            lambda: jlora.per_example(fn)(params, one, jnp.array([0]), x[:1]),
            "per_example: expected a bank of adapters, found one adapter",
        ),
        (
            lambda: jlora.pick(bank, 2),
            "pick: slot 2 of a bank of 2: expected 0 to 1, or",
        ),
        (lambda: jlora.pick(bank, -2), "pick: slot -2 of a bank of 2"),
        (
            lambda: jlora.put(bank, -1, one),
            "put: slot -1 of a bank of 2: expected 0 to",
        ),
        (lambda: jlora.pick(bank, None), "pick: found a NoneType: expected the index"),
        (lambda: jlora.pick(bank, 0.5), "pick: found float32 of shape"),
        (
            lambda: jlora.pick(jlora.partition(bank)[0], 0),
            "without scale: expected a wh",
        ),
        (lambda: jlora.put(jlora.partition(bank)[1], 0, one), "without a, b: expected"),
        (
            lambda: jlora.per_example(fn)(params, bank, jnp.array([0, 2]), x[:2]),
            "ids has 2, and the bank has 2 slots: expected 0 to 1, or -1",
        ),
        (
            lambda: jlora.per_example(fn)(params, bank, jnp.array([0.0]), x[:1]),
            "ids is float32 of shape",
        ),
        (
            lambda: jlora.per_example(fn)(params, bank, [[0, 1], [0]], x[:2]),
            "ids is a list of which NumPy makes no array of numbers",
        ),
        (
            lambda: jlora.per_example(fn)(params, bank, jnp.array([0, 1]), x[:3]),
            r"2 ids, and argument 0 of shape \(3, .*has 3 examples along axis 0",
        ),
        (
            lambda: jlora.per_example(lambda p, d: fn(p, d["x"]), in_axes=1)(
                params, bank, jnp.array([0, 1]), {"x": jnp.swapaxes(x[:3], 0, 1)}
            ),
            r"2 ids, and argument 0, 'x', of shape .*has 3 examples along axis 1",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_export_may_leave_the_number_of_examples_open():
    fn, params, x = CASES["plain"]
    bank = jlora.stack([jlora.adapter(jlora.wrap(params, rank=2, targets="up"))] * 3)
    call = jax.jit(lambda ids, x: jlora.per_example(fn)(params, bank, ids, x))
    (b,) = jax.export.symbolic_shape("b")
    shapes = ((b,), jnp.int32), ((b, *x.shape[1:]), x.dtype)
    shapes = [jax.ShapeDtypeStruct(*one) for one in shapes]
    exported = jax.export.export(call)(*shapes)
    for ids in ([0, 2], [1, -1, 0]):
        n = len(ids)
        got = exported.call(jnp.array(ids, jnp.int32), x[:n])
        close(got, call(jnp.array(ids), x[:n]))
    report = jlora.explain(jlora.per_example(fn), params, bank, *shapes)
    assert str(report).endswith("gathered: b examples, 3 slots")


def test_keyword_arguments_are_no_examples():
    fn, params, x = CASES["plain"]
    bank = jlora.stack([jlora.adapter(jlora.wrap(params, rank=2, targets="up"))])
    with pytest.raises(TypeError, match="found the keyword arguments x: expected posi"):
        jlora.per_example(fn)(params, bank, jnp.array([0]), x=x[:1])


def test_what_cannot_be_put():
    fn, params, x = CASES["plain"]
    bank = jlora.stack([jlora.adapter(jlora.wrap(params, rank=2, targets="up"))])
    higher = jlora.adapter(jlora.wrap(params, rank=3, targets="up"))
    more = jlora.adapter(jlora.wrap(params, rank=2, targets=["up", "down"]))
    biased = jlora.adapter(jlora.wrap(params, rank=2, targets="up", lora_bias=True))
    for adapter, message in [
        (
            higher,
            "put: 'up': expected a rank of at most 2, which the bank has, found 3",
        ),
        (more, "put: the adapter has 'down', which the bank has not; near paths"),
        (biased, "put: 'up': expected no c, which the bank has not"),
    ]:
        with pytest.raises(ValueError, match=message):
            jlora.put(bank, 0, adapter)


def test_ids_that_no_slot_has_under_jit():
    """They are the base."""
    fn, params, x = CASES["plain"]
    tree = wrap_random(params, jlora.plan(fn, params, x[0]))
    bank = jlora.stack([jlora.adapter(tree)] * 2)
    got = jax.jit(jlora.per_example(fn))(params, bank, jnp.array([2, -3, 1]), x[:3])
    close(got[:2], jnp.stack([fn(params, x[0]), fn(params, x[1])]))
    picked = jax.jit(jlora.pick)(bank, 5)
    close(fn_of(fn, params, picked, x[0]), fn(params, x[0]))


def test_a_bank_is_a_node():
    _, params, _ = CASES["plain"]
    adapter = jlora.adapter(jlora.wrap(params, rank=2, targets="up"))
    bank = jlora.stack([adapter] * 4)
    leaves, treedef = jax.tree.flatten(bank)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, jlora.Bank) and again.slots == 4
    assert "Bank(of 4 slots" in repr(bank)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("rows", [False, True], ids=["whole batch", "split batch"])
@pytest.mark.parametrize("spec", [P(), P("x")], ids=["replicated", "split slots"])
def test_on_a_mesh(spec, rows, kind):
    fn, params, x = CASES["plain"]
    made = adapters_of(fn, params, x[0])
    bank = jlora.stack([jlora.adapter(tree) for tree in made])
    x, ids = x[:8], IDS[:8]
    new = jlora.adapter(made[0])
    want = jlora.per_example(fn)(params, bank, ids, x)
    want_put = jlora.put(bank, 2, new)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        placed = jax.device_put(bank, NamedSharding(mesh, spec))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        own = NamedSharding(mesh, P("y") if rows else P())
        x, ids = jax.device_put((x, ids), own)
        got = [
            jax.jit(jlora.per_example(fn, product=product))(params, placed, ids, x)
            for product in (None, "joined", "kernel")
        ]
        put = jax.jit(jlora.put, donate_argnums=0)(placed, 2, new)
        assert put["up"].a.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    close(jax.device_get(got), [want] * 3, 1e-5)
    close(jax.device_get(dict(put)), dict(want_put), 1e-6)
