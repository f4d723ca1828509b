"""load: an adapted tree from a directory that peft wrote."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter import attach
from jlora._leaf import Adapted, Full, LoRA, Note, Told, base
from jlora._leaf.fields import shapes
from jlora._leaf.forms import Rows
from jlora._plan.plan import Plan
from jlora._tree import by_path, paths, sharding
from jlora.peft import files
from jlora.peft import modules as _modules
from jlora.peft.files import Where
from jlora.peft.from_torch import layer_of, stacked
from jlora.peft.given import Given, names_of
from jlora.peft.names import FILE, Names, Part, from_matrix, matrix, sizes
from jlora.peft.to_torch import promoted
from jlora.peft.weights import Weight, completed, prefixed, weights, with_head


def load(
    directory: Where,
    params: Any,
    *,
    names: Given | None = None,
    head: str | None = None,
    plan: Plan | None = None,
    strict: bool = True,
    dtype: Any = None,
) -> Any:
    """The adapted tree of a PEFT adapter: params with the adapter on them.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are read, and nothing
    else; no pickle, and no code.  Every kind of layer that peft adapts has its place:
    Linear, Conv1D, Embedding, Conv1d to Conv3d, MultiheadAttention, experts in one
    parameter, with rsLoRA, DoRA, lora_bias, rank and alpha patterns, biases,
    ``modules_to_save`` and trainable tokens.

    Args:
      directory: what ``save_pretrained`` of peft, or `save`, made.
      params: plain params; the factors are placed where these are.
      names: what `match` found; or a mapping from path to torch module, pairs of
        (regular expression, replacement) over paths, or a function from path to module
        (None for a path without one).  None for those that `save` left beside the
        adapter.
      head: torch's module of the head, such as "lm_head", if the checkpoint ties it to
        the embedding and params have it by itself.
      plan: a plan of params, if ``names`` were written by hand and nothing else tells
        the roles of a weight's axes.
      strict: whether a tensor that is missing, that has no place in params, or that
        has another shape, is an error.  Otherwise it is left out, with a warning.
      dtype: the dtype of the factors; None for that of the file.  Adapters in 16 bits
        train better in float32.

    Returns:
      The adapted tree.

    Raises:
      FileNotFoundError: there is no such directory, or a file is missing.
      FormatError: a file is damaged, leads out of the directory, or asks for something
        that has no form here; the error names the key.
      ValueError: names or shapes that do not fit params; tensors without a place.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora, jlora.peft
      >>> params = {"fc": {"kernel": jnp.ones((3, 4))}}
      >>> where = tempfile.mkdtemp() + "/adapter"
      >>> tree = jlora.wrap(params, rank=2)
      >>> jlora.peft.save(where, tree, names={"fc/kernel": "model.fc"})
      >>> jlora.peft.load(where, params)["fc"]["kernel"].rank
      2
    """
    adapter = _modules.read(files.folder("peft.load", directory))
    _warn_ignored(adapter)
    if names is None:
        names = _beside(adapter.where)
    leaves = by_path.arrays(params)
    known = weights(params, plan)
    given = names_of(names, list(leaves), "peft.load")
    found = with_head(completed(given, known, "peft.load", adapter.modules), head)
    loader = _Loader(adapter, prefixed(found, adapter.tensors), known, leaves, strict)
    out = loader.leaves()
    loader.report()
    if not out:
        raise ValueError(
            f"peft.load: nothing of {adapter.where} has a place in params: its first "
            f"tensors are {adapter.tensors[:3]}, and names have "
            f"{paths.near(adapter.tensors[0], loader.tensors)}. Check names."
        )
    return attach(params, {p: _placed(x, leaves[p], dtype) for p, x in out.items()})


def _warn_ignored(adapter: Any) -> None:
    if ignored := adapter.config.ignored:
        warnings.warn(
            f"peft.load: {adapter.config.where} sets {', '.join(ignored)}, which this "
            "version does not know: ignored.",
            stacklevel=3,
        )


def _beside(where: pathlib.Path) -> Names:
    try:
        return Names.load(where / FILE)
    except FileNotFoundError:
        raise ValueError(
            f"peft.load: names: {where} has no {FILE} (it was not written by "
            "jlora.peft.save): expected names=jlora.peft.match(params, base, "
            "plan=plan), from the base's own safetensors, or a mapping from path to "
            "module."
        ) from None


def _placed(leaf: Adapted, w: Any, dtype: Any) -> Adapted:
    """The leaf with its arrays on the devices of its base, as JAX's."""

    def array(x: Any, place: Any) -> Any:
        own = x.dtype if dtype is None else dtype
        if isinstance(leaf, LoRA) and x is leaf.scale:
            own = jax.dtypes.canonicalize_dtype(jnp.promote_types(w.dtype, jnp.float32))
        x = np.asarray(x).astype(own)
        return jnp.asarray(x) if place is None else jax.device_put(x, place)

    places = sharding.of_fields(leaf, sharding.of_array(w))
    names = [n for n in leaf.fields if getattr(leaf, n) is not None]
    own = {n: array(getattr(leaf, n), getattr(places, n)) for n in names}
    return dataclasses.replace(leaf, **own)


