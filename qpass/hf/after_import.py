"""After import: the name of a module in; a function called once that module has been imported, by whomever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def after_import(name: str, call: Callable[[], object]) -> None:
    """Call `call` now if the module `name` is imported already, otherwise right after it will be, or never."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watcher(name, call))


class _Watcher(MetaPathFinder):
    """Finds nothing itself: it lets the other finders find the module, and adds the call to its execution."""

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self._name, self._call = name, call

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
                  ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        found = find_spec(fullname)
        if found is None or found.loader is None:
            return found
        loader: Any = found.loader
        execute = loader.exec_module

        def execute_then_call(module: ModuleType) -> None:
            execute(module)
            self._call()

        loader.exec_module = execute_then_call
        return found
