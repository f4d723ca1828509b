"""What a quantised base costs: a step on it against one on a bfloat16 base.

    pip install "jlora[quant,tpu-aot]"
    python benchmarks/quantized_cost.py              # CPU, and compiled for TPU v5e
    python benchmarks/quantized_cost.py --only cpu   # without libtpu
    python benchmarks/quantized_cost.py --only gpu   # runs, and is timed

XLA compiles the gradient of the adapters and counts what it needs. A dequantised weight
that lives between the forward and the backward pass, or is made ahead of time, would be
in the temporaries. Asserts what the docs claim.
"""

import argparse
import dataclasses
import functools
import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np

import jlora

RANK, BLOCK = 16, 64
BASES = ["bfloat16", "nf4", "int4", "int8", "float8_e4m3fn"]
RESIDENT = {"nf4": 0.30, "int4": 0.30, "int8": 0.55, "float8_e4m3fn": 0.55}
"""The most that a quantised weight may take of a bfloat16 one, as an argument."""


@dataclasses.dataclass
class Cost:
    """What the compiler says of a step: megabytes, and its FLOPs in billions."""

    arguments: float
    temporaries: float
    accessed: float
    flops: float


def chain(params, x):
    """Products with tanh after each."""
    for w in params.values():
        x = jnp.tanh(x @ w)
    return x


def scanned(params, x):
    """The same, over stacked weights."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def blocks(params, x):
    """Layers d → f → d."""
    for layer in params.values():
        x = jnp.tanh(x + jax.nn.silu(x @ layer["up"]) @ layer["down"])
    return x


def squares(layers: int, width: int):
    return {f"layer_{k}": bfloat16(width, width) for k in range(layers)}


def stacked(layers: int, width: int):
    return {"w": bfloat16(layers, width, width)}


def pairs(layers: int, d: int, f: int):
    one = {"up": bfloat16(d, f), "down": bfloat16(f, d)}
    return {f"layer_{k}": one for k in range(layers)}


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def halves(fn, params, x, qtype: str):
    """What trains and what does not, of the model with such a base."""
    plan = jlora.plan(fn, params, x, rank=RANK)
    if qtype != "bfloat16":
        params = jlora.quantize(params, qtype, plan=plan, block=BLOCK)
    return jlora.partition(jlora.wrap(params, plan=plan))


def compiled(fn, trainable, frozen, x, place=None):
    """The gradient of what trains, compiled, and what that costs."""
    lifted = jlora.lift(fn)

    def loss(trainable, frozen, x):
        return lifted(jlora.combine(trainable, frozen), x).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss), in_shardings=place)
    program = gradient.lower(trainable, frozen, x).compile()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return program, Cost(
        memory.argument_size_in_bytes / 1e6,
        memory.temp_size_in_bytes / 1e6,
        cost["bytes accessed"] / 1e6,
        cost["flops"] / 1e9,
    )


def compare(title: str, fn, params, x, place=None) -> dict[str, Cost]:
    """The costs of all bases, printed."""
    print(f"\n{title}")
    print(f"{'base':14} arguments MB  temporaries MB  accessed MB     GFLOP")
    found = {}
    for qtype in BASES:
        _, c = compiled(fn, *halves(fn, params, x, qtype), x, place)
        found[qtype] = c
        print(
            f"{qtype:14} {c.arguments:12.2f} {c.temporaries:15.2f}"
            f" {c.accessed:12.1f} {c.flops:9.1f}",
            flush=True,
        )
    return found


def base_bytes(params) -> float:
    return sum(2 * x.size for x in jax.tree.leaves(params)) / 1e6


def check_resident(found: dict[str, Cost], params) -> None:
    """The bases' own part of the arguments, which all else leaves the same."""
    whole = base_bytes(params)
    rest = found["bfloat16"].arguments - whole
    for qtype, most in RESIDENT.items():
        share = (found[qtype].arguments - rest) / whole
        assert share <= most, (qtype, share, most)


