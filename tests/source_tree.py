"""The library's source files as data: module names, layers, and what each module imports, read from its syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"qpass": ROOT / "qpass", "qpass.lowering": ROOT / "lowering", "qpass.kernels": ROOT / "kernels"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported module. `lazy`: inside a function. `typing`: under `if TYPE_CHECKING`."""

    target: str
    line: int
    lazy: bool
    typing: bool


@lru_cache(maxsize=1)
def modules() -> dict[str, Path]:
    """Qualified module name -> file, for every Python file of the library."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


@cache
def syntax(module: str) -> ast.Module:
    """The parsed file of a module."""
    path = modules()[module]
    return ast.parse(path.read_text(), filename=str(path))


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Every import statement of a module, wherever it stands; `from a import b` counts as a.b if that is a module."""
    is_package = modules()[module].name == "__init__.py"

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(target=alias.name, line=node.lineno, lazy=lazy, typing=typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                own = module.split(".")
                own = own[: len(own) - node.level + is_package]
                base = ".".join([*own, base]) if base else ".".join(own)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                target = inner if inner in modules() else base
                yield Import(target=target, line=node.lineno, lazy=lazy, typing=typing)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, inside, True)
            for child in node.orelse:
                yield from walk(child, inside, typing)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, typing)

    return tuple(walk(syntax(module), False, False))


def strings(module: str) -> Iterator[ast.Constant]:
    """Every string literal of a module that is not a docstring, parts of f-strings included."""
    documented = set()
    for node in ast.walk(syntax(module)):
        # A string that stands alone as a statement says something to the reader and nothing to the program.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented.add(node.value)
    for node in ast.walk(syntax(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented:
            yield node


def place(module: str, line: int) -> str:
    """`lowering/verify.py:12`, for messages."""
    return f"{modules()[module].relative_to(ROOT)}:{line}"
