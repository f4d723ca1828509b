"""What a prompt and a notebook show: tables as text, and leaves by treescope.

treescope, which Flax and penzai show values with, is imported only if it asks.
"""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import treescope
from bases import Int8
from helpers import normal

import jlora

# treescope reads all of numpy, deprecated names too.
pytestmark = pytest.mark.filterwarnings("ignore:The chararray class")

PARAMS = {"up": {"kernel": normal(5, 7), "bias": normal(7)}}
X = normal(11, 5, seed=1)


def fn(p, x):
    return x @ p["up"]["kernel"] + p["up"]["bias"]


def wrapped(**kwargs):
    plan = jlora.plan(fn, PARAMS, X, rank=2)
    return jlora.wrap(PARAMS, plan=plan, **kwargs)


TABLES = {
    "plan": lambda: jlora.plan(fn, PARAMS, X, rank=2),
    "summary": lambda: jlora.summary(wrapped()),
    "explain": lambda: jlora.explain(fn, wrapped(), X),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_shown_as_its_text(name):
    table = TABLES[name]()
    text = str(table)
    assert "\n" in text and "up/kernel" in text
    assert repr(table) == text
    assert treescope.render_to_text(table) == text
    html = treescope.render_to_html(table, compressed=False)
    assert "up/kernel" in html
    # A notebook shows the repr.
    assert not hasattr(table, "_repr_html_")


LEAVES = {
    "plain": (lambda: wrapped(), ["w", "a", "b", "scale", "roles", "bias_path"]),
    "output-bias": (
        lambda: wrapped(lora_bias=True),
        ["w", "a", "b", "scale", "c", "roles", "bias_path"],
    ),
    "dropout": (
        lambda: jlora.dropout(wrapped(), 0.1, jax.random.key(0)),
        ["w", "a", "b", "scale", "dropout", "roles", "bias_path"],
    ),
    "adapter": (
        lambda: {"up": {"kernel": jlora.adapter(wrapped())["up/kernel"]}},
        ["a", "b", "scale", "roles", "bias_path"],
    ),
    "dropped": (
        lambda: jlora.drop_base(wrapped(), force=True),
        ["w", "a", "b", "scale", "roles", "bias_path"],
    ),
    "shapes": (
        lambda: jax.eval_shape(wrapped),
        ["w", "a", "b", "scale", "roles", "bias_path"],
    ),
    "another-base": (
        lambda: jlora.wrap(
            {"up": {"kernel": Int8.of(PARAMS["up"]["kernel"])}}, targets="**"
        ),
        ["w", "a", "b", "scale", "roles"],
    ),
    "full": (
        lambda: jlora.wrap(PARAMS, targets=[], train="up/kernel"),
        ["w", "value"],
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_shown_by_the_fields_that_are_there(name):
    make, fields = LEAVES[name]
    leaf = make()["up"]["kernel"]
    text = treescope.render_to_text(leaf)
    assert text.startswith(f"{type(leaf).__name__}(")
    assert re.findall(r"(?m)^  (\w+)=", text) == fields
    treescope.render_to_html(leaf)


def test_a_traced_leaf_is_shown():
    shown = []

    @jax.jit
    def traced(tree):
        shown.append(treescope.render_to_text(tree["up"]["kernel"]))
        return jnp.zeros(())

    traced(wrapped())
    assert shown[0].startswith("LoRA(")


def test_treescope_is_not_imported():
    code = "import jlora, sys; assert not {'treescope', 'flax'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
