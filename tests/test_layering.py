"""Layering: imports go one way, data <- kernels <- lowering <- entry points, lazy and typing-only ones included."""

from __future__ import annotations

import ast

import qpass  # noqa: F401  (an uninstalled checkout fails here, with one error instead of many)
from qpass.kernels.isa import X86_LEVELS
from tests.source_tree import imports, modules, place, strings, syntax

# What the user says and what the ops mean. A module that plans, captures, swaps or reports is not data.
DATA = frozenset({
    "qpass.activation_args", "qpass.activation_scale", "qpass.cache_numbers", "qpass.dtype", "qpass.errors",
    "qpass.experts_site", "qpass.experts_spec", "qpass.formats.bits", "qpass.hadamard", "qpass.input_change",
    "qpass.integer_scales", "qpass.large_pages", "qpass.ops", "qpass.recipes.algorithm",
    "qpass.recipes.algorithm_table", "qpass.recipes.recipe", "qpass.recipes.rotation", "qpass.recipes.torchao_config",
    "qpass.rows", "qpass.scheme", "qpass.site", "qpass.spec", "qpass.weight",
})
LAYERS = ("data", "kernels", "lowering", "entry points")

# importer -> imported that goes the other way, each with its reason. Keep this empty if at all possible.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def layer(module: str) -> int:
    """Index into LAYERS. The package `qpass` itself hands out the entry points, so it is one."""
    if module in DATA or module == "qpass.codecs" or module.startswith("qpass.codecs."):
        return 0
    for index, package in ((1, "qpass.kernels"), (2, "qpass.lowering")):
        if module == package or module.startswith(package + "."):
            return index
    return 3


def asks_only_what_the_package_is(module: str) -> bool:
    """Whether `import qpass` serves for `qpass.__version__`, `qpass.__file__` and the like, and for nothing else."""
    asked = {node.attr for node in ast.walk(syntax(module))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qpass"}
    return all(name.startswith("__") for name in asked)


def test_data_modules_exist() -> None:
    assert set(modules()) >= DATA, f"listed as data, but gone: {sorted(DATA - set(modules()))}"


def test_imports_go_one_way() -> None:
    wrong = [
        f"{place(module, found.line)}: {module} ({LAYERS[layer(module)]}) imports {found.target} "
        f"({LAYERS[layer(found.target)]})"
        for module in modules()
        for found in imports(module)
        if found.target.split(".")[0] == "qpass"
        and layer(found.target) > layer(module)
        and not (found.target == "qpass" and asks_only_what_the_package_is(module))
        and (module, found.target) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_needed() -> None:
    used = {(module, found.target) for module in modules() for found in imports(module)}
    assert set(EXCEPTIONS) <= used


def test_no_import_cycles() -> None:
    """Of imports that run when a module is loaded; a cycle works or fails by who comes first."""
    eager = {
        module: sorted({i.target for i in imports(module) if i.target in modules() and not (i.lazy or i.typing)})
        for module in modules()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module):], module))
        if module not in done:
            for target in eager[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in eager:
        visit(module, ())


def test_kernels_never_see_a_graph() -> None:
    wrong = []
    for module in modules():
        if layer(module) != 1:
            continue
        wrong += [place(module, i.line) for i in imports(module) if i.target.startswith("torch.fx")]
        wrong += [place(module, node.lineno) for node in ast.walk(syntax(module))
                  if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.fx")]
    assert not wrong, f"kernels work on tensors, not on graphs: {wrong}"


def test_passes_never_name_a_device() -> None:
    devices = {"cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", *X86_LEVELS}
    wrong = []
    for module in modules():
        if layer(module) != 2:
            continue
        wrong += [f"{place(module, node.lineno)} says {node.value!r}" for node in strings(module)
                  if node.value.split(":")[0].lower() in devices]
        wrong += [f"{place(module, node.lineno)} says {ast.unparse(node)}" for node in ast.walk(syntax(module))
                  if isinstance(node, ast.Attribute)
                  and (node.attr in {"is_cuda", "is_cpu"} or ast.unparse(node) in {f"torch.{d}" for d in devices})]
    assert not wrong, f"passes ask the registry, they name no device: {wrong}"


def test_no_star_imports() -> None:
    assert not [place(module, n.lineno) for module in modules() for n in ast.walk(syntax(module))
                if isinstance(n, ast.ImportFrom) and any(alias.name == "*" for alias in n.names)]
