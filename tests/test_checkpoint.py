"""Adapter checkpoints: bit-identical elsewhere, atomic, refused where they misfit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import adapt, adapted, normal, paths, randomise, same, says
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint as checkpoint
from jlora.checkpoint import orbax as checkpoint_orbax


def params():
    return {
        "up": {"kernel": normal(5, 7), "bias": normal(7)},
        "half": {"kernel": normal(7, 6, dtype=jnp.bfloat16)},
        "table": {"embedding": normal(13, 5)},
    }


def tree(seed=7):
    targets = ["**/kernel", "**/embedding"]
    wrapped = jlora.wrap(params(), rank=2, alpha=3, targets=targets, train=["up/bias"])
    return randomise(wrapped, seed)


def environment():
    root = pathlib.Path(jlora.__file__).parent.parent
    return {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{pathlib.Path(__file__).parent}",
    }


def python(code, *args):
    """Runs code in another process; returns what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# ----------------------------------------------------------------- round trips


def test_round_trip_is_bit_identical(tmp_path):
    saved = tree()
    checkpoint.save(tmp_path / "adapter", saved)
    base = params()
    restored = checkpoint.restore(tmp_path / "adapter", base)
    same(restored, saved)
    for path, leaf in paths(jlora.unwrap(restored)).items():
        assert leaf is paths(base)[path]


def test_round_trip_of_stacks_and_static_parts(tmp_path):
    def fn(p, x):
        h = jax.lax.scan(lambda c, w: (c @ w, None), x, p["stack"])[0]
        return jnp.einsum("be,hed->bhd", h, p["middle"])

    p = {"stack": normal(3, 5, 5), "middle": normal(2, 5, 7)}
    saved = randomise(jlora.wrap(p, plan=jlora.plan(fn, p, normal(11, 5), rank=2)))
    checkpoint.save(tmp_path / "adapter", saved)
    restored = checkpoint.restore(tmp_path / "adapter", p)
    same(restored, saved)  # same structure: the roles are part of it
    assert restored["stack"].scale.shape == (3,)


def test_string_paths_and_parents_that_do_not_exist(tmp_path):
    where = str(tmp_path / "runs" / "one" / "adapter")
    checkpoint.save(where, tree())
    same(checkpoint.restore(where, params()), tree())


LLAMA = models.Llama(d=24, ffn=40, vocab=61, heads=4, kv_heads=2, head_dim=6, layers=1)


def test_outputs_in_another_process_are_bit_identical(tmp_path):
    """Invariant 7: the adapter, its optimizer's state and the step, restored by a
    fresh process that makes its own base."""
    base, ids = LLAMA.init(), jnp.arange(18).reshape(2, 9)
    saved, _ = adapt(LLAMA, base, ids, rank=8)
    state = optax.adam(1e-2).init(jlora.partition(saved)[0])
    state = jax.tree.map(lambda v: v + 1, state)
    key = jax.random.key(5)
    extra = {"opt": state, "step": 7, "note": "text", "key": key, "loss": 0.1}
    checkpoint.save(tmp_path / "adapter", saved, extra=extra)
    np.save(tmp_path / "logits.npy", jax.jit(jlora.lift(LLAMA))(saved, ids))
    np.savez(tmp_path / "state.npz", *map(np.asarray, jax.tree.leaves(state)))
    out = python(
        """
        import pathlib, sys
        import jax, jax.numpy as jnp, numpy as np, optax
        import jlora, jlora.checkpoint
        from test_checkpoint import LLAMA

        here = pathlib.Path(sys.argv[1])
        base, ids = LLAMA.init(), jnp.arange(18).reshape(2, 9)
        plan = jlora.plan(LLAMA, base, ids, targets=["**"])
        shapes = jlora.wrap(LLAMA.shapes(), plan=plan)
        state = jax.eval_shape(optax.adam(1e-2).init, jlora.partition(shapes)[0])
        key = jax.random.key(0)
        like = {"opt": state, "step": 0, "note": "", "key": key, "loss": 0.0}
        tree, extra = jlora.checkpoint.restore(here / "adapter", base, extra=like)
        logits = jax.jit(jlora.lift(LLAMA))(tree, ids)
        assert np.asarray(logits).tobytes() == np.load(here / "logits.npy").tobytes()
        stored, leaves = np.load(here / "state.npz"), jax.tree.leaves(extra["opt"])
        assert len(leaves) == len(stored.files) > 3
        for mine, name in zip(leaves, stored.files):
            assert np.asarray(mine).tobytes() == stored[name].tobytes()
        assert (extra["step"], extra["note"], extra["loss"]) == (7, "text", 0.1)
        assert type(extra["step"]) is int
        words = [jax.random.key_data(k) for k in (extra["key"], jax.random.key(5))]
        assert (words[0] == words[1]).all()
        print("the same")
        """,
        tmp_path,
    )
    assert out.strip() == "the same"


