"""The documentation, as far as that is cheap: `make docs` builds it and runs its cells.

Here the API pages have every public name, the cells are linted as notebooks and use
names and keywords that exist, the messages of the page on errors are those of the
library, and links from the README lead somewhere.
"""

import ast
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

import jlora

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = pathlib.Path(jlora.__file__).parent
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
CELL = re.compile(r"(?ms)^```\{code-cell\}[^\n]*\n(.*?)^```$")


def page(path):
    return path.relative_to(DOCS).as_posix()


def cells(path):
    """The code cells of a page, without their options."""
    found = CELL.findall(path.read_text(encoding="utf-8"))
    return [re.sub(r"\A(:.*\n)+\n*", "", code) for code in found]


NOTEBOOKS = [path for path in PAGES if cells(path)]

# ----------------------------------------------------------------- the API pages


def public():
    """The public names of jlora and of its public submodules, from their sources.

    They are the classes and functions that a module defines without an underscore, and
    what it imports ``as`` itself.
    """
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py")]:
        names = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if names[-1] == "__init__":
            names.pop()
        if any(name.startswith("_") for name in names):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = []
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found = [node.name]
            elif isinstance(node, ast.ImportFrom):
                found = [x.name for x in node.names if x.asname == x.name]
            yield from (".".join([*names, x]) for x in found if not x.startswith("_"))


def test_the_api_pages_have_every_public_name():
    modules = {f"jlora.{p.stem}" for p in (DOCS / "api").glob("*.md")} | {"jlora"}
    directive = re.compile(r"^\.\. auto(?:function|class|exception):: ([\w.]+)", re.M)
    documented = [
        name
        for path in (DOCS / "api").glob("*.md")
        for name in directive.findall(path.read_text(encoding="utf-8"))
    ]
    assert sorted(documented) == sorted({*public()} - modules)


# ----------------------------------------------------------------------- the cells


def test_cells_are_linted_as_notebooks(tmp_path):
    for path in NOTEBOOKS:
        code = [
            {
                "cell_type": "code",
                "execution_count": None,
                "id": f"c{i}",
                "metadata": {},
                "outputs": [],
                "source": source.rstrip("\n"),
            }
            for i, source in enumerate(cells(path))
        ]
        notebook = {"cells": code, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        out = (tmp_path / page(path)).with_suffix(".ipynb")
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(notebook))
    for command in (["check", "--ignore", "D,E731"], ["format", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command]
        config = ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
        config += ["--config", f"src = [{str(ROOT)!r}]"]  # so that jlora is our own
        done = subprocess.run(
            [*ruff, *config, "."], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def chain(node):
    """``jlora.checkpoint.save`` from its node; None for anything but dotted names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        of = chain(node.value)
        return None if of is None else f"{of}.{node.attr}"
    return None


def resolve(name):
    """The object of a dotted name that begins with jlora."""
    found = jlora
    for at, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(name.split(".")[:at]))
        found = getattr(found, part)
    return found


def python(path):
    """The cells of a page without commands of the shell."""
    return re.sub(r"(?m)^!.*$", "", "\n".join(cells(path)))


SOURCES = [
    *(pytest.param(python(p), id=page(p)) for p in NOTEBOOKS),
    *(
        pytest.param(p.read_text(encoding="utf-8"), id=page(p))
        for p in sorted(DOCS.glob("beside/*_ours.py"))
    ),
]


@pytest.mark.parametrize("source", SOURCES)
def test_cells_use_names_and_keywords_that_exist(source):
    for node in ast.walk(ast.parse(source)):
        name = chain(node) if isinstance(node, ast.Attribute) else None
        if name is not None and name.startswith("jlora."):
            resolve(name)
        if isinstance(node, ast.Call) and (name := chain(node.func) or "").startswith(
            "jlora."
        ):
            accepted = inspect.signature(resolve(name)).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
                said = {k.arg for k in node.keywords if k.arg}
                assert said <= {*accepted}, name


# ---------------------------------------------------------------------- the errors


def texts():
    """Every text of the library's source, with … for what an f-string fills in."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    x.value if isinstance(x, ast.Constant) else "…" for x in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


ROWS = re.findall(
    r"(?m)^\| `([^`]+)`(?! \(from (?:JAX|XLA))", (DOCS / "errors.md").read_text("utf-8")
)


def test_messages_of_the_page_on_errors_are_those_of_the_library():
    assert len(ROWS) > 30
    known = list(texts())
    for row in ROWS:
        for part in filter(None, (x.strip() for x in row.split("…"))):
            assert any(part in text for text in known), f"{part!r} of {row!r}"


# ----------------------------------------------------------------------- the links


def test_links_of_the_readme_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert "://" in link or (ROOT / link).exists(), f"{link} of {name}"
