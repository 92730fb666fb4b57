"""Activation ranges: percentile and mse clip rare large values, in a layer as in a model; minmax holds them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qpass
from qpass.activation_scale import ActivationScale, scale_of_range
from qpass.calibrate.input_range import Histograms, InputRanges
from qpass.errors import RecipeError
from qpass.scheme import PRESETS
from tests.qpass.calibrate.small_models import output_error, output_of, small_model, tokens


@pytest.mark.parametrize("scheme", ["w8a8_static", "w8a8_static_asym"])
@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_clips_what_is_rare(scheme: str, method: str) -> None:
    torch.manual_seed(0)
    activation = PRESETS[scheme].activation
    assert activation is not None
    x = torch.randn(200000)
    x[7] = 12.0
    ranges = InputRanges()
    ranges.add("a", x)
    wide = ranges.scale("a", activation, torch.float32)
    histograms = Histograms(ranges)
    for part in x.split(30000):
        histograms.add("a", part)
    histograms.narrow(method, 99.9, {"a": activation})
    found = ranges.scale("a", activation, torch.float32)
    assert float(found.scale) < 0.9 * float(wide.scale)

    def error(scale: ActivationScale) -> float:
        zero = 0 if scale.zero_point is None else scale.zero_point
        return float((((x / scale.scale).round() + zero).clamp(-128, 127).sub(zero) * scale.scale - x).square().sum())

    if method == "mse":
        low, high = float(x.min()), float(x.max())
        tried = (scale_of_range(low, high * part / 100, activation, torch.float32) for part in range(30, 101))
        assert error(found) < min(1.02 * min(map(error, tried)), 0.9 * error(wide))
    else:
        low, high = ranges.of("a")
        assert 0.998 < float(((x >= low) & (x <= high)).double().mean()) < 0.9999


def test_in_a_recipe_and_the_same_when_loaded(tmp_path: Path) -> None:
    data, reference = tokens(8, 32), small_model("llama")
    errors = {}
    for method in ("minmax", "percentile", "mse"):
        recipe = qpass.Recipe("w8a8_static", algorithms=[{"activation_ranges": {"method": method, "percentile": 99.9}}])
        model = qpass.quantize(small_model("llama"), recipe, calibration=data, progress=False)
        errors[method] = output_error(model, reference, data)
    plain = qpass.quantize(small_model("llama"), "w8a8_static", calibration=data, progress=False)
    assert errors["minmax"] == pytest.approx(output_error(plain, reference, data), rel=0.2)
    assert len(set(errors.values())) == 3
    qpass.save(model, tmp_path)
    assert torch.equal(output_of(qpass.load(tmp_path), data[0]), output_of(model, data[0]))


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"method": "median"}, {"percentile": 120}):
        with pytest.raises(RecipeError, match="of algorithm activation_ranges must be"):
            qpass.Recipe("w8a8_static", algorithms=[{"activation_ranges": wrong}])
