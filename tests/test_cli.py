"""The command line: what each command prints and writes, and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import peft_torch
import pytest
from helpers import close, normal, randomise
from safetensors.numpy import load_file, save_file
from test_peft_cases import WEIGHTS
from test_peft_files import known, same

import jlora
import jlora.checkpoint
import jlora.peft
from jlora.__main__ import main

LLAMA = peft_torch.FIXTURES / "llama"
BASE = LLAMA / "model.safetensors"


def run(*args, code=0):
    """Runs a command; its exit code has to be this one."""
    assert main([str(x) for x in args]) == code


def wrong(capsys, *args, code=2):
    """The one sentence that a command ends with."""
    run(*args, code=code)
    text = capsys.readouterr().err
    assert "Traceback" not in text and text.startswith("jlora"), text
    return text


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of an adapter, and the names of its model."""
    params, args, plan, names = known("llama", "gemma")
    tree = jlora.peft.load(LLAMA / "all", params, names=names)
    jlora.checkpoint.save(tmp_path / "orbax", tree)
    names.save(tmp_path / "names.json")
    return params, tree, tmp_path


def test_inspect(capsys, saved):
    _, tree, where = saved
    run("inspect", LLAMA / "patterns")
    text = capsys.readouterr().out
    assert "21 weights, 2,400 parameters" in text
    assert "model.layers.1.mlp.up_proj.weight" in text
    for place in (LLAMA / "all", where / "orbax"):
        run("inspect", place, "--json")
        said = json.loads(capsys.readouterr().out)
        own = {row["path"]: row for row in said["weights"]}
        key = "layers/attention/o/kernel"
        assert (key in own) == (said["format"] == "orbax")
        if key in own:
            leaf = jlora.adapter(tree)[key]
            norm = np.sqrt(sum((x**2).sum() for x in jlora.spectrum({key: leaf})[key]))
            assert abs(own[key]["norm"] - norm) < 1e-5 * norm
            assert own[key]["rank"] == leaf.rank and own[key]["alpha"] == 6
    run("inspect", LLAMA / "all", "--png", where / "s.png")
    assert (where / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_convert_there_and_back(saved, capsys):
    params, tree, where = saved
    names = ("--names", where / "names.json")
    run("convert", where / "orbax", where / "peft", "--to", "peft", *names)
    same(jlora.peft.load(where / "peft", params), tree)
    run("convert", where / "peft", where / "again", "--to", "orbax")
    same(jlora.checkpoint.restore(where / "again", params), tree)
    run("convert", where / "orbax", where / "p", "--to", "peft", "--portable", *names)
    assert jlora.peft.check(where / "p", "sglang").ok
    out = where / "l.safetensors"
    run("convert", where / "peft", out, "--to", "loralib")
    file, old = load_file(out), load_file(where / "peft" / WEIGHTS)
    key = "model.layers.0.mlp.up_proj"
    np.testing.assert_array_equal(
        file[f"{key}.lora_A"], old[f"base_model.model.{key}.lora_A.weight"]
    )
    np.testing.assert_allclose(
        file[f"{key}.lora_B"],
        old[f"base_model.model.{key}.lora_B.weight"] * 1.5,
        rtol=1e-6,
    )
    run("inspect", out)
    assert "21 weights" in capsys.readouterr().out
    run("convert", out, where / "o", "--to", "orbax", *names)
    close(
        jlora.merge(jlora.checkpoint.restore(where / "o", params)),
        jlora.merge(tree),
        1e-6,
    )
    run("convert", out, where / "from", "--to", "peft")
    capsys.readouterr()
    run("diff", where / "from", where / "peft", "--tolerance", 1e-6, "--json")
    assert all(r["relative"] < 1e-6 for r in json.loads(capsys.readouterr().out))


def test_merge_diff_and_extract(tmp_path, capsys):
    run("merge", BASE, LLAMA / "all", tmp_path / "m.safetensors")
    assert "21 tensors changed" in capsys.readouterr().out
    run(
        "diff",
        BASE,
        tmp_path / "m.safetensors",
        "--rank",
        4,
        "--out",
        tmp_path / "x",
        code=1,
    )
    assert "21 of 30 tensors differ" in capsys.readouterr().out
    run("diff", BASE, BASE)
    run("diff", tmp_path / "x", LLAMA / "all", "--tolerance", 1e-5)
    run("diff", LLAMA / "qv", LLAMA / "all", "--tolerance", 0.1, code=1)


def test_combine(tmp_path, capsys, saved):
    _, tree, where = saved
    run(
        "combine",
        LLAMA / "all",
        LLAMA / "all",
        "--weights",
        0.5,
        0.5,
        "--method",
        "svd",
        "--rank",
        4,
        "--out",
        tmp_path / "mixed",
    )
    run("diff", tmp_path / "mixed", LLAMA / "all", "--tolerance", 1e-5)
    run("combine", where / "orbax", "--weights", 2, "--out", tmp_path / "two")
    params, _, _, _ = known("llama", "gemma")
    got = jlora.adapter(jlora.checkpoint.restore(tmp_path / "two", params))
    assert got.keys() == jlora.adapter(tree).keys()


def test_match(tmp_path, capsys):
    import flax.serialization
    import orbax.checkpoint as ocp

    w = normal(6, 8)
    save_file({"fc.weight": np.asarray(w).T.copy()}, tmp_path / "m.safetensors")
    params = {"fc": {"kernel": w}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flax", params)
    (tmp_path / "flax.msgpack").write_bytes(
        flax.serialization.msgpack_serialize(params)
    )
    (tmp_path / "my_params.py").write_text(
        f"import numpy as np\ndef make():\n    w = np.array({np.asarray(w).tolist()}, "
        "np.float32)\n    return {'fc': {'kernel': w}}\n"
    )
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for said in ("flax", "flax.msgpack", "my_params:make"):
            run("match", said, "m.safetensors", "--out", "names.json")
            assert "fc.weight  transposed" in capsys.readouterr().out
            assert jlora.peft.Names.load("names.json")["fc/kernel"]
    finally:
        os.chdir(here)
    save_file({"fc.weight": np.ones((8, 6), np.float32)}, tmp_path / "o.safetensors")
    run("match", tmp_path / "flax", tmp_path / "o.safetensors", code=1)
    assert "its values are in no tensor" in capsys.readouterr().out


def test_check(capsys):
    run("check", LLAMA / "all", "--server", "vllm")
    run("check", LLAMA / "dora", "--server", "vllm", code=1)
    assert "use_dora: True: it has no DoRA" in capsys.readouterr().out


def test_wrong_use(tmp_path, capsys, saved):
    _, _, where = saved
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    (tmp_path / "bad" / WEIGHTS).write_bytes(b"no")
    out = "--out", tmp_path / "x"
    cases = [
        (["inspect", tmp_path / "none"], 2, "there is no"),
        (["inspect", LLAMA], 2, "is no adapter: expected"),
        (["inspect", tmp_path / "bad"], 1, "is no JSON file"),
        (["check", tmp_path / "bad", "--server", "vllm"], 1, "no whole safetensors"),
        (["merge", BASE, LLAMA / "all", tmp_path / "bad"], 2, "exists"),
        (["merge", BASE, tmp_path / "none", tmp_path / "x"], 2, "no directory"),
        (["convert", where / "orbax", tmp_path / "x", "--to", "peft"], 2, "--names"),
        (["convert", LLAMA / "all", tmp_path / "x", "--to", "orbax"], 2, "--names"),
        (["convert", LLAMA / "all", tmp_path / "x", "--to", "loralib"], 2, "ends in"),
        (["combine", LLAMA / "all", where / "orbax", *out], 2, "one format"),
        (["combine", LLAMA / "all", "--weights", 1, 2, *out], 2, "2 weights"),
        (["diff", BASE, LLAMA / "all"], 2, "one of each"),
        (["match", "no_such_module:x", BASE], 2, "no_such_module"),
        (["match", "no_such_thing", BASE], 2, "expected a checkpoint of Flax"),
    ]  # fmt: skip
    for args, code, part in cases:
        text = wrong(capsys, *args, code=code)
        assert part in text, text
        assert len(text.splitlines()) == 1, text
        assert not (tmp_path / "x").exists()
    for args in ([], ["merge"], ["check", "x", "--server", "none"]):
        with pytest.raises(SystemExit) as error:
            main(args)
        assert error.value.code == 2


def test_help_has_examples(capsys):
    for command in "inspect convert merge combine diff match check".split():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert f"example:\n  jlora {command}" in text and "exit codes" in text


def test_stopped_by_ctrl_c_leaves_nothing(tmp_path):
    """A merge that is interrupted while it copies leaves no file, and no traceback."""
    big = {f"w{k}.weight": np.zeros((4096, 4096), np.float32) for k in range(6)}
    save_file(big, tmp_path / "m.safetensors")
    tree = jlora.wrap({"m": {"kernel": jnp.zeros((4096, 4096))}}, rank=2)
    jlora.peft.save(tmp_path / "b", randomise(tree), names={"m/kernel": "w0"})
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from jlora.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "merge",
        "m.safetensors",
        "b",
        "out.safetensors",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".out*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["b", "m.safetensors"], (left, text)
    assert process.returncode == 130 and "Traceback" not in text, text


def test_python_m_jlora_is_light():
    """``--help`` needs no JAX backend and is there at once."""
    found = subprocess.run(
        [sys.executable, "-m", "jlora", "--help"], capture_output=True, text=True
    )
    assert found.returncode == 0 and "merge" in found.stdout
    assert jax.__version__ not in found.stderr


@pytest.mark.slow
def test_merge_of_a_large_base_needs_little_memory(tmp_path):
    """2.1 GB in four shards: at most 1.3 of the largest tensor and 300 MB are needed.

    Each number is the one that float32 gives, rounded once.
    """
    large, small = (16384, 8192), (4096, 4096)
    base, shards = tmp_path / "base", {}
    base.mkdir()
    drawn = np.random.default_rng(0).standard_normal(small, np.float32)
    drawn = drawn.astype(jnp.bfloat16)
    for k in range(4):
        own = {f"{k}.large.weight": np.tile(drawn, (4, 2))}
        own |= {f"{k}.{n}.weight": drawn for n in "xyzuvst"}
        shards |= dict.fromkeys(own, f"{k}.safetensors")
        save_file(own, base / f"{k}.safetensors")
    index = json.dumps({"weight_map": shards})
    (base / "model.safetensors.index.json").write_text(index)
    size = sum(p.stat().st_size for p in base.iterdir())
    assert size > 2e9, size
    factors = {}
    for name in shards:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        out, in_ = large if "large" in name else small
        factors[f"{module}.lora_A.weight"] = np.asarray(normal(4, in_))
        factors[f"{module}.lora_B.weight"] = np.asarray(normal(out, 4))
    where = tmp_path / "a"
    where.mkdir()
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["x"]}
    (where / "adapter_config.json").write_text(json.dumps(said))
    save_file(factors, where / WEIGHTS)
    code = (
        "import sys; from jlora.__main__ import main; "
        "code = main(['merge', 'base', 'a', 'out']); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); "
        "sys.exit(code)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    peak = int(found.stdout.split()[-1]) * 1024
    largest = 2 * large[0] * large[1]
    print(f"peak {peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert peak <= 1.3 * largest + 300e6, (peak / 1e6, largest / 1e6)
    from jlora.peft.files import tensors

    old, new = tensors(base), tensors(tmp_path / "out")
    for name in ("0.large.weight", "3.y.weight"):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{module}.lora_{n}.weight"][:256] for n in "AB")
        want = old.view(name)[:256].astype(np.float32) + 2 * (b @ a)
        np.testing.assert_array_equal(new.view(name)[:256], want.astype(jnp.bfloat16))
