"""`_product.product` is `lax.dot_general`, and its derivatives are those of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EMITTERS, normal
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora._product import product

CASES = {  # x, y, ((contracted of x, of y), (batch of x, of y)); all of them widen
    "features": ((4, 6, 2), (2, 7), (((2,), (0,)), ((), ()))),
    "one token": ((2,), (2, 7), (((0,), (0,)), ((), ()))),
    "last of y": ((4, 6, 2), (7, 2), (((2,), (1,)), ((), ()))),
    "first of x": ((2, 4, 6), (2, 3, 5), (((0,), (0,)), ((), ()))),
    "two contracted": ((3, 2, 6), (2, 5, 3, 4), (((0, 1), (2, 0)), ((), ()))),
    "experts": ((3, 6, 2), (3, 2, 7), (((2,), (1,)), ((0,), (0,)))),
    "experts last": ((6, 2, 3), (2, 7, 3), (((1,), (0,)), ((2,), (2,)))),
    "empty": ((0, 2), (2, 7), (((1,), (0,)), ((), ()))),
}


def both(dims, **params):
    """The product and its oracle, as functions of x and y."""
    params["dimension_numbers"] = dims
    ours = functools.partial(product, params=tuple(params.items()))
    return ours, functools.partial(lax.dot_general, **params)


def close(got, want, rtol=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=rtol, atol=1e-5)


TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: jax.jit(jax.grad(f, (0, 1))),
    "grad of y": lambda f: jax.grad(f, 1),
    "jvp": lambda f: lambda x, y: jax.jvp(f, (x, y), (x + 1, y - 1)),
    "jvp of y": lambda f: lambda x, y: jax.jvp(lambda y: f(x, y), (y,), (y - 1,)),
    "reverse over forward": lambda f: jax.grad(
        lambda x, y: jax.jvp(f, (x, y), (x + 1, y - 1))[1], (0, 1)
    ),
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f, (0, 1)), (0, 1)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f, (0, 1)), (0, 1)),
    "remat": lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives(case, transform):
    x_shape, y_shape, dims = CASES[case]
    x, y = normal(*x_shape), normal(*y_shape, seed=1)

    def run(dot):
        return TRANSFORMS[transform](lambda x, y: jnp.sin(dot(x, y)).sum())(x, y)

    close(*map(run, both(dims)))


@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 0)])
def test_batched(axes):
    x, y = normal(4, 6, 2), normal(2, 7, seed=1)
    x, y = (
        v if at is None else jnp.stack([v, v + 1, v - 1], at)
        for v, at in zip((x, y), axes, strict=True)
    )

    def run(dot):
        grad = jax.grad(lambda x, y: jnp.sin(dot(x, y)).sum(), (0, 1))
        return jax.vmap(grad, axes)(x, y)

    close(*map(run, both(CASES["features"][2])))


@pytest.mark.parametrize("wanted", [None, "float32"])
def test_dtypes(wanted):
    x, y = normal(4, 6, 2).astype("bfloat16"), normal(2, 7).astype("bfloat16")
    dims = CASES["features"][2]
    for dot in both(dims, preferred_element_type=wanted, precision="highest"):
        assert dot(x, y).dtype == (wanted or "bfloat16")
        grads = jax.grad(lambda x, y: dot(x, y).astype("float32").sum(), (0, 1))(x, y)  # noqa: B023
        assert [g.dtype for g in grads] == ["bfloat16"] * 2


def test_on_explicit_axes_and_in_shard_map():
    mesh = jax.make_mesh((2, 4), ("data", "tp"), axis_types=(AxisType.Explicit,) * 2)
    x, y = normal(4, 6, 2), normal(2, 8, seed=1)
    ours, theirs = both(CASES["features"][2])

    def grads(dot):
        return jax.jit(jax.grad(lambda x, y: jnp.sin(dot(x, y)).sum(), (0, 1)))

    with jax.set_mesh(mesh):
        xs, ys = jax.device_put(x, P("data")), jax.device_put(y, P(None, "tp"))
        got = grads(ours)(xs, ys)
        assert [g.sharding.spec for g in got] == [P("data", None, None), P(None, "tp")]
    close(jax.device_get(got), jax.device_get(grads(theirs)(x, y)))

    auto = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    x, y = normal(8, 6, 2), normal(2, 8, seed=1)
    # What is the same on all devices has its gradient summed over them.
    for specs in ((P("d"), P()), (P(), P(None, "d"))):
        pairs = zip((x, y), specs, strict=True)
        got = jax.jit(
            jax.shard_map(
                jax.grad(lambda x, y: jnp.sin(ours(x, y)).sum(), (0, 1)),
                mesh=auto,
                in_specs=specs,
                out_specs=specs,
            )
        )(*(jax.device_put(v, NamedSharding(auto, s)) for v, s in pairs))
        close(jax.device_get(got), jax.device_get(grads(theirs)(x, y)))


@pytest.mark.parametrize("inside, outside", [("highest", None), (None, "highest")])
def test_precision_is_that_of_where_it_was_written(inside, outside):
    """As that of lax is; what is asked for outside goes for transposes only."""
    x, y = normal(4, 6, 2), normal(2, 7)
    ours, theirs = both(CASES["features"][2])
    counts = []
    for dot in (ours, theirs):

        @jax.jit
        def fn(x, y):
            with jax.default_matmul_precision(inside):
                return jnp.sin(dot(x, y)).sum()  # noqa: B023

        with jax.default_matmul_precision(outside):
            step = jax.make_jaxpr(jax.value_and_grad(fn, (0, 1)))(x, y)
        counts.append(str(step).count("HIGHEST"))
    assert counts[0] == counts[1] > 0


def test_the_transpose_of_a_derivative():
    x, y = normal(4, 6, 2), normal(2, 7, seed=1)
    ours, theirs = both(CASES["features"][2])

    def run(dot):
        def tangent(x):
            return jax.jvp(lambda y: dot(x, y), (y,), (y + 1,))[1]

        return jax.linear_transpose(tangent, x)(dot(x, y))

    close(run(ours), run(theirs))


def test_an_export_for_any_batch():
    """Sizes may be symbols."""
    base = {"kernel": normal(16, 32)}

    def fn(p, x):
        return p["kernel"].T @ x  # the activation comes second

    tree = jlora.wrap(base, plan=jlora.plan(fn, base, normal(16, 3), rank=2))
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((16, batch), jnp.float32)
    exported = jax.export.export(jax.jit(jlora.lift(fn)))(tree, x)
    assert str(exported.out_avals[0].shape) == "(32, b)"


def test_policies_of_remat_see_products():
    """What is saved between the passes is what it is for lax.dot_general."""
    x, y = normal(4, 6, 2), normal(2, 7)

    def saved(dot):
        fn = jax.checkpoint(
            lambda x, y: jnp.sin(dot(x, y)).sum(),
            policy=jax.checkpoint_policies.dots_saveable,
        )
        _, pull = jax.vjp(fn, x, y)
        return sorted(r.shape for r in jax.tree.leaves(pull) if hasattr(r, "shape"))

    ours, theirs = map(saved, both(CASES["features"][2]))
    assert ours == theirs and (4, 6, 7) in ours


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA for CPU")
def test_no_cotangent_is_copied_in_another_order_on_cpu():
    """XLA for CPU would copy what comes first of the gradient of b, and all of it."""
    base = {"kernel": normal(16, 512)}
    tree = jlora.wrap(base, rank=2)
    x = normal(4, 32, 16)

    def loss(tree, x):
        return jnp.sin(jlora.lift(lambda p, x: x @ p["kernel"])(tree, x)).sum()

    trains, rest = jlora.partition(tree)
    grad = jax.grad(lambda t: loss(jlora.combine(t, rest), x))
    text = jax.jit(grad).lower(trains).compile(compiler_options=EMITTERS).as_text()
    assert "[512,128]" not in text and "[512,4,32]" not in text
    naive = jax.grad(lambda b: jnp.sin((x @ tree["kernel"].a) @ b).sum())
    lowered = jax.jit(naive).lower(tree["kernel"].b)
    text = lowered.compile(compiler_options=EMITTERS).as_text()
    assert "[512,128]" in text or "[512,4,32]" in text  # or the order is not needed
