"""plan: which weights to adapt, from how a traced function uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jlora._leaf import base
from jlora._plan.plan import Plan
from jlora._plan.roles import merged
from jlora._plan.seen import Seen, Use
from jlora._plan.select import Candidate, Wanted, select
from jlora._plan.spec import FLAGS, RANK, Rule, Spec
from jlora._plan.watch import watch
from jlora._tree import by_path
from jlora._tree.patterns import Pattern, are_patterns
from jlora._tree.trace import hide, trace
from jlora._tree.variables import is_model, opened

_IDLE = "not used as a weight (no product, convolution or lookup)"


def plan(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    rank: int = RANK,
    alpha: float | None = None,
    targets: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] = (),
    rules: Iterable[Rule] = (),
    **kwargs: Any,
) -> Plan:
    """Plans which weights of ``params`` to adapt, by watching how ``fn`` uses them.

    ``fn(params, *args, **kwargs)`` is traced abstractly: nothing is computed and
    nothing allocated, and every argument may hold ``jax.ShapeDtypeStruct``s.  A
    weight's in axes are those that a product contracts.  Its batch axes are those that
    a product batches or a scan slices.  All other axes are out axes.

    Args:
      fn: the function whose first argument is ``params``, such as ``model.apply``.
      params: the tree that will be passed to `wrap`.  A Keras model stands for the
        values of its trainable variables by path, which ``fn`` gets.
      *args: the other arguments of ``fn``.
      **kwargs: the keyword arguments of ``fn``.
      rank: r of every adapter for which no rule gives another.
      alpha: None for alpha = rank, a scale of 1.
      targets: patterns of the paths to adapt: globs over the whole path (``*`` within
        one key, ``**`` for any number of keys), compiled regular expressions (full
        match), or callables (path, array) -> bool.  None for every dense, einsum and
        convolution kernel.  An embedding is adapted only if a target or rule names it.
      exclude: patterns of paths that are not adapted.
      rules: `Rule`s for ranks, alphas and forms of single leaves; the first match wins.

    Returns:
      A `Plan`.  Print it to see what will be adapted, and what was skipped and why.

    Raises:
      ValueError: a bad rank; a pattern that matches no path (the error lists near
        paths); a target that is complex, or integer where it is used; or nothing to
        adapt.
      TypeError: no function first; patterns as train or bias, or a lora_bias, which
        are passed to `wrap`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda p, x: jnp.einsum("bi,hio->bho", x, p["w"])
      >>> jlora.plan(f, {"w": jnp.ones((2, 3, 4))}, jnp.ones((5, 3)))["w"].in_axes
      (-2,)
    """
    _check_order(fn, params)
    _refuse_wraps(kwargs)
    wanted = Wanted.of(rank, alpha, targets, exclude, rules)
    params = opened(params)
    plain = by_path.map_leaves(lambda _, x: base.traced(x), params, share=True)
    hidden = hide(((plain, *args), kwargs))
    leaves = by_path.arrays(params)
    jaxpr, _ = trace(fn, *hidden)
    seen = watch(jaxpr, [path for path, _ in by_path.flatten(hidden[0][0])[0]])

    def candidate(path: str, x: Any) -> Candidate:
        if path not in seen or not seen[path].uses:
            return None
        uses = seen[path].uses
        kind, axes = merged(uses, x.ndim)
        if kind is None:
            return axes
        if not wanted.named(path, x) and (doubt := _doubt(uses)):
            return doubt
        spec = Spec.of(kind, axes, bias=_bias(path, seen, leaves))
        return dataclasses.replace(
            spec,
            groups=max(use.groups for use in uses),
            tied=kind == "embed" and any(u.primitive == "dot_general" for u in uses),
        )

    def decoded(path: str) -> bool:
        uses = seen[path].uses if path in seen else []
        return bool(uses) and all(use.resolved().decoded for use in uses)

    return select(leaves, candidate, _IDLE, by_path.others(params), wanted, decoded)


def _check_order(fn: Any, params: Any) -> None:
    """Raises if function and params were swapped; a module may be either."""
    no_tree = jax.tree_util.all_leaves([params]) and not is_model(params)
    if not callable(fn) or (callable(params) and no_tree):
        raise TypeError(
            "plan: expected a function of the params, such as model.apply, then the "
            f"params: jlora.plan(fn, params, *args); found a {type(fn).__name__}, then "
            f"a {type(params).__name__}."
        )


def _refuse_wraps(kwargs: Mapping[str, Any]) -> None:
    """Raises for arguments that are meant for `wrap`; here they would go to ``fn``."""
    for name in ("train", "bias", "init", "train_rows", *FLAGS):
        said = kwargs.get(name)
        table = name == "train_rows" and isinstance(said, Mapping)
        if are_patterns(said) or table or (name in FLAGS and said is not None):
            raise TypeError(
                f"plan: {name}={kwargs[name]!r} would go to the function as an "
                f"argument: expected it in jlora.wrap(params, plan=plan, {name}=...)."
            )


def _bias(path: str, seen: Mapping[str, Seen], leaves: Mapping[str, Any]) -> str | None:
    """The path of a weight's bias: the array that was added, else the one by name."""
    bias = seen[path].bias
    if bias is None:  # the walk lost the product before a bias was added to it
        beside = by_path.sibling_bias(path, leaves)
        if beside is not None and beside in seen and seen[beside].may_be_bias_of(path):
            bias = beside
    # An array that is a weight itself is no bias.
    return bias if bias is not None and bias in seen and seen[bias].idle else None


def _doubt(uses: Sequence[Use]) -> str | None:
    """Why a weight with these uses is adapted only if it is named; else None."""
    for use in uses:
        if use.mixed:
            others = " and ".join(use.mixed)
            return (
                f"multiplied by {others}, number by number, before its product: either "
                "may be the weight. Name the one to adapt, as by a jlora.Rule"
            )
        if use.through is not None:
            return (
                f"goes through {use.through} before its product, which has no low-rank "
                "form: adapted when named, as by a jlora.Rule, and then W + scale·a·b "
                "is formed"
            )
    return None
