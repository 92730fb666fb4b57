"""GPTQ: equal to a textbook loop in float64, better than rounding to nearest, on every architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qpass
from qpass.calibrate.gptq_math import descend, energy_order, gptq, inverse_factor, refit
from qpass.calibrate.scale_search import Grid, find_grid, grid_ends, round_to_grid
from qpass.scheme import PRESETS
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight
from tests.qpass.calibrate.small_models import QUICK_FIRST, output_error, output_of, small_model, tokens


def textbook(weight: Tensor, hessian: Tensor, order: Tensor, grid: Grid, ends: tuple[int, int], part: float) -> Tensor:
    """The algorithm as the paper has it, one column after another, each time with the inverse of what is left."""
    w, k = weight.double().clone(), weight.shape[1]
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h += torch.eye(k, dtype=torch.float64) * part * h.diagonal().mean()
    codes = torch.empty_like(w)
    size = k // grid.scale.shape[1]
    left = order.tolist()
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        column = left[0]
        scale = grid.scale[:, column // size].double()
        zero = 0 if grid.zero_point is None else grid.zero_point[:, column // size].double()
        q = ((w[:, column] / scale).round() + zero).clamp(*ends)
        codes[:, column] = q
        error = (w[:, column] - (q - zero) * scale) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0][None]
        left = left[1:]
    return codes


def spec_of(name: str, n: int, k: int, group: int) -> LinearSpec:
    return LinearSpec(family=name[:5], weight=PRESETS[name].with_group_size(group).weight, activation=None,
                      out_features=n, in_features=k)


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w3a16"])
@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("block_size", [7, 64])
def test_equals_the_textbook(name: str, actorder: str | None, block_size: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(400, 48) @ torch.randn(48, 48)
    x[:, 5] = 0  # a column that no input reaches
    weight = torch.randn(20, 48)
    spec = spec_of(name, 20, 48, 16)
    hessian = x.t() @ x
    order = energy_order(hessian, actorder)
    grid = find_grid(weight, spec, "absmax", torch.bfloat16)
    codes = gptq(weight, inverse_factor(hessian, order, 0.01), order, grid, grid_ends(spec), block_size)
    want = textbook(weight, hessian, order, grid, grid_ends(spec), 0.01)
    # In float32 a value may lie on the other side of a tie, which then moves what follows in that row.
    assert (codes == want).double().mean() > 0.995


def test_lowers_the_error_of_the_output() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    weight = torch.randn(32, 64)
    spec = spec_of("w4a16", 32, 64, 32)
    grid = find_grid(weight, spec, "absmax", torch.float32)
    nearest = dequantize_weight(round_to_grid(weight, grid, spec, torch.float32), spec)
    hessian = x.t() @ x
    order = energy_order(hessian, "static")
    codes = gptq(weight, inverse_factor(hessian, order, 0.01), order, grid, grid_ends(spec))
    found = (codes.view(32, 2, 32) * grid.scale[..., None]).view(32, 64)
    assert (x @ (found - weight).t()).square().sum() < 0.7 * (x @ (nearest - weight).t()).square().sum()


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym"])
def test_a_sweep_moves_every_integer_to_its_best_place_given_the_others(name: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(400, 48) @ torch.randn(48, 48)
    x[:, 5] = 0
    weight, spec = torch.randn(9, 48), spec_of(name, 9, 48, 16)
    hessian, ends = x.t() @ x, grid_ends(spec)
    grid = find_grid(weight, spec, "absmax", torch.bfloat16)
    start = gptq(weight, inverse_factor(hessian, torch.arange(48), 0.01), torch.arange(48), grid, ends)
    found = descend(start, grid, weight, hessian, ends, 0.01, block_size=7)
    damped = hessian.double() + torch.eye(48) * 0.01 * hessian.diagonal().mean()
    scale = grid.scale.double().repeat_interleave(16, 1)
    zero = 0 if grid.zero_point is None else grid.zero_point.double().repeat_interleave(16, 1)

    def error(codes: Tensor) -> Tensor:
        e = (codes.double() - zero) * scale - weight.double()
        return ((e @ damped) * e).sum(-1)

    want = start.clone()
    for column in range(48):
        choices = []
        for value in range(ends[0], ends[1] + 1):
            want[:, column] = value
            choices.append(error(want))
        want[:, column] = torch.stack(choices).argmin(0) + ends[0]
    # In float32 a value may lie on the other side of a tie, which then moves what follows in that row.
    assert (found == want).double().mean() > 0.99
    assert (error(found) <= error(start) * (1 + 1e-6)).all() and error(found).sum() < 0.99 * error(start).sum()


def test_a_hessian_that_is_not_positive_definite_is_dampened_more() -> None:
    h = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    factor = inverse_factor(h, torch.arange(3), 0.01)
    assert factor.dampening > 0.01 and torch.isfinite(factor.upper).all()
    with pytest.raises(ValueError, match="NaN or Inf"):
        inverse_factor(h * torch.nan, torch.arange(3), 0.01)


@pytest.mark.parametrize("name", QUICK_FIRST)
def test_better_than_nearest_and_the_same_when_loaded(name: str, tmp_path: Path) -> None:
    data, reference = tokens(), small_model(name)
    scheme = PRESETS["w4a16"].with_group_size(32)
    nearest = qpass.quantize(small_model(name), scheme, progress=False)
    model = qpass.quantize(small_model(name), qpass.Recipe(scheme, algorithms=["gptq"]), calibration=data,
                           progress=False)
    assert output_error(model, reference, data) < 0.9 * output_error(nearest, reference, data)
    qpass.save(model, tmp_path)
    again = qpass.load(tmp_path)
    assert torch.equal(output_of(again, data[0]), output_of(model, data[0]))


@pytest.mark.parametrize("settings", [
    {"propagate": False}, {"actorder": None}, {"block_size": 16}, {"scales": "signed"}, {"targets": ["*.mlp.*"]},
], ids=str)
def test_settings(settings: dict[str, object]) -> None:
    data, reference = tokens(), small_model("llama", torch.bfloat16).float()
    scheme = PRESETS["w4a8"].with_group_size(32)
    nearest = qpass.quantize(small_model("llama", torch.bfloat16), scheme, progress=False).float()
    model = qpass.quantize(small_model("llama", torch.bfloat16), qpass.Recipe(scheme, algorithms=[{"gptq": settings}]),
                           calibration=data, progress=False).float()
    assert output_error(model, reference, data) < output_error(nearest, reference, data)
    if "targets" in settings:
        same = [torch.equal(a.canonical().qweight, b.canonical().qweight) for (name, a), (_, b) in zip(
            model.named_modules(), nearest.named_modules(), strict=True) if name.endswith("q_proj")]
        assert same == [True, True]


def test_a_note_tells_of_raised_dampening() -> None:
    model = small_model("llama")
    recipe = qpass.Recipe(replace(PRESETS["w8a16"], weight=PRESETS["w4a16"].with_group_size(32).weight),
                          algorithms=[{"gptq": {"dampening_frac": 0}}])
    qpass.quantize(model, recipe, calibration=tokens(1, 8), progress=False)
    assert any("not positive definite; dampening raised from 0 to" in note for note in qpass.explain(model).notes)


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym"])
def test_refitted_scales_lower_the_error_of_the_output(name: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    weight, hessian = torch.randn(32, 64), x.t() @ x
    spec = spec_of(name, 32, 64, 16)
    grid = find_grid(weight, spec, "absmax", torch.float32)
    order = energy_order(hessian, "static")
    codes = gptq(weight, inverse_factor(hessian, order, 0.01), order, grid, grid_ends(spec))

    def error(scale: Tensor) -> float:
        zero = 0 if grid.zero_point is None else grid.zero_point[..., None]
        found = ((codes.view(32, 4, 16) - zero) * scale[..., None]).view(32, 64)
        return float((x @ (found - weight).t()).square().sum())

    found = refit(codes, grid, weight, hessian, torch.float32)
    assert error(found.scale) < error(grid.scale)
    for factor in (0.999, 1.001):  # it is the minimum in every direction tried
        moved = found.scale * torch.where(torch.rand(32, 4) < 0.5, factor, 1.0)
        assert error(moved) > error(found.scale) * (1 - 1e-4)
    stored = refit(codes, grid, weight, hessian, torch.bfloat16).scale
    assert torch.equal(stored, stored.bfloat16().float())
