"""Between adapted trees, plain params and adapters: merge, attach and their inverses.

Every function is a tree_map: nothing here knows about layers, and nothing is written
in place.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _qwix
from jlora._algebra.rows import replaces
from jlora._algebra.weight import dense
from jlora._leaf import Adapted, Full, LoRA, base, fields, is_adapted
from jlora._leaf.bank import as_in, refuse_bank
from jlora._leaf.fields import lacking, missing
from jlora._plan.plan import table
from jlora._tree import by_path, output_bias, paths, sharding
from jlora._tree.trace import is_array
from jlora._tree.variables import refuse_layers

Adapter = dict[str, Adapted]


def merge(
    tree: Any, *, requantize: bool = False, floats: Mapping[str, Any] | None = None
) -> Any:
    """Plain params with the deltas added: w + scale * a·b, rounded once to w's dtype.

    The sum is computed in float32 (float64 if a base or factor is float64).  A `Full`
    leaf gives its value in the base's dtype.  An output bias is added to the bias of
    the weight's layer.  A base that was dropped counts as zero.  Every result is
    sharded as its base is.  A quantised base gives a float weight, and so does a
    quantised array without an adapter.

    Args:
      tree: an adapted tree.
      requantize: whether the weight of a quantised base is quantised as that is.  This
        rounds it again.  The log says by how much, for each weight, and of its delta.
      floats: the float weights, by path, of bases that are codes (integers, or floats
        of 8 bits), which the function dequantises itself.  The result has the merged
        float weight there.

    Raises:
      ValueError: a leaf without its base; an output bias whose layer has no bias of the
        same shape; or a base of codes that ``floats`` does not have.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> lora = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> jlora.merge(lora)["kernel"].shape
      (3, 4)
    """
    given = dict(floats or {})
    lost: dict[str, tuple[float, float]] = {}

    def merged(path: str, leaf: Adapted) -> Any:
        if not isinstance(leaf, LoRA):
            # A copy, since a later step may donate the buffer of the value.
            return jnp.array(dense(leaf), copy=True)
        leaf = _decoded(path, leaf, given)
        new = sharding.like(leaf.w, dense)(leaf)
        if not (requantize and base.is_lossy(leaf.w)):
            return new
        rounded = _qwix.like(new, leaf.w)
        if base.is_concrete(new):
            lost[path] = _taken(new, rounded, leaf)
        return rounded

    def plain(x: Any) -> Any:
        return (
            x if requantize or not base.is_lossy(x) else sharding.like(x, base.array)(x)
        )

    out = _map_adapted(merged, tree, "merge", plain)
    if given:
        raise ValueError(
            f"merge: floats has {next(iter(given))!r}, which is no adapted leaf whose "
            "base is codes: expected the paths of such leaves only."
        )
    _report(lost)
    return _with_output_biases(out, tree, "merge")


def _decoded(path: str, leaf: LoRA, floats: dict[str, Any]) -> LoRA:
    """The leaf on its float weight, which is taken out of ``floats``."""
    if not base.is_coded(leaf.w):
        return leaf
    if path not in floats:
        raise ValueError(
            f"merge: {path!r} is {leaf.w.dtype}, which the function makes a weight of: "
            "the delta is added to that weight, not to the codes. Expected the float "
            f"weight: jlora.merge(tree, floats={{{path!r}: w}}), with w as "
            "the function computes it, such as codes.astype(jnp.float32) * scale; and "
            "call a function that takes it. Or lift the tree as it is."
        )
    w = floats.pop(path)
    if tuple(w.shape) != leaf.shape or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"merge: floats has {w.dtype} of shape {tuple(w.shape)} at {path!r}: "
            f"expected a float weight of shape {leaf.shape}."
        )
    return dataclasses.replace(leaf, w=w)


@jax.jit
def _taken(new: jax.Array, rounded: Any, leaf: LoRA) -> tuple[jax.Array, jax.Array]:
    """What rounding takes from a merged weight, of its norm and of its delta's."""
    wide = new.astype(jnp.float32)

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(x)))

    error = norm(base.array(rounded).astype(jnp.float32) - wide)
    moved = norm(wide - base.array(leaf.base).astype(jnp.float32))
    whole = norm(wide)
    return error / jnp.where(whole > 0, whole, 1), error / moved


def _report(lost: Mapping[str, tuple[Any, Any]]) -> None:
    """Logs what requantising took from each weight."""
    if not lost:
        return
    rows = []
    for path, (of_weight, of_delta) in jax.device_get(lost).items():
        if not of_weight < 1:
            raise ValueError(
                f"merge: {path!r} cannot be quantised again: its merged weight has NaN "
                "or infinities, or is lost in the rounding. Expected finite numbers: "
                "look at the adapter, or merge to floats."
            )
        delta = f"{100 * of_delta:.3g} %" if of_delta < 1e3 else "no delta"
        rows.append((path, f"{100 * of_weight:.3g} %", delta))
    logging.getLogger("jlora").warning(
        "merge: quantised again, which rounds each weight by so much:\n%s",
        table(("path", "of its norm", "of its delta's"), rows),
    )


