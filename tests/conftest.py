"""What all tests share.

The environment is set before JAX is imported, and subprocesses inherit it. Another
backend: ``JAX_PLATFORMS=cuda make test``. JAX's strict promotion modes stay off: optax
and Flax's norms need dtype promotion, and a plain ``x @ w + b`` is what users write.
"""

import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import pytest


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same in every run."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))
