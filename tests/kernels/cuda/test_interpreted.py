"""The Triton programs are right without a GPU: their tests run in a process in which Triton interprets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run_interpreted(name: str, which: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_CURRENT_TEST"):
        environment.pop(variable, None)
    command = ["-p", "no:cacheprovider", "-q", "-m", which, str(HERE / "interpreted" / name)]
    pytest_program = Path(sys.executable).with_name("pytest")
    done = subprocess.run([str(pytest_program), *command], cwd=ROOT, env=environment, text=True, capture_output=True,
                          check=False, timeout=1500)
    assert done.returncode in (0, 5), done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 5 or " passed" in done.stdout.splitlines()[-1], done.stdout[-2000:]


@pytest.mark.parametrize("name", FILES)
def test_quick(name: str) -> None:
    run_interpreted(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_slow(name: str) -> None:
    run_interpreted(name, "slow")
