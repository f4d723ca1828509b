"""The lift on programs that hypothesis makes, against the dense matrix in float64.

A weight is W + scale * a·b formed by hand from the roles that the plan states. Value
and gradients agree to float64's rounding, or the lift raises; and it says "factored"
unless the program was made to use a weight in a way that has no low-rank form.

    JLORA_EXAMPLES=5000 make test ARGS="-k programs"      the long run
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import Int8, arrays
from helpers import cotangents, delta, dot_with, silent, wrap_random
from hypothesis import HealthCheck, given, seed, settings
from programs import FAMILIES, programs

import jlora

EXAMPLES = int(os.environ.get("JLORA_EXAMPLES", 100))


def check(program, eager, coded):
    params = {k: jnp.asarray(v) for k, v in program.params.items()}
    if coded:  # bases that are made for each use
        params = {k: Int8.of(v) if v.ndim else v for k, v in params.items()}
    data = [jnp.asarray(v) for v in program.data]
    fn = program.fn
    # XLA's CPU compiler (jaxlib 0.12) aborts on the gradient of some dilated
    # convolutions by their input, without adapters too.
    by_data = "conv" not in program.text
    is_float = [by_data and jnp.issubdtype(x.dtype, jnp.floating) for x in data]
    floats = [x for x, f in zip(data, is_float, strict=True) if f]
    try:
        plan = jlora.plan(fn, params, data, rank=2, targets="**")
    except ValueError as error:
        # A number or a vector is no matrix; axes of size one may lose their roles.
        assert "no matrix" in str(error) or "not used as a weight" in str(error)
        return False
    tree = wrap_random(params, plan, dtype=jnp.float64)
    trainable, frozen = jlora.partition(tree)
    plain = {k: arrays(x) for k, x in params.items()}
    weights = cotangents(jax.eval_shape(fn, plain, data))

    def data_of(floats):
        rest = iter(floats)
        return [next(rest) if f else x for f, x in zip(is_float, data, strict=True)]

    def ours(trainable, floats):
        tree = jlora.combine(trainable, frozen)
        out = jlora.lift(fn)(tree, data_of(floats))
        return dot_with(weights, out), out

    def whole(path, leaf):  # not rounded to the base's dtype
        return arrays(leaf.w).astype(jnp.float64) + delta(leaf, plan[path], jnp)

    def theirs(trainable, floats):
        tree = jlora.combine(trainable, frozen)
        merged = {k: whole(k, x) if k in plan else arrays(x) for k, x in tree.items()}
        out = fn(merged, data_of(floats))
        return dot_with(weights, out), out

    both = [jax.grad(f, argnums=(0, 1), has_aux=True) for f in (ours, theirs)]

    def run(*args):
        return [f(*args) for f in both]

    got, want = silent(run if eager else jax.jit(run), trainable, floats)
    tol = 1e-10
    for entry in jlora.explain(fn, tree, data):
        w, spec = params[entry.path], plan[entry.path]
        # The roles of axes of size one may get lost on the way.
        matrix = all(
            np.prod([w.shape[k] for k in axes]) > 1
            for axes in (spec.in_axes, spec.out_axes)
        )
        rounds = entry.status == "materialised" or "dynamic_slice" in entry.where
        if rounds or not matrix:  # what is formed, a row too, is of the base's dtype
            tol = max(tol, 8 * float(jnp.finfo(w.dtype).eps))
        assert entry.status == "factored" or program.forms or not matrix, entry
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = 1 + np.abs(y).max(initial=0)
        np.testing.assert_allclose(x, y, rtol=0, atol=tol * size)
    return True


# In parts, which run side by side.
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_programs(family, part):
    ran = []

    @settings(
        max_examples=max(1, EXAMPLES // len(FAMILIES) // PARTS),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @seed(part)
    @given(program=programs(family))
    def every(program):
        if len(ran) % 50 == 49:
            jax.clear_caches()  # some 10 MB a program
        n = len(ran)
        ran.append(check(program, eager=n % 10 == 9, coded=n % 3 == 2))

    with jax.enable_x64(True):
        every()
    # Hypothesis may end early, and some programs have no matrix; most count.
    assert sum(ran) >= EXAMPLES // len(FAMILIES) // PARTS // 2
