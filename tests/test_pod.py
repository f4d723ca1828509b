"""Several processes: the example of a pod, its checkpoints on other meshes, its faults.

`JLORA_KILLS` says how often a run is killed (CI: few; `make faults`: 50).
"""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "pod" / "train.py"
KILLS = int(os.environ.get("JLORA_KILLS", "4"))
SMALL = ["--steps", "8", "--every", "2", "--length", "32"]


def start(out, *options, cache, local="1x1"):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path]),
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--local", local, "--out", str(out), *SMALL, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of its processes can be killed at once
    )


def finish(process, limit=300):
    """The output of a run that ends well."""
    text, _ = process.communicate(timeout=limit)
    assert process.returncode == 0, text[-3000:]
    return text


def losses(out):
    """Step to the set of losses that were recorded for it."""
    found = {}
    path = out / "losses.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}"):  # or the process was killed while it wrote it
            entry = json.loads(line)
            found.setdefault(entry["step"], set()).add(entry["loss"])
    return found


def arrays(out, step=8):
    """The adapter that a run saved."""
    import llama

    params = jax.eval_shape(lambda: llama.Llama().init(jax.random.key(0)))
    return jlora.adapter(jlora.checkpoint.restore(out / f"step_{step}", params))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("pod") / "run"
    text = finish(start(out, cache=cache))
    assert "RESULT loss=" in text
    assert sorted(losses(out)) == list(range(8))
    return out


# ---------------------------------------------------------------- meshes, processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("pod") / "two"
    text = finish(start(out, "--steps", "6", cache=cache, local="2x4"))
    assert "2 processes, 8 devices, mesh {'fsdp': 2, 'tp': 4}" in text
    return out


def test_two_processes_train_as_one_does(undisturbed, two_processes):
    one, two = losses(undisturbed), losses(two_processes)
    for step in range(6):
        (a,), (b,) = one[step], two[step]
        np.testing.assert_allclose(b, a, rtol=2e-5)
    assert one[5] < one[0] or min(one[5]) < min(one[0])
    mine, theirs = arrays(undisturbed, 6), arrays(two_processes, 6)
    for path, leaf in mine.items():
        np.testing.assert_allclose(theirs[path].a, leaf.a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8, 1), (1, 1)])
def test_what_two_processes_saved_is_restored_on_any_mesh(two_processes, shape):
    import llama

    model, here = llama.Llama(), arrays(two_processes, 6)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    specs = jax.tree.map(lambda s: NamedSharding(mesh, s), model.specs())
    params = jax.device_put(model.init(jax.random.key(0)), specs)
    tree = jlora.checkpoint.restore(two_processes / "step_6", params)
    want = jlora.shardings(tree, specs)
    for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    same(jax.device_get(jlora.adapter(tree)), here)


def test_a_run_goes_on_with_other_processes(undisturbed, tmp_path, cache):
    """Saved by one process on one device, gone on with by two on eight; and back."""
    out = tmp_path / "run"
    finish(start(out, "--steps", "4", cache=cache))
    text = finish(start(out, "--steps", "6", cache=cache, local="2x4"))
    assert "goes on from step 4" in text
    text = finish(start(out, cache=cache))
    assert "goes on from step 6" in text
    want = losses(undisturbed)
    # The schedule of the learning rate knows the number of steps, so these three runs
    # are another training than the undisturbed one; its first steps are the same.
    assert losses(out)[0] == want[0]
    assert sorted(losses(out)) == list(range(8))
