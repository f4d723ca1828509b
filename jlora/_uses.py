"""Watches how a function uses its weights, in its jaxpr: nothing is computed.

A walk over the equations carries, for every variable, what is known of it: that it is
a weight (or a reshaped, sliced, concatenated one) and which axis of the original each
of its axes is; that it is the product of a weight; or that it depends on data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jlora import _algebra, _compat, _ops

# Which axes of the original weight an axis came from.
Origin = frozenset[int]


@dataclasses.dataclass
class Use:
    """One use of a weight: the primitive, and the role of each axis that it names.

    ``rows`` is the use of what a gather left, where that was then a weight itself: a
    matrix for each token, out of a stack of them.
    """

    primitive: str
    roles: dict[int, str]
    rows: Use | None = None

    def resolved(self) -> Use:
        """The use of the rows where they were matrices: then it is of a stack."""
        rows = self.rows
        if rows is None or not {"i", "o"} <= {*rows.roles.values()}:
            return self
        return Use(rows.primitive, dict.fromkeys(self.roles, "b") | rows.roles)


@dataclasses.dataclass
class Seen:
    """All that was seen of one array.

    Attributes:
      uses: as a weight, in order.
      bias: the path of the array that is added to its product.
      of: the paths of the weights whose bias it is itself.
      after: those that had been used when it was last added to data.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    bias: str | None = None
    of: set[str] = dataclasses.field(default_factory=set)
    after: frozenset[str] = frozenset()

    @property
    def idle(self) -> bool:
        """Whether it is no weight itself; a stack of biases may be looked up."""
        lookups = "gather", "dynamic_slice"
        return all(use.primitive in lookups for use in self.uses)

    def may_be_bias_of(self, path: str) -> bool:
        """Whether it may be the bias of this weight, if its product was lost sight of.

        It was added after the weight's use, and was not seen to be another's.
        """
        return path in self.after and self.of <= {path}


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Parts of parameters: for each path, the origin of each of the value's axes.

    Rows that were gathered by data are a weight yet (experts), or a product (words):
    what is done with them tells.  ``gathers`` are then the gathers, one a part.
    """

    parts: tuple[tuple[str, tuple[Origin, ...]], ...]
    gathers: tuple[Use, ...] = ()

    def move(self, fn: Any) -> _Weight:
        parts = tuple((path, tuple(fn(axes))) for path, axes in self.parts)
        return dataclasses.replace(self, parts=parts)

    def as_product(self, shape: tuple[int, ...]) -> _Product:
        """What rows are where they meet data."""
        _, axes = self.parts[0]
        size = math.prod(n for n, origin in zip(shape, axes, strict=True) if origin)
        return _Product(tuple(path for path, _ in self.parts), size)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What a weight's product became, until something is added to it."""

    paths: tuple[str, ...]
    size: int  # of the weight's out axes, which are what a bias has


class _Data:
    """Depends on what is not a parameter."""


_DATA = _Data()
_KEEPS_PRODUCT = frozenset(
    "reshape transpose convert_element_type squeeze expand_dims broadcast_in_dim copy "
    "sharding_constraint name reduce_precision mul psum psum_invariant rev".split()
)


