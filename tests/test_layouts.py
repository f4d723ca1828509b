"""Models laid out as other libraries' are: each is planned, and computes, adapted.

What `jlora.wrap` makes of them without a plan is printed by `python tests/layouts.py`.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, is_adapted, randomise, silent
from layouts import LAYOUTS, abstract, arrays, plan_of, told

import jlora


def wrapped(params, plan):
    """The params with random factors around them, which compiles no initialiser."""
    tree = jlora.wrap(abstract(params), plan=plan)

    def fill(leaf, base):
        return dataclasses.replace(leaf, w=base) if is_adapted(leaf) else base

    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_adapted)
    leaves = map(fill, leaves, jax.tree.leaves(params))
    return randomise(jax.tree.unflatten(treedef, leaves))


def by_roles(leaf):
    """W + scale * a·b from what the leaf says of its axes, in numpy."""
    if not is_adapted(leaf):
        return leaf
    letters = "abcdefg"[: leaf.ndim]
    batch, inner, outer = (
        "".join(x for x, own in zip(letters, leaf.axes, strict=True) if own == role)
        for role in "bio"
    )
    text = f"{batch}{inner}z,{batch}z{outer},{batch}->{letters}"
    delta = np.einsum(text, *(np.asarray(x) for x in (leaf.a, leaf.b, leaf.scale)))
    return jnp.asarray(np.asarray(leaf.w) + delta)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_the_adapted_model_is_the_merged_one(case):
    fn, params, args = case.build()
    assert plan_of(case)
    tree = wrapped(arrays(params), plan_of(case))
    leaves = jax.tree.leaves(tree, is_leaf=is_adapted)
    plain = jax.tree.unflatten(
        jax.tree.structure(arrays(params)), map(by_roles, leaves)
    )

    def both(tree, plain, *args):
        return jlora.lift(fn)(tree, *args), fn(plain, *args)

    close(*silent(eqx.filter_jit(both), tree, plain, *args))


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_what_is_told(case):
    result, details = told(case)
    assert result in ("whole", "part", "other", "error")
    assert bool(details) == (result != "whole")
