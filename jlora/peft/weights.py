"""What is known of the arrays of a tree: shapes, roles, layers; and their names."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from jlora._leaf import LoRA, is_adapted
from jlora._plan import names as _told
from jlora._plan.from_layers import from_layers
from jlora._plan.plan import Plan
from jlora._tree import by_path, paths
from jlora._tree.by_path import sibling_bias
from jlora._tree.trace import is_array
from jlora._tree.variables import opened
from jlora.peft.given import by_hand
from jlora.peft.modules import Module
from jlora.peft.names import Names, Part


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of a tree.

    Attributes:
      shape: its shape.
      dtype: its dtype, by name; empty if its base is not here.
      axes: the roles of its axes; None if nothing tells them.
      kind: "dense", "embed" or "conv"; "vector" for what is no matrix.
      groups: a convolution's number of groups.
      seen: whether a use, and not a name or a class, told the roles.
      tied: whether it is an embedding that is the head, too.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: str | None = None
    kind: str = "vector"
    groups: int = 1
    seen: bool = False
    tied: bool = False

    @property
    def said(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype, as names have them."""
        return self.shape, self.dtype


def weights(tree: Any, plan: Plan | None = None) -> dict[str, Weight]:
    """Every array of a tree by path, with what a plan, the leaf or the tree tells.

    Args:
      tree: plain params, or an adapted tree.
      plan: a plan of the tree.
    """
    opened_ = opened(tree)
    leaves = {p: x for p, x in by_path.flatten(opened_)[0] if _is_one(x)}
    shapes = {p: tuple(x.shape) for p, x in leaves.items()}
    biases = {p: sibling_bias(p, leaves) for p in leaves}
    layers, known = from_layers(tree), _told.Names(shapes, biases)
    found: dict[str, Weight] = {}
    for path, x in leaves.items():
        axes, kind, groups, seen, tied = None, "vector", 1, False, False
        told = layers.get(path) or known.told(path)
        if told is not None:
            kind, axes = told[0], told[1].rjust(len(shapes[path]), "b")
        if isinstance(x, LoRA):
            if axes != x.axes:
                kind = "embed" if x.told == "embedding" else "dense"
            axes, seen = x.axes, not x.told
            if x.layer:
                kind, _, more = str(x.layer).partition("/")
                groups, tied = int(more) if more.isdigit() else 1, more == "tied"
        if plan is not None and path in plan:
            spec = plan[path]
            axes, kind, groups = spec.axes, spec.kind, spec.groups
            seen, tied = not spec.told, spec.tied
        dtype = str(x.dtype) if getattr(x, "w", x) is not None else ""
        found[path] = Weight(shapes[path], dtype, axes, kind, groups, seen, tied)
    return found


def _is_one(x: Any) -> bool:
    return is_adapted(x) or is_array(x) or (hasattr(x, "shape") and hasattr(x, "dtype"))


def completed(
    names: Names,
    known: Mapping[str, Weight],
    what: str,
    file: Mapping[str, Module],
    needed: Set[str] = frozenset(),
) -> Names:
    """The names with what was said by hand made into parts.

    The bias beside a weight is that of its module, and is named with it.

    Args:
      names: the names.
      known: the arrays of the tree.
      what: the function that asks, for errors.
      file: the modules of a file, by tensor, whose sizes help; may be empty.
      needed: paths that have to get parts; others may have roles that nothing tells.
    """
    lost = [p for p in names.found if p not in known]
    if lost and all(w.dtype for w in known.values()):  # a whole tree, no adapter alone
        raise ValueError(
            f"{what}: names are of another tree: they have {lost[0]!r}; near paths: "
            f"{paths.near(lost[0], known)}."
        )
    for path, (shape, _) in names.base.items():
        if path in known and known[path].shape != tuple(shape):
            raise ValueError(
                f"{what}: names are of another model: {path!r} has shape "
                f"{tuple(shape)} there and {known[path].shape} here."
            )
    if lost := [p for p in names.said if p not in known]:
        raise ValueError(
            f"{what}: names has {lost[0]!r}, which the tree has not; near paths: "
            f"{paths.near(lost[0], known)}."
        )
    _check_sizes(names, known, what)
    found = dict(names.found)
    for path, said in names.said.items():
        parts = _parts(path, said, known[path], file, path in needed)
        if parts is None:
            continue
        found[path] = parts
        _warn_unknown(path, parts, names, what)
    for path, said in names.said.items():
        if path not in found or not isinstance(said, (str, list, tuple, Mapping)):
            continue
        bias = sibling_bias(path, known)
        if bias is None or bias in found or known[path].axes is None:
            continue
        if all(p.kind != "vector" for p in found[path]):
            if (own := _bias_parts(path, found[path], known, bias)) is not None:
                found[bias] = own
    base = dict(names.base) | {p: w.said for p, w in known.items() if w.dtype}
    heads = {p: "" for p, w in known.items() if w.tied and p in found} | names.heads
    return dataclasses.replace(names, found=found, said={}, base=base, heads=heads)


