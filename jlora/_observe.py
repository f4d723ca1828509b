"""What enters each planned weight: second moments, and ranks that follow from them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._leaf import LoRA
from jlora._leaf.forms import Probe
from jlora._leaf.node import register
from jlora._lift.lift import lift
from jlora._plan.plan import Plan, check, table
from jlora._printed import PrintedByPath
from jlora._tree import by_path, paths
from jlora._tree.variables import opened


@functools.partial(register, data=["found"])
@dataclasses.dataclass(frozen=True, repr=False)
class Moments(PrintedByPath[jax.Array]):
    """Path to the second moments of what enters a weight; they add with ``+``.

    Attributes:
      found: path to (*batch, in, in), the sum of x·xᵀ over all inputs x of the weight,
        in float32.  Several in axes are one, as a matrix of the weight has them.
    """

    found: dict[str, Any]

    def __add__(self, other: Any) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if self.found.keys() != other.found.keys():
            apart = sorted(self.found.keys() ^ other.found.keys())
            raise ValueError(
                f"Moments: one of the two lacks {apart[0]!r}: expected moments of one "
                "plan."
            )
        return Moments({path: x + other.found[path] for path, x in self.items()})

    def __radd__(self, other: Any) -> Moments:
        return self if other == 0 else NotImplemented  # so that sum() adds them

    def ratios(self, path: str) -> np.ndarray:
        """The part of the energy that each direction has, in falling order.

        Of a stack, the mean over its layers.
        """
        m = np.asarray(self.found[path], np.float64)
        if not np.isfinite(m).all():
            raise ValueError(
                f"Moments: those of {path!r} have NaN or infinities: expected finite "
                "inputs. Look at the batches that were observed."
            )
        values = np.linalg.eigvalsh(m.reshape(-1, *m.shape[-2:]))[:, ::-1]
        values = np.maximum(values, 0)
        total = np.maximum(values.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
        return (values / total).mean(0)

    def __str__(self) -> str:
        rows = [
            (
                path,
                "×".join(map(str, m.shape[:-1])),
                *(
                    str(int(np.argmax(np.cumsum(self.ratios(path)) >= part)) + 1)
                    for part in (0.5, 0.9, 0.99)
                ),
            )
            for path, m in self.items()
        ]
        head = ("path", "inputs", "50 %", "90 %", "99 %")
        return table(head, rows) + (
            "\nthe last columns: how many directions have this part of the energy"
        )


def observe(
    fn: Callable[..., Any], params: Any, *args: Any, plan: Plan, **kwargs: Any
) -> Moments:
    """Second moments of what enters each planned weight, in fn(params, *args).

    Call it on some batches, as ``jax.jit(functools.partial(jlora.observe, fn,
    plan=plan))``, and add the results: ``sum(observe(params, x) for x in batches)``.
    `initializers.eva` starts the factors a from them, `quantize` and
    `initializers.loftq` round by them.  It costs about three forward passes, and an
    array (in, in) in float32 for each weight.

    The moments are a gradient: beside each product stands one with the identity, whose
    gradient is the input itself.  So scanned and rematerialised layers have theirs, and
    what does not reach a floating-point result has zeros.

    Args:
      fn: the function whose first argument is ``params``, such as ``model.apply``.
      params: plain params.
      *args: the other arguments of ``fn``.
      plan: which weights.  Embeddings, which are looked up, have no moments.
      **kwargs: the keyword arguments of ``fn``.

    Raises:
      ValueError: a plan of another tree, or one of embeddings alone; a function that
        returns no floating-point array.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda p, x: x @ p["kernel"]
      >>> params, x = {"kernel": jnp.ones((2, 4))}, jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> plan = jlora.plan(f, params, x)
      >>> jlora.observe(f, params, x, plan=plan)["kernel"].tolist()
      [[10.0, 0.0], [0.0, 0.0]]
    """
    leaves = by_path.arrays(opened(params))
    check(plan, leaves, "observe")
    planned = {p: s for p, s in plan.items() if s.kind != "embed"}
    if not planned:
        raise ValueError(
            "observe: expected a plan of dense or convolution weights, found "
            "embeddings alone, whose inputs are indices."
        )

    def probe(path: str, w: Any) -> Any:
        if path not in planned:
            return w
        spec = dataclasses.replace(planned[path], form=None)
        n = math.prod(w.shape[k] for k in spec.in_axes)
        own = dataclasses.replace(spec.with_scale(n, n), dora=None, lora_bias=None)
        shapes = own.shapes(w.shape)
        eye = jnp.eye(n).reshape(*shapes["a"][len(spec.batch_axes) :])
        return LoRA(
            w,
            jnp.broadcast_to(eye, shapes["a"]),
            jnp.zeros(shapes["b"]),
            jnp.ones(shapes["scale"]),
            roles=spec.axes.lstrip("b"),
            form=Probe(),
        )

    tree = by_path.map_leaves(probe, params)
    lifted = lift(fn)

    def total(identities: dict[str, Any]) -> Any:
        def own(path: str, x: Any) -> Any:
            if path not in planned:
                return x
            return dataclasses.replace(x, a=identities[path])

        out = lifted(by_path.map_leaves(own, tree), *args, **kwargs)
        floating = [
            x
            for x in jax.tree.leaves(out)
            if jnp.issubdtype(getattr(x, "dtype", bool), jnp.inexact)
        ]
        if not floating:
            raise ValueError(
                "observe: fn returns no floating-point array, so nothing that enters a "
                "weight is seen: expected a function that returns the logits, say."
            )
        return sum((jnp.sum(jnp.real(x).astype(jnp.float32)) for x in floating), 0.0)

    found = dict(by_path.flatten(tree)[0])
    moments = jax.grad(total)({path: found[path].a for path in planned})
    return Moments(
        {
            path: m.reshape(*found[path].scale.shape, m.shape[-1], m.shape[-1])
            for path, m in moments.items()
        }
    )


def redistribute(plan: Plan, moments: Moments, rho: float = 2.0) -> Plan:
    """EVA's ranks (arXiv:2410.07170, section 3.3): more where inputs have more energy.

    All directions of all weights are sorted by the part that they have of the energy of
    their weight's inputs.  The first of them get a rank, as many as the plan has ranks.
    So the sum of all ranks stays the same, a stack counting once for each layer.  The
    alphas change with the ranks, so that the scales stay as they are; say ``rslora`` by
    a `Rule` for that, since the plan does not know that of `wrap`.

    Args:
      plan: a plan.
      moments: what `observe` gave with it.
      rho: no rank grows by more than this factor; at least 1.

    Returns:
      A plan.  A weight that gets no rank is skipped, and listed there.

    Raises:
      ValueError: a ``rho`` below 1; a planned weight without moments.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda p, x: x @ p["q"] + (x * jnp.array([1.0, 0.0])) @ p["k"]
      >>> params = {"q": jnp.ones((2, 4)), "k": jnp.ones((2, 4))}
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> plan = jlora.plan(f, params, x, rank=1)
      >>> new = jlora.redistribute(plan, jlora.observe(f, params, x, plan=plan))
      >>> new["q"].rank, new["k"].rank
      (1, 1)
    """
    if not isinstance(plan, Plan) or not isinstance(moments, Mapping):
        raise TypeError(
            "redistribute: expected a plan, then its moments, found a "
            f"{type(plan).__name__}, then a {type(moments).__name__}."
        )
    if not rho >= 1:
        raise ValueError(f"redistribute: rho {rho!r}: expected a number of at least 1.")
    directions: list[tuple[float, str]] = []
    layers: dict[str, int] = {}
    for path, spec in plan.items():
        if path not in moments:
            raise ValueError(
                f"redistribute: no moments of {path!r}; near paths: "
                f"{paths.near(path, moments)}. Observe with this plan; exclude "
                "embeddings from it."
            )
        rank = spec.rank or 0
        shape = plan.shapes[path]
        layers[path] = math.prod(shape[k] for k in spec.batch_axes)
        ratios = moments.ratios(path)
        largest = min(round(rank * rho), len(ratios))
        directions += [(float(x), path) for x in ratios[:largest]]
    budget = sum((spec.rank or 0) * layers[path] for path, spec in plan.items())
    ranks = dict.fromkeys(plan, 0)
    for _, path in sorted(directions, key=lambda x: -x[0]):
        if budget >= layers[path]:
            budget -= layers[path]
            ranks[path] += 1
    specs, skipped = {}, dict(plan.skipped)
    for path, spec in plan.items():
        old = spec.rank or 0
        if ranks[path]:
            times = ranks[path] / old
            times = math.sqrt(times) if spec.rslora else times
            alpha = None if spec.alpha is None else spec.alpha * times
            specs[path] = plan.specs[path].with_scale(ranks[path], alpha)
        else:
            skipped[path] = "its inputs have less energy in any direction than others"
    return dataclasses.replace(plan, specs=specs, skipped=skipped)
