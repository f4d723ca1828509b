"""Calls a function once another library is imported, and never imports it.

Flax keeps a table of the classes that it can write, in a module that takes a second to
import.  A user may import it after jlora, and after a tree was made.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any


def when_imported(name: str, fn: Callable[[Any], None]) -> None:
    """Calls fn(module) now if the module is imported, else as soon as it is.

    Example:
      >>> when_imported("math", lambda module: print(module.__name__))
      math
    """
    if name in sys.modules:
        fn(sys.modules[name])
        return
    watchers = [x for x in sys.meta_path if isinstance(x, _Watcher) and x.name == name]
    if not watchers:
        watchers = [_Watcher(name)]
        sys.meta_path.insert(0, watchers[0])
    watchers[0].fns.append(fn)


class _Watcher:
    """A finder that finds no module itself, but sees when one was imported.

    Attributes:
      name: the name of the module.
      fns: what is called with it.
    """

    def __init__(self, name: str):
        self.name = name
        self.fns: list[Callable[[Any], None]] = []
        self._asks = False

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """What the other finders find, with a loader that calls the functions."""
        if name != self.name or self._asks:
            return None
        self._asks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            sys.meta_path.remove(self)
            for fn in self.fns:
                fn(module)

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec
