"""Integer scales: chosen ones can be taken apart, in every dtype; the choice keeps weights from shrinking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.integer_scales import LARGEST_MULTIPLIER, factor
from qpass.scheme import preset
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight, quantize_weight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def spec_of(n: int, k: int, group: int = 32, scales: str = "integer") -> LinearSpec:
    scheme = preset("w4a8_int_scales" if scales == "integer" else "w4a8").with_group_size(group)
    return LinearSpec(family="w4a8", weight=scheme.weight, activation=scheme.activation, out_features=n, in_features=k)


def taken_apart(weight: CanonicalWeight) -> tuple[Tensor, Tensor]:
    parts = factor(weight.scale)
    assert parts is not None
    multiplier, channel = parts
    assert multiplier.dtype == torch.int8 and 1 <= int(multiplier.abs().min())
    assert int(multiplier.abs().max()) <= LARGEST_MULTIPLIER
    assert torch.equal((multiplier * channel[:, None]).to(weight.scale.dtype), weight.scale)
    return multiplier, channel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chosen_scales_can_be_taken_apart(dtype: torch.dtype) -> None:
    w = torch.randn(40, 256) * torch.logspace(-2, 1, 40)[:, None]
    w[3, 32:64] = 0  # a group of zeros
    w[4] = 0  # a row of zeros
    w[5] *= 1e-4
    w[6, 7] = 100  # an outlier: the other groups' multipliers are 1
    weight = quantize_weight(w.to(dtype), spec_of(40, 256))
    multiplier, _ = taken_apart(weight)
    assert (multiplier < 0).any() and (multiplier > 0).any()
    assert (multiplier[6, 1:].abs() == 1).all()
    assert torch.isfinite(weight.scale).all() and (weight.scale != 0).all()
    assert (weight.qweight[4] == 0).all() and (weight.qweight[3, 32:64] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e30])
def test_sizes_at_the_edge_of_the_dtype(dtype: torch.dtype, size: float) -> None:
    w = (torch.randn(8, 128) * size).clamp(-6e4, 6e4) if dtype is torch.float16 else torch.randn(8, 128) * size
    weight = quantize_weight(w.to(dtype), spec_of(8, 128))
    taken_apart(weight)
    assert torch.isfinite(dequantize_weight(weight, spec_of(8, 128))).all()


def test_the_largest_weight_of_a_group_is_met_by_the_longer_side_of_the_grid() -> None:
    w = torch.rand(4, 64) * 0.1
    w[:2, ::32], w[2:, ::32] = 1.0, -1.0
    weight = quantize_weight(w, spec_of(4, 64))
    assert (weight.scale[:2] < 0).all() and (weight.scale[2:] > 0).all()
    assert (weight.qweight[:, ::32] == -8).all()


def test_weights_do_not_shrink() -> None:
    """Neither the error along the weight itself nor the error as a whole is as large as with scales of amax / 7.5."""
    w = torch.randn(64, 1024)
    along, size = {}, {}
    for scales in ("amax", "integer"):
        spec = spec_of(64, 1024, 64, scales)
        error = (dequantize_weight(quantize_weight(w, spec), spec) - w).view(64, -1, 64)
        along[scales] = float((error * w.view_as(error)).sum(-1).square().mean())
        size[scales] = float(error.square().mean())
    assert along["integer"] < 0.4 * along["amax"] and size["integer"] < 0.9 * size["amax"], (along, size)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, spec = torch.randn(37, 128), spec_of(37, 128)
    whole = quantize_weight(w, spec)
    monkeypatch.setattr("qpass.weight._ROWS_AT_ONCE_ELEMENTS", 5 * 128)
    pieces = quantize_weight(w, spec)
    assert all(torch.equal(whole.tensors[name], pieces.tensors[name]) for name in whole.tensors)


def test_what_cannot_be_taken_apart() -> None:
    free = quantize_weight(torch.randn(20, 256).bfloat16(), spec_of(20, 256, scales="amax")).scale
    assert factor(free) is None
    whole = torch.tensor([[1.0, 15.0], [3.0, -6.0]]).repeat(20, 1)
    assert factor(whole) is not None
    for bad in (16.0, 0.0, -0.0, 1.5 / 16, float("nan"), float("inf"), 1e-40, 1 + 2**-23):
        broken = whole.clone()
        broken[-2, 0] = bad
        assert factor(broken) is None, bad
    assert factor(whole[:, :1]) is None  # one group a row has nothing to take apart
    assert factor(torch.tensor([[2.0**-149, 15 * 2.0**-149]])) is not None


def test_parts_with_a_common_divisor_and_of_each_dtype() -> None:
    for dtype in DTYPES:
        parts = factor(torch.tensor([[0.5, -3.5, 2.0], [12.0, 8.0, 4.0]], dtype=dtype))
        assert parts is not None
        assert parts[0].tolist() == [[1, -7, 4], [3, 2, 1]] and parts[1].tolist() == [0.5, 4.0]


def test_parts_do_not_depend_on_how_many_rows_are_taken_apart_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = quantize_weight(torch.randn(100, 256).bfloat16(), spec_of(100, 256)).scale
    whole = factor(scale)
    monkeypatch.setattr("qpass.integer_scales._AT_ONCE", 7 * scale.shape[1])
    pieces = factor(scale)
    assert whole is not None and pieces is not None
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    broken = scale.clone()
    broken[-1, 0] = 0.0
    assert factor(broken) is None
