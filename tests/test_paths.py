"""Paths are sequences of keys: a key may be called as a folder is, or be empty."""

import posixpath

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close, normal, randomise, same
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
import jlora.checkpoint
from jlora._tree import paths

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)
ANY = st.sampled_from(["a", "b", ".", "..", "", "w/..", "x/y", "a + b"])


def path(keys):
    return st.lists(keys, min_size=1, max_size=4).map("/".join)


@SETTINGS
@given(path(ANY), path(ANY))
def test_a_relative_path_is_resolved(one, other):
    assert paths.resolve(paths.relative(one, other), other) == one


@SETTINGS
@given(path(st.sampled_from("ab")), path(st.sampled_from("ab")))
def test_relative_paths_of_plain_keys_are_those_of_files(one, other):
    """Checkpoints hold them."""
    start, end = posixpath.dirname(f"/{other}"), f"/{one}"
    if posixpath.commonpath([start, end]) != end:  # a leaf is no folder
        assert paths.relative(one, other) == posixpath.relpath(end, start)


X = normal(11, 5, seed=1)
KEYS = [".", "..", "", "w/..", "../..", "./x", "a + b", "a:b", "*", "[x]", " "]
# Where the key stands: a tree, its weight and the weight's bias.
PLACES = {
    "weight": lambda k, w, b: ({k: w, "shift": b}, [k], ["shift"]),
    "bias": lambda k, w, b: ({"w": w, k: b}, ["w"], [k]),
    "node": lambda k, w, b: ({k: {"w": w, "b": b}}, [k, "w"], [k, "b"]),
    "apart": lambda k, w, b: ({"m": {k: {"w": w}}, k: {k: b}}, ["m", k, "w"], [k, k]),
    "above": lambda k, w, b: ({"m": {"n": {"w": w}, k: b}}, ["m", "n", "w"], ["m", k]),
}


def at(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", KEYS)
def test_any_key(key, place, tmp_path):
    p, w, b = PLACES[place](key, normal(5, 7), normal(7))

    def fn(p, x):
        return x @ at(p, w) + at(p, b)

    plan = jlora.plan(fn, p, X, rank=2, targets="**")
    assert list(plan) == ["/".join(w)] and plan["/".join(w)].bias == "/".join(b)
    tree = randomise(jlora.wrap(p, plan=plan, lora_bias=True))
    leaf = at(tree, w)
    merged = jlora.merge(tree)
    close(at(merged, w), at(p, w) + leaf.scale * leaf.a @ leaf.b)
    close(at(merged, b), at(p, b) + leaf.scale * leaf.c)
    close(jlora.lift(fn)(tree, X), fn(merged, X))
    (entry,) = jlora.explain(fn, tree, X)
    assert (entry.path, entry.status) == ("/".join(w), "factored")
    assert not np.any(at(jlora.drop_base(jlora.fade(tree, 0.0)), b))
    same(jlora.attach(p, jlora.adapter(tree)), tree)
    trained = jlora.wrap(p, plan=plan, bias="lora_only")
    assert isinstance(at(trained, b), jlora.Full)
    extra = {key: {key: jnp.ones(3)}}
    jlora.checkpoint.save(tmp_path / "adapter", tree, extra=extra)
    back = jlora.checkpoint.restore(tmp_path / "adapter", p, extra=extra)
    same(back, (tree, extra))


class Attention(eqx.Module):
    """Whose weights are arrays of its own, one of them called value."""

    query: jax.Array
    value: jax.Array
    out: jax.Array

    def __call__(self, x):
        return (jax.nn.softmax(x @ self.query) @ self.value) @ self.out


class Boxed(eqx.Module):
    """An array with what is known of it, as several libraries have it."""

    value: jax.Array
    names: tuple = eqx.field(static=True)


def test_value_is_a_key_where_it_is_one_of_several_attributes(tmp_path):
    """Around a value alone, as Flax's boxes and NNX's variables are, it is none."""
    weights = normal(5, 7), normal(7, 5), normal(5, 5)
    attention = Attention(*weights)
    boxed = Attention(*(Boxed(w, ("in", "out")) for w in weights))

    def unboxed(m, x):
        return Attention(*(w.value for w in (m.query, m.value, m.out)))(x)

    for m, fn in ((attention, Attention.__call__), (boxed, unboxed)):
        plan = jlora.plan(fn, m, X, rank=2)
        assert list(plan) == ["query", "value", "out"]
        tree = randomise(jlora.wrap(m, plan=plan, targets=None))
        dense = fn(jlora.merge(tree), X)
        close(jlora.lift(fn)(tree, X), dense)
        only = jlora.wrap(m, rank=2, targets="value")
        assert list(jlora.adapter(only)) == ["value"]
        # An optimizer's state has the paths, also of halves in which others are None.
        trainable, frozen = jlora.partition(tree)
        assert jax.tree.structure(jlora.combine(trainable, frozen)) == (
            jax.tree.structure(tree)
        )
        tx = jlora.optimizer(optax.sgd(1.0), tree)
        updates, _ = tx.update(tree, tx.init(tree), tree)
        same(jlora.adapter(updates)["value"].a, -jlora.adapter(tree)["value"].a)
        where = tmp_path / type(m.query).__name__
        jlora.checkpoint.save(where, tree)
        same(jlora.merge(jlora.checkpoint.restore(where, m)), jlora.merge(tree))


def test_specs_of_an_attribute_called_value():
    m = Attention(normal(4, 4), normal(4, 4), normal(4, 4))
    tree = jlora.wrap(m, plan=jlora.plan(Attention.__call__, m, X[:, :4], rank=2))
    specs = Attention(*(jax.sharding.PartitionSpec(x) for x in ("q", "v", "o")))
    found = jlora.shardings(tree, specs)
    assert found.value.a == jax.sharding.PartitionSpec("v", None)


def test_a_layer_called_value_is_a_key():
    """Alone in its module, and in one that is NNX's, whose variables have a value."""

    class Alone(eqx.Module):
        value: eqx.nn.Linear

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.value = nnx.Linear(5, 4, rngs=rngs)
            self.table = nnx.Param({"a": normal(5, 4)})

    alone = Alone(eqx.nn.Linear(5, 4, key=jax.random.key(0)))
    assert list(jlora.adapter(jlora.wrap(alone, rank=2))) == ["value/weight"]
    block = jlora.wrap(Block(nnx.Rngs(0)), rank=2, targets="value/kernel")
    assert list(jlora.adapter(block)) == ["value/kernel"]
    assert "table/value/a" in jlora.plan(
        lambda m, x: m.value(x) + x @ m.table["a"], Block(nnx.Rngs(0)), X
    )
