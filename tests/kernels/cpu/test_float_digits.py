"""Float rows times 4-bit weights, which AVX2 multiplies as integers of three digits, on hard inputs beside float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qpass.kernels.cpu import native
from qpass.weight import dequantize_weight, quantize_weight
from tests.kernels.cpu.test_x86 import HERE, make

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=native.refuses() or "")
every_form = pytest.mark.parametrize(("short", "group", "asym"), [
    (short, group, asym) for short in HERE for group in (32, 96, 64, 192, None) for asym in (False, True)])
N, K = 37, 192


def product(short: str, group: int | None, asym: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The kernel of random weights with a few rows of extremes, and the weight in float64."""
    found, spec, _ = make("w4a16", short, N, K, group, asym=asym)
    weight = quantize_weight(torch.randn(N, K) + 0.2, spec)
    sign = torch.where(torch.arange(K) % 2 == 0, 7, -8)
    for row, codes in enumerate((torch.full((K,), -8), torch.full((K,), 7), sign, torch.zeros(K))):
        weight.tensors["qweight"][row] = codes.to(torch.int8)
    if asym:
        weight.tensors["zero_point"][3] = 0
        weight.tensors["zero_point"][0] = 7
        weight.tensors["zero_point"][1] = -8
    packed = found.layout.pack(weight, spec)
    tensors = [packed[name] for name in found.layout.names(spec)]
    return lambda x: found.forms["linear"](x, tensors, None, spec), dequantize_weight(weight, spec).double()


def hard_rows() -> Tensor:
    """Numbers of many sizes in a group, neighbours of powers of two, digits of -128 alone, tiny and huge numbers."""
    generator = torch.Generator().manual_seed(3)
    sign = torch.where(torch.arange(K) % 2 == 0, 1.0, -1.0)
    below = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0))
    wild = torch.randn(K, generator=generator) * torch.logspace(-6, 6, K)[torch.randperm(K, generator=generator)]
    one = torch.zeros(K)
    one[70] = 1.0
    digits = [torch.full((K,), float(i)) for i in (-0x808080, -0x018080, -0x8080, -0x7f80, 0x7f7f7f, 0x7effff)]
    for row in digits:
        row[::64] = 2.0**22  # sets the step
    edges = [torch.full((K,), 2 - i * 2.0**-9) for i in (0, 1, 2, 3, 4, 8)]
    return torch.stack([torch.ones(K), sign, below * sign, below.expand(K), -below.expand(K), wild, -wild.abs(), one,
                        torch.zeros(K), torch.full((K,), 2.0**-100), torch.full((K,), 3e28) * sign, *digits, *edges])


@every_form
def test_hard_rows_beside_float64(short: str, group: int | None, asym: bool) -> None:
    run, w = product(short, group, asym)
    x = hard_rows()
    y, exact = run(x), x.double() @ w.t()
    runs = x.double().abs().view(len(x), -1, 64)
    largest = runs.amax(2, keepdim=True).expand_as(runs).flatten(1)
    allowed = 2.0**-23 * exact.abs() + 4e-6 * (x.double().abs() @ w.abs().t()) + 2.0**-23 * (largest @ w.abs().t())
    assert bool(((y.double() - exact).abs() <= allowed + 2.0**-120).all()), ((y.double() - exact).abs() - allowed).max()
    if asym:
        assert not y[:, 3].any()  # weights of zero, whatever their zero point
    for first, last in ((0, 1), (5, 6), (6, 9), (1, len(x))):
        assert torch.equal(run(x[first:last]), y[first:last])


@every_form
def test_rows_that_are_not_finite(short: str, group: int | None, asym: bool) -> None:
    """Inf and NaN come out where float arithmetic has them, and no other row changes."""
    run, w = product(short, group, asym)
    x = torch.randn(7, K)
    clean = run(x)
    x[1, 3], x[3, 100], x[4, 5], x[4, 190], x[6, 191] = torch.inf, -torch.inf, torch.inf, torch.inf, torch.nan
    y, exact = run(x), (x.double() @ w.t()).float()
    for row in (1, 3, 4, 6):
        assert torch.equal(y[row].isnan(), exact[row].isnan()), row
        assert torch.equal(y[row].nan_to_num(), exact[row].nan_to_num()), row
        assert torch.equal(run(x[row:row + 1]).nan_to_num(), y[row:row + 1].nan_to_num())
    assert torch.equal(y[[0, 2, 5]], clean[[0, 2, 5]])


@every_form
def test_subnormal_numbers_are_not_lost(short: str, group: int | None, asym: bool) -> None:
    run, w = product(short, group, asym)
    x = torch.randint(-99, 100, (3, K)) * 2.0**-133
    allowed = 2.0**-125 * w.abs().sum(1) + 2.0**-20 * (x.double().abs() @ w.abs().t())
    assert bool(((run(x).double() - x.double() @ w.t()).abs() <= allowed).all())
