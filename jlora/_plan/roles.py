"""The roles of a weight's axes: from all its uses, and compared with others."""

from __future__ import annotations

from collections.abc import Sequence

from jlora._plan.seen import Use

_LOOKUPS = frozenset({"gather", "dynamic_slice"})


def merged(uses: Sequence[Use], ndim: int) -> tuple[str | None, str]:
    """(kind, roles) of a weight from all its uses; (None, reason) if it has none."""
    uses = [use.resolved() for use in uses]
    # A lookup decides which axes are in, else the first use does.  A later use may have
    # in and out swapped, as when tied embeddings give the logits.
    uses = sorted(uses, key=lambda u: u.primitive not in _LOOKUPS)
    swap = str.maketrans("io", "oi")
    merged: dict[int, str] = {}
    for use in uses:
        roles = use.roles
        both = {
            k: r for k, r in roles.items() if merged.get(k, "b") + r in ("io", "oi")
        }
        if both and use.primitive == "conv_general_dilated":
            # A convolution the other way round: in and out channels are swapped, but
            # the spatial axes are in axes both times.
            roles |= {k: merged[k] for k in both}
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
            # An axis that one use batches and another keeps is a batch axis; one that
            # another use contracts is an in axis.
            merged[k] = "i" if "i" in (known, role) else min(known, role)
    axes = "".join(merged.get(k, "b") for k in range(ndim))
    if "i" not in axes or "o" not in axes:
        return None, f"no matrix: its axes are all one role ({axes})"
    names = {u.primitive for u in uses}
    if names & _LOOKUPS:
        return "embed", axes
    return ("conv" if "conv_general_dilated" in names else "dense"), axes


def differ(told: str, seen: str, shape: Sequence[int], source: str) -> bool:
    """Whether roles that were told contradict those that were seen.

    An axis of size one has any role.  A rule may call an axis a batch axis that comes
    out: then the members of an ensemble do not share a.  An embedding may be used the
    other way round only, as by a tied head.

    Example:
      >>> differ("io", "oi", (3, 4), "name"), differ("bio", "oio", (2, 3, 4), "rule")
      (True, False)
    """
    pairs = {(t, s) for t, s, n in zip(told, seen, shape, strict=True) if n != 1}
    if source == "rule":
        pairs -= {("b", "o")}
    if source == "embedding" and all(
        t == "b" == s or {t, s} == {*"io"} for t, s in pairs
    ):
        return False
    return any(t != s for t, s in pairs)
