"""Quantize: low-bit numbers in the place of weights, or of an adapted tree's bases."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jlora import _qwix
from jlora._init.eva import as_matrices, given, moment
from jlora._init.gptq import gptq
from jlora._init.matrices import Matrices
from jlora._leaf import LoRA, base, is_adapted
from jlora._leaf.forms import Misfit
from jlora._plan.from_tree import from_tree
from jlora._plan.plan import Plan, check, table
from jlora._plan.select import Wanted
from jlora._plan.spec import RANK
from jlora._printed import PrintedByPath
from jlora._tree import by_path, paths, sharding
from jlora._tree.patterns import Pattern, as_patterns, check_matched, matches
from jlora._tree.variables import opened, refuse_layers


def quantize(
    tree: Any,
    qtype: Any,
    *,
    plan: Plan | None = None,
    targets: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] = (),
    block: int | None = 64,
    moments: Mapping[str, Any] | None = None,
    donate: bool = False,
) -> Any:
    """The tree with its weights in low-bit numbers, as QLoRA's base (arXiv:2305.14314).

    A quantised weight is a ``qwix.QArray``: numbers of ``qtype``, and a scale for each
    ``block`` of them along the in axes, of each output.  `lift` dequantises it in each
    use, in the forward and in the backward pass, and keeps no dequantised copy; with
    and without an adapter on it.  An embedding has its blocks along the features.

    By default each number is rounded to the nearest.  With ``moments`` the inputs' rows
    of a weight are rounded one after another, and the error of each is made up for by
    those that follow, as well as they can for such inputs as were observed (GPTQ,
    arXiv:2210.17323).

    The leaves are quantised one after another.  On a mesh every device quantises its
    own shards; with moments, a whole weight.  ``jax.ShapeDtypeStruct``s give shapes.
    In a function that is traced NaN and infinities raise nothing.

    Args:
      tree: plain params, of which the weights are quantised; or an adapted tree, of
        which the bases below `LoRA` leaves are.
      qtype: "int8", "int4", "nf4", "float8_e4m3fn" or another that qwix has, or a dtype
        such as jnp.int8.
      plan: tells the roles of the weights' axes, and which are quantised: those that it
        adapts.  Without one, they are told as in `wrap`.
      targets: patterns of the paths to quantise, as in `plan`; None for all.
      exclude: patterns of paths that stay as they are.
      block: how many numbers share a scale; None for all along the in axes.
      moments: the second moments of what enters each weight, as `jlora.observe` gives
        them.  An embedding, which is looked up, has none and needs none.
      donate: whether to free each float array once it is quantised.  Then a model needs
        no more memory than its floats and one quantised leaf; the tree that was passed
        cannot be used any more, also where a later weight has no scales and raises.

    Returns:
      A tree of the same structure.  A quantised leaf has the shape and dtype that it
      had.

    Raises:
      ValueError: no such qtype; a target that is no floating-point weight, or quantised
        already; a block that does not divide the in axes, or a device's shard of them;
        a pattern that matches nothing; nothing to quantise; a weight without moments; a
        weight that was donated before.
      TypeError: moments that are none; a flag that is no boolean.
      ImportError: qwix is not installed (pip install "jlora[quant]").

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((128, 4)), "bias": jnp.ones(4)}}
      >>> jlora.quantize(params, "nf4")["dense"]["kernel"]  # doctest: +SKIP
      QArray(float32[128,4], nf4 in blocks of 64)
    """
    refuse_layers(tree, "quantize")
    if not isinstance(donate, bool):
        raise TypeError(f"quantize: donate {donate!r}: expected True or False.")
    if isinstance(targets, (list, tuple)) and not targets:
        raise ValueError(
            "quantize: targets is empty: expected patterns of the paths to quantise, "
            "or None for all."
        )
    qtype = _qwix.qtype_named(qtype)
    _qwix.check_block(block, qtype, "quantize")
    _qwix.qwix()
    axes = _axes(tree, plan, targets, exclude)
    leaves = dict(by_path.flatten(opened(tree))[0])
    tiles = _tiled(leaves, axes, block)
    own = _moments_of(moments, axes)
    for path in tiles:  # before the first of them is given up
        w = _base(leaves[path])
        _require_finite(path, w)
        if path in own:
            _require_fitting(path, w, axes[path][0], own[path])
    uses = collections.Counter(id(_base(x)) for x in leaves.values())

    def leaf(path: str, x: Any) -> Any:
        w = _base(x)
        if path not in tiles or not w.size:
            return x
        new = _quantized(w, qtype, tiles[path], axes[path][0], own.get(path))
        _require_scales(path, w, new)
        uses[id(w)] -= 1
        known = isinstance(w, jax.Array) and base.is_concrete(w)
        if donate and known and not uses[id(w)]:
            jax.block_until_ready(new)
            w.delete()
        return dataclasses.replace(x, w=new) if is_adapted(x) else new

    return by_path.map_leaves(leaf, opened(tree))


def _moments_of(
    moments: Mapping[str, Any] | None, axes: Mapping[str, tuple[str, bool]]
) -> dict[str, Any]:
    """The moments of each weight to quantise; of an embedding none."""
    if moments is None:
        return {}
    given(moments, "quantize")
    advice = "Observe with the plan that quantize gets, or exclude the path."
    return {
        path: moment(moments, path, "quantize", advice)
        for path, (_, embeds) in axes.items()
        if not embeds
    }


def _quantized(
    w: Any, qtype: str, tiles: tuple[int, ...], roles: str, moments: Any
) -> Any:
    """One weight in low-bit numbers, by its own moments or to the nearest."""
    if moments is None:
        return _qwix.quantized(w, qtype, tiles)
    return gptq(w, qtype, tiles, roles, moments, "quantize")


def _require_fitting(path: str, w: Any, roles: str, moments: Any) -> None:
    """Raises if a weight's moments are those of another."""
    try:
        as_matrices(moments, Matrices(tuple(w.shape), roles), "quantize")
    except Misfit as e:
        raise ValueError(
            f"quantize: {path!r} is a weight of shape {tuple(w.shape)}: expected {e}."
        ) from None


