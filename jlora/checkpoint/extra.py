"""``extra``: any pytree that is saved beside an adapter, and how it is restored.

Its arrays are stored as arrays, PRNG keys by their words, and numbers, strings and
booleans in the document.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoint.document import require_same, signature

# Dtypes that Orbax cannot write.
_UNSTORED = frozenset("uint4 int2 uint2 int1 uint1".split())


@dataclasses.dataclass(frozen=True)
class Extra:
    """The leaves of ``extra``, by key path.

    Attributes:
      arrays: what is stored as arrays.
      values: numbers, strings and booleans.
      keys: shape, dtype and implementation of the arrays that are PRNG keys.
    """

    arrays: dict[str, Any]
    values: dict[str, Any]
    keys: dict[str, Any]

    @classmethod
    def of(cls, extra: Any) -> Extra:
        """The leaves of a pytree.

        Raises:
          TypeError: a leaf that cannot be stored.
        """
        found = cls({}, {}, {})
        for path, x in leaves(extra):
            if (python := _python(x)) is not None:
                found.values[path] = python(x)
                continue
            if not _storable(x):
                raise TypeError(
                    f"checkpoint.save: extra has a "
                    f"{getattr(x, 'dtype', type(x).__name__)} at {path!r}: expected "
                    "arrays of numbers, PRNG keys, numbers, strings and booleans."
                )
            found.arrays[path] = x
            if is_key(x):
                impl = jax.random.key_impl(cast(jax.Array, x))
                found.keys[path] = [*signature(x), str(impl)]
        return found


def leaves(extra: Any) -> list[tuple[str, Any]]:
    """(key path, leaf) pairs."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(extra)
    return [(jax.tree_util.keystr(keys), x) for keys, x in pairs]


def is_key(x: Any) -> bool:
    """Whether an array holds PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _storable(x: Any) -> bool:
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return False
    return is_key(x) or not (
        np.dtype(x.dtype).kind in "OSUMm" or x.dtype.name in _UNSTORED
    )


def _python(x: Any) -> type | None:
    """The JSON type of a Python number, string or boolean; None for all else."""
    # Most scalars of numpy are stored as arrays; some would pass for a Python float.
    if isinstance(x, np.generic):
        return str if isinstance(x, np.str_) else None
    # A bool is an int as well, so it comes first.
    return next((t for t in (bool, int, float, str) if isinstance(x, t)), None)


def require_structure(
    path: Any, document: dict[str, Any], extra: Any
) -> dict[str, Any]:
    """The leaves of a template by key path; they must be those that were saved.

    Raises:
      ValueError: a path differs; the error names the first.
    """
    templates = dict(leaves(extra))
    want = {p: s[:2] for p, s in document["arrays"]["extra"].items()}
    want |= {p: type(v).__name__ for p, v in document["values"].items()}
    # The arrays of keys are their words; a template has the keys themselves.
    want |= {p: s[:2] for p, s in document["keys"].items()}
    have = {p: _template_signature(x, want.get(p)) for p, x in templates.items()}
    require_same(
        f"checkpoint.restore: the extra of {path} has another structure",
        want,
        have,
        "Pass a pytree of the structure that was saved.",
    )
    return templates


def _template_signature(x: Any, stored: Any) -> Any:
    """A template's signature; a number is a scalar array if that is what was stored."""
    python = _python(x)
    if python is not None:
        scalar = isinstance(stored, list) and stored[0] == []
        dtypes = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating}
        if scalar and python in dtypes and jnp.issubdtype(stored[1], dtypes[python]):
            return stored
        return python.__name__
    if not hasattr(x, "dtype"):
        return type(x).__name__
    if isinstance(x, (np.ndarray, np.generic)):
        # Arrays are stored in the machine's byte order.
        x = np.empty(x.shape, x.dtype.newbyteorder("="))
    return signature(x)


def restored(
    extra: Any,
    document: dict[str, Any],
    templates: dict[str, Any],
    read: dict[str, Any],
) -> Any:
    """A pytree like ``extra``, with the values that were saved.

    Args:
      extra: the template.
      document: the checkpoint's document.
      templates: its leaves by key path.
      read: the arrays that were read, by key path.
    """
    found = {**document["values"]}
    for p, x in read.items():
        *_, impl = document["keys"].get(p, [None])
        found[p] = _as_template(x, templates[p], impl, p)
    flat, treedef = jax.tree_util.tree_flatten_with_path(extra)
    return jax.tree.unflatten(
        treedef, [found[jax.tree_util.keystr(keys)] for keys, _ in flat]
    )


def _as_template(x: Any, template: Any, impl: str | None, p: str) -> Any:
    """A stored array as what the template is: keys, a number, or an array."""
    if impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    if not hasattr(template, "dtype"):
        return type(template)(x)
    if isinstance(template, np.generic):
        return x[()]
    return x if isinstance(template, np.ndarray) else as_jax(x, p)


def as_jax(x: Any, where: str) -> jax.Array:
    """An array that was read, as one of JAX's; without a sharding JAX may move it."""
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise ValueError(
            f"checkpoint.restore: {where!r} was saved as {x.dtype}, which JAX would "
            "narrow here: expected jax.config.update('jax_enable_x64', True), as when "
            "it was saved."
        )
    return jnp.asarray(x)
