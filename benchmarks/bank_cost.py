"""What many adapters in one batch cost, against one adapter on as many rows.

    pip install "jlora[tpu-aot]" torch peft
    python benchmarks/bank_cost.py                   # all of what follows
    python benchmarks/bank_cost.py --only flops      # by XLA's count, on CPU
    python benchmarks/bank_cost.py --only speed      # steps a second, on CPU
    python benchmarks/bank_cost.py --only sweep      # eight runs at once, on CPU
    python benchmarks/bank_cost.py --only private    # DP-SGD beside a plain step
    python benchmarks/bank_cost.py --only bytes      # compiled for TPU v5e
    python benchmarks/bank_cost.py --only products   # gathered and joined, on both
    python benchmarks/bank_cost.py --only peft       # and beside PEFT, inference on CPU

The model is a small Llama-like decoder with adapters on its seven matrices a layer. An
example is a sequence, and each has its own adapter. Asserts what the docs claim.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
from decoder import Decoder, Shape

import jlora

SHAPE = Shape(d=1024, ffn=2816, vocab=1024, heads=8, kv_heads=4, layers=2)
RANK, EXAMPLES, LENGTH = 8, 16, 256
SLOTS = [1, 8, 64, 2000]
FLOPS, RATE, GATHERED, READ, SWEEP = 1.01, 0.9, 3.3, 1.5, 1.1
"""What the docs claim: the most FLOPs, bytes (gathered, and by the kernel) and time of
a sweep; the least rate."""


def model(shape: Shape = SHAPE) -> tuple[Callable[..., Any], Any]:
    """fn(params, ids) of one sequence, and params."""
    net = Decoder(shape, jnp.float32, "xla")
    params = net.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return lambda params, ids: net.apply(params, ids[None])[0], params


def bank_of(params: Any, slots: int) -> jlora.Bank:
    """Adapters of random numbers."""
    wanted = [f"**/{name}/kernel" for name in decoder.ADAPTED]
    one = jlora.adapter(jlora.wrap(params, RANK, targets=wanted))
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(one)))

    def filled(leaf: Any) -> Any:
        new = {
            name: jax.random.normal(next(keys), (slots, *getattr(leaf, name).shape)) / 9
            for name in ("a", "b")
        }
        return dataclasses.replace(leaf, **new, scale=jnp.ones(slots))

    leaves = {path: filled(leaf) for path, leaf in one.items()}
    return jlora.Bank(leaves, {path: leaf.ndim for path, leaf in one.items()})


def programs(fn: Callable[..., Any], params: Any) -> dict[str, Callable[..., Any]]:
    """Inference and gradients: of a bank, and of one adapter on as many rows."""

    def loss(logits: Any, rows: Any) -> Any:
        each = jax.vmap(lambda y, x: decoder.loss(y[None, :-1], x[None]))(logits, rows)
        return each.mean()

    def many(bank: Any, ids: Any, rows: Any) -> Any:
        return jlora.per_example(fn)(params, bank, ids, rows)

    def one(adapter: Any, ids: Any, rows: Any) -> Any:
        lifted = jlora.lift(fn)
        return jax.vmap(lambda x: lifted(jlora.attach(params, adapter), x))(rows)

    def gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
        def step(adapters: Any, ids: Any, rows: Any) -> Any:
            trains, frozen = jlora.partition(adapters)

            def of(trains: Any) -> Any:
                return loss(forward(jlora.combine(trains, frozen), ids, rows), rows)

            return jax.grad(of)(trains)

        return step

    return {
        "inference": many,
        "inference, one": one,
        "training": gradient(many),
        "training, one": gradient(one),
    }


def rows_of(examples: int, length: int, vocab: int) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (examples, length), 0, vocab)


def flops() -> None:
    """FLOPs of a batch of mixed adapters, over those of one adapter."""
    fn, params = model()
    rows = rows_of(EXAMPLES, LENGTH, SHAPE.vocab)
    print("FLOPs over those of one adapter | slots:", *SLOTS)
    for kind in ("inference", "training"):
        found = []
        made = programs(fn, params)
        for slots in SLOTS:
            bank = jax.eval_shape(functools.partial(bank_of, params, slots))
            ids = jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32)
            one = jax.eval_shape(lambda bank: jlora.pick(bank, jnp.int32(0)), bank)
            counts = [
                jax.jit(f).lower(x, ids, rows).compile().cost_analysis()["flops"]
                for f, x in ((made[kind], bank), (made[f"{kind}, one"], one))
            ]
            found.append(counts[0] / counts[1])
        print(f"{kind:10}", *(f"{x:.4f}" for x in found))
        assert max(found) <= FLOPS, kind


def speed(repeats: int = 8) -> None:
    """Steps a second of a batch of mixed adapters, over those of one adapter."""
    fn, params = model()
    rows = rows_of(EXAMPLES, LENGTH, SHAPE.vocab)
    made = programs(fn, params)
    for slots in SLOTS:
        bank = jax.jit(bank_of, static_argnums=1)(params, slots)
        ids = jax.random.randint(jax.random.key(3), (EXAMPLES,), 0, slots)
        one = jlora.pick(bank, 0)
        for kind in ("inference", "training"):
            calls = [
                functools.partial(jax.jit(f), x, ids, rows)
                for f, x in ((made[kind], bank), (made[f"{kind}, one"], one))
            ]
            ratio = interleaved(calls, repeats)
            said = f"{slots:5} slots, {kind:10} {ratio:.3f} × the rate of one adapter"
            print(said, flush=True)
            assert ratio >= RATE


def sweep(runs: int = 8, repeats: int = 8) -> None:
    """The time of a step of several runs at once, over one run's with as many rows.

    Each run has its own learning rate, and all see the same rows.
    """
    fn, params = model()
    rows = rows_of(4, LENGTH, SHAPE.vocab)
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)

    def step(adapter: Any, state: Any, rows: Any) -> Any:
        trains, frozen = jlora.partition(adapter)

        def loss(trains: Any) -> Any:
            tree = jlora.attach(params, jlora.combine(trains, frozen))
            logits = jax.vmap(lambda x: jlora.lift(fn)(tree, x))(rows)
            return decoder.loss(logits[:, :-1], rows)

        updates, state = tx.update(jax.grad(loss)(trains), state, trains)
        return jlora.combine(optax.apply_updates(trains, updates), frozen), state

    bank = jax.jit(bank_of, static_argnums=1)(params, runs)
    states = jax.vmap(lambda x: tx.init(jlora.partition(x)[0]))(bank)
    rates = jnp.logspace(-4, -2, runs)
    states = states._replace(hyperparams=states.hyperparams | {"learning_rate": rates})
    one = jlora.pick(bank, 0)
    together = jax.jit(jax.vmap(step, (0, 0, None)))
    alone = jax.jit(step)
    calls = [
        functools.partial(together, bank, states, rows),
        functools.partial(
            alone, one, tx.init(jlora.partition(one)[0]), jnp.tile(rows, (runs, 1))
        ),
    ]
    time_of_one = interleaved(calls, repeats)
    print(f"{runs} runs at once: {1 / time_of_one:.3f} × one run with as many rows")
    assert 1 / time_of_one <= SWEEP


def private(repeats: int = 8) -> None:
    """What per-example gradients of one adapter, clipped and noised, cost."""
    fn, params = model()
    rows = rows_of(EXAMPLES, LENGTH, SHAPE.vocab)
    adapter = jlora.pick(bank_of(params, 1), 0)
    trainable, frozen = jlora.partition(adapter)
    noisy = optax.contrib.differentially_private_aggregate(
        l2_norm_clip=1.0, noise_multiplier=1.0, key=jax.random.key(0)
    )

    def loss(trainable: Any, row: jax.Array) -> jax.Array:
        tree = jlora.attach(params, jlora.combine(trainable, frozen))
        return decoder.loss(jlora.lift(fn)(tree, row)[None, :-1], row[None])

    def plain(trainable: Any, rows: jax.Array) -> Any:
        def mean(trainable: Any) -> jax.Array:
            return jax.vmap(loss, (None, 0))(trainable, rows).mean()

        return jax.grad(mean)(trainable)

    def clipped(trainable: Any, rows: jax.Array) -> Any:
        grads = jax.vmap(jax.grad(loss), (None, 0))(trainable, rows)
        return noisy.update(grads, noisy.init(trainable))[0]

    programs = [jax.jit(f).lower(trainable, rows).compile() for f in (clipped, plain)]
    flops = [x.cost_analysis()["flops"] for x in programs]
    calls = [functools.partial(x, trainable, rows) for x in programs]
    temporaries = [x.memory_analysis().temp_size_in_bytes for x in programs]
    adapters = EXAMPLES * sum(x.nbytes for x in jax.tree.leaves(trainable))
    more = temporaries[0] - temporaries[1]
    print(
        f"DP-SGD, {EXAMPLES} examples of {LENGTH} tokens: {flops[0] / flops[1]:.3f} × "
        f"the FLOPs of a plain step, {1 / interleaved(calls, repeats):.2f} × the time, "
        f"{more / adapters:.2f} × the adapters' bytes of all examples beyond its memory"
    )
    assert flops[0] / flops[1] < FLOPS


def interleaved(calls: list[Callable[[], Any]], repeats: int) -> float:
    """The median time of the second call over that of the first."""
    times: list[list[float]] = [[], []]
    for k in range(repeats + 1):
        for own, call in zip(times, calls, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(call())
            if k:  # the first one compiles
                own.append(time.perf_counter() - began)
    return float(np.median(times[1]) / np.median(times[0]))


def product(params: Any, x: jax.Array) -> jax.Array:
    """A model of one weight."""
    return x @ params["w"]


@functools.cache
def v5e() -> jax.sharding.Sharding:
    """One TPU, which need not be there."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    return jax.sharding.SingleDeviceSharding(device)


