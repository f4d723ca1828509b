"""A training step of jlora beside every other way to take it.

    pip install ".[quant,interop]"
    python benchmarks/peers.py                  # on this machine: CPU or GPU
    pip install ".[quant,tpu-aot]"
    python benchmarks/peers.py --tpu v5e:2x2    # compiled for a TPU that is not here

One decoder (`decoder.py`), one batch, one dtype, adapters of rank 16 on all seven
matrices of every layer, AdamW:

  floor   the frozen forward pass and the gradients of the activations down to the first
          adapted weight: the FLOPs that no method can do without
  jlora   `jlora.lift` and `jlora.partition`
  dora    the same with magnitudes
  merged  W + BA formed in the loss
  full    full fine-tuning
  qwix    LoRA of qwix (Google's, for Flax modules)
  torch   the floor in PyTorch, eager
  peft    LoRA of PEFT (Hugging Face's, for PyTorch), eager; `peft dora` likewise

FLOPs, bytes and memory are what XLA says of the compiled step; those of PyTorch are
counted by its own tools.  FLOPs are left out on a GPU, where XLA does not see into the
products of cuBLAS.  Times are medians of interleaved rounds.  First, all ways
must give the same loss.  Then the claims are asserted (`judged`), and the table is
written into benchmarks/RESULTS.md.  A way whose package is not installed is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
from decoder import Decoder, Shape
from flax.traverse_util import flatten_dict, unflatten_dict

import jlora

RANK, ALPHA = 16, 32
SIZES = {  # platform to (model, sequences, their length, dtype)
    "cpu": (Shape(1024, 2816, 8192, 16, 8, 4), 4, 512, jnp.float32),
    "gpu": (Shape(2048, 5632, 32000, 16, 8, 4), 4, 2048, jnp.bfloat16),
    "tpu": (Shape(2048, 5632, 32000, 16, 8, 4), 4, 2048, jnp.bfloat16),
}
TARGETS = [f"params/layer_*/{name}/kernel" for name in decoder.ADAPTED]
RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = """# Training steps, each way to take them

Made by `python benchmarks/peers.py`, one run a section; what is counted and how is said
there. In brackets is the ratio to the floor: the frozen forward pass and the gradients
of the activations, in JAX, or in PyTorch for PEFT.

What was tried to bring bytes and time down:

- x·a of the weights that read one activation as one product: 52.9 to 49.4 GB a layer of
  Llama-3-8B on v5e (`tpu_aot.py`). It stays.
- The gradient of b with its cotangent second, so that XLA for CPU does not copy that in
  another order: 17.51 to 16.12 GB, and 5.2 to 4.1 s a step, of this model on two CPU
  cores. It stays (`jlora/_product.py`).
- On v5e, of a model like the one below, 75.2 GB before: W and a as one product 79.1; b
  under W 78.2, with a derivative of its own 76.0; W + BA formed forward, with the
  gradients of the factors, 74.2, and it rounds small deltas away. None of them stays.

Bytes and memory are of XLA's own choice of what to fuse and to keep: on TPU a step with
adapters needs less memory than the floor, and more bytes than one without products of
its own (W + BA, full fine-tuning), at 0.77 and 0.70 times their FLOPs.

Times of one run compare; those of two do not: the run before, in a fixed order, gave
floor 4.81 s, jlora 4.62, full 5.84, qwix 5.24, PEFT 4.14 and its floor 3.75. PEFT is
faster by the clock, as its floor is: PyTorch's CPU kernels against XLA's.

What is left on TPU is the second product's own: for each weight y is written, read and
written again, and dy is read once more for dh and for db. XLA fuses no two products.
"""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to take a step: a function of (what trains, the rest, ids).

    Attributes:
      fn: gives (what trains, loss); what trains is donated.
      state: makes what trains, optimizer state included.
      rest: makes what does not.
    """

    fn: Callable[..., Any]
    state: Callable[[], Any]
    rest: Callable[[], Any]


@dataclasses.dataclass
class Cost:
    """What a step costs; None where nobody says."""

    flops: float | None = None
    bytes: float | None = None
    temporary: int | None = None
    peak: int | None = None
    trace: float | None = None
    compile: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


