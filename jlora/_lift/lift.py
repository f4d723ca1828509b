"""lift: a function of params becomes one that also reads adapted leaves.

The function is traced on the base arrays, and its jaxpr is evaluated with the low-rank
rules.  The evaluation is traced, too, and JAX's trace cache keeps the result.  So eager
calls do not retrace.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._algebra.weight import dense, settled, unsettled
from jlora._leaf import Bare, LoRA, base, is_adapted, is_leaf
from jlora._leaf.bank import refuse_bank
from jlora._leaf.fields import missing, stored
from jlora._leaf.forms import Misfit
from jlora._lift import control as control  # importing it registers the rules
from jlora._lift.evaluate import Evaluation, Tracked
from jlora._lift.report import Report, report
from jlora._plan.roles import differ, merged
from jlora._plan.watch import watch
from jlora._tree import output_bias
from jlora._tree.by_path import flatten, has_adapted
from jlora._tree.trace import hide, show, trace
from jlora._tree.variables import variables


def _frozen(leaves: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """stop_gradient on all that does not train; the algebra does it for scales."""
    held = lax.stop_gradient([x.w if is_adapted(x) else x for _, x in leaves])
    return [
        (path, dataclasses.replace(x, w=w) if is_adapted(x) else w)
        for (path, x), w in zip(leaves, held, strict=True)
    ]


def _settled(leaves: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The leaves with each output bias added to the bias of its layer, if possible."""
    by_path = dict(leaves)
    found, _ = output_bias.homes(by_path)
    # A bias that has a low-rank delta itself is not an array to add to.
    taken = {
        weight
        for bias, weights in found.items()
        if not isinstance(by_path[bias], LoRA)
        for weight in weights
    }

    def settle(path: str, x: Any) -> Any:
        if isinstance(x, LoRA):
            return dataclasses.replace(x, c=None) if path in taken else x
        if path not in found:
            return x
        new = output_bias.plus(x, [by_path[p] for p in found[path]])
        return dataclasses.replace(x, value=new) if is_adapted(x) else new

    return [(path, settle(path, x)) for path, x in leaves]


def _value(path: str, x: Any, at: int) -> Any:
    """The value of a leaf in the evaluation."""
    if not is_adapted(x):
        return Tracked(Bare(x), (path,), at=at) if base.is_base(x) else x
    try:
        return Tracked(settled(x), (path,), at=at, coded=base.is_coded(x.w))
    except Misfit as e:
        raise ValueError(f"{path!r}: {e}") from None


def _lifted(
    fn: Callable[..., Any],
    ev: Evaluation,
    args: Any,
    kwargs: Any,
    *,
    freeze: bool = True,
    must_use: bool = True,
) -> Any:
    """The hidden output of `trace`, evaluated with the low-rank rules."""
    values: list[Any] = []
    passed: list[Any] = []
    params: list[bool] = []

    def swap(tree: Any) -> Any:
        leaves, build = flatten(tree)
        params.extend([any(is_adapted(x) for _, x in leaves)] * len(leaves))
        if freeze and any(is_adapted(x) for _, x in leaves):
            leaves = _frozen(leaves)
        leaves = _settled(leaves)
        values.extend(
            _value(path, x, k) for k, (path, x) in enumerate(leaves, len(values))
        )
        passed.extend(x for _, x in leaves)
        # The function is traced on the bases, or on their shapes.
        return build(base.traced(x.base if is_adapted(x) else x) for _, x in leaves)

    args = [swap(a) for a in args]
    kwargs = {k: swap(v) for k, v in sorted(kwargs.items())}

    for x in values:
        if isinstance(x, Tracked) and isinstance(x.leaf, LoRA):
            ev.ranks[x.name] = x.leaf.rank
    jaxpr, out = trace(fn, args, kwargs)
    _hold(jaxpr, values, params)
    outs = ev.run(jaxpr, values)
    ev.warn()
    unused = [v.name for v in values if isinstance(v, Tracked) and not v.bare]
    if must_use and unused and not ev.seen and Tracked not in map(type, outs):
        raise ValueError(
            f"none of the {len(unused)} adapted leaves (the first is {unused[0]!r}) is "
            f"used by {_name(fn)}: expected it to read its weights from its arguments, "
            "found that it does not; it probably captured them by closure. Pass the "
            "tree to a function that takes the params as an argument."
        )
    returned, written = jax.tree.unflatten(jax.tree.structure(out), outs)
    for x in jax.tree.leaves(returned, is_leaf=lambda x: isinstance(x, Tracked)):
        if isinstance(x, Tracked) and isinstance(x.leaf, LoRA):
            ev.rows |= dict.fromkeys(x.paths, math.inf)
            if ev.gate is not None:  # the caller would have the ranks of all slots
                ev.materialise(x, "the caller")
    # A layer returns arrays.  Any other function may return an adapted leaf as it is.
    # What it writes into a variable is an adapted leaf only if nothing was changed.
    return (
        _leaves(returned, passed, lambda x: freeze),
        _leaves(written, passed, lambda x: freeze and x.at is not None),
    )


