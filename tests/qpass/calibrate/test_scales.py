"""Scales without data: on the grid, exact as stored, no worse by their own measure, and no shrinking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qpass
from qpass.calibrate.scale_search import find_grid, round_to_grid
from qpass.recipes.algorithm import SCALE_METHODS
from qpass.scheme import PRESETS
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight
from tests.qpass.calibrate.small_models import output_error, output_of, small_model, tokens


def spec_of(name: str, n: int, k: int) -> LinearSpec:
    return LinearSpec(family=name[:5], weight=PRESETS[name].with_group_size(32).weight, activation=None,
                      out_features=n, in_features=k)


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w3a16", "w8a16"])
@pytest.mark.parametrize("method", SCALE_METHODS)
def test_every_method_stays_on_the_grid(name: str, method: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 64) * torch.rand(24, 1)
    weight[3, :32] = 0
    weight[4, 5] = 30
    spec = spec_of(name, 24, 64)
    grid = find_grid(weight, spec, method, torch.bfloat16)
    found = round_to_grid(weight, grid, spec, torch.bfloat16)
    assert torch.equal(found.scale.float(), grid.scale) and bool((grid.scale != 0).all())
    top = 1 << spec.weight.bits - 1
    assert -top <= int(found.qweight.amin()) and int(found.qweight.amax()) < top
    back = dequantize_weight(found, spec)
    assert torch.equal(back[3, :32], torch.zeros(32))
    assert (back - weight).square().sum() < 0.05 * weight.square().sum() * 4 ** (4 - min(spec.weight.bits, 4))


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym"])
def test_searches_lower_the_error_and_do_not_shrink(name: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(256, 64)
    spec = spec_of(name, 256, 64)

    def of(method: str) -> tuple[float, float]:
        back = dequantize_weight(round_to_grid(weight, find_grid(weight, spec, method, torch.float32), spec,
                                               torch.float32), spec)
        return float((back - weight).square().sum()), float((back * weight).sum() / weight.square().sum())

    (plain, gain), (searched, kept) = of("absmax"), of("signed")
    assert searched < plain
    assert abs(kept - 1) < 2e-3 and abs(kept - 1) <= abs(gain - 1) + 1e-3


def test_a_negative_scale_is_used_and_survives_the_file(tmp_path: Path) -> None:
    data, reference = tokens(4), small_model("llama")
    scheme = PRESETS["w4a8"].with_group_size(32)
    recipe = qpass.Recipe(scheme, algorithms=[{"scales": {"method": "signed"}}])
    model = qpass.quantize(small_model("llama"), recipe, progress=False)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert bool((layer.canonical().scale < 0).any())
    nearest = qpass.quantize(small_model("llama"), scheme, progress=False)
    assert output_error(model, reference, data) < output_error(nearest, reference, data)
    qpass.save(model, tmp_path)
    assert torch.equal(output_of(qpass.load(tmp_path), data[0]), output_of(model, data[0]))
