"""The paths in params of what torch's modules have; arguments given by pattern."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._plan.plan import Plan
from jlora._tree import by_path, paths
from jlora._tree.patterns import check_matched, matches
from jlora.loralib.files import Factors

# The names of weights in Flax (the first two), Equinox and Haiku.
_WEIGHTS = ("kernel", "embedding", "weight", "w")
_BIASES = ("bias", "b")


@dataclasses.dataclass(frozen=True)
class Tree:
    """The paths in params of the weights and biases of torch's modules.

    Attributes:
      leaves: path to array of the params; None if they are not known.
      plan: a `Plan`, or None.
      rename: as in `load`.
    """

    leaves: Mapping[str, Any] | None
    plan: Plan | None
    rename: Callable[[str], str] | None

    @classmethod
    def of(cls, params: Any, plan: Plan | None, rename: Any) -> Tree:
        """From the arguments of `load`."""
        leaves = None if params is None else by_path.arrays(params)
        if plan is not None:
            leaves = {path: shape_of(*shape) for path, shape in plan.shapes.items()}
        return cls(leaves, plan, rename)

    def _place(self, module: str) -> str:
        return self.rename(module) if self.rename else module.replace(".", "/")

    def weight(self, module: str) -> str:
        """The path of a module's weight."""
        place = self._place(module)
        # Without params, what rename gives is taken for the path of the weight itself.
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
        # ConvLoRA keeps its convolution, with the bias, in a submodule ``conv``.
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
        return paths.near(path, self.leaves or ())


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def shape_of(*shape: int) -> Any:
    """The ``jax.ShapeDtypeStruct`` of a float32 array of this shape."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Patterns:
    """An argument with one value for all paths, or values by pattern.

    Attributes:
      name: the argument's name.
      values: value by pattern; the first match wins.
      everywhere: whether there is one value for all paths.
    """

    name: str
    values: Mapping[Any, Any]
    everywhere: bool

    @classmethod
    def of(cls, name: str, said: Any) -> Patterns:
        """From the argument of `load` that has this name."""
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
        """The value for a path; None if none was given."""
        return next((v for p, v in self.values.items() if matches(p, path, x)), None)

    def check(self, leaves: Mapping[str, Any], layers: str) -> None:
        """Raises for a pattern that matches none of these leaves."""
        if self.values and not leaves:
            raise ValueError(
                f"{self.name}={self.values}: the file has no {layers} layer that could "
                "take it. Leave it out."
            )
        if not self.everywhere:
            check_matched(self.name, list(self.values), list(leaves.items()))
