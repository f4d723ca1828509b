"""Oracles that know nothing of the library's code, and what the tests share.

The main oracle is the dense matrix: `by_hand` forms W + scale * a·b from the roles
that a plan states, with one einsum, in float64 (numpy) or traced (jax.numpy, so that
it can be differentiated).
"""

import collections
import dataclasses
import os
import re
import warnings

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora._leaf.base import is_base

# Compiler options that undo what conftest.py switches off: of the HLO that costs are
# counted in, and of the code as well.
EMITTERS = {}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    EMITTERS = {"xla_cpu_use_fusion_emitters": True}
OPTIMISED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **EMITTERS,
}

EVERYTHING = ("**",)


def is_adapted(node):
    return isinstance(node, (jlora.LoRA, jlora.Full))


def paths(tree, is_leaf=None):
    """The tree as a flat dict from `a/b/c` to leaf."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }


def adapted(tree):
    """The adapted leaves of a tree, by path."""
    found = paths(tree, is_leaf=is_adapted)
    return {path: leaf for path, leaf in found.items() if is_adapted(leaf)}


def randomise(tree, seed=7, scale=True):
    """The tree with random factors, and scales in [0.5, 1.5), in its adapted leaves.

    The delta gets about the size of the weight, so that no error hides behind the
    zero that b starts from. One scale per slice, so that a mixed-up batch is seen.
    """
    rng = np.random.default_rng(seed)

    def normal(like, fan):
        draw = rng.normal(size=like.shape) / np.sqrt(max(fan, 1))
        return jnp.asarray(draw.astype(like.dtype))

    def one(leaf):
        if isinstance(leaf, jlora.Full):
            change = normal(leaf.value, leaf.value.size) * 3
            return dataclasses.replace(leaf, value=leaf.value + change)
        if not isinstance(leaf, jlora.LoRA):
            return leaf
        new = {}
        if leaf.a is not None:  # a leaf that replaces rows has none
            inner = int(np.prod(leaf.a.shape[len(leaf.scale.shape) : -1]))
            new["a"] = normal(leaf.a, inner)
        new["b"] = normal(leaf.b, 1 if leaf.a is None else leaf.a.shape[-1])
        if scale:
            draw = rng.uniform(0.5, 1.5, leaf.scale.shape)
            new["scale"] = jnp.asarray(np.asarray(draw, leaf.scale.dtype))
        for name in ("c", "m"):
            if getattr(leaf, name) is not None:
                new[name] = normal(getattr(leaf, name), 1)
        return dataclasses.replace(leaf, **new)

    return jax.tree.map(one, tree, is_leaf=is_adapted)


def axes_of(spec, ndim):
    """The plan's roles as non-negative axes: batch, in, out."""
    groups = spec.batch_axes, spec.in_axes, spec.out_axes
    axes = [sorted(axis % ndim for axis in group) for group in groups]
    assert sorted(sum(axes, [])) == list(range(ndim)), (spec, ndim)
    return axes


def delta(leaf, spec, xp=np):
    """scale * a·b laid out as the weight is."""
    ndim = len(leaf.w.shape) if leaf.w is not None else leaf.ndim
    letters = "abcdefgh"[:ndim]
    batch, inner, outer = (
        "".join(letters[axis] for axis in group) for group in axes_of(spec, ndim)
    )
    wide = np.float64 if xp is np else None
    a, b, scale = (xp.asarray(v, wide) for v in (leaf.a, leaf.b, leaf.scale))
    form = f"{batch}{inner}z,{batch}z{outer},{batch}->{letters}"
    return xp.einsum(form, a, b, scale)


def output_biases(tree, plan, xp=jnp):
    """scale * c by the path of the bias that it is merged into."""
    wide = np.float64 if xp is np else None
    found = {}
    for path, leaf in adapted(tree).items():
        if getattr(leaf, "c", None) is not None:
            c, scale = (xp.asarray(v, wide) for v in (leaf.c, leaf.scale))
            scale = scale.reshape(scale.shape + (1,) * (c.ndim - scale.ndim))
            found.setdefault(plan[path].bias, []).append(scale * c)
    return {path: sum(parts) for path, parts in found.items()}


