"""Models laid out as other libraries' are: each is planned, and computes, adapted.

What `jlora.wrap` makes of them without a plan is printed by `python tests/layouts.py`.
"""

import dataclasses

import equinox as eqx
import jax
import pytest
from helpers import close, is_adapted, randomise, silent
from layouts import LAYOUTS, abstract, arrays, plan_of, told

import jlora


def wrapped(params, plan):
    """Random factors around the params, which compiles no initialiser."""
    tree = jlora.wrap(abstract(params), plan=plan)

    def fill(leaf, base):
        return dataclasses.replace(leaf, w=base) if is_adapted(leaf) else base

    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_adapted)
    leaves = map(fill, leaves, jax.tree.leaves(params))
    return randomise(jax.tree.unflatten(treedef, leaves))


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_the_adapted_model_is_the_merged_one(case):
    fn, params, args = case.build()
    assert plan_of(case)
    tree = wrapped(arrays(params), plan_of(case))

    def both(tree, *args):
        return jlora.lift(fn)(tree, *args), fn(jlora.merge(tree), *args)

    close(*silent(eqx.filter_jit(both), tree, *args))


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_what_is_told(case):
    result, details = told(case)
    assert result in ("whole", "part", "other", "error")
    assert bool(details) == (result != "whole")
