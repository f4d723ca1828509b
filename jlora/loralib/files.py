"""loralib's files: read, and sorted into factors and biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora import _torch_file


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by torch's names, to inspect or to remove some.

    Args:
      path: a safetensors file, if the name ends in ``.safetensors``; else a file that
        ``torch.save`` wrote.  Its pickle can use only the names that tensors need.
        torch is neither needed nor imported.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a damaged file, or one of another kind; a pickle that asks for
        anything but tensors (nothing of it is run).

    Example:
      >>> import pathlib, tempfile, numpy as np, safetensors.numpy, jlora.loralib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
      >>> safetensors.numpy.save_file({"query.lora_A": np.ones((2, 3))}, path)
      >>> jlora.loralib.read(path)["query.lora_A"].shape
      (2, 3)
    """
    where = os.fspath(path)
    if not where.endswith(".safetensors"):
        return _torch_file.read(where)
    try:
        return safetensors.numpy.load_file(where)
    except (safetensors.SafetensorError, AttributeError, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        raise ValueError(
            f"{where!r} is no whole safetensors file of floating-point arrays that "
            f"numpy has ({e}): copy or save it again, in float32 say."
        ) from None


def arrays(state_dict: Any) -> dict[str, np.ndarray]:
    """The state dict with numpy arrays, also for arrays of JAX and tensors of torch."""
    if isinstance(state_dict, (str, os.PathLike)):
        return dict(read(state_dict))
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load: {type(state_dict).__name__}: expected a mapping from name to array "
            "or the path of a file."
        )

    def array(key: Any, x: Any) -> np.ndarray:
        if not hasattr(x, "detach"):
            x = np.asarray(x)
            return x.astype(x.dtype.newbyteorder("="), copy=False)
        x = x.detach()
        try:
            # torch cannot make numpy's bfloat16 (of ml_dtypes): through float32.
            half = str(x.dtype) == "torch.bfloat16"
            x = x.cpu()
            return np.asarray(x.float(), jnp.bfloat16) if half else np.asarray(x)
        except (TypeError, RuntimeError) as e:
            raise ValueError(
                f"{key!r} is a tensor of {x.dtype} ({x.layout}, on {x.device}) that "
                f"numpy cannot hold: expected a dense one in float32, float16 or "
                f"bfloat16 ({e})."
            ) from None

    return {str(key): array(key, x) for key, x in state_dict.items()}


# (lora_A, lora_B) by module.
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def in_pairs(arrays: Mapping[str, np.ndarray]) -> tuple[Factors, dict[str, np.ndarray]]:
    """(A, B) by module, and the biases by key; raises for any other key."""
    found: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    for key, x in arrays.items():
        module, _, name = key.rpartition(".")
        if name in ("lora_A", "lora_B"):
            found.setdefault(module, {})[name] = x
            if x.ndim != 2 or not x.size:
                raise ValueError(
                    f"{key!r} has shape {x.shape}: expected a matrix, as loralib's "
                    "layers have."
                )
        elif "bias" in name:
            others[key] = x
        else:
            raise ValueError(
                f"{key!r}: expected loralib's own names, which end in .lora_A, .lora_B "
                "or .bias. If it trained beside the adapter, take it out: "
                f"state = jlora.loralib.read(path); x = state.pop({key!r})."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{key!r} has dtype {x.dtype}: expected a floating-point one."
            )
    if not found:
        raise ValueError(
            "load: no lora_A in the state dict: expected what "
            f"loralib.lora_state_dict(model) gives, found {list(arrays)[:3]}."
        )
    for module, pair in found.items():
        if len(pair) == 1:
            (has,) = pair
            lacks = {"lora_A": "lora_B", "lora_B": "lora_A"}[has]
            raise ValueError(
                f"{_key(module, has)!r} is there without {_key(module, lacks)!r}: "
                "expected both. The file is not whole."
            )
    return {m: (pair["lora_A"], pair["lora_B"]) for m, pair in found.items()}, others


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
