"""Bias correction: the mean output of every layer with a bias is the float model's; the model gets closer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qpass
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import ARCHITECTURES, output_error, output_of, small_model, tokens

SCHEME = PRESETS["w4a16"].with_group_size(32)


@pytest.mark.parametrize("name", [name if name in ("gpt2", "llama") else pytest.param(name, marks=pytest.mark.slow)
                                  for name in ARCHITECTURES])
def test_closer_on_the_mean_and_the_same_when_loaded(name: str, tmp_path: Path) -> None:
    data, reference = tokens(16, 32), small_model(name)
    nearest = qpass.quantize(small_model(name), SCHEME, progress=False)
    model = qpass.quantize(small_model(name), qpass.Recipe(SCHEME, algorithms=["bias_correction"]), calibration=data,
                           progress=False)
    without = any("have no bias" in note for note in qpass.explain(model).notes)
    assert without == (name in ("llama", "qwen3", "gemma3"))
    if not without:
        assert output_error(model, reference, tokens(8, 32, seed=4)) < output_error(nearest, reference,
                                                                                    tokens(8, 32, seed=4))
    qpass.save(model, tmp_path)
    assert torch.equal(output_of(qpass.load(tmp_path), data[0]), output_of(model, data[0]))


def test_means_of_outputs_are_the_float_models() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    x = torch.randn(64, 32) + 1
    wanted = model(x).mean(0)
    before = (qpass.quantize(torch.nn.Sequential(*map(_copy, model)), SCHEME, example_inputs=x, progress=False)(x)
              .mean(0) - wanted).abs().max()
    qpass.quantize(model, qpass.Recipe(SCHEME, algorithms=["bias_correction"]), example_inputs=x, calibration=[x],
                   progress=False)
    after = (model(x).mean(0) - wanted).abs().max()
    assert float(after.detach()) < 1e-4 < float(before.detach())


def test_after_gptq_and_smoothquant() -> None:
    data, reference = tokens(16, 32), small_model("gpt2")
    errors = []
    for last in ([], ["bias_correction"]):
        recipe = qpass.Recipe(PRESETS["w4a8"].with_group_size(32), algorithms=[
            "smoothquant", {"gptq": {"match_float": False}}, *last])
        model = qpass.quantize(small_model("gpt2"), recipe, calibration=data, progress=False)
        errors.append(output_error(model, reference, data))
    assert errors[1] < errors[0]


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(module)
