"""The models of `peft_torch` in JAX, each with its weights laid out in several ways.

``LAYOUTS[model]`` has a function for each layout, from the checkpoint's arrays to
params; ``FUNCTIONS[model]`` is the model, which reads any of them.  The layouts have
nothing in common but the values: stacked for a scan, fused, transposed, with heads as
axes of their own, in the order of interleaved rotary embeddings, padded.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def stack(*xs):
    return jax.tree.map(lambda *x: np.stack(x), *xs)


def norm(x, p, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * p["scale"] + p["bias"]


def attend(q, k, v, mask=None):
    """(b, t, h, d) each; keys and values are shared by groups of queries."""
    g = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, g, 2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    s = s if mask is None else jnp.where(mask, s, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)


def causal(n):
    return np.tril(np.ones((n, n), bool))


def dense(x, p):
    """A product by the shape of its weight: plain, into heads, or out of them."""
    w = p["kernel"]
    ways = range(w.ndim - 1, 0, -1)
    n = next(k for k in ways if w.shape[:k] == x.shape[x.ndim - k :])
    return jnp.tensordot(x, w, n) + p.get("bias", 0)


def layers_of(params, fn, x):
    """Layers one by one, or scanned over their stack."""
    if isinstance(params, dict):
        return lax.scan(lambda h, p: (fn(h, p), None), x, params)[0]
    for p in params:
        x = fn(x, p)
    return x


def linear(sd, name, heads=None, into=True):
    """A Dense of the checkpoint's Linear; with heads as an axis before or after."""
    w, b = sd[f"{name}.weight"].T, sd.get(f"{name}.bias")
    if heads:
        shape = (w.shape[0], heads, -1) if into else (heads, -1, w.shape[1])
        w = w.reshape(shape)
        b = b.reshape(heads, -1) if into and b is not None else b
    return {"kernel": w} if b is None else {"kernel": w, "bias": b}


def layer_norm(sd, name):
    return {"scale": sd[f"{name}.weight"], "bias": sd[f"{name}.bias"]}


# --------------------------------------------------------------------------- BERT, ViT


def _attention(x, p):
    if "qkv" in p:
        y = dense(x, p["qkv"])
        y = y.reshape(*y.shape[:2], 3, 4, -1)
        q, k, v = (y[:, :, i] for i in range(3))
    else:
        q, k, v = (dense(x, p[n]) for n in "qkv")
        q, k, v = (y.reshape(*y.shape[:2], 4, -1) for y in (q, k, v))
    y = attend(q, k, v)
    if p["o"]["kernel"].ndim == 2:
        y = y.reshape(*y.shape[:2], -1)
    return dense(y, p["o"])


def bert(params, ids):
    e = params["embeddings"]
    x = e["word"]["embedding"][ids] + e["position"]["embedding"][: ids.shape[1]]
    x = norm(x + e["type"]["embedding"][0], e["norm"], 1e-12)

    def layer(x, p):
        x = norm(x + _attention(x, p["attention"]), p["norm1"], 1e-12)
        y = dense(jax.nn.gelu(dense(x, p["up"]), approximate=False), p["down"])
        return norm(x + y, p["norm2"], 1e-12)

    return [layers_of(params["layers"], layer, x)]


def _bert_layer(sd, k, heads=None, fused=False):
    at = f"encoder.layer.{k}."
    own = {
        n: linear(sd, f"{at}attention.self.{m}", heads)
        for n, m in zip("qkv", ("query", "key", "value"), strict=True)
    }
    if fused:
        whole = {
            f: np.concatenate([own[n][f] for n in "qkv"], -1)
            for f in ("kernel", "bias")
        }
        own = {"qkv": whole}
    own["o"] = linear(sd, f"{at}attention.output.dense", heads, into=False)
    return {
        "attention": own,
        "norm1": layer_norm(sd, f"{at}attention.output.LayerNorm"),
        "up": linear(sd, f"{at}intermediate.dense"),
        "down": linear(sd, f"{at}output.dense"),
        "norm2": layer_norm(sd, f"{at}output.LayerNorm"),
    }


