"""AutoRound: learned rounding stays on the grid, starts where it is told, and matches a block better than nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qpass
from qpass.calibrate.rounding_math import LearnedRounding
from qpass.calibrate.scale_search import find_grid, grid_ends, round_to_grid
from qpass.scheme import PRESETS
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight
from tests.qpass.calibrate.small_models import QUICK_FIRST, output_error, output_of, small_model, tokens


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym"])
def test_starts_at_nearest_or_at_given_codes_and_stays_on_the_grid(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    spec = LinearSpec(family="w4a16", weight=PRESETS[name].with_group_size(16).weight, activation=None,
                      out_features=6, in_features=32)
    grid = find_grid(weight, spec, "absmax", torch.bfloat16)
    nearest = round_to_grid(weight, grid, spec, torch.bfloat16)
    learned = LearnedRounding(weight, grid, grid_ends(spec), torch.bfloat16)
    torch.testing.assert_close(learned(), dequantize_weight(nearest, spec))
    other = (nearest.qweight + torch.randint(-1, 2, (6, 32))).clamp(*grid_ends(spec)).float()
    started = LearnedRounding(weight, grid, grid_ends(spec), torch.bfloat16, other)
    assert torch.equal(started.result()[0], other)
    x = torch.randn(200, 32) @ torch.randn(32, 32)

    def error() -> torch.Tensor:
        return (x @ (learned() - weight).t()).square().mean()

    before = best = float(error())
    for step in range(200):
        loss = error()
        if float(loss) < best:
            best = float(loss)
            learned.keep()
        loss.backward()
        learned.step((1 - step / 200) / 200, (1 - step / 200) / 200)
    learned.go_back()
    codes, found = learned.result()
    assert float(error()) == best < 0.9 * before
    assert torch.equal(found.scale, found.scale.to(torch.bfloat16).float())
    assert torch.equal(codes, codes.round()) and codes.amin() >= -8 and codes.amax() <= 7
    zero = 0 if found.zero_point is None else found.zero_point[..., None]
    torch.testing.assert_close(((codes.view(6, 2, 16) - zero) * found.scale[..., None]).view(6, 32), learned())


@pytest.mark.parametrize("name", QUICK_FIRST)
def test_better_than_nearest_and_the_same_when_loaded(name: str, tmp_path: Path) -> None:
    data, reference = tokens(8, 32), small_model(name)
    scheme = PRESETS["w4a16"].with_group_size(32)
    nearest = qpass.quantize(small_model(name), scheme, progress=False)
    recipe = qpass.Recipe(scheme, algorithms=[{"autoround": {"iterations": 30, "batch_size": 4}}])
    model = qpass.quantize(small_model(name), recipe, calibration=data, progress=False)
    assert output_error(model, reference, data) < 0.9 * output_error(nearest, reference, data)
    qpass.save(model, tmp_path)
    assert torch.equal(output_of(qpass.load(tmp_path), data[0]), output_of(model, data[0]))


def test_after_gptq_with_rounded_activations() -> None:
    data, reference = tokens(8, 32), small_model("llama")
    scheme = PRESETS["w4a8"].with_group_size(32)
    # Aiming at the float model's values, GPTQ leaves this little model nothing that 40 steps could gain.
    gptq, errors = {"gptq": {"match_float": False}}, []
    for algorithms in ([gptq], [gptq, {"autoround": {"iterations": 40, "batch_size": 8}}]):
        model = qpass.quantize(small_model("llama"), qpass.Recipe(scheme, algorithms=algorithms), calibration=data,
                               progress=False)
        errors.append(output_error(model, reference, data))
    assert errors[1] < 0.95 * errors[0]
