"""Adapters as values: mix, truncate, extract, spectrum.

Against deltas formed here in float64, and the identities that arithmetic has.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, normal, randomise, same, says
from jax import lax

import jlora
import jlora.loralib
from jlora._arithmetic.mix import METHODS
from jlora.loralib import Blocks, Kernel

X = normal(3, 6)
RULES = {
    "dense": jlora.Rule("dense"),
    "heads": jlora.Rule("heads"),
    "stack": jlora.Rule("stack"),
    "conv": jlora.Rule("conv"),
    "blocks": jlora.Rule("blocks", form=Blocks((True, False, True))),
    "kernel": jlora.Rule("kernel", form=Kernel()),
    "table": jlora.Rule("table"),
}
BASE = {
    "dense": normal(6, 8),
    "heads": normal(6, 2, 5),
    "stack": normal(3, 6, 8),
    "conv": normal(3, 3, 4, 6),
    "blocks": normal(6, 9),
    "kernel": normal(3, 3, 4, 6),
    "table": normal(10, 6),
}


def fn(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    image = jnp.ones((1, 5, 5, 4))
    conv = lambda w: lax.conv_general_dilated(  # noqa: E731
        image, w, (1, 1), "SAME", dimension_numbers=dims
    )
    return (
        x @ p["dense"],
        jnp.einsum("bi,iho->bho", x, p["heads"]),
        jnp.einsum("lbi,lio->lbo", jnp.stack([x, x, x]), p["stack"]),
        conv(p["conv"]),
        x @ p["blocks"],
        conv(p["kernel"]),
        p["table"][jnp.arange(3)],
    )


@functools.cache
def adapter(seed, rank=2, dora=False):
    rules = [dataclasses.replace(r, rank=rank) for r in RULES.values()]
    plan = jlora.plan(fn, BASE, X, rules=rules)
    tree = jlora.wrap(BASE, plan=plan, dora=dora)
    return jlora.adapter(randomise(tree, seed))


def deltas(found):
    """The deltas in float64, from the base and the merged weights."""
    zero = jax.tree.map(jnp.zeros_like, BASE)
    return {p: np.asarray(w) for p, w in jlora.merge(jlora.attach(zero, found)).items()}


def near(got, want, tol=1e-6):
    for path in want:
        size = max(np.abs(want[path]).max(), 1.0)
        np.testing.assert_allclose(got[path], want[path], atol=tol * size, err_msg=path)


A, B = adapter(1), adapter(2, rank=3)
NUMBERS = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)


def test_an_adapter_minus_itself_is_nothing():
    near(deltas(jlora.mix([A, A], [1, -1])), {p: 0 * w for p, w in BASE.items()}, 2e-6)
    minus = jlora.scaled(A, -1)
    near(
        deltas(jlora.mix([A, minus], [1, 1])), {p: 0 * w for p, w in BASE.items()}, 2e-6
    )


@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(x=NUMBERS, y=NUMBERS)
def test_cat_is_the_sum_of_deltas(x, y):
    mixed = jlora.mix([A, B], [x, y])
    left, right = deltas(A), deltas(B)
    near(deltas(mixed), {p: x * left[p] + y * right[p] for p in left}, 4e-6)
    assert {leaf.rank for leaf in mixed.values()} == {5}
    assert mixed["blocks"].form == Blocks((True, False, True))
    assert all((leaf.scale == 1).all() for leaf in mixed.values())


def test_addition_commutes_and_associates():
    c = adapter(3)
    one = jlora.mix([jlora.mix([A, B], [1, 1]), c], [1, 1])
    other = jlora.mix([A, jlora.mix([c, B], [1, 1])], [1, 1])
    near(deltas(one), deltas(other), 4e-6)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_truncate_is_the_closest(rank):
    both = jlora.mix([A, B], [1, 1])
    got, want = deltas(jlora.truncate(both, rank)), deltas(both)
    for path in ("dense", "heads", "stack", "conv", "table"):
        m = want[path].astype(np.float64)
        stack = m.reshape(-1, *matrix(path, m))
        u, s, vt = np.linalg.svd(stack, full_matrices=False)
        best = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
        error = np.abs(got[path].reshape(stack.shape) - best).max()
        assert error < 2e-5 * np.abs(stack).max(), path
    if rank >= 5:
        near(got, want, 3e-6)


def matrix(path, m):
    return {"heads": (6, 10), "conv": (36, 6)}.get(path, m.shape[-2:])


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(energy=st.floats(0.05, 1.0))
def test_truncate_to_an_energy(energy):
    both = jlora.mix([A, B], [1, 1])
    small, whole = jlora.truncate(both, energy=energy), jlora.spectrum(both)
    for path, leaf in small.items():
        s = whole[path].astype(np.float64) ** 2
        power = np.cumsum(s, -1) / s.sum(-1, keepdims=True)
        k = jlora.spectrum(small)[path].shape[-1]
        assert (power[..., k - 1] >= energy - 1e-5).all(), path
        if path != "kernel" and k > 1:
            assert (power[..., k - 2] < energy).any(), path
        assert leaf.rank * (3 if path == "kernel" else 1) == k


def test_extract_of_a_merge_gives_the_delta_back():
    plain = {p: x for p, x in A.items() if p not in ("blocks", "kernel")}
    base = {p: w for p, w in BASE.items() if p in plain}
    rules = [r for p, r in RULES.items() if p in plain]
    full = jlora.plan(fn, BASE, X, rules=[*RULES.values()])
    plan = jlora.Plan(
        {p: full[p] for p in plain}, {p: w.shape for p, w in base.items()}
    )
    tuned = jlora.merge(jlora.attach(base, plain))
    back = jlora.extract(base, tuned, rank=2, plan=plan)
    want = deltas(A)
    merged = jlora.merge(jlora.attach(base, back))
    near(merged, {p: np.asarray(w) for p, w in tuned.items()}, 3e-6)
    got = {p: np.asarray(merged[p] - base[p]) for p in plain}
    near(got, {p: want[p] for p in plain}, 3e-6)
    again = jlora.extract(base, tuned, energy=0.9999, plan=plan)
    assert {x.rank for x in again.values()} == {2} and rules
    with pytest.raises(ValueError, match="expected planned weights that differ"):
        jlora.extract(base, base, 2, plan=plan)


def test_extract_without_a_plan_and_what_else_changed():
    base = {"dense": {"kernel": normal(6, 8), "bias": normal(8)}, "norm": normal(8)}
    tuned = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape, seed=4), base)
    with pytest.warns(UserWarning) as seen:
        found = jlora.extract(base, tuned, rank=8)
    says(str(seen[0].message), "dense/bias", "norm", "train=")
    assert [*found] == ["dense/kernel"]
    whole = jlora.extract(base, tuned, rank=8, train=["**/bias", "norm"])
    close(jlora.merge(jlora.attach(base, whole)), tuned)
    same(jlora.unwrap(jlora.attach(base, whole)), base)
    other = {**tuned, "norm": normal(9)}
    with pytest.raises(ValueError) as e:
        jlora.extract(base, other, rank=2)
    says(e, "'norm' has shape (8,) in params and (9,)")
    with pytest.raises(ValueError) as e:
        jlora.extract(base, {"dense": tuned["dense"]}, rank=2)
    says(e, "tuned has no 'norm'")


def test_stack_slice_and_mix_in_any_order():
    """A stack mixed is what its layers are, mixed one by one."""
    for method in METHODS:
        if method.startswith("dare"):
            continue  # it draws
        pair = [{"stack": x["stack"]} for x in (A, NEXT)]
        options = {"density": 0.6} if has_density(method) else {}
        mixed = jlora.mix(pair, [0.7, -0.4], method, **options)["stack"]
        for k in range(3):
            one = [jax.tree.map(lambda x: x[k], x) for x in pair]  # noqa: B023
            layer = jlora.mix(one, [0.7, -0.4], method, **options)["stack"]
            close(mixed.a[k] @ mixed.b[k], layer.a @ layer.b, 1e-5, method)


def has_density(method):
    return method not in ("cat", "svd", "linear")


def test_pissa_to_a_plain_adapter():
    for init in ("pissa", "olora"):
        plan = jlora.plan(fn, BASE, X, rules=[RULES["dense"], RULES["stack"]])
        plan = jlora.Plan(
            {
                p: dataclasses.replace(plan.specs[p], init=init)
                for p in ("dense", "stack")
            },
            plan.shapes,
        )
        tree = jlora.wrap(BASE, plan=plan, rank=2)
        start = jlora.adapter(tree)
        trained = randomise(tree, scale=False)
        plain = jlora.mix([jlora.adapter(trained), start], [1, -1])
        assert plain["dense"].rank == 4
        close(jlora.merge(jlora.attach(BASE, plain)), jlora.merge(trained), 1e-5)


# ------------------------------------------------------- the methods, by their formulas


def by_hand(method, xs, ws, density, majority):
    """PEFT's functions, on arrays of float64."""
    xs, ws = [np.asarray(x, np.float64) for x in xs], np.asarray(ws, np.float64)
    if method in ("ties", "magnitude_prune"):
        kept = []
        for x in xs:
            k = int(density * x.size)
            flat = np.zeros(x.size)
            at = np.argsort(-np.abs(x).ravel(), kind="stable")[:k]
            flat[at] = x.ravel()[at]
            kept.append(flat.reshape(x.shape))
        xs = kept
    xs = np.stack(xs)
    weighted = xs * ws.reshape(-1, *(1,) * (xs.ndim - 1))
    if method != "ties":
        return weighted.sum(0)
    total = (xs if majority == "total" else np.sign(xs)).sum(0)
    same = np.sign(xs) == np.where(total >= 0, 1, -1)
    return (weighted * same).sum(0) / np.maximum(same.sum(0), 1)


