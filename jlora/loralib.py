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
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora import _paths, _torch_file
from jlora._leaf import Blocks as Blocks
from jlora._leaf import Form, Full, LoRA, factor_shapes
from jlora._leaf import Kernel as Kernel
from jlora._plan import Plan, Spec, fitted, leaves_of, sibling_bias
from jlora._tree import Adapter

# What a weight is called in Flax (the first two), Equinox and Haiku.
_WEIGHTS = ("kernel", "embedding", "weight", "w")
_BIASES = ("bias", "b")
# Flax and Haiku have in axes first; Equinox has (out, in) as torch does.
_IN_FIRST = ("kernel", "embedding", "w")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by torch's names, to look at or to take some away.

    Args:
      path: of a safetensors file, if its name ends in ``.safetensors``; else of a file
        that ``torch.save`` wrote.  Its pickle is given no names but those that tensors
        need; torch is neither needed nor imported.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a damaged file, or one of another kind; a pickle that asks for
        anything but tensors (nothing of it is run).

    Example:
      >>> import pathlib, tempfile, numpy as np, safetensors.numpy, jlora.loralib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
      >>> safetensors.numpy.save_file({"query.lora_A": np.ones((2, 3))}, path)
      >>> jlora.loralib.read(path)["query.lora_A"].shape
      (2, 3)
    """
    where = os.fspath(path)
    if not where.endswith(".safetensors"):
        return _torch_file.read(where)
    try:
        return safetensors.numpy.load_file(where)
    except (safetensors.SafetensorError, AttributeError, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        raise ValueError(
            f"{where!r} is no whole safetensors file of floating-point arrays that "
            f"numpy has ({e}): copy or save it again, in float32 say."
        ) from None


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
    What the file lacks is said here, or by a `Plan`:

    ============= ================================ ================================
    layer         lora_A, lora_B                   a, b
    ============= ================================ ================================
    Linear        (r, in), (out, r)                (*in, r), (r, *out)
    Embedding     (r, num), (dim, r)               (num, r), (r, dim)
    MergedLinear  (k·r, in), (k·out/n, r)          (k, *in, r), (k, r, *out/n)
    Conv2d        (r·k, in·k), (out/groups·k, r·k) their transposes, as in `Kernel`
    ============= ================================ ================================

    A module ``encoder.0.query`` is looked for in ``encoder/0/query``, as its
    ``kernel``, ``embedding``, ``weight`` or ``w``, or that path itself; its bias as
    ``bias`` or ``b`` there.  The kind of layer, the roles of the weight's axes and the
    groups of a convolution follow from the sizes: in axes come before out axes in a
    ``kernel``, ``embedding`` or ``w``, either way round in a matrix of another name.
    Where several readings fit, or none, that is an error, and a plan decides.

    Layers that params keep as one stack are loaded without params and then stacked:
    ``jax.tree.map(lambda *x: jnp.stack(x), *leaves)``.

    Args:
      state_dict: names to arrays (numpy's, JAX's or torch's), or the path of a file as
        in `read`.
      params: the tree that the adapter is for; arrays or ``jax.ShapeDtypeStruct``s.
        None, and no plan: every weight is a (in, out) ``kernel``, which is wrong for a
        convolution, and `jlora.attach` then refuses it.
      plan: a `Plan` of that tree instead.  It says all that ``params``, ``alpha`` and
        ``enable_lora`` do, and whatever it plans has to be in the file.
      alpha: loralib's ``lora_alpha``, which is not in the file; or a mapping from
        pattern to it, the first match wins.  The delta is alpha / r * a·b; None, and
        where no pattern matches, is alpha = r, a scale of 1.
      rename: from the name of a module in torch to the path of its weight in params, or
        of what holds its weight and bias:
        ``lambda m: "params/" + m.replace(".", "/")``.
      enable_lora: the flags of every ``MergedLinear`` of which not all slices are
        enabled, or a mapping from pattern to flags.  Without params whatever a pattern
        matches is taken for a ``MergedLinear``.

    Returns:
      A flat dict from path to `LoRA` with ``w=None``; biases are `Full` leaves.  The
      arrays have the file's floating-point types (float64 only with JAX's x64 on).

    Raises:
      FileNotFoundError, ValueError: as `read`.
      ValueError: a key that is no factor and no bias; a factor without its other one;
        a module that params has not (with the paths near it); sizes that do not fit the
        weight, or fit it in several ways; unknown or wrong flags; a pattern that
        matches nothing; a planned path that the file has not.
      TypeError: a ``state_dict`` that is neither mapping nor path.

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
    factors, others = _sorted(_arrays(state_dict))
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(
            f"load: plan is a {type(plan).__name__}: expected what jlora.plan gives."
        )
    if rename is not None and not callable(rename):
        raise TypeError(
            f"load: rename is a {type(rename).__name__}: expected a function from a "
            "module's name to a path, such as names.get for a dict of them."
        )
    if plan is not None:
        said = {"params": params, "alpha": alpha, "enable_lora": enable_lora}
        if found := [name for name, x in said.items() if x is not None]:
            raise ValueError(
                f"load: {', '.join(found)} beside plan=, which decides all of it: say "
                "it in jlora.plan(fn, params, ..., alpha=..., "
                "rules=[jlora.Rule(pattern, form=...)])."
            )
    tree = _Tree.of(params, plan, rename)
    flags = _Patterns.of("enable_lora", enable_lora)
    alphas = _Patterns.of("alpha", alpha)

    bases: dict[str, Any] = {}
    specs: dict[str, Spec] = {}
    out: Adapter = {}
    for module, (a, b) in factors.items():
        path = tree.weight(module)
        if path in specs:
            raise ValueError(
                f"{module!r} and another module of the file are both {path!r} in "
                "params: expected a path of its own for each. Check rename."
            )
        if tree.leaves is None:
            bases[path], specs[path] = _told_by_file(path, a, b, flags)
        elif plan is None:
            bases[path] = tree.leaves[path]
            specs[path] = _told_by_sizes(path, a, b, tree.leaves, flags)
        else:
            bases[path] = tree.leaves[path]
            specs[path] = _planned(plan, path, a, b)
        if (own := alphas.find(path, bases[path])) is not None:
            specs[path] = dataclasses.replace(specs[path], alpha=float(own))
        bias = specs[path].bias
        if plan is None and tree.leaves is not None:
            bias = sibling_bias(path, tree.leaves)
        bias = None if bias is None else _paths.relative(bias, path)
        if tree.leaves is None:  # the file does not tell; where there is none, nothing
            bias = "bias"
        out[path] = _leaf(tuple(bases[path].shape), specs[path], bias, a, b)
    if plan is not None and (lacks := [path for path in plan if path not in specs]):
        raise ValueError(
            f"load: the plan has {', '.join(map(repr, lacks[:3]))}"
            f"{', …' if len(lacks) > 3 else ''}, for which the file has no factors: it "
            f"has {_paths.near(lacks[0], specs)}. Plan only what was adapted, or say "
            "with rename= where it is."
        )
    merged = {p: bases[p] for p, s in specs.items() if isinstance(s.form, Blocks)}
    flags.check(merged, "MergedLinear")
    alphas.check(bases, "adapted")
    for key, x in others.items():
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


# ------------------------------------------------------------------------------ names


def _arrays(state_dict: Any) -> dict[str, np.ndarray]:
    """The state dict as numpy arrays, of torch tensors too."""
    if isinstance(state_dict, (str, os.PathLike)):
        return dict(read(state_dict))
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load: {type(state_dict).__name__}: expected a mapping from name to array "
            "or the path of a file."
        )

    def array(key: Any, x: Any) -> np.ndarray:
        if not hasattr(x, "detach"):
            x = np.asarray(x)
            return x.astype(x.dtype.newbyteorder("="), copy=False)
        x = x.detach()
        try:
            # numpy has no bfloat16 that torch knows
            half = str(x.dtype) == "torch.bfloat16"
            x = x.cpu()
            return np.asarray(x.float(), jnp.bfloat16) if half else np.asarray(x)
        except (TypeError, RuntimeError) as e:
            raise ValueError(
                f"{key!r} is a tensor of {x.dtype} ({x.layout}, on {x.device}) that "
                f"numpy cannot hold: expected a dense one in float32, float16 or "
                f"bfloat16 ({e})."
            ) from None

    return {str(key): array(key, x) for key, x in state_dict.items()}


Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def _sorted(arrays: Mapping[str, np.ndarray]) -> tuple[Factors, dict[str, np.ndarray]]:
    """(A, B) by module, and the biases by their own names; nothing is left over."""
    found: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    for key, x in arrays.items():
        module, _, name = key.rpartition(".")
        if name in ("lora_A", "lora_B"):
            found.setdefault(module, {})[name] = x
            if x.ndim != 2 or not x.size:
                raise ValueError(
                    f"{key!r} has shape {x.shape}: expected a matrix, as loralib's "
                    "layers have."
                )
        elif "bias" in name:
            others[key] = x
        else:
            raise ValueError(
                f"{key!r}: expected loralib's own names, which end in .lora_A, .lora_B "
                "or .bias. If it trained beside the adapter, take it out: "
                f"state = jlora.loralib.read(path); x = state.pop({key!r})."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{key!r} has dtype {x.dtype}: expected a floating-point one."
            )
    if not found:
        raise ValueError(
            "load: no lora_A in the state dict: expected what "
            f"loralib.lora_state_dict(model) gives, found {list(arrays)[:3]}."
        )
    for module, pair in found.items():
        if len(pair) == 1:
            (has,) = pair
            lacks = {"lora_A": "lora_B", "lora_B": "lora_A"}[has]
            raise ValueError(
                f"{_key(module, has)!r} is there without {_key(module, lacks)!r}: "
                "expected both. The file is not whole."
            )
    return {m: (pair["lora_A"], pair["lora_B"]) for m, pair in found.items()}, others


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Where the params keep what torch's modules have.

    Attributes:
      leaves: path to array of the params, or None where they are not known.
      plan: or None.
      rename: as in `load`.
    """

    leaves: Mapping[str, Any] | None
    plan: Plan | None
    rename: Callable[[str], str] | None

    @classmethod
    def of(cls, params: Any, plan: Plan | None, rename: Any) -> _Tree:
        leaves = None if params is None else leaves_of(params)
        if plan is not None:
            leaves = {path: _shape(*shape) for path, shape in plan.shapes.items()}
        return cls(leaves, plan, rename)

    def _place(self, module: str) -> str:
        return self.rename(module) if self.rename else module.replace(".", "/")

    def weight(self, module: str) -> str:
        """The path of a module's weight."""
        place = self._place(module)
        if self.leaves is None:
            return place if self.rename else _join(place, _WEIGHTS[0])
        found = self._found([place, *(_join(place, name) for name in _WEIGHTS)])
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"the weight of {module!r} could be any of {found}: say which with "
                "rename=, from the module's name to the weight's path."
            )
        raise ValueError(
            f"the file adapts the module {module!r}, but params have no weight "
            f"({', '.join(_WEIGHTS)}) in {place!r}; near paths: "
            f"{self._near(_join(place, _WEIGHTS[0]))}. Say where it is with rename=, "
            "from the module's name to the path, such as "
            "lambda m: 'params/' + m.replace('.', '/')."
        )

    def bias(self, key: str, x: np.ndarray, factors: Factors) -> tuple[str, np.ndarray]:
        """The path of a bias, and its value in the shape that it has there."""
        module, _, name = key.rpartition(".")
        # ConvLoRA keeps its convolution in a module of its own.
        outer, _, last = module.rpartition(".")
        if last == "conv" and outer in factors and module not in factors:
            module = outer
        place = self._place(module)
        if self.leaves is None:
            holder = place.rpartition("/")[0] if self.rename else place
            return _join(holder, name), x
        holder = place.rpartition("/")[0] if place in self.leaves else place
        names = _BIASES if name == "bias" else (name,)
        candidates = [_join(holder, name) for name in names]
        if self.plan is not None and module in factors:
            seen = self.plan[self.weight(module)].bias
            candidates = [seen, *candidates] if seen else candidates
        found = self._found(candidates)
        if not found:
            raise ValueError(
                f"the file has {key!r}, but params have no {candidates[0]!r}; near "
                f"paths: {self._near(candidates[0])}. Say with rename= where "
                f"{module!r} is, or take the key out of the state dict."
            )
        shape = tuple(self.leaves[found[0]].shape)
        if x.shape != shape and not (x.ndim == 1 and x.size == math.prod(shape)):
            raise ValueError(
                f"{key!r} has shape {x.shape}: expected {shape}, as {found[0]!r}."
            )
        return found[0], x.reshape(shape)

    def _found(self, paths: Sequence[str]) -> list[str]:
        return [path for path in paths if path in (self.leaves or ())]

    def _near(self, path: str) -> str:
        return _paths.near(path, self.leaves or ())


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def _shape(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Patterns:
    """A value for all paths, or one by pattern of which the first match wins."""

    name: str
    values: Mapping[Any, Any]
    everywhere: bool

    @classmethod
    def of(cls, name: str, said: Any) -> _Patterns:
        everywhere = not isinstance(said, Mapping)
        values = said
        if everywhere:
            values = {} if said is None else {"**": said}
        for value in values.values():
            flags = name == "enable_lora"
            good = (
                isinstance(value, (list, tuple))
                if flags
                else isinstance(value, numbers.Real) and math.isfinite(value)
            )
            if not good:
                expected = "one flag for each slice" if flags else "a number"
                raise ValueError(f"load: {name} {value!r}: expected {expected}.")
        return cls(name, values, everywhere)

    def find(self, path: str, x: Any) -> Any:
        return next(
            (v for p, v in self.values.items() if _paths.matches(p, path, x)), None
        )

    def check(self, leaves: Mapping[str, Any], kind: str) -> None:
        """Raises for a pattern that matches none of these leaves."""
        if self.values and not leaves:
            raise ValueError(
                f"{self.name}={self.values}: the file has no {kind} layer to which it "
                "could be said. Leave it out."
            )
        if not self.everywhere:
            _paths.check_matched(self.name, list(self.values), list(leaves.items()))


# -------------------------------------------------------------------------- the leaves


def _sizes(
    shape: tuple[int, ...], axes: str, rank: int, form: Form | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of lora_A and lora_B of such a leaf.

    Example:
      >>> _sizes((4, 6), "io", 2, Blocks((True, False, True)))
      ((4, 4), (4, 2))
    """
    a, b = factor_shapes(shape, axes, rank, form)
    blocks = isinstance(form, Blocks)
    k = a[0] if blocks else 1
    lora_a = k * a[-1], math.prod(a[blocks:-1])
    return lora_a, (k * math.prod(b[blocks + 1 :]), b[blocks])


def _leaf(
    shape: tuple[int, ...],
    spec: Spec,
    bias: str | None,
    a: np.ndarray,
    b: np.ndarray,
) -> LoRA:
    """The adapted leaf of factors that have the sizes of the spec."""
    to_a, to_b = factor_shapes(shape, spec.axes, spec.rank, spec.form)
    blocks = isinstance(spec.form, Blocks)
    k = to_a[0] if blocks else 1
    a = a.reshape(k, to_a[-1], -1).swapaxes(1, 2).reshape(to_a)
    b = b.reshape(k, -1, to_b[blocks]).swapaxes(1, 2).reshape(to_b)
    scale = jnp.full((), spec.alpha / spec.rank, jnp.float32)
    return LoRA(
        None,
        jnp.array(a),
        jnp.array(b),
        scale,
        roles=spec.axes,
        form=spec.form,
        bias=bias,
    )


def _planned(plan: Plan, path: str, a: np.ndarray, b: np.ndarray) -> Spec:
    """The spec that the plan has for the path, if the factors are of it."""
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


def _told_by_sizes(
    path: str,
    a: np.ndarray,
    b: np.ndarray,
    leaves: Mapping[str, Any],
    flags: _Patterns,
) -> Spec:
    """The spec that the sizes of weight and factors leave no doubt of."""
    shape = tuple(leaves[path].shape)
    holder, _, name = path.rpartition("/")
    found = list(_readings(name, shape, a, b))
    bias = next((p for n in _BIASES if (p := _join(holder, n)) in leaves), None)
    if len(found) > 1 and bias is not None:
        # The bias is as the out axes are.
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
    if isinstance(form, Blocks):
        said = flags.find(path, leaves[path])
        form = Blocks(_enabled(path, said, sum(form.enabled), len(form.enabled)))
    form = fitted(form, path, shape, spec.axes, spec.kind)
    return dataclasses.replace(spec, form=form)


def _readings(
    name: str, shape: tuple[int, ...], a: np.ndarray, b: np.ndarray
) -> Iterator[Spec]:
    """Every spec of which the factors could be, by their sizes.

    Of k of n slices the first k stand for whichever are enabled.
    """
    (rows, columns), (out_rows, rank) = a.shape, b.shape
    roles = ["i" * k + "o" * (len(shape) - k) for k in range(1, len(shape))]
    if name not in _IN_FIRST:
        roles = ["io", "oi"] if len(shape) == 2 else []
    for axes in roles:
        forms: list[tuple[Form | None, int]] = [(None, rows)]
        slices = rows // rank
        out = math.prod(n for n, role in zip(shape, axes, strict=True) if role == "o")
        if 0 < slices <= (n := out * slices // out_rows) and n > 1:
            flags = (True,) * slices + (False,) * (n - slices)
            forms.append((Blocks(flags), rank))
        if axes == "iiio" and shape[0] == shape[1]:
            groups = columns // max(shape[0] * shape[2], 1)
            # Of a kernel of one pixel in one group it is a plain product.
            if groups and shape[0] * groups > 1 and rows >= shape[0]:
                forms.append((Kernel(None, groups), rows // shape[0]))
        for form, r in forms:
            if _sizes(shape, axes, r, form) == (a.shape, b.shape):
                kind = "conv" if isinstance(form, Kernel) else "dense"
                yield Spec.of(kind, axes, r, form=form)


def _told_by_file(
    path: str, a: np.ndarray, b: np.ndarray, flags: _Patterns
) -> tuple[Any, Spec]:
    """(base, spec) where params are not known: of a (in, out) kernel."""
    (rows, columns), (out_rows, rank) = a.shape, b.shape
    slices, rest = divmod(rows, rank)
    if rest or not slices or out_rows % slices:
        raise ValueError(
            f"{path!r}: lora_A {a.shape} and lora_B {b.shape} do not fit each other: "
            "expected (r, in) and (out, r), or (k·r, in) and (k·out/n, r)."
        )
    said = flags.find(path, _shape(columns, out_rows))
    form = None
    n = 1
    if said is not None or slices > 1:
        form = Blocks(_enabled(path, said, slices, None))
        n = len(form.enabled)
    base = _shape(columns, out_rows // slices * n)
    return base, Spec.of("dense", "io", rank, form=form)


def _enabled(path: str, said: Any, k: int, n: int | None) -> tuple[bool, ...]:
    """The flags of a MergedLinear of which k slices (of n, if known) are enabled."""
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
