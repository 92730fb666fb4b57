"""Import when used: names of packages in; importing them costs nothing in this process until something of them is used.

Modules import torch at their top as everybody's do, and what only annotations need under TYPE_CHECKING. Reading headers
and asking which kernels would run uses nothing of it: such a command is done before torch, which takes two seconds,
would be there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def import_when_used(*packages: str) -> None:
    """Let `import package` give a module that becomes the real one when an attribute is first asked of it.

    No effect on those that are imported already, or not installed.
    """
    sys.meta_path.insert(0, _Finder())
    for package in packages:
        if package not in sys.modules and (spec := find_spec(package)) is not None:
            module = module_from_spec(spec)
            module.__dict__.pop("__path__", None)  # for which `import package.module` asks, and so uses the package
            module.__class__ = _WhenUsed
            sys.modules[package] = module


class _WhenUsed(ModuleType):
    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)


class _Finder(MetaPathFinder):
    """`import package.module` asks how to make the module when the package, by being used, may have made it already."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        made = sys.modules.get(name)
        return None if made is None or target is not None else ModuleSpec(name, _Made(made))


class _Made(Loader):
    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
