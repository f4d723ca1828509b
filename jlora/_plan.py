"""plan: which paths are adapted and with what, from a trace or from Flax's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp

from jlora import _paths, _uses
from jlora._leaf import (
    Blocks,
    Form,
    Kernel,
    bias_shape,
    factor_shapes,
    is_adapted,
)
from jlora._paths import Pattern
from jlora._trace import hide, is_array, trace


class _Unsaid(int):
    """A default rank, told apart from the same number said by the caller."""


RANK = _Unsaid(8)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the paths of a pattern get instead of the defaults; the first match wins.

    A rule also makes a target of what it matches, such as an embedding.

    Attributes:
      pattern: a glob, a compiled regular expression or (path, array) -> bool.
      rank: of these leaves; None for the default.
      alpha: of these leaves; None for the default, and for alpha = rank where only the
        rank is given.
      form: of these leaves; None for a·b, or one of `jlora.loralib`'s.
      lora_bias: whether these leaves have an output bias; None for what `wrap` says.

    Example:
      >>> import jlora
      >>> jlora.Rule("**/query/kernel", rank=16, alpha=32).rank
      16
    """

    pattern: Pattern
    rank: int | None = None
    alpha: float | None = None
    form: Form | None = None
    lora_bias: bool | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_rank(self.rank, f"Rule({self.pattern!r})")
        if self.lora_bias not in (None, True, False):
            raise TypeError(
                f"Rule({self.pattern!r}): lora_bias {self.lora_bias!r}: expected True, "
                "False or None."
            )


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one weight is adapted.

    Attributes:
      kind: "dense", "embed" or "conv".
      rank: r.
      alpha: the delta is alpha / rank * a·b.
      batch_axes, in_axes, out_axes: the weight's axes by role, counted from the end.
      bias: path of the bias that belongs to the weight, or None: the array that was
        seen to be added to its product; where the product was lost sight of before, or
        nothing was watched, the array named ``bias`` or ``b`` beside the weight.
      form: of the adapted leaf, as in `Rule`.
      lora_bias: likewise.
    """

    kind: str
    rank: int
    alpha: float
    batch_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    bias: str | None = None
    form: Form | None = None
    lora_bias: bool | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        axes: str,
        rank: int,
        alpha: float | None = None,
        bias: str | None = None,
        form: Form | None = None,
        lora_bias: bool | None = None,
    ) -> Spec:
        """A spec from one letter an axis, e.g. ``"bio"``; alpha=None for the rank."""
        batch, in_, out = (
            tuple(k - len(axes) for k, c in enumerate(axes) if c == role)
            for role in "bio"
        )
        if isinstance(alpha, (str, bool)):
            raise TypeError(f"alpha {alpha!r}: expected a number or None.")
        alpha = float(rank if alpha is None else alpha)
        return cls(kind, int(rank), alpha, batch, in_, out, bias, form, lora_bias)

    @property
    def axes(self) -> str:
        """The roles as one letter an axis, e.g. ``"bio"``."""
        role = dict.fromkeys(self.batch_axes, "b") | dict.fromkeys(self.in_axes, "i")
        role |= dict.fromkeys(self.out_axes, "o")
        return "".join(role[k] for k in range(-len(role), 0))

    def size(self, shape: Sequence[int]) -> int:
        """Parameters of the adapter of a weight of this shape."""
        a, b = factor_shapes(tuple(shape), self.axes, self.rank, self.form)
        c = bias_shape(tuple(shape), self.axes)
        return math.prod(a) + math.prod(b) + bool(self.lora_bias) * math.prod(c)


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Mapping[str, Spec]):
    """A mapping from path to `Spec`; ``print(plan)`` is a table.

    Attributes:
      specs: the specs, in the order of the tree.
      shapes: the shape of every array of the tree that it was planned for.
      skipped: path to reason, for what was matched and is no weight.
      unsaid: the paths whose alpha is the rank because none was given.
    """

    specs: Mapping[str, Spec]
    shapes: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsaid: frozenset[str] = frozenset()

    def __getitem__(self, path: str) -> Spec:
        return self.specs[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __str__(self) -> str:
        rows = [
            (
                path,
                "×".join(map(str, self.shapes[path])),
                s.kind if s.form is None else f"{s.kind}, {s.form}",
                s.axes,
                str(s.rank),
                f"{s.alpha:g}",
                "" if s.bias is None else _paths.relative(s.bias, path),
                f"{s.size(self.shapes[path]):,}",
            )
            for path, s in self.items()
        ]
        adapters = sum(s.size(self.shapes[path]) for path, s in self.items())
        base = sum(math.prod(shape) for shape in self.shapes.values())
        lines = [
            table(
                (
                    *("path", "shape", "kind", "roles", "rank", "alpha", "bias"),
                    "parameters",
                ),
                rows,
            ),
            f"{len(self)} adapted lea{'f' if len(self) == 1 else 'ves'}, "
            f"{adapters:,} adapter parameters, "
            f"{100 * adapters / max(base, 1):.3g} % of the base's {base:,}",
        ]
        if self.skipped:
            lines.append("skipped:")
            lines += [f"  {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join(lines)

    __repr__ = __str__


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text columns; numbers are set to the right."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [
        all(r[k].replace(",", "").replace(".", "").isdigit() for r in rows[1:])
        for k in range(len(header))
    ]
    lines = [
        "  ".join(
            c.rjust(w) if r else c.ljust(w)
            for c, w, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def check_rank(rank: Any, where: str) -> None:
    """Raises unless rank is a positive int."""
    if isinstance(rank, Plan):
        raise TypeError(
            f"{where}: a plan goes in by keyword, plan=plan, found it as rank."
        )
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1:
        raise ValueError(
            f"{where}: rank {rank!r}: expected a positive integer, found "
            f"{type(rank).__name__} {rank!r}; to leave a weight as it is, exclude its "
            "path."
        )


def fitted(
    form: Form | None, where: str, shape: tuple[int, ...], axes: str, kind: str
) -> Form | None:
    """The form with all that it takes from the weight; raises where it does not fit."""

    def refuse(expected: str) -> NoReturn:
        raise ValueError(
            f"{where}: {form} does not fit a {kind} weight of shape {shape} and roles "
            f"{axes!r}: expected {expected}."
        )

    if form is not None and not isinstance(form, (Blocks, Kernel)):
        raise TypeError(
            f"{where}: form {form!r}: expected one such as "
            "jlora.loralib.Blocks((True, False, True)) or jlora.loralib.Kernel()."
        )
    if isinstance(form, Blocks):
        if not all(flag in (False, True) for flag in form.enabled):
            refuse("flags, True or False")
        if not form.enabled or "o" not in axes:
            refuse("one flag for each slice of the first out axis")
        size = shape[axes.index("o")]
        if size % len(form.enabled):
            refuse(f"a number of flags that divides {size}, its first out axis")
    if isinstance(form, Kernel):
        if kind != "conv" or axes.lstrip("b") != "iiio" or shape[-4] != shape[-3]:
            refuse("a 2-D convolution with a square kernel, (k, k, in/groups, out)")
        if form.groups < 1 or shape[-1] % form.groups:
            refuse(f"a number of groups that divides {shape[-1]}, its outputs")
        return dataclasses.replace(form, shape=shape[-4:])
    return form


def einsum_axes(text: str, ndim: int) -> str:
    """The roles of the second operand of an einsum, one letter an axis.

    Example:
      >>> einsum_axes("...ti,...io->...to", 3), einsum_axes("btd,dhk->bthk", 3)
      ('bio', 'ioo')
    """
    operands, out = text.replace(" ", "").split("->")
    x, w = operands.split(",")
    rest = ndim - len(w.replace("...", ""))

    def role(c: str) -> str:
        return ("b" if c in x else "o") if c in out else "i"

    # What stands for the ellipsis has its axes; \0 is no letter of an einsum.
    named = w.replace("...", "\0" * rest)
    return "".join(role("..." if c == "\0" else c) for c in named)


# A candidate is a weight with known roles, or the words for why it is none.
# None is for what is no weight at all, which is only told where it was named.
Candidate = tuple[str, str, str | None] | str | None  # (kind, roles, bias) or reason


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
    nothing allocated, and every argument may hold ``jax.ShapeDtypeStruct``s.  What a
    product contracts are a weight's in axes, what it batches or a scan slices are
    batch axes, and the rest are out axes.

    Args:
      fn: the function whose first argument is ``params``, such as ``model.apply``.
      params: the tree that `wrap` will be given.
      *args: the other arguments of ``fn``.
      **kwargs: and its keyword arguments.
      rank: r of every adapter that no rule names.
      alpha: None for alpha = rank, a scale of 1.
      targets: patterns of the paths to adapt: globs over the whole path (``*`` within
        one key, ``**`` for any number of keys), compiled regular expressions (full
        match), or callables (path, array) -> bool.  None for every dense, einsum and
        convolution kernel; embeddings are adapted when named.
      exclude: patterns of paths that stay as they are.
      rules: `Rule`s, the first match wins.

    Returns:
      A `Plan`; print it to see what will be adapted before a step is run.

    Raises:
      ValueError: a bad rank; a pattern that matches no path (with the paths near it);
        a target that is integer or complex, or that is used in ways that contradict
        each other; or nothing left to adapt.
      TypeError: train or bias patterns, which are said to `wrap`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> f = lambda p, x: jnp.einsum("bi,hio->bho", x, p["w"])
      >>> jlora.plan(f, {"w": jnp.ones((2, 3, 4))}, jnp.ones((5, 3)))["w"].in_axes
      (-2,)
    """
    hidden = hide(((params, *args), kwargs))

    for name in ("train", "bias", "lora_bias"):
        said = kwargs.get(name)
        if _paths.are_patterns(said) or (name == "lora_bias" and said is not None):
            raise TypeError(
                f"plan: {name}={kwargs[name]!r} would go to the function as an "
                f"argument: expected it in jlora.wrap(params, plan=plan, {name}=...)."
            )
    leaves = leaves_of(params)
    jaxpr, _ = trace(fn, *hidden)
    paths: list[str | None] = [p for p, _ in _paths.flatten(hidden[0][0])[0]]
    paths += [None] * (len(jaxpr.jaxpr.invars) - len(paths))
    seen = _uses.watch(jaxpr, paths)

    def candidate(path: str, x: Any) -> Candidate:
        if path not in seen or not seen[path].uses:
            return None
        kind, axes = _merged_roles(seen[path].uses, x.ndim)
        if kind is None:
            return axes
        bias = seen[path].bias
        if bias is None:  # by its name, where the product was lost sight of before
            beside = sibling_bias(path, leaves)
            if beside in seen and seen[beside].may_be_bias_of(path):
                bias = beside
        return kind, axes, bias if bias in seen and seen[bias].idle else None

    idle = "not used as a weight (no product, convolution or lookup)"
    others = _paths.others(params)
    return _select(
        leaves, candidate, idle, others, rank, alpha, targets, exclude, rules
    )


