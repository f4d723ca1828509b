"""How Orbax is used: writes in the background, and reads that all processes agree on.

Only one save at a time writes to a directory.  Each of several processes reads what it
needs by itself; then either all of them go on, or all of them raise.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

_LOG = logging.getLogger("jlora")

# Whether a write can be finished when the program ends: these Pythons start no thread
# then, as Orbax's writes do (https://github.com/python/cpython/issues/113964).
WRITES_AT_EXIT = not (3, 12, 0) <= sys.version_info[:3] <= (3, 12, 2)

# Saves that are not committed yet, by path.  Two saves to one directory would delete
# each other's files, so the first to enter its handle here goes on and others wait.
_SAVING: dict[str, Handle] = {}


class DamagedError(ValueError):
    """A directory that is no whole adapter checkpoint: restore an earlier one."""


class Handle:
    """A save that goes on in the background; see `jlora.checkpoint.save`."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._lock = threading.RLock()
        self._error: Exception | None = None

    def wait(self) -> None:
        """Waits until the checkpoint is committed; raises if the save failed."""
        self._finish()
        if self._error is not None:
            raise self._error

    def _start(self, items: dict[str, Any]) -> None:
        with self._lock:  # who finds this handle waits until its save has begun
            while (other := _SAVING.setdefault(str(self._path), self)) is not self:
                other._finish()
            try:
                check_place(self._path)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                handler = ocp.CompositeCheckpointHandler()
                self._checkpointer = ocp.AsyncCheckpointer(handler)
                self._checkpointer.save(self._path, args=ocp.args.Composite(**items))
            except BaseException:
                self._finish()
                raise

    def _finish(self) -> None:
        with self._lock:
            if _SAVING.get(str(self._path)) is not self:
                return
            try:
                if self._checkpointer is not None:
                    self._checkpointer.wait_until_finished()
            except Exception as e:  # Orbax raises it only once: kept for `wait`
                self._error = e
            if self._checkpointer is not None:
                self._checkpointer.close()
            del _SAVING[str(self._path)]


def _finish_all() -> None:
    for handle in list(_SAVING.values()):
        handle._finish()
        if handle._error is not None:
            _LOG.error(
                "checkpoint.save: %s was not saved, and nobody waited for it.",
                handle._path,
                exc_info=handle._error,
            )


# At its end Python first stops the thread pools with which Orbax writes, and then calls
# the functions of atexit.  Only this hook, which is private, comes earlier.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]


def path_of(directory: str | os.PathLike[str]) -> epath.Path:
    """The directory as an absolute path; a URL, such as of a bucket, is kept."""
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(
            "checkpoint: expected the path of a directory first, then the tree; found "
            f"a {type(directory).__name__}."
        )
    path = epath.Path(directory)
    return path if "://" in os.fspath(directory) else path.expanduser().absolute()


def saving(path: epath.Path) -> bool:
    """Whether a save to this path is under way."""
    return str(path) in _SAVING


def check_place(path: epath.Path) -> None:
    """Raises if no checkpoint can be made at this path."""
    local = "://" not in str(path)
    # A dangling link does not exist, but is in the way.
    if path.exists() or (local and os.path.islink(path)):
        raise FileExistsError(
            f"checkpoint.save: {path} exists: expected a new directory, so that no "
            "earlier adapter is lost. Save elsewhere, or move it away first."
        )
    for folder in path.parents if local else ():
        if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
            error = PermissionError if folder.is_dir() else NotADirectoryError
            raise error(
                f"checkpoint.save: {folder} cannot be written to: expected a directory "
                "in which a checkpoint can be made."
            )
        if folder.exists():
            break


def restore(path: epath.Path, args: dict[str, Any]) -> Any:
    """Reads items of a checkpoint; this process does not wait for the others."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"jlora_{jax.process_index()}",
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**args))


def together(path: epath.Path, fn: Callable[[], Any]) -> Any:
    """fn() on every process; if one of them raises, all do.

    Otherwise the others would go on, and wait for it in their next collective.
    """
    if jax.process_count() == 1:
        return fn()
    out, error = None, None
    try:
        out = fn()
    except Exception as e:
        error = e
    # 0: done, 1: the checkpoint is damaged, 2: another error.
    state = 0 if error is None else 1 if isinstance(error, DamagedError) else 2
    states = multihost_utils.process_allgather(np.int32(state))
    if error is not None:
        raise error
    if states.any():
        at = int(np.argmax(states))
        if states[at] == 1:
            raise DamagedError(damaged(path, f"process {at} says so"))
        raise OSError(f"checkpoint.restore: process {at} could not read {path}.")
    return out


# Errors of the moment, not of the file: the checkpoint may be whole.
_PASSING = MemoryError, jax.errors.JaxRuntimeError
# These are OSErrors, but they say that a part of the checkpoint is missing.
_MISSING = FileNotFoundError, NotADirectoryError, IsADirectoryError


@contextlib.contextmanager
def damage(path: epath.Path, what: str) -> Iterator[None]:
    """Raises a DamagedError for any error that a damaged file may cause."""
    try:
        yield
    except Exception as e:
        passing = isinstance(e, _PASSING)
        if passing or (isinstance(e, OSError) and not isinstance(e, _MISSING)):
            raise
        raise DamagedError(damaged(path, what, e)) from e


def damaged(path: epath.Path, why: str, error: Exception | None = None) -> str:
    """The text of a `DamagedError`."""
    cause = f" ({type(error).__name__}: {str(error)[:200]})" if error else ""
    return (
        f"checkpoint.restore: {path} is no whole adapter checkpoint: {why}{cause}. "
        "Restore an earlier one: this is not as jlora.checkpoint.save left it."
    )
