"""check: what a server would refuse of an adapter, or, worse, ignore."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from jlora._plan.plan import listed
from jlora._printed import Printed
from jlora.peft import config as _config
from jlora.peft import files, modules
from jlora.peft.servers import RULES, VERSIONS, Facts


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a server does not do as the file says.

    Attributes:
      level: "refused": it does not load; "ignored": it loads, and computes something
        else; "needs": it loads with a setting.
      found: what in the file it is about.
      what: what the server does.
      do: what to do about it.
    """

    level: str
    found: str
    what: str
    do: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Printed):
    """What `check` found; it iterates over `Finding`s, and prints as a list.

    Attributes:
      directory: the adapter.
      server: the name and version of the server.
      findings: what is not as it should be.
    """

    directory: str
    server: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether the server loads it, and computes what the file says."""
        return not any(f.level in ("refused", "ignored") for f in self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        word = "takes it" if self.ok else "does not take it as it is"
        lines = [f"{self.directory}: {self.server} {word}"]
        for f in self.findings:
            lines.append(f"  {f.level}: {f.found}: it {f.what}")
            lines.append(f"    do: {f.do}")
        return "\n".join(lines)


def check(directory: files.Where, server: str) -> Report:
    """Whether a server takes a PEFT adapter as it is, by the rules of its loader.

    Only names, shapes and the config are read.  The rules were read in the source of
    one version each, which the report names.

    Args:
      directory: an adapter's directory.
      server: "vllm", "sglang", "tensorrt-llm" or "transformers".

    Returns:
      A `Report`: what is refused, what is silently ignored, what needs a setting, and
      what to do about it.

    Raises:
      FileNotFoundError: there is no such directory, or a file is missing.
      FormatError: a file is damaged.
      ValueError: an unknown server.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora, jlora.peft
      >>> tree = jlora.wrap({"fc": {"kernel": jnp.ones((3, 4))}}, rank=2)
      >>> where = tempfile.mkdtemp() + "/adapter"
      >>> jlora.peft.save(where, tree, names={"fc/kernel": "fc"}, portable=True)
      >>> jlora.peft.check(where, server="vllm").ok
      True
    """
    if server not in VERSIONS:
        raise ValueError(
            f"peft.check: server {server!r}: expected one of {', '.join(VERSIONS)}."
        )
    where = pathlib.Path(directory)
    facts = _facts(where)
    found = [
        Finding(rule.level, _words(rule.find, facts), rule.what, rule.do)
        for rule in RULES
        if server in rule.servers.split() and rule.find(facts)
    ]
    if server == "transformers":
        found += _unread(where)
    return Report(str(where), VERSIONS[server], tuple(found))


def _facts(where: pathlib.Path) -> Facts:
    config = modules.required(where, _config.FILE)
    weights = modules.required(where, modules.WEIGHTS)
    tensors = files.Tensors([weights])
    shapes = {name: tensors.shape(name) for name in tensors}
    names = frozenset(p.name for p in where.iterdir())
    return Facts(files.read_json(config), shapes, names)


def _words(find: Any, facts: Facts) -> str:
    """What a rule found, in few words."""
    found = find(facts)
    if isinstance(found, (list, tuple, set)):
        return listed([str(x) for x in found])
    return str(found)


def _unread(where: pathlib.Path) -> list[Finding]:
    """What peft itself could not read: config and tensors do not fit each other."""
    try:
        modules.read(where)
    except files.FormatError as e:
        return [Finding("refused", str(e), "loads only what fits", "mend the file")]
    return []