@pytest.mark.parametrize(
    "method, majority",
    [
        ("linear", "total"),
        ("magnitude_prune", "total"),
        ("ties", "total"),
        ("ties", "frequency"),
    ],
)
def test_methods_on_factors(method, majority):
    xs, ws = [A, adapter(3), adapter(4)], [1.0, 0.5, -0.25]
    options = {"density": 0.5, "majority": majority} if method != "linear" else {}
    got = jlora.mix(xs, ws, method, **options)
    for path in ("dense", "heads", "conv", "table", "kernel"):
        s = [w * float(x[path].scale) for x, w in zip(xs, ws, strict=True)]
        root = np.sqrt(np.abs(s))
        a = by_hand(method, [x[path].a for x in xs], np.sign(s) * root, 0.5, majority)
        b = by_hand(method, [x[path].b for x in xs], root, 0.5, majority)
        close(got[path].a, jnp.asarray(a, jnp.float32), 1e-5, path)
        close(got[path].b, jnp.asarray(b, jnp.float32), 1e-5, path)


@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_methods_on_deltas(method):
    xs, ws = [A, B], [1.0, -0.5]
    options = {} if method == "svd" else {"density": 0.5}
    got = jlora.mix(xs, ws, method, rank=2, **options)
    left, right = deltas(A), deltas(B)
    for path in ("dense", "conv", "table"):
        name = "linear" if method == "svd" else method.removesuffix("_svd")
        m = by_hand(name, [left[path], right[path]], ws, 0.5, "total")
        m = m.reshape(matrix(path, m))
        u, s, vt = np.linalg.svd(m, full_matrices=False)
        want = (u[:, :2] * s[:2]) @ vt[:2]
        found = np.asarray(got[path].a).reshape(-1, 2) @ np.asarray(got[path].b)
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max() + 1e-5)
    assert jlora.mix(xs, ws, method, **options)["dense"].rank == 3