def ways(model: Decoder, params: Callable[[], Any]) -> dict[str, Way]:
    """The ways of JAX, on the params that `params` makes anew at each call."""
    tx = optax.adamw(1e-4)

    def loss(params: Any, ids: Any, bump: Any = None) -> Any:
        return decoder.loss(model.apply(params, ids[:, :-1], bump), ids)

    def trained(of: Callable[..., Any]) -> Callable[..., Any]:
        def step(state: Any, rest: Any, ids: Any) -> Any:
            trains, opt_state = state
            value, grads = jax.value_and_grad(of)(trains, rest, ids)
            updates, opt_state = tx.update(grads, opt_state, trains)
            return (optax.apply_updates(trains, updates), opt_state), value

        return step

    def floor(bump: Any, params: Any, ids: Any) -> Any:
        value, grad = jax.value_and_grad(loss, argnums=2)(params, ids, bump)
        return grad, value  # so that every step reads what the one before it wrote

    lifted = jlora.lift(loss)

    @functools.cache
    def plan() -> Any:
        abstract = jax.eval_shape(params)
        ids = jax.ShapeDtypeStruct((1, 9), jnp.int32)
        return jlora.plan(loss, abstract, ids, rank=RANK, alpha=ALPHA, targets=TARGETS)

    def halves(i: int, **options: Any) -> Callable[[], Any]:
        return lambda: jlora.partition(jlora.wrap(params(), plan=plan(), **options))[i]

    def with_moments(trains: Callable[[], Any]) -> Callable[[], Any]:
        def state() -> Any:
            tree = trains()
            return tree, tx.init(tree)

        return state

    def adapted(trains: Any, rest: Any, ids: Any) -> Any:
        return lifted(jlora.combine(trains, rest), ids)

    def merged(trains: Any, rest: Any, ids: Any) -> Any:
        tree = jlora.combine(trains, jax.lax.stop_gradient(rest))
        return loss(jlora.merge(tree), ids)

    found = {
        "floor": Way(floor, lambda: jnp.zeros((), model.dtype), params),
        "jlora": Way(trained(adapted), with_moments(halves(0)), halves(1)),
        "dora": Way(
            trained(adapted),
            with_moments(halves(0, dora=True)),
            halves(1, dora=True),
        ),
        "merged": Way(trained(merged), with_moments(halves(0)), halves(1)),
        "full": Way(
            trained(lambda params, _, ids: loss(params, ids)),
            with_moments(params),
            lambda: (),
        ),
    }
    if importlib.util.find_spec("qwix"):
        import qwix

        rules = f".*/({'|'.join(decoder.ADAPTED)})"
        provider = qwix.LoraProvider(module_path=rules, rank=RANK, alpha=ALPHA)
        theirs = qwix.apply_lora_to_model(model, provider)

        def factors() -> Any:
            whole = theirs.init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))
            flat = flatten_dict(whole)
            return {k: x for k, x in flat.items() if k[-1].endswith(("_a", "_b"))}

        def of_qwix(trains: Any, rest: Any, ids: Any) -> Any:
            both = unflatten_dict({**trains, **rest})
            return decoder.loss(theirs.apply(both, ids[:, :-1]), ids)

        found["qwix"] = Way(
            trained(of_qwix), with_moments(factors), lambda: flatten_dict(params())
        )
    return found


def torch_ways(
    shape: Shape, dtype: Any, params: Any, ids: Any
) -> dict[str, Callable[[], Any]]:
    """The ways of PyTorch: each a step that returns its loss."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("peft")):
        return {}
    import peft
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = torch.from_numpy(np.asarray(ids, np.int64)).to(device)

    def model() -> Any:
        return decoder.in_torch(shape, params, device, dtype)

    frozen = model().requires_grad_(False)
    bump = torch.zeros((), device=device, dtype=frozen.head.weight.dtype)
    bump.requires_grad_()

    def floor() -> Any:
        loss = frozen(batch, bump)
        loss.backward()
        bump.grad = None
        return loss.detach()

    def adapted(**options: Any) -> Callable[[], Any]:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=decoder.ADAPTED, **options
        )
        lora = peft.get_peft_model(model(), config, autocast_adapter_dtype=False)
        trains = [x for x in lora.parameters() if x.requires_grad]
        optimizer = torch.optim.AdamW(trains, lr=1e-4)

        def step() -> Any:
            loss = lora(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    return {"torch": floor, "peft": adapted(), "peft dora": adapted(use_dora=True)}


def placed(tree: Any, place: Any) -> Any:
    """The shapes of a tree, on a device that need not be here."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def compiled(way: Way, ids: Any, place: Any) -> tuple[Cost, Any]:
    """Traces with empty caches, compiles and reads what came out."""
    args = (jax.eval_shape(way.state), jax.eval_shape(way.rest), ids)
    args = placed(args, place)

    def trace() -> Any:
        jax.clear_caches()
        fn = jax.jit(lambda *args: way.fn(*args), donate_argnums=0, out_shardings=place)
        return timed(fn.trace, *args)

    traces = [trace() for _ in range(5)]
    seconds, program = timed(lambda: traces[-1][1].lower().compile())
    cost, memory = program.cost_analysis(), program.memory_analysis()
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes
    counted = next(iter(place.device_set)).platform != "gpu"
    return Cost(
        flops=cost["flops"] if counted else None,
        bytes=cost["bytes accessed"],
        temporary=memory.temp_size_in_bytes,
        peak=live - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        trace=statistics.median(spent for spent, _ in traces),
        compile=seconds,
    ), program


