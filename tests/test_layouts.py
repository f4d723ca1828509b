"""Models laid out as other libraries' are: each is planned, and computes, adapted.

What `jlora.wrap` makes of them without a plan is printed by `python tests/layouts.py`.
"""

import dataclasses
import pathlib
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, is_adapted, randomise, silent
from layouts import LAYOUTS, abstract, arrays, plan_of, table, told

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


# What wrap cannot tell without a plan; all others are told whole.  "error" by wrap;
# "other" by the first lifted trace; "part" by the warning of wrap.
NOT_WHOLE = {
    "gemma 7B (Linen)": "other",
    "pi0's gemma (Linen, scan)": "other",
    "GPT-2 (haliax, Stacked)": "error",
    "llama (haliax, out axes first)": "error",
    "llama (AXLearn, repeated)": "error",
    "LM with experts (Praxis)": "error",
    "DeepSeek R1 (dataclasses)": "part",
    "llama (torch's state dict)": "error",
    "T5 1.1 (T5X, scan over axis 1)": "part",
    "mixtral (MaxText, scan over axis 1)": "other",
    "AlphaFold's evoformer (Haiku, stack)": "error",
    "mixtral (Keras)": "part",
    "llama (Penzai)": "error",
    "equivariant linear layers (e3nn)": "error",
    "SAC's critics (Linen, vmap)": "other",
}


def test_the_table_of_the_documentation_is_what_is_told():
    """Made by ``python tests/layouts.py --markdown > docs/models_table.md``."""
    shown = pathlib.Path(__file__).parents[1] / "docs" / "models_table.md"
    assert shown.read_text() == silent(table)


def test_most_models_are_told_whole():
    assert len(LAYOUTS) - len(NOT_WHOLE) >= 0.6 * len(LAYOUTS) >= 20


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_what_is_told_is_the_plan_or_an_error_with_the_line_to_type(case):
    fn, params, args = case.build()
    result, details = silent(told, case)
    assert result == NOT_WHOLE.get(case.name, "whole"), details
    if result == "error":
        with pytest.raises(ValueError, match=r"jlora\.plan\(fn, params, \*args\)"):
            jlora.wrap(abstract(params), rank=8)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree = jlora.wrap(abstract(params), rank=8)
    said = " ".join(str(w.message) for w in caught)
    if result == "other":
        with pytest.raises(ValueError, match=r"told the roles .*jlora\.plan\(fn"):
            silent(jlora.explain, fn, tree, *args)
        return
    silent(jlora.explain, fn, tree, *args)
    if result == "part":
        for path in [p for p in details if not p.endswith("embedding")][:1]:
            assert path in said and "jlora.plan(fn, params, *args)" in said