@pytest.mark.parametrize("method", [m for m in METHODS if m.startswith("dare")])
def test_random_methods_by_their_distribution(method):
    big = {"w": normal(60, 80)}
    one, two = (
        jlora.adapter(randomise(jlora.wrap(big, 4, targets="w"), k)) for k in (1, 2)
    )
    draws = [
        jlora.mix([one, two], [1.0, 1.0], method, density=0.5, key=jax.random.key(k))
        for k in range(3)
    ]
    assert np.abs(draws[0]["w"].a - draws[1]["w"].a).max() > 0
    same(
        jlora.mix([one, two], [1, 1], method, density=0.5)["w"].a,
        jlora.mix([one, two], [1, 1], method, density=0.5)["w"].a,
    )
    if method == "dare_linear":
        a = np.stack([d["w"].a for d in draws])
        s = [np.sqrt(x["w"].scale) * np.asarray(x["w"].a) for x in (one, two)]
        both = np.isclose(a, 2 * (s[0] + s[1]), atol=1e-5).mean()
        none = (a == 0).mean()
        assert abs(both - 0.25) < 0.05 and abs(none - 0.25) < 0.05
    everything = jlora.mix([one, two], [1, 1], method, density=1.0)
    name = method.replace("dare_linear", "linear").replace("dare_", "")
    if name.startswith("linear_svd"):
        name = "svd"
    options = {"density": 1.0} if "ties" in name else {}
    want = jlora.mix([one, two], [1, 1], name, **options)
    close(everything["w"].a @ everything["w"].b, want["w"].a @ want["w"].b, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_under_jit_with_traced_weights(method):
    left, right = ({"stack": x["stack"]} for x in (A, adapter(3)))
    options = {"density": 0.5} if has_density(method) else {}

    def product(x):
        return x["stack"].a @ x["stack"].b

    def call(ws):
        return product(jlora.mix([left, right], [ws[0], ws[1]], method, **options))

    got = jax.jit(call)(jnp.array([0.5, -2.0]))
    close(got, call(jnp.array([0.5, -2.0])), 1e-4)


def test_truncate_under_jit():
    left = {"stack": A["stack"]}
    small = jax.jit(lambda x: jlora.truncate(x, 1))(left)["stack"]
    want = jlora.truncate(left, 1)["stack"]
    close(small.a @ small.b, want.a @ want.b, 1e-5)
    with pytest.raises(ValueError, match="energy of traced factors"):
        jax.jit(lambda x: jlora.truncate(x, energy=0.5))(A)


def test_output_biases_are_summed():
    base = {"kernel": normal(6, 8), "bias": normal(8)}
    tree = jlora.wrap(base, 2, lora_bias=True)
    one, two = (jlora.adapter(randomise(tree, k)) for k in (1, 2))
    plain = {"kernel": dataclasses.replace(two["kernel"], c=None)}
    for xs in ([one, two], [one, plain]):
        mixed = jlora.mix(xs, [0.5, 3.0])
        want = sum(
            w * x["kernel"].scale * x["kernel"].c
            for x, w in zip(xs, [0.5, 3.0], strict=True)
            if x["kernel"].c is not None
        )
        close(jlora.merge(jlora.attach(base, mixed))["bias"], base["bias"] + want)
    same(jlora.truncate(tree, 1)["bias"], base["bias"])
    small = jlora.truncate(one, 2)
    close(
        jlora.merge(jlora.attach(base, small)),
        jlora.merge(jlora.attach(base, one)),
        1e-5,
    )


def test_forms_are_converted_where_that_is_exact():
    base = {"w": normal(6, 9)}
    rule = jlora.Rule("w", rank=2, form=Blocks((True, False, True)))
    blocks = jlora.adapter(randomise(jlora.wrap(base, rules=[rule])))
    plain = jlora.adapter(randomise(jlora.wrap(base, 3, targets="w"), 5))
    mixed = jlora.mix([blocks, plain], [1.0, 2.0])
    assert mixed["w"].form is None and mixed["w"].rank == 2 * 2 + 3
    want = sum(
        w * (jlora.merge(jlora.attach(base, x))["w"] - base["w"])
        for x, w in ((blocks, 1.0), (plain, 2.0))
    )
    close(jlora.merge(jlora.attach(base, mixed))["w"], base["w"] + want, 1e-5)


def test_whole_leaves():
    base = {"w": normal(6, 8), "head": normal(8, 3)}
    tree = jlora.wrap(base, 2, targets="w", train="head")
    one, two = (jlora.adapter(randomise(tree, k)) for k in (1, 2))
    half = jlora.mix([one, two], [0.25, 0.75])
    close(half["head"].value, 0.25 * one["head"].value + 0.75 * two["head"].value)
    with pytest.raises(ValueError) as e:
        jlora.mix([one, two], [1, -1])
    says(
        e,
        "'head' trained whole",
        "weights that sum up to 1",
        "isinstance(x, jlora.LoRA)",
    )
    small = jlora.truncate(one, 1)
    same(small["head"], one["head"])


@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.5, 0.9), (-2, 0.3)])
def test_replaced_rows(weights):
    """Their change is the sum of the changes, also with scales, also traced."""
    table, at = normal(10, 6), [7, 2]
    tree = jlora.wrap({"e": table}, targets=[], train_rows={"e": at})
    trees = [jlora.scaled(randomise(tree, k), s) for k, s in ((1, 1.0), (2, 0.4))]
    want = table + sum(
        w * (jlora.merge(t)["e"] - table) for w, t in zip(weights, trees, strict=True)
    )
    parts = [jlora.adapter(t) for t in trees]
    for call in (jlora.mix, jax.jit(jlora.mix)):
        close(jlora.merge(jlora.attach({"e": table}, call(parts, weights)))["e"], want)


