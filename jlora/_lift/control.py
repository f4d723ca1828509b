"""Loops, branches and calls: rebuilt with JAX's own functions.

Adapted leaves pass through them as pytrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._leaf import Dropout, LoRA, base, fields, forms
from jlora._leaf.forms import NotFactored
from jlora._lift.evaluate import Evaluation, Tracked, rule
from jlora._lift.rules import with_factors


def _constrained(x: Any, sharding: Any) -> Any:
    """x under a sharding from an inner jit, which for a leaf is the base's sharding."""
    place = _compat.place(sharding)
    if place is None:
        return x
    if not isinstance(x, Tracked):
        return place(x, sharding)
    w = base.placed(x.leaf.base, sharding, place)
    leaf = with_factors(dataclasses.replace(x.leaf, w=w), sharding, place)
    return dataclasses.replace(x, leaf=leaf)  # the same weight, elsewhere


@rule(*_compat.JIT)
def _jit(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params

    def fn(*args: Any) -> list[Any]:
        args = tuple(map(_constrained, args, p["in_shardings"]))
        return list(map(_constrained, ev.run(p["jaxpr"], args), p["out_shardings"]))

    fn.__name__ = eqn.params["name"]
    return jax.jit(fn, inline=eqn.params["inline"])(*args)


@rule(*_compat.CALL)
def _call(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    return ev.run(eqn.params["call_jaxpr"], args)


@rule(*_compat.REMAT)
def _remat(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    def fn(*args: Any) -> list[Any]:
        return ev.run(eqn.params["jaxpr"], args)

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(fn, policy=policy, prevent_cse=prevent_cse)(*args)


def _per_step(xs: Sequence[Any], step: Any) -> list[Any]:
    """The values that all steps of a loop share, with new dropout keys in each step."""

    def fold(x: Any) -> Any:
        if not isinstance(x, Tracked) or (dropout := x.leaf.dropout) is None:
            return x
        fold_in = jnp.vectorize(jax.random.fold_in, excluded={1})
        own = Dropout(fold_in(dropout.key, step), dropout.rate)
        return dataclasses.replace(x, leaf=dataclasses.replace(x.leaf, dropout=own))

    return [fold(x) for x in xs]


class _Carry:
    """Splits a loop's carry: leaves that the body returns unchanged become constants.

    Attributes:
      fixed: the unchanged leaves, by position in the carry.
      init: the initial values of the rest of the carry.
    """

    def __init__(
        self, ev: Evaluation, name: str, init: Sequence[Any], ins: Any, outs: Any
    ):
        self.ev, self.name = ev, name
        same = [i is o for i, o in zip(ins, outs, strict=True)]
        self.fixed = {
            i: x for i, x in enumerate(init) if isinstance(x, Tracked) and same[i]
        }
        self.init = self.moving(init)

    def moving(self, values: Sequence[Any]) -> list[Any]:
        """The part of a carry that changes, with its leaves materialised."""
        return [
            self.ev.materialise(x, f"{self.name} (as a carry that changes)")
            for i, x in enumerate(values)
            if i not in self.fixed
        ]

    def whole(self, moving: Sequence[Any], fixed: Sequence[Any] | None = None) -> list:
        """The whole carry, from its part that changes and the unchanged leaves."""
        values, kept = iter(moving), iter(fixed or self.fixed.values())
        n = len(self.fixed) + len(moving)
        return [next(kept) if i in self.fixed else next(values) for i in range(n)]


class _Xs:
    """The values that a scan slices.

    Slicing the fields of a base may not slice its array, or cost more than it seems to.
    Such a base stays whole, and each step takes its row.

    Attributes:
      whole: the bases that stay whole, by position.
      sliced: the values for the scan to slice, without those bases.
    """

    def __init__(self, ev: Evaluation, xs: Sequence[Any]):
        self.whole: dict[int, Any] = {}
        self.sliced = []
        for i, x in enumerate(xs):
            if isinstance(x, Tracked) and x.leaf.axes[0] != "b":
                x = ev.materialise(x, "scan (over an axis that is not a batch axis)")
            if isinstance(x, Tracked) and base.whole(w := x.leaf.base):
                self.whole[i] = w
                x = x.now(dataclasses.replace(x.leaf, w=None))
            self.sliced.append(x)

    def at(self, step: Any, sliced: Sequence[Any]) -> list[Any]:
        """The slices of one step, with the rows of the bases that stayed whole."""
        out = list(sliced)
        for i, w in self.whole.items():
            row = base.row(w, step)
            out[i] = out[i].now(dataclasses.replace(out[i].leaf, w=row))
        return out


@rule("scan")
def _scan(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params
    jaxpr, _ = _compat.jaxpr_and_consts(p["jaxpr"])
    n, m = _compat.scan_counts(p)
    consts, init = args[:n], args[n : n + m]
    carry = _Carry(ev, "scan", init, jaxpr.invars[n : n + m], jaxpr.outvars[:m])
    xs = _Xs(ev, args[n + m :])

    def body(moving: Any, x: Any) -> tuple[Any, Any]:
        step, sliced = x
        fixed = _per_step(list(carry.fixed.values()), step)
        shared = [*_per_step(consts, step), *carry.whole(moving, fixed)]
        outs = ev.run(p["jaxpr"], [*shared, *xs.at(step, sliced)])
        return carry.moving(outs[:m]), outs[m:]

    length = p["length"]
    moving, ys = lax.scan(
        body,
        carry.init,
        (jnp.arange(length), xs.sliced),
        length,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry.whole(moving), *ys]


@rule("while")
def _while(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = args[:n], args[n : n + m], args[n + m :]
    jaxpr, _ = _compat.jaxpr_and_consts(p["body_jaxpr"])
    carry = _Carry(ev, "while", init, jaxpr.invars[m:], jaxpr.outvars)

    def values(consts: Sequence[Any], state: Any) -> list[Any]:
        step, moving = state
        fixed = _per_step(list(carry.fixed.values()), step)
        return [*_per_step(consts, step), *carry.whole(moving, fixed)]

    def going(state: Any) -> Any:
        return ev.run(p["cond_jaxpr"], values(cond_consts, state))[0]

    def cond(state: Any) -> Any:
        return jnp.any(going(state))

    def body(state: Any) -> Any:
        step, old = state
        new = carry.moving(ev.run(p["body_jaxpr"], values(body_consts, state)))
        # A vmapped loop has a condition for each slice.  It runs until all are false,
        # and slices that have ended keep their values.
        if batched:
            on = going(state)
            new = [
                jnp.where(on.reshape(on.shape + (1,) * (x.ndim - on.ndim)), x, y)
                for x, y in zip(new, old, strict=True)
            ]
        return step + 1, new

    batched = _compat.jaxpr_and_consts(p["cond_jaxpr"])[0].outvars[0].aval.shape

    _, moving = lax.while_loop(cond, body, (0, carry.init))
    return carry.whole(moving)


@rule("cond")
def _cond(ev: Evaluation, eqn: Any, index: Any, *args: Any) -> list[Any]:
    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        def fn(*args: Any) -> list[Any]:
            outs = ev.run(jaxpr, args)
            return [ev.materialise(x, "cond (as an output)") for x in outs]

        return fn

    return lax.switch(index, [branch(j) for j in eqn.params["branches"]], *args)


def _in_specs(x: Any, own: Any) -> Any:
    """The partition specs of one operand of a shard_map.

    Raises:
      NotFactored: the weight is sharded, but the factors of its form cannot be; or each
        device would add the output bias to its part of a sum over in axes.
    """
    if not isinstance(x, Tracked):
        return own
    leaf, names = x.leaf, dict(enumerate(own))
    if isinstance(leaf, LoRA):
        cut = {role for k, role in enumerate(leaf.axes) if names.get(k)}
        aligned = forms.of(leaf.form).aligned
        if (cut and not aligned) or (leaf.c is not None and "i" in cut):
            raise NotFactored
    return dataclasses.replace(x, leaf=fields.specs(leaf, own))


def _ready(x: Any) -> Any:
    """A leaf with a base that can be sharded: if needed, the array is computed now."""
    if not isinstance(x, Tracked) or base.shards(w := x.leaf.base):
        return x
    return x.now(dataclasses.replace(x.leaf, w=base.array(w)))


@rule("shard_map")
def _shard_map(ev: Evaluation, eqn: Any, *args: Any) -> list[Any]:
    """Every device evaluates the body on its own shard of the weight and factors."""
    p = eqn.params
    args = tuple(map(_ready, args))

    def body(*args: Any) -> tuple[Any, ...]:
        outs = ev.run(p["jaxpr"], args)
        return tuple(ev.materialise(x, "shard_map (as an output)") for x in outs)

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(map(_in_specs, args, p["in_specs"])),
        out_specs=tuple(p["out_specs"]),
        axis_names=_compat.manual_axes(p),
        check_vma=p["check_vma"],
    )
    return list(mapped(*args))
