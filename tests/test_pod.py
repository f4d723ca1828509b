"""Several processes: the example of a pod, its checkpoints on other meshes, its faults.

`JLORA_KILLS` says how often a run is killed (CI: few; `make faults`: 50).
"""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import randomise, same
from jax.sharding import AxisType, NamedSharding

import jlora
import jlora.checkpoint

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "pod" / "train.py"
KILLS = int(os.environ.get("JLORA_KILLS", "4"))
# Which of two processes are killed while they save, one attempt after another.
VICTIMS = [[1]] if KILLS < 50 else [[1], [0], [0, 1]]
SMALL = ["--steps", "8", "--every", "2", "--length", "32"]


def start(out, *options, cache, local="1x1", prefix=()):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path]),
    }
    if not local.startswith("2"):
        # Of two processes JAX 0.10 may wait for ever while one reads a program from the
        # cache that the other one runs already (in deserialize_executable, on CPU).
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return popen(
        [
            *(*prefix, sys.executable, str(SCRIPT), "--local", local),
            *("--out", str(out), *SMALL, *options),
        ],
        environment,
    )


STARTED: list[subprocess.Popen] = []


def popen(command, environment):
    process = subprocess.Popen(
        command,
        env=environment | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of its processes can be killed at once
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def leaves_no_process_behind():
    yield
    while STARTED:
        kill(STARTED[-1])


def kill(process):
    """Kills a run with all of its processes, at once and without a word."""
    STARTED.remove(process)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.stdout.close()


def ended(process, limit=300):
    """The output and exit status of a run."""
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for one in STARTED:  # each says where it waits
            one.send_signal(signal.SIGABRT)
        said = [one.communicate()[0][-5000:] for one in STARTED]
        pytest.fail("\n\n".join([f"it has not ended in {limit} s:", *said]))
    return text, process.returncode


def finish(process):
    """The output of a run that ends well."""
    text, code = ended(process)
    assert code == 0, text[-3000:]
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


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A directory of all of xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def cache(shared):
    return shared / "compiled"


@pytest.fixture(scope="session")
def undisturbed(shared, cache):
    """What a run left that nobody disturbed; the first worker that asks makes it."""
    out = shared / "undisturbed"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if 8 not in steps(out):
            text = finish(start(out, cache=cache))
            assert "RESULT loss=" in text
    assert sorted(losses(out)) == list(range(8))
    return out


# ---------------------------------------------------------------- meshes, processes


def test_two_processes(undisturbed, tmp_path, cache):
    """They train as one does; some die while they save; the saved knows no mesh."""
    out = tmp_path / "run"
    options = "--steps", "6", "--every", "1"
    for n, victims in enumerate(VICTIMS):
        process = start(out, *options, cache=cache, local="2x4")
        limit, left = time.monotonic() + 200, unfinished(out)  # by those killed before
        while not (unfinished(out) - left and steps(out)) and time.monotonic() < limit:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        children = child_pids(process.pid)
        for i in victims:
            os.kill(children[i], signal.SIGKILL)
        text, code = ended(process)
        assert "2 processes, 8 devices, mesh {'fsdp': 2, 'tp': 4}" in text
        assert code == 1 and "ended: the others are stopped" in text
        assert all(f"{i} (exit -9)" in text for i in victims)
        assert ("goes on from step" in text) == (n > 0)
        assert 6 not in steps(out)

    text = finish(start(out, *options, cache=cache, local="2x4"))
    assert "goes on from step" in text
    check_close(undisturbed, out, 6)

    import llama

    model, here = llama.Llama(), arrays(out, 6)
    base = jax.jit(model.init)(jax.random.key(0))
    for shape in [(2, 4), (4, 2), (8, 1), (1, 1)]:
        devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        auto = (AxisType.Auto,) * 2
        mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"), axis_types=auto)
        specs = jax.tree.map(functools.partial(NamedSharding, mesh), model.specs())
        params = jax.device_put(base, specs)
        tree = jlora.checkpoint.restore(out / "step_6", params)
        want = jlora.shardings(tree, specs)
        for x, place in zip(jax.tree.leaves(tree), jax.tree.leaves(want), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
        same(jax.device_get(jlora.adapter(tree)), here)

    assert "goes on from step 6" in finish(start(out, cache=cache))  # one, on one
    check_close(undisturbed, out, 8)


# Restores on two processes what one saved, the first that is whole for both of them;
# each compares its own parts.
RESTORE = """
import sys, numpy as np, jax, llama, jlora, jlora.checkpoint
from jax.sharding import AxisType, NamedSharding

index, address, wanted, *saved = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, 2, index)
mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
model = llama.Llama()
specs = jax.tree.map(lambda s: NamedSharding(mesh, s), model.specs())
params = jax.jit(model.init, out_shardings=specs)(jax.random.key(0))
for path in saved:
    try:
        tree, extra = jlora.checkpoint.restore(path, params, extra={"step": 0})
        break
    except jlora.checkpoint.DamagedError as e:
        print("DAMAGED", e)
assert extra == {"step": 3}
found, parts = jax.tree.leaves(jlora.adapter(tree)), 0
with np.load(wanted) as file:
    for x, want in zip(found, [file[name] for name in file.files], strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[shard.index])
            parts += shard.data.size < x.size
print(len(found), "arrays are the same,", parts, "parts of them")
"""


def test_eight_devices_of_one_process_to_two_processes(tmp_path):
    import llama

    model = llama.Llama()
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    specs = jax.tree.map(functools.partial(NamedSharding, mesh), model.specs())
    params = jax.jit(model.init, out_shardings=specs)(jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    plan = jlora.plan(model.loss, params, ids, rank=4, targets=llama.TARGETS)
    tree = randomise(jlora.wrap(params, plan=plan))
    tree = jax.device_put(tree, jlora.shardings(tree, specs))
    jlora.checkpoint.save(tmp_path / "saved", tree, extra={"step": 3})

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    leaves = jax.tree.leaves(jax.device_get(jlora.adapter(tree)))
    np.savez(tmp_path / "wanted.npz", *leaves)
    # What the second process reads at first is damaged, in two ways.
    seen = [["copy", "copy", "saved"], ["no-data", "no-document", "saved"]]
    for name in {*seen[0], *seen[1]} - {"saved"}:
        shutil.copytree(tmp_path / "saved", tmp_path / name)
    for path in (tmp_path / "no-data").glob("adapter/**/d/*"):
        path.write_bytes(bytes(b ^ 255 for b in path.read_bytes()))
    shutil.rmtree(tmp_path / "no-document" / "document")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
    }
    both = [
        popen(
            [
                *(sys.executable, "-c", RESTORE, str(i), address),
                *(str(tmp_path / name) for name in ("wanted.npz", *seen[i])),
            ],
            environment,
        )
        for i in range(2)
    ]
    for i, process in enumerate(both):
        text = finish(process)
        found = re.findall(r"DAMAGED .*/(\S+) is no whole adapter checkpoint", text)
        assert found == seen[i][:2]
        assert text.count("process 1 says so") == (0 if i else 2)
        said = re.search(r"(\d+) arrays are the same, (\d+) parts", text)
        assert int(said[1]) == len(leaves) and int(said[2]) > 0


def check_close(undisturbed, out, last):
    """Losses and adapter are those of one device, but for the order of sums."""
    one, other = losses(undisturbed), losses(out)
    assert sorted(other) == list(range(last))
    for step, found in other.items():
        for loss in found:
            np.testing.assert_allclose(loss, min(one[step]), rtol=2e-5)
    mine, theirs = arrays(undisturbed, last), arrays(out, last)
    for path, leaf in mine.items():
        np.testing.assert_allclose(theirs[path].b, leaf.b, rtol=1e-2, atol=1e-4)
    assert min(one[7]) < min(one[0]) - 0.1


def child_pids(pid):
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()]


# ---------------------------------------------------------------------------- faults


def unfinished(out):
    """The saves under way, by when they last changed: Orbax writes beside the name.

    What a killed one left stays as it was.
    """
    found = set()
    for path in out.glob("step_*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # just renamed
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def test_a_run_killed_at_random_moments_goes_on_as_if_it_had_not_been(
    undisturbed, tmp_path, cache, capsys
):
    """Half of the kills wait until a checkpoint is being written."""
    rng, out = random.Random(0), tmp_path / "run"
    kills, while_saving, ended = 0, 0, 0
    while kills < KILLS:
        if 8 in steps(out):  # a run ended before it was struck: again from the start
            check_same(undisturbed, out)
            ended += 1
            out = tmp_path / f"run_{ended}"
        before, wants_save = len(losses(out)), kills % 2
        left = unfinished(out)
        process = start(out, cache=cache)
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            if unfinished(out) - left if wants_save else len(losses(out)) > before:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if wants_save else 0.2))
        struck = process.poll() is None
        kills += struck
        while_saving += struck and bool(unfinished(out) - left)
        kill(process)
        assert struck or process.returncode == 0
    text = finish(start(out, cache=cache))
    check_same(undisturbed, out)
    with capsys.disabled():
        print(
            f"\n{kills} kills, {while_saving} of them while saving, {ended + 1} runs "
            "to the end: every loss and the adapter as in the undisturbed run"
        )
    assert "Traceback" not in text
    assert while_saving > kills / 5