def _with_output_biases(params: Any, adapter: Any, what: str, sign: int = 1) -> Any:
    """The params with an adapter's output biases added to the layers' biases."""
    leaves, old = (dict(by_path.flatten(tree)[0]) for tree in (params, adapter))
    weights = {path: x for path, x in old.items() if isinstance(x, LoRA)}
    found, homeless = output_bias.homes({**leaves, **weights})
    for path, why in homeless.items():
        raise ValueError(
            f"{what}: {path!r} has an output bias (lora_bias), but {why}, to take it. "
            "Lift the tree as it is, without merging it; or wrap a model whose layer "
            "has a bias of zeros, or this path with lora_bias=False."
        )

    def leaf(path: str, x: Any) -> Any:
        if path not in found:
            return x
        was = old.get(path)  # a Full value is not rounded yet, so it is rounded once
        whole = was if isinstance(was, Full) else x
        return output_bias.plus(whole, [weights[p] for p in found[path]], sign)

    return by_path.map_leaves(leaf, params) if found else params


def unwrap(tree: Any) -> Any:
    """Plain params without the deltas: the same base arrays that were wrapped.

    A base that was dropped gives a ``jax.ShapeDtypeStruct``, which is all that `attach`
    and ``checkpoint.restore`` need.

    Raises:
      ValueError: a leaf without its base.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> jlora.unwrap(jlora.wrap(params, rank=2))["kernel"] is params["kernel"]
      True
    """
    return _map_adapted(lambda _, leaf: base.plain(leaf.base), tree, "unwrap")


def _map_adapted(fn: Any, tree: Any, what: str, rest: Any = lambda x: x) -> Any:
    refuse_layers(tree, what)
    refuse_bank(tree, what)

    def leaf(path: str, x: Any) -> Any:
        if not is_adapted(x):
            return rest(x)
        if lacks := missing(x):
            raise ValueError(
                f"{what}: {path!r} has {', '.join(f'{name}=None' for name in lacks)}: "
                "expected a whole adapted tree. Put the base (w) back with "
                "jlora.attach(params, adapter), the halves of a partition together "
                "with jlora.combine(trainable, frozen); "
                "the variables of jlora.linen layers keep it apart: "
                "jlora.attach({'params': variables['params']}, "
                "jlora.linen.adapter(variables))."
            )
        return fn(path, x)

    return by_path.map_leaves(leaf, tree)


def adapter(tree: Any) -> Adapter:
    """The adapted leaves alone, without their bases: a flat dict from path to leaf.

    It has the same format for every framework, and serves for checkpoints, arithmetic
    and interchange.  Its leaves have ``w=None``, or a `Dropped` base if it was dropped,
    and no dropout keys.

    Raises:
      ValueError: no adapted leaf, or two with the same path.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> list(jlora.adapter(jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)))
      ['kernel']
    """
    out: Adapter = {}
    for path, x in by_path.flatten(tree)[0]:
        if not is_adapted(x):
            continue
        if path in out:
            raise ValueError(
                f"two adapted leaves have the path {path!r}: an adapter could not tell "
                "them apart. Rename one of them (a key may not hold '/')."
            )
        out[path] = fields.bare(x)
    if not out:
        refuse_layers(tree, "adapter")
        raise ValueError(
            "adapter: the tree has no adapted leaf: expected the result of jlora.wrap."
        )
    return as_in(tree, out)


def attach(params: Any, adapter: Adapter) -> Any:
    """Plain params with an adapter's leaves on them; the inverse of `adapter`.

    The adapter must fit: the tree has each of its paths, with an array of the same
    shape.

    Raises:
      ValueError: a path that the tree does not have (the error lists near paths, and
        the renaming if one of the two has a ``"params"`` level and the other does not);
        a leaf that lacks a, b or scale; a weight of another shape; a tree that is
        adapted already.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> t = jlora.attach(params, jlora.adapter(jlora.wrap(params, rank=2)))
      >>> t["kernel"].rank
      2
    """
    _fitting("attach", params, adapter)

    leaves = dict(by_path.flatten(params)[0])
    # A leaf of an adapter has a base only if that was dropped.  The layer's bias faded
    # with the base, so it is zero, too.
    gone = {
        paths.resolve(x.bias_path, path)
        for path, x in adapter.items()
        if isinstance(x, LoRA) and base.is_zero(x.w) and x.bias_path is not None
    }

    def leaf(path: str, x: Any) -> Any:
        if path not in adapter:
            return jnp.zeros_like(x) if path in gone and is_array(x) else x
        new = adapter[path]
        if isinstance(new, Full) and new.on is not None:
            value = jnp.where(new.on > 0, new.value, base.array(x))  # the wider dtype
            new = dataclasses.replace(new, value=value, on=None)
        if isinstance(new, LoRA) and new.bias_path is not None:
            # A loralib file does not tell which layers have a bias.
            if paths.resolve(new.bias_path, path) not in leaves:
                new = dataclasses.replace(new, bias_path=None)
        return new if base.is_zero(new.w) else dataclasses.replace(new, w=x)

    return by_path.map_leaves(leaf, params)