def _check_sizes(names: Names, known: Mapping[str, Weight], what: str) -> None:
    """Raises for parts that are beyond their weight."""
    for path, parts in names.found.items():
        for p in parts if path in known else ():
            shape = known[path].shape
            if len(p.axes) != len(shape):
                sizes = None
            else:
                pairs = list(zip(shape, p.axes, strict=True))
                sizes = [math.prod(n for n, c in pairs if c == role) for role in "io"]
            most = [int(x.positions.max()) for x in (p.rows, p.columns)]
            if sizes is None or most[0] >= sizes[0] or most[1] >= sizes[1]:
                raise ValueError(
                    f"{what}: names of {path!r} say {p.axes!r}, with (in, out) up to "
                    f"{(most[0] + 1, most[1] + 1)}: expected those of shape {shape}."
                )


def _warn_unknown(path: str, parts: Any, names: Names, what: str) -> None:
    """Warns of a module said by hand that the checkpoint does not have."""
    lost = [p.tensor for p in parts if p.tensor not in names.tensors]
    if names.tensors and lost and path not in names.heads:
        warnings.warn(
            f"{what}: names say that {path!r} is {lost[0]!r}, which the checkpoint has "
            f"not; near: {paths.near(lost[0], names.tensors)}.",
            stacklevel=4,
        )


def with_head(names: Names, head: str | None) -> Names:
    """The names with the module of a tied head: of a table that is one, and of a copy.

    A checkpoint that ties both has the table alone, but torch's model has the module.
    """
    if head is None:
        return names
    found = dict(names.found)
    for path in names.heads:
        found[path] = tuple(
            p if p.kind == "embed" else dataclasses.replace(p, tensor=f"{head}.weight")
            for p in found[path]
        )
    return dataclasses.replace(
        names, found=found, heads=dict.fromkeys(names.heads, head)
    )


def _bias_parts(path: str, parts: Any, known: Any, bias: str) -> Any:
    """The parts of the bias of a weight: the columns of the weight's own parts."""
    return bias_parts(parts, known[path], known[bias].shape)


def bias_parts(parts: Any, weight: Weight, shape: Sequence[int]) -> Any:
    """The parts of a bias from those of its weight; None if it has another shape."""
    assert weight.axes is not None
    sizes = [n for n, c in zip(weight.shape, weight.axes, strict=True) if c != "i"]
    own = "".join(c for c in weight.axes if c != "i")
    if tuple(n for n in sizes if n != 1) != tuple(n for n in shape if n != 1):
        return None
    if len(shape) != len(sizes):
        own = own.replace("b", "") if "b" not in own else own
        if len(shape) != len(own):
            return None
    one = type(parts[0].rows).all(1)
    out = []
    for p in parts:
        name, _, last = p.tensor.rpartition(".")
        bias = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(
            last, f"{last}_bias"
        )
        out.append(
            dataclasses.replace(
                p,
                tensor=f"{name}.{bias}",
                tensor_axes="b" * len(p.item) + "o",
                axes=own,
                kind="vector",
                rows=one,
                tensor_rows=one,
                groups=1,
            )
        )
    return tuple(out)


def _parts(
    path: str, said: Any, weight: Weight, file: Mapping[str, Module], needed: bool
) -> Any:
    """The parts of one weight that were said by hand; None if nothing tells them."""
    parts = [said] if isinstance(said, Part) else said
    many = isinstance(parts, (list, tuple)) and parts
    if many and all(isinstance(p, Part) for p in parts):
        return tuple(parts)
    sizes = {m.name: m.b.shape[-1] for m in file.values()}
    own = _modules_of(said, file)
    axes, kind, groups = weight.axes, weight.kind, weight.groups
    if own and not weight.seen:
        kind = {"linear": "dense", "embedding": "embed", "conv": "conv"}.get(
            own[0].kind, "dense"
        )
        holes = max(s.count("{}") for s in _said(said))
        fits = axes is not None and _fits(weight.shape, axes, own, said)
        axes = axes if fits else _by_sizes(path, weight.shape, holes, own, said)
    if own and own[0].kind == "conv":
        groups = own[0].groups
    holes = max((s.count("{}") for s in _said(said)), default=0)
    if axes is None and _told.is_called_vector(path) and holes < len(weight.shape):
        # A stack of vectors, such as the norms of layers.
        axes, kind = "b" * holes + "o" * (len(weight.shape) - holes), "vector"
    if axes is None:
        matrix = len(weight.shape) > 1 and not _told.is_called_vector(path)
        if matrix and not needed and not own:
            return None
        if matrix:
            raise ValueError(
                f"{path!r} of shape {weight.shape}: nothing tells which axes are in or "
                "out: take the names from jlora.peft.match(params, base), or "
                "wrap with a plan, jlora.plan(fn, params, *args)."
            )
        axes, kind = "o" * len(weight.shape), "vector"
    torch = None
    if own and own[0].kind == "experts":
        axes = axes if "b" in axes else "b" + axes[1:]
    return by_hand(
        path, said, weight.shape, axes, kind, groups=groups, torch=torch, sizes=sizes
    )


