"""Files from strangers: whatever is in them, only the library's own errors come out.

``JLORA_MUTANTS`` is the number of mutated files (2,000; the issue's 20,000 take about a
minute).  Each is read under an audit hook that sees every file that is opened, and with
every allocation of Python and numpy counted.
"""

import json
import os
import random
import sys
import time
import tracemalloc

import numpy as np
import peft_torch
import pytest
from safetensors.numpy import save_file

import jlora.peft
from jlora.peft import files, modules
from jlora.peft.names import Names

MUTANTS = int(os.environ.get("JLORA_MUTANTS", 2_000))
OWN = jlora.peft.FormatError, FileNotFoundError
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

HOSTILE = [
    None, True, -1, 0, 1 << 40, 1 << 70, -(1 << 63), 1e308, float("nan"), 1e999,
    "", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "(a+)+$", "\ud83d\ude00", ".*",
    [], [[]], [1, "x"], {}, {"x": {}}, {"x": -1}, [None] * 50, "F64", "I8", "BF16",
]  # fmt: skip


def mutated(rng, x, depth=0):
    """A JSON value of which some part is another one."""
    if depth > 3 or rng.random() < 0.25 or not isinstance(x, (dict, list)) or not x:
        return rng.choice(HOSTILE)
    if isinstance(x, list):
        k = rng.randrange(len(x))
        return [*x[:k], mutated(rng, x[k], depth + 1), *x[k + 1 :]]
    out, key = dict(x), rng.choice([*x])
    if rng.random() < 0.2:
        out.pop(key)
    elif rng.random() < 0.2:
        out[str(rng.choice(HOSTILE))] = out.pop(key)
    else:
        out[key] = mutated(rng, out[key], depth + 1)
    return out


def flipped(rng, data):
    """Bytes of which some are others, or that end too early or too late."""
    data = bytearray(data)
    if rng.random() < 0.2:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if rng.random() < 0.1:
        return bytes(data) + bytes(rng.randrange(1, 30))
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def safetensors_mutant(rng, data):
    """A safetensors file with another header, whose size may be right or wrong."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        at = 8 + size
        return flipped(rng, data[:at]) + data[at:]
    header = mutated(rng, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = b"[" * rng.randrange(1, 100_000) + text
    n = len(text) if rng.random() < 0.8 else rng.choice([0, 1, 1 << 31, (1 << 64) - 1])
    return n.to_bytes(8, "little") + text + data[8 + size :]


def json_mutant(rng, data):
    if rng.random() < 0.3:
        return flipped(rng, data)
    if rng.random() < 0.05:
        return b'{"a":' * rng.randrange(1, 50_000)
    said = json.loads(data)
    for _ in range(rng.randrange(1, 4)):
        new = mutated(rng, said)
        said = new if isinstance(new, dict) else said
    return json.dumps(said).encode("utf-8", "surrogatepass")


class Opened:
    """The files that are opened while it is on."""

    def __init__(self):
        self.paths, self.on = [], False
        sys.addaudithook(self._seen)

    def _seen(self, event, args):
        if self.on and event == "open" and isinstance(args[0], (str, bytes)):
            self.paths.append(os.fsdecode(args[0]))


OPENED = Opened()


def survives(fn, folder, size):
    """fn() ends with a result or an error of the library's own, quickly and small."""
    OPENED.paths.clear()
    tracemalloc.start(1)
    start, OPENED.on = time.monotonic(), True
    try:
        fn()
        outcome = "read"
    except OWN as e:
        assert str(e), type(e)
        outcome = "refused"
    finally:
        OPENED.on = False
        took, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert took < 1, took
    # What is parsed as JSON is larger than its text, by a factor that does not grow.
    assert peak < 64 * size + (1 << 20), (peak, size)
    for path in OPENED.paths:
        real = os.path.realpath(path)
        assert real.startswith(str(folder)), f"it opened {real}"
    return outcome


def base_folder(where):
    """A base in two shards, with its index."""
    where.mkdir()
    shards = {"a.safetensors": ["x", "y"], "b.safetensors": ["z"]}
    for name, tensors in shards.items():
        save_file({t: np.ones((3, 4), np.float32) for t in tensors}, where / name)
    weight_map = {t: name for name, tensors in shards.items() for t in tensors}
    index = {"metadata": {"total_size": 144}, "weight_map": weight_map}
    (where / files.INDEX).write_text(json.dumps(index))