@dataclasses.dataclass
class _Loader:
    """Makes the leaves, and remembers what had no place."""

    adapter: Any
    names: Names
    known: Mapping[str, Weight]
    arrays: Mapping[str, Any]
    strict: bool

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        self.tensors: dict[str, list[tuple[str, Part]]] = {}
        for path, parts in self.names.found.items():
            for part in parts:
                self.tensors.setdefault(part.tensor, []).append((path, part))
        self.spans, self.filled, self.own = self._hints()

    def _hints(self) -> tuple[dict[str, Any], set[str], set[str]]:
        """What `save` wrote for this; nothing if it is not what was written."""
        try:
            said = json.loads(self.adapter.hints or "{}")
            spans = {
                str(t): [
                    (str(p), [*map(int, at)], [*map(int, item)], int(i), int(k))
                    for p, at, item, i, k in own
                ]
                for t, own in said.get("ranks", {}).items()
            }
            filled, own_ = (
                {str(t) for t in said.get(name, [])} for name in ("filled", "base")
            )
        except (ValueError, TypeError, AttributeError, RecursionError):
            return {}, set(), set()
        modules = self.adapter.modules
        for tensor, own in spans.items():
            rank = modules[tensor].rank if tensor in modules else 0
            good = all(0 <= start < stop <= rank for *_, start, stop in own)
            covered = {k for *_, start, stop in own for k in range(start, stop)}
            alone = len({(*map(str, x[:3]),) for x in own}) == len(own)
            if not (good and alone and covered >= self._live(modules.get(tensor))):
                return {}, set(), set()
        return spans, filled, own_

    @staticmethod
    def _live(module: Any) -> set[int]:
        """The ranks of a module that are not zeros only."""
        if module is None:
            return set()
        a, b = (np.any(x != 0, axis) for x, axis in ((module.a, -2), (module.b, -1)))
        live = (a | b).reshape(-1, module.rank).any(0)
        return {*np.flatnonzero(live).tolist()}

    def leaves(self) -> dict[str, Adapted]:
        """Every leaf that the adapter has, by path."""
        out: dict[str, Adapted] = {}
        heads = self._heads()
        usable = {
            t: m
            for t, m in self.adapter.modules.items()
            if t not in heads and self._fits(m)
        }
        if self.filled:
            usable = {
                t: dataclasses.replace(m, c=None) if t in self.filled else m
                for t, m in usable.items()
            }
        self._missing()
        for path, parts in self.names.found.items():
            if any(p.tensor in usable for p in parts):
                out[path] = self._lora(path, parts, usable)
        whole = {**self.adapter.tables, **self.adapter.whole}
        for tensor in whole:
            if tensor not in self.tensors and tensor in self.adapter.whole:
                self._wrong(f"{tensor!r} has no array in names{self._why(tensor)}")
        for path, parts in self.names.found.items():
            if own := [p for p in parts if p.tensor in whole]:
                leaf = self._full(path, own, whole)
                if leaf is not None and path in out:
                    tensor = own[0].tensor
                    self._wrong(f"{tensor!r} is {path!r}, which is adapted, too")
                elif leaf is not None:
                    out[path] = leaf
        for tensor, (indices, values) in self.adapter.rows.items():
            for path, leaf in self._rows(tensor, indices, values):
                if path in out:
                    self._wrong(f"rows of {path!r} are trained, and it is adapted, too")
                out[path] = leaf
        order = [p for p in self.arrays if p in out]
        return {p: out[p] for p in order}

    def _heads(self) -> set[str]:
        """The modules of tied heads: they have the factors of an embedding, turned."""
        found: set[str] = set()
        modules = self.adapter.modules
        for path in self.names.heads:
            tensor = self.names[path][0].tensor
            if tensor not in modules or self.names[path][0].kind != "embed":
                continue
            table = modules[tensor]
            same = [
                t
                for t, m in modules.items()
                if m.kind == "linear" and t not in self.tensors and _turned(m, table)
            ]
            if not same:
                self._wrong(
                    f"{tensor!r} is adapted in lookups only, and {path!r} is the head, "
                    "too (tied): an adapter of a model with a head of its own"
                )
            found |= {*same}
        return found

    def _wrong(self, why: str) -> None:
        self.problems.append(why)

    def report(self) -> None:
        """Raises, or warns, about all that had no place."""
        if not self.problems:
            return
        some = "".join(f"\n  {x}" for x in self.problems[:12])
        more = len(self.problems) - 12
        text = f"peft.load: {self.adapter.where} does not fit params:{some}" + (
            f"\n  and {more} more" if more > 0 else ""
        )
        if self.strict:
            raise ValueError(
                f"{text}\nCheck names and the base; strict=False leaves these out."
            )
        warnings.warn(f"{text}\nLeft out.", stacklevel=4)

    def _why(self, tensor: str) -> str:
        """Why a tensor has no place, as far as names know."""
        known = [p for p, why in self.names.missing.items() if repr(tensor) in why]
        if known:
            return f"; it may be {known[0]!r}, but others are equal: say it by hand"
        if any(self.names[p][0].kind != "embed" for p in self.names.heads):
            return "; if it is the head, which is tied: pass head="
        if not self.tensors:
            return ", which are empty"
        return f"; near: {paths.near(tensor, self.tensors)}"

    def _fits(self, module: Any) -> bool:
        """Whether a module has a place of its sizes."""
        if module.tensor not in self.tensors:
            self._wrong(
                f"{module.tensor!r} has no weight in names{self._why(module.tensor)}"
            )
            return False
        a, b = module.a.shape[-2], module.b.shape[-1]
        items = len(module.a) if module.kind == "experts" else 1
        for path, part in self.tensors[module.tensor]:
            if part.kind == "vector":
                self._wrong(f"{module.tensor!r} is {path!r}, which is no matrix here")
                return False
            need = [
                int(o.positions.max()) + 1
                for o in (part.tensor_rows, part.tensor_columns)
            ]
            whole = self.names.tensors.get(module.tensor)
            if whole is not None and len(whole) == len(part.tensor_axes):
                _, *both = sizes(whole, part.tensor_axes)
                need = [*map(math.prod, both)]
            elif len(self.tensors[module.tensor]) > 1:
                need = [max(need[0], a), max(need[1], b)]
            last = part.item[0] + 1 if part.item else 1
            if (a, b) != (need[0], need[1]) or items < last:
                self._wrong(
                    f"{module.tensor!r} has factors for (in, out) = {(a, b)}"
                    f"{f' of {items} experts' if items > 1 else ''}: expected "
                    f"{tuple(need)} by {path!r}"
                )
                return False
        return True

    def _missing(self) -> None:
        """Finds the modules that listed targets name, and the file has not."""
        config = self.adapter.config
        if not config.target_list():
            return
        saved = config.said.get("modules_to_save") or []
        for tensor, own in self.tensors.items():
            part = own[0][1]
            if part.kind == "vector" or not tensor.endswith(".weight"):
                continue
            held = any(tensor in x for x in (self.adapter.modules, self.adapter.whole))
            if not held and config.targets(part.module):
                if not any(part.module.split(".")[-1] == s for s in saved):
                    self._wrong(
                        f"{part.module!r} is among target_modules, and has no factors "
                        "in the file"
                    )

    def _lora(
        self, path: str, parts: Sequence[Part], usable: Mapping[str, Any]
    ) -> LoRA:
        axes = parts[0].axes
        shape = self.known[path].shape
        batch, *both = sizes(shape, axes)
        rows, columns = map(math.prod, both)
        by: dict[tuple[int, ...], list[Part]] = {
            tuple(map(int, at)): [] for at in np.ndindex(*batch)
        }
        for part in parts:
            by[part.at].append(part)
        layers = {}
        for at, own in by.items():
            start = functools.partial(self._norms, path, axes, at)
            layers[at] = layer_of(own, usable, rows, columns, self.spans, path, start)
        norms = functools.partial(self._norms, path, axes)
        own_fields = stacked(layers, batch, norms)
        places = shapes(shape, axes, own_fields["a"].shape[-1])
        found: dict[str, Any] = {
            name: x.reshape(places[name]) for name, x in own_fields.items()
        }
        kind, groups = parts[0].kind, parts[0].groups
        bias = self._bias(path, parts)
        seen = self.known[path].seen or bool(self.names.tensors)
        told = "" if seen else ("embedding" if kind == "embed" else "name or shape")
        return LoRA(
            None,
            **found,
            roles=axes.lstrip("b"),
            bias_path=None if bias is None else paths.relative(bias, path),
            told=Told(told),
            layer=Note(_layer(kind, groups, path in self.names.heads)),
        )

    def _bias(self, path: str, parts: Sequence[Part]) -> str | None:
        """The path of the bias of a weight's module."""
        beside = by_path.sibling_bias(path, self.arrays)
        names = {f"{p.module}.bias" for p in parts}
        own = {bias for n in names for bias, _ in self.tensors.get(n, ())}
        return own.pop() if len(own) == 1 and beside is None else beside

    def _norms(self, path: str, axes: str, at: tuple[int, ...]) -> np.ndarray:
        """The norm of each column of the base, which is the magnitude at the start."""
        w = self.arrays[path]
        if base.is_abstract(w):
            raise ValueError(
                f"peft.load: {path!r} has a magnitude for a part of its outputs, and "
                "the rest follows from its values: expected arrays, found only shapes."
            )
        x = matrix(np.asarray(base.array(w)).astype(np.float64), axes, at)
        return np.linalg.norm(x, axis=0)

    def _full(
        self, path: str, own: Sequence[Part], whole: Mapping[str, np.ndarray]
    ) -> Full | None:
        """A leaf that was trained whole; None for a table that is the base's own.

        peft saves the tables of words unasked, where one of them is adapted.
        """
        for part in own:
            x = whole[part.tensor]
            if why := _count(part, self.names.tensors.get(part.tensor), x):
                self._wrong(why + self._resized(path, x))
                return None
        w = self.arrays[path]
        values = None if base.is_abstract(w) else np.asarray(base.array(w))
        if values is None and len(own) < len(self.names[path]):
            self._wrong(
                f"{own[0].tensor!r} is a part of {path!r}, of which params have only "
                "the shape"
            )
            return None
        dtype = promoted(*(whole[p.tensor].dtype for p in own))
        shape, axes = self.known[path].shape, own[0].axes
        batch, *both = sizes(shape, axes)
        rows, columns = map(math.prod, both)
        start = np.zeros(shape, dtype) if values is None else values.astype(dtype)
        every = np.stack([matrix(start, axes, at) for at in np.ndindex(*batch)])
        every = every.reshape(*batch, rows, columns)
        for part in own:
            at = np.ix_(part.rows.positions, part.columns.positions)
            every[part.at][at] = part.take(whole[part.tensor])
        value = from_matrix(every.reshape(-1, rows, columns), axes, shape)
        if not any(self._asked(p.tensor) for p in own):
            if values is not None and (value.astype(values.dtype) == values).all():
                return None
            if own[0].tensor in self.adapter.tables:
                self._wrong(
                    f"{own[0].tensor!r} was adapted on a table of other values than "
                    f"{path!r} has: the base is another one, or has new tokens"
                )
                return None
        return Full(None, value)

    def _asked(self, tensor: str) -> bool:
        """Whether the config says that a tensor was trained whole."""
        if tensor in self.own:
            return False
        said = self.adapter.config.said
        module, _, last = tensor.rpartition(".")
        saved = said.get("modules_to_save") or []
        saved = [saved] if isinstance(saved, str) else saved
        if any(f".{module}".endswith(f".{name}") for name in saved):
            return True
        return "bias" in last and said.get("bias", "none") != "none"

    def _resized(self, path: str, x: np.ndarray) -> str:
        shape = self.known[path].shape
        if x.ndim == 2 and len(shape) == 2 and x.size > int(np.prod(shape)):
            return (
                ": tokens were added to the base before it was trained. Add as many "
                "rows to the table of params first (their values come from the file)"
            )
        return ""

    def _rows(self, tensor: str, indices: Sequence[int], values: np.ndarray) -> Any:
        places = self.tensors.get(tensor, [])
        if not places:
            near = paths.near(tensor, self.tensors)
            self._wrong(
                f"{tensor!r} (trained tokens) has no table in names; near: {near}"
            )
        for path, part in places:
            shape = self.known[path].shape
            if (
                part.axes != "io"
                or not part.columns.whole(values.shape[1])
                or not (part.tensor_columns.whole(values.shape[1]))
            ):
                self._wrong(
                    f"rows of {path!r} were trained: expected a table (num, dim)"
                )
                continue
            to = dict(
                zip(
                    part.tensor_rows.positions.tolist(),
                    part.rows.positions.tolist(),
                    strict=True,
                )
            )
            if lost := [k for k in indices if k not in to]:
                self._wrong(f"token {lost[0]} was trained, and {path!r} has {shape[0]}")
                continue
            form = Rows(tuple(to[k] for k in indices), shape[0])
            scale = np.ones((), np.float32)
            yield (
                path,
                LoRA(
                    None,
                    None,
                    values,
                    scale,
                    roles="io",
                    form=form,
                    told=Told("embedding"),
                    layer=Note("embed"),
                ),
            )