def steps(out):
    names = (path.name.removeprefix("step_") for path in out.glob("step_*"))
    return {int(name) for name in names if name.isdigit()}


def check_same(undisturbed, out):
    """Every loss that was ever recorded, and what came of it, to the bit."""
    assert losses(out) == losses(undisturbed)
    same(arrays(out), arrays(undisturbed))


def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, cache):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for path in (out / "step_8").glob("adapter/**/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    text = finish(start(out, cache=cache))
    assert "is no whole adapter checkpoint" in text
    assert "Going on from the one before." in text and "goes on from step 6" in text


def flip_a_bit(folder, rng):
    """Flips a bit of the adapter's data, anywhere in it; returns where."""
    files = sorted(p for p in folder.glob("adapter/**/d/*") if p.is_file())
    path = rng.choices(files, [p.stat().st_size for p in files])[0]
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path} at byte {at}"


def test_any_flipped_bit_is_found_or_harmless(undisturbed, tmp_path, capsys):
    want, found, n = arrays(undisturbed), 0, 50
    for i in range(n):
        folder = tmp_path / f"{i}" / "step_8"
        shutil.copytree(undisturbed / "step_8", folder)
        flip_a_bit(folder, random.Random(i))
        try:
            same(arrays(folder.parent), want)
        except ValueError as e:
            assert "no whole adapter checkpoint" in str(e)
            found += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{found} of {n} flipped bits found, the others changed nothing")
    # Some bytes in a hundred are in nodes that nothing reads once Orbax has merged what
    # its processes wrote: flips there change nothing, as is checked above.
    assert found > 0.8 * n


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(
    undisturbed, tmp_path, cache
):
    """No file may grow beyond some kB: a write fails as it does on a full disk."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "step_8")
    limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "--"]
    text, code = ended(start(out, cache=cache, prefix=limited))
    assert code == 1 and re.search("File too large|EFBIG", text), text[-2000:]
    assert steps(out) == {2, 4, 6}
    assert "goes on from step 6" in finish(start(out, cache=cache))
    check_same(undisturbed, out)


def test_a_launcher_that_is_killed_takes_its_processes_along(tmp_path, cache):
    process = start(tmp_path, "--steps", "4000", cache=cache)
    limit = time.monotonic() + 120
    while not losses(tmp_path) and time.monotonic() < limit:
        time.sleep(0.01)
    (child,) = child_pids(process.pid)
    process.kill()
    process.wait()
    while not gone(child) and time.monotonic() < limit:
        time.sleep(0.01)
    assert gone(child)


def gone(pid):
    """Whether a process has ended, also if nobody has asked how."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--local", "2"], "--local 2: expected processes x devices"),
        (["--local", "0x4"], "--local 0x4: expected"),
        (["--every", "0"], "--every 0: expected 1 or more"),
        (["--out", __file__], "expected a directory, found a file"),
    ],
)
def test_options_that_cannot_be(options, message, capsys, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import train

    with pytest.raises(SystemExit):
        train.parse(options)
    assert message in capsys.readouterr().err


def test_checkpoints_of_another_run_are_no_damaged_ones(undisturbed, tmp_path, cache):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    text, code = ended(start(out, "--rank", "2", cache=cache))
    assert code == 1 and "give another --out, or --fresh" in text
    assert steps(out) == {2, 4, 6, 8}


def test_a_directory_that_cannot_be_written(tmp_path):
    """Of sysfs, since for root a directory without permissions is none."""
    tree = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
    with pytest.raises(OSError, match="/sys/jlora"):
        jlora.checkpoint.save("/sys/jlora/adapter", tree)