def targets(folder):
    """(file to mutate, how, what reads it), for each kind of file."""
    adapter, base, names = (folder / n for n in ("adapter", "base", "names.json"))
    source = peft_torch.FIXTURES / "llama" / "patterns"
    adapter.mkdir()
    for name in (WEIGHTS, CONFIG):
        (adapter / name).write_bytes((source / name).read_bytes())
    base_folder(base)
    model = peft_torch.FIXTURES / "convolutions" / "model.safetensors"
    params = {"head": {"kernel": files.tensors(model).read("head.weight").T}}
    jlora.peft.match(params, model).save(names)

    def read():
        modules.read(adapter)
        jlora.peft.check(adapter, "vllm")
        jlora.peft.check(adapter, "tensorrt-llm")

    def read_base():
        found = files.tensors(base)
        return [found.read(t) for t in found if found.is_float(t)]

    return [
        (adapter / WEIGHTS, safetensors_mutant, read),
        (adapter / CONFIG, json_mutant, read),
        (base / files.INDEX, json_mutant, read_base),
        (base / "a.safetensors", safetensors_mutant, read_base),
        (names, json_mutant, lambda: str(Names.load(names))),
    ]


@pytest.mark.parametrize("kind", range(5))
def test_mutants(kind, tmp_path):
    path, mutate, read = targets(tmp_path)[kind]
    rng, data = random.Random(kind), path.read_bytes()
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    read()  # what is imported or cached at first use is no part of a reading
    seen = {"read": 0, "refused": 0}
    for _ in range(MUTANTS // 5):
        new = mutate(rng, data)
        path.write_bytes(new)
        seen[survives(read, tmp_path, size + len(new))] += 1
    assert seen["refused"] > MUTANTS / 5 / 20, seen


def test_no_path_leads_out(tmp_path):
    """By name, by a link, or by a link to a folder."""
    secret = tmp_path / "secret.safetensors"
    save_file({"s": np.ones(3, np.float32)}, secret)
    base = tmp_path / "base"
    base_folder(base)
    (base / "link.safetensors").symlink_to(secret)
    (base / "folder").symlink_to(tmp_path)
    for name in (
        "../secret.safetensors",
        str(secret),
        "link.safetensors",
        "folder/secret.safetensors",
        "a/../../secret.safetensors",
        "",
        "a\0",
        ".",
    ):
        index = {"weight_map": {"s": name}}
        (base / files.INDEX).write_text(json.dumps(index))
        with pytest.raises(OWN):
            files.tensors(base)
    (base / files.INDEX).unlink()
    with pytest.raises(jlora.peft.FormatError, match="leads out of the directory"):
        files.tensors(base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    source = peft_torch.FIXTURES / "llama" / "all"
    (adapter / CONFIG).symlink_to(source / CONFIG)
    (adapter / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    with pytest.raises(jlora.peft.FormatError, match="leads out of the directory"):
        modules.read(adapter)


def test_the_cache_of_the_hub_is_read(tmp_path):
    """Its snapshots are links to the blobs of the same repository."""
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    source = peft_torch.FIXTURES / "llama" / "all"
    for k, name in enumerate((WEIGHTS, CONFIG)):
        (repo / "blobs" / str(k)).write_bytes((source / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{k}")
    assert len(modules.read(snapshot).modules) == 21
    (snapshot / CONFIG).unlink()
    other = tmp_path / "other.json"
    other.write_text("{}")
    (snapshot / CONFIG).symlink_to(other)
    with pytest.raises(jlora.peft.FormatError, match="leads out"):
        modules.read(snapshot)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="Pickles"):
        files.tensors(tmp_path)
    with pytest.raises(jlora.peft.FormatError, match="Pickles"):
        files.tensors(tmp_path / "pytorch_model.bin")


PATTERNS = [
    "(a+)+$",
    "(a|a)*$",
    "(a|aa){2,}b",
    ".*.*.*.*b",
    r"(.*)\1\1b",
    ".*a.*ab",
    r"\w+\w+b",
    "[a-z]*[a-z]*x",
    "a?" * 400 + "b",
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda x: x[:12])
def test_no_pattern_takes_for_ever(pattern, tmp_path):
    """Each is slow for some name; the file has that name."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    source = peft_torch.FIXTURES / "llama" / "all"
    said = json.loads((source / CONFIG).read_text())
    said |= {"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 6}}
    (adapter / CONFIG).write_text(json.dumps(said))
    own = {}
    for k in range(20):
        name = "base_model.model." + "a" * (200 + k)
        own[f"{name}.lora_A.weight"] = np.ones((4, 3), np.float32)
        own[f"{name}.lora_B.weight"] = np.ones((5, 4), np.float32)
    save_file(own, adapter / WEIGHTS)
    size = (adapter / WEIGHTS).stat().st_size
    survives(lambda: modules.read(adapter), tmp_path, size)