def test_extra_is_optional_when_restoring(tmp_path):
    checkpoint.save(tmp_path / "a", tree(), extra={"step": 3})
    same(checkpoint.restore(tmp_path / "a", params()), tree())


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"mean": normal(7)}, id="array"),
        pytest.param({"b": [normal(7), {"c": jnp.int32(3)}], "a": 2}, id="nested"),
        pytest.param({"half": normal(7, dtype=jnp.bfloat16)}, id="bfloat16"),
        pytest.param({"flag": True, "lr": 1e-3, "name": "x/y"}, id="python"),
        pytest.param(np.arange(5, dtype=np.int64), id="numpy-64-bit"),
        pytest.param(
            {"key": jax.random.key(3), "old": jax.random.PRNGKey(3)}, id="keys"
        ),
        pytest.param((normal(3), None), id="none"),
        pytest.param({"a/b": normal(3), "a": {"b": normal(4)}}, id="slashes"),
        pytest.param(7, id="number"),
        pytest.param({"best": np.float64(0.1), "n": np.int8(3)}, id="numpy-scalars"),
        pytest.param({"none": jnp.zeros((0, 3)), "of": np.zeros(0)}, id="empty"),
        pytest.param(jax.random.key(3, impl="rbg"), id="key-of-another-kind"),
    ],
)
def test_extra_of_every_kind_comes_back(tmp_path, extra):
    checkpoint.save(tmp_path / "a", tree(), extra=extra)
    restored, found = checkpoint.restore(tmp_path / "a", params(), extra=extra)
    same(restored, tree())
    assert jax.tree.structure(found) == jax.tree.structure(extra)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(extra), strict=True):
        assert type(got) is type(want) or isinstance(got, jax.Array)
        if hasattr(want, "dtype"):
            assert got.dtype == want.dtype
            same(got, want)
        else:
            assert type(got) is type(want) and got == want


@pytest.mark.parametrize(
    "extra, like, want",
    [
        pytest.param(np.float64(0.1), 1.0, 0.1, id="numpy-to-python"),
        pytest.param(jnp.int32(7), 0, 7, id="array-to-python"),
        pytest.param(np.str_("x"), "", "x", id="string"),
        pytest.param(signal.SIGINT, 0, int(signal.SIGINT), id="enum"),
        pytest.param(np.arange(3, dtype=">f4"), np.zeros(3, "f4"), None, id="big-end"),
    ],
)
def test_extra_as_the_template_has_it(tmp_path, extra, like, want):
    checkpoint.save(tmp_path / "a", tree(), extra=extra)
    _, found = checkpoint.restore(tmp_path / "a", params(), extra=like)
    assert type(found) is type(like)
    np.testing.assert_array_equal(found, extra if want is None else want)


def test_keys_in_an_abstract_template(tmp_path):
    tx = optax.add_noise(0.1, 0.1, jax.random.key(5))
    state = tx.init(normal(3))
    checkpoint.save(tmp_path / "a", tree(), extra=state)
    like = jax.eval_shape(tx.init, normal(3))
    same(checkpoint.restore(tmp_path / "a", params(), extra=like)[1], state)


