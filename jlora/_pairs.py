"""Transformations of optax that look at both factors of a weight.

Each takes the gradients of a and b, with both factors as params.  They go in front of
an optimizer, inside of `jlora.optimizer`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._explicit import automatic
from jlora._init.matrices import exact
from jlora._leaf import LoRA, base, forms, is_adapted
from jlora._leaf.fields import lacking
from jlora._tree import boxes, by_path, paths


class Known(NamedTuple):
    """What is known of a leaf, without its arrays, which may be donated meanwhile.

    Attributes:
      stacked: how many axes of a and b come before those of their matrices.
      scale: the leaf's scale, on the host; None if only its shape is known.
    """

    stacked: int
    scale: Any

    @classmethod
    def of(cls, leaf: LoRA) -> Known:
        """From a leaf, which may have its fields in boxes."""
        scale = boxes.held(leaf.scale)
        n = forms.of(leaf.form).stacked("b" * len(scale.shape))
        if isinstance(scale, jax.ShapeDtypeStruct):
            return cls(n, None)
        return cls(n, scale if isinstance(scale, jax.core.Tracer) else np.array(scale))


# fn(pair, a, b, gradient of a, gradient of b) gives both gradients anew.
Pairwise = Callable[[Known, Any, Any, Any, Any], tuple[Any, Any]]


class Fixed(NamedTuple):
    """The state of a transformation by which the factors a do not move.

    `jlora.optimizer` finds it, and then gives a no update, whatever else is in the
    chain: weight decay would move it without a gradient.
    """


def riemannian(tree: Any, reg: float = 1e-6) -> optax.GradientTransformation:
    """Gradients of a and b, each scaled by the other factor's r × r matrix.

    Riemannian preconditioned LoRA (arXiv:2402.02347, eq. 4): the gradient of a times
    (b·bᵀ + reg)⁻¹, and (aᵀ·a + reg)⁻¹ times that of b.  So a step does not depend on
    how the delta is divided between the factors.  c, m and `Full` values keep their
    gradients.  peft's default for ``reg`` is 1e-2.

    Args:
      tree: the adapted tree; only its structure is read.
      reg: a positive number, added to the diagonal of both matrices.

    Raises:
      ValueError: a tree without low-rank leaves, or half of one; a ``reg`` that is not
        positive; when it updates: no params, or gradients of another tree, or of the
        base, which it gets outside of `jlora.optimizer`.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> tx = optax.chain(jlora.riemannian(t, reg=1e-2), optax.adamw(1e-3))
      >>> state = jlora.optimizer(tx, t).init(t)
    """
    if not reg > 0:
        raise ValueError(f"riemannian: reg {reg!r}: expected a positive number.")

    def scaled(own: Known, a: Any, b: Any, ga: Any, gb: Any) -> tuple[Any, Any]:
        a, b = _matrix(own, "a", a), _matrix(own, "b", b)
        new_a = exact(_matrix(own, "a", ga), _inverse(exact(b, b.mT), reg))
        new_b = exact(_inverse(exact(a.mT, a), reg), _matrix(own, "b", gb))
        return new_a.reshape(ga.shape), new_b.reshape(gb.shape)

    return _pairwise("riemannian", tree, scaled, optax.EmptyState())


def lora_fa(tree: Any) -> optax.GradientTransformation:
    """The gradient of b alone, projected; a stays as it started.

    LoRA-FA (arXiv:2308.03303) as peft has it: (aᵀ·a + 1e-8)⁻¹ / scale² times the
    gradient of b.  This is the b whose delta is closest to the gradient of the weight.
    Inside of `jlora.optimizer` weight decay does not move a, either.  c, m and `Full`
    values train as they do without it.

    Args:
      tree: the adapted tree; its structure and scales are read.

    Raises:
      ValueError: as in `riemannian`; or the tree has shapes alone, and no scales; or an
        a that is zero, as that of an embedding is at first.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> t = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> tx = optax.chain(jlora.lora_fa(t), optax.adamw(1e-3))
      >>> state = jlora.optimizer(tx, t).init(t)
    """

    def projected(own: Known, a: Any, b: Any, ga: Any, gb: Any) -> tuple[Any, Any]:
        if own.scale is None:
            raise ValueError(
                "lora_fa: it was made of shapes: expected the tree of arrays, whose "
                "scales it reads."
            )
        s = own.scale.reshape(*own.scale.shape, *(1,) * (gb.ndim - own.scale.ndim))
        a = _matrix(own, "a", a)
        new = exact(_inverse(exact(a.mT, a), 1e-8), _matrix(own, "b", gb))
        # A scale of zero turns the adapter off, and b has no gradient.
        new = jnp.where(s == 0, 0, new.reshape(gb.shape) / jnp.where(s == 0, 1, s) ** 2)
        return jnp.zeros_like(ga), new

    transformation = _pairwise("lora_fa", tree, projected, Fixed())
    for keys, x in boxes.adapted(tree):
        a = boxes.held(x.a) if isinstance(x, LoRA) else None
        if not isinstance(a, jax.Array) or isinstance(a, jax.core.Tracer):
            continue
        if not jnp.any(a):
            path = paths.path_of(keys)
            raise ValueError(
                f"lora_fa: the a of {path!r} is zero, as an embedding's is at the "
                "start, and does not train: its delta would stay zero. Expected "
                f"another start, jlora.Rule({path!r}, init='orthogonal'), or exclude "
                "it."
            )
    return transformation


def _inverse(m: jax.Array, reg: float) -> jax.Array:
    """(m + reg)⁻¹ of symmetric matrices that have no negative eigenvalue."""
    values, vectors = jnp.linalg.eigh(m)
    return exact(vectors / (jnp.maximum(values, 0) + reg)[..., None, :], vectors.mT)


def _matrix(own: Known, name: str, x: Any) -> jax.Array:
    """A factor as a stack of matrices, (n, in, r) or (n, r, out), in float32."""
    n = own.stacked
    shape = (-1, x.shape[-1]) if name == "a" else (x.shape[n], -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x.astype(wide).reshape(*x.shape[:n], *shape)


def _pairwise(
    what: str, tree: Any, fn: Pairwise, state: Any
) -> optax.GradientTransformation:
    """The transformation that applies ``fn`` to all pairs of factors."""
    leaves = _known(what, tree)

    def pair(
        path: str, grads: dict[str, Any], params: dict[str, Any]
    ) -> dict[str, Any]:
        if not {"a", "b"} <= {*grads}:
            return grads
        if path not in leaves:
            raise ValueError(
                f"{what}: {path!r} has factors, and had none in the tree that it was "
                "made for: expected the gradients of that tree."
            )
        held = [boxes.held(x[name]) for x in (params, grads) for name in "ab"]
        own = functools.partial(fn, leaves[path])

        def like() -> Any:
            return tuple(jax.typeof(x).sharding for x in held[2:])

        new = automatic(own, like, *held)
        both = zip("ab", new, strict=True)
        return grads | {k: _as(grads[k], x) for k, x in both}

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        outside = ValueError(
            f"{what}: expected gradients of what trains in the adapted tree that it "
            f"was made for, found a {type(grads).__name__} of other leaves. Put it "
            "inside of jlora.optimizer(optax.chain(...), tree)."
        )
        if params is None:
            raise ValueError(
                f"{what}: expected the params beside the gradients, as in "
                "tx.update(grads, state, params): it reads both factors."
            )
        if by_path.has_adapted(grads):  # half of a partition
            values = dict(by_path.flatten(params)[0])

            def leaf(path: str, x: Any) -> Any:
                if is_adapted(x) and not base.is_missing(x.w):
                    raise outside
                if not isinstance(x, LoRA) or not _is_pair(x):
                    return x
                own = {name: getattr(x, name) for name in "ab"}
                theirs = {name: getattr(values[path], name) for name in "ab"}
                return dataclasses.replace(x, **pair(path, own, theirs))

            return by_path.map_leaves(leaf, grads), state
        if not isinstance(grads, dict) or not {*leaves} & {*grads}:
            raise outside
        new = {
            path: pair(path, x, params[path]) if isinstance(x, dict) else x
            for path, x in grads.items()
        }
        return new, state

    return optax.GradientTransformation(lambda params: state, update)


def _known(what: str, tree: Any) -> dict[str, Known]:
    """What is known of the pairs of an adapted tree, by path."""
    found = {paths.path_of(keys): x for keys, x in boxes.adapted(tree)}
    for path, x in found.items():
        if lacks := lacking(x):
            raise ValueError(
                f"{what}: {path!r} lacks {', '.join(lacks)}: it is half of a "
                "partition; expected the whole tree, jlora.combine(trainable, frozen)."
            )
    leaves = {path: Known.of(x) for path, x in found.items() if _is_pair(x)}
    if not leaves:
        raise ValueError(
            f"{what}: expected a tree with low-rank leaves, as jlora.wrap gives it, "
            f"found a {type(tree).__name__} without any."
        )
    return leaves


def _is_pair(x: Any) -> bool:
    """Whether a leaf has both factors."""
    return isinstance(x, LoRA) and "a" not in forms.of(x.form).implicit


def _as(like: Any, x: jax.Array) -> Any:
    """x in the dtype of a gradient, and in its box if it has one."""
    x = x.astype(boxes.held(like).dtype)
    return like.replace_boxed(x) if boxes.is_box(like) else x


def is_fixed(state: Any) -> bool:
    """Whether the state of an optimizer says that the factors a do not move."""

    def own(x: Any) -> bool:
        return isinstance(x, Fixed)

    return any(map(own, jax.tree.leaves(state, is_leaf=own)))
