"""Every example runs by itself, offline, in a process of its own, and says what its text promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "quickstart": ["14 quantized", "KL(reference || model)", "the same logits, True"],
    "online": ["while loading", "is quantized: True; 14 layers", "generated 16 tokens",
               "equal logits in another process: True"],
    "per_layer_recipe": ["*.down_proj = w8a8", "closest: down_proj", "output of the model"],
    "own_scheme": ["ternary_w2a8", "linear_reference", "int4 in its place"],
    "own_kernel": ["linear_w8a16_mine", "differs from the reference kernel", "was forced but refuses"],
    "own_pass": ["fold_double_relu", "double relus folded: 1", "1 call multiplies, 1 activation quantization"],
    "inspect_graph": ["expose_activation_quant", "cpp_fused", "activation "],
}
SLOW = ("quickstart", "online", "inspect_graph")  # they compile a language model each


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in EXAMPLES])
def test_example_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=os.environ, text=True, capture_output=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    missing = [text for text in SAYS[path.stem] if text not in done.stdout]
    assert not missing, f"{missing} not in:\n{done.stdout}"
    assert "Warning" not in done.stderr.replace("FutureWarning", ""), done.stderr
