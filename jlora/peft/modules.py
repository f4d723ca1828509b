r"""A PEFT adapter as it lies on disk: what it has for each module of torch.

Each module's tensors become matrices that do not depend on the kind of its layer:
a is (in, r), b is (r, out).  How the kinds lie in the file is in this file alone:

=============== ============================= =================================
kind            tensors                       matrices
=============== ============================= =================================
linear          lora_A (r, in),               their transposes
                lora_B (out, r)
embedding       lora_embedding_A (r, num),    their transposes
                lora_embedding_B (dim, r)
conv            lora_A (r, in, \*k),          a is (in·k, r); with groups as in
                lora_B (out, r/groups, 1..)   `_grouped`
experts         lora_A (E·r, in), expert      a is (E, in, r), b is (E, r, out)
                major; lora_B (out, r·E),
                expert minor
=============== ============================= =================================
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.peft import config as _config
from jlora.peft import files
from jlora.peft.config import Config
from jlora.peft.files import refuse

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
# Where the output projection of torch's MultiheadAttention is.  peft (0.21.2) adds its
# delta twice to the weight, in training as in merging: the file means that.
HEADS, TWICE = ".base_layer.out_proj", 2
# Parameters of one module in the order in which peft wraps them: that of registration.
_ORDERS = ("gate_up_proj", "down_proj"), ("w1", "w2", "w3"), ("w13", "w2")


@dataclasses.dataclass(frozen=True)
class Module:
    r"""The low-rank adapter of one weight of torch.

    Attributes:
      name: the path of the module.
      tensor: the name of its weight in the base's checkpoint.
      kind: "linear", "embedding", "conv" or "experts".
      a: (in, r); for experts (E, in, r).  The in axes of a convolution are torch's,
        (in/groups, \*k), in one.
      b: (r, out); for experts (E, r, out).
      scale: what a·b is multiplied by.
      c: (out,) bias of the low-rank branch, or None.
      m: (out,) magnitude of DoRA, or None.
      kernel: the sizes of a convolution's window.
      groups: a convolution's number of groups.
    """

    name: str
    tensor: str
    kind: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    c: np.ndarray | None = None
    m: np.ndarray | None = None
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    def padded(self, rank: int) -> Module:
        """The module with ranks of zeros up to this number; its scale stays."""
        more = rank - self.rank
        if not more:
            return self
        a = np.pad(self.a, [*[(0, 0)] * (self.a.ndim - 1), (0, more)])
        b = np.pad(self.b, [*[(0, 0)] * (self.b.ndim - 2), (0, more), (0, 0)])
        return dataclasses.replace(self, a=a, b=b)

    def rescaled(self, scale: float) -> Module:
        """The module with another scale, and the rest of it in b and c."""
        if self.scale == scale:
            return self
        ratio = self.scale / scale

        def times(x: np.ndarray) -> np.ndarray:
            return (x.astype(np.float64) * ratio).astype(x.dtype)

        c = None if self.c is None else times(self.c)
        return dataclasses.replace(self, b=times(self.b), c=c, scale=scale)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """All of an adapter's directory.

    Attributes:
      where: the directory.
      config: its config.
      modules: the low-rank adapters, by the name of their weight's tensor.
      whole: the arrays that were trained whole, by tensor: biases, and what
        ``modules_to_save`` names.
      tables: the tables that peft saves beside the adapter of an embedding, by tensor.
      rows: of an embedding, by tensor: which rows were replaced, and by what.
      hints: what `save` wrote for `load` in the file's metadata, as text.
    """

    where: pathlib.Path
    config: Config
    modules: dict[str, Module]
    whole: dict[str, np.ndarray]
    tables: dict[str, np.ndarray]
    rows: dict[str, tuple[tuple[int, ...], np.ndarray]]
    hints: str = ""

    @property
    def tensors(self) -> list[str]:
        """The name of every tensor of the base that it changes."""
        return [*self.modules, *self.whole, *self.rows]


def read(directory: files.Where) -> Adapter:
    """Reads an adapter's directory.

    Raises:
      FileNotFoundError: there is no such directory, or a file is missing.
      FormatError: a file is damaged, or says what cannot be; a config that changes the
        maths in a way that is not supported; tensors that do not fit each other.
    """
    where = pathlib.Path(directory)
    config, weights = (required(where, n) for n in (_config.FILE, WEIGHTS))
    parsed = _config.parse(files.read_json(config), config)
    tensors = files.Tensors([weights])
    hints = tensors.metadata[weights].get("jlora", "")
    arrays = {name: tensors.read(name) for name in tensors}
    return _Reader(where, parsed, arrays).adapter(hints)


def required(where: pathlib.Path, name: str) -> pathlib.Path:
    """A file of an adapter's directory.

    Raises:
      FileNotFoundError: there is no such directory, or no such file in it.
      FormatError: it leads out of the directory.
    """
    if not where.is_dir():
        raise FileNotFoundError(
            f"there is no directory {where}: expected one with {_config.FILE} and "
            f"{WEIGHTS}, as peft's save_pretrained makes it."
        )
    path = files.inside(where, name)
    if path.is_file():
        return path
    pickle = where / "adapter_model.bin"
    more = ""
    if path.name == WEIGHTS and pickle.exists():
        more = (
            f" {pickle.name} is a pickle, which is not read: save it again in peft, "
            "with safe_serialization=True."
        )
    elif found := sorted(p.parent.name for p in where.glob(f"*/{path.name}")):
        more = f" There is one in {', '.join(map(repr, found[:5]))}: pass that."
    raise FileNotFoundError(f"there is no {path.name} in {where}.{more}")


_FACTOR = re.compile(
    r"(?P<at>.+)\.(?P<what>lora_A\.weight|lora_B\.weight|lora_B\.bias"
    r"|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?)"
)


@dataclasses.dataclass
class _Reader:
    """Sorts the tensors of a file by module."""

    where: pathlib.Path
    config: Config
    arrays: Mapping[str, np.ndarray]

    def adapter(self, hints: str) -> Adapter:
        parts: dict[str, dict[str, np.ndarray]] = {}
        whole: dict[str, np.ndarray] = {}
        tables: dict[str, np.ndarray] = {}
        rows: dict[str, Any] = {}
        bare = not any(key.startswith(PREFIX) for key in self.arrays)
        for key, x in self.arrays.items():
            if not (bare or key.startswith(PREFIX)):
                self.refuse(f"{key!r} does not start with {PREFIX!r}, as others do")
            name = key.removeprefix(PREFIX)
            if found := _FACTOR.fullmatch(name):
                what = found["what"].removesuffix(".weight").removeprefix("lora_")
                own = parts.setdefault(found["at"], {})
                if what in own:
                    self.refuse(f"{key!r} is there twice")
                own[what] = x
            elif name.endswith("." + TOKENS):
                module = name.removesuffix("." + TOKENS)
                rows[f"{module}.weight"] = self._rows(module, x)
            elif ".lora_" in name or name.startswith("lora_"):
                self.refuse(f"the key {key!r} is none that peft writes")
            else:
                plain = name.replace(".base_layer.", ".")
                table = name.endswith(".base_layer.weight")
                (tables if table else whole)[plain] = x
        modules = {m.tensor: m for m in self._modules(parts)}
        if not (modules or whole or rows):
            self.refuse("it has no tensor of an adapter")
        return Adapter(self.where, self.config, modules, whole, tables, rows, hints)

    def refuse(self, why: str) -> Any:
        """Raises about the file of weights."""
        refuse(self.where / WEIGHTS, why)

    def _rows(self, module: str, x: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
        said = self.config.said.get("trainable_token_indices")
        if isinstance(said, dict):
            fits = [v for k, v in said.items() if _ends(module, k)]
            said = fits[0] if len(fits) == 1 else None
        tokens = said if isinstance(said, list) else []
        good = all(
            isinstance(k, int) and not isinstance(k, bool) and 0 <= k < 1 << 31
            for k in tokens
        )
        if not good or x.ndim != 2 or not len({*tokens}) == len(tokens) == len(x):
            self.refuse(
                f"{module!r} has trained rows of shape {x.shape}, and "
                "trainable_token_indices does not name as many different tokens"
            )
        return tuple(tokens), x

    def _modules(self, parts: dict[str, dict[str, np.ndarray]]) -> Iterator[Module]:
        wrapped = self._parameters(parts)
        heads = {at for at in parts if at + HEADS in parts}
        for at, own in parts.items():
            if at in wrapped:
                continue
            name = at.replace(".base_layer.", ".")
            if at in heads:  # torch.nn.MultiheadAttention
                yield self._matrix(name, f"{name}.in_proj_weight", own, name)
            else:
                owner = at.partition(HEADS)[0]
                module = self._matrix(name, f"{name}.weight", own, owner)
                if at.endswith(HEADS):
                    module = dataclasses.replace(module, b=module.b * TWICE)
                yield module
        for at, (module, parameter) in wrapped.items():
            yield self._experts(module, parameter, parts[at])

    def _pair(self, name: str, own: dict[str, np.ndarray], a: str, b: str) -> Any:
        if lacks := [x for x in (a, b) if x not in own]:
            self.refuse(f"{name!r} has no lora_{lacks[0]}: expected both factors")
        return own[a], own[b]

    def _matrix(
        self, name: str, tensor: str, own: dict[str, np.ndarray], owner: str
    ) -> Module:
        kind, kernel, groups = "linear", (), 1
        if any(key.startswith("embedding") for key in own):
            kind = "embedding"
            a, b = self._pair(name, own, "embedding_A", "embedding_B")
            self._check_rank(name, owner, a.shape[:1], a.ndim == b.ndim == 2)
        else:
            a, b = self._pair(name, own, "A", "B")
            self._check_rank(name, owner, a.shape[:1], a.ndim == b.ndim and a.ndim > 1)
        if a.ndim > 2:
            kind, kernel = "conv", a.shape[2:]
            if b.shape[2:] != (1,) * len(kernel) or a.ndim > 5 or not b.shape[1]:
                self.refuse(f"{name!r} has lora_B of shape {b.shape}: expected 1 × 1")
            groups = a.shape[0] // b.shape[1]
            b = b.reshape(b.shape[:2])
        if a.shape[0] != b.shape[1] * groups or b.shape[0] % groups:
            self.refuse(
                f"{name!r} has factors of shapes {own_shapes(own)}, which do not fit "
                "each other"
            )
        a, b, c, m = self._flat(name, own, a, b, groups)
        scale = self.config.scale_of(owner)
        return Module(name, tensor, kind, a, b, scale, c, m, kernel, groups)

    def _flat(
        self, name: str, own: dict[str, np.ndarray], a: Any, b: Any, groups: int
    ) -> Any:
        """(a, b, c, m) as matrices and vectors."""
        out = b.shape[0]
        c, m = own.get("B.bias"), own.get("magnitude_vector")
        for what, x in (("bias", c), ("magnitude", m)):
            if x is not None and x.size != out:
                self.refuse(
                    f"{name!r} has a {what} of shape {x.shape}, for {out} outputs"
                )
        if m is not None and not self.config.said.get("use_dora"):
            self.refuse(f"{name!r} has a magnitude, but the config has no use_dora")
        if m is None and self.config.said.get("use_dora"):
            self.refuse(f"the config has use_dora, but {name!r} has no magnitude")
        if groups > 1:
            a, b = self._grouped(name, a, b, groups)
        else:
            a, b = a.reshape(a.shape[0], -1).T, b.T
        flat = [None if x is None else x.reshape(-1) for x in (c, m)]
        return a, b, *flat

    def _grouped(self, name: str, a: Any, b: Any, groups: int) -> Any:
        """One pair for the kernel itself, of which each group has a part.

        peft's lora_A reads all channels, so in general its delta is no kernel of the
        grouped convolution.  It is one if the ranks of each group read its own channels
        only.
        """
        rank, channels = a.shape[:2]
        r, c = rank // groups, channels // groups
        if rank % groups or channels % groups:
            self.refuse(f"{name!r} has {groups} groups, which divide neither factor")
        # (group of the rank, r, group of the channel, c, *k)
        split = a.reshape(groups, r, groups, c, -1)
        own = np.stack([split[g, :, g] for g in range(groups)])  # (groups, r, c, k)
        if np.count_nonzero(split) != np.count_nonzero(own):
            self.refuse(
                f"{name!r} is a convolution of {groups} groups whose lora_A reads all "
                "channels in each (peft's own form): it fits no kernel of that shape"
            )
        own = own.reshape(groups, r, -1)
        if (own == own[:1]).all():
            return own[0].T, b.T
        out = b.shape[0] // groups
        wide = np.zeros((rank, b.shape[0]), b.dtype)
        for g in range(groups):
            cut = slice(g * out, (g + 1) * out)
            wide[g * r : (g + 1) * r, cut] = b[cut].T
        return own.reshape(rank, -1).T, wide

    def _check_rank(
        self, name: str, owner: str, found: tuple[int, ...], matrix: bool
    ) -> None:
        want = self.config.rank_of(owner)
        if not matrix or found != (want,):
            self.refuse(
                f"{name!r} has a lora_A of rank {found[0] if found else 'none'}: "
                f"expected {want} by the config"
            )

    def _parameters(self, parts: dict[str, Any]) -> dict[str, tuple[str, str]]:
        """(module, parameter) of wrapped parameters, by the place of the factors."""
        said = self.config.said.get("target_parameters") or []
        places: dict[str, list[str]] = {}
        for at in parts:
            module = at
            while module.endswith(".base_layer"):
                module = module.removesuffix(".base_layer")
            if any(_ends(module, name.rpartition(".")[0]) for name in said):
                places.setdefault(module, []).append(at)
        found = {}
        for module, own in places.items():
            own.sort(key=len, reverse=True)  # the innermost was registered first
            names = [
                n.rpartition(".")[2]
                for n in said
                if _ends(module, n.rpartition(".")[0])
            ]
            order = self._order(module, own, list(dict.fromkeys(names)), parts)
            for at, parameter in zip(own, order, strict=True):
                found[at] = module, parameter
        return found

    def _order(
        self, module: str, own: list[str], names: list[str], parts: dict[str, Any]
    ) -> list[str]:
        if len(own) != len(names):
            self.refuse(
                f"{module!r} has factors for {len(own)} parameters, and "
                f"target_parameters names {names}"
            )
        order = registered(names)
        if order is None:
            self.refuse(
                f"{module!r} has factors for {names}, and nothing says whose is which: "
                "peft has them in the order of registration. Save them as "
                "adapters of one parameter each"
            )
        return order or names

    def _experts(self, module: str, parameter: str, own: Any) -> Module:
        a, b = self._pair(module, own, "A", "B")
        tensor = f"{module}.{parameter}"  # by which peft looks up its patterns
        rank = self.config.rank_of(tensor)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
            self.refuse(
                f"{module!r}: {parameter} has factors of shapes {own_shapes(own)}: "
                f"expected (E·{rank}, in) and (out, {rank}·E)"
            )
        n = a.shape[0] // rank
        scale = self.config.scale_of(tensor)
        a = a.reshape(n, rank, -1).swapaxes(1, 2)
        b = b.reshape(-1, rank, n).transpose(2, 1, 0)
        if n == 1:
            return Module(module, tensor, "linear", a[0], b[0], scale)
        return Module(module, tensor, "experts", a, b, scale)


def registered(names: Sequence[str]) -> list[str] | None:
    """Parameters of one module in the order of their registration, if it is known."""
    for known in _ORDERS:
        if {*names} <= {*known}:
            return [n for n in known if n in names]
    return list(names) if len(names) < 2 else None


def own_shapes(own: Mapping[str, np.ndarray]) -> str:
    """The shapes of a module's tensors, for an error."""
    return ", ".join(f"{name} {x.shape}" for name, x in own.items())


