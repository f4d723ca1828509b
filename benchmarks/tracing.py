"""What the bookkeeping costs: planning a 70B model, and tracing a lifted one.

    python benchmarks/tracing.py

Times are processor seconds of this machine; the claims are ratios and generous bounds.
Plans and wraps an abstract Llama-70B of 80 unrolled layers, and traces 32-layer models,
plain and lifted: the forward pass, and the gradient of its sum as a training step has
it.  Each time with fresh function objects and empty caches, so that nothing answers but
the tracing itself.  Ends with assertions.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import models

ROUNDS = 7
# Of the plain function's trace, 0.4 to bind its equations once more, 0.4 for a call
# of jit for each adapted product, 0.1 for stop_gradient: all of it JAX's own. Flax's
# modules take longer to trace, and no longer to bind.
BARS = {"plain function": 2.15, "Flax Linen": 1.4}


def seconds(fn):
    """Processor seconds with empty caches and no garbage collector; and what came."""
    jax.clear_caches()
    gc.collect()
    gc.disable()
    start = time.process_time()
    out = fn()
    spent = time.process_time() - start
    gc.enable()
    return spent, out


def interleaved(*fns):
    """The least seconds of each in rounds of all: the rest is what else went on."""
    rounds = [[seconds(fn)[0] for fn in fns] for _ in range(ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def fresh(fn):
    """The same function as a new object, which JAX has not traced."""
    return lambda *args: fn(*args)


def plan_70b():
    model, ids = models.LLAMA_70B, jax.ShapeDtypeStruct((1, 65), jnp.int32)
    params = model.shapes()

    def wrap():
        plan = jlora.plan(model, params, ids, targets=models.LLAMA_TARGETS)
        return jlora.wrap(params, plan=plan)

    first, tree = seconds(wrap)
    own, whole = interleaved(lambda: jax.make_jaxpr(fresh(model))(params, ids), wrap)
    trainable, total = jlora.count(tree)
    print(
        f"70B, {model.layers} layers unrolled: plan + wrap {whole:.1f} s (at first "
        f"{first:.1f} s), of which the model's own trace {own:.1f} s; {trainable:,} of "
        f"{total:,} parameters train"
    )
    assert first < 20
    assert own > 0.5 * whole, "most of it is the model's own trace"


def compare(name, apply, params, *args):
    """Traces of both, interleaved, forward and with the gradient."""
    tree = jlora.wrap(params, plan=jlora.plan(apply, params, *args))

    def gradient(fn):
        return jax.grad(lambda tree, *args: jnp.sum(fn(tree, *args)))

    def trace(step, fn, tree):
        return jax.jit(step(fn(fresh(apply)))).trace(tree, *args)

    for what, step in (("forward", lambda fn: fn), ("gradient", gradient)):
        plain, lifted = interleaved(
            functools.partial(trace, step, lambda fn: fn, params),
            functools.partial(trace, step, jlora.lift, tree),
        )
        print(
            f"{name}, 32 layers, {what}: traced plain in {plain:.2f} s, lifted in "
            f"{lifted:.2f} s, {lifted / plain:.2f} times as long"
        )
        # The claim is about the model; its gradient derives the adapters too.
        assert what == "gradient" or lifted <= BARS[name] * plain


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    plan_70b()
    llama = models.Llama(64, 96, 128, 4, 2, 16, layers=32)
    ids = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    compare("plain function", llama, llama.shapes(), ids)
    model = models.UnrolledLM(layers=32)
    params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), ids)
    compare("Flax Linen", model.apply, params, ids)


if __name__ == "__main__":
    main()
