"""Every bad input gets an error that says which path, what was expected, what was
found, and what to do. (Those of checkpoints are in test_checkpoint.py.)"""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import adapt, normal, randomise, says
from jax import lax

import jlora
import jlora.checkpoint


def params():
    return {
        "encoder": {
            "layer_0": {"query": {"kernel": normal(5, 7), "bias": normal(7)}},
            "layer_1": {"query": {"kernel": normal(7, 5), "bias": normal(5)}},
        },
        "head": {"kernel": normal(5, 3)},
    }


def fn(p, x):
    for i in (0, 1):
        layer = p["encoder"][f"layer_{i}"]["query"]
        x = x @ layer["kernel"] + layer["bias"]
    return x @ p["head"]["kernel"]


X = normal(11, 5, seed=1)
QUERY = "encoder/layer_0/query/kernel"

# ----------------------------------------------------------------------- rank

RANK_USES = {
    "wrap": lambda rank: jlora.wrap(params(), rank=rank),
    "plan": lambda rank: jlora.plan(fn, params(), X, rank=rank),
    "rule": lambda rank: jlora.wrap(params(), rules=[jlora.Rule(QUERY, rank=rank)]),
}


@pytest.mark.parametrize(
    "use, rank",
    [
        pytest.param(use, rank, id=f"{name}-{rank!r}")
        for name, use in RANK_USES.items()
        for rank in (0, -3, 2.0, 2.5, "8", True, None)
        if not (name == "rule" and rank is None)  # there it means the default
    ],
)
def test_rank_that_is_no_positive_integer(use, rank):
    with pytest.raises((ValueError, TypeError)) as error:
        use(rank)
    says(error, "rank", repr(rank), "positive integer", "exclude")


# ------------------------------------------------------------------- patterns


def matched_by(word, pattern):
    """The keyword argument that gives this pattern as targets, exclude, …"""
    if word == "rules":
        return {word: [jlora.Rule(pattern, rank=2)]}
    return {word: ["**/kernel", pattern] if word == "targets" else [pattern]}


@pytest.mark.parametrize("word", ["targets", "exclude", "rules", "train"])
@pytest.mark.parametrize(
    "pattern, shown",
    [
        pytest.param("encoder/layer_0/qeury/kernel", "qeury", id="typo"),
        pytest.param("query/kernel", "query/kernel", id="too-short"),
        pytest.param("*/query/kernel", "*/query/kernel", id="star-is-one-key"),
        pytest.param(re.compile("layer_0/query/kernel"), "layer_0", id="regex"),
    ],
)
def test_pattern_that_matches_nothing(word, pattern, shown):
    with pytest.raises(ValueError, match="matches no") as error:
        jlora.wrap(params(), **matched_by(word, pattern))
    says(error, shown, QUERY)
    if word != "train":  # which is wrap's alone
        with pytest.raises(ValueError, match="matches no") as error:
            jlora.plan(fn, params(), X, **matched_by(word, pattern))
        says(error, shown, QUERY)


def test_every_pattern_is_checked_for_itself():
    with pytest.raises(ValueError, match="head/kernle"):
        jlora.wrap(params(), targets=["**/kernel", "head/kernle"])


def test_callable_that_matches_nothing():
    def picky(path, w):
        return False

    with pytest.raises(ValueError, match="matches no") as error:
        jlora.wrap(params(), targets=[picky])
    says(error, "picky")


@pytest.mark.parametrize("pattern", [3, b"kernel", ["head/kernel"]])
def test_pattern_that_is_none(pattern):
    with pytest.raises((TypeError, ValueError), match="pattern") as error:
        jlora.wrap(params(), targets=[pattern])
    says(error, repr(pattern), "glob", "callable")


