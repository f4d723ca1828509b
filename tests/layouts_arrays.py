"""Models whose params are plain arrays in dicts, lists or dataclasses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from helpers import normal
from layouts_base import (
    BATCH,
    FFN,
    HEADS,
    KV,
    LAYERS,
    SIZE,
    TIME,
    VOCAB,
    WIDTH,
    array,
    attend,
    drawn,
    flat,
    heads,
    ids,
    layout,
    nested,
    normed,
    rms,
    scanned,
)

# Gemma in a stack.


@layout("pi0's gemma (Linen, scan)", "openpi: models/gemma.py, two experts, nn.scan")
def openpi():
    """The stacked weights of two models of other widths side by side."""
    sizes = (WIDTH, FFN), (WIDTH - 4, FFN - 4)
    stack = {"attn": {}}
    for i, (d, f) in enumerate(sizes):
        end = f"_{i}" if i else ""
        stack["attn"] |= {
            f"q_einsum{end}": {"w": array(LAYERS, HEADS, d, SIZE)},
            f"kv_einsum{end}": {"w": array(LAYERS, 2, 1, d, SIZE)},
            f"attn_vec_einsum{end}": {"w": array(LAYERS, HEADS, SIZE, d)},
        }
        stack[f"mlp{end}"] = {
            "gating_einsum": array(LAYERS, 2, d, f),
            "linear": array(LAYERS, f, d),
        }
        stack |= {
            f"pre_{k}_norm{end}": {"scale": array(LAYERS, d)}
            for k in ("attention", "ffw")
        }
    shapes = {
        "embedder": {"input_embedding": array(VOCAB, WIDTH)},
        "layers": stack,
        **{
            f"final_norm{('', '_1')[i]}": {"scale": array(d)}
            for i, (d, _) in enumerate(sizes)
        },
    }

    def block(xs, p):
        qkv = []
        for x, end in zip(xs, ("", "_1"), strict=True):
            h = rms(x, p[f"pre_attention_norm{end}"]["scale"])
            q = jnp.einsum("BTD,NDH->BTNH", h, p["attn"][f"q_einsum{end}"]["w"])
            kv = p["attn"][f"kv_einsum{end}"]["w"]
            qkv.append((q, *jnp.einsum("BSD,2KDH->2BSKH", h, kv)))
        q, k, v = (jnp.concatenate(y, axis=1) for y in zip(*qkv, strict=True))
        parts = jnp.split(attend(q, k, v), [xs[0].shape[1]], axis=1)
        out = []
        for x, o, end in zip(xs, parts, ("", "_1"), strict=True):
            w = p["attn"][f"attn_vec_einsum{end}"]["w"]
            x = x + jnp.einsum("BTNH,NHD->BTD", o, w)
            h = rms(x, p[f"pre_ffw_norm{end}"]["scale"])
            gate = p[f"mlp{end}"]["gating_einsum"]
            h = jax.nn.gelu(jnp.dot(h, gate[0])) * jnp.dot(h, gate[1])
            out.append(x + jnp.dot(h, p[f"mlp{end}"]["linear"]))
        return out, None

    def fn(params, x, action):
        x = params["embedder"]["input_embedding"][x]
        (x, y), _ = jax.lax.scan(jax.checkpoint(block), [x, action], params["layers"])
        x = rms(x, params["final_norm"]["scale"])
        return x, rms(y, params["final_norm_1"]["scale"])

    return fn, drawn(shapes), (ids(), normal(BATCH, 3, WIDTH - 4))


# AXLearn and Praxis: w or weight for every projection, (width, heads, size) for the one
# out of heads as well.


@layout("llama (AXLearn, repeated)", "axlearn: common/attention.py, GroupedQKVLinear")
def axlearn():
    layer = "decoder/transformer/repeat/layer"
    attention = f"{layer}/self_attention/attention"
    shapes = {
        "decoder/emb/token_emb/weight": (VOCAB, WIDTH),
        f"{layer}/self_attention/norm/scale": (LAYERS, WIDTH),
        f"{attention}/i_proj/qkv_proj/weight": (LAYERS, WIDTH, HEADS + 2 * KV, SIZE),
        f"{attention}/o_proj/weight": (LAYERS, WIDTH, HEADS, SIZE),
        f"{layer}/feed_forward/norm/scale": (LAYERS, WIDTH),
        f"{layer}/feed_forward/linear1_0/weight": (LAYERS, WIDTH, FFN),
        f"{layer}/feed_forward/linear1_1/weight": (LAYERS, WIDTH, FFN),
        f"{layer}/feed_forward/linear2/weight": (LAYERS, FFN, WIDTH),
        "decoder/output_norm/scale": (WIDTH,),
        "decoder/lm_head/weight": (VOCAB, WIDTH),
    }

    def block(p, x):
        attention, mlp = p["self_attention"], p["feed_forward"]
        h = rms(x, attention["norm"]["scale"])
        w = attention["attention"]["i_proj"]["qkv_proj"]["weight"]
        qkv = jnp.einsum("btd,dnh->btnh", h, w)
        q, k, v = jnp.split(qkv, [HEADS, HEADS + KV], axis=-2)
        w = attention["attention"]["o_proj"]["weight"]
        x = x + jnp.einsum("btnh,dnh->btd", attend(q, k, v), w)
        h = rms(x, mlp["norm"]["scale"])
        gate = jax.nn.silu(h @ mlp["linear1_0"]["weight"])
        return x + (gate * (h @ mlp["linear1_1"]["weight"])) @ mlp["linear2"]["weight"]

    def fn(params, x):
        p = params["decoder"]
        x = p["emb"]["token_emb"]["weight"][x]
        x = scanned(block, x, p["transformer"]["repeat"]["layer"])
        x = rms(x, p["output_norm"]["scale"])
        return jnp.einsum("bld,vd->blv", x, p["lm_head"]["weight"])

    return fn, nested(shapes), (ids(),)


@layout("LM with experts (Praxis)", "praxis 1.4: layers/attentions.py, transformers.py")
def praxis():
    """The first layer has q, k and v of their own, the second has them in one."""
    experts, one = 4, (WIDTH, HEADS, SIZE)
    lm = "params/lm/transformer"
    first, second = f"{lm}/x_layers_0", f"{lm}/x_layers_1"
    shapes = {
        **{f"{first}/self_attention/{k}/w": one for k in ("query", "key", "value")},
        **{f"{first}/self_attention/{k}/b": one[1:] for k in ("query", "key", "value")},
        f"{first}/self_attention/post/w": one,
        f"{first}/self_attention/post/b": (WIDTH,),
        f"{first}/ff_layer/ffn_layer1/linear/w": (WIDTH, FFN),
        f"{first}/ff_layer/ffn_layer1/bias/b": (FFN,),
        f"{first}/ff_layer/ffn_layer2/linear/w": (FFN, WIDTH),
        f"{first}/ff_layer/ffn_layer2/bias/b": (WIDTH,),
        f"{second}/self_attention/combined_qkv/w": (3, *one),
        f"{second}/self_attention/combined_qkv/b": (3, *one[1:]),
        f"{second}/self_attention/post/w": one,
        f"{second}/ff_layer/gate": (WIDTH, experts),
        f"{second}/ff_layer/wi_0": (experts, WIDTH, FFN),
        f"{second}/ff_layer/wo_0": (experts, FFN, WIDTH),
        "params/lm/final_ln/scale": (WIDTH,),
        "params/lm/softmax/logits_ffn/linear/w": (WIDTH, VOCAB),
        "params/lm/softmax/logits_ffn/bias/b": (VOCAB,),
    }

    def fn(params, x):
        p = params["params"]["lm"]
        first, second = (p["transformer"][f"x_layers_{i}"] for i in (0, 1))
        a = first["self_attention"]
        q, k, v = (
            jnp.einsum("BTD,DNH->BTNH", x, a[n]["w"]) + a[n]["b"]
            for n in ("query", "key", "value")
        )
        x = x + jnp.einsum("BTNH,DNH->BTD", attend(q, k, v), a["post"]["w"])
        x = x + a["post"]["b"]
        one, two = first["ff_layer"]["ffn_layer1"], first["ff_layer"]["ffn_layer2"]
        h = jnp.einsum("...y,yz->...z", x, one["linear"]["w"]) + one["bias"]["b"]
        h = jax.nn.relu(h)
        h = jnp.einsum("...y,yz->...z", h, two["linear"]["w"]) + two["bias"]["b"]
        x = x + h
        a = second["self_attention"]
        qkv = jnp.einsum("BTD,KDNH->KBTNH", x, a["combined_qkv"]["w"])
        q, k, v = qkv + a["combined_qkv"]["b"][:, None, None]
        x = x + jnp.einsum("BTNH,DNH->BTD", attend(q, k, v), a["post"]["w"])
        f = second["ff_layer"]
        gates = jax.nn.softmax(jnp.einsum("gsm,me->gse", x, f["gate"]))
        sent = jnp.einsum("gse,gsm->egsm", jnp.round(gates), x)
        h = jax.nn.relu(jnp.einsum("egcm,emh->egch", sent, f["wi_0"]))
        h = jnp.einsum("egch,ehm->egcm", h, f["wo_0"])
        x = rms(x + jnp.einsum("egsm,gse->gsm", h, gates), p["final_ln"]["scale"])
        out = p["softmax"]["logits_ffn"]
        return jnp.einsum("...y,yz->...z", x, out["linear"]["w"]) + out["bias"]["b"]

    return fn, nested(shapes), (normal(BATCH, TIME, WIDTH),)


# The JAX authors' examples of large models: dataclasses of arrays.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class JaxLlamaLayer:
    q: Any
    k: Any
    v: Any
    o: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    attn_pre_gamma: Any
    attn_post_gamma: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class JaxWeights:
    layers: list
    embedding: Any
    gamma_final: Any
    lm_head: Any


@layout("llama 3 (dataclasses)", "jax-llm-examples: llama3_jax/model.py")
def jax_llama():
    def layer():
        return JaxLlamaLayer(
            q=array(WIDTH, HEADS, SIZE),
            k=array(WIDTH, KV, SIZE),
            v=array(WIDTH, KV, SIZE),
            o=array(HEADS, SIZE, WIDTH),
            w_gate=array(WIDTH, FFN),
            w_up=array(WIDTH, FFN),
            w_down=array(FFN, WIDTH),
            attn_pre_gamma=array(WIDTH),
            attn_post_gamma=array(WIDTH),
        )

    def fn(params, x):
        x = params.embedding[x]
        for p in params.layers:
            h = rms(x, p.attn_pre_gamma)
            q, k, v = (jnp.einsum("btd,dnh->btnh", h, w) for w in (p.q, p.k, p.v))
            x = x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), p.o)
            h = rms(x, p.attn_post_gamma)
            gate = jax.nn.silu(jnp.einsum("btd,df->btf", h, p.w_gate))
            h = gate * jnp.einsum("btd,df->btf", h, p.w_up)
            x = x + jnp.einsum("btf,fd->btd", h, p.w_down)
        return jnp.einsum("btd,dv->btv", rms(x, params.gamma_final), params.lm_head)

    ends = array(VOCAB, WIDTH), array(WIDTH), array(WIDTH, VOCAB)
    weights = JaxWeights([layer() for _ in range(LAYERS)], *ends)
    return fn, drawn(weights), (ids(),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeepSeekAttention:
    q_a: Any
    q_gamma: Any
    q_b: Any
    kv_a: Any
    k_pe: Any
    kv_gamma: Any
    k_b: Any
    v_b: Any
    o: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeepSeekExperts:
    w_router: Any
    b_router: Any
    we_gate: Any
    we_up: Any
    we_down: Any
    ws_gate: Any
    ws_up: Any
    ws_down: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeepSeekLayer:
    mlp: Any
    attn: Any
    gamma_pre_attn: Any
    gamma_post_attn: Any


@layout("DeepSeek R1 (dataclasses)", "jax-llm-examples: deepseek_r1_jax/model.py")
def jax_deepseek():
    low, rope, experts, f = 8, 2, 4, FFN // 2

    def layer():
        attention = DeepSeekAttention(
            q_a=array(WIDTH, low),
            q_gamma=array(low),
            q_b=array(low, HEADS, SIZE + rope),
            kv_a=array(WIDTH, low),
            k_pe=array(WIDTH, rope),
            kv_gamma=array(low),
            k_b=array(low, HEADS, SIZE),
            v_b=array(low, HEADS, SIZE),
            o=array(HEADS, SIZE, WIDTH),
        )
        mlp = DeepSeekExperts(
            w_router=array(WIDTH, experts),
            b_router=array(experts),
            we_gate=array(experts, WIDTH, f),
            we_up=array(experts, WIDTH, f),
            we_down=array(experts, f, WIDTH),
            ws_gate=array(WIDTH, f),
            ws_up=array(WIDTH, f),
            ws_down=array(f, WIDTH),
        )
        return DeepSeekLayer(mlp, attention, array(WIDTH), array(WIDTH))

    def mix(p, x):
        """One expert for each token, by a product of the sorted tokens."""
        x = x.reshape(-1, WIDTH)
        scores = jax.nn.sigmoid(x @ p.w_router) + p.b_router
        best = scores.argmax(-1)
        order, sizes = jnp.argsort(best), jnp.bincount(best, length=experts)
        h = x[order]
        gate = jax.nn.silu(jax.lax.ragged_dot(h, p.we_gate, sizes))
        h = gate * jax.lax.ragged_dot(h, p.we_up, sizes)
        routed = jax.lax.ragged_dot(h, p.we_down, sizes)[jnp.argsort(order)]
        shared = (jax.nn.silu(x @ p.ws_gate) * (x @ p.ws_up)) @ p.ws_down
        return routed + shared

    def fn(params, x):
        x = params.embedding[x]
        for p in params.layers:
            h, a = rms(x, p.gamma_pre_attn), p.attn
            q = jnp.einsum("btr,rhq->bthq", rms(h @ a.q_a, a.q_gamma), a.q_b)
            kv = rms(h @ a.kv_a, a.kv_gamma)
            k = jnp.einsum("btr,rhq->bthq", kv, a.k_b)
            shape = *k.shape[:-1], rope
            k_pe = jnp.broadcast_to((h @ a.k_pe)[..., None, :], shape)
            v = jnp.einsum("btr,rhv->bthv", kv, a.v_b)
            heads = attend(q, jnp.concatenate([k, k_pe], -1), v)
            x = x + jnp.einsum("bthv,hvd->btd", heads, a.o)
            h = rms(x, p.gamma_post_attn)
            x = x + mix(p.mlp, h).reshape(x.shape)
        return rms(x, params.gamma_final) @ params.lm_head

    ends = array(VOCAB, WIDTH), array(WIDTH), array(WIDTH, VOCAB)
    weights = JaxWeights([layer() for _ in range(LAYERS)], *ends)
    return fn, drawn(weights), (ids(),)


# Params without a library: torch's names and axes, GPT-2's, the tutorial's pairs.


@layout("llama (torch's state dict)", "safetensors of torch, used as x @ w.T")
def torch_llama():
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (HEADS * SIZE, WIDTH),
            f"{layer}.self_attn.k_proj.weight": (KV * SIZE, WIDTH),
            f"{layer}.self_attn.v_proj.weight": (KV * SIZE, WIDTH),
            f"{layer}.self_attn.o_proj.weight": (WIDTH, HEADS * SIZE),
            f"{layer}.mlp.gate_proj.weight": (FFN, WIDTH),
            f"{layer}.mlp.up_proj.weight": (FFN, WIDTH),
            f"{layer}.mlp.down_proj.weight": (WIDTH, FFN),
            f"{layer}.input_layernorm.weight": (WIDTH,),
            f"{layer}.post_attention_layernorm.weight": (WIDTH,),
        }
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}

    def fn(p, x):
        x = p["model.embed_tokens.weight"][x]
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            h = rms(x, p[f"{layer}.input_layernorm.weight"])
            q, k, v = (h @ p[f"{layer}.self_attn.{n}_proj.weight"].T for n in "qkv")
            o = flat(attend(heads(q), heads(k, KV), heads(v, KV)))
            x = x + o @ p[f"{layer}.self_attn.o_proj.weight"].T
            h = rms(x, p[f"{layer}.post_attention_layernorm.weight"])
            gate, up, down = (
                p[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            x = x + (jax.nn.silu(h @ gate.T) * (h @ up.T)) @ down.T
        return rms(x, p["model.norm.weight"]) @ p["lm_head.weight"].T

    return fn, nested(shapes), (ids(),)


@layout("GPT-2 (picoGPT's dict)", "picoGPT: w and b, as OpenAI's TensorFlow had them")
def pico_gpt():
    def linear(*shape):
        return {"w": array(*shape), "b": array(shape[-1])}

    def norm():
        return {"g": array(WIDTH), "b": array(WIDTH)}

    blocks = [
        {
            "attn": {
                "c_attn": linear(WIDTH, 3 * WIDTH),
                "c_proj": linear(WIDTH, WIDTH),
            },
            "mlp": {
                "c_fc": linear(WIDTH, 4 * WIDTH),
                "c_proj": linear(4 * WIDTH, WIDTH),
            },
            "ln_1": norm(),
            "ln_2": norm(),
        }
        for _ in range(LAYERS)
    ]
    params = {
        "wte": array(VOCAB, WIDTH),
        "wpe": array(TIME, WIDTH),
        "blocks": blocks,
        "ln_f": norm(),
    }

    def dense(p, x):
        return x @ p["w"] + p["b"]

    def fn(p, x):
        x = p["wte"][x] + p["wpe"][jnp.arange(TIME)]
        for block in p["blocks"]:
            h = normed(x, block["ln_1"]["g"], block["ln_1"]["b"])
            qkv = jnp.split(dense(block["attn"]["c_attn"], h), 3, axis=-1)
            x = x + dense(block["attn"]["c_proj"], flat(attend(*map(heads, qkv))))
            h = normed(x, block["ln_2"]["g"], block["ln_2"]["b"])
            h = jax.nn.gelu(dense(block["mlp"]["c_fc"], h))
            x = x + dense(block["mlp"]["c_proj"], h)
        return normed(x, p["ln_f"]["g"], p["ln_f"]["b"]) @ p["wte"].T

    return fn, drawn(params), (ids(),)


@layout("MLP (pairs in a list)", "JAX's tutorial: w of (out, in), jnp.dot(w, x) + b")
def tutorial_mlp():
    sizes = 13, WIDTH, WIDTH, 5
    params = [(array(m, n), array(m)) for n, m in zip(sizes, sizes[1:], strict=False)]

    def predict(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(jnp.dot(w, x) + b)
        w, b = params[-1]
        return jnp.dot(w, x) + b

    def fn(params, x):
        return jax.vmap(predict, in_axes=(None, 0))(params, x)

    return fn, drawn(params), (normal(BATCH, 13),)


# T5X and MaxText's experts: scanned over axis 1 as well.


@layout("T5 1.1 (T5X, scan over axis 1)", "t5x: examples/scalable_t5/network.py")
def t5x():
    """Kernels of joined heads; biases of positions by a product with a one-hot."""
    buckets = 8
    encoder = "encoder/layers"
    shapes = {
        "token_embedder/embedding": (VOCAB, WIDTH),
        f"{encoder}/relative_posemb/rel_embedding": (HEADS, LAYERS, buckets),
        **{
            f"{encoder}/attention/{k}/kernel": (WIDTH, LAYERS, WIDTH)
            for k in ("query", "key", "value", "out")
        },
        f"{encoder}/mlp/wi_0/kernel": (WIDTH, LAYERS, FFN),
        f"{encoder}/mlp/wi_1/kernel": (WIDTH, LAYERS, FFN),
        f"{encoder}/mlp/wo/kernel": (FFN, LAYERS, WIDTH),
        f"{encoder}/pre_attention_layer_norm/scale": (WIDTH, LAYERS),
        f"{encoder}/pre_mlp_layer_norm/scale": (WIDTH, LAYERS),
        "encoder/encoder_norm/scale": (WIDTH,),
        "decoder/logits_dense/kernel": (WIDTH, VOCAB),
    }

    def dense(p, x):
        return jax.lax.dot_general(x, p["kernel"], (((x.ndim - 1,), (0,)), ((), ())))

    def block(p, x):
        h = rms(x, p["pre_attention_layer_norm"]["scale"])
        hot = jax.nn.one_hot(jnp.arange(TIME) % buckets, buckets, axis=0)
        table = p["relative_posemb"]["rel_embedding"]
        bias = jax.lax.dot_general(table, hot, (((1,), (0,)), ((), ())))
        q, k, v = (
            heads(dense(p["attention"][n], h)) for n in ("query", "key", "value")
        )
        o = attend(q, k, v + bias.T[..., None])
        x = x + dense(p["attention"]["out"], flat(o))
        h = rms(x, p["pre_mlp_layer_norm"]["scale"])
        h = jax.nn.gelu(dense(p["mlp"]["wi_0"], h)) * dense(p["mlp"]["wi_1"], h)
        return x + dense(p["mlp"]["wo"], h)

    def fn(params, x):
        hot = jax.nn.one_hot(x, VOCAB)
        x = jnp.dot(hot, params["token_embedder"]["embedding"])
        x = scanned(block, x, params["encoder"]["layers"], axis=1)
        x = rms(x, params["encoder"]["encoder_norm"]["scale"])
        return dense(params["decoder"]["logits_dense"], x)

    return fn, nested(shapes), (ids(),)


@layout("mixtral (MaxText, scan over axis 1)", "maxtext: layers/mixtral.py, moe.py")
def maxtext_moe():
    """Experts first and layers second; every expert on every token."""
    experts = 4
    layer = "params/decoder/layers"
    moe = f"{layer}/MoeBlock_0"
    shapes = {
        "params/token_embedder/embedding": (VOCAB, WIDTH),
        f"{layer}/self_attention/query/kernel": (WIDTH, LAYERS, HEADS, SIZE),
        f"{layer}/self_attention/key/kernel": (WIDTH, LAYERS, KV, SIZE),
        f"{layer}/self_attention/value/kernel": (WIDTH, LAYERS, KV, SIZE),
        f"{layer}/self_attention/out/kernel": (HEADS, LAYERS, SIZE, WIDTH),
        f"{layer}/pre_self_attention_layer_norm/scale": (WIDTH, LAYERS),
        f"{layer}/post_self_attention_layer_norm/scale": (WIDTH, LAYERS),
        f"{moe}/gate/kernel": (WIDTH, LAYERS, experts),
        f"{moe}/wi_0": (experts, LAYERS, WIDTH, FFN),
        f"{moe}/wi_1": (experts, LAYERS, WIDTH, FFN),
        f"{moe}/wo": (experts, LAYERS, FFN, WIDTH),
        "params/decoder/decoder_norm/scale": (WIDTH,),
        "params/decoder/logits_dense/kernel": (WIDTH, VOCAB),
    }

    def block(p, x):
        a, m = p["self_attention"], p["MoeBlock_0"]
        h = rms(x, p["pre_self_attention_layer_norm"]["scale"])
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", h, a[n]["kernel"])
            for n in ("query", "key", "value")
        )
        x = x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), a["out"]["kernel"])
        h = rms(x, p["post_self_attention_layer_norm"]["scale"])
        weights = jax.nn.softmax(h @ m["gate"]["kernel"])
        gate, up = (jnp.einsum("BSM,EMH->BSEH", h, m[n]) for n in ("wi_0", "wi_1"))
        h = jnp.einsum("BSEH,EHM->BSEM", jax.nn.silu(gate) * up, m["wo"])
        return x + jnp.einsum("BSEM,BSE->BSM", h, weights)

    def fn(params, x):
        p = params["params"]
        x = p["token_embedder"]["embedding"][x]
        x = scanned(block, x, p["decoder"]["layers"], axis=1)
        x = rms(x, p["decoder"]["decoder_norm"]["scale"])
        return x @ p["decoder"]["logits_dense"]["kernel"]

    return fn, nested(shapes), (ids(),)


# Penzai: named axes, the array two keys below the layer.


@layout("llama (Penzai)", "penzai 0.2: models/transformer/variants/llamalike_common.py")
def penzai():
    """Queries have a group axis; paths are of numbered sublayers."""
    groups = KV, HEADS // KV, SIZE
    shapes = {"body/sublayers/0/table/embeddings/value/data_array": (VOCAB, WIDTH)}

    def weights(i, j, where, *shape):
        path = f"body/sublayers/{i + 1}/sublayers/{j}/delta/sublayers/{where}"
        shapes[f"{path}/weights/value/data_array"] = shape

    for i in range(LAYERS):
        weights(i, 0, "0/sublayers/1", WIDTH)
        weights(i, 0, "1/input_to_query/sublayers/0", WIDTH, *groups)
        weights(i, 0, "1/input_to_key/sublayers/0", WIDTH, KV, SIZE)
        weights(i, 0, "1/input_to_value/sublayers/0", WIDTH, KV, SIZE)
        weights(i, 0, "1/attn_value_to_output/sublayers/1", *groups, WIDTH)
        weights(i, 1, "0/sublayers/1", WIDTH)
        weights(i, 1, "1/sublayers/0/branches/0/sublayers/0", WIDTH, FFN)
        weights(i, 1, "1/sublayers/0/branches/1", WIDTH, FFN)
        weights(i, 1, "1/sublayers/1", FFN, WIDTH)
    end = LAYERS + 1
    shapes[f"body/sublayers/{end}/sublayers/1/weights/value/data_array"] = (WIDTH,)
    shapes[f"body/sublayers/{end + 1}/weights/value/data_array"] = (WIDTH, VOCAB)

    def at(p, path):
        for key in path.split("/"):
            p = p[key]
        return p["weights"]["value"]["data_array"]

    def fn(params, x):
        p = params["body"]["sublayers"]
        x = p["0"]["table"]["embeddings"]["value"]["data_array"][x]
        for i in range(LAYERS):
            a, m = (
                p[str(i + 1)]["sublayers"][j]["delta"]["sublayers"] for j in ("0", "1")
            )
            h = rms(x, at(a, "0/sublayers/1"))
            q = jnp.tensordot(h, at(a, "1/input_to_query/sublayers/0"), (2, 0))
            q = q.reshape(*x.shape[:2], HEADS, SIZE)
            k = jnp.tensordot(h, at(a, "1/input_to_key/sublayers/0"), (2, 0))
            v = jnp.tensordot(h, at(a, "1/input_to_value/sublayers/0"), (2, 0))
            o = attend(q, k, v).reshape(*x.shape[:2], *groups)
            w = at(a, "1/attn_value_to_output/sublayers/1")
            x = x + jnp.tensordot(o, w, ((2, 3, 4), (0, 1, 2)))
            h = rms(x, at(m, "0/sublayers/1"))
            gate = jax.nn.silu(h @ at(m, "1/sublayers/0/branches/0/sublayers/0"))
            h = gate * (h @ at(m, "1/sublayers/0/branches/1"))
            x = x + h @ at(m, "1/sublayers/1")
        x = rms(x, at(p, f"{end}/sublayers/1"))
        return x @ at(p, str(end + 1))

    return fn, nested(shapes), (ids(),)


# Molecules.


@layout("equivariant linear layers (e3nn)", "e3nn-jax: _src/linear.py")
def e3nn():
    """A matrix for each pair of irreps, whose name holds brackets and spaces."""
    dims, n = {"0e": 1, "1o": 3, "2e": 5}, 8
    shapes = {}
    for i in range(LAYERS):
        for j, irrep in enumerate(dims):
            shapes[f"linear_{i}/w[{j},{j}] {n}x{irrep},{n}x{irrep}"] = (n, n)
        shapes[f"linear_{i}/b[0] {n}x0e"] = (n,)

    def fn(params, x):
        """Of (nodes, channels, components) for each irrep."""
        for i in range(LAYERS):
            p = params[f"linear_{i}"]
            x = [
                jnp.einsum("uw,zui->zwi", p[f"w[{j},{j}] {n}x{k},{n}x{k}"], y) / n**0.5
                for j, (k, y) in enumerate(zip(dims, x, strict=True))
            ]
            x[0] = jax.nn.gelu(x[0] + p[f"b[0] {n}x0e"][:, None])
        return x

    return fn, nested(shapes), ([normal(TIME, n, d) for d in dims.values()],)
