"""Models laid out as other libraries' are: each is planned, and computes, adapted.

What `jlora.wrap` makes of them without a plan is printed by `python tests/layouts.py`.
"""

import jax
import pytest
from helpers import close, quiet
from layouts import LAYOUTS, told

import jlora


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_the_adapted_model_starts_as_the_model(case):
    fn, params, args = case.build()
    plan = jlora.plan(fn, params, *args, rank=8)
    assert plan
    tree = jlora.wrap(params, plan=plan)

    def both(tree, *args):
        return jlora.lift(fn)(tree, *args), fn(jlora.unwrap(tree), *args)

    close(*quiet(jax.jit(both), tree, *args))


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_what_is_told(case):
    result, details = told(case)
    assert result in ("whole", "part", "other", "error")
    assert bool(details) == (result != "whole")
