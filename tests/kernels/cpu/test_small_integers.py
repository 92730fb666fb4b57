"""Weights whose values are small integers, which AVX2 multiplies as integers, at their extremes beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.kernels.cpu import native
from qpass.weight import dequantize_weight
from tests.kernels.cpu.test_x86_decoded import FORMATS, every_isa, forms, packed_for, rounded, spec_of

pytestmark = pytest.mark.skipif(native.refuses("decoded") is not None, reason=native.refuses("decoded") or "")


@every_isa
@pytest.mark.parametrize("table", [torch.arange(-8.0, 8), torch.tensor([*range(16)]) * 2.0**-40,
                                   torch.tensor([-24.0, 0, *range(-23, -9)]) * 2.0**20,
                                   torch.tensor([-12.0, 12, 8, 6, 4, 3, 2, 1, 0, -1, -2, -3, -4, -6, -8, 0.0]) / 2,
                                   torch.tensor([-13.0, 12, *range(14)]), torch.zeros(16)],
                         ids=["int4", "uint4", "negative", "e2m1", "too wide", "zeros"])
def test_tables_of_small_integers_at_extremes(short: str, table: Tensor) -> None:
    """Largest codes on largest inputs, inputs of many orders of magnitude, powers of two and their neighbours."""
    spec = spec_of(FORMATS["nf4-64"].weight, 48, 128, short)
    weight = rounded(spec)
    weight.tensors["code"] = table.clone()
    two_codes = weight.tensors["packed"].view(48, 64)
    least, most = int(table.argmin()), int(table.argmax())
    for row, (high, low) in enumerate(((least, least), (most, most), (least, most))):
        two_codes[row] = high << 4 | low
    w = dequantize_weight(weight, spec).double()
    sign = torch.where(torch.arange(128) % 2 == 0, 1.0, -1.0)
    below = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0))
    wild = torch.randn(128) * torch.logspace(-6, 6, 128)[torch.randperm(128)]
    tiny = torch.full((128,), 2.0**-120)
    for x in (torch.stack([torch.ones(128), sign, below * sign, below.expand(128), wild, -wild.abs(), tiny]),
              torch.full((1, 128), 3e28) * sign, wild[None], wild.repeat(2, 1), torch.zeros(3, 128)):
        y, exact = forms(spec)["linear"](x, packed_for(weight, spec), None, spec).double(), x.double() @ w.t()
        runs = x.double().abs().view(len(x), -1, 16)
        largest = runs.amax(2, keepdim=True).expand_as(runs).flatten(1)
        allowed = 2.0**-23 * exact.abs() + 1e-6 * (x.double().abs() @ w.abs().t()) + 2.0**-22 * (largest @ w.abs().t())
        assert bool(((y - exact).abs() <= allowed + 1e-37).all()), (y - exact).abs().max()