def on_v5e(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=v5e())


def accessed(fn: Callable[..., Any], *args: Any) -> float:
    """Bytes, by the compiler."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["bytes accessed"]


def on_one_weight(make: Callable[..., Any], d: int, rank: int, slots: int) -> Any:
    """Params of one weight and a bank for it; `make` gives arrays of a shape."""
    params = {"w": make(d, d)}
    like = jlora.wrap(params, rank, targets="w", dtype=make(1).dtype)
    leaf = dataclasses.replace(
        jlora.adapter(like)["w"],
        a=make(slots, d, rank),
        b=make(slots, rank, d),
        scale=make(slots),
    )
    return params, jlora.Bank({"w": leaf}, {"w": 2})


def gathered() -> None:
    """Bytes beyond the plain product, over those of the adapters that are used."""
    struct, d, rank, slots = on_v5e, 4096, 16, 2000
    params, bank = on_one_weight(struct, d, rank, slots)
    for examples in (64, 256):
        x, ids = struct(examples, d), struct(examples, dtype=jnp.int32)
        plain = accessed(product, params, x)
        mixed = accessed(jlora.per_example(product), params, bank, ids, x)
        used = examples * 2 * d * rank * 2
        print(
            f"{examples} examples of one token, {slots} slots, v5e: "
            f"{mixed / 1e6:.0f} MB accessed, {plain / 1e6:.0f} of them for the plain "
            f"product; the rest is {(mixed - plain) / used:.2f} × the adapters' own "
            f"{used / 1e6:.1f} MB"
        )
        assert mixed - plain <= GATHERED * used
        kernel = jlora.per_example(product, product="kernel")
        read = accessed(kernel, params, bank, ids, x)
        print(
            f"  with the kernel {read / 1e6:.0f} MB, {(read - plain) / used:.2f} × the "
            f"adapters; of the limit, the base and each adapter once, gathered "
            f"{mixed / (plain + used):.2f} and with the kernel "
            f"{read / (plain + used):.2f} ×"
        )
        assert read - plain <= READ * used

    def in_float32(slots: int) -> float:
        wide = functools.partial(struct, dtype=jnp.float32)
        _, bank = on_one_weight(wide, d, rank, slots)
        args = params, bank, struct(64, dtype=jnp.int32), struct(64, d)
        return accessed(jlora.per_example(product), *args)

    few, many = in_float32(slots // 2), in_float32(slots)
    print(f"in float32, {slots} slots over half of them: {many / few:.3f} × the bytes")
    assert many / few < 1.01


def products(repeats: int = 60) -> None:
    """What the two products of a bank cost, beyond the base's, where either may do.

    Where the shapes choose the joined one, it has to move less on a TPU, whose decoding
    waits for memory. The times on a CPU are of a millisecond, and not asserted.
    """
    key = jax.random.key(0)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape)

    print("beyond the base's product     v5e, MB            CPU, of the base's time")
    print("slots examples tokens   gathered    joined     gathered    joined   chosen")
    for slots, examples, tokens in (
        (4, 16, 1),
        (16, 16, 1),
        (2, 64, 1),
        (8, 64, 1),
        (16, 64, 1),
        (32, 64, 1),
        (16, 256, 1),
        (64, 256, 1),
        (4, 64, 4),
        (2, 16, 256),
    ):
        ids = jnp.arange(examples) % slots
        params, bank = on_one_weight(normal, 1024, 8, slots)
        x = normal(examples, tokens, 1024)
        base = jax.jit(product)
        calls = {
            kind: jax.jit(jlora.per_example(product, product=kind))
            for kind in ("gathered", "joined")
        }
        times = {
            kind: 1
            / interleaved(
                [
                    functools.partial(call, params, bank, ids, x),
                    functools.partial(base, params, x),
                ],
                repeats,
            )
            - 1
            for kind, call in calls.items()
        }
        params, bank = on_one_weight(on_v5e, 4096, 16, slots)
        y = on_v5e(examples, tokens, 4096)
        args = params, bank, on_v5e(examples, dtype=jnp.int32), y
        plain = accessed(product, params, y)
        moved = {kind: accessed(call, *args) - plain for kind, call in calls.items()}
        chosen = jlora.explain(jlora.per_example(product), *args).product
        print(
            f"{slots:5} {examples:8} {tokens:6}"
            f"{moved['gathered'] / 1e6:11.0f}{moved['joined'] / 1e6:10.0f}"
            f"{times['gathered']:13.0%}{times['joined']:10.0%}   {chosen}",
            flush=True,
        )
        if chosen == "joined":
            assert moved["joined"] < moved["gathered"]


def beside_peft(repeats: int = 5) -> None:
    """Tokens a second in inference, over those of PEFT's mixed batch."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("peft")):
        print("PEFT: not installed")
        return
    import peft
    import torch

    fn, params = model()
    rows = rows_of(64, 64, SHAPE.vocab)
    for distinct in (8, 64):
        bank = bank_of(params, distinct)
        ids = jnp.arange(64) % distinct
        many = functools.partial(
            jax.jit(programs(fn, params)["inference"]), bank, ids, rows
        )
        config = peft.LoraConfig(r=RANK, target_modules=decoder.ADAPTED)
        net = decoder.in_torch(SHAPE, params, "cpu", jnp.float32)
        net = peft.get_peft_model(net, config, adapter_name="0").eval()
        for k in range(1, distinct):
            net.add_adapter(str(k), config)
        names = [str(int(i)) for i in ids]
        batch = torch.from_numpy(np.asarray(rows, np.int64))

        def mixed(net: Any = net, batch: Any = batch, names: Any = names) -> None:
            with torch.no_grad():
                net(batch, adapter_names=names)

        def loop(net: Any = net, batch: Any = batch, n: int = distinct) -> None:
            with torch.no_grad():
                for k in range(n):
                    net.set_adapter(str(k))
                    net(batch[k::n])

        for name, call in (("its mixed batch", mixed), ("a loop over adapters", loop)):
            ratio = interleaved([many, call], repeats)
            print(f"{distinct} adapters: {ratio:.2f} × the tokens/s of PEFT, {name}")


PARTS = {
    "flops": flops,
    "speed": speed,
    "sweep": sweep,
    "private": private,
    "bytes": gathered,
    "products": products,
    "peft": beside_peft,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one of the parts")
    args = parser.parse_args()
    for name, part in PARTS.items():
        if args.only in (None, name):
            part()


if __name__ == "__main__":
    main()
