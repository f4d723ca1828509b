"""make: an adapted leaf for a base, with its factors where the base is."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jlora._algebra.delta import delta
from jlora._algebra.weight import magnitude
from jlora._explicit import automatic
from jlora._init.eva import eva
from jlora._init.kaiming import kaiming
from jlora._init.keys import path_key, typed
from jlora._init.loftq import loftq
from jlora._init.principal import olora, pissa
from jlora._init.random import gaussian, orthogonal
from jlora._labels import by_role, wider
from jlora._leaf import LoRA, Note, Told, base
from jlora._leaf.forms import Misfit
from jlora._plan.spec import Spec
from jlora._tree import paths, sharding

# fn(key, w, spec) gives (w, a, b): the base, which most initialisers return unchanged,
# and factors of the spec's shapes.  w may be any base; `base.array` gives its array.
Initialiser = Callable[[jax.Array, Any, Spec], tuple[Any, Any, Any]]

NAMED: dict[str, Initialiser] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa(),
    "olora": olora,
    "loftq": loftq(),
}


def initialiser(init: str | Initialiser) -> Initialiser:
    """The initialiser of this name; a function is returned as it is."""
    if callable(init):
        if init is _FROM_DATA:
            raise TypeError(
                "init: jlora.initializers.eva needs moments: expected eva(moments), "
                "with moments from jlora.observe(fn, params, *args, plan=plan)."
            )
        if init in _FACTORIES:  # which make an initialiser, and are none
            return cast(Any, init)()
        try:
            hash(init)  # what it makes is kept, so that it is traced once
        except TypeError:
            raise TypeError(
                f"init {init!r} is not hashable: expected a function, or an object "
                "that compares by itself."
            ) from None
        return init
    if isinstance(init, str) and (n := _NITER.fullmatch(init)):
        return pissa(int(n[1]))
    if not isinstance(init, str) or init not in NAMED:
        near = (
            f"; near names: {paths.near(init, NAMED)}" if isinstance(init, str) else ""
        )
        if init == "eva":
            near = ": eva starts from data, jlora.initializers.eva(jlora.observe(...))"
        raise ValueError(
            f"init {init!r}: expected one of {', '.join(NAMED)}, pissa_niter_4, or a "
            f"function such as jlora.initializers.kaiming{near}."
        )
    return NAMED[init]


_FACTORIES: list[Any] = [pissa, loftq]
_FROM_DATA: Any = eva
_NITER = re.compile(r"pissa_niter_(\d+)")


class _Maker(NamedTuple):
    """Makes the fields of all leaves that are adapted alike, so that JAX traces once.

    Attributes:
      fields: (key, w) to the fields by name; w is one only if the initialiser changed
        the base.
      shapes: the same for shapes, without computing.
    """

    fields: Callable[..., dict[str, Any]]
    shapes: Callable[..., dict[str, Any]]


def _with_rest(w: Any, exact: Any, rounded: Any, spec: Spec) -> jax.Array:
    """A base with the difference of two deltas added, from factors (a, b) of each."""
    axes = spec.axes
    scale = jnp.full([w.shape[k] for k in by_role("b", axes)], spec.scale, jnp.float32)
    one, other = (
        delta(LoRA(None, a, b, scale, roles=axes.lstrip("b")))
        for a, b in (exact, rounded)
    )
    wide = base.array(w).astype(one.dtype)
    return (wide + (one - other)).astype(w.dtype)


@functools.lru_cache(maxsize=1024)
def _maker(init: Initialiser, spec: Spec, dtype: Any) -> _Maker:
    def make_fields(key: jax.Array, w: Any) -> dict[str, Any]:
        made = init(key, w, spec)
        if not (isinstance(made, tuple) and len(made) == 3):
            many = f" of {len(made)}" if isinstance(made, tuple) else ""
            raise TypeError(
                f"the initialiser {init!r} gives a {type(made).__name__}{many}: "
                "expected the three of (w, a, b)."
            )
        new, exact_a, exact_b = made
        a, b = exact_a.astype(dtype), exact_b.astype(dtype)
        fields = {"a": a, "b": b}
        if new is not w and exact_a.dtype != dtype and not base.is_lossy(new):
            # What rounding takes from the delta belongs to the base.
            new = _with_rest(new, (exact_a, exact_b), (a, b), spec)
        for name, shape in spec.shapes(w.shape).items():
            if name == "scale":
                wide = wider(w, a, jax.ShapeDtypeStruct((), jnp.float32))
                wide = jax.dtypes.canonicalize_dtype(wide)
                fields[name] = jnp.full(shape, spec.scale, wide)
            elif name not in fields:
                fields[name] = jnp.zeros(shape, dtype)
        if "m" in fields:
            own = {name: fields[name] for name in ("a", "b", "scale")}
            leaf = LoRA(new, **own, roles=spec.axes.lstrip("b"), form=spec.form)
            # In half precision its rounding would change the output at the start.
            wide = jnp.promote_types(dtype, jnp.float32)
            fields["m"] = magnitude(leaf).astype(wide)
        return fields if new is w else fields | {"w": new}

    return _Maker(make_fields, jax.jit(make_fields).eval_shape)


@functools.lru_cache(maxsize=1024)
def _placed(fields: Callable[..., Any], own: tuple[tuple[str, Any], ...]) -> Any:
    """The function that gives the fields under these shardings, compiled once."""
    out = dict(own)

    def placed(*args: Any) -> Any:
        return automatic(fields, lambda: out, *args)

    return jax.jit(placed, out_shardings=out)


def make(
    w: Any,
    path: str,
    spec: Spec,
    *,
    init: str | Initialiser,
    dtype: Any,
    key: jax.Array | None,
) -> LoRA:
    """An adapted leaf for a base, with its factors where the base is (`sharding`).

    An abstract base gets abstract factors.

    Args:
      w: the base.
      path: the weight's path, which is folded into the key.
      spec: how the weight is adapted.
      init: an initialiser, or the name of one.
      dtype: the dtype of a, b, c and m.
      key: a PRNG key; None for ``jax.random.key(0)``.

    Raises:
      ValueError: no initialiser has this name; the weight cannot start so; or its
        factors have wrong shapes.
      TypeError: the initialiser does not give a tuple (w, a, b).
    """
    start, key, place = initialiser(init), typed(key), sharding.of_array(w)
    if sharding.is_split(place) and hasattr(start, "on_mesh"):
        start = start.on_mesh()
    # One that knows the path holds arrays of its own, which no cache should keep.
    holds = hasattr(start, "at")
    start = getattr(start, "at")(path) if holds else start  # noqa: B009
    # Leaves that differ only in the path of their bias share one trace.
    alike = dataclasses.replace(
        spec.resolved(), bias=None, told="", init=None, groups=1, tied=False
    )
    maker = (_maker.__wrapped__ if holds else _maker)(start, alike, jnp.dtype(dtype))
    try:
        shapes = maker.shapes(jax.ShapeDtypeStruct((), key.dtype), base.abstract(w))
    except Misfit as e:
        raise ValueError(
            f"{path!r} of shape {tuple(w.shape)} and roles {spec.axes!r}: expected {e}."
            f" Give it a rank or an init that fits by a rule, jlora.Rule({path!r}, "
            "...), or exclude it."
        ) from None
    _check(path, start, shapes, w, spec)
    leaf = LoRA(
        **{"w": w} | shapes,
        roles=spec.axes.lstrip("b"),  # so that slices of a stack have the same roles
        form=spec.form,
        bias_path=None if spec.bias is None else paths.relative(spec.bias, path),
        told=Told("embedding" if spec.told and spec.kind == "embed" else spec.told),
        moved=Note(getattr(start, "__name__", repr(start)) if "w" in shapes else ""),
        layer=Note(spec.layer),
    )
    placed = sharding.of_fields(leaf, place)
    own = {name: getattr(placed, name) for name in shapes}
    if base.is_abstract(w):
        made: dict[str, Any] = {
            name: jax.tree.map(_placed_shape, x, own[name], is_leaf=_is_none)
            for name, x in shapes.items()
        }
        return dataclasses.replace(leaf, **made)
    if "w" in shapes:
        _require_finite(path, start, w)
    args = path_key(key, path), w
    if place is None:
        made = maker.fields(*args)
    elif isinstance(w, jax.core.Tracer):  # its type has the explicit sharding
        made = automatic(maker.fields, lambda: own, *args)
        made = jax.tree.map(jax.sharding.reshard, made, own)
    else:  # every device makes its own part; the numbers do not depend on the mesh
        placing = _placed.__wrapped__ if holds else _placed
        made = placing(maker.fields, tuple(own.items()))(*args)
    return dataclasses.replace(leaf, **made)


def _is_none(x: Any) -> bool:
    return x is None


def _placed_shape(x: Any, place: Any) -> Any:
    """A shape with its sharding; None stays None."""
    if x is None:
        return None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _require_finite(path: str, init: Any, w: Any) -> None:
    """Raises if the base has no numbers where an initialiser decomposes it.

    LAPACK may not return from a matrix that has infinities.
    """
    finite = jnp.isfinite(base.array(w)).all()
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(
            f"{path!r} has NaN or infinities: expected finite numbers for {init!r}. "
            f"Give it another init by a rule, jlora.Rule({path!r}, ...), or exclude it."
        )


def _check(path: str, init: Any, shapes: dict[str, Any], w: Any, spec: Spec) -> None:
    """Raises unless an initialiser gave the shapes that the spec and the base need.

    Nor can it change a base that it would have to round, or give a magnitude to codes.
    """
    if "w" in shapes and (base.is_lossy(w) or base.is_coded(w)):
        found = f"{base.remark(w) or w.dtype}"
        raise ValueError(
            f"{path!r} is {found}: expected floats for {init!r}, which moves a part of "
            "the base into the factors. Wrap the float params, then quantise the bases "
            "that are left: jlora.quantize(tree, qtype)."
        )
    if spec.dora and base.is_coded(w):
        raise ValueError(
            f"{path!r} is {w.dtype}, which the function makes a weight of: expected "
            "floats for dora=True, whose magnitude is one of the weight. Give it "
            f"another variant by jlora.Rule({path!r}, dora=False), or exclude it."
        )
    wanted = spec.shapes(w.shape) | {"w": tuple(w.shape)}
    for name, x in shapes.items():
        if tuple(x.shape) != wanted[name]:
            raise ValueError(
                f"{path!r}: the initialiser {init!r} gives {name} of shape "
                f"{tuple(x.shape)}: expected {wanted[name]}, by the roles "
                f"{spec.axes!r} and rank {spec.resolved().rank}."
            )
    if "w" in shapes and shapes["w"].dtype != w.dtype:
        raise ValueError(
            f"{path!r}: the initialiser {init!r} gives a base of {shapes['w'].dtype}: "
            f"expected {w.dtype}, as it got it."
        )