def test_nothing_left_to_adapt():
    with pytest.raises(ValueError, match="adapt") as error:
        jlora.wrap({"norm": {"scale": normal(7)}})
    says(error, "norm/scale", "plan")
    with pytest.raises(ValueError, match="adapt"):
        jlora.wrap(params(), exclude=["**"])
    with pytest.raises(ValueError, match="adapt") as error:
        jlora.plan(fn, params(), X, targets=["**/bias"])
    says(error, "encoder/layer_0/query/bias")


class Parameter:
    """A mutable variable that is no pytree, as penzai's are."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    "tree, found",
    [
        pytest.param({}, "an empty tree", id="empty"),
        pytest.param(
            {"linear": Parameter(normal(5, 7))},
            "only Parameter (at 'linear')",
            id="parameters",
        ),
        pytest.param(Parameter(normal(5, 7)), "only Parameter.", id="object"),
        pytest.param(
            {"width": 3, "name": "x"}, "only int, str (at 'name')", id="config"
        ),
    ],
)
@pytest.mark.parametrize("call", [jlora.wrap, lambda t: jlora.plan(fn, t, X)])
def test_weights_that_live_elsewhere(tree, found, call):
    with pytest.raises(ValueError) as error:
        call(tree)
    says(error, "expected a tree of arrays", found, "live elsewhere")
    says(error, "model.init(key, x)", "model.trainable_variables")
    says(error, "pz.unbind_params(model, freeze=True)", "pz.bind_variables")


def test_ambiguous_roles_without_a_plan():
    with pytest.raises(ValueError) as error:
        jlora.wrap({"blocks": {"mix": {"kernel": normal(3, 5, 7)}}})
    says(error, "blocks/mix/kernel", "(3, 5, 7)", "roles", "jlora.plan(")


def test_uses_that_contradict_each_other_when_planned():
    """Contracted over one pair of axes here and over another there."""

    def both(p, x):
        return jnp.einsum("ab,abc->c", x, p["w"]), jnp.einsum("bc,abc->a", x, p["w"])

    with pytest.raises(ValueError) as error:
        jlora.plan(both, {"w": normal(5, 5, 5)}, normal(5, 5), targets=["w"])
    says(error, "w", "contradict")


# ------------------------------------------------------------- what is wrapped


def test_wrapping_twice():
    tree = jlora.wrap(params(), rank=2)
    for again in (
        lambda: jlora.wrap(tree, rank=2),
        lambda: jlora.plan(fn, tree, X),
        lambda: jlora.attach(tree, jlora.adapter(tree)),
    ):
        with pytest.raises(ValueError, match="already") as error:
            again()
        says(error, QUERY, "jlora.merge", "jlora.unwrap")


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.complex64])
@pytest.mark.parametrize("traced", [True, False], ids=["plan", "wrap"])
def test_integer_or_complex_targets(dtype, traced):
    p = {"a": {"kernel": normal(5, 7)}, "b": {"kernel": jnp.ones((5, 7), dtype)}}

    def use(p, x):
        return x @ p["a"]["kernel"] + x @ p["b"]["kernel"].real.astype(jnp.float32)

    with pytest.raises(ValueError) as error:
        if traced:
            jlora.plan(use, p, X, targets=["**/kernel"])
        else:
            jlora.wrap(p, targets=["**/kernel"])
    says(error, "b/kernel", jnp.dtype(dtype).name, "float", "xclude")
    tree = jlora.wrap(p, rank=2)  # not named, so left as it is
    assert tree["b"]["kernel"] is p["b"]["kernel"]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_integer_or_complex_leaves_to_train(dtype):
    p = {"kernel": normal(5, 7), "head": jnp.ones(7, dtype)}
    with pytest.raises(ValueError) as error:
        jlora.wrap(p, train=["head"])
    says(error, "head", jnp.dtype(dtype).name, "float")


def test_two_leaves_with_one_path():
    p = {"a/b": {"kernel": normal(5, 7)}, "a": {"b": {"kernel": normal(5, 7)}}}
    with pytest.raises(ValueError) as error:
        jlora.wrap(p, rank=2)
    says(error, "a/b/kernel", "two")


def test_bias_mode_that_does_not_exist():
    with pytest.raises(ValueError) as error:
        jlora.wrap(params(), bias="some")
    says(error, "bias", "some", "none", "all", "lora_only")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("traced", [True, False], ids=["trace", "names"])
def test_bias_mode_without_a_bias(bias, traced):
    p = {"up": {"kernel": normal(5, 7), "offset": normal(7)}, "ids": jnp.arange(3)}
    plan = None
    if traced:
        plan = jlora.plan(lambda p, x: x @ p["up"]["kernel"], p, X)
    with pytest.raises(ValueError) as error:
        jlora.wrap(p, plan=plan, bias=bias)
    says(error, bias, "found none", "up/offset", "plan=jlora.plan(fn, params, *args)")
    says(error, "train=[...]")


def test_init_that_does_not_exist():
    with pytest.raises(ValueError) as error:
        jlora.wrap(params(), init="kaimin")
    says(error, "kaimin", "kaiming")


# ------------------------------------------------------------- plans of other trees


def test_plan_of_a_supertree_and_of_a_subtree():
    inner = jlora.plan(fn, params(), X)
    outer = jlora.plan(lambda v, x: fn(v["params"], x), {"params": params()}, X)
    with pytest.raises(ValueError) as error:
        jlora.wrap(params(), plan=outer)
    says(error, f"params/{QUERY}", re.compile(rf"(?<!params/){QUERY}"))
    with pytest.raises(ValueError) as error:
        jlora.wrap({"params": params()}, plan=inner)
    says(error, f"params/{QUERY}", re.compile(rf"(?<!params/){QUERY}"))


def test_plan_of_other_shapes():
    plan = jlora.plan(fn, params(), X)
    other = params()
    other["head"]["kernel"] = normal(5, 4)
    with pytest.raises(ValueError) as error:
        jlora.wrap(other, plan=plan)
    says(error, "head/kernel", "(5, 3)", "(5, 4)")


# ----------------------------------------------------------------- outside lift

LEAF_USES = [
    pytest.param(lambda w: w + 1, id="add"),
    pytest.param(lambda w: 1 - w, id="right-sub"),
    pytest.param(lambda w: w * w, id="mul"),
    pytest.param(lambda w: X @ w, id="array-matmul"),
    pytest.param(lambda w: np.asarray(X) @ w, id="numpy-matmul"),
    pytest.param(lambda w: w @ X.T, id="matmul"),
    pytest.param(lambda w: -w, id="neg"),
    pytest.param(lambda w: abs(w), id="abs"),
    pytest.param(lambda w: w > 0, id="compare"),
    pytest.param(lambda w: w[0], id="index"),
    pytest.param(lambda w: len(w), id="len"),
    pytest.param(lambda w: list(w), id="iterate"),
    pytest.param(lambda w: float(w), id="float"),
    pytest.param(lambda w: jnp.sin(w), id="jnp"),
    pytest.param(lambda w: jnp.dot(X, w), id="jnp-dot"),
    pytest.param(lambda w: np.asarray(w), id="numpy"),
    pytest.param(lambda w: np.multiply(w, 2), id="ufunc"),
    pytest.param(lambda w: jnp.asarray(w), id="jnp-asarray"),
    pytest.param(lambda w: jax.jit(lambda w: w * 2)(w), id="jit"),
]


@pytest.mark.parametrize("use", LEAF_USES)
@pytest.mark.parametrize("kind", ["LoRA", "Full"])
def test_adapted_leaf_used_outside_lift(use, kind):
    tree = jlora.wrap({"kernel": normal(5, 7)}, rank=2)
    if kind == "Full":
        p = {"kernel": normal(5, 7), "other": {"kernel": normal(5, 7)}}
        tree = jlora.wrap(p, rank=2, targets=["other/kernel"], train=["kernel"])
    with pytest.raises(TypeError) as error:
        use(tree["kernel"])
    says(error, kind, "jlora.lift", "jlora.merge")


@pytest.mark.parametrize("kind", [jlora.LoRA, jlora.Full])
def test_adapted_leaf_given_to_a_lax_primitive(kind):
    """JAX refuses it without asking the leaf, in words of its own, which name the leaf
    or the method that says what it is."""
    p = {"kernel": normal(5, 7), "other": {"kernel": normal(5, 7)}}
    tree = jlora.wrap(p, rank=2, targets=["other/kernel"], train=["kernel"])
    leaf = tree["kernel"] if kind is jlora.Full else tree["other"]["kernel"]
    with pytest.raises((TypeError, ValueError)) as error:
        lax.dot(X, leaf)
    chain, link = "", error.value
    while link is not None:
        chain, link = f"{chain}\n{link}", link.__cause__ or link.__context__
    assert kind.__name__ in chain or "__jax_array__" in chain


def test_missing_attributes_say_the_same_and_hasattr_stays_honest():
    leaf = jlora.wrap({"kernel": normal(5, 7)}, rank=2)["kernel"]
    for name in ("T", "reshape", "astype", "sum", "sharding", "aval"):
        assert not hasattr(leaf, name)
        with pytest.raises(AttributeError) as error:
            getattr(leaf, name)
        says(error, name, "jlora.lift", "jlora.merge")
    copy.copy(leaf)
    copy.deepcopy(leaf)
    assert "LoRA" in repr(leaf)


def test_a_plain_function_of_an_adapted_tree():
    with pytest.raises(TypeError, match=r"jlora\.lift"):
        fn(jlora.wrap(params(), rank=2), X)


# --------------------------------------------------------- otherwise than planned


@pytest.mark.parametrize(
    "planned, used, shape, full, x",
    [
        pytest.param(
            "bi,iho->bho",
            "bih,iho->bo",
            (3, 5, 7),
            (11, 3),
            (11, 3, 5),
            id="in-and-out",
        ),
        pytest.param(
            "bho,iho->bi",
            "bih,iho->bo",
            (3, 5, 7),
            (11, 5, 7),
            (11, 3, 5),
            id="out-and-in",
        ),
        pytest.param(
            "ebi,eio->ebo", "bei,eio->bo", (3, 5, 7), (3, 11, 5), (11, 3, 5), id="batch"
        ),
    ],
)
def test_weight_used_otherwise_than_planned(planned, used, shape, full, x):
    p = {"deep": {"w": normal(*shape)}}

    def as_planned(p, x):
        return jnp.einsum(planned, x, p["deep"]["w"])

    def otherwise(p, x):
        return jnp.einsum(used, x, p["deep"]["w"])

    tree, _ = adapt(as_planned, p, normal(*full))
    with pytest.raises(ValueError, match="deep/w") as error:
        jlora.lift(otherwise)(tree, normal(*x))
    says(error, "dot_general", "roles", "jlora.plan", re.compile("ioo|oii|bio|iio"))


def test_conv_of_a_weight_that_was_planned_as_dense():
    """A stack of Dense kernels has the shape of a Conv1D's, and is none."""

    def stack(p, x):
        return lax.scan(lambda c, w: (c, x @ w), 0, p["kernel"])[1]

    def convolved(p, x):
        return lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    tree, _ = adapt(stack, {"kernel": normal(3, 5, 7)}, normal(11, 5))
    with pytest.raises(ValueError, match="kernel") as error:
        jlora.lift(convolved)(tree, normal(2, 11, 5))
    says(error, "conv_general_dilated", "roles", "bio", "jlora.plan")