def check_temporaries(found: dict[str, Cost], most: float) -> None:
    """No base needs more temporaries than this beyond those of the float base."""
    for qtype, c in found.items():
        more = c.temporaries - found["bfloat16"].temporaries
        assert more <= most, (qtype, more, most)


def on_cpu() -> None:
    """Bases in bfloat16, activations in bfloat16 and in float32."""
    width, tokens = 512, 64
    weight = 2 * width * width / 1e6
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.ShapeDtypeStruct((tokens, width), dtype)
        for layers in (8, 32):
            for fn, params in (
                (chain, squares(layers, width)),
                (scanned, stacked(layers, width)),
            ):
                title = f"CPU, {fn.__name__}: {layers} × {width} × {width}, {x}"
                found = compare(title, fn, params, x)
                check_resident(found, params)
                check_temporaries(found, 1.2 * weight)


def on_tpu() -> None:
    from jax.experimental import topologies

    device = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    for fn, params in ((chain, squares(6, 2048)), (scanned, stacked(6, 2048))):
        title = f"TPU v5e, {fn.__name__}: 6 × 2048 × 2048, 512 tokens"
        found = compare(title, fn, params, bfloat16(512, 2048), place)
        check_resident(found, params)
        check_temporaries(found, 0.1)
    for d, f in ((2048, 5632), (4096, 14336)):
        title = f"TPU v5e, blocks: 2 × ({d} → {f} → {d}), 4,096 tokens"
        params = pairs(2, d, f)
        found = compare(title, blocks, params, bfloat16(4096, d), place)
        check_resident(found, params)
        check_temporaries(found, 1.2 * 2 * d * f / 1e6)


def on_gpu(width: int = 4096, ffn: int = 14336, rounds: int = 20) -> None:
    """Steps that run, timed in turns: many tokens, and as few as a decoder has."""
    print(jax.devices()[0].device_kind)
    checked = []
    for fn, shapes, tokens in (
        (scanned, stacked(6, width), 4096),
        (scanned, stacked(6, width), 16),
        (blocks, pairs(2, width, ffn), 4096),
        (blocks, pairs(2, width, ffn), 16),
    ):
        drawn = iter(jax.random.split(jax.random.key(0), 9))
        params = jax.tree.map(
            lambda x, drawn=drawn: (
                jax.random.normal(next(drawn), x.shape, x.dtype) / x.shape[-2] ** 0.5
            ),
            shapes,
        )
        x = jax.random.normal(next(drawn), (tokens, width), jnp.bfloat16)
        sizes = ", ".join(str(x.shape) for x in jax.tree.leaves(shapes))
        print(f"\n{fn.__name__}: {sizes}; {tokens:,} tokens")
        print(f"{'base':14} arguments MB  temporaries MB   ms   of bfloat16's")
        calls, found = {}, {}
        for qtype in BASES:
            parts = halves(fn, params, x, qtype)
            program, found[qtype] = compiled(fn, *parts, x)
            calls[qtype] = functools.partial(program, *parts, x)
        times = in_turns(calls, rounds)
        for qtype, c in found.items():
            ratio = times[qtype] / times["bfloat16"]
            print(
                f"{qtype:14} {c.arguments:12.2f} {c.temporaries:15.2f}"
                f" {1e3 * times[qtype]:6.3f} {ratio:11.2f}",
                flush=True,
            )
        checked.append((found, params))
    for found, params in checked:
        check_resident(found, params)


def in_turns(calls, rounds: int) -> dict[str, float]:
    """Seconds of each call: the median of rounds of ten, after a first one."""
    times = {name: [] for name in calls}
    for k in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready([call() for _ in range(10)])
            if k:
                times[name].append((time.perf_counter() - began) / 10)
    return {name: float(np.median(own)) for name, own in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["cpu", "tpu", "gpu"])
    only = parser.parse_args().only
    if only == "gpu":
        on_gpu()
    else:
        jax.config.update("jax_platforms", "cpu")
    if only in (None, "cpu"):
        on_cpu()
    if only in (None, "tpu"):
        on_tpu()
    print("\nall within their bars")
