"""Traces a function some of whose arguments are not arrays.

JAX traces arrays.  Booleans, strings, None, callables and modules have to reach the
function unchanged.  `hide` wraps them as pytrees without leaves; `show` unwraps them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jlora import _compat
from jlora._tree.variables import variables


@jax.tree_util.register_pytree_node_class
class _Static:
    """A value that is not an array, as a pytree without leaves.

    It is part of the tree's structure, so JAX's trace cache compares it.
    """

    def __init__(self, value: Any):
        self.value = value
        # Floats are compared by their bits: 0.0 is not -0.0, and NaN is itself.
        self._key = value.hex() if isinstance(value, float) else value
        self._hash: int | None = None
        with contextlib.suppress(TypeError):
            self._hash = hash(self._key)

    def tree_flatten(self) -> tuple[tuple[()], _Static]:
        return (), self

    @classmethod
    def tree_unflatten(cls, aux: _Static, _: Any) -> _Static:
        return aux

    def __hash__(self) -> int:
        return id(self) if self._hash is None else self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        if self._hash is None or other._hash is None:
            return self is other  # the value may have been changed in place
        return bool(self._key == other._key)


def is_array(x: Any) -> bool:
    """Whether x is an array, a tracer or a ``jax.ShapeDtypeStruct``."""
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind not in "OSUMm"
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct))


def hide(tree: Any) -> Any:
    """The tree with everything except arrays made static."""
    return jax.tree.map(lambda x: x if is_array(x) else _Static(x), tree)


def show(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: x.value if isinstance(x, _Static) else x,
        tree,
        is_leaf=lambda x: isinstance(x, _Static),
    )


def trace(fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The jaxpr of fn(*args, **kwargs) on hidden arguments, and its hidden output.

    It has no dead code: a lookup whose rows nobody reads is no use of a weight.

    The output is a pair: the output of ``fn``, and the new values of the `variables`
    that it wrote, by their position.  NNX's modules write counts of batches and of
    random keys, for example.
    """

    @functools.wraps(fn)  # for the names in JAX's errors
    def plain(args: Any, kwargs: Any) -> Any:
        args, kwargs = show(args), show(kwargs)
        held = variables((args, kwargs))
        before = [v.get_raw_value() for v in held]
        out = fn(*args, **kwargs)
        after = [v.get_raw_value() for v in held]
        if [*map(id, held)] != [*map(id, variables((args, kwargs)))]:
            raise ValueError(
                "the function makes or drops variables of an NNX module: expected it "
                "to write into those that are there. Make them before it is lifted, as "
                "with module.init_cache(shape)."
            )
        changed = (x is not y for x, y in zip(before, after, strict=True))
        return hide((out, {i: after[i] for i, c in enumerate(changed) if c}))

    jaxpr, out = jax.make_jaxpr(plain, return_shape=True)(args, kwargs)
    return _compat.without_dead_code(jaxpr), out
