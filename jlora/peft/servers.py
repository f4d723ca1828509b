"""What the loaders of servers do with a PEFT adapter, as data.

Each `Rule` was read in the source of one version (`VERSIONS`).  **A new rule** is one
line of `RULES`: what it looks for in the file, and what the server does about it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

VERSIONS = {
    "vllm": "vLLM 0.33.0",
    "sglang": "SGLang 0.5.23",
    "tensorrt-llm": "TensorRT-LLM, commit 1630fc37",
    "transformers": "transformers with peft 0.21.2",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a directory says, without a judgement.

    Attributes:
      config: the object of ``adapter_config.json``.
      shapes: the shape of each tensor, by key.
      files: the names of all files.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    files: frozenset[str]

    def keys(self, pattern: str) -> list[str]:
        """The tensors whose whole name fits a pattern."""
        return [key for key in self.shapes if re.fullmatch(pattern, key)]

    def without(self, pattern: str) -> list[str]:
        """The tensors whose whole name does not fit a pattern."""
        return [key for key in self.shapes if not re.fullmatch(pattern, key)]

    @property
    def ranks(self) -> list[int]:
        """Every rank that the config names."""
        said = self.config.get("rank_pattern")
        own = list(said.values()) if isinstance(said, Mapping) else []
        return [r for r in [self.config.get("r", 8), *own] if isinstance(r, int)]

    def modules(self, last: str) -> set[str]:
        """The paths above modules of this name that have factors."""
        found = (re.fullmatch(rf"(.*)\.{last}\.lora_A\.weight", k) for k in self.shapes)
        return {m[1] for m in found if m}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One thing that a server does with an adapter.

    Attributes:
      servers: their names.
      level: "refused", "ignored" (silently, so that another model is served), or
        "needs" (a setting of the server).
      find: gives what is found of it in a file; nothing if all is well.
      what: what the server does.
      do: what the user can do about it.
    """

    servers: str
    level: str
    find: Callable[[Facts], Any]
    what: str
    do: str


PORTABLE = "save with portable=True"
PLAIN = (
    "extract a plain adapter, jlora.extract(params, jlora.merge(tree), rank=...), and "
    "save it with portable=True"
)
MERGE = "merge the adapter into the base (jlora merge)"
_LORA = r".*\.lora_[AB]\.weight"
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_TRT = (
    r".*\.(?:q|k|v|o|qkv|gate|up|down|gate_up)_proj\.lora_[AB]\.weight|"
    r".*\.(?:w1|w2|w3|gate|in_proj|out_proj)\.lora_[AB]\.weight"
)


def _set(key: str) -> Callable[[Facts], Any]:
    """Finds a key of the config that is set."""
    return lambda f: f"{key}: {f.config[key]}" if f.config.get(key) else None


def _other_type(f: Facts) -> Any:
    said = f.config.get("peft_type")
    return None if str(said).upper() == "LORA" else f"peft_type: {said}"


def _lacks(*names: str) -> Callable[[Facts], Any]:
    return lambda f: [n for n in names if f.config.get(n) is None]


def _other_modules(*allowed: str) -> Callable[[Facts], Any]:
    def find(f: Facts) -> Any:
        said = f.config.get("modules_to_save") or []
        said = [said] if isinstance(said, str) else said
        return [m for m in said if m not in allowed]

    return find


def _over(rank: int) -> Callable[[Facts], Any]:
    def find(f: Facts) -> Any:
        most = max(f.ranks, default=0)
        return f"rank {most}" if most > rank else None

    return find


def _bad_ranks(f: Facts) -> Any:
    said = f.config.get("rank_pattern") or {}
    own = [f.config.get("r", 8), *(said.values() if isinstance(said, Mapping) else [])]
    return [r for r in own if not isinstance(r, int) or isinstance(r, bool) or r < 1]


def _init(f: Facts) -> Any:
    said = f.config.get("init_lora_weights", True)
    odd = isinstance(said, str) and said.lower() not in _PLAIN_INITS
    return f"init_lora_weights: {said}" if odd else None


