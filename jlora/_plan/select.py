"""The one place where patterns decide: what is adapted, and with what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jlora._leaf.forms import AdaptsNothing
from jlora._plan.plan import Plan
from jlora._plan.roles import differ
from jlora._plan.spec import Rule, Spec, check_rank, fitted
from jlora._tree import paths
from jlora._tree.patterns import Pattern, as_patterns, check_matched, matches

# The spec of a weight whose roles are known; or the reason why a leaf has none; or None
# for a leaf that is not used as a weight, which is reported only if the user named it.
Candidate = Spec | str | None
# The reason that is an error: it is a weight, but nothing tells its roles.
UNTOLD = "its roles are not known"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the caller of `plan` or `wrap` asked for.

    Attributes:
      rank: the rank if no rule gives another; None if the user did not give it.
      alpha: likewise.
      targets: patterns of what is adapted; empty for every kernel.
      exclude: patterns of what is not adapted.
      rules: ranks, alphas and forms by pattern.
    """

    rank: int | None
    alpha: float | None
    targets: list[Pattern]
    exclude: list[Pattern]
    rules: list[Rule]

    @classmethod
    def of(
        cls, rank: Any, alpha: Any, targets: Any, exclude: Any, rules: Iterable[Rule]
    ) -> Wanted:
        """From the arguments of `plan` or `wrap`."""
        rank = check_rank(rank, "rank")
        patterns = as_patterns(targets), as_patterns(exclude)
        return cls(rank, alpha, *patterns, list(rules))

    def check(self, leaves: list[tuple[str, Any]]) -> None:
        """Raises for each pattern that matches no path."""
        check_matched("target", self.targets, leaves)
        check_matched("exclude", self.exclude, leaves)
        check_matched("rule", [r.pattern for r in self.rules], leaves)

    def excluded(self, path: str, x: Any) -> bool:
        """Whether the leaf is excluded, even if a target or a rule names it."""
        return any(matches(p, path, x) for p in self.exclude)

    def rule(self, path: str, x: Any) -> Rule | None:
        """The first rule that matches."""
        return next((r for r in self.rules if matches(r.pattern, path, x)), None)

    def named(self, path: str, x: Any) -> bool:
        """Whether a target or a rule names the leaf."""
        patterns = [*self.targets, *(r.pattern for r in self.rules)]
        return any(matches(p, path, x) for p in patterns)

    def with_axes(self, path: str, x: Any, found: Candidate) -> Candidate:
        """What was found, with the roles that a rule gives, if one does.

        Raises:
          ValueError: the rule does not have a letter for each axis, or other roles than
            were seen.
        """
        rule = self.rule(path, x)
        if rule is None or rule.axes is None or found is None:
            return found
        where = f"Rule({rule.pattern!r}, axes={rule.axes!r}): {path!r} of shape "
        if len(rule.axes) != x.ndim:
            raise ValueError(
                f"{where}{tuple(x.shape)} has {x.ndim} axes: expected as many."
            )
        if not isinstance(found, Spec):
            return Spec.of("dense", rule.axes, told="rule")
        if not found.told and differ(rule.axes, found.axes, x.shape, "rule"):
            raise ValueError(
                f"{where}{tuple(x.shape)} is used with the roles {found.axes!r}: "
                "expected these, or b for an axis that comes out (o)."
            )
        told = "rule" if found.told else ""
        own = Spec.of(found.kind, rule.axes, bias=found.bias, told=told)
        return dataclasses.replace(own, groups=found.groups, tied=found.tied)

    def spec(self, path: str, x: Any, found: Spec) -> Spec:
        """The spec of a weight, with the rank, alpha and form that it is to have."""
        rule = self.rule(path, x) or Rule("**")
        rank = self.rank if rule.rank is None else rule.rank
        alpha = rule.alpha
        # A rule that gives a rank alone means alpha = rank, not the default alpha.
        if alpha is None and rule.rank is None:
            alpha = self.alpha
        form = fitted(rule.form, path, tuple(x.shape), found.axes, found.kind)
        found = dataclasses.replace(found, form=form).with_options(rule)
        return found.with_scale(rank, alpha)


