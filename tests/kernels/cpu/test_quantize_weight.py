"""Native weight quantization gives what the formulas of qpass/weight.py give in plain torch, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qpass.kernels.cpu import native, native_weights
from qpass.kernels.cpu.x86 import X86_TILE64
from qpass.kernels.layout import NonFinite
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import quantize_weight

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=str(native.refuses()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def spec_of(n: int, k: int, group: int | None, bits: int, *, symmetric: bool) -> LinearSpec:
    weight = WeightArgs(bits=bits, group_size=group, granularity="per_group" if group else "per_channel",
                        symmetric=symmetric)
    return LinearSpec(family=f"w{bits}a16", weight=weight, activation=None, out_features=n, in_features=k)


def adversarial(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of zeros, ties, one sign only, huge, subnormal, NaN and Inf among ordinary ones."""
    w = torch.randn(n, k)
    w[0] = 0
    w[1] = torch.arange(k) % 16 - 8  # with scale 1 and halves: exact ties
    w[1, 1::2] += 0.5
    w[2] = w[2].abs() + 1
    w[3] = -w[3].abs() - 1
    w[4] *= torch.finfo(dtype).max / 8
    w[5] *= torch.finfo(dtype).tiny / 4
    w[6, ::3], w[6, 1::3], w[6, 2::3] = float("nan"), float("inf"), float("-inf")
    w[7] = -0.0
    w[8, 1:] = 1e-30
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("k", "group"), [(96, 32), (77, None), (1, None), (384, 128), (608, 32)])
def test_equals_the_formulas_bit_for_bit(dtype: torch.dtype, symmetric: bool, bits: int, k: int,
                                         group: int | None) -> None:
    for weight in (adversarial(41, k, dtype), (torch.randn(33, k) * 0.02).to(dtype)):
        spec = spec_of(weight.shape[0], k, group, bits, symmetric=symmetric)
        want = quantize_weight(weight, spec)
        got = native_weights.quantize_weight(weight, spec.group_size, bits, symmetric=symmetric)
        assert got.tensors.keys() == want.tensors.keys()
        for name, tensor in want.tensors.items():
            assert got.tensors[name].dtype == tensor.dtype
            assert torch.equal(got.tensors[name], tensor), (name, weight.shape)
        if bits != 2:
            packed = native_weights.quantize_pack(weight, spec.group_size, bits, symmetric=symmetric)
            separate = X86_TILE64.pack(want, spec)
            assert packed.keys() == separate.keys()
            assert all(torch.equal(packed[name], tensor) for name, tensor in separate.items())


def test_every_float_that_16_bits_hold() -> None:
    """All bfloat16 and float16 numbers, in groups that mix magnitudes."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
        weight = every[torch.randperm(1 << 16)].view(512, 128)
        for symmetric in (True, False):
            spec = spec_of(512, 128, 32, 4, symmetric=symmetric)
            want = quantize_weight(weight, spec)
            got = native_weights.quantize_weight(weight, 32, 4, symmetric=symmetric)
            assert all(torch.equal(got.tensors[name], tensor) for name, tensor in want.tensors.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_quotients_at_and_next_to_ties(dtype: torch.dtype, bits: int) -> None:
    """Codes n + 1/2 of random scales, and the numbers next to them, where one that fits the dtype is near."""
    half, groups = 1 << bits - 1, 3000
    scale = (torch.rand(groups, 1) * 2 ** torch.randint(-10, 10, (groups, 1))).to(dtype).float()
    tie = ((torch.randint(-half, half, (groups, 32)) + 0.5) * scale).to(dtype)
    weight = torch.nextafter(tie, torch.randn(groups, 32).to(dtype)) if dtype == torch.float32 else (
        tie.view(torch.int16) + torch.randint(-1, 2, (groups, 32), dtype=torch.int16)).view(dtype)
    weight = torch.where(torch.rand(groups, 32) < 0.5, weight, tie)
    weight[:, 0] = (scale[:, 0] * (half - 0.5)).to(dtype)  # makes it the group's scale, or one next to it
    for symmetric in (True, False):
        spec = spec_of(groups // 4, 128, 32, bits, symmetric=symmetric)
        want = quantize_weight(weight.view(-1, 128), spec)
        got = native_weights.quantize_weight(weight.view(-1, 128), 32, bits, symmetric=symmetric)
        assert all(torch.equal(got.tensors[name], tensor) for name, tensor in want.tensors.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_weight_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    for group, symmetric in ((32, True), (64, False), (576, True), (9, True)):
        weight = torch.randn(37, 576).to(dtype)
        native_weights.quantize_pack(weight, group, 4, symmetric=symmetric, finite=True)
        for wrong in ("nan", "inf"):
            for place in ((0, 0), (17, 300), (36, 575)):
                broken = weight.clone()
                broken[place] = float(wrong)
                with pytest.raises(NonFinite):
                    native_weights.quantize_pack(broken, group, 4, symmetric=symmetric, finite=True)
                native_weights.quantize_pack(broken, group, 4, symmetric=symmetric)


def test_the_layout_declines_what_it_does_not_take() -> None:
    quantize = X86_TILE64.quantize
    assert quantize is not None
    spec = spec_of(32, 64, 32, 4, symmetric=True)
    assert quantize(torch.randn(64, 32).t(), spec, None) is None
    assert quantize(torch.randn(32, 64).double(), spec, None) is None
    tensor = LinearSpec(family="w8a16", weight=WeightArgs(bits=8, granularity="per_tensor"), activation=None,
                        out_features=32, in_features=64)
    assert quantize(torch.randn(32, 64), tensor, None) is None
    assert quantize(torch.randn(32, 64), spec, None) is not None
    asymmetric = replace(spec, family="w4a8", activation=ActivationArgs(symmetric=False))
    weight = torch.randn(32, 64)
    got, want = quantize(weight, asymmetric, None), X86_TILE64.pack(quantize_weight(weight, asymmetric), asymmetric)
    assert got is not None and got.keys() == want.keys() and torch.equal(got["colsum"], want["colsum"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 1001).to(dtype)
    assert torch.equal(native_weights.largest(weight), weight.abs().amax().float())
    weight[0, 0], weight[-1, -1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert native_weights.largest(weight) == torch.finfo(dtype).max and native_weights.largest(weight[:0]) == 0
    for wrong in ("nan", "inf", "-inf"):
        for place in ((0, 0), (35, 500), (69, 1000)):
            broken = weight.clone()
            broken[place] = float(wrong)
            assert not native_weights.largest(broken).isfinite()


def test_sizes_are_checked() -> None:
    w, q, scale = torch.randn(4, 64), torch.empty(4, 64, dtype=torch.int8), torch.empty(4, 2)

    def call(nbytes: int = 1024, n: int = 4, group: int = 32, bits: int = 4, symmetric: int = 1, dtype: int = 0) -> str:
        library = native.library()
        code = library.qp_quantize_weight(w.data_ptr(), dtype, nbytes, n, 64, group, bits, symmetric, q.data_ptr(),
                                          scale.data_ptr(), None, 1)
        return "" if code == 0 else library.qp_last_error().decode()

    assert call() == ""
    assert "N * K" in call(nbytes=1000) and "N * K" in call(n=5) and "group size" in call(group=48)
    assert "bits" in call(bits=9) and "float32" in call(dtype=3) and "zero points" in call(symmetric=0)
    assert "sizes" in call(n=0)
