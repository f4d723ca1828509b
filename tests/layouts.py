"""Models laid out as those of other libraries are, as test inputs.

Each has the names, the ranks and the products of the original and tiny sizes that keep
what could mislead: what is square there is square here, and heads times their size are
the width if they are so there. `jlora.plan` watches the use and so knows the roles;
`python tests/layouts.py` prints which of them `jlora.wrap` tells without a plan.
"""

import functools
import sys

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
    seen = {path: spec.axes for path, spec in plan.items()}
    wrong = {path: axes for path, axes in found.items() if axes != seen.get(path)}
    if wrong:
        return "other", [f"{p}: {a}, not {seen.get(p)}" for p, a in wrong.items()]
    missing = [path for path in plan if path not in found]
    return ("part", missing) if missing else ("whole", [])


def show(name, plan, result, details, whole=False):
    """A row of the table, and what is not as the plan has it."""
    print(f"{name:38} {len(plan):3}  {result}")
    for line in details if whole else details[:3]:
        print(f"{'':44}{line if whole else line[:100]}")
    if whole:
        for path, spec in plan.items():
            print(f"    {path}  {plan.shapes[path]}  {spec.kind} {spec.axes}")


def main(words):
    """The table; of the layouts whose names hold one of the words, with the plans."""
    for case in LAYOUTS:
        if words and not any(word in case.name for word in words):
            continue
        params, plan = case.build()[1], plan_of(case)
        show(case.name, plan, *compared(plan, params), whole=bool(words))
        if arrays(params) is not params:
            name = f"{case.name}, values"
            show(name, plan, *compared(plan, arrays(params)), whole=bool(words))


if __name__ == "__main__":
    main(sys.argv[1:])