def _bert(sd, layers):
    at = "embeddings."
    own = {
        n: {"embedding": sd[f"{at}{n}{'_token' * (n == 'token')}_embeddings.weight"]}
        for n in ("word", "position")
    }
    own["type"] = {"embedding": sd[f"{at}token_type_embeddings.weight"]}
    own["norm"] = layer_norm(sd, f"{at}LayerNorm")
    return {"embeddings": own, "layers": layers}


def vit(params, images):
    w = params["patches"]["kernel"]
    if w.ndim == 4:
        x = lax.conv_general_dilated(
            images.transpose(0, 2, 3, 1),
            w,
            (4, 4),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    else:  # (4·4·3, out): a product with flattened patches
        b, c, n, _ = images.shape
        x = images.reshape(b, c, n // 4, 4, n // 4, 4).transpose(0, 2, 4, 3, 5, 1)
        x = x.reshape(b, n // 4, n // 4, -1) @ w
    x = (x + params["patches"]["bias"]).reshape(x.shape[0], -1, x.shape[-1])
    cls = jnp.broadcast_to(params["cls"], (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([cls, x], 1) + params["position"]

    def layer(x, p):
        x = x + _attention(norm(x, p["norm1"], 1e-12), p["attention"])
        y = dense(norm(x, p["norm2"], 1e-12), p["up"])
        return x + dense(jax.nn.gelu(y, approximate=False), p["down"])

    x = layers_of(params["layers"], layer, x)
    return [norm(x, params["norm"], 1e-12)]


def _vit_layer(sd, k, heads=None, fused=False):
    at = f"encoder.layer.{k}."
    own = _bert_layer(
        {
            key.replace("attention.attention.", "attention.self."): x
            for key, x in sd.items()
        }
        | {
            f"{at}{n}.LayerNorm.{w}": sd[f"{at}{m}.{w}"]
            for n, m in (
                ("attention.output", "layernorm_before"),
                ("output", "layernorm_after"),
            )
            for w in ("weight", "bias")
        },
        k,
        heads,
        fused,
    )
    return own


def _vit(sd, layers, flat=False):
    at = "embeddings."
    w = sd[f"{at}patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
    return {
        "patches": {
            "kernel": w.reshape(-1, w.shape[-1]) if flat else w,
            "bias": sd[f"{at}patch_embeddings.projection.bias"],
        },
        "cls": sd[f"{at}cls_token"],
        "position": sd[f"{at}position_embeddings"],
        "layers": layers,
        "norm": layer_norm(sd, "layernorm"),
    }


# ------------------------------------------------------------------------------- GPT-2


def gpt2(params, ids):
    wte = params["wte"]["embedding"]
    x = wte[ids] + params["wpe"]["embedding"][: ids.shape[1]]
    mask = causal(ids.shape[1])

    def layer(x, p):
        h = norm(x, p["norm1"], 1e-5)
        a = p["attention"]
        if "qkv" in a:
            w, b = a["qkv"]["kernel"], a["qkv"]["bias"]
            if w.ndim == 2:
                y = (h @ w + b).reshape(*h.shape[:2], 3, 4, -1)
                q, k, v = (y[:, :, i] for i in range(3))
            else:  # (3, in, heads, dim)
                q, k, v = (jnp.tensordot(h, w[i], 1) + b[i] for i in range(3))
        else:
            q, k, v = (dense(h, a[n]) for n in "qkv")
            q, k, v = (y.reshape(*y.shape[:2], 4, -1) for y in (q, k, v))
        y = attend(q, k, v, mask).reshape(h.shape)
        x = x + dense(y, a["o"])
        h = norm(x, p["norm2"], 1e-5)
        if "up_t" in p:
            y = jnp.einsum("btd,fd->btf", h, p["up_t"]["w"]) + p["up_t"]["b"]
        else:
            y = dense(h, p["up"])
        return x + dense(jax.nn.gelu(y), p["down"])

    x = norm(layers_of(params["layers"], layer, x), params["norm"], 1e-5)
    return [jnp.einsum("btd,vd->btv", x, wte)[..., :40]]


def _conv1d(sd, name):
    return {"kernel": sd[f"{name}.weight"], "bias": sd[f"{name}.bias"]}


def _gpt2_layer(sd, k, way):
    at = f"transformer.h.{k}."
    qkv = _conv1d(sd, f"{at}attn.c_attn")
    if way == "split":
        split = {f: np.split(x, 3, -1) for f, x in qkv.items()}
        own = {n: {f: split[f][i] for f in split} for i, n in enumerate("qkv")}
    elif way == "stacked":
        w = qkv["kernel"].reshape(16, 3, 4, 4).transpose(1, 0, 2, 3)
        own = {"qkv": {"kernel": w, "bias": qkv["bias"].reshape(3, 4, 4)}}
    else:
        own = {"qkv": qkv}
    own["o"] = _conv1d(sd, f"{at}attn.c_proj")
    up = _conv1d(sd, f"{at}mlp.c_fc")
    out = {
        "attention": own,
        "norm1": layer_norm(sd, f"{at}ln_1"),
        "norm2": layer_norm(sd, f"{at}ln_2"),
        "down": _conv1d(sd, f"{at}mlp.c_proj"),
    }
    if way == "split":
        return out | {"up_t": {"w": up["kernel"].T, "b": up["bias"]}}
    return out | {"up": up}


def _gpt2(sd, layers, pad=0):
    wte = np.pad(sd["transformer.wte.weight"], ((0, pad), (0, 0)))
    return {
        "wte": {"embedding": wte},
        "wpe": {"embedding": sd["transformer.wpe.weight"]},
        "layers": layers,
        "norm": layer_norm(sd, "transformer.ln_f"),
    }


# ------------------------------------------------------------------------------- Llama


def _rms(x, p):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def _rotary(x, interleaved):
    """Rotary embeddings of (b, t, h, d): halves, or pairs of neighbours."""
    n = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(n) / n)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        return jnp.stack([a, b], -1).reshape(x.shape)
    return jnp.concatenate([a, b], -1)


def llama(params, ids):
    x = params["embed"]["embedding"][ids]
    mask = causal(ids.shape[1])

    def layer(x, p):
        h = _rms(x, p["norm1"])
        a = p["attention"]
        interleaved = "q_einsum" in a
        if interleaved:  # Gemma's way
            q = jnp.einsum("btd,hdk->bthk", h, a["q_einsum"]["w"])
            kv = jnp.einsum("btd,chdk->cbthk", h, a["kv_einsum"]["w"])
            k, v = kv[0], kv[1]
        else:
            q, k, v = (dense(h, a[n]) for n in "qkv")
            q, k, v = (y.reshape(*y.shape[:2], -1, 4) for y in (q, k, v))
        y = attend(_rotary(q, interleaved), _rotary(k, interleaved), v, mask)
        if a["o"]["kernel"].ndim == 2:
            y = y.reshape(*y.shape[:2], -1)
        x = x + dense(y, a["o"])
        h = _rms(x, p["norm2"])
        if "gate_up" in p:
            gate, up = jnp.split(dense(h, p["gate_up"]), 2, -1)
        else:
            gate, up = dense(h, p["gate"]), dense(h, p["up"])
        y = jax.nn.silu(gate) * up
        if "down_t" in p:
            return x + jnp.einsum("btf,df->btd", y, p["down_t"]["w"])
        return x + dense(y, p["down"])

    x = _rms(layers_of(params["layers"], layer, x), params["norm"])
    return [dense(x, params["head"])]


def _llama_layer(sd, k, way):
    at = f"model.layers.{k}."

    def get(name):
        return sd[f"{at}{name}.weight"]

    def own(name, *args, **kwargs):
        return linear(sd, f"{at}{name}", *args, **kwargs)

    out = {
        "norm1": {"scale": get("input_layernorm")},
        "norm2": {"scale": get("post_attention_layernorm")},
    }
    if way == "gemma":

        def pairs(w):  # halves to pairs of neighbours, (h, in, d)
            w = w.reshape(-1, 2, 2, w.shape[-1]).swapaxes(1, 2)
            return w.reshape(-1, 4, w.shape[-1]).swapaxes(1, 2)

        q, k_ = pairs(get("self_attn.q_proj")), pairs(get("self_attn.k_proj"))
        v = get("self_attn.v_proj")
        v = v.reshape(-1, 4, v.shape[-1]).swapaxes(1, 2)
        attention = {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack([k_, v])}}
        attention["o"] = own("self_attn.o_proj", 4, into=False)
        gate_up = np.concatenate([get("mlp.gate_proj"), get("mlp.up_proj")]).T
        return out | {
            "attention": attention,
            "gate_up": {"kernel": gate_up},
            "down_t": {"w": get("mlp.down_proj")},
        }
    heads = {"q": 4, "k": 2, "v": 2} if way == "heads" else dict.fromkeys("qkv")
    attention = {n: own(f"self_attn.{n}_proj", h) for n, h in heads.items()}
    o = 4 if way == "heads" else None
    attention["o"] = own("self_attn.o_proj", o, into=False)
    return out | {
        "attention": attention,
        **{n: own(f"mlp.{n}_proj") for n in ("gate", "up", "down")},
    }


def _llama(sd, layers):
    return {
        "embed": {"embedding": sd["model.embed_tokens.weight"]},
        "layers": layers,
        "norm": {"scale": sd["model.norm.weight"]},
        "head": linear(sd, "lm_head"),
    }


# ----------------------------------------------------------------------------- experts


def experts(params, x):
    def layer(x, p):
        gates = jax.nn.softmax(dense(x, p["router"]))
        e = p["experts"]
        if isinstance(e, list):
            ys = [
                (jax.nn.silu(x @ q["gate"]["w"]) * (x @ q["up"]["w"])) @ q["down"]["w"]
                for q in e
            ]
            return x + jnp.einsum("etd,te->td", jnp.stack(ys), gates)
        if "wi_gate" in e:
            gate, up = (
                jnp.einsum("td,edf->etf", x, e[n]) for n in ("wi_gate", "wi_up")
            )
        else:
            gate, up = jnp.split(jnp.einsum("td,efd->etf", x, e["gate_up"]), 2, -1)
        y = jnp.einsum("etf,efd->etd", jax.nn.silu(gate) * up, e["wo"])
        return x + jnp.einsum("etd,te->td", y, gates)

    return [layers_of(params["layers"], layer, x)]


def _experts_layer(sd, k, way):
    at = f"layers.{k}."
    gate_up, down = (sd[f"{at}experts.{n}_proj"] for n in ("gate_up", "down"))
    gate, up = (x.swapaxes(1, 2) for x in np.split(gate_up, 2, 1))
    wo = down.swapaxes(1, 2)
    if way == "split":
        e = {"wi_gate": gate, "wi_up": up, "wo": wo}
    elif way == "list":
        e = [
            {"gate": {"w": gate[i]}, "up": {"w": up[i]}, "down": {"w": wo[i]}}
            for i in range(4)
        ]
    else:
        e = {"gate_up": gate_up, "wo": wo}
    return {"router": linear(sd, f"{at}router"), "experts": e}


# ------------------------------------------------------------------------ convolutions


def convolutions(params, x1, x2, x3, ids):
    def conv(x, p, strides, padding):
        n = x.ndim - 2
        letters = "DHW"[-n:]
        if "weight" in p:  # torch's layout, as Equinox has it
            spec, w = ("NC" + letters, "OI" + letters, "NC" + letters), p["weight"]
            bias = p["bias"].reshape(-1, *(1,) * n)
        else:
            spec, w = ("NC" + letters, letters + "IO", "NC" + letters), p["kernel"]
            bias = p["bias"].reshape(-1, *(1,) * n)
        y = lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=spec)
        return y + bias

    h = params["words"]["embedding"][ids]
    a = params["attn"]
    if "qkv" in a:
        y = (dense(h, a["qkv"])).reshape(*h.shape[:2], 3, 2, 4)
        q, k, v = (y[:, :, i] for i in range(3))
    else:
        q, k, v = (dense(h, a[n]).reshape(*h.shape[:2], 2, 4) for n in "qkv")
    h = dense(attend(q, k, v).reshape(h.shape), a["o"])
    y2 = conv(x2, params["conv2"], (2, 1), ((1, 1), (0, 0)))
    if params["point"].get("kernel", np.zeros(())).ndim == 2:
        y2 = jnp.moveaxis(dense(jnp.moveaxis(y2, 1, -1), params["point"]), -1, 1)
    else:
        y2 = conv(y2, params["point"], (1, 1), "VALID")
    return [
        conv(x1, params["conv1"], (1,), ((1, 1),)),
        y2,
        conv(x3, params["conv3"], (1, 1, 1), "VALID"),
        dense(h, params["head"]),
    ]


def _convolutions(sd, way):
    def conv(name):
        w, b = sd[f"{name}.weight"], sd[f"{name}.bias"]
        if way == "torch":
            return {"weight": w, "bias": b}
        w = w.transpose(*range(2, w.ndim), 1, 0)
        if way == "dense" and name == "point":
            w = w[0, 0]
        return {"kernel": w, "bias": b}

    out = {n: conv(n) for n in ("conv1", "conv2", "conv3", "point")}
    w, b = sd["attn.in_proj_weight"].T, sd["attn.in_proj_bias"]
    a = {"qkv": {"kernel": w, "bias": b}}
    if way != "flax":
        ws, bs = np.split(w, 3, 1), np.split(b, 3)
        a = {n: {"kernel": ws[i], "bias": bs[i]} for i, n in enumerate("qkv")}
    a["o"] = linear(sd, "attn.out_proj")
    return out | {
        "words": {"embedding": sd["words.weight"]},
        "attn": a,
        "head": linear(sd, "head"),
    }


FUNCTIONS = {f.__name__: f for f in (bert, gpt2, llama, vit, experts, convolutions)}


def _each(layer, n, *args, stacked=False):
    def layers(sd):
        own = [layer(sd, k, *args) for k in range(n)]
        return stack(*own) if stacked else own

    return layers


LAYOUTS = {
    "bert": {
        "plain": lambda sd: _bert(sd, _each(_bert_layer, 2)(sd)),
        "heads": lambda sd: _bert(sd, _each(_bert_layer, 2, 4, stacked=True)(sd)),
        "fused": lambda sd: _bert(
            sd, _each(_bert_layer, 2, None, True, stacked=True)(sd)
        ),
    },
    "gpt2": {
        "plain": lambda sd: _gpt2(sd, _each(_gpt2_layer, 2, "plain")(sd)),
        "split": lambda sd: _gpt2(
            sd, _each(_gpt2_layer, 2, "split", stacked=True)(sd), 8
        ),
        "stacked": lambda sd: _gpt2(
            sd, _each(_gpt2_layer, 2, "stacked", stacked=True)(sd)
        ),
    },
    "llama": {
        "plain": lambda sd: _llama(sd, _each(_llama_layer, 3, "plain")(sd)),
        "heads": lambda sd: _llama(
            sd, _each(_llama_layer, 3, "heads", stacked=True)(sd)
        ),
        "gemma": lambda sd: _llama(
            sd, _each(_llama_layer, 3, "gemma", stacked=True)(sd)
        ),
    },
    "vit": {
        "plain": lambda sd: _vit(sd, _each(_vit_layer, 2)(sd)),
        "heads": lambda sd: _vit(sd, _each(_vit_layer, 2, 4, stacked=True)(sd), True),
        "fused": lambda sd: _vit(sd, _each(_vit_layer, 2, None, True)(sd), True),
    },
    "experts": {
        "fused": lambda sd: {"layers": _each(_experts_layer, 2, "fused")(sd)},
        "split": lambda sd: {
            "layers": _each(_experts_layer, 2, "split", stacked=True)(sd)
        },
        "list": lambda sd: {"layers": _each(_experts_layer, 2, "list")(sd)},
    },
    "convolutions": {
        way: lambda sd, way=way: _convolutions(sd, way)
        for way in ("flax", "torch", "dense")
    },
}
MODELS = [(model, layout) for model, own in LAYOUTS.items() for layout in own]
# Layouts in which every adapted weight is one tensor of the checkpoint, or a stack.
PLAIN = {
    ("bert", "plain"),
    ("bert", "heads"),
    ("gpt2", "plain"),
    ("llama", "plain"),
    ("llama", "heads"),
    ("vit", "plain"),
    ("vit", "heads"),
    ("experts", "fused"),
    ("convolutions", "flax"),
}