def by_hand(tree, plan, xp=jnp):
    """Plain params in which every adapted leaf is W + scale * a·b, formed here.

    Output biases are in the layers' biases.
    """
    specs, extra = dict(plan), output_biases(tree, plan, xp)

    def one(path, leaf):
        if isinstance(leaf, jlora.Full):
            return xp.asarray(leaf.value).astype(leaf.w.dtype)
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jlora.LoRA):
            return leaf + extra[path].astype(leaf.dtype) if path in extra else leaf
        w = xp.asarray(leaf.w)
        if xp is np:
            v = w.astype(np.float64) + delta(leaf, specs[path], np)
            return with_magnitude(leaf, specs[path], v, np)
        full = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        v = full + delta(leaf, specs[path], jnp)
        return with_magnitude(leaf, specs[path], v).astype(w.dtype)

    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_adapted)
    plain = jax.tree.structure(jlora.unwrap(tree))
    return jax.tree.unflatten(plain, [one(*pair) for pair in pairs])


def with_magnitude(leaf, spec, v, xp=jnp):
    """DoRA: m * V / ‖V‖, with the norm over the in axes, and without its gradient."""
    if leaf.m is None:
        return v
    _, inner, _ = axes_of(spec, v.ndim)
    norm = xp.sqrt((v**2).sum(tuple(inner), keepdims=True))
    norm = norm if xp is np else jax.lax.stop_gradient(norm)
    batch, _, outer = axes_of(spec, v.ndim)
    order = np.argsort([*batch, *outer])  # of m's axes, as the weight has them
    m = xp.expand_dims(xp.transpose(xp.asarray(leaf.m), order), tuple(inner))
    return m * v / norm


def adapt(fn, params, *args, rank=3, targets=EVERYTHING, seed=7, **kwargs):
    """A tree planned from `fn` and wrapped, with random factors; and its plan."""
    flags = {k: kwargs.pop(k, False) for k in ("rslora", "dora", "lora_bias")}
    plan = jlora.plan(fn, params, *args, rank=rank, targets=list(targets), **kwargs)
    return wrap_random(params, plan, seed=seed, **flags), plan


def wrap_random(params, plan, *, seed=7, **options):
    """The params as `plan` says, with random factors.

    Wrapped as shapes and filled here, which compiles no initialiser for every shape.
    """
    tree = jlora.wrap(jax.eval_shape(lambda: params), plan=plan, **options)

    def whole(node):
        return is_adapted(node) or is_base(node)

    def fill(leaf, base):
        return dataclasses.replace(leaf, w=base) if is_adapted(leaf) else base

    # Leaf by leaf: Linen's boxes are of another class around adapted leaves.
    leaves, treedef = jax.tree.flatten(tree, is_leaf=whole)
    leaves = map(fill, leaves, jax.tree.leaves(params, is_leaf=whole))
    return randomise(jax.tree.unflatten(treedef, leaves), seed)


def close(got, want, tol=1e-5, what=""):
    """Every leaf within `tol` of its oracle's largest magnitude, and of its dtype."""
    got_leaves, got_def = jax.tree.flatten(got)
    want_leaves, want_def = jax.tree.flatten(want)
    assert got_def == want_def, f"{what}: {got_def} is not {want_def}"
    for i, (x, y) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        assert x.dtype == y.dtype, f"{what}[{i}]: {x.dtype}, expected {y.dtype}"
        assert x.shape == y.shape, f"{what}[{i}]: {x.shape}, expected {y.shape}"
        x, y = (np.asarray(v, np.float64) for v in (x, y))
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=what)
        gap, size = np.nanmax(abs(x - y), initial=0), np.nanmax(abs(y), initial=0)
        assert gap <= tol * size, f"{what}[{i}]: off by {gap:.3g} of {size:.3g}"


