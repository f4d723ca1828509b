"""What all tests share.

The environment is set before JAX is imported, and subprocesses inherit it. On a GPU:
``JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest make test``. JAX's strict
promotion modes stay off: optax and Flax's norms need dtype promotion, and a plain
``x @ w + b`` is what users write.
"""

import gc
import itertools
import os
import pathlib
import sys
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# Most of the tests' time is compilation. LLVM's optimisations change no HLO, so no cost
# that is counted, and the tests of bits ask for them again (helpers.OPTIMISED).
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

if version("jaxlib") == "0.10.0":
    # Its emitters of fusions take half of that time; later ones know no such flag, and
    # an unknown flag ends the process. What fuses depends on it a little, so the tests
    # of costs and of bits ask for them again (helpers.EMITTERS). A user's flags win.
    # Its LLVM modules are not split either: each part costs a compiler of its own, and
    # pytest's workers use the cores already.
    flags = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    )
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Without byte code every process compiles the source of JAX again, for a second or
    # more. It is written to pytest's cache, and nothing beside the sources.
    cache = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "bytecode"
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache))
    sys.dont_write_bytecode = False

import jax
import pytest

gc.disable()  # until all tests are imported: nothing of that is garbage


def pytest_collection_finish():
    gc.freeze()
    # Tracing makes many objects and few cycles: at Python 3.11's default of 700 the
    # collector runs forty times as often, for 1% of the time.
    gc.set_threshold(20_000, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips what needs a larger mesh than there are devices, as on a single GPU."""
    try:
        return (yield)
    except ValueError as error:
        if jax.device_count() < 8 and "Number of devices" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same in every run."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))
