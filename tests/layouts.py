"""Models laid out as those of other libraries are, as test inputs.

Each has the names, the ranks and the products of the original and tiny sizes that keep
what could mislead: what is square there is square here, and heads times their size are
the width if they are so there. `jlora.plan` watches the use and so knows the roles;
`python tests/layouts.py` prints which of them `jlora.wrap` tells without a plan.
"""

import functools
import sys
import warnings

import equinox as eqx
import layouts_arrays as layouts_arrays  # each adds its models to the table
import layouts_equinox as layouts_equinox
import layouts_haiku as layouts_haiku
import layouts_keras as layouts_keras
import layouts_linen as layouts_linen
import layouts_nnx as layouts_nnx
from layouts_base import LAYOUTS, abstract, arrays
from layouts_base import Layout as Layout

import jlora


@functools.cache
def plan_of(case):
    fn, params, args = case.build()
    return jlora.plan(fn, arrays(params), *args, rank=8)


def told(case):
    """What `jlora.wrap` without a plan makes of a layout, beside the plan.

    Returns:
      "whole": it adapts the same paths with the same roles.  "other" and the paths that
      have other roles, or that the plan leaves alone.  "part" and the paths that it
      leaves alone.  Or "error" and the first line of it.
    """
    return compared(plan_of(case), case.build()[1])


def compared(plan, params):
    """What `told` returns, for params and their plan."""
    try:
        tree = jlora.wrap(abstract(params), rank=8)
    except (TypeError, ValueError) as error:
        return "error", [str(error).splitlines()[0]]
    found = {path: leaf.axes for path, leaf in jlora.adapter(tree).items()}
    wrong = [path for path, axes in found.items() if not same(axes, plan, path)]
    if wrong:
        seen = {path: spec.axes for path, spec in plan.items()}
        return "other", [f"{p}: {found[p]}, not {seen.get(p)}" for p in wrong]
    missing = [path for path in plan if path not in found]
    return ("part", missing) if missing else ("whole", [])


def same(axes, plan, path):
    """Whether the plan has these roles; those of axes of one element may differ."""
    if path not in plan:
        return False
    triples = zip(axes, plan[path].axes, plan.shapes[path], strict=True)
    return all(told == seen or size == 1 for told, seen, size in triples)


def refused(case, params):
    """Why the lifted function does not take the roles that wrap told; None if it does.

    It has to refuse those that its use contradicts.
    """
    fn, _, args = case.build()
    tree = jlora.wrap(abstract(params), rank=8)
    try:
        eqx.filter_eval_shape(jlora.lift(fn), tree, *args)
    except (TypeError, ValueError) as error:
        return str(error).splitlines()[0]


def show(name, plan, result, details, whole=False):
    """A row of the table, and what is not as the plan has it."""
    print(f"{name:38} {len(plan):3}  {result}")
    for line in details if whole else details[:3]:
        print(f"{'':44}{line if whole else line[:100]}")
    if whole:
        for path, spec in plan.items():
            print(f"    {path}  {plan.shapes[path]}  {spec.kind} {spec.axes}")


SAYS = {
    "whole": "all of the plan",
    "part": "{} of them; a warning lists the others",
    "other": "the first call raises: `plan=jlora.plan(fn, params, *args)`",
    "error": "`wrap` raises: `plan=jlora.plan(fn, params, *args)`",
}


def table():
    """The table of the documentation, in Markdown."""
    rows = []
    for case in LAYOUTS:
        result, details = told(case)
        weights = len(plan_of(case))
        words = SAYS[result].format(weights - len(details))
        rows.append(f"| {case.name} | {case.source} | {weights} | {words} |")
    head = "| model | laid out as | weights | `wrap(params, rank=8)` adapts |"
    return "\n".join([head, "|---|---|---|---|", *sorted(rows, key=str.lower), ""])


def main(words):
    """The table; of the layouts whose names hold one of the words, with the plans."""
    warnings.simplefilter("ignore")  # of what wrap leaves alone, which the table says
    if words == ["--markdown"]:
        print(table(), end="")
        return
    for case in LAYOUTS:
        if words and not any(word in case.name for word in words):
            continue
        params, plan = case.build()[1], plan_of(case)
        ways = {case.name: params}
        if arrays(params) is not params:
            ways[f"{case.name}, values"] = arrays(params)
        for name, params in ways.items():
            result, details = compared(plan, params)
            if result == "other":
                details.insert(0, f"lifted: {refused(case, params) or 'accepted'}")
            show(name, plan, result, details, whole=bool(words))


if __name__ == "__main__":
    main(sys.argv[1:])