def _said(said: Any) -> list[str]:
    several = isinstance(said, (list, tuple, Mapping))
    return [str(x) for x in said] if several else [str(said)]


def _modules_of(said: Any, file: Mapping[str, Module]) -> list[Module]:
    """The modules of a file that were said of one layer of a weight."""
    if not isinstance(said, (str, list, tuple, Mapping)):
        return []
    names = {m.name: m for m in file.values()}
    found = []
    for one in _said(said):
        template = one.removesuffix(".weight")
        pieces = template.split("{}")
        hit = next((m for name, m in names.items() if _is_like(name, pieces)), None)
        if hit is not None:
            found.append(hit)
    return found


def _is_like(name: str, pieces: Sequence[str]) -> bool:
    """Whether a name is a template with numbers in its holes."""
    if len(pieces) == 1:
        return name == pieces[0]
    for k, piece in enumerate(pieces):
        if not name.startswith(piece):
            return False
        name = name[len(piece) :]
        if k < len(pieces) - 1:
            digits = len(name) - len(name.lstrip("0123456789"))
            if not digits:
                return False
            name = name[digits:]
    return not name


def _fits(shape: Sequence[int], axes: str, own: Sequence[Module], said: Any) -> bool:
    rows = math.prod(n for n, c in zip(shape, axes, strict=True) if c == "i")
    columns = math.prod(n for n, c in zip(shape, axes, strict=True) if c == "o")
    whole = len(own) == len(_said(said))
    wide = sum(m.b.shape[-1] for m in own)
    return rows == own[0].a.shape[-2] and (not whole or columns == wide)


def _by_sizes(
    path: str, shape: Sequence[int], holes: int, own: Sequence[Module], said: Any
) -> str | None:
    """The only roles that fit the sizes of a file's factors; raises for several.

    In axes come before out axes, as Flax and Haiku have them; a weight of another name
    may have them the other way round, as torch has.
    """
    last = path.rpartition("/")[2]
    n = len(shape) - holes
    both = last not in ("kernel", "embedding", "w")
    ways = [("i" * k + "o" * (n - k)) for k in range(1, n)]
    if both:
        ways += [("o" * k + "i" * (n - k)) for k in range(1, n)]
    found = [w for w in ways if _fits(shape, "b" * holes + w, own, said)]
    if len(found) == 1:
        return "b" * holes + found[0]
    if not found:
        own_ = ", ".join(f"{m.name!r} ({m.a.shape[-2]}, {m.b.shape[-1]})" for m in own)
        raise ValueError(
            f"{path!r} of shape {tuple(shape)} does not fit {own_} of the file, (in, "
            "out): it is another weight, or another model. Check names."
        )
    raise ValueError(
        f"{path!r} of shape {tuple(shape)} fits the file with the roles "
        f"{' or '.join(found)}: pass plan=jlora.plan(fn, params, *args), which sees "
        "how it is used."
    )


def prefixed(names: Names, wanted: Sequence[str]) -> Names:
    """The names under the prefix that the tensors of an adapter have, if it is one."""
    known = {p.tensor for parts in names.found.values() for p in parts}
    add, cut = prefix(known, wanted)
    if not (add or cut):
        return names
    return names.renamed(lambda n: add + n.removeprefix(cut))


def prefix(known: Set[str], wanted: Sequence[str]) -> tuple[str, str]:
    """(prefix to add, prefix to remove) that turn known names into the wanted ones.

    A checkpoint may have ``model.layers.0``, and the adapter of a larger model
    ``language_model.model.layers.0``; or the other way round.
    """
    if not wanted or any(w in known for w in wanted):
        return "", ""
    found: dict[tuple[str, str], int] = {}
    for add, cut in _prefixes(known, wanted[0]):
        own = {add + name.removeprefix(cut) for name in known}
        fits = sum(w in own for w in wanted)
        if fits * 2 > len(wanted):
            found[add, cut] = fits
    best = [pair for pair, fits in found.items() if fits == max(found.values())]
    if len(best) > 1:
        some = ", ".join(repr((cut or add).rstrip(".")) for add, cut in best[:4])
        raise ValueError(
            f"the adapter has {wanted[0]!r}, which may be under any of {some} of the "
            "base: say which, names.renamed([('^prefix.', '')])."
        )
    return best[0] if best else ("", "")


def _prefixes(known: Set[str], wanted: str) -> Iterator[tuple[str, str]]:
    """Those that make one of the known names the wanted one."""
    for name in sorted(known):
        if wanted.endswith("." + name):
            yield wanted[: -len(name)], ""
        elif name.endswith("." + wanted):
            yield "", name[: -len(wanted)]