@pytest.mark.parametrize(
    "extra, like, words",
    [
        pytest.param(jnp.float32(5.7), 0, "expected float32.*found int", id="float"),
        pytest.param(jnp.int32(5), True, "expected int32.*found bool", id="int"),
        pytest.param(
            jax.random.key(1, impl="rbg"),
            jax.random.key(1, impl="unsafe_rbg"),
            "expected key<rbg>.*found key<urbg>",
            id="key",
        ),
    ],
)
def test_nothing_is_cast_to_the_template_without_a_word(tmp_path, extra, like, words):
    checkpoint.save(tmp_path / "a", tree(), extra=extra)
    with pytest.raises(ValueError, match=words):
        checkpoint.restore(tmp_path / "a", params(), extra=like)


def test_saves_that_race_for_a_directory(tmp_path):
    """One wins, the others are refused; nothing is half written."""
    trees = {seed: tree(seed) for seed in range(7, 15)}
    start = threading.Barrier(len(trees))
    outcomes, refused = [], []

    def save(seed):
        start.wait()
        try:
            checkpoint.save(tmp_path / "a", trees[seed])
            outcomes.append(seed)
        except Exception as e:
            refused.append(e)

    threads = [threading.Thread(target=save, args=(seed,)) for seed in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = outcomes
    for e in refused:
        assert isinstance(e, FileExistsError)
        says(e, str(tmp_path / "a"), "expected")
    same(checkpoint.restore(tmp_path / "a", params()), trees[winner])


@pytest.mark.parametrize("again", ["wait", "save"])
def test_what_a_save_in_the_background_raised_is_told_by_its_handle(
    tmp_path, monkeypatch, again
):
    """Also if a later save to the same place met the failed one first."""
    # On any Python: those that write at once raise in save itself.
    monkeypatch.setattr(checkpoint_orbax, "WRITES_AT_EXIT", True)
    errors = [OSError("No space left on device")]

    def finalize(self, *_, **__):
        if errors:
            raise errors.pop()

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "finalize", finalize, raising=False)
    handle = checkpoint.save(tmp_path / "a", tree(), block=False)
    if again == "wait":
        with pytest.raises(OSError, match="No space"):
            handle.wait()
    else:
        checkpoint.save(tmp_path / "a", tree(8))
        same(checkpoint.restore(tmp_path / "a", params()), tree(8))
    with pytest.raises(OSError, match="No space"):
        handle.wait()


def test_a_handle_that_was_waited_for_knows_nothing_of_later_saves(tmp_path):
    first = checkpoint.save(tmp_path / "a", tree(), block=False)
    first.wait()
    shutil.rmtree(tmp_path / "a")
    second = checkpoint.save(tmp_path / "a", tree(8), block=False)
    first.wait()
    with pytest.raises(FileExistsError, match="exists"):
        checkpoint.save(tmp_path / "a", tree(9))
    second.wait()
    same(checkpoint.restore(tmp_path / "a", params()), tree(8))


@pytest.mark.parametrize("old, new", [('"io"', '"oi"'), ("']\": 1", "']\": 2")])
def test_a_document_that_was_changed(saved, old, new):
    ((file, _),) = documents(saved)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match="its document is damaged"):
        checkpoint.restore(saved, params())


def test_the_level_of_the_tree_is_told(tmp_path):
    nested = {"params": params()}
    whole = jlora.attach(
        nested, {f"params/{p}": x for p, x in jlora.adapter(tree()).items()}
    )
    checkpoint.save(tmp_path / "a", whole)
    checkpoint.save(tmp_path / "b", tree())
    with pytest.raises(ValueError, match=r"saved from \{'params': params\}"):
        checkpoint.restore(tmp_path / "a", params())
    with pytest.raises(ValueError, match="from the tree under 'params'"):
        checkpoint.restore(tmp_path / "b", nested)
    with pytest.raises(ValueError, match="is adapted: expected the plain base"):
        checkpoint.restore(tmp_path / "b", tree())


