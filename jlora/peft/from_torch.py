"""From modules of torch to the fields of an adapted leaf: the parts joined again.

Each part of a weight gets the rows of its module's a and the columns of its b.  Modules
that share a, as those of a fused weight do, share its ranks; the ranks of others add
up.  In a stack, layers of lower rank are padded with zeros, which stay so in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.peft.modules import Module
from jlora.peft.names import Part
from jlora.peft.to_torch import Layer, promoted

Spans = Mapping[str, Sequence[Any]]


def layer_of(
    parts: Sequence[Part],
    modules: Mapping[str, Module],
    rows: int,
    columns: int,
    spans: Spans,
    path: str,
    norms: Callable[[], np.ndarray],
) -> Layer | None:
    """The adapter of one matrix of a weight; None if no part of it is adapted.

    Args:
      parts: the parts of the matrix.
      modules: by tensor.
      rows: the size of the in axes.
      columns: that of the out axes.
      spans: as `to_torch.Joined.ranks` has them.
      path: the weight's path.
      norms: gives the norm of each column of the base, for those without a magnitude.
    """
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    c: np.ndarray | None = None
    m: np.ndarray | None = None
    known = [modules[p.tensor] for p in parts if p.tensor in modules]
    if not known:
        return None
    scale = next((module.scale for module in known if module.scale), 0.0)
    for part in parts:
        module = modules.get(part.tensor)
        if module is None:
            continue
        a, b = _cut(module, part, spans, path)
        wide_a = np.zeros((rows, a.shape[1]), a.dtype)
        wide_a[part.rows.positions] = a
        wide_b = np.zeros((b.shape[0], columns), b.dtype)
        at = part.columns.positions
        ratio = module.scale / scale if scale else 1.0
        wide_b[:, at] = b if ratio == 1 else b * b.dtype.type(ratio)
        rows_at = part.rows.positions
        for k, (x, y) in enumerate(blocks):
            if _alike(x, wide_a) and not np.any(y[:, at]) and len(rows_at) == rows:
                blocks[k] = x, y + wide_b
                break
            if _alike(y, wide_b) and not np.any(x[rows_at]) and len(rows_at) < rows:
                blocks[k] = x + wide_a, y
                break
        else:
            blocks.append((wide_a, wide_b))
        theirs = part.tensor_columns.positions
        if module.c is not None:
            c = np.zeros(columns, module.c.dtype) if c is None else c
            c[at] = module.c[theirs] * module.c.dtype.type(ratio)
        if module.m is not None:
            m = norms().astype(module.m.dtype) if m is None else m
            m[at] = module.m[theirs]
    wide = [promoted(*(x[k].dtype for x in blocks)) for k in (0, 1)]
    a = np.concatenate([x.astype(wide[0]) for x, _ in blocks], 1)
    b = np.concatenate([x.astype(wide[1]) for _, x in blocks], 0)
    return Layer(a, b, scale, c, m)


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two factors are equal: parts of one weight share them."""
    return x.shape == y.shape and x.dtype == y.dtype and bool((x == y).all())


def _cut(module: Module, part: Part, spans: Spans, path: str) -> Any:
    """The rows of a and the columns of b of a part, with its own ranks."""
    a, b = module.a, module.b
    if module.kind == "experts":
        a, b = (x[part.item if part.item else 0] for x in (a, b))
    own = [
        slice(start, stop)
        for p, at, item, start, stop in spans.get(part.tensor, ())
        if (p, tuple(at), tuple(item)) == (path, part.at, part.item)
    ]
    if own:
        a, b = a[:, own[0]], b[own[0]]
    a = a[part.tensor_rows.positions]
    mine = b[:, part.tensor_columns.positions]
    if not own and mine.shape[1] < b.shape[1]:
        # Ranks that other weights of the same tensor have for themselves.
        kept = np.any(mine != 0, 1) | ~np.any(b != 0, 1)
        if kept.any():
            a, mine = a[:, kept], mine[kept]
    return a, mine


def stacked(
    layers: Mapping[tuple[int, ...], Layer | None],
    batch: Sequence[int],
    norms: Callable[[tuple[int, ...]], np.ndarray],
) -> dict[str, np.ndarray]:
    """The fields of a leaf, (*batch, ...), from the adapter of each of its matrices.

    Layers without an adapter get factors of zeros, which add nothing and never train;
    their magnitudes, if there are any, are the norms of the base's columns.
    """
    known = [x for x in layers.values() if x is not None]
    rank = max(x.a.shape[1] for x in known)

    def field(name: str, shape: Sequence[int]) -> np.ndarray | None:
        own = [getattr(x, name) for x in known]
        if all(x is None for x in own):
            return None
        dtype = promoted(*[x.dtype for x in own if x is not None])
        out = np.zeros((*batch, *shape), dtype)
        for at, layer in layers.items():
            x = None if layer is None else getattr(layer, name)
            if x is not None:
                out[at][tuple(slice(n) for n in x.shape)] = x
            elif name == "m":
                out[at] = norms(at)
        return out

    first = known[0]
    rows, columns = first.a.shape[0], first.b.shape[1]
    scale = np.full(tuple(batch), first.scale, np.float64)
    for at, layer in layers.items():
        scale[at] = first.scale if layer is None else layer.scale
    found = {
        "a": field("a", (rows, rank)),
        "b": field("b", (rank, columns)),
        "c": field("c", (columns,)),
        "m": field("m", (columns,)),
        "scale": scale,
    }
    return {name: x for name, x in found.items() if x is not None}
