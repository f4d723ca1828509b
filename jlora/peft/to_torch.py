"""From adapted leaves to modules of torch: each weight's factors, cut into its parts.

A weight that is one tensor gives its factors as they are.  If it is several tensors
(a stack of layers, a fused projection), each gets a cut of them: the rows of a and the
columns of b that are its own.  If several weights are one tensor, their ranks add up.
Nothing is rounded, unless weights of one tensor have different scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jlora._algebra.delta import low_rank
from jlora._leaf import LoRA
from jlora.peft.modules import Module
from jlora.peft.names import Names, Part, from_matrix, matrix, sizes
from jlora.peft.order import Order


@dataclasses.dataclass(frozen=True)
class Layer:
    """The adapter of one matrix of a weight: one layer of a stack, or the only one.

    Attributes:
      a: (in, r).
      b: (r, out).
      scale: a number.
      c: (out,) or None.
      m: (out,) or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    c: np.ndarray | None
    m: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one weight gives to one tensor.

    Attributes:
      path: the weight's path.
      part: where it goes.
      layer: its factors, with the rows and columns of the part alone.
    """

    path: str
    part: Part
    layer: Layer


def promoted(*dtypes: Any) -> Any:
    """The dtype that holds all of these, as JAX has it."""
    out = dtypes[0]
    for own in dtypes[1:]:
        out = jnp.promote_types(out, own)
    return jnp.dtype(out)


def host(x: Any) -> np.ndarray:
    """An array on the host; one that several processes share is gathered."""
    if hasattr(x, "is_fully_addressable") and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def layers_of(leaf: LoRA) -> Iterator[tuple[tuple[int, ...], Layer]]:
    """The index along the batch axes, and the factors, of each matrix of a leaf.

    Raises:
      NotFactored: the leaf's form is no product of two matrices.
    """
    axes = leaf.axes
    shape = leaf.shape
    plain = leaf if leaf.form is None else low_rank(leaf)
    n = axes.count("b")
    batch = [size for size, role in zip(shape, axes, strict=True) if role == "b"]
    a, b, scale = (host(x) for x in (plain.a, plain.b, plain.scale))
    c, m = (None if x is None else host(x) for x in (leaf.c, leaf.m))
    a = a.reshape(*a.shape[:n], -1, a.shape[-1])
    b = b.reshape(*b.shape[: n + 1], -1)
    for at in np.ndindex(*batch):
        own = [None if x is None else x[at].reshape(-1) for x in (c, m)]
        yield tuple(map(int, at)), Layer(a[at], b[at], float(scale[at]), *own)


def pieces(path: str, leaf: LoRA, parts: Sequence[Part]) -> list[Piece]:
    """What a weight gives to each of its tensors.

    A tensor gets no part of a rank that is another tensor's alone, if every rank is one
    tensor's alone and they come in the order of the tensors; and no rank that only pads
    its layer to the size of the stack's.
    """
    layers = dict(layers_of(leaf))
    by: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        by.setdefault(part.at, []).append(part)
    used = {at: _used(layer) for at, layer in layers.items()}
    rank = next(iter(layers.values())).a.shape[1]
    full = max(used.values(), default=0) == rank
    trains_more = leaf.c is not None or leaf.m is not None
    owners = _owners(layers, by) if _aligned(by) and not trains_more else None
    found = []
    for at, own in by.items():
        layer = layers[at]
        top = used[at] if full else rank
        top = max(top, 1) if trains_more else top  # a bias or a magnitude is its own
        for k, part in enumerate(own):
            ranks = range(top)
            if owners is not None:
                ranks = range(min(owners[k], top), min(owners[k + 1], top))
            if len(ranks):
                found.append(Piece(path, part, _cut(path, layer, own, k, ranks)))
    return found


def _cut(
    path: str, layer: Layer, own_parts: Sequence[Part], k: int, ranks: range
) -> Layer:
    part = own_parts[k]
    twice = any(
        np.intersect1d(part.columns.positions, other.columns.positions).size
        for other in own_parts
        if other is not part
    )
    left = np.delete(layer.a, part.rows.positions, 0)
    if (twice and layer.c is not None) or (
        layer.m is not None and (twice or left.any())
    ):
        raise ValueError(
            f"peft.save: {path!r} has a magnitude or an output bias, and "
            f"{part.tensor!r} has some of its inputs only: expected plain factors."
        )
    own = slice(ranks.start, ranks.stop)
    rows, columns = part.rows.positions, part.columns.positions
    vectors = [None if x is None else x[columns] for x in (layer.c, layer.m)]
    a, b = layer.a[rows, own], layer.b[own][:, columns]
    return Layer(a, b, layer.scale, *vectors)


def _used(layer: Layer) -> int:
    """How many ranks there are without those at the end that are zero in both."""
    live = np.any(layer.a != 0, 0) | np.any(layer.b != 0, 1)
    return int(np.flatnonzero(live)[-1]) + 1 if live.any() else 0


def _aligned(by: Mapping[tuple[int, ...], Sequence[Part]]) -> bool:
    """Whether every layer has as many parts, of the same columns."""
    cuts = [[p.columns for p in own] for own in by.values()]
    return len(cuts[0]) > 1 and all(x == cuts[0] for x in cuts)


def _owners(layers: Any, by: Any) -> list[int] | None:
    """Where the ranks of each part start, if each rank is one part's alone."""
    first: Sequence[Part] = next(iter(by.values()))
    live = np.zeros((len(first), next(iter(layers.values())).b.shape[0]), bool)
    for at in by:
        for k, part in enumerate(first):
            live[k] |= np.any(layers[at].b[:, part.columns.positions] != 0, 1)
    of = [np.flatnonzero(column) for column in live.T]
    if any(len(x) > 1 for x in of) or not any(len(x) for x in of):
        return None
    # A rank that is zero everywhere belongs to the part of the rank before it.
    owner, last = [], next(int(x[0]) for x in of if len(x))
    for x in of:
        last = int(x[0]) if len(x) else last
        owner.append(last)
    if owner != sorted(owner):
        return None
    return [sum(o < k for o in owner) for k in range(len(first) + 1)]


