"""Watches how a function uses its weights, in its jaxpr: nothing is computed.

A walk over the equations keeps an info for every variable:

* a `Weight`: it holds a parameter, or a reshaped, sliced or concatenated one.  Each of
  its axes knows the axis of the parameter that it came from;
* a `Product`: it is the product of a weight;
* ``_DATA``: it depends on an input that is no parameter;
* None: nothing is known, as of a constant.

`STEPS` has a function for each primitive that uses a weight or calls another jaxpr.
`MOVES` has one for each primitive that moves a weight's axes.  Any other primitive
keeps a weight's axes if it keeps its shape; else nothing is known of its result.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jlora import _compat
from jlora._algebra.gather import indexed_axes
from jlora._labels import runs

# Which axes of the parameter an axis came from: several after a reshape joined them.
Origin = frozenset[int]
_NONE: Origin = frozenset()


@dataclasses.dataclass
class Use:
    """One use of a weight: the primitive, and the roles that it gives to the axes.

    Attributes:
      primitive: its name.
      roles: role by axis of the parameter.
      rows: of a lookup, the first use of the rows that it took out, if they were used
        as a weight: a matrix for each token, from a stack of matrices.
      through: the first primitive without a low-rank form that the weight went through
        before this use, such as the maximum of a clip.
      mixed: the paths of the arrays of its own shape that the weight was multiplied by
        before this use.  Any of them may be the weight, and the others its mask.
    """

    primitive: str
    roles: dict[int, str]
    rows: Use | None = None
    through: str | None = None
    mixed: tuple[str, ...] = ()

    def resolved(self) -> Use:
        """The use of the rows if they were matrices: the weight is a stack of them."""
        rows = self.rows
        if rows is None or not {"i", "o"} <= {*rows.roles.values()}:
            return self
        roles = dict.fromkeys(self.roles, "b") | rows.roles
        return dataclasses.replace(rows, roles=roles)


@dataclasses.dataclass
class Seen:
    """All that was seen of one array.

    Attributes:
      uses: its uses as a weight, in order.
      bias: the path of the array that was added to its product.
      of: the paths of the weights whose bias this array is.
      after: the paths of the weights that were used before this array was added to
        something.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    bias: str | None = None
    of: set[str] = dataclasses.field(default_factory=set)
    after: frozenset[str] = frozenset()

    @property
    def idle(self) -> bool:
        """Whether it is no weight: only lookups use it, as in a stack of biases."""
        lookups = "gather", "dynamic_slice"
        return all(use.primitive in lookups for use in self.uses)

    def may_be_bias_of(self, path: str) -> bool:
        """Whether it may be the bias of a weight whose product the walk lost.

        It was added to something after the weight was used, and it is not known as the
        bias of another weight.
        """
        return path in self.after and self.of <= {path}