# ---------------------------------------------------------------------- attach


def test_attach_with_an_unknown_path():
    adapter = jlora.adapter(jlora.wrap(params(), rank=2))
    adapter["encoder/layer_0/qeury/kernel"] = adapter.pop(QUERY)
    for use in (jlora.attach, jlora.unmerge):
        with pytest.raises(ValueError) as error:
            use(params(), adapter)
        says(error, "encoder/layer_0/qeury/kernel", QUERY)


def test_attach_with_a_path_that_the_tree_lacks():
    adapter = jlora.adapter(jlora.wrap(params(), rank=2))
    short = params()
    del short["head"]
    with pytest.raises(ValueError) as error:
        jlora.attach(short, adapter)
    says(error, "head/kernel", "near")


def test_attach_with_a_leaf_that_lacks_a_factor():
    adapter = jlora.adapter(jlora.wrap(params(), rank=2))
    half, _ = jlora.partition(adapter)
    with pytest.raises(ValueError) as error:
        jlora.attach(params(), half)
    says(error, "encoder/layer_0/query/kernel", "scale", "combine")


def test_attach_with_another_shape():
    adapter = jlora.adapter(jlora.wrap(params(), rank=2))
    other = params()
    other["head"]["kernel"] = normal(5, 4)
    for use in (jlora.attach, jlora.unmerge):
        with pytest.raises(ValueError) as error:
            use(other, adapter)
        says(error, "head/kernel", "(5, 3)", "(5, 4)")


