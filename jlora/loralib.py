"""loralib's own forms of an adapter, and its checkpoints (arXiv:2106.09685).

Its ``Linear`` and ``Embedding`` are this library's own form, transposed.  Two layers
are not: ``MergedLinear`` has factors of its own for each enabled slice of a fused
weight (`Blocks`), and ``ConvLoRA`` reshapes a product of matrices into a kernel
(`Kernel`).

    rules = [jlora.Rule("**/qkv/kernel", form=Blocks((True, False, True)))]

A file that ``torch.save(loralib.lora_state_dict(model), path)`` wrote is loaded without
torch, and without running anything that is in it:

    adapter = jlora.loralib.load("adapter.pt", params, alpha=16)
    tree = jlora.attach(params, adapter)
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora import _paths, _torch_file, _torch_layers
from jlora._leaf import Blocks as Blocks
from jlora._leaf import Full
from jlora._leaf import Kernel as Kernel
from jlora._plan import Plan, Spec, leaves_of, sibling_bias
from jlora._tree import Adapter

# What a weight is called in Flax (the first two), Equinox and Haiku.
_WEIGHTS = ("kernel", "embedding", "weight", "w")
_BIASES = ("bias", "b")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by torch's names, to look at or to take some away.

    Args:
      path: of a safetensors file, if its name ends in ``.safetensors``; else of a file
        that ``torch.save`` wrote.  Its pickle is given no names but those that tensors
        need; torch is neither needed nor imported.

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


def load(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    params: Any = None,
    *,
    plan: Plan | None = None,
    alpha: float | Mapping[Any, float] | None = None,
    rename: Callable[[str], str] | None = None,
    enable_lora: Sequence[bool] | Mapping[Any, Sequence[bool]] | None = None,
) -> Adapter:
    """The adapter that ``loralib.lora_state_dict`` saved, for `jlora.attach`.

    loralib saves factors and biases by the names of torch's modules, and nothing else.
    What the file lacks is said here, or by a `Plan`:

    ============= ================================ ================================
    layer         lora_A, lora_B                   a, b
    ============= ================================ ================================
    Linear        (r, in), (out, r)                (*in, r), (r, *out)
    Embedding     (r, num), (dim, r)               (num, r), (r, dim)
    MergedLinear  (k·r, in), (k·out/n, r)          (k, *in, r), (k, r, *out/n)
    Conv2d        (r·k, in·k), (out/groups·k, r·k) their transposes, as in `Kernel`
    ============= ================================ ================================

    A module ``encoder.0.query`` is looked for in ``encoder/0/query``, as its
    ``kernel``, ``embedding``, ``weight`` or ``w``, or that path itself; its bias as
    ``bias`` or ``b`` there.  The kind of layer, the roles of the weight's axes and the
    groups of a convolution follow from the sizes: in axes come before out axes in a
    ``kernel``, ``embedding`` or ``w``, either way round in a matrix of another name.
    Where several readings fit, or none, that is an error, and a plan decides.

    Layers that params keep as one stack are loaded without params and then stacked:
    ``jax.tree.map(lambda *x: jnp.stack(x), *leaves)``.

    Args:
      state_dict: names to arrays (numpy's, JAX's or torch's), or the path of a file as
        in `read`.
      params: the tree that the adapter is for; arrays or ``jax.ShapeDtypeStruct``s.
        None, and no plan: every weight is a (in, out) ``kernel``, which is wrong for a
        convolution, and `jlora.attach` then refuses it.
      plan: a `Plan` of that tree instead.  It says all that ``params``, ``alpha`` and
        ``enable_lora`` do, and whatever it plans has to be in the file.
      alpha: loralib's ``lora_alpha``, which is not in the file; or a mapping from
        pattern to it, the first match wins.  The delta is alpha / r * a·b; None, and
        where no pattern matches, is alpha = r, a scale of 1.
      rename: from the name of a module in torch to the path of its weight in params, or
        of what holds its weight and bias:
        ``lambda m: "params/" + m.replace(".", "/")``.
      enable_lora: the flags of every ``MergedLinear`` of which not all slices are
        enabled, or a mapping from pattern to flags.  Without params whatever a pattern
        matches is taken for a ``MergedLinear``.

    Returns:
      A flat dict from path to `LoRA` with ``w=None``; biases are `Full` leaves.  The
      arrays have the file's floating-point types (float64 only with JAX's x64 on).

    Raises:
      FileNotFoundError, ValueError: as `read`.
      ValueError: a key that is no factor and no bias; a factor without its other one;
        a module that params has not (with the paths near it); sizes that do not fit the
        weight, or fit it in several ways; unknown or wrong flags; a pattern that
        matches nothing; a planned path that the file has not.
      TypeError: a ``state_dict`` that is neither mapping nor path.

    Example:
      >>> import jax.numpy as jnp, jlora.loralib
      >>> params = {"query": {"kernel": jnp.ones((3, 2, 2))}}
      >>> file = {"query.lora_A": jnp.ones((8, 3)), "query.lora_B": jnp.ones((4, 8))}
      >>> adapter = jlora.loralib.load(file, params, alpha=16)
      >>> adapter["query/kernel"]
      LoRA(w=None, a=float32[3,8], b=float32[8,2,2], roles='ioo')
      >>> jlora.attach(params, adapter)["query"]["kernel"].scale
      Array(2., dtype=float32)
    """
    factors, others = _sorted(_arrays(state_dict))
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(
            f"load: plan is a {type(plan).__name__}: expected what jlora.plan gives."
        )
    if rename is not None and not callable(rename):
        raise TypeError(
            f"load: rename is a {type(rename).__name__}: expected a function from a "
            "module's name to a path, such as names.get for a dict of them."
        )
    if plan is not None:
        said = {"params": params, "alpha": alpha, "enable_lora": enable_lora}
        if found := [name for name, x in said.items() if x is not None]:
            raise ValueError(
                f"load: {', '.join(found)} beside plan=, which decides all of it: say "
                "it in jlora.plan(fn, params, ..., alpha=..., "
                "rules=[jlora.Rule(pattern, form=...)])."
            )
    tree = _Tree.of(params, plan, rename)
    flags = _Patterns.of("enable_lora", enable_lora)
    alphas = _Patterns.of("alpha", alpha)

    bases: dict[str, Any] = {}
    specs: dict[str, Spec] = {}
    out: Adapter = {}
    for module, (a, b) in factors.items():
        path = tree.weight(module)
        if path in specs:
            raise ValueError(
                f"{module!r} and another module of the file are both {path!r} in "
                "params: expected a path of its own for each. Check rename."
            )
        if tree.leaves is None:
            bases[path], specs[path] = _torch_layers.told_by_file(
                path, a, b, flags.find(path, _shape(a.shape[1], b.shape[0]))
            )
        elif plan is None:
            bases[path] = tree.leaves[path]
            specs[path] = _torch_layers.told_by_sizes(
                path, a, b, tree.leaves, flags.find(path, bases[path])
            )
        else:
            bases[path] = tree.leaves[path]
            specs[path] = _torch_layers.planned(plan, path, a, b)
        if (own := alphas.find(path, bases[path])) is not None:
            specs[path] = dataclasses.replace(specs[path], alpha=float(own))
        bias = specs[path].bias
        if plan is None and tree.leaves is not None:
            bias = sibling_bias(path, tree.leaves)
        bias = None if bias is None else _paths.relative(bias, path)
        if tree.leaves is None:  # the file does not tell; where there is none, nothing
            bias = "bias"
        out[path] = _torch_layers.leaf(
            tuple(bases[path].shape), specs[path], bias, a, b
        )
    if plan is not None and (lacks := [path for path in plan if path not in specs]):
        raise ValueError(
            f"load: the plan has {', '.join(map(repr, lacks[:3]))}"
            f"{', …' if len(lacks) > 3 else ''}, for which the file has no factors: it "
            f"has {_paths.near(lacks[0], specs)}. Plan only what was adapted, or say "
            "with rename= where it is."
        )
    merged = {p: bases[p] for p, s in specs.items() if isinstance(s.form, Blocks)}
    flags.check(merged, "MergedLinear")
    alphas.check(bases, "adapted")
    for key, x in others.items():
        path, value = tree.bias(key, x, factors)
        known = out.get(path)
        if known is not None and not (
            isinstance(known, Full) and np.array_equal(known.value, value)
        ):
            raise ValueError(
                f"{key!r} and another array of the file are both {path!r} in params, "
                "and differ: expected one. Check rename."
            )
        out[path] = Full(None, jnp.array(value))
    return out


# ------------------------------------------------------------------------------ names


def _arrays(state_dict: Any) -> dict[str, np.ndarray]:
    """The state dict as numpy arrays, of torch tensors too."""
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
            # numpy has no bfloat16 that torch knows
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


Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def _sorted(arrays: Mapping[str, np.ndarray]) -> tuple[Factors, dict[str, np.ndarray]]:
    """(A, B) by module, and the biases by their own names; nothing is left over."""
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


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Where the params keep what torch's modules have.

    Attributes:
      leaves: path to array of the params, or None where they are not known.
      plan: or None.
      rename: as in `load`.
    """

    leaves: Mapping[str, Any] | None
    plan: Plan | None
    rename: Callable[[str], str] | None

    @classmethod
    def of(cls, params: Any, plan: Plan | None, rename: Any) -> _Tree:
        leaves = None if params is None else leaves_of(params)
        if plan is not None:
            leaves = {path: _shape(*shape) for path, shape in plan.shapes.items()}
        return cls(leaves, plan, rename)

    def _place(self, module: str) -> str:
        return self.rename(module) if self.rename else module.replace(".", "/")

    def weight(self, module: str) -> str:
        """The path of a module's weight."""
        place = self._place(module)
        if self.leaves is None:
            return place if self.rename else _join(place, _WEIGHTS[0])
        found = self._found([place, *(_join(place, name) for name in _WEIGHTS)])
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"the weight of {module!r} could be any of {found}: say which with "
                "rename=, from the module's name to the weight's path."
            )
        raise ValueError(
            f"the file adapts the module {module!r}, but params have no weight "
            f"({', '.join(_WEIGHTS)}) in {place!r}; near paths: "
            f"{self._near(_join(place, _WEIGHTS[0]))}. Say where it is with rename=, "
            "from the module's name to the path, such as "
            "lambda m: 'params/' + m.replace('.', '/')."
        )

    def bias(self, key: str, x: np.ndarray, factors: Factors) -> tuple[str, np.ndarray]:
        """The path of a bias, and its value in the shape that it has there."""
        module, _, name = key.rpartition(".")
        # ConvLoRA keeps its convolution in a module of its own.
        outer, _, last = module.rpartition(".")
        if last == "conv" and outer in factors and module not in factors:
            module = outer
        place = self._place(module)
        if self.leaves is None:
            holder = place.rpartition("/")[0] if self.rename else place
            return _join(holder, name), x
        holder = place.rpartition("/")[0] if place in self.leaves else place
        names = _BIASES if name == "bias" else (name,)
        candidates = [_join(holder, name) for name in names]
        if self.plan is not None and module in factors:
            seen = self.plan[self.weight(module)].bias
            candidates = [seen, *candidates] if seen else candidates
        found = self._found(candidates)
        if not found:
            raise ValueError(
                f"the file has {key!r}, but params have no {candidates[0]!r}; near "
                f"paths: {self._near(candidates[0])}. Say with rename= where "
                f"{module!r} is, or take the key out of the state dict."
            )
        shape = tuple(self.leaves[found[0]].shape)
        if x.shape != shape and not (x.ndim == 1 and x.size == math.prod(shape)):
            raise ValueError(
                f"{key!r} has shape {x.shape}: expected {shape}, as {found[0]!r}."
            )
        return found[0], x.reshape(shape)

    def _found(self, paths: Sequence[str]) -> list[str]:
        return [path for path in paths if path in (self.leaves or ())]

    def _near(self, path: str) -> str:
        return _paths.near(path, self.leaves or ())


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def _shape(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Patterns:
    """A value for all paths, or one by pattern of which the first match wins."""

    name: str
    values: Mapping[Any, Any]
    everywhere: bool

    @classmethod
    def of(cls, name: str, said: Any) -> _Patterns:
        everywhere = not isinstance(said, Mapping)
        values = said
        if everywhere:
            values = {} if said is None else {"**": said}
        for value in values.values():
            flags = name == "enable_lora"
            good = (
                isinstance(value, (list, tuple))
                if flags
                else isinstance(value, numbers.Real) and math.isfinite(value)
            )
            if not good:
                expected = "one flag for each slice" if flags else "a number"
                raise ValueError(f"load: {name} {value!r}: expected {expected}.")
        return cls(name, values, everywhere)

    def find(self, path: str, x: Any) -> Any:
        return next(
            (v for p, v in self.values.items() if _paths.matches(p, path, x)), None
        )

    def check(self, leaves: Mapping[str, Any], kind: str) -> None:
        """Raises for a pattern that matches none of these leaves."""
        if self.values and not leaves:
            raise ValueError(
                f"{self.name}={self.values}: the file has no {kind} layer to which it "
                "could be said. Leave it out."
            )
        if not self.everywhere:
            _paths.check_matched(self.name, list(self.values), list(leaves.items()))
