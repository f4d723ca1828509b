"""What a training step of Llama 3 costs on a TPU pod, compiled without one.

    pip install "jlora[quant,tpu-aot]"
    python benchmarks/tpu_aot.py            # 8B on v5e, 70B on v5p and v6e; QLoRA
    python benchmarks/tpu_aot.py --model 70b --topology v5p:4x4x8 --tp 8

XLA's own compiler for TPU compiles the steps for a topology that is not here, from the
shapes of the weights: nothing runs and nothing is allocated. Four programs a model,
each under FSDP and tensor parallelism, with scanned and rematerialised layers in
bfloat16:

  floor    frozen forward pass and the gradients of the activations: what no method
           can do without
  jlora    LoRA of rank 16 on all seven matrices of every layer, with AdamW
  merged   the same by W + BA formed in the loss
  full     full fine-tuning, with AdamW in float32

And QLoRA: the same step of jlora on a base in bfloat16, int8 and nf4 (blocks of 64; the
embedding and the head stay in bfloat16), on slices where the first does not fit.

And banks: how many adapters of rank 16 one chip holds beside the 8B model, by the base
and by what is adapted, in a forward pass of which every example has its own.

FLOPs and bytes are those of one chip, as XLA counts them: the body of the scan once,
and not once a layer. Writes a table for each model and topology into benchmarks/TPU.md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

sys.path.append(str(Path(__file__).parents[1] / "examples" / "pod"))
import llama

RANK = 16
MODELS = {"8b": llama.LLAMA_3_8B, "70b": llama.LLAMA_3_70B}
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Gigabytes (10⁹ bytes) of a chip's memory, from Google's descriptions of them."""
RUNS = [  # model, topology, tp, sequences of 4,096 tokens
    ("8b", "v5e:4x8", 4, 32),
    ("70b", "v5p:4x4x8", 8, 64),
    ("70b", "v6e:16x16", 8, 64),
]
QUANTISED = [  # where a bfloat16 base does not fit, and a quantised one does
    ("70b", "v5e:2x4", 8, 1),
    ("70b", "v6e:2x2", 4, 1),
    ("70b", "v5p:2x2x1", 4, 11),
]
BANKS = [  # chips of which one is used
    ("8b", "v5e:2x2"),
    ("8b", "v5p:2x2x1"),
]
HELD = {"wq, wv": ("layers/wq", "layers/wv"), "all seven": llama.TARGETS}
EXAMPLES, TOKENS = 16, 128
SLOTS = 2000
TABLES = Path(__file__).with_name("TPU.md")


@dataclasses.dataclass
class Cost:
    """What the compiler says of a program: bytes and FLOPs of one chip."""

    arguments: int
    temporaries: int
    flops: float
    bytes: float
    collectives: list[hlo.Collective]
    seconds: float