def test_attach_across_params_shows_the_renaming_that_works():
    bare = jlora.adapter(jlora.wrap(params(), rank=2))
    whole = jlora.adapter(jlora.wrap({"params": params()}, rank=2))
    for adapter, tree in ((bare, {"params": params()}), (whole, params())):
        with pytest.raises(ValueError) as error:
            jlora.attach(tree, adapter)
        line = re.search(r"\{.*adapter\.items\(\)\}", str(error.value))
        assert line, error.value
        jlora.attach(tree, eval(line.group(), {"adapter": adapter}))


@pytest.mark.parametrize("thing", [None, {"head/kernel": normal(5, 3)}, [1]])
def test_attach_of_what_is_no_adapter(thing):
    with pytest.raises((ValueError, TypeError)) as error:
        jlora.attach(params(), thing)
    says(error, "adapter", "jlora.adapter")


def test_unmerge_of_a_leaf_that_trained_whole():
    tree = jlora.wrap(params(), rank=2, train=["head/kernel"])
    with pytest.raises(ValueError) as error:
        jlora.unmerge(jlora.merge(tree), jlora.adapter(tree))
    says(error, "head/kernel", "jlora.unwrap")


WHOLE_TREE_USES = {
    "merge": jlora.merge,
    "unwrap": jlora.unwrap,
    "lift": lambda tree: jlora.lift(fn)(tree, X),
    "explain": lambda tree: jlora.explain(fn, tree, X),
    "lift-jit": jax.jit(lambda tree: jlora.lift(fn)(tree, X)),
}