def _leaves(tree: Any, passed: list[Any], keep: Callable[[Tracked], bool]) -> Any:
    """The tree with its `Tracked` leaves as adapted leaves, or as arrays."""

    def own(x: Any) -> Any:
        if not isinstance(x, Tracked):
            return x
        if x.bare and x.at is not None:
            return passed[x.at]
        if x.bare or not keep(x):
            return dense(x.leaf)
        return unsettled(x.leaf, None if x.at is None else passed[x.at])

    return jax.tree.map(own, tree, is_leaf=lambda x: isinstance(x, Tracked))


def _hold(jaxpr: Any, values: list[Any], params: list[bool]) -> None:
    """Compares roles that a class or a name told with how the function uses the weight.

    Args:
      jaxpr: the function's.
      values: its inputs, some of which are `Tracked`.
      params: whether each is of a tree with adapted leaves.

    Raises:
      ValueError: the roles differ.
    """
    told = {
        str(k): v
        for k, v in enumerate(values)
        if isinstance(v, Tracked) and isinstance(v.leaf, LoRA) and v.leaf.told
    }
    if not told:
        return
    seen = watch(jaxpr, [str(k) if own else None for k, own in enumerate(params)])
    for k, v in told.items():
        uses = seen[k].uses if k in seen else ()
        kind, axes = merged(uses, v.leaf.ndim) if uses else (None, "")
        if kind and differ(v.leaf.axes, axes, v.leaf.shape, str(v.leaf.told)):
            names = ", ".join(dict.fromkeys(use.primitive for use in uses))
            raise ValueError(
                f"{v.name!r} of shape {v.leaf.shape}: its {v.leaf.told} told the roles "
                f"{v.leaf.axes!r}, but {names} uses it with the roles {axes!r} (b: a "
                "batch axis, i: contracted, o: comes out). Plan it from the function "
                "that uses it: jlora.wrap(params, plan=jlora.plan(fn, params, *args, "
                f"rank={v.leaf.rank}))."
            )


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def _check(args: Any, kwargs: Any) -> bool:
    """Whether there is something to lift; raises if a leaf is not complete."""
    found = False
    for arg in [*args, *kwargs.values()]:
        for path, x in flatten(arg)[0]:
            found = found or is_leaf(x)
            if not is_adapted(x):
                continue
            lacks = missing(x)
            if lacks == ["w"]:
                refuse_bank(arg, "lift")
                raise ValueError(
                    f"{path!r} is an adapter without its base (w=None): put it back "
                    "with jlora.attach(params, adapter), or, if it is half of a "
                    "partition, with jlora.combine(trainable, frozen). Of variables of "
                    "jlora.linen layers explain the plain twin, on "
                    "jlora.attach({'params': variables['params']}, "
                    "jlora.linen.adapter(variables))."
                )
            if no_arrays := [
                f"{name}={y!r}"
                for name in stored(x)
                if not hasattr(y := getattr(x, name), "ndim") and y is not None
            ]:
                raise ValueError(
                    f"{path!r} has {', '.join(no_arrays)}: expected arrays, such as "
                    "jnp.float32(2.0)."
                )
            if lacks:
                raise ValueError(
                    f"{path!r} lacks {', '.join(lacks)}: it is half of a partition; "
                    "put the halves together with jlora.combine(trainable, frozen)."
                )
    return found


def _check_function(fn: Any, call: str) -> None:
    adapted = has_adapted(fn)
    if adapted or not callable(fn):
        found = "an adapted tree" if adapted else f"a {type(fn).__name__}"
        raise TypeError(
            f"{call}: expected a function of the params as fn, such as model.apply or "
            f"lambda module, x: module(x), found {found}."
        )


def _lift(fn: Callable[..., Any], *, strict: bool = False, freeze: bool = True) -> Any:
    """The lifted function, called as (own, args, kwargs).

    What is its own is arrays, as keywords of `Evaluation`.
    """

    def hidden(own: Any, args: Any, kwargs: Any) -> Any:
        return _lifted(fn, Evaluation(strict, **own), args, kwargs, freeze=freeze)

    # make_jaxpr uses JAX's trace cache.  Its keys are structure, avals, shardings and
    # trace context.
    stage = jax.make_jaxpr(hidden, return_shape=True)

    def call(own: Any, args: Any, kwargs: Any) -> Any:
        if not _check(args, kwargs):
            return fn(*args, **kwargs)
        held = variables((args, kwargs))
        args, kwargs = hide((args, kwargs))
        if _compat.under_jit():  # the jit keeps its trace, so another cache is no use
            hidden_out = hidden(own, args, kwargs)
        else:
            jaxpr, out = stage(own, args, kwargs)
            outs = _compat.evaluate(jaxpr, jax.tree.leaves((own, args, kwargs)))
            hidden_out = jax.tree.unflatten(jax.tree.structure(out), outs)
        out, written = show(hidden_out)
        for i, value in written.items():
            if is_adapted(held[i].get_raw_value()) and not is_adapted(value):
                raise ValueError(
                    f"{_name(fn)} writes into a variable whose weight is adapted (of "
                    f"shape {held[i].get_raw_value().shape}), as nnx.WeightNorm does: "
                    "expected it to be read only, since the adapter would be lost. "
                    "Exclude its path from the plan."
                )
            held[i].set_raw_value(value)
        return out

    return call