def _bias(f: Facts) -> Any:
    said = f.config.get("bias")
    return None if said in ("none", None) else f"bias: {said}"


def _in_three(f: Facts) -> list[str]:
    return [k for k in f.keys(_LORA) if len(f.shapes[k]) > 2]


def _experts(f: Facts) -> Any:
    return f.config.get("target_parameters") or f.keys(r".*\.experts\.lora_A\.weight")


def _half_experts(f: Facts) -> Any:
    down = f.keys(r".*\.experts\.lora_A\.weight")
    up = {
        k.replace(".base_layer", "") for k in f.keys(r".*\.base_layer\.lora_A\.weight")
    }
    return [k for k in down if k not in up]


def _without_v(f: Facts) -> Any:
    return sorted(f.modules("q_proj") - f.modules("v_proj"))


def _without_q(f: Facts) -> Any:
    return sorted((f.modules("k_proj") | f.modules("v_proj")) - f.modules("q_proj"))


def _regex_targets(f: Facts) -> Any:
    said = f.config.get("target_modules")
    odd = isinstance(said, str) and said not in ("all", "all-linear")
    return f"target_modules: {said}" if odd else None


_SERVERS = "vllm sglang tensorrt-llm"

RULES = (
    Rule(
        f"{_SERVERS} transformers",
        "refused",
        _other_type,
        "takes peft_type LORA only",
        "convert it to LoRA in peft, save_as_lora",
    ),
    Rule(
        "vllm sglang",
        "refused",
        _lacks("r", "lora_alpha", "target_modules"),
        "needs these keys in adapter_config.json",
        "write them: peft's own defaults are not assumed",
    ),
    Rule("vllm", "refused", _bad_ranks, "takes positive ranks only", "mend the config"),
    Rule("vllm", "refused", _set("use_dora"), "has no DoRA", PLAIN),
    Rule("vllm", "refused", _set("lora_bias"), "has no bias of the adapter", PLAIN),
    Rule(
        "vllm",
        "refused",
        lambda f: (
            f.config.get("bias", "none") not in ("none", None) and f.config.get("bias")
        ),
        "takes no trained biases",
        MERGE,
    ),
    Rule(
        "vllm",
        "refused",
        _other_modules("classifier", "score"),
        "takes no modules_to_save besides classifier and score",
        MERGE,
    ),
    Rule(
        "vllm",
        "refused",
        _init,
        "takes no adapter whose initialisation changed the base",
        "save it for the original base, jlora.mix([trained, start], [1, -1])",
    ),
    *(
        Rule("vllm", "refused", _set(key), f"has no {key}", "train without it")
        for key in (
            "alora_invocation_tokens",
            "layer_replication",
            "use_bdlora",
            "use_qalora",
        )
    ),
    Rule(
        "vllm",
        "refused",
        lambda f: f.without(
            rf"{_LORA}|.*\.lora_embedding_[AB]"
            r"|.*\.(?:embed_tokens|lm_head)\.base_layer\.weight"
            r"|.*\.(?:score|classifier)\.(?:weight|bias)"
        ),
        "takes no tensors of these names",
        MERGE,
    ),
    Rule(
        "vllm", "refused", _in_three, "adapts linear layers and embeddings only", MERGE
    ),
    Rule(
        "vllm",
        "refused",
        _over(512),
        "takes ranks up to 512",
        "lower it: jlora.truncate(adapter, 512)",
    ),
    Rule(
        "vllm",
        "needs",
        _over(16),
        "takes ranks up to 16 unless it is told",
        "start it with --max-lora-rank",
    ),
    Rule(
        "vllm",
        "refused",
        _half_experts,
        "asserts that gate_up_proj and down_proj of experts are both adapted",
        "adapt both; a fresh one (b = 0) changes nothing",
    ),
    Rule(
        "vllm",
        "ignored",
        _experts,
        "reads experts in peft's layout for models with 3-D expert weights only; for "
        "others it takes the rows in another order",
        "check the outputs of the model that is served, or " + MERGE,
    ),
    Rule("sglang", "refused", _set("use_dora"), "has no DoRA", PLAIN),
    Rule(
        "sglang",
        "refused",
        lambda f: "added_tokens.json" if "added_tokens.json" in f.files else None,
        "takes no adapter that adds tokens",
        "leave the file out if the tokens are the base's own; else " + MERGE,
    ),
    Rule(
        "sglang",
        "refused",
        _regex_targets,
        "takes a list of target_modules, all or all-linear, and no pattern",
        PORTABLE,
    ),
    Rule(
        "sglang",
        "ignored",
        _set("use_rslora"),
        "scales by alpha / r always, √r too weak",
        PORTABLE,
    ),
    Rule(
        "sglang",
        "ignored",
        _set("rank_pattern"),
        "reads no rank_pattern, so these get another scale",
        PORTABLE,
    ),
    Rule(
        "sglang",
        "ignored",
        _set("alpha_pattern"),
        "reads no alpha_pattern, so these get another scale",
        PORTABLE,
    ),
    Rule("sglang", "ignored", _set("lora_bias"), "reads no bias of the adapter", PLAIN),
    Rule(
        "sglang",
        "ignored",
        _other_modules(),
        "reads no modules_to_save: the base's own are used",
        MERGE,
    ),
    Rule(
        "sglang",
        "ignored",
        lambda f: (
            f.config.get("bias", "none") not in ("none", None) and f.config.get("bias")
        ),
        "reads no trained biases",
        MERGE,
    ),
    Rule(
        "sglang",
        "ignored",
        _set("trainable_token_indices"),
        "reads no trained tokens",
        MERGE,
    ),
    Rule(
        "sglang",
        "refused",
        _without_v,
        "needs v_proj wherever q_proj is adapted",
        PORTABLE + ", which fills in zeros",
    ),
    Rule(
        "sglang",
        "ignored",
        _without_q,
        "takes k_proj and v_proj only where q_proj is adapted",
        PORTABLE + ", which fills in zeros",
    ),
    Rule(
        "sglang",
        "refused",
        _in_three,
        "adapts linear layers and embeddings only",
        MERGE,
    ),
    Rule(
        "tensorrt-llm",
        "refused",
        lambda f: f.without(
            rf"{_TRT}|.*\.lora_magnitude_vector|.*\b(?:lm_head|embed_tokens)\b.*"
        ),
        "takes the matrices of attention and MLP only",
        MERGE,
    ),
    Rule(
        "tensorrt-llm",
        "ignored",
        lambda f: f.keys(r".*\b(?:lm_head|embed_tokens)\b.*"),
        "skips the adapters of lm_head and embed_tokens",
        "leave them out, or " + MERGE,
    ),
    Rule(
        "tensorrt-llm",
        "ignored",
        _set("alpha_pattern"),
        "reads no alpha_pattern, so these get another scale",
        PORTABLE,
    ),
    Rule(
        "tensorrt-llm",
        "ignored",
        lambda f: f.keys(r".*\.gate_up_proj\.lora_B\.weight"),
        "swaps the halves of a fused gate_up_proj",
        "adapt gate_proj and up_proj by themselves, or check the outputs",
    ),
    Rule(
        "tensorrt-llm",
        "needs",
        _over(64),
        "takes ranks up to 64 unless it is told",
        "set max_lora_rank in its LoraConfig",
    ),
    Rule(
        "transformers",
        "needs",
        _lacks("base_model_name_or_path", "task_type"),
        "loads it onto a model that is there, PeftModel.from_pretrained(model, "
        "directory); the Auto classes look for the base by these keys",
        "save with config={'base_model_name_or_path': 'org/name', 'task_type': "
        "'CAUSAL_LM'}",
    ),
    Rule(
        f"{_SERVERS} transformers",
        "refused",
        lambda f: f.keys(
            r".*\.(?:embed_tokens|wte|word_embeddings)\.lora_[AB]\.weight"
        ),
        "takes lora_embedding_A and lora_embedding_B for a table of words",
        "match with a plan, and save with head='lm_head' if it is the (tied) head",
    ),
)
