"""What the models of `layouts` are made with: sizes, random arrays, attention."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from helpers import integers, normal

KEY = jax.random.key(0)
BATCH, TIME, VOCAB, LAYERS = 2, 5, 29, 2
WIDTH, FFN = 24, 40
HEADS, KV, SIZE = 6, 3, 4  # HEADS * SIZE is WIDTH


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model.

    Attributes:
      name: what it is called in the table.
      source: the library and the file or class that is laid out so.
      build: makes (fn, params, args), so that fn(params, *args) is the model's output
        and params is what a user passes to `jlora.wrap`.  If that is a Keras model, fn
        takes its values by path.
    """

    name: str
    source: str
    build: Callable[[], tuple[Callable, Any, tuple]]


LAYOUTS: list[Layout] = []


def layout(name, source):
    """Decorates the `build` of a `Layout`, which is added to the table."""

    def add(build):
        def traced_once():
            fn, params, args = build()
            return (fn if has_functions(params) else jax.jit(fn)), params, args

        LAYOUTS.append(Layout(name, source, functools.cache(traced_once)))
        return build

    return add


def has_functions(params):
    """Whether some leaf is no array, so that jit could not take the tree."""
    leaves = jax.tree.leaves(arrays(params))
    return not all(isinstance(x, jax.Array) for x in leaves)


def drawn(shapes):
    """Random arrays of these shapes, which compiles nothing."""
    leaves, treedef = jax.tree.flatten(shapes)
    draws = [normal(*x.shape, seed=k, scale=0.3) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def abstract(tree):
    """The tree with shapes in place of its arrays."""

    def shape(x):
        return array(*x.shape) if isinstance(x, jax.Array) else x

    return tree if arrays(tree) is not tree else jax.tree.map(shape, tree)


def nested(shapes):
    """A tree of random arrays from a dict of shapes by path."""
    tree = {}
    for path, shape in shapes.items():
        *keys, last = path.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = array(*shape)
    return drawn(tree)


def scanned(block, x, layers, axis=0):
    """The block with each layer's params in turn, which are stacked over an axis."""
    if axis:
        layers = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), layers)
    return jax.lax.scan(jax.checkpoint(lambda x, p: (block(p, x), None)), x, layers)[0]


def ids():
    return integers(BATCH, TIME, below=VOCAB)


def linen(model, *args):
    return model.apply, drawn(jax.eval_shape(model.init, KEY, *args)), args


def bare(model, *args):
    """A Linen model whose params are passed without the collection's name."""
    fn, variables, args = linen(model, *args)
    return (lambda p, *a: fn({"params": p}, *a)), variables["params"], args


def nnx_module(make, *args):
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state = nnx.split(module)
    return (lambda m, *a: m(*a)), nnx.merge(graph, drawn(state)), args


def eqx_module(make, *args):
    """For one example; it is called on a batch."""
    shapes = eqx.filter_eval_shape(make, KEY)
    arrays, static = eqx.partition(
        shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )
    return (lambda m, *a: jax.vmap(m)(*a)), eqx.combine(drawn(arrays), static), args


def arrays(params):
    """The arrays of a Keras model by path; anything else is a tree of arrays."""
    if hasattr(params, "trainable_variables"):
        return {v.path: v.value for v in params.trainable_variables}
    return params


def attend(q, k, v):
    """Causal attention of (batch, time, heads, size), with as many or fewer k and v."""
    groups = q.shape[-2] // k.shape[-2]
    k, v = (jnp.repeat(x, groups, axis=-2) for x in (k, v))
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def heads(x, n=HEADS):
    return x.reshape(*x.shape[:-1], n, -1)


def flat(x):
    return x.reshape(*x.shape[:-2], -1)


def normed(x, scale, bias=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + bias


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale
