"""What `jlora.wrap` without a plan makes of other libraries' own models.

Each model is built by its library, small where its configuration allows it, and as
shapes where its framework allows that: nothing is downloaded. `jlora.plan` watches its
use, and `wrap` is compared with it. Libraries that are not installed are named and left
out. The project's environment has few of them, so this runs in one of its own:

    python3 -m venv zoo
    zoo/bin/pip install . dm-haiku equinox keras keras-hub equimo penzai ordered-set \
        flaxmodels "transformers<5" diffusers e3nn-jax "haliax>=1.4.dev0"
    zoo/bin/python benchmarks/real_models.py [words of the rows to show, with the roles]
"""

import argparse
import functools
import importlib
import importlib.util
import os
import sys
import time
import types
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import jlora

KEY = jax.random.key(0)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 8)), "int32")
MODELS = {}


def models(library):
    """Decorates a generator of (name, function that makes (fn, params, args))."""

    def add(generator):
        MODELS[library] = generator
        return generator

    return add


def restored():
    """What these libraries' versions still take from JAX, by its present names."""
    clip = jnp.clip

    def old(x, /, *args, a_min=None, a_max=None, **kwargs):
        args = args or ((a_min, a_max) if (a_min, a_max) != (None, None) else ())
        return clip(x, *args, **kwargs)

    jnp.clip, jnp.cat = old, jnp.concatenate


def images(size, channels_first=False):
    shape = (3, size, size) if channels_first else (size, size, 3)
    return jnp.ones((2, *shape))


def without_init(package):
    """Lets a package be imported from without its __init__ and what that imports."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(package)
        module = types.ModuleType(package)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = module


@models("transformers")
def transformers():
    import transformers as hf

    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=6)
    text = dict(vocab_size=50, intermediate_size=40, **small)
    gpt = dict(vocab_size=50, n_embd=24, n_layer=2, n_head=6, n_positions=16)
    t5 = dict(vocab_size=50, d_model=24, d_ff=40, d_kv=4, num_layers=2, num_heads=6)
    pair = dict(
        vocab_size=50,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    rows = {
        "FlaxBertForSequenceClassification": (hf.BertConfig(**text), "ids"),
        "FlaxRobertaForMaskedLM": (hf.RobertaConfig(**text), "ids"),
        "FlaxAlbertForMaskedLM": (hf.AlbertConfig(embedding_size=24, **text), "ids"),
        "FlaxElectraForMaskedLM": (hf.ElectraConfig(embedding_size=24, **text), "ids"),
        "FlaxDistilBertForMaskedLM": (
            hf.DistilBertConfig(vocab_size=50, dim=24, n_layers=2, n_heads=6),
            "ids",
        ),
        "FlaxBigBirdForMaskedLM": (
            hf.BigBirdConfig(attention_type="original_full", **text),
            "ids",
        ),
        "FlaxGPT2LMHeadModel": (hf.GPT2Config(**gpt), "ids"),
        "FlaxGPTJForCausalLM": (hf.GPTJConfig(rotary_dim=4, **gpt), "ids"),
        "FlaxGPTNeoForCausalLM": (
            hf.GPTNeoConfig(
                vocab_size=50,
                hidden_size=24,
                num_layers=2,
                num_heads=6,
                attention_types=[[["global", "local"], 1]],
                max_position_embeddings=16,
            ),
            "ids",
        ),
        "FlaxLlamaForCausalLM": (hf.LlamaConfig(num_key_value_heads=3, **text), "ids"),
        "FlaxMistralForCausalLM": (
            hf.MistralConfig(num_key_value_heads=3, **text),
            "ids",
        ),
        "FlaxGemmaForCausalLM": (
            hf.GemmaConfig(num_key_value_heads=3, head_dim=4, **text),
            "ids",
        ),
        "FlaxBloomForCausalLM": (
            hf.BloomConfig(vocab_size=50, hidden_size=24, n_layer=2, n_head=6),
            "masked",
        ),
        "FlaxOPTForCausalLM": (
            hf.OPTConfig(ffn_dim=40, word_embed_proj_dim=24, **text),
            "masked",
        ),
        "FlaxT5ForConditionalGeneration": (hf.T5Config(**t5), "both"),
        "FlaxLongT5ForConditionalGeneration": (
            hf.LongT5Config(local_radius=3, **t5),
            "both",
        ),
        "FlaxBartForConditionalGeneration": (hf.BartConfig(**pair), "both"),
        "FlaxMarianMTModel": (hf.MarianConfig(**pair), "both"),
        "FlaxWhisperForConditionalGeneration": (
            hf.WhisperConfig(
                num_mel_bins=8, max_source_positions=10, max_target_positions=9, **pair
            ),
            "sound",
        ),
        "FlaxViTForImageClassification": (
            hf.ViTConfig(image_size=12, patch_size=6, intermediate_size=40, **small),
            "pixels",
        ),
        "FlaxBeitForImageClassification": (
            hf.BeitConfig(image_size=12, patch_size=6, intermediate_size=40, **small),
            "pixels",
        ),
        "FlaxDinov2ForImageClassification": (
            hf.Dinov2Config(image_size=12, patch_size=6, **small),
            "pixels",
        ),
        "FlaxResNetForImageClassification": (
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]),
            "pixels",
        ),
        "FlaxRegNetForImageClassification": (
            hf.RegNetConfig(
                embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8
            ),
            "pixels",
        ),
        "FlaxWav2Vec2ForCTC": (
            hf.Wav2Vec2Config(
                conv_dim=(16, 16),
                conv_kernel=(3, 3),
                conv_stride=(2, 2),
                num_feat_extract_layers=2,
                num_conv_pos_embedding_groups=2,
                num_conv_pos_embeddings=4,
                feat_extract_norm="layer",
                do_stable_layer_norm=True,
                **text,
            ),
            "waves",
        ),
        "FlaxCLIPModel": (
            hf.CLIPConfig(
                text_config=dict(max_position_embeddings=16, **text),
                vision_config=dict(
                    image_size=12, patch_size=6, intermediate_size=40, **small
                ),
            ),
            "clip",
        ),
    }
    size = 12
    inputs = {
        "ids": dict(input_ids=IDS),
        "masked": dict(input_ids=IDS, attention_mask=jnp.ones_like(IDS)),
        "both": dict(input_ids=IDS, decoder_input_ids=IDS),
        "sound": dict(input_features=jnp.ones((2, 8, 20)), decoder_input_ids=IDS),
        "pixels": dict(pixel_values=images(size, channels_first=True)),
        "waves": dict(input_values=jnp.ones((2, 60))),
        "clip": dict(input_ids=IDS, pixel_values=images(size, channels_first=True)),
    }

    def make(name, config, kind):
        cls = getattr(hf, name)
        shape = (1, size, size, 3)
        options = {"input_shape": shape} if kind == "pixels" else {}
        if kind == "sound":
            options = {"input_shape": (1, 8, 20)}
        if kind == "waves":
            options = {"input_shape": (1, 60)}
        if kind == "clip":
            options = {"input_shape": ((1, 8), shape)}
        model = cls(config, _do_init=False, **options)
        params = jax.eval_shape(lambda: model.init_weights(KEY, model.input_shape))

        def fn(params, kwargs):
            return tuple(model(**kwargs, params=params).values())

        return fn, params, (inputs[kind],)

    for name, (config, kind) in rows.items():
        yield name, functools.partial(make, name, config, kind)


@models("diffusers")
def diffusers():
    import diffusers

    def unet():
        model = diffusers.FlaxUNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        )
        params = jax.eval_shape(model.init_weights, jax.random.PRNGKey(0))
        args = jnp.ones((2, 4, 8, 8)), jnp.ones(2, int), jnp.ones((2, 5, 16))

        def fn(params, *args):
            return model.apply({"params": params}, *args).sample

        return fn, params, args

    def vae():
        model = diffusers.FlaxAutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            sample_size=8,
        )
        params = jax.eval_shape(model.init_weights, jax.random.PRNGKey(0))

        def fn(params, x):
            return model.apply({"params": params}, x).sample

        return fn, params, (images(8, channels_first=True),)

    yield "FlaxUNet2DConditionModel", unet
    yield "FlaxAutoencoderKL", vae


@models("equimo")
def equimo():
    import equimo.models
    import equinox as eqx

    def make(name, size):
        def build(key):
            return getattr(equimo.models, name)(key=key)

        model = eqx.filter_eval_shape(build, jax.random.PRNGKey(0))
        keys = jax.random.split(jax.random.PRNGKey(0), 2)

        def fn(model, x, keys):
            def one(x, key):
                return model(x, key=key, inference=True)

            return jax.vmap(one)(x, keys)

        return fn, model, (images(size, channels_first=True), keys)

    for name, size in {
        "vit_tiny_patch16_224": 224,
        "dinov2_vits14_reg": 518,
        "dinov3_vits16_pretrain_lvd1689m": 256,
        "siglip2_vitb32_256": 256,
        "convnext_t": 224,
        "mobilenetv3_small": 224,
        "attnet_xxs": 224,
        "iformer_t": 224,
        "reduceformer_backbone_b1": 224,
    }.items():
        yield name, functools.partial(make, name, size)


@models("keras_hub")
def keras_hub():
    import keras
    import keras_hub

    text = dict(vocabulary_size=50, num_layers=2, hidden_dim=24, intermediate_dim=40)
    groups = dict(num_query_heads=6, num_key_value_heads=3)
    tokens = dict(token_ids=IDS, padding_mask=jnp.ones_like(IDS))
    pair = dict(
        encoder_token_ids=IDS,
        decoder_token_ids=IDS,
        encoder_padding_mask=jnp.ones_like(IDS),
        decoder_padding_mask=jnp.ones_like(IDS),
    )
    rows = {
        "BertBackbone": (
            dict(num_heads=6, **text),
            tokens | dict(segment_ids=jnp.zeros_like(IDS)),
        ),
        "DebertaV3Backbone": (dict(num_heads=6, **text), tokens),
        "GPT2Backbone": (dict(num_heads=6, **text), tokens),
        "BloomBackbone": (dict(num_heads=6, **text), tokens),
        "OPTBackbone": (dict(num_heads=6, **text), tokens),
        "T5Backbone": (dict(num_heads=6, **text), pair),
        "BartBackbone": (dict(num_heads=6, **text), pair),
        "GemmaBackbone": (dict(head_dim=4, **groups, **text), tokens),
        "LlamaBackbone": (dict(**groups, **text), tokens),
        "MistralBackbone": (dict(**groups, **text), tokens),
        "Phi3Backbone": (dict(**groups, **text), tokens),
        "MixtralBackbone": (dict(num_experts=4, top_k=2, **groups, **text), tokens),
        "FalconBackbone": (
            dict(
                vocabulary_size=50,
                num_layers=2,
                num_attention_heads=6,
                hidden_dim=24,
                intermediate_dim=40,
            ),
            tokens,
        ),
        "ViTBackbone": (
            dict(
                image_shape=(12, 12, 3),
                patch_size=6,
                num_layers=2,
                num_heads=6,
                hidden_dim=24,
                mlp_dim=40,
            ),
            images(12),
        ),
        "ResNetBackbone": (
            dict(
                input_conv_filters=[8],
                input_conv_kernel_sizes=[7],
                stackwise_num_filters=[64, 128],
                stackwise_num_blocks=[1, 1],
                stackwise_num_strides=[1, 2],
                block_type="bottleneck_block",
                image_shape=(32, 32, 3),
            ),
            images(32),
        ),
    }

    def make(name, options, inputs):
        model = getattr(keras_hub.models, name)(**options)
        order = [v.path for v in model.trainable_variables]
        rest = [v.value for v in model.non_trainable_variables]

        def fn(params, inputs):
            trainable = [params[path] for path in order]
            return model.stateless_call(trainable, rest, inputs)[0]

        return fn, model, (inputs,)

    for name, (options, inputs) in rows.items():
        yield name, functools.partial(make, name, options, inputs)

    def application():
        model = keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None)
        order = [v.path for v in model.trainable_variables]
        rest = [v.value for v in model.non_trainable_variables]

        def fn(params, inputs):
            trainable = [params[path] for path in order]
            return model.stateless_call(trainable, rest, inputs)[0]

        return fn, model, (images(32),)

    yield "keras.applications.MobileNetV2", application


@models("penzai")
def penzai():
    from penzai import pz
    from penzai.models.transformer.variants import gpt_neox, llamalike_common

    def run(model):
        params = pz.freeze_params(model)
        tokens = pz.nx.wrap(IDS).tag("batch", "seq")
        return (lambda model, ids: model(ids)), params, (tokens,)

    def llama(tied, heads):
        config = llamalike_common.LlamalikeTransformerConfig(
            num_kv_heads=3 if heads > 1 else 6,
            query_head_multiplier=heads,
            embedding_dim=24,
            projection_dim=4,
            mlp_hidden_dim=40,
            num_decoder_blocks=2,
            vocab_size=50,
            mlp_variant="swiglu",
            tie_embedder_and_logits=tied,
            rope_wavelength=10_000.0,
            parameter_dtype=jnp.float32,
            activation_dtype=jnp.float32,
        )
        build = llamalike_common.build_llamalike_transformer
        return run(build(config, init_base_rng=KEY, name="transformer"))

    def neox():
        config = gpt_neox.GPTNeoXTransformerConfig(
            num_attention_heads=6,
            embedding_dim=24,
            projection_dim=4,
            mlp_hidden_dim=40,
            num_decoder_blocks=2,
            vocab_size=50,
            rope_subset_size=4,
            rope_wavelength=10_000.0,
            layernorm_epsilon=1e-5,
            activation_fn="gelu_exact",
            parameter_dtype=jnp.float32,
            activation_dtype=jnp.float32,
        )
        build = gpt_neox.build_gpt_neox_transformer
        return run(build(config, init_base_rng=KEY, name="transformer"))

    yield "llama", functools.partial(llama, False, 2)
    yield "gemma", functools.partial(llama, True, 1)
    yield "GPT-NeoX", neox


@models("haiku")
def haiku():
    import haiku as hk

    def make(function, x):
        net = hk.without_apply_rng(hk.transform_with_state(function))
        params, state = jax.eval_shape(functools.partial(net.init, KEY), x)

        def fn(params, state, x):
            return net.apply(params, state, x)[0]

        return fn, params, (state, x)

    rows = {
        "MLP": lambda x: hk.nets.MLP([16, 16, 5])(x.reshape(len(x), -1)),
        "ResNet18": lambda x: hk.nets.ResNet18(5)(x, True),
        "MobileNetV1": lambda x: hk.nets.MobileNetV1(num_classes=5)(x, True),
    }
    for name, function in rows.items():
        yield name, functools.partial(make, function, images(32))


@models("flaxmodels")
def flaxmodels():
    import flaxmodels

    def make(name):
        model = getattr(flaxmodels, name)(output="logits", pretrained=None)
        x = images(224)
        variables = jax.eval_shape(model.init, {"params": KEY, "dropout": KEY}, x)

        def fn(variables, x):
            return model.apply(variables, x, train=False)

        return fn, variables, (x,)

    for name in ("ResNet18", "ResNet50", "VGG16"):
        yield name, functools.partial(make, name)


@models("e3nn_jax")
def e3nn():
    import e3nn_jax as e3

    def linear():
        model = e3.flax.Linear("8x0e + 8x1o + 4x2e")
        x = e3.normal("8x0e + 8x1o + 4x2e", jax.random.PRNGKey(0), (5,))
        variables = jax.eval_shape(model.init, jax.random.PRNGKey(0), x)
        return (lambda v, x: model.apply(v, x).array), variables, (x,)

    def mlp():
        model = e3.flax.MultiLayerPerceptron((24, 24, 8), jax.nn.silu)
        x = jnp.ones((5, 7))
        variables = jax.eval_shape(model.init, jax.random.PRNGKey(0), x)
        return model.apply, variables, (x,)

    yield "Linear", linear
    yield "MultiLayerPerceptron", mlp


@models("haliax")
def haliax():
    import haliax as hax
    import haliax.nn as hnn

    embed, heads, size = hax.make_axes(embed=24, heads=6, size=4)
    layers, batch, out = hax.make_axes(layers=2, batch=3, out=5)

    def stacked():
        """Into heads and out of them, in a stack."""
        import equinox as eqx

        class Block(eqx.Module):
            into: hnn.Linear
            back: hnn.Linear

            @staticmethod
            def init(*, key):
                into = hnn.Linear.init(embed, (heads, size), key=key)
                return Block(into, hnn.Linear.init((heads, size), embed, key=key))

            def __call__(self, x):
                return x + self.back(hnn.relu(self.into(x)))

        keys = jax.random.split(jax.random.PRNGKey(0), layers.size)
        model = hnn.Stacked.init(layers, Block)(key=keys)
        x = hax.ones((batch, embed))
        return (lambda model, x: model.fold(x).array), model, (x,)

    def mlp():
        model = hnn.MLP.init(embed, out, 16, 2, key=jax.random.PRNGKey(0))
        return (lambda model, x: model(x).array), model, (hax.ones((batch, embed)),)

    yield "Stacked", stacked
    yield "MLP", mlp


@models("tunix")
def tunix():
    from flax import nnx

    without_init("tunix")
    small = dict(num_layers=2, embed_dim=24, hidden_dim=40, head_dim=4)

    def make(family, cls, **options):
        module = importlib.import_module(f"tunix.models.{family}.model")
        config = module.ModelConfig(**small, **options)
        with jax.set_mesh(jax.make_mesh((1, 1), ("fsdp", "tp"))):
            model = nnx.eval_shape(
                lambda: getattr(module, cls)(config, rngs=nnx.Rngs(0))
            )
        positions = jnp.broadcast_to(jnp.arange(8), IDS.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (2, 8, 8))

        def fn(model, ids, positions, mask):
            return model(ids, positions, None, mask)[0]

        return fn, model, (IDS, positions, mask)

    groups = dict(num_heads=6, num_kv_heads=3)
    rope = dict(rope_theta=10_000, norm_eps=1e-6, vocab_size=50)
    yield "llama3", functools.partial(make, "llama3", "Llama3", **groups, **rope)
    yield "qwen2", functools.partial(make, "qwen2", "Qwen2", **groups, **rope)
    yield "qwen3", functools.partial(make, "qwen3", "Qwen3", **groups, **rope)
    experts = dict(num_experts=4, num_experts_per_tok=2)
    yield (
        "qwen3 MoE",
        functools.partial(make, "qwen3", "Qwen3", **groups, **rope, **experts),
    )
    yield (
        "gemma3",
        functools.partial(
            make, "gemma3", "Gemma3", num_embed=50, sliding_window_size=4, **groups
        ),
    )


@models("gemma")
def gemma():
    from gemma import gm

    def make():
        layers = importlib.import_module("gemma.gm.nn._transformer")
        config = importlib.import_module("gemma.gm.nn._config")
        modules = importlib.import_module("gemma.gm.nn._modules")
        model = layers.Transformer(
            config=config.TransformerConfig(
                num_embed=50,
                embed_dim=24,
                hidden_dim=40,
                num_heads=6,
                num_kv_heads=3,
                head_dim=4,
                final_logit_softcap=None,
                use_post_attn_norm=True,
                use_post_ffw_norm=True,
                attention_types=(modules.AttentionType.GLOBAL,) * 2,
            )
        )
        variables = jax.eval_shape(model.init, KEY, IDS)
        return (lambda v, ids: model.apply(v, ids).logits), variables, (IDS,)

    del gm
    yield "Transformer", make


def arrays(params):
    """The arrays of a Keras model by path; anything else is a tree of arrays."""
    if hasattr(params, "trainable_variables"):
        return {v.path: v.value for v in params.trainable_variables}
    return params


def compared(plan, params):
    """What wrap makes of the params, and in what it differs from the plan."""
    try:
        tree = jlora.wrap(params, rank=8)
    except Exception as error:  # of any kind: it is what the table shows
        return "error", [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    found = {path: leaf.axes for path, leaf in jlora.adapter(tree).items()}
    wrong = [path for path, axes in found.items() if not same(axes, plan, path)]
    if wrong:
        seen = {path: spec.axes for path, spec in plan.items()}
        return "other", [f"{p}: {found[p]}, not {seen.get(p)}" for p in wrong]
    missing = [path for path in plan if path not in found]
    return ("part", missing) if missing else ("whole", [])


def same(axes, plan, path):
    """Whether the plan has these roles; those of axes of one element may differ."""
    if path not in plan:
        return False
    triples = zip(axes, plan[path].axes, plan.shapes[path], strict=True)
    return all(told == seen or size == 1 for told, seen, size in triples)


def row(name, make, whole):
    """Prints a model's row; returns how wrap did."""
    start = time.process_time()
    try:
        fn, params, args = make()
        plan = jlora.plan(fn, arrays(params), *args, rank=8)
    except Exception as error:  # another version of the library, most likely
        text = str(error).splitlines() or [""]
        print(f"{name:48}   -  not planned: {type(error).__name__}: {text[0][:110]}")
        return "not planned"
    ways = {name: params}
    if arrays(params) is not params:
        ways[f"{name}, values"] = arrays(params)
    for way, params in ways.items():
        result, details = compared(plan, params)
        seconds = time.process_time() - start
        print(f"{way:48} {len(plan):4}  {result:6} {seconds:6.1f} s")
        for line in details if whole else details[:2]:
            print(f"{'':8}{line if whole else line[:140]}")
        if whole:
            for path, spec in plan.items():
                print(f"    {path}  {plan.shapes[path]}  {spec.kind} {spec.axes}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="rows whose names hold one of these")
    words = parser.parse_args().words
    warnings.simplefilter("ignore")
    restored()
    counts = {}
    for library, generator in MODELS.items():
        try:
            rows = list(generator())
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            print(f"{library}: left out, {type(error).__name__}: {text[:110]}")
            continue
        for name, make in rows:
            name = f"{library}: {name}"
            if not words or any(word in name for word in words):
                result = row(name, make, bool(words))
                counts[result] = counts.get(result, 0) + 1
    print(", ".join(f"{n} {result}" for result, n in sorted(counts.items())))


if __name__ == "__main__":
    main()
