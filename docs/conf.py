"""How Sphinx builds the documentation: `make docs`.

Pages are Markdown. Those with code cells are notebooks of myst-nb, and every cell is
run. A warning is an error, and so are a cell that fails, a cell that writes to stderr
unasked, a link to nothing, and a name in backticks in a docstring that is documented
nowhere.
"""

import os
import pathlib
import re
import sys

from docutils import nodes
from sphinx.domains.python import PyObject

ROOT = pathlib.Path(__file__).parents[1]

# The cells run in processes of their own, which inherit this.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")
# The cells are small: compiling them takes longer than running them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Its kernel is the Python of this build, whatever kernels the user has installed.
os.environ["JUPYTER_PATH"] = str(ROOT / "docs/_jupyter")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Without byte code every page compiles the source of JAX again, for seconds.
    cache = str(ROOT / "docs/_build/bytecode")
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", cache)
    sys.dont_write_bytecode = False
# Jupyter would warn of frozen modules, which only matter to its debugger.
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")

project = "jlora"
author = "the jlora authors"
copyright = "the jlora authors"
version = release = re.search(
    r'__version__ = "(.+)"', (ROOT / "jlora/__init__.py").read_text()
)[1]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
# There is no network in a build, so no inventory of other projects.
nitpick_ignore_regex = [
    (r"py:.*", r"(jax|numpy|optax|flax|collections|typing|os|re)\..*"),
    (r"py:(class|exc|obj)", r"(Any|None|[A-Z]\w*Error|Sequence|Self)"),
    # What signatures and docstrings mention, and is not public.
    (r"py:.*", r"(jlora\.)?_.*"),
    (r"py:.*", r"(Adapter|Base|Dropout|Form|Initialiser|Pair|Pattern)"),
]

# ------------------------------------------------------------------------- pages

html_theme = "sphinx_book_theme"
html_title = f"jlora {release}"
html_static_path = ["_static"]
html_css_files = ["jlora.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "use_download_button": False,
    "navbar_persistent": [],  # the sidebar has the search
}
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_show_tb = True
nb_output_stderr = "remove-warn"
nb_merge_streams = True

# --------------------------------------------------------------------- docstrings

autodoc_member_order = "bysource"
autodoc_type_aliases = {
    name: name for name in ("Adapter", "Initialiser", "Pattern", "optax.Schedule")
}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
default_role = "py:obj"
python_maximum_signature_line_length = 80


def rst(app, what, name, obj, options, lines):
    """What a docstring needs to be reStructuredText, after napoleon.

    ``(*batch, r)`` is a shape, and no emphasis; a plural ``s`` may follow backticks.
    """
    parts = re.split(r"(`+[^`]+`+|^ *(?:>>>|\.\.\.).*$)", "\n".join(lines), flags=re.M)
    parts[::2] = [re.sub(r"(?<!\\)\*", r"\*", x) for x in parts[::2]]
    parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", x) for x in parts[2::2]]
    lines[:] = "".join(parts).split("\n")


def signature(app, what, name, obj, options, signature, returns):
    """The default rank as a number, and aliases of types by their names."""
    signature = re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", signature or "")
    return signature.replace("= RANK", "= 8") or None, returns


def elsewhere(app, env, node, contnode):
    """Links `merge` in the docstring of another module to jlora.merge."""
    objects = env.domains.python_domain.objects
    target = f"jlora.{node['reftarget']}"
    if node.get("refdomain") != "py" or target not in objects:
        return None
    found = objects[target]
    builder = app.builder
    uri = builder.get_relative_uri(node["refdoc"], found.docname)
    return nodes.reference(
        "", "", contnode, internal=True, refuri=f"{uri}#{found.node_id}"
    )


def setup(app):
    """Registers what stands above."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":  # which is what napoleon makes of Attributes
            field.label = "Attributes"
    app.connect("autodoc-process-docstring", rst, priority=600)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", elsewhere)
