"""Setup: all that pyproject.toml cannot say: the native library, compiled into a wheel if it can be.

QPASS_NATIVE=1 pip wheel .   compiles it, or fails with the reason; in an isolated build pip fetches torch for it
QPASS_NATIVE=0 pip wheel .   leaves it out: a wheel for every machine, which compiles when first used
pip wheel .                  compiles it where this is x86-64 Linux with a compiler, and torch is there to compile
                             against (pip install torch, then pip wheel . --no-build-isolation)

Such a wheel needs no compiler where it is installed. It fits every Python and every PyTorch from 2.11 on, because the
library uses libtorch's stable ABI only. Editable installs and sdists never hold one.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def load(path: Path) -> ModuleType:
    """The module of that file, without the package around it: it cannot be imported before it is installed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LIBRARY = load(HERE / "kernels" / "cpu" / "compile_library.py")
WANTED = os.environ.get("QPASS_NATIVE", "")


def torch_folder() -> Path | None:
    """Where torch is installed; it is not imported, which would take seconds."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found is not None and found.origin else None


def why_not() -> str | None:
    """The reason to leave the library out, or None."""
    if WANTED not in ("", "0", "1"):
        raise SystemExit(f"QPASS_NATIVE must be 0 or 1, got {WANTED!r}")
    if WANTED == "0":
        return "QPASS_NATIVE=0"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"it is for x86-64 Linux, and this is {platform.machine()} {sys.platform}"
    if LIBRARY.compiler() is None:
        return str(LIBRARY.missing_compiler())
    return None if torch_folder() else "torch is not installed here, and an isolated build does not see it"


class BuildPy(build_py):
    """Copies the Python files and, unless there is a reason not to, puts the library beside them."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib) / "qpass" / "kernels" / "cpu"
        if self.editable_mode:
            return
        for stale in folder.glob(LIBRARY.library_name("*")):
            stale.unlink()  # setuptools keeps build_lib from one build to the next
        if (why := why_not()) is not None:
            if WANTED == "1":
                raise SystemExit(f"QPASS_NATIVE=1, but the native library cannot be compiled: {why}")
            self.announce(f"the wheel gets no native library: {why}; it will be compiled when first used", level=3)
            return
        try:
            LIBRARY.compile_library(LIBRARY.compiler(), torch_folder(), folder / LIBRARY.library_name(
                LIBRARY.source_hash()))
        except LIBRARY.BuildFailed as error:
            raise SystemExit(f"{error}; QPASS_NATIVE=0 makes a wheel without it") from error

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        folder = Path(self.build_lib) / "qpass" / "kernels" / "cpu"
        return [*super().get_outputs(include_bytecode), *map(str, folder.glob(LIBRARY.library_name("*")))]


class BdistWheel(bdist_wheel):
    """A wheel that holds the library is for one platform, and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", "any" if self.root_is_pure else platform_tag


class Native(Distribution):
    """Says whether what is installed belongs to one platform, although there is no extension module."""

    def has_ext_modules(self) -> bool:
        return why_not() is None


arguments: dict[str, Any] = {"distclass": Native, "cmdclass": {"build_py": BuildPy, "bdist_wheel": BdistWheel}}
if WANTED == "1":
    arguments["setup_requires"] = ["torch>=2.11"]  # what the build backend asks pip for in an isolated build
setup(**arguments)
