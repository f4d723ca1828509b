"""Random programs that use weights in every way that the lift has a rule for.

A program is a chain of steps on an activation.  A step draws how its weight is stored
(transposed, stacked, fused, sliced, ...), how it is used (products, lookups,
convolutions, experts, loops, derivatives) and what it is nested in (jit, remat, vmap,
cond, scan).  Sizes are 1 to 3, where most special cases are.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from jax import lax


@dataclasses.dataclass
class Program:
    """fn(params, data) and what it is called with."""

    fn: object
    params: dict
    data: list
    forms: bool
    text: list

    def __repr__(self):
        return f"Program({'; '.join(self.text)})"


class Builder:
    def __init__(self, draw):
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.params, self.data, self.text = {}, [], []
        self.forms = False  # whether materialising a weight is right somewhere

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def size(self, low=1, high=3):
        return self.draw(st.integers(low, high))

    def flag(self):
        return self.draw(st.booleans())

    def order(self, n):
        return self.draw(st.permutations(range(n)))

    def constant(self, value):
        """A reader of a new array among the arguments."""
        self.data.append(np.asarray(value))
        at = len(self.data) - 1
        return lambda d: d[at]

    def normal(self, *shape):
        return self.constant(self.rng.normal(size=shape))

    # How a weight is stored.

    def weight(self, shape, roles):
        """A reader (p, d) -> float64 array of this shape, of new weights in p.

        They may be of any precision: structure, powers of two and the cast are exact.
        """
        read = self.stored(shape, roles)
        return lambda p, d: read(p, d).astype(jnp.float64)

    def stored(self, shape, roles, depth=2):
        names = [name for name, works in STORED.items() if works(shape, roles)]
        kind = self.pick(*names) if depth and self.flag() else "plain"
        self.text.append(f"{kind}{tuple(shape)}{''.join(roles)}")
        return getattr(self, f"stored_{kind}")(list(shape), list(roles), depth - 1)

    def stored_plain(self, shape, roles, _):
        name = f"w{len(self.params)}"
        scale = (
            max(1, math.prod(n for n, r in zip(shape, roles, strict=True) if r == "i"))
            ** -0.5
        )
        dtype = self.pick("float64", "float64", "float32", "bfloat16", "float16")
        value = self.rng.normal(size=shape) * scale
        self.params[name] = np.asarray(value).astype(jnp.dtype(dtype))
        return lambda p, d: p[name]

    def stored_transposed(self, shape, roles, depth):
        order = self.order(len(shape))
        inner = [shape[k] for k in order], [roles[k] for k in order]
        read, back = self.stored(*inner, depth), np.argsort(order)
        return lambda p, d: jnp.transpose(read(p, d), back)

    def stored_scaled(self, shape, roles, depth):
        read = self.stored(shape, roles, depth)
        fn = self.pick(lambda w: w * 0.5, lambda w: -w, lambda w: w / 2)
        return lambda p, d: fn(read(p, d))

    def stored_flipped(self, shape, roles, depth):
        axis, read = self.axis(shape), self.stored(shape, roles, depth)
        return lambda p, d: jnp.flip(read(p, d), axis)

    def stored_sliced(self, shape, roles, depth):
        axis, stride, start = self.axis(shape), self.size(1, 2), self.size(0, 2)
        outer = list(shape)
        outer[axis] = start + stride * shape[axis]
        read = self.stored(outer, roles, depth)
        stop = start + stride * (shape[axis] - 1) + 1
        cut = functools.partial(
            lax.slice_in_dim, start_index=start, limit_index=stop, stride=stride
        )
        return lambda p, d: cut(read(p, d), axis=axis)

    def stored_window(self, shape, roles, depth):
        axis, start = self.axis(shape), self.size(0, 2)
        outer = list(shape)
        outer[axis] += 2
        at, read = self.constant(start), self.stored(outer, roles, depth)
        size = shape[axis]
        return lambda p, d: lax.dynamic_slice_in_dim(read(p, d), at(d), size, axis)

    def stored_stacked(self, shape, roles, depth):
        axis, n = self.size(0, len(shape)), self.size()
        index = self.size(0, n - 1)
        outer = [*shape[:axis], n, *shape[axis:]], [*roles[:axis], "b", *roles[axis:]]
        at, read = self.constant(index), self.stored(*outer, depth)
        fn = self.pick(
            lambda w, i: lax.index_in_dim(w, index, axis, keepdims=False),
            lambda w, i: lax.dynamic_index_in_dim(w, i, axis, keepdims=False),
            lambda w, i: jnp.take(w, i, axis=axis),
            lambda w, i: jnp.unstack(w, axis=axis)[index],
            lambda w, i: jnp.moveaxis(w, axis, 0)[i],
        )
        return lambda p, d: fn(read(p, d), at(d))

    def stored_unit(self, shape, roles, depth):
        axis = self.size(0, len(shape))
        outer = [*shape[:axis], 1, *shape[axis:]]
        read = self.stored(
            outer, [*roles[:axis], self.pick(*"bio"), *roles[axis:]], depth
        )
        fn = self.pick(
            lambda w: lax.squeeze(w, [axis]), lambda w: jnp.reshape(w, shape)
        )
        return lambda p, d: fn(read(p, d))

    def stored_merged(self, shape, roles, depth):
        """Two axes of one role are one axis in the tree."""
        k = self.pick(*pairs(roles))
        outer = [*shape[:k], shape[k] * shape[k + 1], *shape[k + 2 :]]
        read = self.stored(outer, [*roles[:k], *roles[k + 1 :]], depth)
        return lambda p, d: jnp.reshape(read(p, d), shape)

    def stored_concatenated(self, shape, roles, depth):
        axis = self.pick(*(k for k, n in enumerate(shape) if n > 1))
        parts = []
        for n in (1, shape[axis] - 1):
            part = [*shape[:axis], n, *shape[axis + 1 :]]
            parts.append(self.stored(part, roles, depth - 1))
        return lambda p, d: jnp.concatenate([r(p, d) for r in parts], axis)

    def stored_fused(self, shape, roles, depth):
        axis, n = self.axis(shape), self.size(1, 2)
        outer, k = list(shape), self.size(0, n - 1)
        outer[axis] *= n
        read = self.stored(outer, roles, depth)
        return lambda p, d: jnp.split(read(p, d), n, axis)[k]

    def stored_grown(self, shape, roles, depth):
        """An axis that a broadcast makes is a batch axis."""
        axis = self.pick(*(k for k, r in enumerate(roles) if r == "b"))
        inner = shape[:axis] + shape[axis + 1 :], roles[:axis] + roles[axis + 1 :]
        read = self.stored(*inner, depth)
        return lambda p, d: jnp.broadcast_to(
            jnp.expand_dims(read(p, d), axis), tuple(shape)
        )

    def stored_wrapped(self, shape, roles, depth):
        read = self.stored(shape, roles, depth)
        fn = self.pick(
            lax.optimization_barrier, jax.jit(jnp.positive), lambda w: w + 0 * 0
        )
        return lambda p, d: (
            fn(read(p, d)) if fn is lax.optimization_barrier else read(p, d)
        )

    def axis(self, shape):
        return self.size(0, len(shape) - 1)

    # How it is used: a step is a function (p, d, x) -> x.

    def dot(self, shape):
        axes = self.order(len(shape))
        n = self.size(1, len(axes))
        m = self.size(0, len(axes) - n)
        contracted, batch = sorted(axes[:n]), sorted(axes[n : n + m])
        parts = [(shape[k], "i", k) for k in contracted]
        parts += [(shape[k], "b", k) for k in batch]
        parts += [(self.size(), "o", None) for _ in range(self.size(1, 2))]
        parts = [parts[k] for k in self.order(len(parts))]
        read = self.weight([s for s, _, _ in parts], [r for _, r, _ in parts])
        at = {k: i for i, (_, _, k) in enumerate(parts) if k is not None}
        own = ([at[k] for k in contracted], [at[k] for k in batch])
        first = self.flag()

        def step(p, d, x):
            (wc, wb), (xc, xb) = own, (contracted, batch)
            if first:
                return lax.dot_general(read(p, d), x, ((wc, xc), (wb, xb)))
            return lax.dot_general(x, read(p, d), ((xc, wc), (xb, wb)))

        return step

    def tied(self, shape):
        """A weight and its transpose, in one product after the other."""
        read = self.weight([shape[-1], self.size()], "io")
        middle = self.pick(jnp.tanh, lambda h: h)
        return lambda p, d, x: middle(x @ read(p, d)) @ read(p, d).T

    def lookup(self, shape):
        num, features = self.size(2, 4), [self.size() for _ in range(self.size(1, 2))]
        axis = self.size(0, len(features))
        table = [*features[:axis], num, *features[axis:]]
        roles = ["i" if k == axis else "o" for k in range(len(table))]
        mode = self.pick("fill", "clip", "promise_in_bounds")
        low, high = (0, num) if mode == "promise_in_bounds" else (-num - 1, num + 2)
        ids = self.rng.integers(
            low, high, [self.size() for _ in range(self.size(0, 2))]
        )
        index, read = self.constant(ids), self.weight(table, roles)
        fill = {"fill_value": 0.5} if mode == "fill" else {}
        attends = axis == 0 and len(features) == 1 and self.flag()

        def step(p, d, x):
            at = (slice(None),) * axis + (index(d),)
            rows = read(p, d).at[at].get(mode=mode, **fill)
            rows = rows + jnp.mean(x)
            return rows @ read(p, d).T if attends else rows

        return step

    def index(self, shape):
        """x[ids] in its other forms."""
        num, features = self.size(2, 4), self.size()
        read = self.weight([num, features], "io")
        n = self.size(1, 3)
        ids = self.constant(self.rng.integers(-num, num, n))
        fn = self.pick(
            lambda w, i: w[i],
            lambda w, i: w.at[i].get(mode="clip"),
            lambda w, i: w[i[0]],
            lambda w, i: jax.vmap(lambda k: w[k])(i),
            lambda w, i: lax.map(lambda k: w[k], i),
        )
        return lambda p, d, x: fn(read(p, d), ids(d)) + jnp.mean(x)

    def experts(self, shape):
        n, in_, out, rows = self.size(), self.size(), self.size(), self.size(1, 4)
        ids = self.constant(self.rng.integers(0, n, rows))
        tokens = self.normal(rows, in_)
        if self.flag():
            read = self.weight([n, in_, out], "bio")
            return lambda p, d, x: jnp.einsum(
                "ti,tio->to", tokens(d) * (1 + jnp.mean(x)), read(p, d)[ids(d)]
            )
        read = self.weight([n, in_, out], "bio")
        sizes = self.constant(self.rng.multinomial(rows, [1 / n] * n))
        return lambda p, d, x: lax.ragged_dot(
            tokens(d) * (1 + jnp.mean(x)), read(p, d), sizes(d)
        )

    def conv(self, shape):
        n, groups = self.size(), self.pick(1, 1, 2, 3)
        in_, out = groups * self.size(1, 2), groups * self.size(1, 2)
        letters = "WHD"[:n]
        specs = tuple(
            "".join(c[k] for k in self.order(n + 2))
            for c in (f"NC{letters}", f"IO{letters}", f"NC{letters}")
        )
        window = {c: self.size() for c in letters} | {"I": in_ // groups, "O": out}
        extent = {c: self.size(2, 4) for c in letters} | {
            "N": self.size(1, 2),
            "C": in_,
        }
        image = self.normal(*(extent[c] for c in specs[0]))
        roles = ["o" if c == "O" else "i" for c in specs[1]]
        params = dict(
            window_strides=[self.size(1, 2) for _ in letters],
            padding=[(self.size(-1, 2), self.size(0, 2)) for _ in letters],
            lhs_dilation=[self.size(1, 2) for _ in letters],
            rhs_dilation=[self.size(1, 2) for _ in letters],
            dimension_numbers=specs,
            feature_group_count=groups,
        )
        backward = groups == 1 and self.pick(False, False, True)
        read = self.weight([window[c] for c in specs[1]], roles)

        def run(w, y):
            return lax.conv_general_dilated(y, w, **params)

        spec = [
            jax.ShapeDtypeStruct([s[c] for c in t], jnp.float64)
            for s, t in ((window, specs[1]), (extent, specs[0]))
        ]
        try:
            y = jax.eval_shape(run, *spec)
        except (ValueError, TypeError):  # negative padding of more than there is
            assume(False)
        assume(0 < y.size < 300)

        def step(p, d, x):
            w, y = read(p, d), image(d) * (1 + jnp.mean(x))
            if not backward:
                return run(w, y)
            return jax.grad(lambda y: jnp.tanh(run(w, y)).sum())(y)

        return step

    def loop(self, shape):
        n, d_ = self.size(), shape[-1]
        stack = self.weight([n, d_, d_], "bio")
        shared = self.weight([d_, d_], self.pick("io", "oi"))
        options = dict(reverse=self.flag(), unroll=self.size(1, 2))
        wrap = self.pick(jax.checkpoint, jax.jit, lambda f: f)
        kind = self.pick("scan", "fori", "carried")

        def step(p, d, x):
            def body(c, w):
                return jnp.tanh(c @ w + c @ shared(p, d)), c.sum()

            if kind == "scan":
                c, ys = lax.scan(wrap(body), x, stack(p, d), **options)
                return c + ys.sum()
            if kind == "fori":
                return lax.fori_loop(0, 2, lambda i, c: body(c, stack(p, d)[0])[0], x)
            carry = (x, shared(p, d))
            return lax.scan(
                lambda c, w: ((jnp.tanh(c[0] @ c[1] + c[0] @ w), c[1]), None),
                carry,
                stack(p, d),
            )[0][0]

        return step

    def branch(self, shape):
        left = self.weight([shape[-1], self.size()], "io")
        at = self.constant(self.size(0, 1))
        fns = [lambda x, w: x @ w, lambda x, w: jnp.sin(x) @ w * 2]
        return lambda p, d, x: lax.switch(at(d), fns, x, left(p, d))

    def derivative(self, shape):
        read = self.weight([shape[-1], self.size()], "io")
        kind = self.pick("grad", "jvp", "hessian")

        def step(p, d, x):
            def f(y):
                return jnp.tanh(y @ read(p, d)).sum()

            if kind == "grad":
                return jax.grad(f)(x)
            if kind == "jvp":
                return x * jax.jvp(f, (x,), (jnp.cos(x),))[1]
            return jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1]

        return step

    def forming(self, shape):
        """Uses without a low-rank form."""
        self.forms = True
        read = self.weight([shape[-1], self.size()], "io")

        @jax.custom_vjp
        def own(x, w):
            return x @ w

        own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
        fn = self.pick(
            lambda x, w: x @ jnp.sin(w),
            lambda x, w: x @ (w * w),
            lambda x, w: x @ (w / jnp.linalg.norm(w, axis=0)),
            lambda x, w: x @ w + w.sum(),
            lambda x, w: x @ (w @ w.T),
            lambda x, w: x @ jnp.where(w > 0, w, 0.1 * w),
            lambda x, w: own(x.reshape(-1, x.shape[-1]), w),
        )
        return lambda p, d, x: fn(x, read(p, d))

    # What it is nested in.

    def nested(self, step):
        kind = self.pick("bare", "bare", "jit", "remat", "vmap", "cond", "scan")
        self.text.append(kind)
        if kind == "jit":
            return jax.jit(step)
        if kind == "remat":
            policies = jax.checkpoint_policies
            policy = self.pick(None, policies.dots_saveable)
            return jax.checkpoint(step, policy=policy, prevent_cse=self.flag())
        if kind == "vmap":
            return lambda p, d, x: jax.vmap(lambda s: step(p, d, x * s))(
                jnp.array([1.0, 0.5], x.dtype)
            ).sum(0)
        if kind == "cond":
            true = self.constant(True)
            return lambda p, d, x: lax.cond(
                true(d),
                lambda: step(p, d, x),
                lambda: jnp.zeros_like(step(p, d, x)),
            )
        if kind == "scan":
            return lambda p, d, x: lax.scan(
                lambda c, s: (c, step(p, d, x * s)), 0.0, jnp.array([1.0, 0.5], x.dtype)
            )[1].sum(0)
        return step


def pairs(roles):
    return [k for k in range(len(roles) - 1) if roles[k] == roles[k + 1]]


def always(shape, roles):
    return True


STORED = {
    "plain": always,
    "transposed": always,
    "scaled": always,
    "flipped": always,
    "sliced": always,
    "window": always,
    "stacked": lambda shape, roles: len(shape) < 5,
    "unit": lambda shape, roles: len(shape) < 5,
    "merged": lambda shape, roles: bool(pairs(roles)),
    "concatenated": lambda shape, roles: max(shape) > 1,
    "fused": always,
    "grown": lambda shape, roles: "b" in roles,
    "wrapped": always,
}

FAMILIES = {
    "products": ["dot", "dot", "tied"],
    "lookups": ["lookup", "lookup", "index", "experts"],
    "convolutions": ["conv"],
    "loops": ["loop", "branch", "derivative"],
    "mixed": ["dot", "lookup", "conv", "loop", "experts", "branch", "forming"],
}


@st.composite
def programs(draw, family):
    """Programs of one to three steps of a family."""
    b = Builder(draw)
    shape = [b.size() for _ in range(b.size(1, 3))]
    start = b.normal(*shape)
    steps = []
    for _ in range(b.size(1, 2)):
        kind = b.pick(*FAMILIES[family])
        b.text.append(kind)
        step = b.nested(getattr(b, kind)(shape))
        steps.append(step)
        values = [np.asarray(x) for x in b.data]
        try:
            y = jax.eval_shape(
                functools.partial(run, steps=steps, start=start), dict(b.params), values
            )
        except NotImplementedError:  # JAX has no vmap of it
            assume(False)
        shape = list(y.shape)
    fn = functools.partial(run, steps=steps, start=start)
    return Program(fn, b.params, b.data, b.forms, b.text)


def run(p, d, *, steps, start):
    x = start(d)
    for step in steps:
        x = jnp.tanh(step(p, d, x))
        while x.ndim > 2 or x.ndim == 0:  # so that programs stay small
            x = x.sum(0) if x.ndim else x[None]
    return x
