"""DoRA, for every kind of weight: m * V / ‖V‖ for V = W + scale * a·b.

Against that formula on the dense matrix, with the norm detached.
"""

import numpy as np
import pytest
from helpers import adapt, by_hand, check_lift, close, same, silent
from uses import CASES, experts

import jlora


@pytest.mark.parametrize("output_bias", [False, True], ids=["", "output bias"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, output_bias):
    fn, tree, x = CASES[name]
    tol = 3e-2 if name == "half precision" else 2e-5
    tree, plan = adapt(fn, tree, x, dora=True, lora_bias=output_bias)
    if name.startswith("experts, "):
        tree, plan = experts(tree, plan)
    modes = name != "experts, ragged"  # JAX has no such vmap
    check_lift(fn, tree, plan, x, modes=modes, tol=tol, eager=True)
    close(silent(jlora.merge, tree), by_hand(tree, plan), tol)


def test_at_the_start_no_bit_changes():
    for name in ("dense", "heads", "conv in groups", "lookup", "layers"):
        fn, base, x = CASES[name]
        plan = jlora.plan(fn, base, x, targets="w")
        tree = jlora.wrap(base, plan=plan, dora=True)
        same(jlora.lift(fn)(tree, x), fn(base, x))
        np.testing.assert_allclose(
            tree["w"].m, magnitude(base["w"], plan["w"]), rtol=1e-6
        )


def magnitude(w, spec):
    return np.sqrt((np.asarray(w, np.float64) ** 2).sum(spec.in_axes))
