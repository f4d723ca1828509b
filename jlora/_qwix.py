"""All that qwix is asked for: its quantised array, and how one is made.

qwix is an extra.  It is imported when the first array is quantised.  How a quantised
array is used needs none of it: see `_leaf.quantized`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from jlora._explicit import automatic
from jlora._leaf import base
from jlora._leaf.node import NotAnArray, register
from jlora._leaf.quantized import Quantized, qtype_of
from jlora._tree import paths, sharding

# The names that qwix gives to formats that are no dtype, and the size of their blocks.
_FORMATS = {
    **dict.fromkeys(["nf4", "int2", "int3", "int5", "int6", "int7"]),
    "mxfp8": 32,
    "mxfp4": 32,
    "nvfp4": 16,
}
_DTYPES = (
    *("int8", "int4", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz", "float4_e2m1fn"),
)


def qwix() -> Any:
    """The package.

    Raises:
      ImportError: it is not installed.
    """
    try:
        return importlib.import_module("qwix")
    except ImportError as e:
        raise ImportError(
            "jlora quantises with qwix, which is not installed: expected "
            'pip install "jlora[quant]". Arrays that are quantised already need it not.'
        ) from e


def qtype_named(qtype: Any) -> str:
    """The name of a qtype, which may also be a dtype such as jnp.int8.

    Raises:
      ValueError: there is none.
    """
    known = [*_DTYPES, *_FORMATS]
    name = qtype
    if not isinstance(qtype, str):
        try:
            name = jnp.dtype(qtype).name
        except TypeError:
            name = repr(qtype)
    if name not in known:
        raise ValueError(
            f"qtype {qtype!r}: expected one of {', '.join(known)}; near names: "
            f"{paths.near(str(name), known)}."
        )
    return str(name)


def block_of(qtype: str) -> int | None:
    """The size that the blocks of this qtype have by its standard; None for any."""
    return _FORMATS.get(qtype)


def check_block(block: Any, qtype: str, what: str) -> None:
    """Raises for a size of blocks that is none, or that the qtype does not have."""
    whole = isinstance(block, numbers.Integral) and not isinstance(block, bool)
    if block is not None and (not whole or block < 1):
        raise ValueError(
            f"{what}: block={block!r}: expected a number of weights that share a "
            "scale, such as 64, or None for all along the in axes."
        )
    wanted = block_of(qtype)
    if wanted is not None and block != wanted:
        raise ValueError(
            f"{what}: {qtype} has blocks of {wanted}, found block={block}: pass "
            f"block={wanted}."
        )


@functools.cache
def _qarray() -> Any:
    """The class of the arrays: qwix's, with the ways of a node of jlora's trees."""

    class QArray(_QArray, qwix().QArray):  # type: ignore[misc]
        """A `qwix.QArray` that says what to do where it is used as an array."""

    QArray.__module__, QArray.__qualname__ = __name__, "QArray"  # for pickle
    jax.tree_util.register_pytree_with_keys(
        QArray,
        lambda x: ([(_KEYS[k], x.__dict__[k]) for k in _STORED], (x.qtype,)),
        functools.partial(_unflatten, QArray),
        lambda x: ([x.__dict__[k] for k in _STORED], (x.qtype,)),
    )
    register(QArray, ["qvalue", "scale", "zero_point"], ["qtype"], own=True)
    importlib.import_module("flax.nnx").register_data_type(QArray)
    return QArray


_STORED = "codes", "scale", "zero_point"
_KEYS = {name: jax.tree_util.GetAttrKey(name) for name in _STORED}
_KEYS["codes"] = jax.tree_util.GetAttrKey("qvalue")


def _unflatten(cls: Any, qtype: Any, children: Any) -> Any:
    out = object.__new__(cls)
    out.__dict__.update(zip(_STORED, children, strict=True), qtype=qtype[0])
    return out


class _QArray(NotAnArray):
    """What the arrays have beside what qwix's have.

    The leaf of a tree is ``codes``: the numbers, with int4 in the place of uint4, which
    no format of files has that Orbax writes.  ``qvalue`` has qwix's own dtype.
    """

    _advice = (
        "is a quantised array: call the function that uses it through jlora.lift(fn) "
        "with the tree as an argument, which dequantises it in each use; or make an "
        "array of it with qwix.dequantize"
    )
    __eq__, __hash__ = object.__eq__, object.__hash__

    @property
    def qvalue(self) -> Any:
        """The low-bit numbers, as qwix has them."""
        codes = self.__dict__["codes"]
        return _viewed(codes, jnp.int4, jnp.uint4) if self.qtype == "nf4" else codes

    @qvalue.setter
    def qvalue(self, x: Any) -> None:
        self.__dict__["codes"] = _viewed(x, jnp.uint4, jnp.int4)

    @property
    def shape(self) -> Any:
        """The array's shape."""
        return self.__dict__["codes"].shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __repr__(self) -> str:
        codes, scale = self.__dict__["codes"], self.__dict__["scale"]
        if not hasattr(codes, "shape") or not hasattr(scale, "shape"):
            return f"QArray({codes!r}, {scale!r})"
        shape = ",".join(map(str, codes.shape))
        return f"QArray({scale.dtype}[{shape}], {Quantized(self).remark()})"


def _viewed(x: Any, old: Any, new: Any) -> Any:
    """An array of ``old`` as one of ``new``, with the same bits; else x itself."""
    if getattr(x, "dtype", None) != old:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.dtype(new))
    return lax.bitcast_convert_type(x, new)