def unmerge(params: Any, adapter: Adapter) -> Any:
    """Merged params with an adapter's delta subtracted: w - scale * a·b.

    The result is inexact, since `merge` and `unmerge` both round to w's dtype.  The
    error is about one unit in the last place of the larger of w and the merged weight
    (2^-8 of it in bfloat16, 2^-24 in float32).  It does not grow when the same adapter
    is merged and unmerged again.  `unwrap` gives the exact base instead.

    Raises:
      ValueError: as in `attach`; or a leaf whose base is lost in the merge: `Full`,
        with a magnitude, or of rows that are replaced.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> float(jlora.unmerge(jlora.merge(t), jlora.adapter(t))["kernel"].max())
      1.0
    """
    _fitting("unmerge", params, adapter)

    def leaf(path: str, x: Any) -> Any:
        found = adapter.get(path)
        if found is not None and (how := _lost(found)):
            raise ValueError(
                f"unmerge: {path!r} {how}, so its base cannot be had back by "
                "subtraction: expected low-rank leaves only. Keep the base params, or "
                "use jlora.unwrap on the adapted tree."
            )
        if found is None:
            return x
        minus = dataclasses.replace(found, w=x, scale=-found.scale)
        return sharding.like(x, dense)(minus)

    merged = by_path.map_leaves(leaf, params)
    # An adapter has the paths of a tree, so it can be passed for one.
    return _with_output_biases(merged, adapter, "unmerge", sign=-1)


def _lost(leaf: Any) -> str:
    """How the merge loses the base of a leaf; empty if it does not."""
    if isinstance(leaf, Full):
        return "was trained whole"
    if leaf.m is not None:
        return "has a magnitude"
    return "replaces rows" if replaces(leaf) else ""


def _fitting(what: str, params: Any, adapter: Adapter) -> None:
    """Raises unless every leaf of the adapter fits an array of params."""
    refuse_bank(adapter, what)
    if not isinstance(adapter, dict) or not all(map(is_adapted, adapter.values())):
        found = type(adapter).__name__
        if isinstance(adapter, dict):
            other = next(x for x in adapter.values() if not is_adapted(x))
            found += f" of {type(other).__name__}"
        raise ValueError(
            f"{what}: expected an adapter (a flat dict from path to adapted leaf, as "
            f"jlora.adapter gives), found {found}. A checkpoint restored without a "
            "template has plain dicts: give Orbax jax.eval_shape(lambda: "
            "jlora.adapter(tree)), as in StandardRestore(template)."
        )
    leaves = dict(by_path.flatten(params)[0])
    for path, y in leaves.items():
        if is_adapted(y):
            raise ValueError(
                f"{what}: {path!r} is adapted already: expected plain params. Merge or "
                "unwrap the tree first (jlora.merge, jlora.unwrap); of variables of "
                "jlora.linen layers pass {'params': variables['params']}."
            )
    for path, x in adapter.items():
        if path not in leaves:
            raise ValueError(
                f"{what}: the adapter has {path!r}, which the tree has not; near "
                f"paths: {paths.near(path, leaves)}.{_renaming(adapter, leaves)}"
            )
        y = leaves[path]
        if lacks := lacking(x):
            raise ValueError(
                f"{what}: {path!r} of the adapter lacks {', '.join(lacks)}: expected "
                "a whole adapter; if it is half of a partition, combine it first."
            )
        if not (hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.floating)):
            found = getattr(y, "dtype", type(y).__name__)
            raise ValueError(
                f"{what}: {path!r} is {found} in the tree: expected a floating-point "
                "weight, as an adapter is made for."
            )
        if x.shape != tuple(y.shape):
            raise ValueError(
                f"{what}: {path!r} is an adapter for a weight of shape {x.shape}, "
                f"found {tuple(y.shape)}: it was made for another model."
            )
        if isinstance(x, LoRA):
            try:
                fields.check(x)
            except ValueError as e:
                raise ValueError(f"{what}: {path!r} {e}") from None


def _renaming(adapter: Adapter, leaves: Any) -> str:
    """Advice to add or remove a ``"params"`` level, if the adapter fits after that."""
    for new, line in (
        (lambda p: f"params/{p}", '{f"params/{k}": v for k, v in adapter.items()}'),
        (
            lambda p: p.removeprefix("params/"),
            '{k.removeprefix("params/"): v for k, v in adapter.items()}',
        ),
    ):
        if all(new(p) in leaves for p in adapter):
            return f" It fits after adapter = {line}."
    return ""