def _require_finite(path: str, w: Any) -> None:
    """Raises if a weight has numbers that are none."""
    with jax.ensure_compile_time_eval():
        bad = base.is_concrete(w) and not _finite(w)
    if bad:
        raise ValueError(
            f"quantize: {path!r} has NaN or infinities: expected finite numbers. "
            "Exclude the path."
        )


@jax.jit
def _finite(w: jax.Array) -> jax.Array:
    return jnp.isfinite(w).all()


def _require_scales(path: str, w: Any, new: Any) -> None:
    """Raises if a block's scale cannot hold what it should."""
    if base.is_concrete((w, new)) and _underflows(w, new):
        raise ValueError(
            f"quantize: {path!r} has numbers whose block has no scale in {new.dtype}, "
            "which is too narrow for them: expected larger numbers. Pass the weight in "
            "float32 or bfloat16, take another qtype, or exclude the path."
        )


@jax.jit
def _underflows(w: jax.Array, new: Any) -> jax.Array:
    """Whether a block has a scale with fewer than six bits; or all numbers are lost."""
    least = 64 * jnp.finfo(new.scale.dtype).smallest_subnormal
    lost = (base.array(new) == 0).all() & (w != 0).any()
    return lost | ~(abs(new.scale) >= least).all()


def _axes(
    tree: Any, plan: Plan | None, targets: Any, exclude: Any
) -> dict[str, tuple[str, bool]]:
    """The roles of each weight to quantise, and whether it is an embedding; by path.

    Raises:
      ValueError: see `quantize`.
    """
    pairs = by_path.flatten(opened(tree))[0]
    wanted, unwanted = as_patterns(targets), as_patterns(exclude)
    check_matched("target", wanted, pairs)
    check_matched("exclude", unwanted, pairs)
    adapted = any(is_adapted(x) for _, x in pairs)
    own = _of_adapted(pairs) if adapted else _of_plain(tree, plan, targets, exclude)

    def asked(path: str, x: Any) -> bool:
        if any(matches(p, path, x) for p in unwanted):
            return False
        return not wanted or any(matches(p, path, x) for p in wanted)

    found = {}
    for path, x in pairs:
        if not asked(path, x):
            continue
        if wanted or path in own:
            _check_leaf(path, x)
        if path in own:
            found[path] = own[path]
        elif wanted:
            raise ValueError(
                f"quantize: {path!r} is a target, but it is no weight whose roles are "
                "known: expected a weight of the plan, or one that its layer's class "
                "or its name tells. Plan it from the function that uses it: "
                f"jlora.plan(fn, params, *args, targets=[{path!r}, ...])."
            )
    if not found:
        raise ValueError(
            "quantize: nothing to quantise: expected a weight that is planned or "
            f"adapted, found none among the {len(pairs)} leaves that targets and "
            "exclude leave."
        )
    return found


def _check_leaf(path: str, x: Any) -> None:
    """Raises for a leaf that cannot be quantised."""
    w = _base(x)
    if (own := base.seen(w)) is not None:
        what = own.remark() or f"a {type(w).__name__}"
        raise ValueError(
            f"quantize: {path!r} is {what} already: expected a float array. Quantise "
            "the float params, or exclude this path."
        )
    if isinstance(w, jax.Array) and base.is_concrete(w) and w.is_deleted():
        raise ValueError(
            f"quantize: {path!r} was freed, as donate=True does: expected an array. "
            "Use the quantised tree that came of it, or load the floats again."
        )
    dtype = getattr(w, "dtype", jnp.dtype(int))
    if w is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        found = "nothing" if w is None else f"{getattr(w, 'dtype', type(w).__name__)}"
        raise ValueError(
            f"quantize: {path!r} is {found}: expected a floating-point array of 16 "
            "bits at least. Exclude the path."
        )