_SHOWN = 8  # of the leaves that an error lists


def select(
    leaves: Mapping[str, Any],
    candidate: Callable[[str, Any], Candidate],
    idle: str,
    others: Mapping[str, str],
    wanted: Wanted,
    decoded: Callable[[str], bool] = lambda path: False,
) -> Plan:
    """The plan of those candidates that are wanted.

    Args:
      leaves: path to array.
      candidate: the `Candidate` of a path and its array.
      idle: the reason to report for a named leaf whose candidate is None.
      others: paths that are adapted only if they are named.
      wanted: what the caller asked for.
      decoded: whether the function makes floating-point numbers of an integer leaf,
        with a scale, before every use.
    """
    pairs = list(leaves.items())
    wanted.check(pairs)
    specs: dict[str, Spec] = {}
    skipped: dict[str, str] = {}
    untold: list[str] = []
    for path, x in pairs:
        named = wanted.named(path, x)
        if wanted.excluded(path, x) or (wanted.targets and not named):
            continue
        floating = jnp.issubdtype(x.dtype, jnp.floating) or (
            jnp.issubdtype(x.dtype, jnp.integer)
            and x.dtype.itemsize == 1
            and decoded(path)
        )
        if not floating and named:
            raise ValueError(
                f"{path!r} is a target, but its dtype is {x.dtype}: expected a "
                "floating-point weight, or one that the function dequantises itself. "
                "Plan such a weight from the function; or exclude the path."
            )
        if path in others and not named:
            continue
        found = wanted.with_axes(path, x, candidate(path, x))
        if not floating:
            if isinstance(found, Spec):
                skipped[path] = (
                    f"its dtype is {x.dtype}: only floating-point weights are adapted, "
                    "and codes of 8 bits that the function multiplies by a scale; pass "
                    "the params with this weight dequantised"
                )
        elif found == UNTOLD:
            untold.append(path)
        elif not isinstance(found, Spec):
            if named or found:
                skipped[path] = found or idle
        elif found.kind == "embed" and not named:
            skipped[path] = (
                f"an embedding: adapted when named, as by rules=[jlora.Rule({path!r})]"
            )
        else:
            try:
                specs[path] = wanted.spec(path, x, found)
            except AdaptsNothing as e:
                skipped[path] = str(e)
    if untold:
        raise ValueError(_untold(leaves, untold))
    if not specs:
        raise ValueError(_nothing(leaves, skipped))
    return Plan(specs, {path: tuple(x.shape) for path, x in pairs}, skipped)


def _untold(leaves: Mapping[str, Any], untold: Sequence[str]) -> str:
    first, *rest = untold
    others = ", ".join(f"{p!r} {tuple(leaves[p].shape)}" for p in rest[:4])
    others = f"; nor those of {others}" if rest else ""
    others += f" and {len(rest) - 4} more" if len(rest) > 4 else ""
    return (
        f"{first!r} of shape {tuple(leaves[first].shape)}: its roles (which axes are "
        "contracted, which come out, which are a stack of layers) cannot be told from "
        f"its layer's class, its name or its shape{others}. Let jlora watch it being "
        "used: jlora.wrap(params, plan=jlora.plan(fn, params, *args)); or say the "
        'roles: jlora.Rule(path, axes="bio"); or exclude it.'
    )


def _nothing(leaves: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    some = [f"\n  {path}: {reason}" for path, reason in skipped.items()][:_SHOWN]
    more = len(skipped) - len(some)
    why = "".join(some) + (f"\n  and {more} more" if more else "")
    return (
        "nothing to adapt: expected at least one dense, einsum or convolution "
        f"kernel among the {len(leaves)} arrays of the tree, found none"
        + (
            f"; matched, but skipped:{why}\n"
            if why
            else f" (it has {paths.near('kernel', leaves)}, …). "
        )
        + "Name targets or plan from a function: "
        "jlora.wrap(params, plan=jlora.plan(fn, params, *args))."
    )
