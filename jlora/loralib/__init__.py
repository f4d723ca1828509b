"""loralib's own forms of an adapter, and its checkpoints (arXiv:2106.09685).

Its ``Linear`` and ``Embedding`` are this library's own form, transposed.  Two layers
are not: ``MergedLinear`` has factors of its own for each enabled slice of a fused
weight (`Blocks`), and ``ConvLoRA`` reshapes a product of matrices into a kernel
(`Kernel`).

    rules = [jlora.Rule("**/qkv/kernel", form=Blocks((True, False, True)))]

A file that ``torch.save(loralib.lora_state_dict(model), path)`` wrote is loaded without
torch, and without running anything that is in it:

    adapter = jlora.loralib.load("adapter.pt", params, alpha=16)
    tree = jlora.attach(params, adapter)

`load` is in this file.  `files` reads a file and pairs its factors, `names` finds the
path of each of its modules, `layers` finds which kind of layer each pair belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._adapter import Adapter
from jlora._leaf import Full
from jlora._leaf.forms import Blocks as Blocks
from jlora._leaf.forms import Kernel as Kernel
from jlora._plan.plan import Plan
from jlora._plan.spec import Spec
from jlora._tree import paths
from jlora._tree.by_path import sibling_bias
from jlora.loralib import layers
from jlora.loralib.files import Factors, arrays, in_pairs
from jlora.loralib.files import read as read
from jlora.loralib.names import Patterns, Tree, shape_of


def load(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    params: Any = None,
    *,
    plan: Plan | None = None,
    alpha: float | Mapping[Any, float] | None = None,
    rename: Callable[[str], str] | None = None,
    enable_lora: Sequence[bool] | Mapping[Any, Sequence[bool]] | None = None,
) -> Adapter:
    """The adapter that ``loralib.lora_state_dict`` saved, for `jlora.attach`.

    loralib saves factors and biases by the names of torch's modules, and nothing else.
    What the file lacks is given by the arguments, or by a `Plan`.  The factors are:

    ============= ================================ ================================
    layer         lora_A, lora_B                   a, b
    ============= ================================ ================================
    Linear        (r, in), (out, r)                (*in, r), (r, *out)
    Embedding     (r, num), (dim, r)               (num, r), (r, dim)
    MergedLinear  (k·r, in), (k·out/n, r)          (k, *in, r), (k, r, *out/n)
    Conv2d        (r·k, in·k), (out/groups·k, r·k) their transposes, as in `Kernel`
    ============= ================================ ================================

    The weight of a module ``encoder.0.query`` is the ``kernel``, ``embedding``,
    ``weight`` or ``w`` in ``encoder/0/query``, or the array at that path itself.  Its
    bias is the ``bias`` or ``b`` there.  The kind of layer, the roles of the weight's
    axes and the groups of a convolution follow from the sizes.  In a ``kernel``,
    ``embedding`` or ``w`` the in axes come before the out axes; in a matrix of another
    name, either may come first.  If several readings fit, or none, `load` raises, and a
    plan decides.

    If params keep several layers as one stack, load them without params and then stack
    them: ``jax.tree.map(lambda *x: jnp.stack(x), *leaves)``.

    Args:
      state_dict: names to arrays (numpy's, JAX's or torch's), or the path of a file as
        in `read`.
      params: the tree that the adapter is for; arrays or ``jax.ShapeDtypeStruct``s.
        With None, and no plan, every weight is taken for an (in, out) ``kernel``.  This
        is wrong for a convolution, and `jlora.attach` then refuses the adapter.
      plan: a `Plan` of that tree.  It replaces ``params``, ``alpha`` and
        ``enable_lora``, and every weight that it plans has to be in the file.
      alpha: loralib's ``lora_alpha``, which is not in the file; or a mapping from
        pattern to alpha, the first match wins.  The delta is alpha / r * a·b.  Without
        an alpha, or without a match, alpha = r, a scale of 1.
      rename: a function from the name of a torch module to the path of its weight in
        params, or to the path of the layer that has its weight and bias:
        ``lambda m: "params/" + m.replace(".", "/")``.
      enable_lora: one flag for each slice, needed for every ``MergedLinear`` that has
        slices without factors; or a mapping from pattern to flags.  Without params,
        every module that a pattern matches is taken for a ``MergedLinear``.

    Returns:
      A flat dict from path to `LoRA` with ``w=None``; biases are `Full` leaves.  The
      arrays have the file's floating-point types (float64 only with JAX's x64 on).

    Raises:
      FileNotFoundError, ValueError: as in `read`.
      ValueError: a key that is neither factor nor bias; a factor without the other one;
        a module that params do not have (the error lists near paths); sizes that do not
        fit the weight, or fit it in several ways; missing or wrong flags; a pattern
        that matches nothing; a planned path that the file does not have.
      TypeError: a ``state_dict`` that is neither mapping nor path; a plan that is no
        `Plan`; a ``rename`` that is no function.

    Example:
      >>> import jax.numpy as jnp, jlora.loralib
      >>> params = {"query": {"kernel": jnp.ones((3, 2, 2))}}
      >>> file = {"query.lora_A": jnp.ones((8, 3)), "query.lora_B": jnp.ones((4, 8))}
      >>> adapter = jlora.loralib.load(file, params, alpha=16)
      >>> adapter["query/kernel"]
      LoRA(w=None, a=float32[3,8], b=float32[8,2,2], roles='ioo')
      >>> jlora.attach(params, adapter)["query"]["kernel"].scale
      Array(2., dtype=float32)
    """
    factors, biases = in_pairs(arrays(state_dict))
    _check(plan, rename, {"params": params, "alpha": alpha, "enable_lora": enable_lora})
    tree = Tree.of(params, plan, rename)
    flags = Patterns.of("enable_lora", enable_lora)
    alphas = Patterns.of("alpha", alpha)
    bases, specs = _planned(tree, factors, flags, alphas)
    if plan is not None:
        _require_all(plan, specs)
    merged = {p: bases[p] for p, s in specs.items() if s.form and s.form.slices}
    flags.check(merged, "MergedLinear")
    alphas.check(bases, "adapted")
    out: Adapter = {}
    for (path, spec), (a, b) in zip(specs.items(), factors.values(), strict=True):
        bias = _bias(tree, path, spec)
        out[path] = layers.leaf(tuple(bases[path].shape), spec, bias, a, b)
    for key, x in biases.items():
        path, value = tree.bias(key, x, factors)
        known = out.get(path)
        if known is not None and not (
            isinstance(known, Full) and np.array_equal(known.value, value)
        ):
            raise ValueError(
                f"{key!r} and another array of the file are both {path!r} in params, "
                "and differ: expected one. Check rename."
            )
        out[path] = Full(None, jnp.array(value))
    return out


def _check(plan: Any, rename: Any, others: dict[str, Any]) -> None:
    """Raises for arguments of wrong types, or that a plan decides."""
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(
            f"load: plan is a {type(plan).__name__}: expected what jlora.plan gives."
        )
    if rename is not None and not callable(rename):
        raise TypeError(
            f"load: rename is a {type(rename).__name__}: expected a function from a "
            "module's name to a path, such as names.get for a dict of them."
        )
    found = [name for name, x in others.items() if x is not None]
    if plan is not None and found:
        raise ValueError(
            f"load: {', '.join(found)} beside plan=, which decides all of it: pass "
            "it to jlora.plan(fn, params, ..., alpha=..., "
            "rules=[jlora.Rule(pattern, form=...)])."
        )


def _planned(
    tree: Tree, factors: Factors, flags: Patterns, alphas: Patterns
) -> tuple[dict[str, Any], dict[str, Spec]]:
    """The bases (or their shapes) and the specs for the pairs of factors, by path."""
    bases: dict[str, Any] = {}
    specs: dict[str, Spec] = {}
    for module, (a, b) in factors.items():
        path = tree.weight(module)
        if path in specs:
            raise ValueError(
                f"{module!r} and another module of the file are both {path!r} in "
                "params: expected a path of its own for each. Check rename."
            )
        if tree.leaves is None:
            said = flags.find(path, shape_of(a.shape[1], b.shape[0]))
            bases[path], spec = layers.told_by_file(path, a, b, said)
        elif tree.plan is None:
            bases[path] = tree.leaves[path]
            said = flags.find(path, bases[path])
            spec = layers.told_by_sizes(path, a, b, tree.leaves, said)
        else:
            bases[path] = tree.leaves[path]
            spec = layers.planned(tree.plan, path, a, b)
        if (alpha := alphas.find(path, bases[path])) is not None:
            spec = spec.with_scale(spec.rank, alpha)
        specs[path] = spec
    return bases, specs


def _require_all(plan: Plan, specs: dict[str, Spec]) -> None:
    """Raises for a planned path that the file does not have."""
    if lacks := [path for path in plan if path not in specs]:
        raise ValueError(
            f"load: the plan has {', '.join(map(repr, lacks[:3]))}"
            f"{', …' if len(lacks) > 3 else ''}, for which the file has no factors: it "
            f"has {paths.near(lacks[0], specs)}. Plan only what was adapted, or say "
            "with rename= where it is."
        )


def _bias(tree: Tree, path: str, spec: Spec) -> str | None:
    """The path of the bias of a weight's layer, relative to the weight."""
    if tree.leaves is None:  # not known; `attach` drops it if there is no such bias
        return "bias"
    bias = sibling_bias(path, tree.leaves) if tree.plan is None else spec.bias
    return None if bias is None else paths.relative(bias, path)
