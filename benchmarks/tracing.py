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
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import models

ROUNDS = 5


def seconds(fn):
    """Processor seconds, without the garbage collector, as timeit measures."""
    gc.collect()
    gc.disable()
    start = time.process_time()
    out = fn()
    spent = time.process_time() - start
    gc.enable()
    return spent, out


def fresh(fn):
    """The same function as a new object, which JAX has not traced."""
    return lambda *args: fn(*args)


def plan_70b():
    model, ids = models.LLAMA_70B, jax.ShapeDtypeStruct((1, 65), jnp.int32)
    params = model.shapes()
    jax.clear_caches()
    own, _ = seconds(lambda: jax.make_jaxpr(fresh(model))(params, ids))
    jax.clear_caches()
    whole, tree = seconds(
        lambda: jlora.wrap(
            params, plan=jlora.plan(model, params, ids, targets=models.LLAMA_TARGETS)
        )
    )
    trainable, total = jlora.count(tree)
    print(
        f"70B, {model.layers} layers unrolled: plan + wrap {whole:.1f} s, of which the"
        f" model's own trace {own:.1f} s; {trainable:,} of {total:,} parameters train"
    )
    assert whole < 20
    assert own > 0.5 * whole, "most of it is the model's own trace"


def compare(name, apply, params, *args):
    """Medians of interleaved traces, forward and with the gradient."""
    tree = jlora.wrap(params, plan=jlora.plan(apply, params, *args))

    def gradient(fn):
        return jax.grad(lambda tree, *args: jnp.sum(fn(tree, *args)))

    def trace(fn, tree):
        jax.clear_caches()
        return seconds(lambda: jax.jit(fn).trace(tree, *args))[0]

    for what, step in (("forward", lambda fn: fn), ("gradient", gradient)):
        plain, lifted = [], []
        for _ in range(ROUNDS):
            plain.append(trace(step(fresh(apply)), params))
            lifted.append(trace(step(jlora.lift(fresh(apply))), tree))
        plain, lifted = statistics.median(plain), statistics.median(lifted)
        print(
            f"{name}, {what}: traced plain in {plain:.2f} s, lifted in {lifted:.2f} s,"
            f" {lifted / plain:.2f} times as long"
        )
        # The claim is about the model; its gradient derives the adapters too.  To bind
        # the model's equations again is 0.4 of its trace, and no less in JAX itself.
        assert what == "gradient" or lifted <= 2.25 * plain


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    plan_70b()
    llama = models.Llama(64, 96, 128, 4, 2, 16, layers=32)
    ids = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    compare("plain function, 32 layers", llama, llama.shapes(), ids)
    model = models.UnrolledLM(layers=32)
    params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), ids)
    compare("Flax Linen, 32 layers", model.apply, params, ids)


if __name__ == "__main__":
    main()