# ----------------------------------------------------------------- pieces of one tensor


@dataclasses.dataclass(frozen=True)
class Joined:
    """The modules of an adapter, and what `load` needs to take them apart again.

    Attributes:
      modules: by tensor.
      ranks: for tensors to which several weights gave ranks: which are whose, as (path,
        index along its batch axes, along those of the tensor, start, stop).
      filled: tensors that have a bias of zeros, since others have one.
    """

    modules: dict[str, Module]
    ranks: dict[str, list[Any]]
    filled: list[str]


def joined(found: Sequence[Piece], names: Names) -> Joined:
    """The modules from all pieces.

    Raises:
      ValueError: a magnitude for a part of a tensor only, or for some weights only.
    """
    by: dict[str, list[Piece]] = {}
    for piece in found:
        by.setdefault(piece.part.tensor, []).append(piece)
    with_m = {p.path for p in found if p.layer.m is not None}
    if with_m and (rest := [p.path for p in found if p.path not in with_m]):
        raise ValueError(
            f"peft.save: {min(with_m)!r} has a magnitude (dora) and {rest[0]!r} has "
            "none: peft has use_dora for all modules or for none. Save them as two "
            "adapters, or extract plain ones: jlora.extract(params, "
            "jlora.merge(tree), rank=...)."
        )
    biased = any(p.layer.c is not None for p in found)
    modules, ranks, filled = {}, {}, []
    for tensor, own in by.items():
        module, spans = _module(tensor, own, names)
        if biased and module.c is None:
            filled.append(tensor)
            zeros = np.zeros(module.b.shape[-1], module.b.dtype)
            module = dataclasses.replace(module, c=zeros)
        modules[tensor] = module
        if len({tuple(span[3:]) for span in spans}) > 1:
            ranks[tensor] = spans
    return Joined(modules, ranks, filled)