def test_asynchronous_save(tmp_path):
    """What is saved is the tree as it was, even if its buffers are given away."""
    saved = jax.tree.map(jnp.copy, tree())
    handle = checkpoint.save(tmp_path / "a", saved, extra={"step": 1}, block=False)
    consume = jax.jit(lambda t: jax.tree.map(lambda v: v * 0, t), donate_argnums=0)
    consume(jlora.partition(saved)[0])
    handle.wait()
    same(checkpoint.restore(tmp_path / "a", params()), tree())


def test_composition_with_the_users_own_checkpoint_manager(tmp_path):
    """Adapter, optimizer state and step by Orbax's CheckpointManager."""
    t = tree()
    tx = jlora.optimizer(optax.adam(1e-3), t)
    state = jax.tree.map(lambda v: v + 1, tx.init(t))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step in (1, 2, 3):
            manager.save(
                step,
                args=ocp.args.Composite(
                    adapter=ocp.args.StandardSave(jlora.adapter(t)),
                    opt=ocp.args.StandardSave(state),
                ),
            )
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
        like = jax.eval_shape(lambda: (jlora.adapter(tree(1)), tx.init(tree(1))))
        found = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(
                adapter=ocp.args.StandardRestore(like[0]),
                opt=ocp.args.StandardRestore(like[1]),
            ),
        )
    same(jlora.attach(params(), found["adapter"]), t)
    same(found["opt"], state)


def test_an_adapter_checkpoint_is_less_than_a_hundredth_of_the_base(tmp_path):
    base = {f"layer_{i}": {"kernel": jnp.ones((1024, 1024))} for i in range(8)}
    checkpoint.save(tmp_path / "a", jlora.wrap(base, rank=2))
    files = [f for f in (tmp_path / "a").rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    assert 8 * 2 * 2048 * 4 * 0.5 < size < 0.01 * 8 * 1024 * 1024 * 4


# ------------------------------------------------------------------- bad input


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "adapter", tree(), extra={"step": 1, "mean": normal(7)})
    return tmp_path / "adapter"


def test_saving_over_an_existing_adapter_is_refused_and_nothing_is_lost(saved):
    for block in (True, False):
        with pytest.raises((FileExistsError, ValueError)) as error:
            checkpoint.save(saved, tree(8), block=block)
        says(error, str(saved), "exists")
    same(checkpoint.restore(saved, params()), tree())


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param(
            lambda p: p["up"].update(kernel=normal(5, 8)),
            ["up/kernel", "[5,7]", "[5,8]"],
            id="shape",
        ),
        pytest.param(
            lambda p: p["up"].update(kernel=normal(5, 7, dtype=jnp.bfloat16)),
            ["up/kernel", "float32", "bfloat16"],
            id="dtype",
        ),
        pytest.param(lambda p: p.pop("table"), ["table/embedding"], id="missing"),
        pytest.param(
            lambda p: p.update(more={"kernel": normal(3, 3)}),
            ["more/kernel"],
            id="more",
        ),
        pytest.param(
            lambda p: p.update(tabel=p.pop("table")),
            ["table/embedding", "tabel/embedding"],
            id="renamed",
        ),
    ],
)
def test_restoring_onto_another_base(saved, change, words):
    other = params()
    change(other)
    with pytest.raises(ValueError, match="base") as error:
        checkpoint.restore(saved, other)
    says(error, *words, "expected", "found", str(saved))


def test_restoring_another_extra(saved):
    for extra, words in [
        ({"step": 1}, ["mean"]),
        ({"step": 1, "mean": normal(8)}, ["mean", "[7]", "[8]"]),
        ({"step": 1, "mean": normal(7), "more": 1}, ["more"]),
        ({"step": 1.0, "mean": normal(7)}, ["step", "int", "float"]),
    ]:
        with pytest.raises(ValueError, match="extra") as error:
            checkpoint.restore(saved, params(), extra=extra)
        says(error, *words, "expected", "found")