@pytest.mark.parametrize(
    "use, half",
    [
        pytest.param(use, half, id=f"{name}-{half}")
        for name, use in WHOLE_TREE_USES.items()
        for half in ("trainable", "frozen", "adapter")
        if (name, half) != ("unwrap", "frozen")  # that half does hold every base
    ],
)
def test_halves_and_adapters_where_a_tree_is_wanted(use, half):
    tree = jlora.wrap(params(), rank=2)
    trainable, frozen = jlora.partition(tree)
    bare = jax.tree.map(without_base, tree, is_leaf=jlora.is_adapted)
    given = {"trainable": trainable, "frozen": frozen, "adapter": bare}[half]
    with pytest.raises(ValueError) as error:
        use(given)
    says(error, QUERY, "jlora.combine")
    if half == "adapter":
        says(error, "w=None", "jlora.attach")


def without_base(leaf):
    return dataclasses.replace(leaf, w=None) if jlora.is_adapted(leaf) else leaf


def test_combine_of_halves_of_different_trees():
    one = jlora.partition(jlora.wrap(params(), rank=2))
    two = jlora.partition(jlora.wrap({"kernel": normal(5, 7)}, rank=2))
    with pytest.raises(ValueError, match="partition"):
        jlora.combine(one[0], two[1])


