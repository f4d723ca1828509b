"""The rules of the house: where things live, and who may know of what.

Read from the source itself, with Python's own parser.
"""

import ast
import pathlib
import re
import tomllib

import pytest

import jlora
from jlora._lift import control as control  # the rules register themselves
from jlora._lift.evaluate import RULES
from jlora._plan.moves import MOVES
from jlora._plan.walk import STEPS

PACKAGE = pathlib.Path(jlora.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module(path):
    """``jlora._leaf.base`` from its file; a folder's ``__init__`` is the folder."""
    names = ["jlora", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module(path) for path in FILES}


def listed():
    """The modules in the order of CONTRIBUTING's list; a folder after its files."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```\njlora/\n(.*?)\ntests/", text, re.DOTALL)[1]
    out, folder = [], None
    for line in block.splitlines():
        indent, name = re.match(r"( +)(\S+)", line).groups()
        if folder and len(indent) == 4:
            out.append(folder)
            folder = None
        if name.endswith("/"):
            folder = f"jlora.{name[:-1]}"
        else:
            parent = folder if len(indent) > 4 else "jlora"
            out.append(f"{parent}.{name.removesuffix('.py')}")
    return [*out, *([folder] if folder else []), "jlora"]


def imported(tree):
    """The modules of jlora that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [x if x in MODULES else node.module for x in whole]
        else:
            continue
        yield from (x for x in found if x.split(".")[0] == "jlora")


def test_every_module_is_in_the_list():
    assert sorted(listed()) == sorted(MODULES)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_run_one_way(path):
    order = listed()
    below = [
        x for x in imported(TREES[path]) if order.index(x) > order.index(module(path))
    ]
    assert not below, f"{module(path)} imports {below}, which stand below it"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_private_names_stay_in_their_file(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jlora."):
            private = [a.name for a in node.names if a.name.startswith("_")]
            assert not private, f"{private} of {node.module}"


def names(node):
    """Every name and attribute that a node holds."""
    for x in ast.walk(node):
        if isinstance(x, ast.Name):
            yield x.id
        elif isinstance(x, ast.Attribute):
            yield x.attr


def test_what_differs_between_versions_is_in_compat():
    """Nothing else reaches for JAX's extension points, or names old primitives."""
    from jlora import _compat

    aliases = {"pjit", "remat2", "core_call", "copy_p", "all_gather_invariant", "pvary"}
    known = vars(_compat).values()
    assert aliases <= {x for group in known if isinstance(group, tuple) for x in group}
    for path, tree in TREES.items():
        if path.name == "_compat.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                of = getattr(node, "module", None) or ""
                whole = [f"{of}.{alias.name}".strip(".") for alias in node.names]
                own = ("jax._src", "jax.extend", "jax.interpreters", "jaxlib")
                assert not [x for x in whole if x.startswith(own)], path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in aliases, (path, node.value)


# Who may name a thing: its own files, and those whose subject it is.
KNOWN = {
    "Dropped": ["_leaf/base.py", "_fade.py", "__init__.py"],
    "Pending": ["_leaf/base.py"],
    "Quantized": ["_leaf/quantized.py", "_qwix.py"],
    "Blocks": ["_leaf/forms.py", "linen.py", "nnx.py", "loralib/"],
    "Kernel": ["_leaf/forms.py", "loralib/"],
    "Pair": ["_leaf/forms.py"],
}


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_else_knows_of(name):
    for path, tree in TREES.items():
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith(tuple(KNOWN[name])):
            assert name not in names(tree), f"{where} names {name}"


def test_nobody_asks_which_form_or_base_it_is():
    """isinstance of one of them is in its own file only."""
    kinds = {"Form", "Pair", "Blocks", "Kernel", "Base", "Dropped", "Pending"}
    kinds |= {"Quantized", "Row"}
    for path, tree in TREES.items():
        if path.name in ("forms.py", "base.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and "isinstance" in names(node.func):
                assert not kinds & {*names(node.args[1])}, (path, node.lineno)


# Primitives that a plan reads, and why the lift has no rule for them.
WITHOUT_A_RULE = {
    "select_n": "shows a mask; a weight under one has no low-rank form",
}


def test_rules_and_steps_are_of_the_same_primitives():
    """A primitive that the lift computes is one that a plan learns roles from."""
    rules, steps = {*RULES}, {*STEPS} | {*MOVES}
    assert not rules - steps
    assert steps - rules == {*WITHOUT_A_RULE}


def length(node):
    """Lines of a function, without its docstring and the functions that it holds."""
    first = node.body[0]
    docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    own = node.end_lineno - node.lineno + 1
    return own - (first.end_lineno - first.lineno + 1 if docstring else 0)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_functions_are_read_in_one_look(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            assert length(node) <= 60, f"{node.name} has {length(node)} lines"


def test_every_dependency_is_imported():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = [re.match(r"[\w-]+", x)[0] for x in said["dependencies"]]
    found = {
        x.split(".")[0]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for x in [getattr(node, "module", None) or node.names[0].name]
    }
    modules = {"orbax-checkpoint": "orbax"}
    assert {modules.get(name, name) for name in core} <= found
