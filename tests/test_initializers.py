"""Initialisers: by name, as functions, and such as move a part of the base.

`svd` is PiSSA's idea (arXiv:2404.02948).  The oracle is the base itself: what is left
of it and the factors have to add up to it.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import Int8
from helpers import close, normal, same, says
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

X = normal(11, 5, seed=1)
PARAMS = {"dense": {"kernel": normal(5, 7), "bias": normal(7)}}


def svd(key, w, spec):
    """The first ranks of (*batch, in, out) go to the factors, and leave the base."""
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    r = spec.shapes(w.shape)["a"][-1]
    root = jnp.sqrt(s[..., :r] / spec.scale)
    a, b = u[..., :r] * root[..., None, :], root[..., None] * vt[..., :r, :]
    return (w - spec.scale * (a @ b)).astype(w.dtype), a, b


def fn(p, x):
    return x @ p["dense"]["kernel"] + p["dense"]["bias"]


def test_a_name_is_the_function_of_that_name():
    named = jlora.wrap(PARAMS, rank=2, init="kaiming")
    same(jlora.wrap(PARAMS, rank=2, init=jlora.initializers.kaiming), named)
    same(jlora.wrap(PARAMS, rank=2), named)


def test_a_base_that_is_returned_as_it_came_is_the_same_object():
    def ones(key, w, spec):
        shapes = spec.shapes(w.shape)
        return w, jnp.ones(shapes["a"]), jnp.zeros(shapes["b"])

    leaf = jlora.wrap(PARAMS, rank=2, init=ones)["dense"]["kernel"]
    assert leaf.w is PARAMS["dense"]["kernel"]
    assert (np.asarray(leaf.a) == 1).all() and leaf.a.dtype == jnp.float32
    half = jlora.wrap(PARAMS, rank=2, init=ones, dtype=jnp.bfloat16)
    assert half["dense"]["kernel"].a.dtype == jnp.bfloat16


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_part_of_the_base_goes_to_the_factors(alpha):
    tree = jlora.wrap(PARAMS, rank=2, alpha=alpha, init=svd)
    leaf, w = tree["dense"]["kernel"], np.asarray(PARAMS["dense"]["kernel"], np.float64)
    close(jlora.lift(fn)(tree, X), fn(PARAMS, X))
    close(jlora.merge(tree), PARAMS)
    s = np.linalg.svd(w, compute_uv=False)
    left = np.linalg.svd(np.asarray(leaf.w, np.float64), compute_uv=False)
    np.testing.assert_allclose(left[:-2], s[2:], atol=1e-5)
    # unwrap gives what is the base by now; the caller's own arrays are untouched.
    same(jlora.unwrap(tree)["dense"]["kernel"], leaf.w)
    np.testing.assert_array_equal(PARAMS["dense"]["kernel"], normal(5, 7))


def test_of_a_stack_and_in_half_precision():
    stack = {"w": normal(3, 5, 7).astype(jnp.bfloat16)}
    x = jnp.stack([X, X, X])
    plan = jlora.plan(lambda p, x: jnp.einsum("kbi,kio->kbo", x, p["w"]), stack, x)
    tree = jlora.wrap(stack, plan=plan, rank=2, init=svd)
    leaf = tree["w"]
    assert leaf.w.dtype == jnp.bfloat16 and leaf.a.dtype == jnp.float32
    close(jlora.merge(tree)["w"], stack["w"], 2**-7)


def test_shapes_alone_and_under_jit():
    shapes = jax.eval_shape(lambda: PARAMS)
    abstract = jlora.wrap(shapes, rank=2, init=svd)
    real = jlora.wrap(PARAMS, rank=2, init=svd)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, real)
    traced = jax.jit(lambda p: jlora.wrap(p, rank=2, init=svd))(PARAMS)
    close(jlora.merge(traced), PARAMS)


def test_what_it_makes_of_the_base_stays_where_the_base_is():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    w = jax.device_put(normal(4, 6), NamedSharding(mesh, P("x", "y")))
    leaf = jlora.wrap({"w": w}, rank=2, targets="w", init=svd)["w"]
    assert leaf.w.sharding.is_equivalent_to(w.sharding, 2) and leaf.w is not w
    assert leaf.a.sharding.spec == P("x", None) and leaf.b.sharding.spec == P(None, "y")
    close(jax.device_get(jlora.merge({"w": leaf})["w"]), np.asarray(w))


def test_on_a_base_that_is_no_array():
    """It gets the base as it is, and may give an array in its place."""
    coded = {"w": Int8.of(normal(5, 7))}
    tree = jlora.wrap(
        coded,
        rank=2,
        targets="w",
        init=lambda key, w, spec: svd(key, w.array, spec),
    )
    assert isinstance(tree["w"].w, jax.Array)
    close(jlora.merge(tree)["w"], coded["w"].array)


def test_each_leaf_has_its_own_key_and_its_spec():
    seen = []

    def spy(key, w, spec):
        seen.append((spec.kind, spec.axes, spec.rank, spec.scale))
        return jlora.initializers.kaiming(key, w, spec)

    rules = [jlora.Rule("b/**", rank=3, alpha=6)]
    params = {"a": {"kernel": normal(5, 5)}, "b": {"kernel": normal(5, 5)}}
    tree = jlora.wrap(params, rank=2, rules=rules, init=spy)
    assert {("dense", "io", 2, 1.0), ("dense", "io", 3, 2.0)} == {*seen}
    twins = jlora.wrap(params, rank=2, init=spy)
    assert (twins["a"]["kernel"].a != twins["b"]["kernel"].a).any()
    assert float(tree["b"]["kernel"].scale) == 2


@pytest.mark.parametrize(
    "init, parts",
    [
        ("pizza", ["init 'pizza'", "expected one of kaiming", "jlora.initializers"]),
        (3, ["init 3", "expected one of kaiming"]),
        (
            lambda key, w, spec: (w, jnp.zeros((5, 2)), jnp.zeros((7, 2))),
            [
                "'dense/kernel'",
                "b of shape (7, 2)",
                "expected (2, 7)",
                "'io'",
                "rank 2",
            ],
        ),
        (
            lambda key, w, spec: (w[:2], jnp.zeros((5, 2)), jnp.zeros((2, 7))),
            ["'dense/kernel'", "w of shape (2, 7)", "expected (5, 7)"],
        ),
        (lambda key, w, spec: (jnp.zeros((5, 2)), jnp.zeros((2, 7))), ["(w, a, b)"]),
    ],
)
def test_bad_initialisers(init, parts):
    with pytest.raises((ValueError, TypeError)) as error:
        jlora.wrap(PARAMS, rank=2, init=init)
    says(error, *parts)


# ------------------------------------------------------- what was passed, and what not


def test_a_plan_says_nothing_where_nothing_was_passed():
    plan = jlora.plan(fn, PARAMS, X)
    spec = plan.specs["dense/kernel"]
    assert (spec.rank, spec.alpha) == (None, None) and spec.scale == 1
    assert (plan["dense/kernel"].rank, plan["dense/kernel"].alpha) == (8, 8)
    for rank, alpha, want in [
        (None, None, (8, 1)),
        (4, None, (4, 1)),
        (4, 2, (4, 0.5)),
    ]:
        passed = {k: v for k, v in {"rank": rank, "alpha": alpha}.items() if v}
        leaf = jlora.wrap(PARAMS, plan=plan, **passed)["dense"]["kernel"]
        assert (leaf.rank, float(leaf.scale)) == want
    half = jlora.plan(fn, PARAMS, X, alpha=16)
    assert half.specs["dense/kernel"].rank is None
    assert half["dense/kernel"].scale == 2
    leaf = jlora.wrap(PARAMS, plan=half, rank=4)["dense"]["kernel"]
    assert (leaf.rank, float(leaf.scale)) == (4, 4)


def test_scale_is_alpha_over_rank():
    spec = jlora.Spec.of("dense", "io", 4, 6)
    assert spec.scale == 1.5
    assert dataclasses.replace(spec, rank=8).scale == 0.75
    assert dataclasses.replace(spec, alpha=None).scale == 1