def sizes_of(tensor: str, parts: Sequence[Part], names: Names) -> tuple[int, int, int]:
    """The number of items, rows and columns of a tensor's matrices."""
    shape = names.tensors.get(tensor)
    if shape is not None and len(shape) == len(parts[0].tensor_axes):
        items, rows, columns = map(math.prod, sizes(shape, parts[0].tensor_axes))
        return items, rows, columns

    def most(orders: Sequence[Order]) -> int:
        return int(max(o.positions.max() for o in orders)) + 1

    items = max((p.item[0] + 1 for p in parts if p.item), default=1)
    rows = most([p.tensor_rows for p in parts])
    return items, rows, most([p.tensor_columns for p in parts])


def _module(
    tensor: str, own: Sequence[Piece], names: Names
) -> tuple[Module, list[Any]]:
    """One module from all that gives to its tensor, and whose ranks are which."""
    part = own[0].part
    parts = [p for x in {q.path for q in own} for p in names[x] if p.tensor == tensor]
    items, rows, columns = sizes_of(tensor, parts, names)
    by: dict[tuple[int, ...], list[Piece]] = {}
    for piece in own:
        by.setdefault(piece.part.item, []).append(piece)
    # One scale for all; that of a weight which is turned off would lose the others.
    scale = next((p.layer.scale for p in own if p.layer.scale), 0.0)
    layers, spans = {}, []
    for item, these in by.items():
        layers[item], own_spans = _one(tensor, these, rows, columns, scale)
        spans += own_spans
    name, kind = part.module, _kind(part)
    if kind == "experts":
        rank = max(x.a.shape[1] for x in layers.values())
        a = np.zeros((items, rows, rank), layers[part.item].a.dtype)
        b = np.zeros((items, rank, columns), layers[part.item].b.dtype)
        for item, x in layers.items():
            a[item[0], :, : x.a.shape[1]] = x.a
            b[item[0], : x.b.shape[0]] = x.b
        if any(x.c is not None or x.m is not None for x in layers.values()):
            raise ValueError(
                f"peft.save: {own[0].path!r} has a magnitude or an output bias, which "
                f"peft has not for experts ({tensor!r}): expected plain factors."
            )
        return Module(name, tensor, kind, a, b, scale), spans
    (layer,) = layers.values()
    kernel = _window(part, names, own[0])
    module = Module(
        name,
        tensor,
        kind,
        layer.a,
        layer.b,
        scale,
        layer.c,
        layer.m,
        kernel,
        part.groups if kind == "conv" else 1,
    )
    return module, spans


def _kind(part: Part) -> str:
    if "b" in part.tensor_axes:
        return "experts"
    if len(part.tensor_axes) > 2:
        return "conv"
    return "embedding" if part.kind == "embed" else "linear"


def _window(part: Part, names: Names, piece: Piece) -> tuple[int, ...]:
    """The sizes of a convolution's window, along the tensor's last axes."""
    if _kind(part) != "conv":
        return ()
    if part.window:
        return part.window
    shape = names.tensors.get(part.tensor)
    if shape is None:
        raise ValueError(
            f"peft.save: {piece.path!r} is a convolution, and names do not have the "
            f"shape of {part.tensor!r}: take them from jlora.peft.match(params, base)."
        )
    return tuple(shape[2:])