def _of_adapted(pairs: Iterable[tuple[str, Any]]) -> dict[str, tuple[str, bool]]:
    """The roles of the adapted leaves."""
    leaves = {path: x for path, x in pairs if isinstance(x, LoRA)}
    return {p: (x.axes, x.layer.startswith("embed")) for p, x in leaves.items()}


def _of_plain(
    tree: Any, plan: Plan | None, targets: Any, exclude: Any
) -> dict[str, tuple[str, bool]]:
    """The roles of the weights of plain params, from a plan or from the tree itself."""
    leaves = by_path.arrays(opened(tree))
    if plan is not None:
        check(plan, leaves, "quantize", None, (), ())
    else:
        asked = Wanted.of(RANK, None, targets, exclude, ())
        plan = from_tree(tree, leaves, asked)
    return {path: (spec.axes, spec.kind == "embed") for path, spec in plan.items()}


def _tiled(
    leaves: Mapping[str, Any], axes: Mapping[str, tuple[str, bool]], block: int | None
) -> dict[str, tuple[int, ...]]:
    """How many numbers share a scale along each axis of each weight.

    Raises:
      ValueError: for all weights that the blocks do not divide.
    """
    tiles, left = {}, []
    for path, (roles, embeds) in axes.items():
        w = _base(leaves[path])
        along = _qwix.along(roles, embeds)
        own = _qwix.tiles_of(w.shape, along, block)
        why = f"{path!r}: {_words(w.shape, along)}" if own is None else None
        if own is not None:
            why = _across(path, w, own)
            tiles[path] = own
        if why:
            left.append(why)
    if left:
        more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
        raise ValueError(
            f"quantize: blocks of {block} do not divide {'; '.join(left[:5])}{more}. "
            "Pass a block that does, or block=None for one scale for each output; or "
            "exclude these paths."
        )
    return tiles


def _words(shape: tuple[int, ...], along: list[int]) -> str:
    sizes = " × ".join(str(shape[k]) for k in along)
    return f"its in axes of {sizes}"


def _across(path: str, w: Any, tiles: tuple[int, ...]) -> str | None:
    """What is wrong if a block would lie across two devices."""
    place = sharding.of_array(w)
    if not isinstance(place, NamedSharding):
        return None
    shard = place.shard_shape(tuple(w.shape))
    for k, (n, own, tile) in enumerate(zip(w.shape, shard, tiles, strict=True)):
        if tile < n and own % tile:
            return f"{path!r}: a device's shard, {own} of the {n} along axis {k}"
    return None


@dataclasses.dataclass(frozen=True, repr=False)
class Rounding(PrintedByPath[float]):
    """Path to ‖after - before‖ / ‖before‖ of each quantised weight; printable.

    Attributes:
      found: path to the relative error, in the Frobenius norm.
    """

    found: Mapping[str, float]

    def __str__(self) -> str:
        rows = [(path, f"{100 * error:.3g} %") for path, error in self.items()]
        return table(("path", "error"), rows)


def rounding(before: Any, after: Any) -> Rounding:
    """What quantising took from each weight, relative to its norm.

    Args:
      before: the params in floats, plain or adapted.
      after: the same tree with quantised weights or bases.

    Raises:
      ValueError: ``after`` has no quantised weight, or one that is not in ``before``.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.linspace(-1, 1, 256).reshape(64, 4)}
      >>> print(jlora.rounding(params, jlora.quantize(params, "int8")))
      path    error
      ---------------
      kernel  0.553 %
    """
    floats = {path: _base(x) for path, x in by_path.flatten(opened(before))[0]}
    found = {}
    for path, x in by_path.flatten(opened(after))[0]:
        w = _base(x)
        if not base.is_lossy(w):
            continue
        if path not in floats:
            raise ValueError(
                f"rounding: {path!r} is quantised in after, and before has no such "
                f"path: expected the same tree; near paths: {paths.near(path, floats)}."
            )
        x = floats[path]
        if tuple(x.shape) != tuple(w.shape) or not base.is_concrete(x):
            raise ValueError(
                f"rounding: {path!r} is of shape {tuple(x.shape)} before: expected an "
                f"array of shape {tuple(w.shape)}, as after."
            )
        found[path] = float(_relative(x, w))
    if not found:
        raise ValueError(
            "rounding: after has no quantised weight: expected the params in floats, "
            "then the same tree as jlora.quantize gave it."
        )
    return Rounding(found)


def _base(x: Any) -> Any:
    return x.w if is_adapted(x) else x


@jax.jit
def _relative(x: Any, y: Any) -> jax.Array:
    x, y = (base.array(w).astype(jnp.float32) for w in (x, y))
    largest = abs(x).max()  # so that no square overflows
    x, y = (z / jnp.where(largest > 0, largest, 1) for z in (x, y))
    of = jnp.sum(jnp.square(x))
    return jnp.sqrt(jnp.sum(jnp.square(y - x)) / jnp.where(of > 0, of, 1))
