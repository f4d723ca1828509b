"""train_rows: rows of an embedding that train as replacements.

Against the table in which these rows are set, in value and in gradient.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import adapted, close, equations, integers, normal, same, says
from jax import lax
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint

V, D = 13, 7
ROWS = [11, 2, 5]
IDS = integers(4, 6, below=V)
X = normal(11, D)
HOT = jax.nn.one_hot(IDS, V)

# A function of the table, and what it is called with.
USES = {
    "lookup": (lambda e, x: e[x], IDS),
    "lookup, clipped": (lambda e, x: e.at[x + 3].get(mode="clip"), IDS),
    "lookup, filled": (lambda e, x: e.at[x + 3].get(mode="fill", fill_value=0), IDS),
    "lookup, from the end": (lambda e, x: e[x - V], IDS),
    "lookup of one": (lambda e, x: e[x[0, 0]], IDS),
    "lookup of one, in a loop": (lambda e, x: lax.map(lambda i: e[i], x[0]), IDS),
    "lookup, vmapped": (lambda e, x: jax.vmap(lambda i: e[i])(x[0]), IDS),
    "lookup, cast": (lambda e, x: e.astype(jnp.bfloat16)[x].astype(jnp.float32), IDS),
    "lookup of the transpose": (lambda e, x: jnp.take(e.T, x, axis=1), IDS),
    "lookup of features": (lambda e, x: e[:, x[0] % D], IDS),
    "head": (lambda e, x: x @ e.T, X),
    "head, contracted": (lambda e, x: jnp.einsum("bd,vd->bv", x, e), X),
    "head, table first": (lambda e, x: e @ x.T, X),
    "head, vmapped": (lambda e, x: jax.vmap(lambda x: e @ x)(x), X),
    "one-hot": (lambda e, x: x @ e, HOT),
    "one-hot, table first": (lambda e, x: e.T @ x.reshape(-1, V).T, HOT),
    "tied": (lambda e, x: jax.nn.log_softmax(jnp.tanh(e[x]) @ e.T), IDS),
    "tied, remat, scan": (
        lambda e, x: lax.scan(
            jax.checkpoint(lambda c, i: (c, jnp.tanh(e[i]) @ e.T)), 0, x
        )[1],
        IDS,
    ),
    "norms of rows": (lambda e, x: (e**2).sum(1)[x], IDS),
    "larger table": (lambda e, x: jnp.concatenate([e, e[:2] * 2])[x], IDS),
    "heads": (lambda e, x: jnp.einsum("vd,bd,v->b", e, x, jnp.arange(V) * 0.1), X),
    "some rows": (lambda e, x: x @ e[3:9].T, X),
    "flipped": (lambda e, x: e[::-1][x], IDS),
}
FORMED = "norms of rows"


def wrapped(table, indices=ROWS, seed=5):
    tree = jlora.wrap({"e": table}, targets=[], train_rows={"e": indices})
    leaf = tree["e"]
    same(leaf.b, table[jnp.array(indices)].astype(jnp.float32))
    new = normal(*leaf.b.shape, seed=seed)
    return {"e": dataclasses.replace(leaf, b=new)}


@pytest.mark.filterwarnings("ignore:.*is formed for it")
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", USES)
def test_value_and_gradient(name, scale):
    fn, x = USES[name]
    table = normal(V, D)
    tree = jlora.scaled(wrapped(table), scale)
    lifted = jlora.lift(lambda p, x: fn(p["e"], x))

    def ours(rows):
        return lifted({"e": dataclasses.replace(tree["e"], b=rows)}, x)

    def theirs(rows):
        at = jnp.array(ROWS)
        return fn(table.at[at].set(scale * rows + (1 - scale) * table[at]), x)

    def found(call, rows):
        out, vjp = jax.vjp(call, rows)
        return out, vjp(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    got, want = jax.jit(lambda r: (found(ours, r), found(theirs, r)))(tree["e"].b)
    close(got, want, 1e-2 if "cast" in name else 1e-5)
    if scale == 1 and name not in FORMED:
        status = jlora.explain(lambda p, x: fn(p["e"], x), tree, x)
        assert [entry.status for entry in status] == ["factored"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_exact_whatever_was_there(dtype):
    """Also in half precision, and where the base has no numbers."""
    table = normal(V, D).at[jnp.array(ROWS)].set(jnp.nan).astype(dtype)
    tree = wrapped(table)
    want = table.at[jnp.array(ROWS)].set(tree["e"].b.astype(dtype))
    lift = jlora.lift(lambda p, x: p["e"][x])
    same(jax.jit(lift)(tree, IDS), want[IDS])
    same(jlora.merge(tree)["e"], want)
    head = jlora.lift(lambda p, x: x @ p["e"].T)(tree, X.astype(dtype))
    close(head, X.astype(dtype) @ want.T, 1e-2 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["head", "some rows", "lookup", "flipped"])
def test_dropout_changes_nothing(name):
    """There is no branch that an activation enters."""
    fn, x = USES[name]
    tree = wrapped(normal(V, D))
    lifted = jlora.lift(lambda p, x: fn(p["e"], x))
    close(lifted(jlora.dropout(tree, 0.5, jax.random.key(0)), x), lifted(tree, x))


def test_a_table_that_is_split_in_shard_map():
    """Which device has which rows is not known there."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = wrapped(normal(8, 6), [2, 5])
    lifted = jlora.lift(lambda p, i: p["e"][i])
    for spec in (P("x"), P(None, "x")):
        specs = jlora.shardings(tree, {"e": spec})
        call = jax.shard_map(lifted, mesh=mesh, in_specs=(specs, P()), out_specs=spec)
        with pytest.raises(ValueError) as e:
            call(tree, jnp.arange(4))
        says(e, "'e': rows of it train in a table of shape (8, 6)", "jax.shard_map")


