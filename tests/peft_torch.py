"""Small models of transformers and torch, and adapters that peft made for them.

    python tests/peft_torch.py

writes ``tests/fixtures/peft``: for each model its checkpoint, its inputs, and for each
adapter the directory that peft's ``save_pretrained`` wrote and torch's outputs with it.
It needs torch, transformers and peft (``make interop`` installs them).  The tests read
what is committed, and with peft at hand go the other way, too.
"""

import json
import pathlib
import shutil
import sys
import warnings

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "peft"
VOCAB, WORDS = 40, 7


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=12,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=True,
        )
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=12,
            tie_word_embeddings=False,
        )
    )


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=12,
            patch_size=4,
            num_channels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )


def experts():
    """Experts as in Mixtral: all of a layer in one parameter, (E, out, in)."""
    import torch

    class Experts(torch.nn.Module):
        is_transposed = False

        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(4, 24, 8))
            self.down_proj = torch.nn.Parameter(torch.empty(4, 8, 12))

        def forward(self, x, p):
            gate_up = torch.einsum("td,efd->tef", x, self.gate_up_proj)
            gate, up = gate_up.chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
            return torch.einsum("tef,edf,te->td", y, self.down_proj, p)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = torch.nn.Linear(8, 4)
            self.experts = Experts()

        def forward(self, x):
            return x + self.experts(x, self.router(x).softmax(-1))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return Model()


def convolutions():
    """Every kind of layer that peft adapts besides Linear."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv1d(4, 6, 3, padding=1)
            self.conv2 = torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))
            self.conv3 = torch.nn.Conv3d(4, 6, 2)
            self.point = torch.nn.Conv2d(6, 5, 1)
            self.words = torch.nn.Embedding(11, 8)
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x1, x2, x3, ids):
            h = self.words(ids)
            h = self.attn(h, h, h, need_weights=False)[0]
            return (
                self.conv1(x1),
                self.point(self.conv2(x2)),
                self.conv3(x3),
                self.head(h),
            )

    return Model()


MODELS = {f.__name__: f for f in (bert, gpt2, llama, vit, experts, convolutions)}
_QV = ["query", "value"]
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The options of LoraConfig for each adapter.
ADAPTERS = {
    "bert": {
        "plain": {"target_modules": _QV},
        "dora": {"target_modules": [*_QV, "dense"], "use_dora": True},
        "bias-all": {"target_modules": _QV, "bias": "all"},
        "patterns": {
            "target_modules": [*_QV, "word_embeddings"],
            "rank_pattern": {"layer.1.attention.self.query": 2, "word_embeddings": 5},
            "alpha_pattern": {r"layer\.\d\.attention\.self\.value": 7},
            "use_rslora": True,
        },
        "saved": {
            "target_modules": ["key"],
            "modules_to_save": ["output.dense"],
            "lora_bias": True,
        },
    },
    "gpt2": {
        "plain": {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3},
        "dora": {"target_modules": ["c_attn"], "use_dora": True},
        "tokens": {
            "target_modules": ["c_fc"],
            "trainable_token_indices": {"wte": [3, 21, 5]},
        },
        "rslora": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True},
    },
    "llama": {
        "all": {"target_modules": _ALL},
        "qv": {"target_modules": r".*\.(q|v)_proj", "bias": "none"},
        "some-layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        "dora": {"target_modules": _ALL, "use_dora": True},
        "head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        "tables": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
        "patterns": {
            "target_modules": _ALL,
            "rank_pattern": {"layers.1.*": 2, "^model.layers.2.mlp.up_proj": 6},
            "alpha_pattern": {"q_proj": 3},
        },
    },
    "vit": {
        "plain": {"target_modules": [*_QV, "projection"]},
        "lora-bias": {"target_modules": ["query", "projection"], "lora_bias": True},
    },
    "experts": {
        "both": {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        "one": {
            "target_modules": ["router"],
            "target_parameters": ["experts.down_proj"],
            "rank_pattern": {"router": 2},
        },
    },
    "convolutions": {
        "plain": {
            "target_modules": ["conv1", "conv2", "conv3", "point", "words", "head"]
        },
        "dora": {
            "target_modules": ["conv1", "conv2", "conv3", "words", "head"],
            "use_dora": True,
        },
        "attention": {"target_modules": ["attn", "head"]},
        "bias": {
            "target_modules": ["conv2", "point"],
            "bias": "lora_only",
            "lora_bias": True,
        },
    },
}
CASES = [(model, case) for model, own in ADAPTERS.items() for case in own]


def torch_model(name, seed=0):
    """A model with every parameter drawn, so that no two arrays are equal."""
    import torch

    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        scale = 0.3 if p.ndim > 1 else 0.2
        own = torch.randn(p.shape, generator=generator) * scale
        p.data = own + 1 if "norm" in _.lower() and "weight" in _ else own
    return model


def inputs(name):
    """The arguments of a model, as arrays of numpy."""
    rng = np.random.default_rng(1)
    if name in ("bert", "gpt2", "llama"):
        return [rng.integers(0, VOCAB, (2, WORDS))]
    if name == "vit":
        return [rng.normal(size=(2, 3, 12, 12)).astype(np.float32)]
    if name == "experts":
        return [rng.normal(size=(5, 8)).astype(np.float32)]
    shapes = (2, 4, 9), (2, 4, 8, 7), (1, 4, 4, 5, 4)
    images = [rng.normal(size=s).astype(np.float32) for s in shapes]
    return [*images, rng.integers(0, 11, (2, 4))]


def outputs(model, args):
    """What a model gives, as a list of arrays of numpy."""
    import torch

    tensors = [torch.tensor(x) for x in args]
    with torch.no_grad():
        out = model(*tensors)
    for name in ("logits", "last_hidden_state"):
        if hasattr(out, name):
            out = getattr(out, name)
            break
    out = out if isinstance(out, tuple) else (out,)
    return [np.asarray(x) for x in out]


def adapted(name, case, seed=5):
    """peft's model for an adapter, with all that trains drawn."""
    import peft
    import torch

    options = {"r": 4, "lora_alpha": 6} | ADAPTERS[name][case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(torch_model(name), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for key, p in sorted(model.named_parameters()):
        if p.requires_grad:
            own = torch.randn(p.shape, generator=generator) * 0.3
            p.data = own + 1 if "magnitude" in key else own
    return model.eval()


def state(model):
    """A model's own checkpoint, without tensors that are the same object."""
    own, seen = {}, set()
    for key, x in model.state_dict().items():
        if x.data_ptr() in seen or not x.is_floating_point():
            continue
        seen.add(x.data_ptr())
        own[key] = np.asarray(x)
    return own


def write(folder=FIXTURES):
    from safetensors.numpy import save_file

    shutil.rmtree(folder, ignore_errors=True)
    for name in MODELS:
        here = folder / name
        here.mkdir(parents=True)
        save_file(state(torch_model(name)), here / "model.safetensors")
        args = inputs(name)
        for case in ADAPTERS[name]:
            model = adapted(name, case)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_pretrained(here / case)
            (here / case / "README.md").unlink(missing_ok=True)
            config = here / case / "adapter_config.json"
            said = json.loads(config.read_text())
            config.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
            out = outputs(model, args)
            save_file(
                {str(k): np.ascontiguousarray(x) for k, x in enumerate(out)},
                here / f"{case}.outputs.safetensors",
            )


if __name__ == "__main__":
    write(*map(pathlib.Path, sys.argv[1:]))
