"""Packaging: the list in pyproject.toml is the tree; sdist and wheel hold every file; an installed wheel imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qpass
from tests.source_tree import FOLDERS, ROOT, imports, modules, place

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# import name -> distribution name, where they differ
DISTRIBUTIONS = {"yaml": "pyyaml", "compressed_tensors": "compressed-tensors", "huggingface_hub": "huggingface-hub"}
# Come with a dependency of ours, which needs them for the same thing.
BROUGHT_ALONG = {"triton": "torch", "huggingface-hub": "transformers"}


def shipped_files() -> dict[str, Path]:
    """Path inside the installed package -> file of the checkout, for everything in the library's folders."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}": path
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_package_list_is_the_tree() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    tree = sorted(name for name, path in modules().items() if path.name == "__init__.py")
    assert sorted(listed) == tree, "tool.setuptools.packages in pyproject.toml must name every package"


def test_every_python_file_is_in_a_package() -> None:
    """A folder without __init__.py imports in a checkout and is missing from the wheel."""
    for path in modules().values():
        assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)} has no __init__.py"


def test_every_import_is_a_declared_dependency() -> None:
    project = PYPROJECT["project"]
    names = [Requirement(text).name for text in project["dependencies"]]
    optional = [Requirement(text).name for extra in ("hf", "demo", "search", "peft")
                for text in project["optional-dependencies"][extra]]
    required, all_names = ({canonicalize_name(n) for n in group} for group in (names, names + optional))
    wrong = []
    for module in modules():
        for found in imports(module):
            top = found.target.split(".")[0]
            if top == "qpass" or top in sys.stdlib_module_names:
                continue
            name = DISTRIBUTIONS.get(top, top)
            name = BROUGHT_ALONG.get(name, name)
            eager = not (found.lazy or found.typing)
            # What an extra brings may be imported where it is used, and eagerly only in its own integration.
            allowed = required if eager and not module.startswith("qpass.hf") else all_names
            if name not in allowed:
                wrong.append(f"{place(module, found.line)}: {found.target}")
    assert not wrong, "not in pyproject.toml's dependencies (or, imported lazily, its extras):\n" + "\n".join(wrong)


def test_constraints_pin_every_direct_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert all(re.fullmatch(r"[\d.a-z]+", version) for version in pins.values())
    assert len(pins) == len(lines)
    direct = list(PYPROJECT["project"]["dependencies"])
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        direct += extra
    for text in direct:
        requirement = Requirement(text)
        if requirement.name != "qpass-torch":
            pinned = pins.get(canonicalize_name(requirement.name))
            assert pinned is not None, f"{requirement.name} is not pinned in constraints.txt"
            assert requirement.specifier.contains(pinned, prereleases=True), f"{text} excludes the pin {pinned}"


def test_project_metadata() -> None:
    project = PYPROJECT["project"]
    assert project["scripts"] == {"qpass": "qpass.cli:main"}
    assert project["version"] == qpass.__version__
    assert project["requires-python"] == ">=3.11,<3.14"
    assert {"torch", "torchao", "safetensors"} <= {Requirement(text).name for text in project["dependencies"]}
    assert {"hf", "test", "demo"} <= set(project["optional-dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist built from a copy of the sources: what is missing from either is missing here."""
    work = tmp_path_factory.mktemp("packaging")
    copy = work / "copy"
    copy.mkdir()
    for folder in FOLDERS.values():
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def run(what: str, where: Path) -> None:
        done = subprocess.run([sys.executable, "-c", build, what, str(work)], cwd=where, text=True,
                              capture_output=True, check=False, env={**os.environ, "QPASS_NATIVE": "0"})
        assert done.returncode == 0, done.stdout + done.stderr

    run("build_sdist", copy)
    (sdist,) = work.glob("qpass_torch-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (source,) = (work / "unpacked").iterdir()
    run("build_wheel", source)
    (built,) = work.glob("qpass_torch-*.whl")
    return built


def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(information["METADATA"]).decode()
        for name, path in shipped_files().items():
            if name in inside:
                assert archive.read(name) == path.read_bytes()
    assert inside == set(shipped_files()), "complete tool.setuptools.package-data in pyproject.toml"
    assert "qpass/kernels/cpu/csrc/product.h" in inside
    assert "licenses/LICENSE" in information
    assert "\nName: qpass-torch\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
                    "--disable-pip-version-check", "--target", str(target), str(wheel)], check=True)
    code = ("import qpass, qpass.kernels.registry, qpass.lowering\n"
            "from pathlib import Path\n"
            "for module in (qpass, qpass.kernels, qpass.kernels.registry, qpass.lowering):\n"
            f"    assert Path(module.__file__).is_relative_to({str(target)!r}), module.__file__\n"
            "qpass.kernels.registry.load_builtin()\n"
            "assert qpass.kernels.registry.kernel('linear_reference').device == '*'\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(target)})
    assert done.returncode == 0, done.stderr
    assert (target / "bin" / "qpass").exists()


@pytest.mark.parametrize(("module", "said"), [("lowering", "this folder is the package qpass.lowering"),
                                              ("kernels.registry", "No module named 'kernels.registry'")])
def test_no_module_is_imported_a_second_time_under_its_folder(module: str, said: str) -> None:
    """`lowering` and `kernels` are names that other projects use too: their modules import as qpass's only."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, text=True, capture_output=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert said in done.stderr