class _Walk:
    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}

    def run(self, jaxpr: Any, infos: Sequence[Any]) -> list[Any]:
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
        name, n_out = eqn.primitive.name, len(eqn.outvars)
        if (inner := self.inner(eqn, infos)) is not None:
            return inner
        if name == "dot_general":
            return [self.dot(eqn, infos)]
        if name == "gather" and isinstance(infos[0], _Weight):
            return [self.gather(eqn, infos[0])]
        if name in _COMPUTE and isinstance(infos[1], _Weight):
            shape = eqn.invars[1].aval.shape
            return [self.use(infos[1], name, _COMPUTE[name](eqn), shape)]
        if name == "add":
            self.note_added(infos)
        if len([i for i in infos if i is not None]) > 1:  # rows that meet something
            infos = [
                i.as_product(v.aval.shape)
                if isinstance(i, _Weight) and i.gathers
                else i
                for i, v in zip(infos, eqn.invars, strict=True)
            ]
        if name == "add" and (out := self.bias(eqn, infos)) is not None:
            return [out]
        if name == "optimization_barrier":  # an output for each operand, as it is
            return infos
        if name == "dynamic_slice" and isinstance(infos[0], _Weight):
            return [self.window(eqn, infos[0])]
        products = [i for i in infos if isinstance(i, _Product)]
        mixed = len(products) > 1 or any(isinstance(i, (_Data, _Weight)) for i in infos)
        if products and name in _KEEPS_PRODUCT and n_out == 1 and not mixed:
            return [products[0]]
        if any(isinstance(i, (_Data, _Product)) for i in infos):
            return [_DATA] * n_out
        return [self.structure(eqn, infos, v.aval.shape) for v in eqn.outvars]

    # Uses.

    def use(
        self, weight: _Weight, name: str, roles: dict[int, str], shape: tuple[int, ...]
    ) -> _Product:
        for i, (path, axes) in enumerate(weight.parts):
            use = Use(name, _original(axes, roles))
            if weight.gathers:
                weight.gathers[i].rows = weight.gathers[i].rows or use
            else:
                self.seen.setdefault(path, Seen()).uses.append(use)
        out = math.prod(n for k, n in enumerate(shape) if roles.get(k) == "o")
        return _Product(tuple(path for path, _ in weight.parts), out)

    def gather(self, eqn: Any, weight: _Weight) -> Any:
        """Rows: a lookup's result, or the weights of each token's expert."""
        dn = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        product = self.use(weight, "gather", _gather_roles(eqn), shape)
        if weight.gathers:  # rows of rows
            return product
        gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
        kept = [k for k in range(len(shape)) if k not in gone]
        none: Origin = frozenset()

        def rows(axes: tuple[Origin, ...]) -> list[Origin]:
            left = iter(kept)
            ndim = eqn.outvars[0].aval.ndim
            return [
                axes[next(left)] if k in dn.offset_dims else none for k in range(ndim)
            ]

        uses = tuple(self.seen[path].uses[-1] for path, _ in weight.parts)
        return dataclasses.replace(weight.move(rows), gathers=uses)

    def window(self, eqn: Any, weight: _Weight) -> Any:
        """A part of a weight; one row of it is a lookup, or one matrix of a stack."""
        old, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
        cut = [
            k for k, (n, size) in enumerate(zip(old, sizes, strict=True)) if size < n
        ]
        if not cut or weight.gathers or any(sizes[k] != 1 for k in cut):
            return weight
        roles = dict.fromkeys(range(len(old)), "o") | dict.fromkeys(cut, "i")
        self.use(weight, "dynamic_slice", roles, old)
        uses = tuple(self.seen[path].uses[-1] for path, _ in weight.parts)
        none: Origin = frozenset()
        rows = weight.move(
            lambda axes: [none if k in cut else axes[k] for k in range(len(old))]
        )
        return dataclasses.replace(rows, gathers=uses)

    def dot(self, eqn: Any, infos: list[Any]) -> Any:
        out: Any = _DATA
        ((lc, rc), (lb, rb)) = eqn.params["dimension_numbers"]
        others = infos[::-1]
        dims = zip(infos, others, eqn.invars, (lc, rc), (lb, rb), strict=True)
        for info, other, v, c, b in dims:
            if not isinstance(info, _Weight):
                continue
            roles = dict.fromkeys(range(v.aval.ndim), "o")
            roles |= dict.fromkeys(c, "i") | dict.fromkeys(b, "b")
            # Rows that meet another weight are words, not matrices.
            if (
                not info.gathers
                or isinstance(other, (_Data, _Product))
                or (_a_matrix_each(info, roles) and not _is_weight(other))
            ):
                out = self.use(info, "dot_general", roles, v.aval.shape)
        return out

    def note_added(self, infos: list[Any]) -> None:
        """That parameters were added to something, and after which weights' uses."""
        used = frozenset(path for path, seen in self.seen.items() if seen.uses)
        for info in infos:
            for path, _ in info.parts if isinstance(info, _Weight) else ():
                self.seen.setdefault(path, Seen()).after |= used

    def bias(self, eqn: Any, infos: list[Any]) -> Any:
        """A parameter of the size of a product's out axes, added to it, is its bias."""
        pairs = list(zip(infos, eqn.invars, strict=True))
        for (product, _), (other, v) in (pairs, pairs[::-1]):
            if isinstance(product, _Product) and isinstance(other, _Weight):
                own = zip(other.parts[0][1], v.aval.shape, strict=True)
                if math.prod(n for origin, n in own if origin) != product.size:
                    continue
                biases = [path for path, _ in other.parts]
                if len(biases) != len(product.paths):  # else fused as the weights are
                    biases = biases[:1] * len(product.paths)
                for path, bias in zip(product.paths, biases, strict=True):
                    seen = self.seen[path]
                    seen.bias = seen.bias or bias
                    self.seen[bias].of.add(path)
                return _DATA
        return None

    # What a weight's axes become.

    def structure(self, eqn: Any, infos: list[Any], shape: tuple[int, ...]) -> Any:
        name, p = eqn.primitive.name, eqn.params
        weights = [(i, k) for k, i in enumerate(infos) if isinstance(i, _Weight)]
        if not weights:
            return None
        weight, at = weights[0]
        old = eqn.invars[at].aval.shape
        none: Origin = frozenset()
        if name == "transpose":
            return weight.move(lambda axes: [axes[k] for k in p["permutation"]])
        if name == "squeeze":
            gone = {k % len(old) for k in p["dimensions"]}
            kept = [k for k in range(len(old)) if k not in gone]
            return weight.move(lambda axes: [axes[k] for k in kept])
        if name == "broadcast_in_dim":
            dims = p["broadcast_dimensions"]
            own = {k: j for j, k in enumerate(dims) if old[j] == shape[k]}
            return weight.move(
                lambda axes: [
                    axes[own[k]] if k in own else none for k in range(len(shape))
                ]
            )
        if name in ("reshape", "expand_dims"):
            if name == "reshape" and (order := p.get("dimensions")) is not None:
                weight = weight.move(lambda axes: [axes[k] for k in order])
                old = tuple(old[k] for k in order)
            pairs = _algebra.blocks(old, shape) if 0 not in old else []
            from_ = {k: left for left, right in pairs for k in right}
            return weight.move(
                lambda axes: [
                    none.union(*(axes[j] for j in from_.get(k, ())))
                    for k in range(len(shape))
                ]
            )
        if name in ("concatenate", "stack"):
            new = shape[: len(shape) - len(old)] if name == "stack" else ()
            parts = [part for info, _ in weights for part in info.parts]
            return _Weight(
                tuple((path, (none,) * len(new) + axes) for path, axes in parts)
            )
        if name == "unstack":
            return weight.move(lambda axes: axes[: p["axis"]] + axes[p["axis"] + 1 :])
        if name in ("slice", "dynamic_slice", "split", "all_gather") or shape == old:
            return weight if len(shape) == len(old) else None
        return None

    # Functions inside: the roles are followed into them.

    def inner(self, eqn: Any, infos: list[Any]) -> list[Any] | None:
        name, p = eqn.primitive.name, eqn.params
        if name == "scan":
            n, m = _compat.scan_counts(p)
            jaxpr, _ = _compat.jaxpr_and_consts(p["jaxpr"])
            sliced = [
                i.move(lambda axes: axes[1:]) if isinstance(i, _Weight) else i
                for i in infos[n + m :]
            ]
            same = self.unchanged(
                jaxpr.invars[n : n + m], jaxpr.outvars[:m], infos[n : n + m]
            )
            outs = self.run(jaxpr, [*infos[:n], *same, *sliced])
            return [*same, *(_DATA if i is not None else None for i in outs[m:])]
        if name == "while":
            n, m = p["cond_nconsts"], p["body_nconsts"]
            jaxpr, _ = _compat.jaxpr_and_consts(p["body_jaxpr"])
            same = self.unchanged(jaxpr.invars[m:], jaxpr.outvars, infos[n + m :])
            self.run(p["cond_jaxpr"], [*infos[:n], *same])
            self.run(jaxpr, [*infos[n : n + m], *same])
            return same
        if name == "cond":
            outs = [self.run(branch, infos[1:]) for branch in p["branches"]]
            return [
                infos_[0] if all(i == infos_[0] for i in infos_) else _DATA
                for infos_ in zip(*outs, strict=True)
            ]
        for key in ("jaxpr", "call_jaxpr"):
            body, _ = _compat.jaxpr_and_consts(p.get(key))
            if hasattr(body, "eqns") and len(body.invars) == len(infos):
                outs = self.run(body, infos)
                return outs if len(outs) == len(eqn.outvars) else None
        return None

    @staticmethod
    def unchanged(ins: Any, outs: Any, infos: list[Any]) -> list[Any]:
        """A loop's carry: what comes back as it went in keeps what is known of it."""
        return [
            info if i is o else _DATA
            for i, o, info in zip(ins, outs, infos, strict=True)
        ]


