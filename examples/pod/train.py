"""LoRA training of a Llama under FSDP and tensor parallelism, on one chip or a pod.

    python examples/pod/train.py --local 2x4     # 2 processes of 4 virtual devices here
    python examples/pod/train.py                 # all devices of this process
    python examples/pod/train.py --pod           # the same on every host of a TPU pod

The weights are sharded over a mesh of "fsdp" × "tp" devices, the adapters with them.
Every --every steps the adapter, the optimizer's state and the step are saved; a run
that finds a checkpoint in --out goes on from the last whole one, on any mesh and with
any number of processes, to the losses that it would have had.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", metavar="PxD", help="P processes of D CPU devices")
    where.add_argument(
        "--pod", action="store_true", help="one process of several hosts"
    )
    parser.add_argument("--tp", type=int, help="devices that share a matrix (up to 4)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=64, help="bytes of a sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--every", type=int, default=5, help="steps between checkpoints"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/pod"))
    parser.add_argument(
        "--fresh", action="store_true", help="forget checkpoints in --out"
    )
    parser.add_argument("--process", help=argparse.SUPPRESS)  # of --local: i/n@address
    args = parser.parse_args(argv)
    if args.local and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.local):
        parser.error(f"--local {args.local}: expected processes x devices, such as 2x4")
    for name in ("tp", "steps", "batch", "length", "rank", "every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: expected a directory, found a file")
    return args


# ------------------------------------------------------------------------- processes


def launch(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs this script as P processes; if one of them dies, the others are stopped."""
    processes, devices = map(int, args.local.split("x"))
    if args.fresh:
        forget(args.out)
        argv = [a for a in argv if a != "--fresh"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    children = [
        subprocess.Popen(
            [sys.executable, str(HERE), *argv, f"--process={i}/{processes}@{address}"],
            env=environment,
        )
        for i in range(processes)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the others with it
    try:
        while True:
            codes = [child.poll() for child in children]
            if all(code == 0 for code in codes):
                return 0
            dead = [i for i, code in enumerate(codes) if code]
            if dead:
                names = ", ".join(f"{i} (exit {codes[i]})" for i in dead)
                print(f"process {names} ended: the others are stopped", file=sys.stderr)
                return 1
            time.sleep(0.1)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


def join(args: argparse.Namespace) -> None:
    """Connects this process with the others, if there are any."""
    import jax

    if args.process:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        at, address = args.process.split("@")
        index, count = map(int, at.split("/"))
        if count > 1:
            jax.distributed.initialize(
                address, count, index, heartbeat_timeout_seconds=10
            )
    elif args.pod:
        jax.distributed.initialize()  # of a TPU pod it finds the others itself


def end_with(parent: int) -> None:
    """Ends this process when its launcher is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


# -------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> list[float]:
    """Trains to the last step; returns the losses of the steps since it (re)started."""
    import jax
    import jax.numpy as jnp
    import llama
    import numpy as np
    import optax
    from jax.experimental.multihost_utils import sync_global_devices
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from tqdm import tqdm

    import jlora
    import jlora.checkpoint

    devices = jax.device_count()
    tp = args.tp or next(n for n in (4, 2, 1) if devices % n == 0)
    if tp not in (1, 2, 4) or devices % tp:
        sys.exit(f"--tp {tp}: expected 1, 2 or 4, and a divisor of {devices} devices")
    if args.batch % (devices // tp) or 64 % (devices // tp):
        sys.exit(
            f"{devices // tp} devices along fsdp: expected a divisor of 64 (the width) "
            f"and of --batch {args.batch}"
        )
    shape, auto = (devices // tp, tp), (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=auto)
    first = jax.process_index() == 0

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    def placed(specs):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    model, text = llama.Llama(), corpus()
    # The base, each device's part made on that device. A pretrained one is read so:
    # every reader of weights that takes shardings (Orbax among them) will do.
    params = jax.jit(model.init, out_shardings=placed(model.specs()))(jax.random.key(0))
    ids = jax.ShapeDtypeStruct((args.batch, args.length + 1), jnp.int32)
    plan = jlora.plan(model.loss, params, ids, rank=args.rank, targets=llama.TARGETS)
    trainable, frozen = jlora.partition(jlora.wrap(params, plan=plan))
    tx = optax.adamw(optax.linear_schedule(0, 1e-2, 5))  # of any number of steps
    # The moments live where the adapters do, counts everywhere.
    whole = NamedSharding(mesh, P())
    moments = optax.tree_utils.tree_map_params(
        tx,
        lambda _, x: x.sharding,
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda _: whole,
    )
    opt_state = jax.jit(tx.init, out_shardings=moments)(trainable)
    loss = jlora.lift(model.loss)

    def update(trainable, opt_state, frozen, ids):
        value, grads = jax.value_and_grad(
            lambda t: loss(jlora.combine(t, frozen), ids)
        )(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    out = jax.tree.map(lambda x: x.sharding, trainable), moments, whole
    step = jax.jit(update, donate_argnums=(0, 1), out_shardings=out)

    def batch(i: int) -> jax.Array:
        """The batch of a step: a process reads what its own devices need of it."""
        starts = np.random.default_rng(i).integers(
            0, len(text) - args.length - 1, args.batch
        )

        def rows(index):
            return np.stack([text[s : s + args.length + 1] for s in starts[index[0]]])

        return jax.make_array_from_callback(
            ids.shape, NamedSharding(mesh, P("fsdp")), rows
        )

    done, damaged = 0, []
    for at in sorted(checkpoints(args.out), reverse=True):
        like, path = {"opt_state": opt_state, "step": 0}, args.out / f"step_{at}"
        try:
            tree, extra = jlora.checkpoint.restore(path, params, extra=like)
        except jlora.checkpoint.DamagedError as e:
            say(f"{e}\nGoing on from the one before.")
            damaged.append(path)
            continue
        except ValueError as e:  # of another run
            sys.exit(f"{e}\nFor another run give another --out, or --fresh.")
        trainable, frozen = jlora.partition(tree)
        opt_state, done = extra["opt_state"], extra["step"]
        say(f"goes on from step {done}")
        break
    sync_global_devices(f"all have read what there is, up to step {done}")
    for path in damaged if first else ():
        path.rename(path.with_name(f"damaged_{path.name}_{time.time_ns()}"))
    trains, total = jlora.count(jlora.combine(trainable, frozen))
    say(
        f"{jax.process_count()} processes, {devices} devices, mesh {dict(mesh.shape)}; "
        f"{trains:,} of {total:,} parameters train"
    )
    losses, saving = [], None
    with jax.set_mesh(mesh):
        bar = tqdm(
            range(done, args.steps), initial=done, total=args.steps, disable=not first
        )
        for i in bar:
            trainable, opt_state, value = step(trainable, opt_state, frozen, batch(i))
            losses.append(float(value))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            record(args.out, i, losses[-1], first)
            if (i + 1) % args.every == 0 or i + 1 == args.steps:
                if saving:
                    saving.wait()
                saving = jlora.checkpoint.save(
                    args.out / f"step_{i + 1}",
                    jlora.combine(trainable, frozen),
                    extra={"opt_state": opt_state, "step": i + 1},
                    block=False,
                )
    if saving:
        saving.wait()
    if done >= args.steps:
        say(f"step {done} is the last or beyond: nothing left to train")
    return losses


def corpus():
    """Bytes to learn: the project's own documents."""
    import numpy as np

    root = HERE.parents[2]
    names = "README.md", "CONTRIBUTING.md", "LICENSE"
    text = b"".join((root / name).read_bytes() for name in names)
    return np.frombuffer(text, np.uint8).astype(np.int32)


def checkpoints(out: pathlib.Path) -> list[int]:
    """The steps of which there are checkpoints."""
    found = (path.name.removeprefix("step_") for path in out.glob("step_*"))
    return [int(name) for name in found if name.isdigit()]


def forget(out: pathlib.Path) -> None:
    """Removes a run's checkpoints and losses, and nothing else."""
    for path in out.glob("step_*"):
        shutil.rmtree(path, ignore_errors=True)
    (out / "losses.jsonl").unlink(missing_ok=True)


def record(out: pathlib.Path, step: int, loss: float, first: bool) -> None:
    """One line a step, of its number and the very bits of its loss."""
    if first:
        with (out / "losses.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def main() -> None:
    args = parse()
    if args.local and not args.process:
        sys.exit(launch(args, sys.argv[1:]))
    join(args)
    if args.fresh:
        forget(args.out)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    losses = train(args)
    if losses and (not args.process or args.process.startswith("0/")):
        print(f"RESULT loss={losses[-1]:.6f}")


if __name__ == "__main__":
    main()
