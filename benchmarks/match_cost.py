"""What `jlora.peft.match` costs: a checkpoint of a billion values, on one core.

    taskset -c 0 python benchmarks/match_cost.py [bfloat16 | float32] [layers]

Makes a Llama-like checkpoint on disk, lays it out for JAX in another process (q in the
order of interleaved rotary embeddings, k and v stacked, gate and up fused, all
transposed), and matches both.  Prints the time, and the memory beyond that of the
params, which are mapped from files and read.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jlora
import jlora.peft

D, HEADS, KV, HEAD, FFN, VOCABULARY = 2048, 32, 8, 64, 8192, 32000
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, D),
    "self_attn.k_proj": (KV * HEAD, D),
    "self_attn.v_proj": (KV * HEAD, D),
    "self_attn.o_proj": (D, HEADS * HEAD),
    "mlp.gate_proj": (FFN, D),
    "mlp.up_proj": (FFN, D),
    "mlp.down_proj": (D, FFN),
}


def make(folder, dtype, layers):
    """The checkpoint, and params as one file of numpy each."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    tensors, params = {"model.embed_tokens.weight": draw(VOCABULARY, D)}, {}
    params["embed/embedding"] = tensors["model.embed_tokens.weight"]
    for k in range(layers):
        w = {name: draw(*shape) for name, shape in SHAPES.items()}
        tensors |= {f"model.layers.{k}.{name}.weight": x for name, x in w.items()}
        q = w["self_attn.q_proj"].reshape(HEADS, 2, HEAD // 2, D).swapaxes(1, 2)
        params[f"{k}/q/kernel"] = q.reshape(-1, D).T.reshape(D, HEADS, HEAD)
        kv = [w[f"self_attn.{n}_proj"].T.reshape(D, KV, HEAD) for n in "kv"]
        params[f"{k}/kv/kernel"] = np.stack(kv)
        params[f"{k}/o/kernel"] = w["self_attn.o_proj"].T
        gate_up = [w[f"mlp.{n}_proj"] for n in ("gate", "up")]
        params[f"{k}/gate_up/kernel"] = np.concatenate(gate_up).T
        params[f"{k}/down/kernel"] = w["mlp.down_proj"].T
    save_file(tensors, folder / "model.safetensors")
    for path, x in params.items():
        bits = x.view(np.uint16) if x.dtype.itemsize == 2 else x
        name = path.replace("/", ".") + ".npy"
        np.save(folder / name, np.ascontiguousarray(bits))


class Memory(threading.Thread):
    """The most anonymous memory beyond that at the start, sampled every 2 ms.

    Pages of mapped files are not counted: they are the kernel's cache.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.most, self.on = self.now(), 0, True
        self.start()

    def now(self):
        text = pathlib.Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0])

    def run(self):
        while self.on:
            self.most = max(self.most, self.now())
            time.sleep(0.002)

    def stop(self):
        self.on = False
        self.join()
        return (self.most - self.before) * 1.024


def measure(folder, dtype):
    params, specs, shapes = {}, {}, {}
    axes = {"q": "ioo", "kv": "bioo"}
    for file in sorted(folder.glob("*.npy")):
        path = file.name.removesuffix(".npy").replace(".", "/")
        x = np.load(file, mmap_mode="r").view(dtype)
        params[path], shapes[path] = x, x.shape
        kind = "embed" if path.startswith("embed") else "dense"
        specs[path] = jlora.Spec.of(kind, axes.get(path.split("/")[-2], "io"))
    plan = jlora.Plan(specs, shapes)
    n = sum(x.size for x in params.values())
    largest = max(x.nbytes for x in params.values())
    memory = Memory()
    start, cpu = time.monotonic(), time.process_time()
    names = jlora.peft.match(params, folder / "model.safetensors", plan=plan)
    took, cpu = time.monotonic() - start, time.process_time() - cpu
    extra = memory.stop()
    assert not names.missing and len(names) == len(params), names
    print(
        f"RESULT values={n / 1e9:.2f}e9 dtype={jnp.dtype(dtype)} seconds={took:.1f} "
        f"cpu={cpu:.1f} extra_mb={extra / 1e3:.0f} largest_mb={largest / 1e6:.0f}"
    )
    assert took < 60 and extra * 1e3 < 1.2 * largest


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dtype", nargs="?", default="bfloat16")
    parser.add_argument("layers", nargs="?", type=int, default=16)
    parser.add_argument("--folder", type=pathlib.Path)
    args = parser.parse_args()
    dtype = jnp.dtype(args.dtype)
    if args.folder:
        measure(args.folder, dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        make(pathlib.Path(name), dtype, args.layers)
        again = [sys.executable, __file__, args.dtype, "--folder", name]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