def plan_from_names(
    params: Any,
    *,
    rank: int,
    alpha: float | None,
    targets: Any,
    exclude: Any,
    rules: Iterable[Rule],
) -> Plan:
    """The plan that Flax's naming conventions give where they leave no doubt."""
    leaves = leaves_of(params)
    rules = list(rules)
    # Only what would be adapted has to be clear.
    named = [*_paths.as_patterns(targets), *(r.pattern for r in rules)]

    def candidate(path: str, x: Any) -> Candidate:
        bias = sibling_bias(path, leaves)
        *_, parent, name = ("", "", *path.split("/"))

        def fits(out: int) -> bool:
            """The bias, if there is one, has the last ``out`` axes: no stack."""
            return bias is None or tuple(leaves[bias].shape) == tuple(x.shape[-out:])

        if name == "embedding" and x.ndim == 2:
            return "embed", "io", bias
        if name in ("kernel", "w") and x.ndim == 2:
            return "dense", "io", bias
        if name == "kernel" and x.ndim == 3 and parent in ("query", "key", "value"):
            if fits(2):
                return "dense", "ioo", bias
        elif name == "kernel" and x.ndim == 3 and parent == "out":
            if fits(1):
                return "dense", "iio", bias
        elif name == "kernel" and parent.startswith("Conv_") and 3 <= x.ndim <= 5:
            if fits(1):
                return "conv", "i" * (x.ndim - 1) + "o", bias
        explicit = any(_paths.matches(p, path, x) for p in named)
        if (name in ("kernel", "w") and x.ndim > 2) or (explicit and x.ndim > 1):
            if explicit and x.ndim == 2 and name not in ("bias", "scale"):
                return "dense", "io", bias
            raise ValueError(
                f"{path!r} of shape {tuple(x.shape)}: its roles (which axes are "
                "contracted, which come out, which are a stack of layers) cannot be "
                "told from its name and shape. Let jlora watch it being used: "
                "jlora.wrap(params, plan=jlora.plan(fn, params, *args)); or exclude it."
            )
        return None

    idle = "no dense, einsum or convolution kernel by Flax's names"
    others = _paths.others(params)
    return _select(
        leaves, candidate, idle, others, rank, alpha, targets, exclude, rules
    )


