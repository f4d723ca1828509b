"""What a training step costs, as XLA counts it: jlora beside the other ways to train.

    python benchmarks/cost.py                 # compiled for this machine
    python benchmarks/cost.py --tpu v5e:2x2   # for a TPU that is not here (libtpu)

One unrolled Llama-like model, one batch, adapters of rank 16 on all seven matrices of
every layer.  The floor is what no method can do without: the frozen forward pass, the
gradients of the activations down to the first adapted weight, and the adapters' own
products, 6·tokens·r·(in + out) each.  Nothing runs: the programs are compiled for
abstract arrays and read.  Ends with an assertion of the claim in README.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora

# The models are those of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import models

RANK, BATCH, SEQ = 16, 4, 512
MODEL = models.Llama(
    d=1024, ffn=2816, vocab=8192, heads=16, kv_heads=8, head_dim=64, layers=4
)


def programs():
    """Name to (function, arguments): the loss and the gradient of what trains."""
    params, ids = MODEL.shapes(), jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)
    plan = jlora.plan(MODEL, params, ids, rank=RANK, targets=models.LLAMA_TARGETS)
    tree = jlora.wrap(params, plan=plan)
    trainable, frozen = jlora.partition(tree)
    lifted = jlora.lift(MODEL.loss)

    def adapted(trainable, frozen, ids):
        return lifted(jlora.combine(trainable, frozen), ids)

    def merged(trainable, frozen, ids):
        whole = jlora.combine(trainable, jax.lax.stop_gradient(frozen))
        return MODEL.loss(jlora.merge(whole), ids)

    q, kv = MODEL.heads * MODEL.head_dim, MODEL.kv_heads * MODEL.head_dim
    bump = [jax.ShapeDtypeStruct((BATCH, SEQ, n), jnp.float32) for n in (q, kv, kv)]
    grad = jax.value_and_grad
    sides = sum(x.shape[0] + x.shape[1] for p, x in flat(params) if p in plan)
    return 6 * BATCH * SEQ * RANK * sides, {
        "frozen forward, activation gradients": (
            grad(MODEL.loss, argnums=2),
            (params, ids, bump),
        ),
        "jlora": (grad(adapted), (trainable, frozen, ids)),
        "W + BA formed in the loss": (grad(merged), (trainable, frozen, ids)),
        "full fine-tuning": (grad(MODEL.loss), (params, ids)),
    }


def flat(params):
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    return [("/".join(k.key for k in keys), x) for keys, x in pairs]


def compile_for(topology, fn, args):
    """Compiles for one device of this machine, or of a TPU topology."""
    if topology is None:
        return jax.jit(fn).lower(*args).compile()
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(fn, in_shardings=place, out_shardings=place).lower(*args).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="such as v5e:2x2")
    args = parser.parse_args()
    own, steps = programs()
    print(
        f"Llama-like, {MODEL.layers} layers, d {MODEL.d}, {BATCH} × {SEQ} tokens, rank"
        f" {RANK}, float32, XLA for {args.tpu or jax.default_backend()}"
    )
    print(f"{'':38}{'GFLOP':>8}{'GB accessed':>13}{'GB temporary':>14}")
    flops = {}
    for name, (fn, arguments) in steps.items():
        program = compile_for(args.tpu, fn, arguments)
        cost, memory = program.cost_analysis(), program.memory_analysis()
        flops[name] = cost["flops"]
        row = [cost["flops"], cost["bytes accessed"], memory.temp_size_in_bytes]
        print(f"{name:38}{row[0] / 1e9:8.1f}{row[1] / 1e9:13.2f}{row[2] / 1e9:14.2f}")
    frozen = flops["frozen forward, activation gradients"]
    share = flops["jlora"] / (frozen + own)
    print(f"jlora's FLOPs are {share:.4f} of the floor ({(frozen + own) / 1e9:.1f})")
    assert share <= 1.005, "the adapted step is to stay within 0.5 % of the floor"
    assert flops["W + BA formed in the loss"] > 1.2 * flops["jlora"]


if __name__ == "__main__":
    main()