def _one(
    tensor: str, own: Sequence[Piece], rows: int, columns: int, scale: float
) -> tuple[Layer, list[Any]]:
    """The factors of one matrix of a tensor from the pieces of several weights.

    Pieces with the same a share its ranks; the ranks of others add up.
    """
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # a, b, its columns
    chosen: list[int] = []
    c: np.ndarray | None = None
    m: np.ndarray | None = None
    covered = np.zeros(columns, bool)
    _check_apart(tensor, own)
    for piece in own:
        x, part = piece.layer, piece.part
        at_rows, at = part.tensor_rows.positions, part.tensor_columns.positions
        a = np.zeros((rows, x.a.shape[1]), x.a.dtype)
        a[at_rows] = x.a
        b = np.zeros((x.b.shape[0], columns), x.b.dtype)
        b[:, at] = _rescaled(x.b, x.scale, scale)
        hot = np.zeros(columns, bool)
        hot[at] = True
        k = next(
            (
                k
                for k, (other, _, taken) in enumerate(blocks)
                if _equal(other, a) and not (taken & hot).any()
            ),
            len(blocks),
        )
        if k == len(blocks):
            blocks.append((a, b, hot))
        else:
            wide = promoted(blocks[k][1].dtype, b.dtype)
            both = blocks[k][1].astype(wide) + b.astype(wide)
            blocks[k] = a, both, blocks[k][2] | hot
        chosen.append(k)
        covered[at] = True
        if x.c is not None:
            c = np.zeros(columns, x.c.dtype) if c is None else c
            c[at] = _rescaled(x.c, x.scale, scale)
        if x.m is not None:
            m = np.zeros(columns, x.m.dtype) if m is None else m
            m[at] = x.m
    if m is not None and not (covered.all() and len(own[0].part.rows) == rows):
        raise ValueError(
            f"peft.save: {own[0].path!r} has a magnitude (dora), and is a part of "
            f"{tensor!r} only: expected weights with a magnitude for all of its "
            "outputs. Adapt all of them, or extract a plain adapter: "
            "jlora.extract(params, jlora.merge(tree), rank=...)."
        )
    wide_a, wide_b = (promoted(*(x[k].dtype for x in blocks)) for k in (0, 1))
    a = np.concatenate([x.astype(wide_a) for x, _, _ in blocks], 1)
    b = np.concatenate([x.astype(wide_b) for _, x, _ in blocks], 0)
    ends = np.cumsum([0, *(x.shape[1] for x, _, _ in blocks)]).tolist()
    spans = [
        [piece.path, [*piece.part.at], [*piece.part.item], ends[k], ends[k + 1]]
        for piece, k in zip(own, chosen, strict=True)
    ]
    return Layer(a, b, scale, c, m), spans


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and bool((x == y).all())


def _rescaled(x: np.ndarray, scale: float, to: float) -> np.ndarray:
    """The array for another scale, in its dtype."""
    return x if scale == to else (x.astype(np.float64) * (scale / to)).astype(x.dtype)


def _check_apart(tensor: str, own: Sequence[Piece]) -> None:
    """Raises if two weights are the same numbers of a tensor, as copies of it are."""
    for k, one in enumerate(own):
        for other in own[:k]:
            pairs = [
                (one.part.tensor_rows, other.part.tensor_rows),
                (one.part.tensor_columns, other.part.tensor_columns),
            ]
            if all(np.intersect1d(x.positions, y.positions).size for x, y in pairs):
                raise ValueError(
                    f"peft.save: {other.path!r} and {one.path!r} are both {tensor!r}: "
                    "expected one weight for each number of a tensor. Adapt one of "
                    "them, or tie them in the model."
                )


def array_of(tensor: str, values: Mapping[str, Any], names: Names) -> np.ndarray | None:
    """A whole tensor from the weights that have parts of it; None if some are unknown.

    Args:
      tensor: its name.
      values: the arrays of the tree, by path, in the dtypes that the tensor is to have.
      names: the names of all weights.
    """
    parts = [
        (p, x) for p, own in names.found.items() for x in own if x.tensor == tensor
    ]
    if not parts or any(p not in values for p, _ in parts):
        return None
    items, rows, columns = sizes_of(tensor, [x for _, x in parts], names)
    axes = parts[0][1].tensor_axes
    first = values[parts[0][0]]
    out = np.zeros((items, rows, columns), np.asarray(first).dtype)
    seen = np.zeros(out.shape, bool)
    for path, part in parts:
        x = matrix(np.asarray(values[path]), part.axes, part.at)
        item = part.item[0] if part.item else 0
        at = np.ix_(part.tensor_rows.positions, part.tensor_columns.positions)
        out[item][at] = x[np.ix_(part.rows.positions, part.columns.positions)]
        seen[item][at] = True
    if not seen.all():
        return None
    return from_matrix(out, axes, names.tensors.get(tensor))