def leaves_of(params: Any) -> dict[str, Any]:
    """Path to array, without what is no array; refuses trees adapted or empty."""
    pairs, _ = _paths.flatten(params)
    out: dict[str, Any] = {}
    for path, x in pairs:
        if is_adapted(x):
            raise ValueError(
                f"{path!r} is adapted already: expected a plain params tree, found "
                f"{x!r}. Merge or unwrap the tree first (jlora.merge, jlora.unwrap)."
            )
        if path in out:
            raise ValueError(
                f"two leaves have the path {path!r}: an adapter could not tell them "
                "apart. Rename one of them (a key may not hold '/')."
            )
        if is_array(x):
            out[path] = x
        elif hasattr(x, "shape") and hasattr(x, "dtype"):
            raise TypeError(
                f"{path!r} is a {type(x).__name__}: expected an array. Pass the arrays "
                "that it stands for, as variable.value is in Keras."
            )
    if not out:
        found = ", ".join(sorted({type(x).__name__ for _, x in pairs}))
        raise ValueError(
            "nothing to adapt: expected a tree of arrays, found "
            + (f"no array, only {found}" if found else "an empty tree")
            + ". Initialise or build the model first (one of Keras has no variables "
            "before), and pass its arrays: {v.path: v.value for v in "
            "model.trainable_variables} in Keras, the params elsewhere."
        )
    seen = _paths.variables(params)
    if len({*map(id, seen)}) < len(seen):
        raise ValueError(
            "a variable stands in two places of the module: expected it in one, since "
            "it would get two adapters. Split the module, whose state has it once: "
            "graph, state = nnx.split(module)."
        )
    return out


