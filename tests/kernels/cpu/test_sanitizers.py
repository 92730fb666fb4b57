"""The native library under AddressSanitizer and UBSan: the kernel tests run on such a build; nothing is reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qpass.kernels.cpu import compile_library, native
from tests.source_tree import ROOT

TESTS = ("tests/kernels/test_every_kernel.py", "tests/kernels/test_every_experts_kernel.py",
         "tests/kernels/cpu/test_x86_experts.py", "tests/kernels/cpu/test_x86_decoded.py",
         "tests/kernels/cpu/test_x86_bytes.py",
         "tests/kernels/cpu/test_quantize_weight.py", "tests/kernels/test_attention.py",
         "tests/kernels/test_cache_attention.py", "tests/kernels/test_range_search.py",
         "tests/kernels/test_round_columns.py")
# Kernels, or files of which all run.
CHOSEN = "avx2 or plain or threads or decoded or quantize_weight or attention or range_search or round_columns"
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1")
RUN = """
import sys
from pathlib import Path
import pytest
from qpass.kernels.cpu import build, native
build.shipped_library = lambda: Path(sys.argv[1])
code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", *sys.argv[2:]])
assert native.loaded() and sys.argv[1] in Path("/proc/self/maps").read_text(), "another library was loaded"
sys.exit(code)
"""


def runtime(compiler: str, name: str) -> Path:
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


@pytest.mark.slow
def test_nothing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = compile_library.compiler()
    if command is None or native.refuses() is not None:
        pytest.skip("needs a C++ compiler on x86")
    runtimes = [runtime(command[0], name) for name in ("libasan.so", "libubsan.so")]
    if not all(path.is_absolute() and path.exists() for path in runtimes):
        pytest.skip("this compiler comes without the sanitizers' libraries")
    monkeypatch.setattr(compile_library, "FLAGS", (*compile_library.FLAGS[1:], *FLAGS))
    library = tmp_path / "sanitized.so"
    compile_library.compile_library(command, Path(torch.__file__).parent, library)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(library), CHOSEN, *(str(ROOT / test) for test in TESTS)], cwd=tmp_path,
        text=True, capture_output=True, check=False,
        env={**os.environ, "LD_PRELOAD": " ".join(map(str, runtimes)), "OMP_NUM_THREADS": "2",
             "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "UBSAN_OPTIONS": "print_stacktrace=1"})
    told = done.stdout[-3000:] + done.stderr[-6000:]
    assert done.returncode == 0 and " passed" in done.stdout, told
    assert "runtime error" not in told and "AddressSanitizer" not in told, told