def test_unmerge_cannot_have_the_rows_back():
    tree = wrapped(normal(V, D))
    with pytest.raises(ValueError) as e:
        jlora.unmerge(jlora.merge(tree), jlora.adapter(tree))
    says(e, "'e' replaces rows", "jlora.unwrap")


def test_indices_of_few_bits():
    """The rows' own indices need more bits than those that are looked up."""
    table, ids = normal(300, D), jnp.array([5, 44, 255], jnp.uint8)
    tree = wrapped(table, [299, 44])
    same(jlora.lift(lambda p, x: p["e"][x])(tree, ids), jlora.merge(tree)["e"][ids])


def test_the_table_is_not_copied():
    """No array of its size, but a lookup's own; the step does not grow with it."""

    def step_memory(n):
        table = jax.ShapeDtypeStruct((n, 64), jnp.float32)
        tree = jlora.wrap({"e": table}, targets=[], train_rows={"e": [1, 5]})
        trainable, frozen = jlora.partition(tree)

        def loss(trainable, frozen, ids):
            fn = lambda p, x: jnp.tanh(p["e"][x])  # noqa: E731
            return jlora.lift(fn)(jlora.combine(trainable, frozen), ids).sum()

        ids = jax.ShapeDtypeStruct((128,), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert step_memory(1 << 10) == step_memory(1 << 16) < 1 << 20


def test_a_tied_head_adds_no_second_array_of_logits():
    def temporaries(tree, fn, n, grad):
        def loss(tree, x):
            return jax.nn.log_softmax(fn(tree, x))[:, 3].sum()

        x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
        call = jax.grad(loss, argnums=1) if grad else loss
        compiled = jax.jit(call).lower(tree, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (256 * n * 4)

    n = 1 << 11
    table = jax.ShapeDtypeStruct((n, 64), jnp.float32)
    tree = jlora.wrap({"e": table}, targets=[], train_rows={"e": [1, 5]})
    fn = lambda p, x: x @ p["e"].T  # noqa: E731
    for grad in (False, True):
        plain = temporaries({"e": table}, fn, n, grad)
        assert temporaries(tree, jlora.lift(fn), n, grad) <= plain + 1.1


def test_it_trains_counts_is_saved_and_restored(tmp_path):
    params = {"e": normal(V, D), "w": normal(D, D)}

    def fn(p, x):
        return jnp.tanh(p["e"][x] @ p["w"]) @ p["e"].T

    plan = jlora.plan(fn, params, IDS, rank=2)
    tree = jlora.wrap(params, plan=plan, train_rows={"e": ROWS})
    assert jlora.count(tree)[0] == 3 * D + 2 * 2 * D
    trainable, frozen = jlora.partition(tree)
    assert [x.shape for x in jax.tree.leaves(trainable)] == [(3, D), (D, 2), (2, D)]
    tx = jlora.optimizer(optax.adam(0.1), tree)

    def step(tree, state):
        grads = jax.grad(lambda t: (jlora.lift(fn)(t, IDS) ** 2).sum())(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    moved, _ = jax.jit(step)(tree, tx.init(tree))
    same(jlora.unwrap(moved), params)
    merged = jlora.merge(moved)
    changed = np.flatnonzero(np.any(merged["e"] != params["e"], 1))
    assert {*changed} == {*ROWS}
    jlora.checkpoint.save(tmp_path / "adapter", moved)
    back = jlora.checkpoint.restore(tmp_path / "adapter", params)
    assert jax.tree.structure(back) == jax.tree.structure(moved)
    same(jlora.merge(back), merged)
    again = jlora.attach(params, jlora.adapter(moved))
    same(jlora.merge(again), merged)
    close(jlora.unwrap(jlora.fade(moved, 1.0)), params)
    assert adapted(moved)["e"].shape == (V, D) == jlora.adapter(moved)["e"].shape
    assert "Rows" in str(jlora.summary(tree)) and "3" in str(jlora.summary(tree))


def test_a_table_does_not_fade():
    """Its other rows are the base's, and nothing trains in their place."""
    params = {"e": normal(V, D), "w": normal(D, D)}
    tree = jlora.wrap(params, 2, targets="w", train_rows={"e": ROWS})
    faded = jlora.fade(tree, 0.0)
    same(jlora.unwrap(faded)["e"], params["e"])
    assert not jlora.unwrap(faded)["w"].any()
    small = jlora.drop_base(faded)
    same(jlora.merge(small)["e"], params["e"])
    assert isinstance(small["w"].w, jlora.Dropped)


def test_abstract_and_half_precision_tables():
    table = jax.ShapeDtypeStruct((V, D), jnp.bfloat16)
    leaf = jlora.wrap({"e": table}, targets=[], train_rows={"e": ROWS})["e"]
    assert leaf.b == jax.ShapeDtypeStruct((3, D), jnp.float32)
    table = normal(V, D, dtype=jnp.bfloat16)
    leaf = jlora.wrap({"e": table}, targets=[], train_rows={"e": np.array(ROWS)})["e"]
    assert leaf.b.dtype == jnp.float32 and leaf.w is table


@pytest.mark.parametrize(
    "rows, error, parts",
    [
        ({"e": [2, 13]}, ValueError, ["'e': 13", "from 0 to 12", "13 rows"]),
        ({"e": [-1]}, ValueError, ["'e': -1", "from 0 to 12"]),
        ({"e": [3, 1, 3]}, ValueError, ["'e': 3 more than once"]),
        ({"e": [0.5]}, TypeError, ["[0.5]", "expected one or more integers"]),
        ({"e": []}, TypeError, ["expected one or more integers"]),
        ({"e": 3}, TypeError, ["3", "expected one or more integers"]),
        ({"f": [1]}, ValueError, ["train_rows 'f' matches no path", "'e'"]),
        ({"b": [1]}, ValueError, ["'b'", "shape (7,)", "train="]),
        ([1, 2], TypeError, ["list", '{"**/embedding": [7, 42]}']),
        ({"e": [1], "e*": [2]}, ValueError, ["'e' twice"]),
        ({"w": [1]}, ValueError, ["'w' is adapted", "Exclude 'w'"]),
    ],
)
def test_bad_rows(rows, error, parts):
    params = {"e": normal(V, D), "w": normal(D, D), "b": normal(D)}
    with pytest.raises(error) as e:
        jlora.wrap(params, targets="w", train_rows=rows)
    says(e, *parts)


def test_a_table_that_trains_whole():
    with pytest.raises(ValueError, match=re.escape("'e' trains whole")):
        jlora.wrap({"e": normal(V, D)}, targets=[], train="e", train_rows={"e": [1]})


def test_a_lookup_makes_nothing_of_the_tables_length():
    tree = wrapped(normal(V, D))
    jaxpr = jax.make_jaxpr(jlora.lift(lambda p, x: p["e"][x]))(tree, IDS)
    made = [
        v.aval.shape
        for eqn in equations(jaxpr)
        for v in eqn.outvars
        if eqn.primitive.name != "stop_gradient"  # the table itself
    ]
    assert (4, 6, D) in made and not any(V in shape for shape in made), made