def test_restoring_from_a_directory_that_is_not_there(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        checkpoint.restore(tmp_path / "nothing", params())
    says(error, str(tmp_path / "nothing"), "jlora.checkpoint.save")


def test_restoring_from_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    ocp.StandardCheckpointer().save(tmp_path / "other", {"x": jnp.ones(3)})
    for name in ("empty", "file"):
        with pytest.raises((ValueError, OSError)) as error:
            checkpoint.restore(tmp_path / name, params())
        says(error, str(tmp_path / name), "jlora.checkpoint.save")


def harm_every_file(directory):
    """Cuts to half, then removes, every file of the checkpoint of `tree()` in turn:
    either it plays no part in what is restored, which is then right, or the error
    names the directory. Prints how often it was refused, of how many files."""
    files = sorted(f for f in directory.rglob("*") if f.is_file())
    refused = 0
    for file in files:
        whole = file.read_bytes()
        for harm in ("cut", "removed"):
            if harm == "cut":
                file.write_bytes(whole[: len(whole) // 2])
            else:
                file.unlink()
            try:
                same(checkpoint.restore(directory, params()), tree())
            except ValueError as error:
                says(error, str(directory), "jlora.checkpoint.save")
                refused += 1
            file.write_bytes(whole)
    same(checkpoint.restore(directory, params()), tree())
    print(refused, len(files))


def test_restoring_from_a_truncated_directory(saved):
    """Never wrong numbers, and never another error than ours. In a process of its
    own, since Orbax leaves coroutines behind when a read fails."""
    out = python(
        """
        import pathlib, sys
        from test_checkpoint import harm_every_file

        harm_every_file(pathlib.Path(sys.argv[1]))
        """,
        saved,
    )
    refused, files = map(int, out.split())
    # At the least the arrays, their manifest and the document, harmed in either way.
    assert files > 3 and refused >= 6


def documents(directory):
    """The JSON files that say which format it is."""
    for file in directory.rglob("*"):
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue
        if isinstance(found, dict) and "version" in found and "format" in found:
            yield file, found


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        TimeoutError("the storage is slow"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize(
    "handler", ["JsonCheckpointHandler", "StandardCheckpointHandler"]
)
def test_what_passes_is_no_damage(saved, monkeypatch, error, handler):
    def fails(self, *_, **__):
        raise error

    with monkeypatch.context() as m:
        m.setattr(getattr(ocp, handler), "restore", fails)
        with pytest.raises(type(error)) as found:
            checkpoint.restore(saved, params())
    assert not isinstance(found.value, checkpoint.DamagedError)
    same(checkpoint.restore(saved, params()), tree())


def test_restoring_from_a_newer_format_version(saved):
    ((file, document),) = documents(saved)
    version = document["version"]
    file.write_text(json.dumps({**document, "version": version + 1}))
    with pytest.raises(ValueError) as error:
        checkpoint.restore(saved, params())
    says(error, str(saved), f"version {version + 1}", str(version), "pdate")
    file.write_text(json.dumps({**document, "format": "something else"}))
    with pytest.raises(ValueError, match="something else"):
        checkpoint.restore(saved, params())


def test_plan_and_base_are_stored_beside_the_arrays(saved):
    """Readable without the library: one JSON document."""
    ((_, document),) = documents(saved)
    text = json.dumps(document)
    for path, leaf in adapted(tree()).items():
        assert path in text
        assert leaf.w is None or json.dumps(list(leaf.w.shape)) in text
    assert document["plan"]["up/kernel"]["rank"] == 2


def test_saving_what_has_no_adapter_or_no_base(tmp_path):
    with pytest.raises(ValueError, match="adapted"):
        checkpoint.save(tmp_path / "a", params())
    with pytest.raises(ValueError) as error:
        checkpoint.save(tmp_path / "a", jlora.adapter(tree()))
    says(error, "jlora.attach", "/kernel")
    with pytest.raises((TypeError, ValueError)) as error:
        checkpoint.save(tmp_path / "a", tree(), extra={"model": object()})
    says(error, "model", "object")
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------ killed saves

# The parent has imported everything and started no thread, so that each child is a
# fork that begins to save at once; it writes a line after each save that returned.
KILLER = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp
import jlora, jlora.checkpoint

directory, rounds = sys.argv[1], int(sys.argv[2])


def tree(step):
    base = {"kernel": jnp.ones((64, 64))}
    leaf = jlora.LoRA(
        base["kernel"], jnp.full((64, 4), 1.0 + step), jnp.full((4, 64), 2.0 + step),
        jnp.ones(()),
    )
    return {"kernel": leaf}


def save_forever(first, pipe):
    step = first
    while True:
        jlora.checkpoint.save(f"{directory}/{step}", tree(step), extra={"step": step})
        os.write(pipe, b"%d\\n" % step)
        step += 1


def check(last):
    for step in range(last + 1):
        found, extra = jlora.checkpoint.restore(
            f"{directory}/{step}", {"kernel": jnp.ones((64, 64))}, extra={"step": 0}
        )
        leaf = found["kernel"]
        assert extra["step"] == step and (leaf.a == 1.0 + step).all(), step
        assert (leaf.b == 2.0 + step).all(), step


draw = random.Random(0)
saved, halves = -1, 0
for attempt in range(rounds):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_forever(saved + 1, write)
        finally:
            os._exit(1)
    os.close(write)
    lines = b""
    while not lines.endswith(b"\\n"):  # one save is done; the next one has begun
        part = os.read(read, 4096)
        assert part, "the child ended by itself"
        lines += part
    time.sleep(draw.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(read, 4096):
        lines += part
    os.close(read)
    saved = int(lines.split()[-1])
    # The save that was killed has left nothing, or all of itself.
    if os.path.exists(f"{directory}/{saved + 1}"):
        saved += 1
    # What it had written until then has another name, as long as it is not whole.
    halves += any(not name.isdigit() for name in os.listdir(directory))
check(saved)
print("good", saved, "halves", halves)
"""


def test_a_save_killed_at_any_moment_leaves_the_previous_ones(tmp_path):
    """kill -9 of 20 processes that do nothing but save, at random moments of a save;
    each goes on where the last one was killed, over what that one left."""
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "run"), "20"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    words = run.stdout.split()
    good, halves = (int(word) for word in words[1::2])
    assert good >= 19  # each of the 20 made at least one
    assert halves >= 5  # and enough of them were killed while they wrote


def test_the_end_of_a_program_waits_for_its_saves(tmp_path):
    """For all of them, also if one went wrong, which is told."""
    code = textwrap.dedent(
        """
        import sys, jax.numpy as jnp, jlora, jlora.checkpoint, orbax.checkpoint as ocp

        tree = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
        extra = {"m": jnp.ones((2000, 2000))}

        def full(self, *_, **__):
            ocp.JsonCheckpointHandler.finalize = whole
            raise OSError("No space left on device")

        whole = ocp.JsonCheckpointHandler.finalize
        ocp.JsonCheckpointHandler.finalize = full
        lost = jlora.checkpoint.save(sys.argv[1] + "/lost", tree, block=False)
        lost._checkpointer._async_manager._thread.join()
        for name in ("b", "c"):
            where = sys.argv[1] + "/" + name
            jlora.checkpoint.save(where, tree, extra=extra, block=False)
        sys.exit(3)
        """
    )
    if not checkpoint_orbax.WRITES_AT_EXIT:
        pytest.skip("this Python starts no thread at its end: see the test below")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=env
    )
    assert done.returncode == 3, done.stderr
    assert f"{tmp_path}/lost was not saved, and nobody waited for it" in done.stderr
    assert "No space left" in done.stderr and "threading._shutdown" not in done.stderr
    for name in ("b", "c"):
        tree, _ = checkpoint.restore(
            tmp_path / name,
            {"kernel": jnp.ones((3, 4))},
            extra={"m": jnp.ones((2000, 2000))},
        )
        assert tree["kernel"].rank == 2


def test_where_no_write_ends_with_the_program_it_is_written_at_once(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_orbax, "WRITES_AT_EXIT", False)
    tree = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
    handle = jlora.checkpoint.save(tmp_path / "a", tree, block=False)
    assert (tmp_path / "a").is_dir()  # committed: until then it has another name
    handle.wait()
    assert checkpoint.restore(tmp_path / "a", {"kernel": jnp.ones((3, 4))})
    code = """
        import sys, jax.numpy as jnp, jlora, jlora.checkpoint
        tree = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
        jlora.checkpoint.save(sys.argv[1], tree, block=False)
        """
    if sys.version_info[:2] == (3, 12):  # the real thing
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), tmp_path / "b"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0 and "shutdown" not in done.stderr, done.stderr
        assert checkpoint.restore(tmp_path / "b", {"kernel": jnp.ones((3, 4))})


def test_a_save_that_nobody_waited_for_does_not_block_its_name(tmp_path):
    tree = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
    handle = jlora.checkpoint.save(tmp_path / "a", tree, block=False)
    with pytest.raises(FileExistsError, match="exists"):
        jlora.checkpoint.save(tmp_path / "a", tree)
    shutil.rmtree(tmp_path / "a")
    jlora.checkpoint.save(tmp_path / "a", tree)
    handle.wait()


def test_places_that_are_no_directories(tmp_path):
    tree = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="file cannot be written to"):
        jlora.checkpoint.save(tmp_path / "file" / "a" / "b", tree)
    with pytest.raises(FileExistsError, match="link exists"):
        jlora.checkpoint.save(tmp_path / "link", tree)
    with pytest.raises(TypeError, match="extra has a uint4"):
        jlora.checkpoint.save(tmp_path / "u", tree, extra=jnp.zeros(3, jnp.uint4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


# ------------------------------------------------------------------------ checksums


@pytest.mark.parametrize(
    "dtype",
    "bool int4 int8 uint16 int32 int64 float8_e4m3fn bfloat16 float16 float32 float64 "
    "complex64 complex128".split(),
)
@pytest.mark.parametrize("shape", [(), (8,), (4, 6), (2, 3, 8), (0, 4)])
def test_a_checksum_is_the_same_wherever_the_array_is(shape, dtype):
    """In numpy, and in parts on eight devices; every flipped bit changes it."""
    from jlora.checkpoint.checksum import _distributed_sum, checksum

    with jax.enable_x64(True):
        draw = np.random.default_rng(0).normal(size=shape) * 3
        x = jnp.asarray(draw).astype(dtype)
        if x.ndim and x.shape[-1] % 8 == 0:
            mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
            spec = P(*[None] * (x.ndim - 1), "d")
            x = jax.device_put(x, jax.NamedSharding(mesh, spec))
        here = np.asarray(x)
        want = checksum(here)
        assert int(_distributed_sum(x)) == checksum(x) == want
        if here.size and here.dtype.name in ("float32", "bfloat16", "int64"):
            raw = bytearray(here.tobytes())
            for at in range(8 * len(raw)):
                raw[at // 8] ^= 1 << at % 8
                flipped = np.frombuffer(bytes(raw), here.dtype).reshape(shape)
                assert checksum(flipped) != want
                raw[at // 8] ^= 1 << at % 8


def test_what_jax_would_narrow_is_refused_by_name(tmp_path):
    extra = {"moment": np.ones(3, np.float64)}
    base = {"kernel": jnp.ones((3, 4))}
    tree = jlora.wrap(base, rank=2)
    with jax.enable_x64(True):
        wide = jlora.wrap(base, rank=2, dtype="float64")
        jlora.checkpoint.save(tmp_path / "wide", wide)
    with pytest.raises(ValueError, match="'kernel' was saved as float64.*jax_enable_x"):
        jlora.checkpoint.restore(tmp_path / "wide", base)
    jlora.checkpoint.save(tmp_path / "numpy", tree, extra=extra)  # NumPy's stay so
    _, again = jlora.checkpoint.restore(tmp_path / "numpy", base, extra=extra)
    assert again["moment"].dtype == np.float64
