"""AWQ: the factors found change the outputs less than none would, on every architecture, and compose with GPTQ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qpass
from qpass.calibrate.awq_math import output_error as hessian_error
from qpass.calibrate.awq_math import search_factors
from qpass.calibrate.fold import fold
from qpass.calibrate.pairs import find_pairs
from qpass.capture.capture_model import capture
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import output_error, output_of, small_model, tokens


def nearest(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 7.5
    return (weight / scale).round().clamp(-8, 7) * scale


@pytest.mark.parametrize("duo", [True, False])
def test_search(duo: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 24), torch.randn(16, 24)
    x[:, :2] *= 40
    hessian = x.t() @ x
    s = search_factors([weight], [nearest], x.abs().mean(0), hessian, grid=10, duo=duo, common=lambda factors: factors)
    direct = (x.double() @ (nearest(weight * s) / s - weight).double().t()).square().sum()
    assert abs(hessian_error(nearest(weight * s) / s - weight, hessian) - float(direct)) < 1e-3 * float(direct)
    assert direct < 0.5 * (x @ (nearest(weight) - weight).t()).square().sum()
    assert s[:2].min() > s[2:].median()


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow), "gpt2",
                                  pytest.param("phi", marks=pytest.mark.slow)])
def test_outliers_cost_less(name: str, tmp_path: Path) -> None:
    def spiked() -> torch.nn.Module:
        model = small_model(name)
        parameters = dict(model.named_parameters())
        for pair in find_pairs(capture(model)):
            factors = torch.ones(len(pair.takers[0].index))
            if any(word in pair.takers[0].parameter for word in ("norm", ".ln_")):
                factors[:3] = 1 / 30
                fold(parameters, pair, factors)
        return model

    data, reference = tokens(), spiked()
    scheme = PRESETS["w4a16"].with_group_size(32)
    plain = output_error(qpass.quantize(spiked(), scheme, progress=False), reference, data)
    errors = {}
    for algorithms in (["awq"], [{"awq": {"clip": True}}], ["awq", "gptq"]):
        model = qpass.quantize(spiked(), qpass.Recipe(scheme, algorithms=algorithms), calibration=data, progress=False)
        errors[str(algorithms)] = output_error(model, reference, data)
    assert max(errors.values()) < plain, (plain, errors)
    qpass.save(model, tmp_path)
    assert torch.equal(output_of(qpass.load(tmp_path), data[0]), output_of(model, data[0]))