def _ends(module: str, name: str) -> bool:
    return not name or module == name or module.endswith(f".{name}")


# ------------------------------------------------------------------------- the way back


def tensors_of(module: Module, at: str) -> dict[str, np.ndarray]:
    """The tensors of a file for a module, under the place ``at``.

    Args:
      module: the adapter of one weight.
      at: its path in the file, without the first prefix.
    """
    a, b = module.a, module.b
    if at.endswith(HEADS):
        b = b / b.dtype.type(TWICE)
    place = PREFIX + at
    if module.kind == "embedding":
        out = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    elif module.kind == "experts":
        n, _, rank = a.shape
        out = {
            "lora_A.weight": a.swapaxes(1, 2).reshape(n * rank, -1),
            "lora_B.weight": b.transpose(2, 1, 0).reshape(-1, rank * n),
        }
    elif module.kind == "conv":
        first, second = _kernels(module)
        out = {"lora_A.weight": first, "lora_B.weight": second}
    else:
        out = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    if module.c is not None:
        out["lora_B.bias"] = module.c
    if module.m is not None:
        ones = (1,) * len(module.kernel)
        m = module.m.reshape(1, -1, *ones) if module.kind == "conv" else module.m
        out["lora_magnitude_vector"] = m
    return {f"{place}.{name}": x for name, x in out.items()}


def _kernels(module: Module) -> tuple[np.ndarray, np.ndarray]:
    r"""lora_A (r, in, \*k) and lora_B (out, r/groups, 1..) of a convolution.

    With groups the rank grows by their number: each group has ranks of its own, which
    read its own channels.
    """
    a, b, g = module.a, module.b, module.groups
    rank, k = module.rank, module.kernel
    own = a.T.reshape(rank, -1, *k)  # (r, in/groups, *k)
    first = np.zeros((g, rank, g, *own.shape[1:]), a.dtype)
    for n in range(g):
        first[n, :, n] = own
    first = first.reshape(g * rank, -1, *k)
    return first, b.T.reshape(-1, rank, *(1,) * len(k))


def size_of(module: Module) -> int:
    """r as the file has it: a grouped convolution has one for each group."""
    return module.rank * module.groups if module.kind == "conv" else module.rank
