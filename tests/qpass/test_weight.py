"""Weights: the rounding is compressed-tensors', decoding is half a step off, blocks of rows change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qpass.weight
from qpass.errors import WeightError
from qpass.scheme import PRESETS, Scheme, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import check_weight, dequantize_weight, quantize_weight

GRANULARITIES = ["per_tensor", "per_channel", "per_group"]


def spec_of(bits: int, granularity: str, *, symmetric: bool = True, n: int = 24, k: int = 96) -> LinearSpec:
    weight = WeightArgs(bits=bits, granularity=granularity, group_size=32 if granularity == "per_group" else None,
                        symmetric=symmetric)  # type: ignore[arg-type]
    return LinearSpec(family=Scheme(name="x", weight=weight).family, weight=weight, activation=None, out_features=n,
                      in_features=k)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_formula_in_float64(bits: int, granularity: str, symmetric: bool) -> None:
    spec = spec_of(bits, granularity, symmetric=symmetric)
    w = torch.randn(24, 96) + 0.3
    got = quantize_weight(w, spec)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    groups = w.double().reshape(24, spec.groups, -1)
    over = (0, 1, 2) if granularity == "per_tensor" else (2,)
    least, most = groups.amin(over, keepdim=True), groups.amax(over, keepdim=True)
    scale = got.scale.double().unsqueeze(-1)
    if symmetric:
        expected = torch.maximum(least.abs(), most.abs()) / ((high - low) / 2)
        zero_point: torch.Tensor | float = 0.0
        assert got.zero_point is None
    else:
        expected = (most.clamp(min=0) - least.clamp(max=0)) / (high - low)
        assert got.zero_point is not None
        zero_point = got.zero_point.double().unsqueeze(-1)
        assert torch.equal(zero_point, (low - (least.clamp(max=0) / scale).round()).clamp(low,
                                                                                          high).expand_as(zero_point))
    torch.testing.assert_close(scale, expected.expand_as(scale), rtol=1e-6, atol=0)
    q = ((groups / scale).round() + zero_point).clamp(low, high).reshape(24, 96)
    off = (got.qweight.double() - q).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01  # float32 division may fall on the other side of a half
    decoded = dequantize_weight(got, spec, torch.float64)
    inside = ((groups / scale).round() + zero_point).clamp(low, high) == ((groups / scale).round() + zero_point)
    error = (decoded.reshape_as(groups) - groups).abs() / scale
    assert error[inside].max() <= 0.5001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w8a8", "w3a16", "w8a16"])
def test_decodes_what_compressed_tensors_decodes(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = PRESETS[name].weight
    weight = replace(weight, group_size=32) if weight.group_size else weight
    spec = LinearSpec(family="x", weight=weight, activation=None, out_features=24, in_features=96)
    w = torch.randn(24, 96).to(dtype)
    args = QuantizationArgs(num_bits=weight.bits, symmetric=weight.symmetric, group_size=weight.group_size,
                            strategy="group" if weight.group_size else "channel")
    groups = w.reshape(24, spec.groups, -1)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    got = quantize_weight(w, spec)
    # They compute scales in the weight's own dtype, here in float32 and rounded once: one unit in the last place.
    torch.testing.assert_close(got.scale.float(), scale.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    theirs = quantize(w, got.scale, got.zero_point if got.zero_point is not None else torch.zeros_like(scale), args,
                      dtype=torch.int8)
    assert (theirs.int() - got.qweight.int()).abs().max() <= 1
    decoded = dequantize(got.qweight, got.scale, got.zero_point, args)
    torch.testing.assert_close(dequantize_weight(got, spec, dtype), decoded.to(dtype), rtol=2 * torch.finfo(dtype).eps,
                               atol=0)
    if zero_point is not None and got.zero_point is not None:
        assert (zero_point.int() - got.zero_point.int()).abs().max() <= 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_blocks_of_rows_change_nothing(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(4, granularity, symmetric=False)
    w = torch.randn(24, 96)
    whole = quantize_weight(w, spec)
    monkeypatch.setattr(qpass.weight, "_ROWS_AT_ONCE_ELEMENTS", 96 * 5)
    parts = quantize_weight(w, spec)
    strided = quantize_weight(w.t().contiguous().t(), spec)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, parts.tensors[name]) and torch.equal(tensor, strided.tensors[name])


def test_quantizing_a_decoded_weight_again_gives_the_same() -> None:
    for bits in (2, 4, 8):
        spec = spec_of(bits, "per_group", symmetric=False)
        once = quantize_weight(torch.randn(24, 96), spec)
        decoded = dequantize_weight(once, spec)
        again = dequantize_weight(quantize_weight(decoded, spec), spec)
        torch.testing.assert_close(again, decoded, rtol=1e-5, atol=1e-6)


def test_all_zero_and_tiny_groups_have_usable_scales() -> None:
    w = torch.zeros(24, 96, dtype=torch.float16)
    w[1] = 6e-8  # the smallest float16: its scale would round to zero
    for symmetric in (True, False):
        got = quantize_weight(w, spec_of(4, "per_group", symmetric=symmetric))
        assert (got.scale > 0).all() and torch.isfinite(got.scale).all()
        assert dequantize_weight(got, spec_of(4, "per_group", symmetric=symmetric)).abs().max() < 1e-3


def test_check_weight_names_the_layer_and_the_numbers() -> None:
    good = torch.full((4, 8), 3e38)  # a sum of these overflows, and none of them is infinite
    check_weight(good, "a.weight")
    check_weight(torch.randn(2, 3, 4), "experts")
    bad = torch.randn(4, 8)
    bad[0, 0], bad[1, 1], bad[1, 2] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(WeightError, match=r"a\.weight holds 1 NaN and 2 Inf"):
        check_weight(bad, "a.weight")
    check_weight(bad, "a.weight", allow_nonfinite=True)
    with pytest.raises(WeightError, match=r"shape \(0, 8\)"):
        check_weight(torch.ones(0, 8), "a.weight")
    with pytest.raises(WeightError, match="meta device"):
        check_weight(torch.ones(2, 8, device="meta"), "a.weight")