def timed(fn: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    out = fn(*args)
    return time.perf_counter() - start, out


def run(
    costs: dict[str, Cost],
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    close: float,
) -> None:
    """Times the steps, one of each a round, in an order of the round's own.

    The first step of each must give the same loss, to a relative difference of `close`.
    """
    names = list(steps)
    losses = {name: float(steps[name]()) for name in names}
    first = losses["floor"]
    assert all(abs(x - first) <= close * first for x in losses.values()), losses
    for i in range(rounds):
        # What was just run matters, such as threads that wait for more to do.
        for name in random.Random(i).sample(names, len(names)):
            seconds, _ = timed(lambda name=name: float(steps[name]()))
            costs[name].seconds.append(seconds)
        print(f"  round {i + 1} of {rounds}", flush=True)


def stepping(program: Any, way: Way, ids: Any) -> Callable[[], Any]:
    """A step that goes on from where the last one stopped; returns the loss."""
    held = [way.state()]
    rest = way.rest()

    def step() -> Any:
        held[0], loss = program(held[0], rest, ids)
        return loss

    return step


def count_torch(cost: Cost, step: Callable[[], Any]) -> None:
    """FLOPs, or on a GPU what a step needs for a while, as PyTorch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()  # by the other ways, too
        step()
        cost.temporary = torch.cuda.max_memory_allocated() - held
        return
    with FlopCounterMode(display=False) as counter:
        step()
    cost.flops = counter.get_total_flops()


def table(costs: dict[str, Cost]) -> str:
    """Markdown, a row a way; in brackets the ratio to the floor."""
    columns: list[tuple[str, Callable[[Cost], float | None], float, str, bool]] = [
        ("GFLOP", lambda c: c.flops, 1e9, ",.1f", True),
        ("GB accessed", lambda c: c.bytes, 1e9, ".2f", True),
        ("GB temporary", lambda c: c.temporary, 1e9, ".2f", True),
        ("GB in all", lambda c: c.peak, 1e9, ".2f", True),
        ("trace, s", lambda c: c.trace, 1, ".2f", False),
        ("compile, s", lambda c: c.compile, 1, ".1f", False),
        ("step, ms", lambda c: median(c), 1e-3, ",.1f", True),
    ]
    columns = [x for x in columns if any(x[1](c) is not None for c in costs.values())]

    def cell(name: str, column: Any) -> str:
        _, of, unit, form, ratio = column
        value = of(costs[name])
        if value is None:
            return ""
        base = of(costs["torch" if name.startswith("peft") else "floor"])
        mine = ratio and base and name not in ("floor", "torch")
        return f"{value / unit:{form}}" + (f" ({value / base:.3f})" if mine else "")

    return tables.markdown(
        [
            ["", *(c[0] for c in columns)],
            *([name, *(cell(name, c) for c in columns)] for name in costs),
        ]
    )


def median(cost: Cost) -> float | None:
    return statistics.median(cost.seconds) if cost.seconds else None


def judged(costs: dict[str, Cost], own: float) -> list[str]:
    """The claims, each with its figure and its bar; fails where one does not hold."""
    floor, ours, dora, merged, full = (
        costs[name] for name in ("floor", "jlora", "dora", "merged", "full")
    )
    claims = []
    if floor.flops:
        claims += [
            (
                "FLOPs, of the floor's and the adapters' own",
                ours.flops / (floor.flops + own),
                1.005,
            ),
            ("FLOPs, of those of W + BA in the loss", ours.flops / merged.flops, 0.9),
            ("FLOPs of DoRA, of LoRA's", dora.flops / ours.flops, 1.01),
        ]
    if qwix := costs.get("qwix"):
        # An H200 needed 1.0011 of it, 4 MB of 4 GB more; why is not found.
        most = 1.0 if floor.flops else 1.002
        claims += [
            ("bytes accessed, of qwix's", ours.bytes / qwix.bytes, 1.0),
            ("temporary memory, of qwix's", ours.temporary / qwix.temporary, most),
        ]
    if ours.seconds:
        time_of = {name: median(cost) for name, cost in costs.items()}
        claims += [
            (
                "a step's time, of full fine-tuning's",
                time_of["jlora"] / time_of["full"],
                1.0,
            )
        ]
        if "qwix" in costs:
            claims += [
                ("a step's time, of qwix's", time_of["jlora"] / time_of["qwix"], 1.05)
            ]
        if "peft" in costs:
            theirs = time_of["peft"] / time_of["torch"]
            dearer = time_of["peft dora"] / time_of["peft"]
            claims += [
                (
                    "a step's time, of its floor's, of the same of PEFT",
                    time_of["jlora"] / time_of["floor"] / theirs,
                    1.0,
                ),
                (
                    "a step's time of DoRA, of LoRA's, of the same of PEFT",
                    time_of["dora"] / time_of["jlora"] / dearer,
                    1.0,
                ),
            ]
    said = [f"- {what}: {found:.4f} (at most {bar})" for what, found, bar in claims]
    failed = [
        line
        for line, (_, found, bar) in zip(said, claims, strict=True)
        if not found <= bar
    ]
    print("\n".join(said))
    assert not failed, "what does not hold:\n" + "\n".join(failed)
    return said


def versions(names: Iterable[str]) -> str:
    """The names with the versions that are installed."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="such as v5e:2x2")
    parser.add_argument("--rounds", type=int, default=9, help="of timed steps")
    args = parser.parse_args()
    if args.tpu:
        from jax.experimental import topologies

        jax.config.update("jax_platforms", "cpu")
        kind, name = "tpu", f"TPU {args.tpu.split(':')[0]}, compiled without one"
        device = topologies.get_topology_desc(args.tpu, platform="tpu").devices[0]
    else:
        device = jax.devices()[0]
        kind = device.platform
        name = f"{os.cpu_count()} CPU cores" if kind == "cpu" else device.device_kind
    shape, batch, length, dtype = SIZES[kind]
    own = 6 * batch * length * RANK * shape.sides
    attention = "cudnn" if kind == "gpu" else "xla"
    model = Decoder(shape, dtype, attention)

    @jax.jit
    def params() -> Any:
        return model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))

    title = (
        f"## {name}: d {shape.d}, {shape.layers} layers, {batch} × {length:,} tokens, "
        f"{jnp.dtype(dtype).name}"
    )
    print(title)
    todo = ways(model, params)
    ids = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    place = jax.sharding.SingleDeviceSharding(device)
    costs, programs = {}, {}
    for key, way in todo.items():
        costs[key], programs[key] = compiled(way, ids, place)
        print(f"  {key} compiled in {costs[key].compile:.1f} s", flush=True)
    if not args.tpu:
        drawn = np.random.default_rng(0).integers(0, shape.vocab, ids.shape)
        ids = jnp.asarray(drawn, jnp.int32)
        steps = {key: stepping(programs[key], todo[key], ids) for key in todo}
        torches = torch_ways(shape, dtype, params(), drawn)
        costs |= {key: Cost() for key in torches}
        run(costs, steps | torches, args.rounds, 1e-5 if kind == "cpu" else 5e-3)
        for key, step in torches.items():
            count_torch(costs[key], step)
    packages = ["jax", "jaxlib", "flax"] + [x for x in ("qwix",) if x in costs]
    packages += ["torch", "peft"] if "peft" in costs else []
    print(table(costs))
    lines = judged(costs, own)
    section = "\n".join(
        [title, "", table(costs), "", *lines, "", versions(packages) + ".", ""]
    )
    tables.record(RESULTS, HEAD, section)


if __name__ == "__main__":
    main()