def _is_weight(info: Any) -> bool:
    """Whether it is a weight that was not gathered."""
    return isinstance(info, _Weight) and not info.gathers


def _a_matrix_each(rows: _Weight, roles: dict[int, str]) -> bool:
    """Whether a product uses a row for each token as a matrix of that token's own."""
    _, axes = rows.parts[0]
    tokens = {roles[k] for k, origin in enumerate(axes) if not origin}
    own = {roles[k] for k, origin in enumerate(axes) if origin}
    return tokens == {"b"} and {"i", "o"} <= own


def _original(axes: Sequence[Origin], roles: dict[int, str]) -> dict[int, str]:
    """The roles of a value's axes, as those of the original's."""
    return {o: roles[k] for k, ax in enumerate(axes) if k in roles for o in ax}


def _conv_roles(eqn: Any) -> dict[int, str]:
    out, *convolved = eqn.params["dimension_numbers"].rhs_spec
    return dict.fromkeys(convolved, "i") | {out: "o"}


def _gather_roles(eqn: Any) -> dict[int, str]:
    dn = eqn.params["dimension_numbers"]
    roles = dict.fromkeys(range(eqn.invars[0].aval.ndim), "o")
    roles |= dict.fromkeys(dn.operand_batching_dims, "b")
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    return roles | dict.fromkeys(_ops.indexed_axes(shape, dn, sizes), "i")


def _ragged_roles(eqn: Any) -> dict[int, str]:
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = dn.dot_dimension_numbers
    roles = dict.fromkeys(range(eqn.invars[1].aval.ndim), "o")
    roles |= dict.fromkeys((*batch, *dn.rhs_group_dimensions), "b")
    return roles | dict.fromkeys(contracted, "i")


# The roles that a primitive gives to the axes of its second operand.
_COMPUTE = {"conv_general_dilated": _conv_roles, "ragged_dot_general": _ragged_roles}


def watch(jaxpr: Any, paths: Sequence[str | None]) -> dict[str, Seen]:
    """What a jaxpr does with the inputs that have a path; None marks data."""
    walk = _Walk()
    infos: list[Any] = []
    for path, v in zip(paths, jaxpr.jaxpr.invars, strict=True):
        axes = tuple(frozenset({k}) for k in range(v.aval.ndim))
        infos.append(_DATA if path is None else _Weight(((path, axes),)))
    walk.run(jaxpr, infos)
    return walk.seen
