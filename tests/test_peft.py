"""The family against peft 0.21 on torch: outputs, gradients, merged weights, updates.

What compares with peft is skipped where it is not installed (``make interop`` installs
it).  Where peft is wrong, a test named after the fault compares with the dense weight
instead, and runs everywhere.
"""

import copy
import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, integers, normal, randomise
from jax import lax

import jlora

X, IDS, IMAGE = normal(11, 6), integers(4, 5, below=13), normal(2, 7, 7, 4)
BASE = {
    "fc": {"kernel": normal(6, 8, scale=0.4), "bias": normal(8)},
    "emb": {"embedding": normal(13, 6)},
    "conv": {"kernel": normal(3, 3, 4, 6, scale=0.2), "bias": normal(6)},
}
# A module's name in torch, its weight's path, and how its arrays are laid out there.
TO_TORCH = {
    "fc": ("fc/kernel", lambda w: w.T),
    "emb": ("emb/embedding", lambda w: w),
    "conv": ("conv/kernel", lambda w: w.transpose(3, 2, 0, 1)),
}
FROM_TORCH = {
    "fc": lambda w: w.T,
    "emb": lambda w: w,
    "conv": lambda w: w.transpose(2, 3, 1, 0),
}


def fn(p, x, ids, image):
    y = x @ p["fc"]["kernel"] + p["fc"]["bias"]
    z = lax.conv_general_dilated(
        image,
        p["conv"]["kernel"],
        (2, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y, p["emb"]["embedding"][ids], z + p["conv"]["bias"]


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def tensor(x):
    import torch

    return torch.tensor(np.array(x))


def net():
    """The model in torch, with the same weights."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(6, 8)
            self.emb = torch.nn.Embedding(13, 6)
            self.conv = torch.nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1)

        def forward(self, x, ids, image):
            z = self.conv(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.fc(x), self.emb(ids), z

    model = Net()
    for name, (path, to) in TO_TORCH.items():
        layer, (key, leaf) = getattr(model, name), path.split("/")
        layer.weight.data = tensor(to(BASE[key][leaf])).contiguous()
        if "bias" in BASE[key]:
            layer.bias.data = tensor(BASE[key]["bias"])
    return model


def theirs(peft, *, draw=True, targets=("fc", "emb", "conv"), **config):
    """A peft model, with all that trains drawn anew."""
    import torch

    config = {"r": 4, "lora_alpha": 6} | config
    config = peft.LoraConfig(target_modules=list(targets), **config)
    torch.manual_seed(0)
    model = peft.get_peft_model(net(), config)
    generator = torch.Generator().manual_seed(3)
    for name, p in sorted(model.named_parameters()):
        if draw and p.requires_grad and ("lora" in name or "bias" in name):
            p.data = torch.randn(p.shape, generator=generator) * 0.5
    return model


def conv_b(x):
    return x.transpose(2, 3, 1, 0)[0, 0]


# peft's name of each field, and how a field of ours comes from it.
FIELDS = {
    "fc": {
        "lora_A.default.weight": ("a", lambda x: x.T),
        "lora_B.default.weight": ("b", lambda x: x.T),
        "lora_B.default.bias": ("c", lambda x: x),
        "lora_magnitude_vector.default.weight": ("m", lambda x: x),
    },
    "emb": {
        "lora_embedding_A.default": ("a", lambda x: x.T),
        "lora_embedding_B.default": ("b", lambda x: x.T),
        "lora_magnitude_vector.default.weight": ("m", lambda x: x),
        "token_adapter.trainable_tokens_delta.default": ("b", lambda x: x),
    },
    "conv": {
        "lora_A.default.weight": ("a", lambda x: x.transpose(2, 3, 1, 0)),
        "lora_B.default.weight": ("b", conv_b),
        "lora_B.default.bias": ("c", lambda x: x),
        "lora_magnitude_vector.default.weight": ("m", np.ravel),
    },
}


def layer_of(model, name):
    return getattr(model.base_model.model, name)


def fields_of(model, name, take=lambda p: p):
    """Our fields of one layer, from its parameters or from their gradients."""
    found = {}
    for key, p in layer_of(model, name).named_parameters():
        if key in FIELDS[name]:
            field, back = FIELDS[name][key]
            found[field] = jnp.asarray(back(np.asarray(take(p).detach())))
    return found


def ours(model, tree):
    """The tree with peft's numbers in its adapted leaves."""
    out = jax.tree.map(lambda x: x, tree, is_leaf=jlora.is_adapted)
    for name, (path, _) in TO_TORCH.items():
        key, at = path.split("/")
        if jlora.is_adapted(leaf := tree[key][at]):
            out[key][at] = dataclasses.replace(leaf, **fields_of(model, name))
        bias = tree[key].get("bias")
        if isinstance(bias, jlora.Full):
            value = bias_of(layer_of(model, name))
            value = jnp.asarray(np.asarray(value.detach()))
            out[key]["bias"] = dataclasses.replace(bias, value=value)
    return out


def bias_of(layer):
    return getattr(layer, "base_layer", layer).bias


def loss_of(outs, xp):
    total = 0.0
    for k, y in enumerate(outs):
        total = total + ((y - 0.1 * k) ** 2).mean() + xp.sin(y).sum() * 0.1
    return total


def agree(peft, model, tree, tol=1e-5):
    """Outputs, the gradient of each trained tensor, and merged weights are equal."""
    import torch

    tree = ours(model, tree)
    args = tensor(X), tensor(IDS).long(), tensor(IMAGE)
    outs = model(*args)
    loss_of(outs, torch).backward()
    lifted = jlora.lift(fn)
    for got, want in zip(lifted(tree, X, IDS, IMAGE), outs, strict=True):
        close(got, jnp.asarray(np.asarray(want.detach())), tol)

    trainable, frozen = jlora.partition(tree)
    grads = jax.grad(
        lambda t: loss_of(lifted(jlora.combine(t, frozen), X, IDS, IMAGE), jnp)
    )(trainable)
    seen = 0
    for name, (path, _) in TO_TORCH.items():
        key, at = path.split("/")
        if jlora.is_adapted(tree[key][at]):
            for field, want in fields_of(model, name, lambda p: p.grad).items():
                got = getattr(grads[key][at], field)
                close(got, want, tol, f"gradient of {field} of {path}")
                seen += 1
        if isinstance(tree[key].get("bias"), jlora.Full):
            want = np.asarray(bias_of(layer_of(model, name)).grad)
            close(grads[key]["bias"].value, jnp.asarray(want), tol, f"bias of {name}")
            seen += 1
    assert seen == sum(p.requires_grad for p in model.parameters())

    merged = copy.deepcopy(model).merge_and_unload()
    want = jlora.merge(tree)
    for name, (path, _) in TO_TORCH.items():
        key, at = path.split("/")
        layer = getattr(merged, name)
        back = (
            (lambda w: w.transpose(2, 3, 1, 0)) if name == "conv" else FROM_TORCH[name]
        )
        close(want[key][at], jnp.asarray(back(np.asarray(layer.weight.detach()))), tol)
        if "bias" in want[key]:
            close(want[key]["bias"], jnp.asarray(np.asarray(layer.bias.detach())), tol)


def wrapped(*, rank=4, alpha=6, targets=("fc", "emb", "conv"), **options):
    rules = [jlora.Rule(f"{name}/*[!s]", rank=rank, alpha=alpha) for name in targets]
    plan = jlora.plan(
        fn,
        BASE,
        X,
        IDS,
        IMAGE,
        targets=[r.pattern for r in rules],
        rank=rank,
        alpha=alpha,
    )
    return jlora.wrap(BASE, plan=plan, **options)


quiet = pytest.mark.filterwarnings("ignore")


@quiet
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
def test_lora_rslora_dora(peft, rslora, dora):
    model = theirs(peft, use_rslora=rslora, use_dora=dora)
    agree(peft, model, wrapped(rslora=rslora, dora=dora))


@quiet
def test_dora_starts_at_the_norm(peft):
    model = theirs(peft, draw=False, use_dora=True)
    tree = wrapped(dora=True)
    for name, (path, _) in TO_TORCH.items():
        key, at = path.split("/")
        close(tree[key][at].m, fields_of(model, name)["m"])


@quiet
def test_lora_bias(peft):
    targets = ("fc", "conv")  # peft has none for embeddings
    model = theirs(peft, lora_bias=True, targets=targets)
    agree(peft, model, wrapped(lora_bias=True, targets=targets))


@quiet
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("targets", [("fc",), ("fc", "conv")])
def test_bias_modes(peft, bias, targets):
    model = theirs(peft, bias=bias, targets=targets)
    agree(peft, model, wrapped(bias=bias, targets=targets))


@quiet
def test_trainable_tokens(peft):
    rows = [7, 2, 11]
    model = theirs(peft, trainable_token_indices={"emb": rows}, targets=("fc",))
    import torch

    layer = layer_of(model, "emb").token_adapter
    p = layer.trainable_tokens_delta["default"]
    close(
        jnp.asarray(np.asarray(p.detach())),
        BASE["emb"]["embedding"][jnp.array(rows)],
    )
    p.data = torch.randn(p.shape)
    tree = wrapped(targets=("fc",), train_rows={"emb/embedding": rows})
    agree(peft, model, tree)


@quiet
def test_rank_and_alpha_patterns(peft):
    model = theirs(peft, rank_pattern={"fc": 2}, alpha_pattern={"conv": 9})
    rules = [
        jlora.Rule("fc/kernel", rank=2, alpha=6),
        jlora.Rule("conv/kernel", rank=4, alpha=9),
        jlora.Rule("emb/*", rank=4, alpha=6),
    ]
    plan = jlora.plan(fn, BASE, X, IDS, IMAGE, rules=rules)
    agree(peft, model, jlora.wrap(BASE, plan=plan))


@quiet
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_move_the_base(peft, init, rslora):
    """Up to the sign of each singular pair, which no decomposition fixes."""
    model = theirs(
        peft, draw=False, targets=("fc",), init_lora_weights=init, use_rslora=rslora
    )
    leaf = wrapped(targets=("fc",), init=init, rslora=rslora)["fc"]["kernel"]
    found = fields_of(model, "fc")
    base = np.asarray(layer_of(model, "fc").base_layer.weight.detach()).T
    close(leaf.w, jnp.asarray(base))
    sign = jnp.sign((leaf.b * found["b"]).sum(1))
    close(leaf.b * sign[:, None], found["b"])
    close(leaf.a * sign, found["a"])
    tree = {**BASE, "fc": {**BASE["fc"], "kernel": leaf}}
    agree(peft, model, tree)


@quiet
@pytest.mark.parametrize("init", ["orthogonal", "gaussian", True, "pissa_niter_16"])
def test_random_starts_by_their_distribution(peft, init):
    import torch

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(300, 400)

        def forward(self, x):
            return self.fc(x)

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=10, lora_alpha=10, target_modules=["fc"], init_lora_weights=init
    )
    model = peft.get_peft_model(Wide(), config)
    layer = model.base_model.model.fc
    kernel = jnp.asarray(np.asarray(layer.get_base_layer().weight.detach()).T)
    a, b = (
        np.asarray(x["default"].weight.detach()) for x in (layer.lora_A, layer.lora_B)
    )
    if init == "pissa_niter_16":
        kernel = kernel + jnp.asarray((b @ a).T)
    name = "kaiming" if init is True else init
    leaf = jlora.wrap({"w": kernel}, 10, targets="w", init=name)["w"]
    for ours, theirs in ((leaf.a, a), (leaf.b, b)):
        np.testing.assert_allclose(np.std(ours), np.std(theirs), rtol=0.08)
        np.testing.assert_allclose(np.mean(ours), np.mean(theirs), atol=0.01)
        np.testing.assert_allclose(
            np.quantile(np.abs(ours), [0.5, 0.9]),
            np.quantile(np.abs(theirs), [0.5, 0.9]),
            rtol=0.1,
        )
    if init == "orthogonal":
        assert np.abs(b @ a).max() < 1e-6 and np.abs(leaf.a @ leaf.b).max() < 1e-6


# ------------------------------------------------------------------------------- mixing

EXACT = ["cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune"]
EXACT += ["magnitude_prune_svd"]


@quiet
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", EXACT)
def test_mix(peft, method, majority):
    if majority == "frequency" and "ties" not in method:
        pytest.skip("only ties elects a sign")
    import torch

    model = theirs(peft)
    names, weights = ["default", "second", "third"], [1.0, 0.5, -0.25]
    for k, name in enumerate(names[1:]):
        config = peft.LoraConfig(
            r=4, lora_alpha=6 + k, target_modules=["fc", "emb", "conv"]
        )
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(4)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.5

    def adapter(which, alpha):
        tree = wrapped(alpha=alpha)
        for name, (path, _) in TO_TORCH.items():
            key, at = path.split("/")
            own = {}
            for said, p in layer_of(model, name).named_parameters():
                said = said.replace(which, "default") if which in said else "other"
                if said in FIELDS[name]:
                    field, back = FIELDS[name][said]
                    own[field] = jnp.asarray(back(np.asarray(p.detach())))
            tree[key][at] = dataclasses.replace(tree[key][at], **own)
        return jlora.adapter(tree)

    xs = [adapter(name, a) for name, a in zip(names, (6, 6, 7), strict=True)]
    pruned = method not in ("cat", "svd", "linear")
    options = {"density": 0.4} if pruned else {}
    more = options | ({"majority_sign_method": majority} if "ties" in method else {})
    model.add_weighted_adapter(names, weights, "mixed", method, **more)
    model.set_adapter("mixed")
    if pruned:
        options["majority"] = majority
    mixed = jlora.mix(xs, weights, method, **options)
    for name, (path, _) in TO_TORCH.items():
        want = np.asarray(layer_of(model, name).get_delta_weight("mixed").detach())
        back = (
            (lambda w: w.transpose(2, 3, 1, 0)) if name == "conv" else FROM_TORCH[name]
        )
        zero = {path: jnp.zeros(mixed[path].shape)}
        got = jlora.merge(jlora.attach(zero, {path: mixed[path]}))[path]
        close(got, jnp.asarray(back(want)), 1e-5, f"{method} of {name}")


# -------------------------------------------------------------------------- optimisers


@quiet
@pytest.mark.parametrize("kind", ["lora+", "riemannian", "lora-fa"])
def test_updates(peft, kind, monkeypatch):
    """The parameters after three steps on the same data."""
    import torch
    from peft import optimizers

    monkeypatch.setattr(
        "peft.optimizers.lorafa.is_bf16_available", lambda: False, raising=False
    )
    model = theirs(peft, targets=("fc",))
    tree = ours(model, wrapped(targets=("fc",)))
    lr, wd = 1e-2, 0.1
    if kind == "lora+":
        opt = optimizers.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=lr,
            loraplus_lr_ratio=8.0,
            loraplus_weight_decay=wd,
            eps=1e-6,
        )
        tx = jlora.optimizer(
            optax.adamw(lr, eps=1e-6, weight_decay=wd), tree, b_lr_ratio=8.0
        )
    elif kind == "riemannian":
        opt = optimizers.create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=lr, reg=1e-2, weight_decay=wd, eps=1e-6
        )
        first = jlora.riemannian(tree, reg=1e-2)
        tx = jlora.optimizer(
            optax.chain(first, optax.adamw(lr, eps=1e-6, weight_decay=wd)), tree
        )
    else:
        opt = optimizers.create_lorafa_optimizer(
            model, r=4, lora_alpha=6, lr=lr, weight_decay=0.0
        )
        for group in opt.param_groups:
            group["eps"] = 1e-12  # it is added before the correction of the bias there
        first = jlora.lora_fa(tree)
        tx = jlora.optimizer(optax.chain(first, optax.adam(lr, eps=1e-12)), tree)
    args = tensor(X), tensor(IDS).long(), tensor(IMAGE)
    state = tx.init(tree)
    lifted = jlora.lift(fn)
    step = jax.jit(jax.grad(lambda t: loss_of(lifted(t, X, IDS, IMAGE), jnp)))
    for _ in range(3):
        opt.zero_grad()
        loss_of(model(*args), torch).backward()
        opt.step()
        updates, state = tx.update(step(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    want, leaf = fields_of(model, "fc"), tree["fc"]["kernel"]
    close(leaf.a, want["a"], 1e-5, "a")
    close(leaf.b, want["b"], 1e-5, "b")


# ------------------------------------------------------ where peft is wrong: be right


def merged_is_lifted(call, params, x, rank=3, **options):
    plan = jlora.plan(call, params, x, rank=rank)
    tree = randomise(jlora.wrap(params, plan=plan, **options))
    close(jlora.lift(call)(tree, x), call(jlora.merge(tree), x), 1e-5)
    return tree


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("padding", ["SAME", ((4, 0), (0, 2))], ids=str)
def test_dilated_convolution(padding, dora):
    """peft: its lora_A lacks the dilation, so it crashes, or is wrong with "same"."""
    call = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x,
        p["kernel"],
        (1, 1),
        padding,
        rhs_dilation=(2, 3),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    merged_is_lifted(
        call, {"kernel": normal(3, 3, 4, 6)}, normal(2, 9, 9, 4), dora=dora
    )


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
def test_circular_convolution(dora):
    """peft: its lora_A pads with zeros."""
    layer = nn.Conv(6, (3, 3), padding="CIRCULAR")
    x = normal(2, 7, 7, 4)
    params = layer.init(jax.random.key(0), x)
    merged_is_lifted(layer.apply, params, x, dora=dora)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
def test_conv3d_of_one_pixel_merges(dora):
    """peft: the merge takes it for 2-D, and crashes."""
    layer = nn.Conv(6, (1, 1, 1))
    x = normal(2, 3, 4, 5, 4)
    params = layer.init(jax.random.key(0), x)
    tree = merged_is_lifted(layer.apply, params, x, dora=dora)
    assert jlora.merge(tree)["params"]["kernel"].shape == (1, 1, 1, 4, 6)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("groups, channels", [(2, 4), (4, 4)])
def test_grouped_convolution_merges(groups, channels, dora):
    """peft: lora_A reads all channels in each group, so the kernel cannot have it."""
    layer = nn.Conv(8, (3, 3), feature_group_count=groups)
    x = normal(2, 6, 6, channels)
    params = layer.init(jax.random.key(0), x)
    merged_is_lifted(layer.apply, params, x, dora=dora)


def test_olora_on_transposed_weights():
    """peft: it decomposes the array as it lies, and fails for (in, out)."""
    w = normal(12, 17)
    call = lambda p, x: x @ p["w"]  # noqa: E731
    turned = lambda p, x: x @ p["w"].T  # noqa: E731
    x = normal(3, 12)
    leaves = []
    for own, kernel in ((call, w), (turned, w.T)):
        plan = jlora.plan(own, {"w": kernel}, x, rank=4, targets="w")
        tree = jlora.wrap({"w": kernel}, plan=plan, init="olora")
        close(jlora.lift(own)(tree, x), own({"w": kernel}, x), 1e-6)
        leaves.append(tree["w"])
    close(leaves[0].a, leaves[1].a)
    close(leaves[0].w, leaves[1].w.T)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_merge_is_rounded_once(dtype, dora):
    """peft with safe_merge: 23.7 % of the weights are not the nearest number."""
    w = normal(64, 96, dtype=dtype)
    tree = randomise(jlora.wrap({"w": w}, 4, targets="w", dora=dora))
    leaf = tree["w"]
    exact = np.asarray(w, np.float64) + float(leaf.scale) * (
        np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    )
    if dora:
        exact = np.asarray(leaf.m) * exact / np.linalg.norm(exact, axis=0)
    nearest = jnp.asarray(exact.astype(np.float32)).astype(dtype)
    wrong = (np.asarray(jlora.merge(tree)["w"]) != np.asarray(nearest)).mean()
    # Numbers half-way between two others, which float32 does not tell apart; a gain
    # from a's factors rounded to the base's dtype moves a few more.
    assert wrong <= (0.01 if dora else 0.002)
