"""The tensors and the config of an adapter, as peft has them."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora._algebra.rows import replaces, rows_of
from jlora._leaf import Full, LoRA, base, is_adapted
from jlora._leaf.fields import lacking, trained
from jlora._leaf.forms import NotFactored
from jlora._tree import by_path, paths
from jlora.peft.modules import (
    HEADS,
    PREFIX,
    TOKENS,
    Module,
    registered,
    size_of,
    tensors_of,
)
from jlora.peft.names import Names
from jlora.peft.portable import MERGE, portable_of, refusal, suffixes_of
from jlora.peft.to_torch import Joined, array_of, host, joined, pieces


@dataclasses.dataclass
class Writer:
    """Collects the tensors and the config of an adapter.

    Attributes:
      tree: the adapted tree, or the adapter alone.
      adapter: path to leaf.
      names: which tensors each weight is.
      own_base: whether the base of the tree is saved as well, as it is.
      tensors: name in the file to array; what `run` makes.
    """

    tree: Any
    adapter: Mapping[str, Any]
    names: Names
    own_base: bool

    def __post_init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.parts: Joined = Joined({}, {}, [])
        self.saved: list[str] = []
        self.bias = "none"
        self.own: list[str] = []  # tensors of the base that have to be saved, too
        self.rows: dict[str, list[int]] = {}
        self.targets: list[str] | None = None

    def run(self, portable: bool) -> None:
        """Makes all tensors."""
        found = []
        for path, leaf in self.adapter.items():
            self._check(path, leaf)
            if isinstance(leaf, LoRA) and not replaces(leaf):
                try:
                    found += pieces(path, leaf, self.names[path])
                except NotFactored:
                    raise ValueError(
                        f"peft.save: {path!r} has the form {leaf.form}, which is no "
                        "product of two matrices: expected a plain adapter, such as "
                        "jlora.extract(params, jlora.merge(tree), rank=...) gives."
                    ) from None
        self.parts = joined(found, self.names)
        self._add_heads()
        if portable:
            self._check_portable()
            self.parts, self.targets = portable_of(self.parts, self.names)
        self._alike()
        for module in self.parts.modules.values():
            self.tensors |= tensors_of(module, self._place(module))
        self._whole_arrays()
        self._tokens()

    def _add_heads(self) -> None:
        """The adapter of a table on the head as well, where the two are tied."""
        for path, head in self.names.heads.items():
            leaf = self.adapter.get(path)
            if not isinstance(leaf, LoRA) or replaces(leaf):
                continue
            part = self.names[path][0]
            if part.kind != "embed":
                if not head:
                    raise ValueError(
                        f"peft.save: {path!r} is {part.tensor!r} in the file, "
                        "which is the embedding (tied), but torch's model has a module "
                        "for the head: say which, head='lm_head'."
                    )
                continue
            module = self.parts.modules[part.tensor]
            if not head or module.m is not None:
                why = (
                    "the two have magnitudes of their own in peft: expected a plain "
                    "adapter"
                    if module.m is not None
                    else "peft adapts the two by themselves: say the head's module, "
                    "head='lm_head'"
                )
                raise ValueError(
                    f"peft.save: {path!r} is an embedding and a (tied) head: {why}."
                )
            tensor, a, b = f"{head}.weight", module.b.T, module.a.T
            new = Module(head, tensor, "linear", a, b, module.scale)
            self.parts.modules[tensor] = new

    def _check_portable(self) -> None:
        """Raises for leaves that are no factors."""
        for path, x in self.adapter.items():
            if isinstance(x, Full) or replaces(x):
                raise ValueError(refusal(path, "trains besides factors", MERGE))

    def _check(self, path: str, leaf: Any) -> None:
        if path not in self.names.found:
            near = "; names are empty"
            if self.names.found:
                near = f"; near: {paths.near(path, self.names.found)}"
            why = self.names.missing.get(path)
            why = f": {why.partition('. Say which')[0]}" if why else near
            raise ValueError(
                f"peft.save: names have nothing for {path!r}{why}. Say it by hand: "
                f"names | {{{path!r}: 'path.of.the.module'}}."
            )
        if any(x.dtype.itemsize < 2 for x in jax.tree.leaves(_fields_of(leaf))):
            raise ValueError(
                f"peft.save: {path!r} has factors of 8 bits, which peft's files have "
                "not: expected 16 or more. Cast them first."
            )
        own = self.names[path][0].axes
        if isinstance(leaf, LoRA) and own != leaf.axes:
            raise ValueError(
                f"peft.save: {path!r} has the roles {leaf.axes!r}, and names were "
                f"found for {own!r}: pass the plan of the tree to match, plan=plan."
            )
        if lacks := lacking(leaf):
            raise ValueError(
                f"peft.save: {path!r} lacks {', '.join(lacks)}: expected a whole "
                "adapter; if it is half of a partition, combine it first."
            )
        if isinstance(leaf, LoRA) and leaf.moved and not self.own_base:
            raise ValueError(
                f"peft.save: {path!r} started by {str(leaf.moved)!r}, which changed "
                "the base, and the file is for the original one: expected an adapter "
                "of that, jlora.mix([trained, start], [1, -1]); or own_base=True, if "
                "the base of the tree, jlora.unwrap(tree), is saved as well."
            )
        if isinstance(leaf, LoRA) and base.is_zero(leaf.w):
            raise ValueError(
                f"peft.save: {path!r} lost its base (drop_base), which peft's file has "
                "no word for: expected an adapter of a whole model."
            )

    # --------------------------------------------------------------------- modules

    def _place(self, module: Module) -> str:
        """Where peft has the factors of a module."""
        parent, _, last = module.name.rpartition(".")
        if last == "out_proj" and f"{parent}.in_proj_weight" in self.parts.modules:
            return parent + HEADS
        if self._is_parameter(module):
            first = module.tensor.rpartition(".")[2]
            mine = [
                m.tensor.rpartition(".")[2]
                for m in self.parts.modules.values()
                if self._is_parameter(m) and m.name == module.name
            ]
            after = [x for x in self._registered(mine) if x != first]
            depth = len(after) - self._registered(mine).index(first)
            return module.name + ".base_layer" * depth
        return module.name

    def _is_parameter(self, module: Module) -> bool:
        last = module.tensor.rpartition(".")[2]
        return last not in ("weight", "in_proj_weight")

    def _registered(self, names: Sequence[str]) -> list[str]:
        order = registered(names)
        if order is None:
            raise ValueError(
                f"peft.save: {names} are parameters of one module, which peft numbers "
                "in the order of their registration, and nothing tells it: expected "
                "one of them. Save them as adapters of one parameter each."
            )
        return order

    def _alike(self) -> None:
        """Gives one rank and one scale to all that peft looks up by one name."""
        self._complete_heads()
        groups: dict[str, list[Module]] = {}
        for module in self.parts.modules.values():
            groups.setdefault(self._owner(module), []).append(module)
        for own in groups.values():
            rank = max(m.rank for m in own)
            for m in own:
                if m.rank < rank and m.tensor not in self.parts.ranks:
                    self.parts.ranks[m.tensor] = [
                        [path, [*p.at], [*p.item], 0, m.rank]
                        for path, parts in self.names.found.items()
                        for p in parts
                        if p.tensor == m.tensor
                    ]
                scale = next((x.scale for x in own if x.scale), 0.0)
                new = m.padded(rank).rescaled(scale)
                self.parts.modules[m.tensor] = new

    def _complete_heads(self) -> None:
        """Both projections of torch.nn.MultiheadAttention, as peft needs them."""
        modules = self.parts.modules
        known = {*self.names.tensors, *modules}
        known |= {p.tensor for own in self.names.found.values() for p in own}
        for tensor in sorted(t for t in known if t.endswith(".in_proj_weight")):
            name = tensor.removesuffix(".in_proj_weight")
            pair = tensor, f"{name}.out_proj.weight"
            there = [modules[t] for t in pair if t in modules]
            if any(m.m is not None or m.c is not None for m in there):
                raise ValueError(
                    f"peft.save: {name!r} is a MultiheadAttention with a magnitude or "
                    "an output bias, which peft has not: expected plain factors."
                )
            for t in pair:
                if there and t not in modules:
                    like, last = there[0], t == tensor
                    dim = like.a.shape[0]
                    a = np.zeros((dim, like.rank), like.a.dtype)
                    b = np.zeros((like.rank, 3 * dim if last else dim), like.b.dtype)
                    place = name if last else f"{name}.out_proj"
                    modules[t] = Module(place, t, "linear", a, b, like.scale)

    # ---------------------------------------------------------------- what is whole

    def _whole_arrays(self) -> None:
        full = {p: x for p, x in self.adapter.items() if isinstance(x, Full)}
        if not full:
            return
        tensors = {p.tensor for path in full for p in self.names[path]}
        places = {m.name: m for m in self.parts.modules.values()}
        adapted = {*places}
        biases = {t for t in tensors if _is_bias(t)}
        rest = tensors - biases
        owned = {t for t in biases if t.rpartition(".")[0] in adapted}
        free = (
            biases
            - owned
            - {t for t in biases if f"{t.rpartition('.')[0]}.weight" in rest}
        )
        every = {p.tensor for own in self.names.found.values() for p in own}
        every = {t for t in every if _is_bias(t)}
        all_, mine = (
            biases == every,
            {t for t in every if t.rpartition(".")[0] in adapted},
        )
        if free and all_:
            self.bias = "all"
        elif owned:
            self.bias = "lora_only"
        saved = {t.rpartition(".")[0] for t in rest}
        if self.bias != "all":
            saved |= {t.rpartition(".")[0] for t in free}
        wanted = {*tensors}
        if self.bias == "lora_only":
            wanted |= mine
        for name in saved:
            wanted |= {t for t in self._known() if t.rpartition(".")[0] == name}
        self.saved = sorted(saved)
        self.own = sorted(wanted - tensors)
        values = self._values()
        for tensor in sorted(wanted):
            x = array_of(tensor, values, self.names)
            if x is None:
                raise ValueError(
                    f"peft.save: {tensor!r} has to be saved whole, and names do not "
                    "have weights for all of it: name them all, as match does."
                )
            name, _, last = tensor.rpartition(".")
            if last == "in_proj_bias":
                raise ValueError(
                    f"peft.save: {tensor!r} trains, which is the bias of "
                    "torch.nn.MultiheadAttention that no bias mode of peft reaches: "
                    "expected it frozen. Leave it out of train= or bias=."
                )
            held = name
            if name in adapted and _is_bias(tensor):
                held = f"{self._place(places[name])}.base_layer"
            self.tensors[f"{PREFIX}{held}.{last}"] = x

    def _known(self) -> set[str]:
        return {p.tensor for own in self.names.found.values() for p in own}

    def _values(self) -> dict[str, Any]:
        """Every array of the tree: what trains whole in its own dtype."""
        out = {}
        for path, x in by_path.flatten(self.tree)[0]:
            if isinstance(x, Full):
                out[path] = _Lazy(x.value)
            elif is_adapted(x):
                out[path] = _Lazy(None if x.w is None else base.array(x.w))
            elif hasattr(x, "shape"):
                out[path] = _Lazy(x)
        return out

    def _tokens(self) -> None:
        for path, x in self.adapter.items():
            if not (isinstance(x, LoRA) and replaces(x)):
                continue
            parts = self.names[path]
            part = parts[0]
            n = x.shape[1] if len(x.shape) == 2 else 0
            if (
                len(parts) > 1
                or not part.columns.whole(n)
                or not part.tensor_columns.whole(n)
            ):
                raise ValueError(
                    f"peft.save: rows of {path!r} train, which is not one table (num, "
                    "dim) of the checkpoint: expected one, as peft has it."
                )
            if float(host(x.scale)) != 1:
                raise ValueError(
                    f"peft.save: the rows of {path!r} are scaled, for which peft has "
                    "no word: expected a scale of 1."
                )
            to = dict(
                zip(
                    part.rows.positions.tolist(),
                    part.tensor_rows.positions.tolist(),
                    strict=True,
                )
            )
            rows = [int(to[k]) for k in rows_of(x)]
            self.rows[part.module] = rows
            self.tensors[f"{PREFIX}{part.module}.{TOKENS}"] = host(x.b)

    # ---------------------------------------------------------------------- config

    def hints(self) -> str:
        """What `load` needs to take the ranks of one tensor apart again, as JSON."""
        said: dict[str, Any] = {}
        if self.parts.ranks:
            said["ranks"] = self.parts.ranks
        if self.parts.filled:
            said["filled"] = self.parts.filled
        if self.own:
            said["base"] = self.own
        return json.dumps(said) if said else ""

    def config(self) -> dict[str, Any]:
        """The object of ``adapter_config.json``."""
        modules = list(self.parts.modules.values())
        owners = {self._owner(m): m for m in modules}
        ranks = {name: size_of(m) for name, m in owners.items()}
        alphas = {name: m.scale * size_of(m) for name, m in owners.items()}
        rank, alpha = _most(ranks.values(), 8), _most(alphas.values(), 8)
        plain = [m for m in modules if not self._is_parameter(m)]
        parameters = [m for m in modules if self._is_parameter(m)]
        said: dict[str, Any] = {
            "auto_mapping": None,
            "base_model_name_or_path": None,
            "bias": self.bias,
            "fan_in_fan_out": any(
                p.tensor_axes == "io" and p.kind == "dense"
                for m in plain
                for p in self.names.parts_of(m.tensor)
            ),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": _number(alpha),
            "lora_bias": any(m.c is not None for m in modules),
            "lora_dropout": 0.0,
            "modules_to_save": self.saved or None,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": {_exactly(n): r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {
                _exactly(n): _number(a) for n, a in alphas.items() if a != alpha
            },
            "target_modules": self._targets(plain),
            "task_type": None,
            "use_dora": any(m.m is not None for m in modules),
            "use_rslora": False,
        }
        if parameters:
            said["target_parameters"] = sorted({m.tensor for m in parameters})
        if self.rows:
            said["trainable_token_indices"] = dict(self.rows)
        return said

    def _owner(self, module: Module) -> str:
        """The name by which peft looks up rank and alpha."""
        if self._is_parameter(module):
            return module.tensor
        parent, _, last = module.name.rpartition(".")
        if last == "out_proj" and f"{parent}.in_proj_weight" in self.parts.modules:
            return parent
        return module.name

    def _targets(self, modules: Sequence[Module]) -> list[str] | str:
        """Suffixes if they name no other module of the checkpoint; else whole paths."""
        if self.targets is not None:
            return self.targets
        own = {self._owner(m) for m in modules}
        every = self.names.modules
        if every and (suffixes := suffixes_of(own, every)):
            return suffixes
        # peft takes a path for a suffix, too: where it is one of another, a pattern.
        if any(other.endswith(f".{n}") for other in every - own for n in own):
            return "|".join(map(re.escape, sorted(own)))
        return sorted(own)


def _fields_of(leaf: Any) -> list[Any]:
    """The arrays of a leaf that train."""
    return [getattr(leaf, name) for name in trained(leaf)]


class _Lazy:
    """An array that is brought to the host when it is needed."""

    def __init__(self, x: Any):
        self._x = x

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self._x is None:
            raise ValueError(
                "peft.save: what trains whole needs the rest of its module from the "
                "base: expected the whole adapted tree, found an adapter alone."
            )
        x = host(self._x)
        return x if dtype is None else x.astype(dtype)


def _is_bias(tensor: str) -> bool:
    return tensor.rpartition(".")[2] in ("bias", "in_proj_bias")


def _most(values: Any, default: Any) -> Any:
    """The most frequent value."""
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _number(x: float) -> float | int:
    if not math.isfinite(x):
        raise ValueError(f"peft.save: alpha {x}: expected a finite scale.")
    return int(x) if x == int(x) else x


def _exactly(name: str) -> str:
    """The pattern that fits this module, and no other."""
    return "^" + re.escape(name)