def __getattr__(name: str) -> Any:
    if name == "QArray":
        return _qarray()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def along(roles: str, embeds: bool) -> list[int]:
    """The axes along which blocks lie: the in axes, or the features of an embedding.

    A lookup takes a row, and a tied head sums over the features.
    """
    return [k for k, c in enumerate(roles) if c == ("o" if embeds else "i")]


def tiles_of(
    shape: Sequence[int], along: Sequence[int], block: int | None
) -> tuple[int, ...] | None:
    """The tile along each axis, for blocks of consecutive numbers of these axes.

    None if they do not divide: a block is a part of one axis, and whole ones after it.

    Example:
      >>> tiles_of((5, 4, 32, 3), [1, 2], 64), tiles_of((5, 4, 32, 3), [1, 2], 24)
      ((1, 2, 32, 1), None)
    """
    tiles = [1] * len(shape)
    if block is None:
        return tuple(n if k in along else 1 for k, n in enumerate(shape))
    rest = block
    for k in reversed(along):
        n = shape[k]
        tiles[k] = n if n and rest % n == 0 else rest
        if n % tiles[k]:
            return None
        rest //= tiles[k]
    return tuple(tiles) if rest == 1 else None


_LARGE = 1 << 26  # numbers; the rounding of more of them at once takes too much memory


def quantized(
    w: Any,
    qtype: str,
    tiles: Sequence[int],
    how: Callable[..., Any] | None = None,
    *operands: jax.Array,
) -> Any:
    """The array quantised: low-bit numbers, and a scale for each tile.

    The scale of a tile is its largest magnitude over that of the qtype, in w's dtype.
    On a mesh every device quantises its own shard, and has the scales of that.

    Args:
      w: an array, or the shape of one.
      qtype: the name of the qtype.
      tiles: along each axis, how many numbers share a scale.  It divides the axis; and
        a shard of it, unless it is the whole axis.
      how: (qtype, tiles, w, *operands) to the quantised array, in the place of rounding
        to the nearest numbers.  Hashable.
      *operands: more arrays for ``how``.
    """
    make = _Make(qtype, tuple(tiles), how or rounded)
    shapes = jax.eval_shape(make, base.struct(w), *operands)
    place = sharding.of_array(w)
    own: Any = None
    if isinstance(place, NamedSharding):
        specs = Quantized(shapes).specs([*place.spec])
        own = jax.tree.map(lambda spec: place.update(spec=spec), specs)
    if isinstance(w, jax.ShapeDtypeStruct):
        return shapes if own is None else jax.tree.map(_abstract, shapes, own)
    if isinstance(w, jax.core.Tracer):
        return automatic(make, lambda: own, w, *operands)
    if how is None and not sharding.is_split(place):
        make = dataclasses.replace(make, parts=_parts(w.shape, tiles))
    places, treedef = jax.tree.flatten(own)
    return _compiled(make, tuple(places), treedef)(w, *operands)


def _abstract(x: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


@functools.lru_cache(maxsize=256)
def _compiled(make: _Make, places: tuple[Any, ...], treedef: Any) -> Any:
    own = jax.tree.unflatten(treedef, places)

    def fn(*operands: jax.Array) -> Any:
        return automatic(make, lambda: own, *operands)

    return jax.jit(fn, out_shardings=own)


def _parts(shape: Sequence[int], tiles: Sequence[int]) -> int:
    """Into how many parts the first axis is split, so that a part is not too large."""
    rows = shape[0] // tiles[0] if shape else 1
    least = min(math.ceil(math.prod(shape) / _LARGE), rows)
    return (
        next(n for n in range(max(least, 1), rows + 1) if rows % n == 0) if rows else 1
    )


@dataclasses.dataclass(frozen=True)
class _Make:
    """The function from an array to the quantised one.

    Attributes:
      qtype: the name of the qtype.
      tiles: along each axis, how many numbers share a scale.
      how: the function that rounds.
      parts: how many parts of the first axis are quantised one after another.
    """

    qtype: str
    tiles: tuple[int, ...]
    how: Callable[..., Any]
    parts: int = 1

    def __call__(self, w: jax.Array, *operands: jax.Array) -> Any:
        one = functools.partial(self.how, self.qtype, self.tiles)
        if self.parts < 2:
            return one(w, *operands)
        made = lax.map(one, w.reshape(self.parts, -1, *w.shape[1:]))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)


def rounded(qtype: str, tiles: tuple[int, ...], w: jax.Array, dtype: Any = None) -> Any:
    """w as its nearest low-bit numbers; with scales in dtype, by default w's."""
    sizes = list(enumerate(zip(w.shape, tiles, strict=True)))
    wide = jnp.promote_types(w.dtype, jnp.float32)
    block = block_of(qtype)  # qwix wants to be told, also if it is the whole axis
    q = qwix().quantize(
        w.astype(wide),
        qtype if qtype in _FORMATS else jnp.dtype(qtype),
        channelwise_axes=[k for k, (_, tile) in sizes if tile == 1],
        tiled_axes={k: tile for k, (n, tile) in sizes if 1 < tile < n or tile == block},
        scale_dtype=w.dtype if dtype is None else dtype,
    )
    return array(q.qvalue, q.scale, qtype, q.zero_point)


def array(codes: Any, scale: Any, qtype: str, zero_point: Any = None) -> Any:
    """A quantised array from its parts."""
    return _qarray()(codes, scale, zero_point, qtype)


def like(w: jax.Array, array: Any) -> Any:
    """w quantised as a quantised array of its shape is."""
    pairs = zip(array.shape, array.scale.shape, strict=True)
    return quantized(w, qtype_of(array), [n // m for n, m in pairs])