def mesh_of(topology: str, tp: int) -> Mesh:
    """A mesh of "fsdp" × "tp" over the chips of a topology such as "v5p:4x4x8"."""
    from jax.experimental import mesh_utils, topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    shape = (len(devices) // tp, tp)
    try:
        devices = mesh_utils.create_device_mesh(shape, devices)
    except (NotImplementedError, AssertionError, ValueError):
        devices = np.array(devices).reshape(shape)
    return Mesh(devices, ("fsdp", "tp"))


class Setting:
    """A model's params and ids on a mesh, as shapes with their shardings."""

    def __init__(self, model: llama.Llama, mesh: Mesh, batch: int, length: int):
        self.model, self.mesh = model, mesh
        self.params = jax.tree.map(self.placed, model.shapes(), model.specs())
        shape = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
        self.ids = self.placed(shape, P("fsdp"))
        self.plan = jlora.plan(
            model.loss, self.params, self.ids, rank=RANK, targets=llama.TARGETS
        )
        self.tx = optax.adamw(1e-4)

    def placed(self, x: Any, spec: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def step(self, loss: Any) -> Any:
        def run(trains: Any, opt_state: Any, *rest: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(trains, *rest)
            updates, opt_state = self.tx.update(grads, opt_state, trains)
            return optax.apply_updates(trains, updates), opt_state, value

        return run

    def opt_state(self, trains: Any) -> Any:
        """The shapes of the optimizer's state, each where what it is of lives."""
        whole = NamedSharding(self.mesh, P())
        shapes = jax.eval_shape(self.tx.init, jax.tree.map(wide, trains))
        places = optax.tree_utils.tree_map_params(
            self.tx,
            lambda _, x: x.sharding,
            shapes,
            trains,
            transform_non_params=lambda _: whole,
        )
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            places,
        )

    def lora(self, qtype: str | None = None, *, merged: bool = False) -> Any:
        """(function, arguments, donated) of a LoRA step, on a base of this qtype."""
        params = self.params
        if qtype is not None:
            params = jlora.quantize(params, qtype, plan=self.plan)
        trainable, frozen = jlora.partition(jlora.wrap(params, plan=self.plan))
        lifted = jlora.lift(self.model.loss)

        def adapted(t: Any, f: Any, ids: Any) -> Any:
            return lifted(jlora.combine(t, f), ids)

        def formed(t: Any, f: Any, ids: Any) -> Any:
            whole = jlora.combine(t, jax.lax.stop_gradient(f))
            return self.model.loss(jlora.merge(whole), ids)

        args = trainable, self.opt_state(trainable), frozen, self.ids
        return self.step(formed if merged else adapted), args, (0, 1)


def wide(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)


def programs(model: llama.Llama, mesh: Mesh, batch: int, length: int) -> dict[str, Any]:
    """Name to (function, arguments, donated): shapes with their shardings."""
    own = Setting(model, mesh, batch, length)

    def floor(params: Any, ids: Any) -> Any:
        return jax.value_and_grad(model.loss, argnums=2)(
            params, ids, jnp.zeros((), jnp.bfloat16)
        )

    full = own.params, own.opt_state(own.params), own.ids
    return {
        "floor": (floor, (own.params, own.ids), ()),
        "jlora": own.lora(),
        "merged": own.lora(merged=True),
        "full": (own.step(model.loss), full, (0, 1)),
    }


def compiled(mesh: Mesh, fn: Any, args: Any, donate: tuple[int, ...]) -> Cost:
    """Compiles for the mesh's chips and reads what came out."""
    out = None
    if donate:  # a step gives back what it was given, where it was
        places = [jax.tree.map(lambda x: x.sharding, args[i]) for i in donate]
        out = (*places, NamedSharding(mesh, P()))
    start = time.monotonic()
    jitted = jax.jit(fn, donate_argnums=donate, out_shardings=out)
    with jax.set_mesh(mesh):
        program = jitted.lower(*args).compile()
    seconds = time.monotonic() - start
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Cost(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        cost["flops"],
        cost["bytes accessed"],
        hlo.collectives(program.as_text()),
        seconds,
    )


def report(
    found: dict[str, Cost], topology: str, adapters: int, length: int, most: int
) -> str:
    """Markdown: the programs side by side; jlora's collectives beyond the floor's."""
    head = ["", *found]
    rows = [
        ["arguments, GB a chip", *(f"{c.arguments / 1e9:.3f}" for c in found.values())],
        [
            "temporaries, GB a chip",
            *(f"{c.temporaries / 1e9:.2f}" for c in found.values()),
        ],
        [
            "of the floor's temporaries",
            *(
                f"{c.temporaries / found['floor'].temporaries:.3f}"
                for c in found.values()
            ),
        ],
        ["TFLOP, of one layer", *(f"{c.flops / 1e12:.3f}" for c in found.values())],
        [
            "GB accessed, of one layer",
            *(f"{c.bytes / 1e9:.1f}" for c in found.values()),
        ],
    ]
    kinds = sorted({c.kind for cost in found.values() for c in cost.collectives})
    for kind in kinds:
        cells = []
        for cost in found.values():
            count, size = hlo.table(cost.collectives).get(kind, (0, 0))
            cells.append(f"{count}, {size / 1e6:,.1f} MB" if count else "")
        rows.append([kind, *cells])
    rows.append(["compiled in, s", *(f"{c.seconds:.0f}" for c in found.values())])
    lines = tables.markdown([head, *rows]).splitlines()
    chip = HBM[topology.split(":")[0]]
    ours = found["jlora"]
    used = (ours.arguments + ours.temporaries) / 1e9
    lines += [
        "",
        f"jlora needs {used:.1f} of a chip's {chip} GB; the adapters of a chip are "
        f"{adapters / 1e6:.2f} MB, {100 * adapters / (chip * 1e9):.3f} % of it.",
    ]
    lines += ["", *explained(ours, found["floor"], length, most)]
    return "\n".join(lines)


PHASES = ("forward", "recomputed", "backward", "unnamed")
SUMS = 9  # of x·a: wo's and down's, again where recomputed; five of its gradient


def explained(ours: Cost, floor: Cost, length: int, most: int) -> list[str]:
    """What jlora's step does between chips beyond the floor's, one kind and size a row.

    A sum of (batch, sequence, rank) is one of x·a or its gradient, where what it was
    contracted with is split over chips. The other sums are gradients of the factors,
    over the batch; and what is no sum puts a factor together, which is split as its
    weight is.

    Raises:
      AssertionError: one that is not of the rank: none of its sizes is one to three
        times the rank, or it has more than ``most`` elements; more sums of x·a than
        `SUMS`; a gradient of a factor that is named as of the forward pass.
    """
    count = collections.Counter
    more = count(ours.collectives) - count(floor.collectives)
    less = count(floor.collectives) - count(ours.collectives)

    def array(c: hlo.Collective) -> str:
        return f"{c.dtype}[{','.join(map(str, c.shape))}]"

    def what(c: hlo.Collective) -> str:
        if c.kind not in ("all-reduce", "reduce-scatter"):
            return "a or b, whole"
        tokens = len(c.shape) == 3 and c.shape[1] == length
        return "x·a; its gradient" if tokens else "the gradient of a or b"

    rows, sums = [["beyond the floor's", "array", "MB", *PHASES, "of"]], 0
    for c, n in sorted(more.items()):
        # Of equal ones that the floor has too, none is known to be the one beyond.
        phases = count(x.phase for x in ours.collectives if x == c)
        known = n == sum(phases.values())
        cells = [str(phases[p] or "") if known else "" for p in PHASES]
        name = c.kind if known else f"{n} {c.kind}"
        of_rank = any(k in (RANK, 2 * RANK, 3 * RANK) for k in c.shape)
        assert of_rank and math.prod(c.shape) <= most, f"{c} is not of the rank"
        of = what(c)
        sums += n if of.startswith("x·a") else 0
        forward = phases["forward"] + phases["recomputed"]
        assert not (of.startswith("the gradient") and forward), f"{c} is forward"
        rows.append([name, array(c), f"{c.bytes / 1e6:.3f}", *cells, of])
    assert sums <= SUMS, f"{sums} sums of x·a"
    fewer = "; ".join(f"{n} {c.kind} {array(c)}" for c, n in sorted(less.items()))
    return [tables.markdown(rows), "", f"Of the floor's it lacks {fewer or 'none'}."]


def measure(name: str, topology: str, tp: int, batch: int, length: int) -> str:
    """The section of one model on one topology."""
    mesh, model = mesh_of(topology, tp), MODELS[name]
    found = {}
    todo = programs(model, mesh, batch, length)
    for program, (fn, args, donate) in todo.items():
        print(f"  {program} …", end=" ", flush=True)
        found[program] = compiled(mesh, fn, args, donate)
        print(f"{found[program].seconds:.0f} s", flush=True)
    trainable = todo["jlora"][1][0]
    adapters = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(trainable)
    )
    chips = mesh.devices.size
    title = (
        f"## Llama-3-{name.upper()}, {topology}: {chips} chips, fsdp {chips // tp} × "
        f"tp {tp}, {batch} × {length:,} tokens"
    )
    # What has the rank for one size and the longest of a chip for the other.
    most = 3 * RANK * max(model.ffn, batch * length // (chips // tp))
    return f"{title}\n\n{report(found, topology, adapters, length, most)}\n"


def fitting(
    mesh: Mesh, fn: Any, args: Any, donate: tuple[int, ...], most: int
) -> tuple[list[str], bool]:
    """What a program needs, in GB, as cells of a table; and whether a chip has it."""
    try:
        cost = compiled(mesh, fn, args, donate)
    except jax.errors.JaxRuntimeError as e:
        found = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)G hbm", str(e))
        if found is None:
            raise
        used = float(found[1]) * (2**30 if found[2] == "G" else 2**20) / 1e9
        return ["", "", f"{used:.1f}", "does not fit"], False
    parts = cost.arguments / 1e9, cost.temporaries / 1e9
    said = "does not fit" if sum(parts) > most else f"of {most} GB"
    return [*(f"{x:.2f}" for x in (*parts, sum(parts))), said], sum(parts) <= most


def served(x: Any) -> jax.ShapeDtypeStruct:
    """Factors in bfloat16, and scales in float32."""
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.ndim > 1 else x.dtype)


