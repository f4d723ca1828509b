"""The examples run to the assertions at their ends."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["plain", "linen_model", "nnx_model"])
def test_example(name, capsys):
    importlib.import_module(name).main()
    assert "adapted on 5 to 9" in capsys.readouterr().out