def test_replaced_rows_whose_base_is_not_read():
    """Weights that sum up to one, but for rounding, leave nothing of the base."""
    table = normal(10, 6).at[7].set(jnp.nan)
    tree = jlora.wrap({"e": table}, targets=[], train_rows={"e": [7]})
    parts = [jlora.adapter(randomise(tree, k, scale=False)) for k in (1, 2, 3)]
    mixed = jlora.attach({"e": table}, jlora.mix(parts, [0.1, 0.2, 0.7]))
    assert jnp.isfinite(jlora.merge(mixed)["e"][7]).all()
    with pytest.raises(ValueError) as e:
        jlora.mix(parts[:2], [1, -1])
    says(e, "'e' replaces rows", "sum up to 0", "Leave the path out")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib's imports
def test_spectrum(tmp_path):
    found = jlora.spectrum(A)
    s = np.linalg.svd(deltas(A)["dense"].astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(found["dense"], s[:2], rtol=1e-4)
    assert found["stack"].shape == (3, 2) and found["blocks"].shape == (2, 2)
    assert [*found] == [*A] and len(found) == len(A)
    text = str(found)
    assert "dense" in text and "99 %" in text
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 5000


NEXT = adapter(5)


OTHER = {"w": jlora.Spec.of("dense", "io", rank=2)}, {"w": (6, 8)}


def halved():
    return jlora.adapter(jlora.partition(jlora.attach(BASE, A))[0])


def rows(at):
    tree = jlora.wrap({"e": normal(10, 6)}, targets=[], train_rows={"e": at})
    return jlora.adapter(tree)


@pytest.mark.parametrize(
    "call, parts",
    [
        (lambda: jlora.mix([A, B], [1, 1], "cats"), ["'cats'", "near names: 'cat'"]),
        (lambda: jlora.mix([A, B], [1]), ["1 weights for 2 adapters"]),
        (lambda: jlora.mix([], []), ["expected a list of adapters", "none"]),
        (lambda: jlora.mix(A, [1]), ["expected a list of adapters"]),
        (lambda: jlora.mix([A, {"w": X}], [1, 1]), ["jlora.adapter(tree)"]),
        (lambda: jlora.mix([A, B], [1, 1], "linear"), ["'dense' has ranks 2 and 3"]),
        (
            lambda: jlora.mix([A, without(B, "conv")], [1, 1]),
            ["'conv' is in adapter 0, not in adapter 1"],
        ),
        (
            lambda: jlora.mix([without(A, "conv"), B], [1, 1]),
            ["'conv' is in adapter 1, not in adapter 0"],
        ),
        (
            lambda: jlora.mix([A, {**NEXT, "dense": NEXT["table"]}], [1, 1]),
            ["'dense' is for weights of shape (6, 8) and (10, 6)"],
        ),
        (
            lambda: jlora.mix([A, {**NEXT, "conv": NEXT["kernel"]}], [1, 1]),
            ["'conv' has the forms None and Kernel"],
        ),
        (
            lambda: jlora.mix([A, adapter(3, dora=True)], [1, 1]),
            ["of adapter 1 has a magnitude", "jlora.extract"],
        ),
        (
            lambda: jlora.mix([A, dropped()], [1, 1]),
            ["'dense' lost its base in one, and not in the other"],
        ),
        (lambda: jlora.mix([A, NEXT], [1, 1], "ties"), ["density None", "(0, 1]"]),
        (lambda: jlora.mix([A, NEXT], [1, 1], "ties", density=2), ["density 2"]),
        (lambda: jlora.mix([A, NEXT], [1, 1], density=0.5), ["'cat'", "leave it out"]),
        (lambda: jlora.mix([A, NEXT], [1, 1], rank=2), ["rank 2 with 'cat'"]),
        (
            lambda: jlora.mix([A, NEXT], [1, 1], "ties", density=0.5, majority="all"),
            ["'all'", "'frequency'"],
        ),
        (lambda: jlora.truncate(A), ["rank=None and energy=None", "expected one"]),
        (lambda: jlora.truncate(A, 2, energy=0.5), ["expected one of the two"]),
        (lambda: jlora.truncate(A, 0), ["rank 0"]),
        (lambda: jlora.truncate(A, energy=1.5), ["energy 1.5"]),
        (lambda: jlora.truncate(BASE, 2), ["truncate"]),
        (lambda: jlora.spectrum(BASE), ["spectrum"]),
        (
            lambda: jlora.spectrum(adapter(3, dora=True)),
            ["spectrum: 'blocks' has a magnitude", "jlora.extract"],
        ),
        (
            lambda: jlora.truncate(adapter(3, dora=True), 1),
            ["truncate: 'blocks' has a magnitude", "jlora.extract"],
        ),
        (
            lambda: jlora.spectrum(jlora.partition(jlora.attach(BASE, A))[0]),
            ["spectrum: 'blocks' lacks scale", "half of a partition"],
        ),
        (lambda: jlora.spectrum(rows([7])), ["spectrum", "or replaces rows"]),
        (lambda: jax.jit(jlora.spectrum)(A), ["spectrum of traced", "outside of jit"]),
        (
            lambda: jlora.mix([rows([7]), rows([7, 2])], [0.5, 0.5]),
            ["'e' has the forms Rows(7 of 10) and Rows(7, 2 of 10)"],
        ),
        *(
            (
                lambda w=w: jlora.mix([A, A], w),  # type: ignore[misc]
                ["mix: weights", "a number for each adapter"],
            )
            for w in (0.5, "ab", {0: 1.0, 1: 2.0}, [jnp.ones(2)] * 2, [1j, 1], None)
        ),
        (lambda: jlora.mix([A, A], [1, 1], "svd", rank="2"), ["rank '2' with 'svd'"]),
        (
            lambda: jlora.mix([halved(), halved()], [1, 1]),
            ["'blocks' lacks scale", "half of a partition"],
        ),
        (
            lambda: jlora.extract(BASE, BASE, 2, plan=jlora.Plan(*OTHER)),
            ["extract: the plan is of another tree: it has 'w'", "same tree as plan"],
        ),
        (
            lambda: jlora.extract(
                {"w": X}, {"w": X.at[0, 0].set(jnp.inf)}, 1, targets="w"
            ),
            ["extract: 'w' has NaN or infinities", "train="],
        ),
        (lambda: jlora.scaled(A, {"dense": 1}), ["scaled", "expected a number"]),
        (lambda: jlora.scaled(A, jnp.ones(3)), ["scaled: 'blocks'", "shape ()"]),
        (lambda: jlora.scaled(A, 1j), ["scaled: 'blocks'", "a real number"]),
        (
            lambda: jlora.extract(
                BASE, BASE, 2, plan=jlora.plan(fn, BASE, X), targets="dense"
            ),
            ["extract: targets, exclude and rules", "jlora.plan(...)"],
        ),
    ],
)
def test_bad_use(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    says(error, *parts)


def without(x, path):
    return {p: leaf for p, leaf in x.items() if p != path}


def dropped():
    tree = jlora.drop_base(jlora.attach(BASE, NEXT), force=True)
    return jlora.adapter(tree)
