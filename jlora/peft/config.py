"""``adapter_config.json``: what it says of the maths, and what is refused.

peft's ``LoraConfig`` has some fifty keys.  Those that change what the adapter computes
are read or refused by name.  All others say how it was trained, and are left alone.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.peft.files import refuse

FILE = "adapter_config.json"

# Keys that change the maths in a way that has no form here, each with the value that
# leaves it alone and what the value does.
_UNSUPPORTED: dict[str, str] = {
    "alora_invocation_tokens": "the adapter acts on the last tokens only",
    "layer_replication": "layers of the base are repeated",
    "use_qalora": "the activations are pooled in groups",
    "use_bdlora": "the factors are block-diagonal",
    "arrow_config": "adapters are mixed by a router",
    "kasa_config": "the base is truncated, and a diagonal is trained",
    "monteclora_config": "the factors are drawn from distributions",
}
# Initialisations that change the base when peft loads the adapter.
_MOVES = "pissa", "olora", "corda", "loftq"
# Keys that say nothing of what the adapter computes.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform "
    "loftq_config lora_dropout lora_ga_config megatron_config megatron_core "
    "modules_to_save peft_type peft_version qalora_group_size revision runtime_config "
    "target_modules task_type velora_config".split()
)
_READ = frozenset(
    "alpha_pattern bias init_lora_weights lora_alpha lora_bias r rank_pattern "
    "target_parameters trainable_token_indices use_dora use_rslora".split()
)
_MOST = 0.8  # seconds that all patterns of a file may take together
_LONGEST = 256  # characters of a module's name that meets a pattern
_LITERAL = re.compile(r"\^?[\w.\\-]+\$?")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config says of the maths.

    Attributes:
      said: the whole object.
      where: the file, for errors.
      rank: r of the modules that no pattern names.
      alpha: ``lora_alpha``, likewise.
      rslora: whether the scale is alpha / √r.
      ranks: r by pattern.
      alphas: alpha by pattern.
    """

    said: Mapping[str, Any]
    where: Any
    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    _spent: list[float] = dataclasses.field(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        """The keys that are unknown here, and set to something."""
        known = _HARMLESS | _READ | {*_UNSUPPORTED}
        return sorted(k for k, v in self.said.items() if k not in known and v)

    def rank_of(self, module: str) -> int:
        """r of a module, by peft's rule: the first pattern that fits wins."""
        return self._of(self.ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """alpha of a module, by the same rule."""
        return self._of(self.alphas, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def _of(self, table: Mapping[str, Any], module: str, default: Any) -> Any:
        for pattern, value in table.items():
            found = _literally(pattern, module)
            if found is None:
                found = self._matched(pattern, module)
            if found:
                return value
        return default

    def _matched(self, pattern: str, module: str) -> bool:
        """Whether a pattern fits, as peft matches it; not for ever."""
        if len(module) > _LONGEST or sum(self._spent) > _MOST:
            refuse(self.where, "its patterns take too long to match")
        start = time.monotonic()
        found = re.match(rf"(.*\.)?({pattern})$", module) is not None
        self._spent.append(time.monotonic() - start)
        return found

    def target_list(self) -> list[str] | None:
        """The target modules, if they are listed by name; else None."""
        found = self.said.get("target_modules")
        return None if isinstance(found, str) or found is None else list(found)

    def targets(self, module: str) -> bool:
        """Whether listed targets name a module: the path, or a suffix of its keys."""
        found = self.target_list() or []
        excluded = self.said.get("exclude_modules") or []
        kept = not isinstance(excluded, str) and not _suffix(excluded, module)
        if not (kept and _suffix(found, module)):
            return False
        layers = self.said.get("layers_to_transform")
        if layers is None:
            return True
        chosen = [layers] if isinstance(layers, int) else layers
        number = re.search(r"(?:^|\.)(\d+)\.", module)
        return number is not None and int(number[1]) in chosen


def _suffix(names: Sequence[str], module: str) -> bool:
    return any(module == n or module.endswith(f".{n}") for n in names)


def _literally(pattern: str, module: str) -> bool | None:
    """Whether a pattern without signs fits; None if it has some."""
    if not _LITERAL.fullmatch(pattern):
        return None
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if "\\" in plain or "." in pattern.replace("\\.", ""):
        return None
    return module == plain or (pattern[0] != "^" and module.endswith("." + plain))


def _hazard(pattern: str) -> str:
    """Why a pattern could take for ever; empty if it cannot.

    A group that repeats may take exponential time, and each wildcard multiplies it by
    the length of the name.
    """
    if len(pattern) > 1000:
        return "it has over 1,000 characters"
    if re.search(r"\)[*+{]", pattern):
        return "it repeats a group"
    if re.search(r"(?<!\\)\\[1-9]", pattern):
        return "it refers to a group"
    repeated = re.findall(r"(?<![\\(])[*+{?]", pattern)
    wide = re.findall(r"(?:(?<!\\)\.|\]|\\[wWDSs])[*+{]", pattern)
    if len(wide) > 2 or len(repeated) > 4:
        return "it has too many repetitions"
    return ""


def parse(said: Mapping[str, Any], where: Any) -> Config:
    """The config of an adapter for LoRA; raises for one that has no form here.

    Args:
      said: the object of the file.
      where: the file, for errors.
    """
    kind = said.get("peft_type")
    if kind != "LORA":
        refuse(
            where, f"peft_type is {kind!r}: expected 'LORA', the only kind read here"
        )
    for key, what in _UNSUPPORTED.items():
        if said.get(key):
            refuse(
                where,
                f"{key} is set ({what}), which is not supported",
                "An adapter that ignored it would compute something else.",
            )
    init = said.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MOVES):
        refuse(
            where,
            f"init_lora_weights is {init!r}, which changes the base when peft loads "
            "the adapter",
            "Save it for the original base: in peft, model.save_pretrained(directory, "
            "path_initial_model_for_weight_conversion=...).",
        )
    if said.get("bias", "none") not in ("none", "all", "lora_only"):
        refuse(where, f"bias is {said['bias']!r}: expected none, all or lora_only")
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(said.get(key, False), (bool, type(None))):
            refuse(where, f"{key} is {said[key]!r}: expected true or false")
    _check_lists(said, where)
    rank = _number(said, "r", 8, where)
    return Config(
        said,
        where,
        _rank(rank, "r", where),
        float(_number(said, "lora_alpha", 8, where)),
        bool(said.get("use_rslora", False)),
        {
            k: _rank(v, f"rank_pattern of {k!r}", where)
            for k, v in _patterns(said, "rank_pattern", where).items()
        },
        {k: float(v) for k, v in _patterns(said, "alpha_pattern", where).items()},
    )


def _check_lists(said: Mapping[str, Any], where: Any) -> None:
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        found = said.get(key)
        words = isinstance(found, list) and all(isinstance(x, str) for x in found)
        if not (found is None or words or isinstance(found, str)):
            refuse(where, f"{key} is {_brief(found)}: expected names, or one pattern")
    found = said.get("target_parameters")
    if found is not None and not (
        isinstance(found, list) and all(isinstance(x, str) for x in found)
    ):
        refuse(where, f"target_parameters is {_brief(found)}: expected names")
    layers = said.get("layers_to_transform")
    numbers_ = isinstance(layers, list) and all(_is_int(x) for x in layers)
    if not (layers is None or _is_int(layers) or numbers_):
        refuse(where, f"layers_to_transform is {_brief(layers)}: expected integers")


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _brief(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 80 else f"a {type(x).__name__}"


def _number(said: Mapping[str, Any], key: str, default: Any, where: Any) -> Any:
    x = said.get(key, default)
    # json reads 1e400 as an infinity, and takes NaN for a number.
    if isinstance(x, bool) or not isinstance(x, numbers.Real) or not _finite(x):
        refuse(where, f"{key} is {_brief(x)}: expected a number")
    return x


def _finite(x: Any) -> bool:
    try:
        return math.isfinite(x)
    except OverflowError:
        return False


def _rank(x: Any, what: str, where: Any) -> int:
    if not _is_int(x) or not 0 < x < 1 << 31:
        refuse(where, f"{what} is {_brief(x)}: expected a positive integer")
    return int(x)


def _patterns(said: Mapping[str, Any], key: str, where: Any) -> dict[str, Any]:
    table = said.get(key) or {}
    if not isinstance(table, dict):
        refuse(where, f"{key} is {_brief(table)}: expected numbers by pattern")
    for pattern in table:
        _number(table, pattern, None, where)
        if why := _hazard(pattern):
            refuse(where, f"the pattern {pattern[:80]!r} of {key} is not read: {why}")
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as e:
            refuse(where, f"the pattern {pattern[:80]!r} of {key} is none ({e})")
    return table
