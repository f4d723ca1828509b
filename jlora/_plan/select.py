"""The one place where patterns decide: what is adapted, and with what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from jlora._leaf.forms import AdaptsNothing
from jlora._plan.plan import Plan
from jlora._plan.spec import Rule, Spec, check_rank, fitted
from jlora._tree import paths
from jlora._tree.patterns import Pattern, as_patterns, check_matched, matches

# The spec of a weight whose roles are known; or the reason why a leaf has none; or None
# for a leaf that is not used as a weight, which is reported only if the user named it.
Candidate = Spec | str | None


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

    def spec(self, path: str, x: Any, found: Spec) -> Spec:
        """The spec of a weight, with the rank, alpha and form that it is to have."""
        rule = self.rule(path, x) or Rule("**")
        rank = self.rank if rule.rank is None else rule.rank
        alpha = rule.alpha
        # A rule that gives a rank alone means alpha = rank, not the default alpha.
        if alpha is None and rule.rank is None:
            alpha = self.alpha
        form = fitted(rule.form, path, tuple(x.shape), found.axes, found.kind)
        found = dataclasses.replace(found, form=form, lora_bias=rule.lora_bias)
        return found.with_scale(rank, alpha)


def select(
    leaves: Mapping[str, Any],
    candidate: Callable[[str, Any], Candidate],
    idle: str,
    others: Mapping[str, str],
    wanted: Wanted,
) -> Plan:
    """The plan of those candidates that are wanted.

    Args:
      leaves: path to array.
      candidate: the `Candidate` of a path and its array.
      idle: the reason to report for a named leaf whose candidate is None.
      others: paths that are adapted only if they are named.
      wanted: what the caller asked for.
    """
    pairs = list(leaves.items())
    wanted.check(pairs)
    specs: dict[str, Spec] = {}
    skipped: dict[str, str] = {}
    for path, x in pairs:
        named = wanted.named(path, x)
        if wanted.excluded(path, x) or (wanted.targets and not named):
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
        if not isinstance(found, Spec):
            if named or found:
                skipped[path] = found or idle
        elif found.kind == "embed" and not named:
            skipped[path] = "an embedding: adapted when named"
        else:
            try:
                specs[path] = wanted.spec(path, x, found)
            except AdaptsNothing as e:
                skipped[path] = str(e)
    if not specs:
        raise ValueError(_nothing(leaves, skipped))
    return Plan(specs, {path: tuple(x.shape) for path, x in pairs}, skipped)


def _nothing(leaves: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    why = "".join(f"\n  {path}: {reason}" for path, reason in skipped.items())
    return (
        "nothing to adapt: expected at least one dense, einsum or convolution "
        f"kernel among the {len(leaves)} arrays of the tree, found none"
        + (
            f"; matched, but skipped:{why}"
            if why
            else f" (it has {paths.near('kernel', leaves)}, …). Name targets or "
            "plan from a function: jlora.plan(fn, params, *args)."
        )
    )