def sibling_bias(path: str, leaves: Mapping[str, Any]) -> str | None:
    """The path of the bias that stands beside a weight, by its name."""
    parent = path.rpartition("/")[0]
    siblings = (f"{parent}/{name}" if parent else name for name in ("bias", "b"))
    return next((s for s in siblings if s in leaves and s != path), None)


def _merged_roles(uses: Sequence[_uses.Use], ndim: int) -> tuple[str | None, str]:
    """(kind, roles) of a weight from all its uses, or (None, why there are none)."""
    uses = [use.resolved() for use in uses]
    # A lookup or the first use decides which side is in; a later use may swap them.
    lookups = {"gather", "dynamic_slice"}
    uses = sorted(uses, key=lambda u: u.primitive not in lookups)
    swap = str.maketrans("io", "oi")
    merged: dict[int, str] = {}
    for use in uses:
        roles = use.roles
        both = {
            k: r for k, r in roles.items() if merged.get(k, "b") + r in ("io", "oi")
        }
        if both and use.primitive == "conv_general_dilated":
            roles |= {k: merged[k] for k in both}  # from its outputs to its inputs
        elif both:
            roles = {k: r.translate(swap) for k, r in roles.items()}
        for k, role in roles.items():
            known = merged.setdefault(k, role)
            if {known, role} == {"i", "o"}:
                return None, (
                    "used in ways that contradict each other: axis "
                    f"{k - ndim} is contracted in one and kept in another "
                    f"({', '.join(u.primitive for u in uses)})"
                )
            # A batch axis may be kept as well; only an in axis may be summed over.
            merged[k] = "i" if "i" in (known, role) else min(known, role)
    axes = "".join(merged.get(k, "b") for k in range(ndim))
    if "i" not in axes or "o" not in axes:
        return None, f"no matrix: its axes are all one role ({axes})"
    names = {u.primitive for u in uses}
    if names & lookups:
        return "embed", axes
    return ("conv" if "conv_general_dilated" in names else "dense"), axes