def _plain(fn: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        return call({}, args, kwargs)

    return lifted


def lift(fn: Callable[..., Any], *, strict: bool = False) -> Callable[..., Any]:
    """The same function, now also reading adapted leaves.

    lift(f)(t, x) equals f(merge(t), x), without forming W + scale·a·b.  A product of x
    with a weight becomes x·w + (x·a)·(scale·b) (arXiv:2106.09685, eq. 3).  If the
    function returns an adapted leaf unchanged, the result has that leaf.

    The result is called exactly as ``fn`` is.  Only arrays and adapted leaves are
    traced, so ``fn`` may not branch on their values.  Everything else reaches ``fn``
    unchanged.  As with jit, the trace is kept: ``fn`` reads Python state only while it
    is traced, and another Python number needs another trace.

    In an argument with adapted leaves, everything that does not train is under
    stop_gradient.  If no argument has an adapted leaf, ``fn`` itself is called.

    Args:
      fn: any function of pytrees, such as a Flax module's ``apply``.
      strict: raise if a weight would have to be materialised, instead of warning.

    Returns:
      A function with the signature of ``fn``.  Products keep their dtypes.  a and b are
      cast to the activation's dtype, or the weight's if that is wider, and accumulated
      as in the base's product.

    Raises:
      TypeError: ``fn`` is no function.
      ValueError: when the result is called: the use of a weight contradicts its planned
        roles; a leaf has no base; none of the adapted leaves is used; or, with
        ``strict``, a weight would be materialised.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> lora = jlora.wrap(params, rank=2)
      >>> jlora.lift(f)(lora, jnp.ones((5, 3))).shape
      (5, 4)
    """
    _check_function(fn, "lift(fn)(tree, *args)")
    return _plain(fn, _lift(fn, strict=strict))


def lift_layer(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`lift` for the code of a layer: the caller decides what trains."""
    return _plain(fn, _lift(fn, freeze=False))


def lift_slots(fn: Callable[..., Any], *, strict: bool = False) -> Callable[..., Any]:
    """`lift`, called as (own, *args), where own says which slots of a bank are meant.

    It is ``{"gate": ...}``, where the ranks of a leaf are those of all slots, one after
    another; or ``{"slots": ...}``, where a leaf has the scale of its slot, and some
    products may read its factors out of the bank.
    """
    call = _lift(fn, strict=strict)
    return lambda own, *args: call(own, args, {})


def explain(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Report:
    """How ``lift(fn)(tree, *args, **kwargs)`` treats each adapted leaf of the tree.

    Nothing is computed: the arguments may be arrays or ``jax.ShapeDtypeStruct``s.

    Of ``jlora.per_example(fn)``, and what it is called with, it says which product the
    slots of a bank have as well.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda params, x: x @ params["kernel"]
      >>> lora = jlora.wrap({"kernel": jnp.ones((3, 4))}, rank=2)
      >>> print(jlora.explain(f, lora, jnp.ones((5, 3))))
      kernel  factored      dot_general
      1 factored
    """
    _check_function(fn, "explain(fn, tree, *args)")
    if (own := getattr(inspect.unwrap(fn), "explained", None)) is not None:
        return own(tree, *args, **kwargs)
    _check((tree, *args), kwargs)
    return reported(rehearsed(fn, (tree, *args), kwargs), tree)


def reported(ev: Evaluation, tree: Any) -> Report:
    """The report on an evaluation of a tree."""
    return report([path for path, x in flatten(tree)[0] if is_adapted(x)], ev.seen)


def rehearsed(
    fn: Callable[..., Any], args: Any, kwargs: Any, strict: bool = False, **own: Any
) -> Evaluation:
    """What an evaluation of the lifted function finds.  Nothing is computed.

    Args:
      fn: the function.
      args: its arguments.
      kwargs: and as keywords.
      strict: as in `lift`.
      **own: what else an `Evaluation` takes.
    """
    ev = Evaluation(strict, **own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.make_jaxpr(functools.partial(_lifted, fn, ev, must_use=False))(
            *hide((args, kwargs))
        )
    return ev
