"""The README's Python blocks run as they stand, in order, in one namespace."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_readme_code_runs(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"(?ms)^```python\n(.*?)^```$", text))
    assert blocks, "README.md has no ```python block"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        # Blank lines in front make a traceback's line numbers those of the README.
        before = text.count("\n", 0, block.start(1))
        code = compile("\n" * before + block[1], str(README), "exec")
        exec(code, namespace)
