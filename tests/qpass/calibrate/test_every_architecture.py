"""Every algorithm on every architecture: the model is quantized, and what was saved loads back with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.recipes.algorithm import ALGORITHMS
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import ARCHITECTURES, output_of, small_model, tokens

# How each is run here: a preset and the recipe's algorithms.
RECIPES: dict[str, tuple[str, list[Any]]] = {
    "scales": ("w4a16", ["scales"]),
    "gptq": ("w4a16_asym", ["gptq"]),
    "smoothquant": ("w8a8", ["smoothquant"]),
    "autoround": ("w4a8", ["gptq", {"autoround": {"iterations": 3, "batch_size": 2}}]),
    "awq": ("w4a16", ["awq", "gptq"]),
    "activation_ranges": ("w8a8_static", ["activation_ranges"]),
    "rotation": ("w4a16", [{"rotation": {"rotations": ["R1", "R2", "R4"]}}, "gptq"]),
    "bias_correction": ("w4a8", ["scales", "bias_correction"]),
}
_QUICK = {("llama", "autoround"), ("gpt2", "bias_correction"), ("mixtral", "gptq")}


def test_no_algorithm_is_left_out() -> None:
    assert set(RECIPES) == set(ALGORITHMS)


@pytest.mark.parametrize(("name", "algorithm"), [
    pytest.param(name, algorithm, id=f"{name}-{algorithm}", marks=[] if (name, algorithm) in _QUICK else (
        pytest.mark.slow)) for name in (*ARCHITECTURES, "mixtral") for algorithm in RECIPES])
def test_saved_and_loaded_with_the_same_logits(name: str, algorithm: str, tmp_path: Path) -> None:
    preset, algorithms = RECIPES[algorithm]
    scheme, data = PRESETS[preset], tokens(6, 32)
    if scheme.weight is not None and scheme.weight.granularity == "per_group":
        scheme = scheme.with_group_size(32)
    model = qpass.quantize(small_model(name), qpass.Recipe(scheme, algorithms=algorithms), calibration=data,
                           progress=False)
    done = qpass.explain(model).counts["quantized"]
    assert done
    want, exact = output_of(model, data[0]), output_of(small_model(name), data[0])
    assert torch.isfinite(want).all() and (want - exact).norm() < 0.5 * exact.norm()
    qpass.save(model, tmp_path / "saved")
    assert torch.equal(output_of(qpass.load(tmp_path / "saved"), data[0]), want)
