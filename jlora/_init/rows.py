"""Rows of a table that train as replacements: which they are, and how they start."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._explicit import automatic
from jlora._leaf import LoRA, Note, Told, base
from jlora._leaf.forms import Rows
from jlora._tree import sharding
from jlora._tree.patterns import check_matched, matches


def chosen(train_rows: Any, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The indices of the rows that train, by path.

    Args:
      train_rows: indices by pattern, as `jlora.wrap` takes them; None for none.
      leaves: the arrays of the tree, by path.

    Raises:
      TypeError: no mapping; indices that are no integers.
      ValueError: a pattern that matches no path; a leaf that is no table; two patterns
        for one path; an index that is negative, too large or there twice.
    """
    if train_rows is None:
        return {}
    if not isinstance(train_rows, Mapping):
        raise TypeError(
            f"wrap: train_rows is a {type(train_rows).__name__}: expected indices by "
            'pattern, such as {"**/embedding": [7, 42]}.'
        )
    check_matched("train_rows", train_rows, list(leaves.items()))
    found: dict[str, tuple[int, ...]] = {}
    for pattern, indices in train_rows.items():
        for path, x in leaves.items():
            if not matches(pattern, path, x):
                continue
            if path in found:
                raise ValueError(
                    f"wrap: train_rows names {path!r} twice: expected one pattern that "
                    "matches it, with all of its rows."
                )
            found[path] = _checked(path, x, indices)
    return found


def _checked(path: str, x: Any, indices: Any) -> tuple[int, ...]:
    """The indices; raises if they are not different rows of the table."""
    where = f"wrap: train_rows of {path!r}"
    if len(x.shape) < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{where}: it is {x.dtype} of shape {tuple(x.shape)}: expected a table of "
            "floating-point numbers, (rows, features). What is no table trains whole: "
            "train=."
        )
    own = np.asarray(indices)
    if own.ndim != 1 or not own.size or own.dtype.kind not in "iu":
        raise TypeError(
            f"{where}: {indices!r}: expected one or more integers, the indices of the "
            "rows."
        )
    n = x.shape[0]
    wrong = own[(own < 0) | (own >= n)]
    if wrong.size:
        raise ValueError(
            f"{where}: {_some(wrong)}: expected indices from 0 to {n - 1}, as it has "
            f"{n:,} rows. New rows are added to the table first, before it is wrapped."
        )
    values, counts = np.unique(own, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{where}: {_some(values[counts > 1])} more than once: expected each row "
            "once."
        )
    return tuple(map(int, own))


def _some(indices: np.ndarray) -> str:
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return ", ".join(map(str, indices[:5])) + more


def make_rows(w: Any, indices: Sequence[int], dtype: Any) -> LoRA:
    """A leaf that replaces rows of a table, at first by themselves.

    Args:
      w: the table, (rows, *features).
      indices: which rows; they are along the first axis.
      dtype: the dtype of the rows that train.
    """
    n = len(w.shape)
    form = Rows(tuple(indices), w.shape[0])
    axes = "i" + "o" * (n - 1)
    wide = jnp.promote_types(w.dtype, jnp.float32)
    b = jax.ShapeDtypeStruct(form.shapes(tuple(w.shape), axes, 0)[1], dtype)
    scale = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(wide))
    told = Told("embedding")
    leaf = LoRA(
        w, None, b, scale, roles=axes, form=form, told=told, layer=Note("embed")
    )
    place = sharding.of_array(w)
    own = sharding.of_fields(leaf, place)
    if base.is_abstract(w):
        made = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
            for x, at in ((b, own.b), (scale, own.scale))
        ]
        return dataclasses.replace(leaf, b=made[0], scale=made[1])

    def fields(w: Any) -> tuple[jax.Array, jax.Array]:
        rows = base.use(w, functools.partial(form.take, axis=0))
        return rows.astype(dtype), jnp.ones((), scale.dtype)

    def placed(w: Any) -> tuple[jax.Array, jax.Array]:
        return automatic(fields, lambda: (own.b, own.scale), w)

    if place is not None and not isinstance(w, jax.core.Tracer):
        placed = jax.jit(placed, out_shardings=(own.b, own.scale))
    rows, one = placed(w)
    return dataclasses.replace(leaf, b=rows, scale=one)