# ------------------------------------------------------------ no adapters at all


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda p: jlora.optimizer(optax.sgd(1.0), p), id="optimizer"),
        pytest.param(jlora.partition, id="partition"),
        pytest.param(jlora.adapter, id="adapter"),
        pytest.param(lambda p: jlora.dropout(p, 0.1, jax.random.key(0)), id="dropout"),
    ],
)
def test_a_tree_without_adapters(use):
    with pytest.raises(ValueError, match="adapt") as error:
        use(params())
    says(error, "jlora.wrap")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_optimizer_of_a_tree_with_integer_leaves(dtype):
    tree = jlora.wrap({"kernel": normal(5, 7), "deep": {"ids": jnp.ones(3, dtype)}})
    with pytest.raises(ValueError) as error:
        jlora.optimizer(optax.sgd(1.0), tree)
    says(error, "deep/ids", jnp.dtype(dtype).name, "float", "jlora.partition")


@pytest.mark.parametrize("kept", [True, False])
def test_gradients_of_another_tree(kept):
    """Such as those that the state of a line search keeps."""
    tree = jlora.wrap(params(), rank=2)
    tx = jlora.optimizer(optax.lbfgs(), tree)
    state = tx.init(tree)
    grads = optax.tree.get(state, "grad") if kept else params()
    with pytest.raises(ValueError) as error:
        tx.update(grads, state, tree)
    says(error, "expected gradients of the adapted tree", "found a dict")
    says(error, "optax.value_and_grad_from_state", "jlora.partition(tree)")


def test_adapted_leaves_of_which_none_is_used():
    plain = params()
    tree = jlora.wrap(plain, rank=2)

    def by_closure(tree, x):
        return fn(plain, x)

    for call in (
        lambda: jlora.lift(by_closure)(tree, X),
        lambda: jax.jit(jlora.lift(by_closure))(tree, X),
    ):
        with pytest.raises(ValueError) as error:
            call()
        says(error, "by_closure", "closure", "argument", "encoder/")


def test_one_used_leaf_is_enough():
    tree = randomise(jlora.wrap(params(), rank=2))
    y = jlora.lift(lambda p, x: x @ p["head"]["kernel"])(tree, X)
    assert y.shape == (11, 3)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_dropout_rate_out_of_range(rate):
    with pytest.raises(ValueError) as error:
        jlora.dropout(jlora.wrap(params(), rank=2), rate, jax.random.key(0))
    says(error, str(rate), "rate", "0")


def test_strict_names_path_and_primitive():
    p = {"deep": {"w": normal(5, 7)}}
    tree, _ = adapt(lambda p, x: x @ p["deep"]["w"], p, X)
    with pytest.raises(ValueError) as error:
        jlora.lift(lambda p, x: x @ jnp.tan(p["deep"]["w"]), strict=True)(tree, X)
    says(error, "deep/w", "tan", "strict")


def test_a_tree_in_the_place_of_the_rank_is_not_printed():
    params = {"kernel": normal(64, 64)}
    with pytest.raises(ValueError) as error:
        jlora.wrap(params, params)
    says(error, "rank: expected a positive integer, found dict", "params come before")
    assert len(str(error.value)) < 200


