"""A wheel with the native library: made by one `pip wheel`, tagged for its platform, running where no compiler is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qpass.kernels.cpu import build, native
from qpass.kernels.cpu.compile_library import library_name, source_hash
from tests.source_tree import FOLDERS, ROOT

COMPUTE = """
import sys, torch, qpass
from qpass.kernels.cpu import build, native
from qpass.kernels.cpu.compile_library import library_name, source_hash
assert build.__file__.startswith(sys.argv[1]), build.__file__
assert build.compiler() is None and build.shipped_library() is not None
model = torch.nn.Sequential(torch.nn.Linear(64, 48)).eval()
x = torch.randn(3, 64)
want = model(x)
qpass.quantize(model, "w8a8")
error = float((model(x) - want).abs().max() / want.abs().max())
print("linear_w8a8_" in str(qpass.explain(model)), error < 0.05, native.loaded())
"""


def wheel(folder: Path, native_library: str) -> Path:
    source = folder / "source"
    for name, path in FOLDERS.items():
        shutil.copytree(path, source / name.rpartition(".")[2], ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, source)
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet",
                           "--wheel-dir", str(folder)], cwd=source, text=True, capture_output=True, check=False,
                          env={**os.environ, "QPASS_NATIVE": native_library})
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None or native.refuses() is not None, reason="needs a C++ compiler on x86")
def test_a_wheel_with_the_library_needs_no_compiler(tmp_path: Path) -> None:
    made = wheel(tmp_path, "1")
    assert made.name.endswith("-py3-none-linux_x86_64.whl")
    library = f"qpass/kernels/cpu/{library_name(source_hash())}"
    with zipfile.ZipFile(made) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == [library]
    target, cache, nothing = tmp_path / "site", tmp_path / "cache", tmp_path / "bin"
    nothing.mkdir()
    with zipfile.ZipFile(made) as archive:
        archive.extractall(target)
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    done = subprocess.run([sys.executable, "-c", COMPUTE, str(target)], cwd=tmp_path, text=True, capture_output=True,
                          env={**environment, "PYTHONPATH": str(target), "PATH": str(nothing),
                               "QPASS_CACHE_DIR": str(cache)}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "True"]
    assert not cache.exists() and "compiling" not in done.stderr


@pytest.mark.slow
def test_a_wheel_without_it_is_for_every_platform(tmp_path: Path) -> None:
    made = wheel(tmp_path, "0")
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "qpass/kernels/cpu/csrc/shim.cpp" in archive.namelist()