# The origin of each axis of a value.
Axes = tuple[Origin, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value that holds parameters, or parts of them.

    Rows that a lookup took out may be weights (experts) or the result of the lookup
    (words).  Their next use decides.

    Attributes:
      parts: (path, axes) of each parameter; several after a concatenation.
      gathers: if the value is such rows, the lookup's `Use` for each part.
      through: as in `Use`.
      mixed: whether the parts are the factors of a product of numbers, as of a weight
        and its mask, and not a concatenation.
      perhaps: whether the value was multiplied by data of its own shape.  Then it is a
        weight if it meets data in a product, and data if it meets a weight.
    """

    parts: tuple[tuple[str, Axes], ...]
    gathers: tuple[Use, ...] = ()
    through: str | None = None
    mixed: bool = False
    perhaps: bool = False

    def move(self, fn: Callable[[Axes], Sequence[Origin]]) -> Weight:
        """The weight with fn(axes) as the axes of each part."""
        parts = tuple((path, tuple(fn(axes))) for path, axes in self.parts)
        return dataclasses.replace(self, parts=parts)

    def as_product(self, shape: tuple[int, ...]) -> Product:
        """What rows are if they are the result of a lookup."""
        # The other axes are those of the indices.
        _, axes = self.parts[0]
        size = math.prod(n for n, origin in zip(shape, axes, strict=True) if origin)
        return Product(_paths(self), size)


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of a weight, until something is added to it.

    Attributes:
      paths: the paths of the weights; several after a concatenation.
      size: the number of elements along the out axes, which a bias has, too.
    """

    paths: tuple[str, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class _Data:
    """The info of a value that depends on an input that is no parameter.

    Attributes:
      axes: the axes along which it may vary; None for all.  A scale that is broadcast
        to the shape of a weight varies along few.
    """

    axes: frozenset[int] | None = None


_DATA = _Data()

# fn(walk, equation, infos) gives the infos of the outputs, or None to leave it to
# `Walk.general`.
Step = Callable[["Walk", Any, list[Any]], "list[Any] | None"]
STEPS: dict[str, Step] = {}
# fn(weight, equation, old shape, new shape) gives the weight with its axes moved.
Move = Callable[[Weight, Any, Sequence[int], Sequence[int]], Weight]
MOVES: dict[str, Move] = {}
# What these give from a product is still the product, to which a bias may be added.
KEEPS_PRODUCT = frozenset(
    "reshape transpose convert_element_type squeeze expand_dims broadcast_in_dim copy "
    "sharding_constraint name reduce_precision mul psum psum_invariant rev".split()
)


def _step(*names: str) -> Callable[[Step], Step]:
    def register(fn: Step) -> Step:
        STEPS.update(dict.fromkeys(names, fn))
        return fn

    return register


def _move(*names: str) -> Callable[[Move], Move]:
    def register(fn: Move) -> Move:
        MOVES.update(dict.fromkeys(names, fn))
        return fn

    return register


class Walk:
    """One walk over a jaxpr.

    Attributes:
      seen: what was seen of each path.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}

    def run(self, jaxpr: Any, infos: Sequence[Any]) -> list[Any]:
        """The infos of the outputs, from those of the inputs."""
        jaxpr, _ = _compat.jaxpr_and_consts(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.invars, infos, strict=True))

        def read(v: Any) -> Any:
            return None if isinstance(v, _compat.Literal) else env.get(v)

        for eqn in jaxpr.eqns:
            infos = [read(v) for v in eqn.invars]
            if any(info is not None for info in infos):
                env.update(zip(eqn.outvars, self.apply(eqn, infos), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def apply(self, eqn: Any, infos: list[Any]) -> list[Any]:
        """The infos of an equation's outputs, from those of its operands."""
        step = STEPS.get(eqn.primitive.name, _call)
        outs = step(self, eqn, infos)
        return self.general(eqn, infos) if outs is None else outs

    def general(self, eqn: Any, infos: list[Any]) -> list[Any]:
        """The infos of the outputs of a primitive that has no step."""
        infos = _met(eqn, infos)
        products = [i for i in infos if isinstance(i, Product)]
        # A product that meets anything but constants is data from there on.
        mixed = len(products) > 1 or any(isinstance(i, (_Data, Weight)) for i in infos)
        kept = eqn.primitive.name in KEEPS_PRODUCT and len(eqn.outvars) == 1
        if products and kept and not mixed:
            return [products[0]]
        if eqn.primitive.name == "broadcast_in_dim" and isinstance(infos[0], _Data):
            return [_broadcast_data(infos[0], eqn)]
        if any(isinstance(i, (_Data, Product)) for i in infos):
            return [_DATA] * len(eqn.outvars)
        return [self.moved(eqn, infos, v.aval.shape) for v in eqn.outvars]

    def moved(self, eqn: Any, infos: list[Any], shape: tuple[int, ...]) -> Any:
        """The info of an output of this shape: the weight, with its axes moved."""
        weights = [(i, k) for k, i in enumerate(infos) if isinstance(i, Weight)]
        if not weights:
            return None
        weight, at = weights[0]
        old = eqn.invars[at].aval.shape
        if eqn.primitive.name in ("concatenate", "stack"):
            parts = tuple(part for info, _ in weights for part in info.parts)
            weight = dataclasses.replace(weight, parts=parts, gathers=())
        if (move := MOVES.get(eqn.primitive.name)) is not None:
            return move(weight, eqn, old, shape)
        if shape != old:
            return _DATA if weight.perhaps else None
        name = eqn.primitive.name
        # A weight is standardised by what is computed from it: it is the weight still.
        through = weight.through or (None if name in ("add", "sub") else name)
        return dataclasses.replace(weight, through=through)

    def use(
        self, weight: Weight, name: str, roles: dict[int, str], shape: tuple[int, ...]
    ) -> Product:
        """Records that a primitive gives these roles to a weight's axes."""
        paths = _paths(weight)
        for i, (path, axes) in enumerate(weight.parts):
            mixed = tuple(p for p in paths if p != path) if weight.mixed else ()
            use = Use(name, _original(axes, roles), None, weight.through, mixed)
            if weight.gathers:  # rows: the first use counts, beside their lookup
                weight.gathers[i].rows = weight.gathers[i].rows or use
            else:
                self.seen.setdefault(path, Seen()).uses.append(use)
        out = math.prod(n for k, n in enumerate(shape) if roles.get(k) == "o")
        return Product(paths, out)

    def rows(self, weight: Weight, fn: Callable[[Axes], Sequence[Origin]]) -> Weight:
        """The rows that the lookup just recorded takes out; their next use decides."""
        uses = tuple(self.seen[path].uses[-1] for path, _ in weight.parts)
        return dataclasses.replace(weight.move(fn), gathers=uses)


def _met(eqn: Any, infos: list[Any]) -> list[Any]:
    """The infos, in which rows that meet another operand become lookup results."""
    if len([i for i in infos if i is not None]) < 2:
        return infos
    return [
        i.as_product(v.aval.shape) if isinstance(i, Weight) and i.gathers else i
        for i, v in zip(infos, eqn.invars, strict=True)
    ]


# ---------------------------------------------------------------------------- uses


@_step("dot_general")
def _dot(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    out: Any = _DATA
    ((lc, rc), (lb, rb)) = eqn.params["dimension_numbers"]
    if any(map(_is_weight, infos)):
        infos = [_DATA if isinstance(i, Weight) and i.perhaps else i for i in infos]
    others = infos[::-1]
    dims = zip(infos, others, eqn.invars, (lc, rc), (lb, rb), strict=True)
    for info, other, v, c, b in dims:
        if not isinstance(info, Weight):
            continue
        roles = dict.fromkeys(range(v.aval.ndim), "o")
        roles |= dict.fromkeys(c, "i") | dict.fromkeys(b, "b")
        # Rows that meet another weight are results of their lookup, not matrices.
        if (
            not info.gathers
            or isinstance(other, (_Data, Product))
            or (_a_matrix_each(info, roles) and not _is_weight(other))
        ):
            out = walk.use(info, "dot_general", roles, v.aval.shape)
    return [out]


@_step("conv_general_dilated")
def _conv(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    if not isinstance(infos[1], Weight):
        return None
    # rhs_spec lists the axes of the kernel: out, in, then the spatial ones.
    out, *convolved = eqn.params["dimension_numbers"].rhs_spec
    roles = dict.fromkeys(convolved, "i") | {out: "o"}
    shape = eqn.invars[1].aval.shape
    return [walk.use(infos[1], "conv_general_dilated", roles, shape)]


@_step("ragged_dot_general")
def _ragged_dot(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    if not isinstance(infos[1], Weight):
        return None
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = dn.dot_dimension_numbers
    shape = eqn.invars[1].aval.shape
    roles = dict.fromkeys(range(len(shape)), "o")
    roles |= dict.fromkeys((*batch, *dn.rhs_group_dimensions), "b")
    roles |= dict.fromkeys(contracted, "i")
    return [walk.use(infos[1], "ragged_dot_general", roles, shape)]


@_step("gather")
def _gather(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """Takes out rows: a lookup's result, or the weights of each token's expert."""
    weight = infos[0]
    if not isinstance(weight, Weight):
        return None
    dn = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    roles = dict.fromkeys(range(len(shape)), "o")
    roles |= dict.fromkeys(dn.operand_batching_dims, "b")
    indexed = indexed_axes(shape, dn, eqn.params["slice_sizes"])
    product = walk.use(weight, "gather", roles | dict.fromkeys(indexed, "i"), shape)
    if weight.gathers:  # rows of rows
        return [product]
    # The axes that the output keeps; they are its offset_dims, in the same order.
    gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    kept = [k for k in range(len(shape)) if k not in gone]
    ndim = eqn.outvars[0].aval.ndim

    def rows(axes: Axes) -> list[Origin]:
        left = iter(kept)
        return [axes[next(left)] if k in dn.offset_dims else _NONE for k in range(ndim)]

    return [walk.rows(weight, rows)]


@_step("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """A part of a weight; one row may be a lookup, or one matrix of a stack."""
    weight = _met(eqn, infos)[0]
    if not isinstance(weight, Weight):
        return None
    old, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    cut = [k for k, (n, size) in enumerate(zip(old, sizes, strict=True)) if size < n]
    if not cut or weight.gathers or any(sizes[k] != 1 for k in cut):
        return [weight]
    roles = dict.fromkeys(range(len(old)), "o") | dict.fromkeys(cut, "i")
    walk.use(weight, "dynamic_slice", roles, old)
    return [
        walk.rows(
            weight,
            lambda axes: [_NONE if k in cut else axes[k] for k in range(len(old))],
        )
    ]


@_step("add")
def _add(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """A parameter that is added to a product, and has its out size, is its bias."""
    used = frozenset(path for path, seen in walk.seen.items() if seen.uses)
    for info in infos:
        for path, _ in info.parts if isinstance(info, Weight) else ():
            walk.seen.setdefault(path, Seen()).after |= used
    pairs = list(zip(_met(eqn, infos), eqn.invars, strict=True))
    for (product, _), (other, v) in (pairs, pairs[::-1]):
        if not (isinstance(product, Product) and isinstance(other, Weight)):
            continue
        own = zip(other.parts[0][1], v.aval.shape, strict=True)
        if math.prod(n for origin, n in own if origin) != product.size:
            continue
        biases = [path for path, _ in other.parts]
        if len(biases) != len(product.paths):  # one bias for all the fused weights
            biases = biases[:1] * len(product.paths)
        for path, bias in zip(product.paths, biases, strict=True):
            seen = walk.seen[path]
            seen.bias = seen.bias or bias
            walk.seen[bias].of.add(path)
        return [_DATA]
    return None


@_step("optimization_barrier")
def _barrier(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    """Each output is the operand in its place."""
    return _met(eqn, infos)


@_step("mul", "div", "select_n")
def _times(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """A weight times or by its scale, or under its mask, is the weight still."""
    name = eqn.primitive.name
    if any(_is_weight(i) for i in infos):  # rows that meet a weight are no weight
        infos = _met(eqn, infos)
    if any(isinstance(i, Product) for i in infos):
        return None
    shape = eqn.outvars[0].aval.shape
    spans = [_span(i, v.aval.shape) for i, v in zip(infos, eqn.invars, strict=True)]
    weights = [k for k, i in enumerate(infos) if isinstance(i, Weight)]
    data = [k for k, i in enumerate(infos) if isinstance(i, _Data)]
    if not weights or len(weights) + len(data) < 2:
        return None
    at = max(weights, key=lambda k: spans[k])
    weight, whole = infos[at], sum(n != 1 for n in shape)
    # The scale of data is broadcast to its shape.  Rows have their tokens' axes, too.
    least = 2 if weight.gathers else max(whole, 2)
    if eqn.invars[at].aval.shape != shape or (data and spans[at] < least):
        return [_DATA]
    if data and max(spans[k] for k in data) == whole:
        weight = dataclasses.replace(weight, perhaps=True)
    others = [infos[k] for k in weights if k != at and spans[k] == spans[at]]
    if (name == "div" and at) or any(
        {*_paths(i)} & {*_paths(weight)} for i in others
    ):  # no multiple of the weight
        weight = dataclasses.replace(weight, through=weight.through or name)
    elif others:
        every = (weight, *others)
        weight = dataclasses.replace(
            weight,
            parts=tuple(part for i in every for part in i.parts),
            mixed=True,
            through=next((i.through for i in every if i.through), None),
        )
    return [weight]


def _paths(weight: Weight) -> tuple[str, ...]:
    return tuple(path for path, _ in weight.parts)


def _span(info: Any, shape: Sequence[int]) -> int:
    """Along how many axes a value may vary, if it was made by a broadcast."""
    own: set[int] | frozenset[int] = {*range(len(shape))}
    if isinstance(info, Weight):
        own = {k for _, axes in info.parts for k, origin in enumerate(axes) if origin}
    elif isinstance(info, _Data) and info.axes is not None:
        own = info.axes
    return sum(shape[k] != 1 for k in own)


def _broadcast_data(data: _Data, eqn: Any) -> _Data:
    """The info of data that is broadcast."""
    dims, old = eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape
    new = eqn.params["shape"]
    own = range(len(old)) if data.axes is None else data.axes
    return _Data(frozenset(dims[k] for k in own if old[k] == new[dims[k]] != 1))


def _is_weight(info: Any) -> bool:
    """Whether it is a weight for sure, and not rows of one."""
    return isinstance(info, Weight) and not info.gathers and not info.perhaps


def _a_matrix_each(rows: Weight, roles: dict[int, str]) -> bool:
    """Whether a product uses each token's row as a matrix for that token alone."""
    _, axes = rows.parts[0]
    tokens = {roles[k] for k, origin in enumerate(axes) if not origin}
    own = {roles[k] for k, origin in enumerate(axes) if origin}
    return tokens == {"b"} and {"i", "o"} <= own


def _original(axes: Sequence[Origin], roles: dict[int, str]) -> dict[int, str]:
    """The roles by axis of the parameter, from those by axis of the value."""
    return {o: roles[k] for k, ax in enumerate(axes) if k in roles for o in ax}


# --------------------------------------------------- what a weight's axes become


@_move("transpose")
def _transpose(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    return weight.move(lambda axes: [axes[k] for k in eqn.params["permutation"]])


@_move("squeeze")
def _squeeze(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    gone = {k % len(old) for k in eqn.params["dimensions"]}
    kept = [k for k in range(len(old)) if k not in gone]
    return weight.move(lambda axes: [axes[k] for k in kept])


@_move("broadcast_in_dim")
def _broadcast(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    dims = eqn.params["broadcast_dimensions"]
    own = {k: j for j, k in enumerate(dims) if old[j] == new[k]}
    return weight.move(
        lambda axes: [axes[own[k]] if k in own else _NONE for k in range(len(new))]
    )


@_move("reshape", "expand_dims")
def _reshape(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    if (order := eqn.params.get("dimensions")) and eqn.primitive.name == "reshape":
        weight = weight.move(lambda axes: [axes[k] for k in order])
        old = tuple(old[k] for k in order)
    # The axes of an empty array cannot be paired by their sizes.
    pairs = runs(old, new) if 0 not in old else []
    from_ = {k: left for left, right in pairs for k in right}
    return weight.move(
        lambda axes: [
            _NONE.union(*(axes[j] for j in from_.get(k, ()))) for k in range(len(new))
        ]
    )


@_move(
    *("convert_element_type", "reduce_precision", "name", "neg", "stop_gradient"),
    *("device_put", "rev"),
    *_compat.COPY,
    *_compat.VARY,
    *_compat.RESHARD,
    "mul",
    "div",
    "select_n",
    "concatenate",
)
def _kept(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    return weight


@_move("stack")
def _stack(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    at = eqn.params.get("axis", 0)
    return weight.move(lambda axes: (*axes[:at], _NONE, *axes[at:]))


@_move("unstack")
def _unstack(weight: Weight, eqn: Any, old: Any, new: Any) -> Weight:
    axis = eqn.params["axis"]
    return weight.move(lambda axes: axes[:axis] + axes[axis + 1 :])


@_move("slice", "split", *_compat.ALL_GATHER)
def _cut(weight: Weight, eqn: Any, old: Any, new: Any) -> Any:
    # Without tiling, an all_gather adds an axis for the devices.
    return weight if len(new) == len(old) else None


# ------------------------------------------------- calls, loops and branches: followed


@_step("scan")
def _scan(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    # Operands: n constants, m of the carry, then what is sliced along its first axis.
    n, m = _compat.scan_counts(eqn.params)
    jaxpr, _ = _compat.jaxpr_and_consts(eqn.params["jaxpr"])
    sliced = [
        i.move(lambda axes: axes[1:]) if isinstance(i, Weight) else i
        for i in infos[n + m :]
    ]
    ins, outs = jaxpr.invars[n : n + m], jaxpr.outvars[:m]
    same = _unchanged(ins, outs, infos[n : n + m])
    found = walk.run(jaxpr, [*infos[:n], *same, *sliced])
    return [*same, *(_DATA if i is not None else None for i in found[m:])]


@_step("while")
def _while(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    p = eqn.params
    # Operands: n constants of the condition, m of the body, then the carry.
    n, m = p["cond_nconsts"], p["body_nconsts"]
    jaxpr, _ = _compat.jaxpr_and_consts(p["body_jaxpr"])
    same = _unchanged(jaxpr.invars[m:], jaxpr.outvars, infos[n + m :])
    walk.run(p["cond_jaxpr"], [*infos[:n], *same])
    walk.run(jaxpr, [*infos[n : n + m], *same])
    return same


@_step("cond")
def _cond(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any]:
    # The first operand is the branch index.  A branch decides what is known only if all
    # agree.
    outs = [walk.run(branch, infos[1:]) for branch in eqn.params["branches"]]
    return [
        found[0] if all(i == found[0] for i in found) else _DATA
        for found in zip(*outs, strict=True)
    ]


@_step(*_compat.JIT, *_compat.REMAT, *_compat.CALL, "shard_map")
def _call(walk: Walk, eqn: Any, infos: list[Any]) -> list[Any] | None:
    """Follows a call, and any unknown primitive with a jaxpr of the same operands."""
    for key in ("jaxpr", "call_jaxpr"):
        body, _ = _compat.jaxpr_and_consts(eqn.params.get(key))
        if hasattr(body, "eqns") and len(body.invars) == len(infos):
            outs = walk.run(body, infos)
            return outs if len(outs) == len(eqn.outvars) else None
    return None


def _unchanged(ins: Any, outs: Any, infos: list[Any]) -> list[Any]:
    """The infos of a loop's carry: kept for what its body returns unchanged."""
    return [
        info if i is o else _DATA for i, o, info in zip(ins, outs, infos, strict=True)
    ]


def watch(jaxpr: Any, paths: Sequence[str | None]) -> dict[str, Seen]:
    """What was seen of each path: the paths are those of the jaxpr's first inputs.

    An input whose path is None is data, and so are all others.
    """
    walk = Walk()
    infos: list[Any] = []
    invars = _compat.jaxpr_and_consts(jaxpr)[0].invars
    for path, v in itertools.zip_longest(paths, invars):
        axes = tuple(frozenset({k}) for k in range(v.aval.ndim))
        infos.append(_DATA if path is None else Weight(((path, axes),)))
    walk.run(jaxpr, infos)
    return walk.seen