def _select(
    leaves: Mapping[str, Any],
    candidate: Callable[[str, Any], Candidate],
    idle: str,
    others: Mapping[str, str],
    rank: int,
    alpha: float | None,
    targets: Any,
    exclude: Any,
    rules: Iterable[Rule],
) -> Plan:
    """The one place where patterns decide: what is adapted, and with what."""
    check_rank(rank, "rank")
    rules = list(rules)
    target_patterns = _paths.as_patterns(targets)
    exclude_patterns = _paths.as_patterns(exclude)
    pairs = list(leaves.items())
    _paths.check_matched("target", target_patterns, pairs)
    _paths.check_matched("exclude", exclude_patterns, pairs)
    _paths.check_matched("rule", [r.pattern for r in rules], pairs)

    specs, skipped, unsaid = {}, {}, set()
    for path, x in pairs:
        if any(_paths.matches(p, path, x) for p in exclude_patterns):
            continue
        rule = next((r for r in rules if _paths.matches(r.pattern, path, x)), None)
        named = rule is not None or any(
            _paths.matches(p, path, x) for p in target_patterns
        )
        if target_patterns and not named:
            continue
        if not jnp.issubdtype(x.dtype, jnp.floating):
            if named:
                raise ValueError(
                    f"{path!r} is a target, but its dtype is {x.dtype}: expected a "
                    "floating-point weight. Exclude the path, or quantised weights' "
                    "own arrays."
                )
            continue
        if path in others and not named:
            continue
        found = candidate(path, x)
        if found is None or isinstance(found, str):
            if named or found:
                skipped[path] = found or idle
            continue
        kind, axes, bias = found
        if kind == "embed" and not named:
            skipped[path] = "an embedding: adapted when named"
            continue
        r = rule.rank if rule and rule.rank is not None else rank
        given = (
            rule.alpha
            if rule and rule.alpha is not None
            else (None if rule and rule.rank is not None else alpha)
        )
        form = fitted(rule.form, path, tuple(x.shape), axes, kind) if rule else None
        if isinstance(form, Blocks) and not any(form.enabled):
            skipped[path] = "no slice of it is enabled"
            continue
        own_bias = rule.lora_bias if rule else None
        specs[path] = Spec.of(kind, axes, r, given, bias, form, own_bias)
        if given is None:
            unsaid.add(path)
    if not specs:
        why = "".join(f"\n  {path}: {reason}" for path, reason in skipped.items())
        raise ValueError(
            "nothing to adapt: expected at least one dense, einsum or convolution "
            f"kernel among the {len(leaves)} arrays of the tree, found none"
            + (
                f"; matched, but skipped:{why}"
                if why
                else f" (it has {_paths.near('kernel', leaves)}, …). Name targets or "
                "plan from a function: jlora.plan(fn, params, *args)."
            )
        )
    shapes = {path: tuple(x.shape) for path, x in pairs}
    return Plan(specs, shapes, skipped, frozenset(unsaid))