SWAPPED = {
    "optimizer": (
        lambda t: jlora.optimizer(t, optax.adam(1e-3)),
        [
            "optimizer",
            "an optax transformation, then the adapted tree",
            "found the tree",
        ],
    ),
    "no transformation": (
        lambda t: jlora.optimizer(1e-3, t),
        ["jlora.optimizer(optax.adamw(1e-4), tree)", "found a float"],
    ),
    "plan": (
        lambda t: jlora.plan(params(), fn, X),
        ["plan", "jlora.plan(fn, params, *args)", "found a dict, then a function"],
    ),
    "plan of a module and a function": (
        lambda t: jlora.plan(Callable(), fn, X),
        ["then the params", "found a Callable, then a function"],
    ),
    "plan of no function": (
        lambda t: jlora.plan(fn(params(), X), params(), X),
        ["a function of the params", "then a dict"],
    ),
    "lift": (
        lambda t: jlora.lift(t),
        ["lift(fn)(tree, *args)", "found an adapted tree"],
    ),
    "lift of params": (lambda t: jlora.lift(params()), ["as fn", "found a dict"]),
    "lift of a module": (
        lambda t: jlora.lift(jlora.wrap(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rank=2)),
        ["lambda module, x: module(x)", "found an adapted tree"],
    ),
    "checkpoint.save": (
        lambda t: jlora.checkpoint.save(t, "run/100"),
        ["expected the path of a directory first, then the tree", "found a dict"],
    ),
    "checkpoint.restore": (
        lambda t: jlora.checkpoint.restore(params(), "run/100"),
        ["expected the path of a directory first, then the tree", "found a dict"],
    ),
    "lift of an array": (lambda t: jlora.lift(X), ["as fn", "found a ArrayImpl"]),
    "explain": (
        lambda t: jlora.explain(t, fn, X),
        ["explain(fn, tree, *args)", "as fn", "found an adapted tree"],
    ),
}


class Callable:
    def __call__(self, x):
        return x


@pytest.mark.parametrize("case", SWAPPED)
def test_arguments_in_another_order(case):
    call, words = SWAPPED[case]
    with pytest.raises(TypeError) as error:
        call(jlora.wrap(params(), rank=2))
    says(error, *words)


def test_a_tree_captured_by_closure_is_told_to_be_an_argument():
    tree = jlora.wrap(params(), rank=2)
    for call in (lambda x: fn(tree, x), jlora.lift(lambda x: fn(tree, x))):
        with pytest.raises(TypeError) as error:
            call(X)
        says(error, "jlora.lift(fn) with the tree as an argument")


@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("**/{query,key}/kernel", "no braces: pass a list"),
        ("encoder.layer_0.query", "Did you mean 'encoder/layer_0/query/**'?"),
        (QUERY.replace("/", "."), f"Did you mean {QUERY!r}?"),
        (f"/{QUERY}", f"Did you mean {QUERY!r}?"),
        (".*query.*", "given as re.compile('.*query.*')"),
        ("query.kernel", "Did you mean '**/query/kernel'?"),
        ("Query/kernel", "near paths: 'encoder/layer_1/query/kernel'"),
        (re.compile("query"), "Did you mean re.compile('.*query.*')?"),
    ],
    ids=str,
)
def test_patterns_as_other_tools_have_them(pattern, hint):
    for word in ("targets", "exclude"):
        with pytest.raises(ValueError) as error:
            jlora.wrap(params(), rank=2, **{word: pattern})
        says(error, hint)


@pytest.mark.parametrize("with_plan", [False, True], ids=["without", "plan"])
def test_targets_that_take_in_stacked_biases_and_scales(with_plan):
    """With a plan and without, what is no weight is left, and listed."""
    p = {
        "layers": {
            "q": {"kernel": normal(3, 5, 5), "bias": normal(3, 5)},
            "up": {"kernel": normal(3, 5, 5), "scale": normal(3, 5)},
        },
        "out": {"kernel": normal(5, 2)},
    }

    def scanned(p, x):
        def layer(x, p):
            x = x @ p["q"]["kernel"] + p["q"]["bias"]
            return x @ p["up"]["kernel"] * p["up"]["scale"], None

        return lax.scan(layer, x, p["layers"])[0] @ p["out"]["kernel"]

    if with_plan:
        plan = jlora.plan(scanned, p, X, rank=2, targets="layers/**")
        assert sorted(plan.skipped) == ["layers/q/bias", "layers/up/scale"]
        tree = jlora.wrap(p, plan=plan)
    else:
        tree = jlora.wrap(p, rank=2, targets="layers/**")
    found = {path: leaf.axes for path, leaf in jlora.adapter(tree).items()}
    assert found == dict.fromkeys(["layers/q/kernel", "layers/up/kernel"], "bio")
    jlora.lift(scanned)(tree, X)