def banks(name: str, topology: str, *_: Any) -> str:
    """The section of banks on one chip: `SLOTS` of them, and as many as it holds.

    Raises:
      AssertionError: a number of slots that should fit by what fewer of them need, and
        does not.
    """
    whole, model = mesh_of(topology, 1), MODELS[name]
    mesh = Mesh(whole.devices[:1, :1], whole.axis_names)
    chip = topology.split(":")[0]
    own, most = Setting(model, mesh, EXAMPLES, TOKENS), HBM[chip]
    mixed = jlora.per_example(lambda params, ids: model(params, ids[None])[0, -1])
    head = ["base", "adapted", "adapter, MB", "slots", "arguments, GB"]
    rows = [[*head, "temporaries, GB", "together", ""]]

    def needs(params: Any, adapter: Any, slots: int) -> tuple[list[str], bool]:
        stacked = jax.tree.map(
            lambda x: own.placed(jax.ShapeDtypeStruct((slots, *x.shape), x.dtype), P()),
            adapter,
        )
        bank = jlora.Bank(stacked, {path: x.ndim for path, x in adapter.items()})
        ids = own.placed(jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32), P())
        tokens = own.placed(jax.ShapeDtypeStruct((EXAMPLES, TOKENS), jnp.int32), P())
        return fitting(mesh, mixed, (params, bank, ids, tokens), (), most)

    for qtype in (None, "nf4"):
        for adapted, targets in HELD.items():
            plan = jlora.plan(
                model.loss, own.params, own.ids, rank=RANK, targets=targets
            )
            params = own.params
            if qtype is not None:
                params = jlora.quantize(params, qtype, plan=own.plan)
            tree = jlora.wrap(params, plan=plan)
            adapter = jax.tree.map(served, jlora.adapter(tree))
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(adapter))
            cells, fits = needs(params, adapter, EXAMPLES)
            slots = EXAMPLES
            if fits:
                left = max(0.0, 0.99 * most * 1e9 - float(cells[2]) * 1e9)
                slots = EXAMPLES + int(left // size) // 10 * 10
                slots = min(slots, SLOTS)
                cells, fits = needs(params, adapter, slots)
                assert fits, f"{slots} slots do not fit"
            said = [qtype or "bfloat16", adapted, f"{size / 1e6:.1f}"]
            rows.append([*said, f"{slots:,}", *cells])
            print("  " + ", ".join(rows[-1]), flush=True)
    title = (
        f"## A bank beside Llama-3-{name.upper()}, one {chip}: {EXAMPLES} examples of "
        f"{TOKENS} tokens, each with its own adapter"
    )
    return f"{title}\n\n{tables.markdown(rows)}\n"


def quantised(name: str, topology: str, tp: int, batch: int, length: int) -> str:
    """The section of QLoRA: bases of several qtypes, and which of them fit.

    Raises:
      AssertionError: the bfloat16 base fits, or none of the quantised ones does.
    """
    mesh, model = mesh_of(topology, tp), MODELS[name]
    own, chips = Setting(model, mesh, batch, length), mesh.devices.size
    most = HBM[topology.split(":")[0]]
    head = ["base", "arguments, GB a chip", "temporaries, GB a chip", "together", ""]
    rows, fits = [head], {}
    for qtype in (None, "int8", "nf4"):
        print(f"  {qtype or 'bfloat16'} …", end=" ", flush=True)
        cells, fits[qtype] = fitting(mesh, *own.lora(qtype), most)
        print(", ".join(cells), flush=True)
        rows.append([qtype or "bfloat16", *cells])
    assert not fits.pop(None), "the bfloat16 base fits"
    assert any(fits.values()), "no quantised base fits"
    title = (
        f"## QLoRA of Llama-3-{name.upper()}, {topology}: {chips} "
        f"chip{'s' * (chips > 1)}, fsdp {chips // tp} × tp {tp}, "
        f"{batch} × {length:,} tokens"
    )
    return f"{title}\n\n{tables.markdown(rows)}\n"


HEAD = f"""# Llama 3 on TPU pods, compiled without one

Made by `python benchmarks/tpu_aot.py`; what it counts and how is said there. LoRA of
rank {RANK} on all seven matrices of every layer. `floor` is the frozen forward pass
with the gradients of the activations, `merged` forms W + BA in the loss, `full` is
full fine-tuning. All is of one chip; in a program the body of the scan over layers
stands once, and is counted once. Of collectives: how many, and the bytes of their
results.

Weights are split over `fsdp` along one side and over `tp` along the other: wq, wk, wv,
gate and up along their outputs over `tp`, wo and down along their inputs. The factors
are split with them, so a step has these collectives of its own, all of the rank's size:

- x·a is a sum over `tp` where the inputs are split, for wo and down: forward, and again
  where a layer is recomputed, four in all;
- its gradient is a sum over `tp` where the outputs are split, for the other five;
- what of a factor is split over `fsdp` is gathered where it is used, as a weight is:
  those of q, k and v, and of gate and up, as one array;
- the gradients of a and b are sums over the batch, each where its factor is.

When one is done is told by the name of the operation that it is for. XLA leaves two
without a name, and one sum for a recomputed x·a under that of a gradient.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, help="one only")
    parser.add_argument("--topology", help="one only, such as v5p:4x4x8")
    parser.add_argument("--tp", type=int, default=8, help="with --topology")
    parser.add_argument("--batch", type=int, default=64, help="with --topology")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", choices=["lora", "qlora", "banks"])
    args = parser.parse_args()
    todo: dict[str, Any] = {
        "lora": (measure, RUNS),
        "qlora": (quantised, QUANTISED),
        "banks": (banks, [(*run, 1, EXAMPLES) for run in BANKS]),
    }
    for kind in [args.only] if args.only else todo:
        section_of, runs = todo[kind]
        runs = [r for r in runs if args.model in (None, r[0])]
        if args.topology:
            runs = [(args.model or "70b", args.topology, args.tp, args.batch)]
        for name, topology, tp, batch in runs:
            print(f"Llama-3-{name.upper()} on {topology}", flush=True)
            section = section_of(name, topology, tp, batch, args.length)
            section = f"{section.rstrip()}\n\nCompiled by jax {jax.__version__}.\n"
            print(section)
            tables.record(TABLES, HEAD, section)


if __name__ == "__main__":
    main()