def same(got, want):
    """The same structure, dtypes and bits."""
    got_leaves, got_def = jax.tree.flatten(got)
    want_leaves, want_def = jax.tree.flatten(want)
    assert got_def == want_def
    for x, y in zip(got_leaves, want_leaves, strict=True):
        x, y = bits(x), bits(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def bits(array):
    """An array's data as numpy, random keys by their words."""
    if jax.dtypes.issubdtype(getattr(array, "dtype", None), jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def equations(jaxpr):
    """All equations of a jaxpr, those of its sub-jaxprs included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(value)


def is_jaxpr(value):
    kinds = jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr
    return isinstance(value, kinds)


def primitives(fn, *args):
    return [eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*args))]


# What W+BA, or a dense gradient of W, is made with.
DENSE = "dot_general conv_general_dilated add add_any sub mul".split()


def base_sized(jaxpr, sizes, names=DENSE):
    """How many equations of these primitives have a result of a base weight's size."""
    return sum(
        eqn.primitive.name in names and out.aval.size in sizes
        for eqn in equations(jaxpr)
        for out in eqn.outvars
        if hasattr(out.aval, "size")
    )


def hlo_results(text):
    """(opcode, number of elements) of every instruction in HLO text."""
    pattern = re.compile(r"= \w+\[([\d,]*)\](?:\{[^}]*\})? ([a-z][\w-]*)\(")
    for shape, opcode in pattern.findall(text):
        yield opcode, int(np.prod([int(n) for n in shape.split(",") if n], dtype=int))


def hlo_count(text, opcodes, sizes):
    """How many of these instructions have a result of one of these sizes."""
    tally = collections.Counter(hlo_results(text))
    return sum(tally[opcode, size] for opcode in opcodes for size in set(sizes))


def says(error, *parts):
    """The error's text holds every part: plain text, or a compiled pattern."""
    text = str(error.value if hasattr(error, "value") else error)
    for part in parts:
        found = part.search(text) if isinstance(part, re.Pattern) else part in text
        assert found, f"{part!r} is not in:\n{text}"


def quiet(fn, *args, **kwargs):
    """Call `fn`; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fn(*args, **kwargs)


def cotangents(out, seed=3):
    """One random array per floating leaf of `out`; others have no gradient."""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(np.asarray(rng.normal(size=leaf.shape), leaf.dtype))
        for leaf in jax.tree.leaves(out)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def dot_with(weights, out):
    leaves = [
        leaf
        for leaf in jax.tree.leaves(out)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    terms = zip(weights, leaves, strict=True)
    return sum(jnp.sum(w * leaf.astype(w.dtype)) for w, leaf in terms)


def check_lift(fn, tree, plan, *args, tol=1e-5, factored=True, modes=True, eager=False):
    """lift(fn)(tree) equals fn(W + scale * a·b) in value and in gradient.

    Under jit and grad; with `modes` also under a vmap over the arguments, inside of a
    scan over them (both in one, which halves the compilation); with `eager` op by op.
    With `factored`, no warning comes, and the traced function forms no more arrays of
    a weight's size than the plain one does.
    """
    lifted = jlora.lift(fn)
    trainable, frozen = jlora.partition(tree)

    def theirs(trainable, *args):
        return fn(by_hand(jlora.combine(trainable, frozen), plan), *args)

    def ours(trainable, *args):
        return lifted(jlora.combine(trainable, frozen), *args)

    weights = cotangents(jax.eval_shape(theirs, trainable, *args))

    def found(call, trainable, *args):
        def loss(trainable, *args):
            out = call(trainable, *args)
            return dot_with(weights, out), out

        out = {"grad": jax.grad(loss, has_aux=True)(trainable, *args)}
        if modes:
            batched = jax.vmap(lambda *xs: call(trainable, *xs))
            out["scan of vmap"] = jax.lax.scan(
                lambda c, xs: (c, batched(*xs)), 0, two(two(args))
            )[1]
        return out

    def both(trainable, *args):
        return found(ours, trainable, *args), found(theirs, trainable, *args)

    run = quiet if factored else silent
    got, want = run(jax.jit(both), trainable, *args)
    for mode in want:
        close(got[mode], want[mode], tol, f"jit, {mode}")
    if eager:
        close(run(lifted, tree, *args), want["grad"][1], tol, "eager")
    if factored:
        sizes = {leaf.w.size for leaf in adapted(tree).values()}
        plain = jax.make_jaxpr(fn)(jlora.unwrap(tree), *args)
        extra = base_sized(quiet(jax.make_jaxpr(lifted), tree, *args), sizes)
        assert extra <= base_sized(plain, sizes), "W+BA was formed"


def silent(fn, *args, **kwargs):
    """Call `fn` with the library's own warnings, which are expected, dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


def two(args):
    """Every array twice, stacked, the second one different: for vmap and scan."""

    def stack(x):
        other = x[::-1] if x.ndim and jnp.issubdtype(x.dtype, jnp.integer) else x
        if jnp.issubdtype(x.dtype, jnp.floating):
            other = x * 0.5 + 0.25
        return jnp.stack([x, other])

    return jax.tree.map(stack, args)


def normal(*shape, seed=0, dtype=jnp.float32, scale=1.0):
    """A random array that differs by shape and seed."""
    draw = np.random.default_rng([seed, *shape]).normal(size=shape) * scale
    return jnp.asarray(np.asarray(draw, dtype))


def integers(*shape, below, seed=0):
    draw = np.random.default_rng([seed, *shape]).integers(0, below, shape)
    return jnp.asarray(draw.astype(np.int32))


def check_model(fn, params, *args, formed=(), targets=EVERYTHING):
    """All that must hold of `fn(params, *args)`, whatever it was written in.

    `formed` are the paths that have to be materialised. No activation and no factor
    may have as many elements as an adapted weight, or as a layer of a stacked one.
    """
    tree, plan = adapt(fn, params, *args, targets=targets)
    status = {path: "materialised" if path in formed else "factored" for path in plan}
    report = jlora.explain(fn, tree, *args)
    assert {entry.path: entry.status for entry in report} == status
    # Boxes and NNX's variables, which a path leaves out, are seen by the oracle.
    roles = {path: plan[path.removesuffix("/value")] for path in adapted(tree)}
    assert len(roles) == len(plan)
    check_lift(fn, tree, roles, *args, factored=not formed, modes=False)

    forward = jax.jit(fn).trace(params, *args)
    plain, lifted, tx = forward.lower().compile(), jlora.lift(fn), optax.adam(1e-2)
    # What another adapter makes of the same input is something that can be learnt.
    goal = jax.tree.leaves(plain(jlora.merge(tree), *args))

    def step(trainable, state, frozen, *args):
        def loss(trainable):
            out = lifted(jlora.combine(trainable, frozen), *args)
            pairs = zip(jax.tree.leaves(out), goal, strict=True)
            return sum(jnp.mean((y - z) ** 2) for y, z in pairs), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value, out

    trainable, frozen = jlora.partition(jlora.wrap(params, plan=plan, rank=3))
    state, before = tx.init(trainable), jax.tree.map(np.array, params)
    run = silent if formed else quiet
    traced = run(jax.jit(step).trace, trainable, state, frozen, *args)
    leaves = adapted(tree).values()
    sizes = {n for x in leaves for n in (x.w.size, x.w.size // x.scale.size)}
    count, allowed = (base_sized(x.jaxpr, sizes) for x in (traced, forward))
    assert allowed < count if formed else allowed == count == 0, (allowed, count)

    step, history = traced.lower().compile(), []
    for _ in range(4):
        tree = jlora.combine(trainable, frozen)
        trainable, state, *seen = step(trainable, state, frozen, *args)
        history.append(seen)
    close(history[0][1], plain(params, *args), what="at the start")
    assert history[-1][0] < history[0][0]
    close(plain(jlora.merge(tree), *args), history[-1][1], what="merged")
    same(jax.tree.map(np.array, jlora.unwrap(tree)), before)


def filled(shapes):
    """Random arrays of these shapes, which compiles nothing."""
    leaves, treedef = jax.tree.flatten(shapes)
    draws = [normal(*x.shape, seed=k, scale=0.5) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)