def _layer(kind: str, groups: int, tied: bool) -> str:
    return f"{kind}/tied" if tied else f"{kind}/{groups}" if groups > 1 else kind


def _turned(head: Any, table: Any) -> bool:
    """Whether the adapter of a head is that of a table."""
    pairs = (head.a, table.b.T), (head.b, table.a.T)
    equal = all(x.shape == y.shape and (x == y).all() for x, y in pairs)
    return equal and head.scale == table.scale and table.m is None


def _count(part: Part, shape: Sequence[int] | None, x: np.ndarray) -> str | None:
    """Why a whole array does not fit its part; None if it does."""
    if shape is not None and tuple(shape) != x.shape:
        return f"{part.tensor!r} has shape {x.shape}: expected {tuple(shape)}"
    if x.ndim != len(part.tensor_axes):
        return f"{part.tensor!r} has {x.ndim} axes: expected {len(part.tensor_axes)}"
    _, *both = sizes(x.shape, part.tensor_axes)
    rows, columns = map(math.prod, both)
    need = (
        int(part.tensor_rows.positions.max()) + 1,
        int(part.tensor_columns.positions.max()) + 1,
    )
    if rows < need[0] or columns < need[1]:
        return f"{part.tensor!r} has {(rows, columns)} (in, out): expected {need}"
    return None
