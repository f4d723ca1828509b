"""Paths are sequences of keys: a key may be called as a folder is, or be empty."""

import posixpath

import jax.numpy as jnp
import numpy as np
import pytest
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
