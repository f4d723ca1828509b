"""What DoRA costs: a step with it against one of plain LoRA, compiled for TPU v5e.

    pip install "jlora[tpu-aot]"
    python benchmarks/dora_cost.py
    python benchmarks/dora_cost.py --platform cpu    # without libtpu

Nothing runs: XLA compiles the gradient of a, b and m, and counts FLOPs and bytes.
Asserts what the docs claim of the TPU.
"""

import argparse
import collections
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jlora

WIDTH, TOKENS, RANK = 2048, 4096, 16
WEIGHT = WIDTH * WIDTH * 2
"""Bytes of one weight, in bfloat16."""


def measure(layers: int, place, **options) -> dict[str, float]:
    """Of the gradient of what trains, for products with tanh after each."""

    def model(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    shape = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    params = {f"layer_{k}": shape for k in range(layers)}
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    plan = jlora.plan(model, params, x, rank=RANK)
    halves = jlora.partition(jlora.wrap(params, plan=plan, **options))
    lifted = jlora.lift(model)

    def loss(trainable, frozen, x):
        out = lifted(jlora.combine(trainable, frozen), x)
        return out.astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss), in_shardings=place)
    compiled = step.lower(*halves, x).compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    whole = rf"= \w+\[{WIDTH},{WIDTH}\](?:\{{[^}}]*\}})? ([a-z][\w-]*)\("
    kinds = collections.Counter(re.findall(whole, text))
    return {
        "GFLOP": cost["flops"] / 1e9,
        "MB accessed": cost["bytes accessed"] / 1e6,
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "products in × out": kinds["dot"] + kinds["convolution"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="tpu", choices=["tpu", "cpu"])
    tpu = parser.parse_args().platform == "tpu"
    place = None
    if tpu:
        chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
        place = jax.sharding.SingleDeviceSharding(chip)
    for layers in (4, 8):
        lora = measure(layers, place)
        dora = measure(layers, place, dora=True)
        print(f"{layers} layers")
        for name, value in lora.items():
            times = f"{dora[name] / value:.4f} ×" if value else ""
            print(f"  {name:18} LoRA {value:9.1f}  DoRA {dora[name]:9.1f}  {times}")
        more = dora["temporary MB"] - lora["temporary MB"]
        share = 1e6 * more / WEIGHT / layers
        print(f"  more temporaries: {more:.2f} MB, {share:.3f} of a weight a layer")
        assert dora["GFLOP"] <= 1.01 * lora["GFLOP"]
        assert dora["products in × out"] == lora["products in × out"]
        if tpu:
            assert dora["MB accessed"] <= 1.12 * lora["MB accessed"]
            assert share <= 0.05


if __name__ == "__main__":
    main()
