"""Plan: a mapping from path to Spec, and how it is printed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jlora._plan.spec import Spec
from jlora._printed import Printed
from jlora._tree import paths


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Printed, Mapping[str, Spec]):
    """A mapping from path to `Spec`; ``print(plan)`` is a table.

    Attributes:
      specs: path to spec, in the order of the tree.  Here a rank or alpha that the user
        did not give is None; ``plan[path]`` has the default instead.
      shapes: path to shape, for every array of the tree that was planned.
      skipped: path to reason, for leaves that matched but are not adapted.
    """

    specs: Mapping[str, Spec]
    shapes: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> Spec:
        return self.specs[path].resolved()

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __str__(self) -> str:
        header = "path shape kind roles rank alpha bias parameters".split()
        rows = [
            (
                path,
                "×".join(map(str, self.shapes[path])),
                ", ".join(filter(None, [s.kind, str(s.form or ""), s.variant])),
                s.axes,
                str(s.rank),
                f"{s.alpha:g}",
                "" if s.bias is None else paths.relative(s.bias, path),
                f"{s.size(self.shapes[path]):,}",
            )
            for path, s in self.items()
        ]
        adapters = sum(s.size(self.shapes[path]) for path, s in self.items())
        base = sum(math.prod(shape) for shape in self.shapes.values())
        lines = [
            table(header, rows),
            f"{len(self)} adapted lea{'f' if len(self) == 1 else 'ves'}, "
            f"{adapters:,} adapter parameters, "
            f"{100 * adapters / max(base, 1):.3g} % of the base's {base:,}",
        ]
        lines += oversized(
            (path, s.size(self.shapes[path]), math.prod(self.shapes[path]))
            for path, s in self.items()
        )
        if self.skipped:
            lines.append("skipped:")
            lines += [f"  {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join(lines)


def check(
    plan: Plan,
    leaves: Mapping[str, Any],
    what: str,
    targets: Any = None,
    exclude: Any = (),
    rules: Any = (),
) -> None:
    """Raises for a plan of another tree, or for what a plan has decided already.

    Args:
      plan: a plan that the user passed.
      leaves: the arrays of the tree that it is to be used on, by path.
      what: the function that it was passed to.
      targets: what else the user passed; as in `jlora.plan`.
      exclude: likewise.
      rules: likewise.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"{what}: plan is a {type(plan).__name__}: expected the result of "
            "jlora.plan(fn, params, *args)."
        )
    if targets is not None or exclude or rules:
        raise ValueError(
            f"{what}: targets, exclude and rules are passed to jlora.plan(...), which "
            "decides them: expected none beside plan=."
        )
    for path in plan:
        if path not in leaves:
            raise ValueError(
                f"{what}: the plan is of another tree: it has {path!r}, params has "
                f"{paths.near(path, leaves)}. Pass {what} the same tree as plan "
                "(model.apply takes {'params': params}: pass that here, too)."
            )
        if (found := tuple(leaves[path].shape)) != plan.shapes[path]:
            raise ValueError(
                f"{what}: the plan is of another tree: {path!r} has shape "
                f"{plan.shapes[path]} in the plan and {found} in params. Plan the tree "
                "that it is used on."
            )


_SHOWN = 4  # of the paths in a line below a table


def listed(items: Sequence[str]) -> str:
    """The first of the items, and how many more there are."""
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def oversized(sizes: Iterable[tuple[str, int, int]]) -> list[str]:
    """A line on the adapters with at least as many parameters as their weights.

    Args:
      sizes: path, parameters of the adapter, and parameters of the weight.
    """
    large = [f"{path} {n:,} of {of:,}" for path, n, of in sizes if n >= of]
    if not large:
        return []
    return [
        f"adapters with no fewer parameters than their weights: {listed(large)}: lower "
        "the rank, exclude them, or train them whole (train=)"
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in columns; columns of numbers are aligned to the right."""
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
