"""Examples: every script in examples/ runs from an empty folder, to the end, and says something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def test_what_contributing_points_to_is_there() -> None:
    assert {"own_scheme.py", "own_kernel.py", "own_pass.py"} <= {script.name for script in SCRIPTS}
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "2"},
                          text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_reads_straight_down(script: Path) -> None:
    text = script.read_text()
    assert text.startswith('"""'), "an example says in its first line what it shows"
    assert len(text.splitlines()) <= 100
