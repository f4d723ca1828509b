"""loralib's layers: which kind a pair of factors belongs to, and the leaf it becomes.

A file has only ``lora_A`` and ``lora_B`` for each module.  The kind of layer comes from
a plan; without one, it is the only kind that fits the sizes of factors and weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._leaf import LoRA, Note, forms
from jlora._leaf.forms import Blocks, Form, Kernel
from jlora._plan.plan import Plan
from jlora._plan.spec import Spec, fitted
from jlora._tree.by_path import sibling_bias

# Flax and Haiku have in axes first; Equinox has (out, in) as torch does.
_IN_FIRST = ("kernel", "embedding", "w")


def _sizes(
    shape: tuple[int, ...], axes: str, rank: int, form: Form | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of lora_A and lora_B for a leaf of this shape, rank and form.

    Example:
      >>> _sizes((4, 6), "io", 2, Blocks((True, False, True)))
      ((4, 4), (4, 2))
    """
    form = forms.of(form)
    a, b = form.shapes(shape, axes, rank)
    k, shared = form.blocks, a[-1]
    lora_a = k * shared, math.prod(a) // (k * shared)
    return lora_a, (math.prod(b) // shared, shared)


def leaf(
    shape: tuple[int, ...],
    spec: Spec,
    bias: str | None,
    a: np.ndarray,
    b: np.ndarray,
) -> LoRA:
    """The adapted leaf of a pair of factors that fit the spec."""
    to_a, to_b = (spec.shapes(shape)[name] for name in ("a", "b"))
    k, shared = forms.of(spec.form).blocks, to_a[-1]
    # Each of the k blocks is transposed: loralib has (r, in) and (out, r).
    a = a.reshape(k, shared, -1).swapaxes(1, 2).reshape(to_a)
    b = b.reshape(k, -1, shared).swapaxes(1, 2).reshape(to_b)
    return LoRA(
        None,
        jnp.array(a),
        jnp.array(b),
        jnp.full((), spec.scale, jnp.float32),
        roles=spec.axes,
        form=spec.form,
        bias_path=bias,
        layer=Note(spec.layer),
    )


def planned(plan: Plan, path: str, a: np.ndarray, b: np.ndarray) -> Spec:
    """The plan's spec for the path; raises unless the factors fit it."""
    if path not in plan:
        why = plan.skipped.get(path, "it was not a target")
        raise ValueError(
            f"the file adapts {path!r}, which the plan does not ({why}): expected all "
            "that the file adapts among the targets and rules of jlora.plan(...)."
        )
    spec, shape = plan[path], plan.shapes[path]
    if spec.batch_axes:
        raise ValueError(
            f"{path!r} of shape {shape} is a stack of layers (roles {spec.axes!r}): "
            "expected one layer for a module of the file. Load without params, and "
            "stack: jax.tree.map(lambda *x: jnp.stack(x), *leaves)."
        )
    assert spec.rank is not None
    expected = _sizes(shape, spec.axes, spec.rank, spec.form)
    if expected != (a.shape, b.shape):
        raise ValueError(
            f"{path!r}: the file has lora_A {a.shape} and lora_B {b.shape}: expected "
            f"{expected[0]} and {expected[1]} for a weight of shape {shape}, roles "
            f"{spec.axes!r}, rank {spec.rank} and form {spec.form}. Say the file's "
            "rank and form in jlora.plan(..., rank=..., "
            f"rules=[jlora.Rule({path!r}, form=...)])."
        )
    return spec


def told_by_sizes(
    path: str,
    a: np.ndarray,
    b: np.ndarray,
    leaves: Mapping[str, Any],
    flags: Sequence[bool] | None,
) -> Spec:
    """The only spec that fits the sizes of weight and factors; raises otherwise."""
    shape = tuple(leaves[path].shape)
    found = list(_readings(path.rpartition("/")[2], shape, a, b))
    bias = sibling_bias(path, leaves)
    if len(found) > 1 and bias is not None:
        # A bias has the shape of the out axes.
        sizes = tuple(leaves[bias].shape)
        found = [
            s for s in found if sizes == tuple(shape[k] for k in s.out_axes)
        ] or found
    if not found:
        raise ValueError(
            f"{path!r} of shape {shape}: lora_A {a.shape} and lora_B {b.shape} do not "
            "fit it: expected (r, in) and (out, r), its in axes before its out axes; "
            "(k·r, in) and (k·out/n, r) for k of n slices; or (r·k, in·k) and "
            "(out/groups·k, r·k) for a square convolution kernel (k, k, in/groups, "
            "out). If its axes have other roles, or if it has more than two and is no "
            f"{', '.join(_IN_FIRST)}, pass plan=jlora.plan(fn, params, ...) in place "
            "of params; else the file is of another model."
        )
    if len(found) > 1:
        ways = " or ".join(
            f"roles {s.axes!r}" + (f" in the form {s.form}" if s.form else "")
            for s in found
        )
        raise ValueError(
            f"{path!r} of shape {shape}: lora_A {a.shape} and lora_B {b.shape} fit it "
            f"in several ways: {ways}. Let jlora watch how it is used: pass "
            "plan=jlora.plan(fn, params, ...) in place of params."
        )
    (spec,) = found
    form = spec.form
    # `_readings` knows how many slices are enabled; the flags say which.
    if form and (slices := form.slices):
        form = Blocks(_enabled(path, flags, sum(slices), len(slices)))
    form = fitted(form, path, shape, spec.axes, spec.kind)
    return dataclasses.replace(spec, form=form)


def _readings(
    name: str, shape: tuple[int, ...], a: np.ndarray, b: np.ndarray
) -> Iterator[Spec]:
    """Every spec that fits the sizes of the factors.

    Sizes tell that k of n slices are enabled, not which: the first k stand for them.
    """
    (rows, columns), (out_rows, rank) = a.shape, b.shape
    roles = ["i" * k + "o" * (len(shape) - k) for k in range(1, len(shape))]
    if name not in _IN_FIRST:
        roles = ["io", "oi"] if len(shape) == 2 else []
    for axes in roles:
        found: list[tuple[str, Form | None, int]] = [("dense", None, rows)]
        # For k slices of n, lora_A has k·r rows and lora_B has k·out/n.
        slices = rows // rank
        out = math.prod(n for n, role in zip(shape, axes, strict=True) if role == "o")
        if 0 < slices <= (n := out * slices // out_rows) and n > 1:
            flags = (True,) * slices + (False,) * (n - slices)
            found.append(("dense", Blocks(flags), rank))
        if axes == "iiio" and shape[0] == shape[1]:
            groups = columns // max(shape[0] * shape[2], 1)
            # With a kernel of one pixel in one group, it is the plain product above.
            if groups and shape[0] * groups > 1 and rows >= shape[0]:
                found.append(("conv", Kernel(None, groups), rows // shape[0]))
        for kind, form, r in found:
            if _sizes(shape, axes, r, form) == (a.shape, b.shape):
                yield Spec.of(kind, axes, r, form=form)


def told_by_file(
    path: str, a: np.ndarray, b: np.ndarray, flags: Sequence[bool] | None
) -> tuple[Any, Spec]:
    """(base, spec) if params are not known: the weight is an (in, out) kernel."""
    (rows, columns), (out_rows, rank) = a.shape, b.shape
    slices, rest = divmod(rows, rank)
    if rest or not slices or out_rows % slices:
        raise ValueError(
            f"{path!r}: lora_A {a.shape} and lora_B {b.shape} do not fit each other: "
            "expected (r, in) and (out, r), or (k·r, in) and (k·out/n, r)."
        )
    form = None
    n = 1
    if flags is not None or slices > 1:
        form = Blocks(_enabled(path, flags, slices, None))
        n = len(form.enabled)
    base = jax.ShapeDtypeStruct((columns, out_rows // slices * n), jnp.float32)
    return base, Spec.of("dense", "io", rank, form=form)


def _enabled(path: str, said: Any, k: int, n: int | None) -> tuple[bool, ...]:
    """The flags of a MergedLinear with k enabled slices (of n, if that is known)."""
    slices = f"{k} of {n}" if n else str(k)
    if said is None and k != n:
        example = (True,) * k + (False,) * ((n or k) - k)
        raise ValueError(
            f"{path!r} is a MergedLinear with {slices} slices enabled, and the file "
            f"does not say which: expected enable_lora={{{path!r}: flags}}, such as "
            f"{example}."
        )
    flags = tuple(map(bool, (True,) * k if said is None else said))
    if sum(flags) != k or len(flags) != (n or len(flags)):
        raise ValueError(
            f"{path!r}: enable_lora {flags} does not fit: by its sizes it is a "
            f"MergedLinear with {slices} slices enabled. Say the flags that the layer "
            "had in torch."
        )
    return flags
