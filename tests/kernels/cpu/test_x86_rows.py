"""Rows of codes: rounded where a quotient is next to the middle of two integers, and arranged in several panels."""

from __future__ import annotations

import pytest
import torch

from qpass.kernels.cpu import native
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.weight import dequantize_weight
from tests.kernels.cpu.test_x86 import FAMILIES, ISA_NAMES, make

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=native.refuses() or "")
of_codes = pytest.mark.parametrize(("family", "short"), [p for p in FAMILIES if p.values[0].endswith("a8")])


@pytest.mark.parametrize("name", ISA_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quotients_next_to_the_middle(name: str, dtype: torch.dtype) -> None:
    """(n + 1/2) times the scale and its neighbours, for many scales: where a product with 1 / scale can go astray."""
    torch.manual_seed(0)
    middle = torch.arange(-127, 127) + 0.5
    largest = torch.cat((torch.rand(40) * 100 + 1e-3, torch.logspace(-20, 20, 20), torch.tensor([1.0, 127.0, 63.5])))
    if dtype == torch.float16:
        largest = largest.clamp(1e-3, 6e4)
    rows = middle * (largest[:, None] / 127)
    near = [torch.nextafter(rows, torch.full_like(rows, way)) for way in (-torch.inf, torch.inf)]
    x = torch.cat((largest[:, None], rows, *near), 1).to(dtype)
    q, scale, _ = native.quantize(x, name)
    want_q, want_scale = quantize_symmetric(x)
    assert torch.equal(q, want_q) and torch.equal(scale, want_scale)
    q, scale, zero_point = native.quantize(x, name, symmetric=False)
    want_q, want_scale, want_zero_point = quantize_asymmetric(x)
    assert torch.equal(q, want_q) and torch.equal(scale, want_scale)
    assert zero_point is not None and torch.equal(zero_point, want_zero_point)


@of_codes
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(("k", "group"), [(16448, 64), (10240, None), (9600, 96)])
def test_more_rows_than_a_panel_holds(family: str, short: str, asym: bool, k: int, group: int | None) -> None:
    """32 to 96 rows of so many inputs are a megabyte: these are several panels, and the last one is not full."""
    found, spec, packed = make(family, short, 50, k, group, asym=asym, asym_activation=asym)
    m = 230
    x = torch.randn(m, k)
    y = found.forms["linear"](x, packed, None, spec)
    codes = quantize_asymmetric(x) if asym else (*quantize_symmetric(x), None)
    again = found.forms["linear_q"](codes[0], codes[1], codes[2], packed, None, spec, torch.float32)
    assert torch.equal(y, again)
    weight = found.layout.unpack(dict(zip(found.layout.names(spec), packed, strict=True)), spec)
    rounded = (codes[0].double() - (0 if codes[2] is None else codes[2])) * codes[1]
    exact = rounded @ dequantize_weight(weight, spec).double().t()
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
    for first, last in ((0, 1), (31, 33), (64, 80), (95, 97), (190, 230), (229, 230)):
        assert torch.equal(found.forms["linear"](x[first:last], packed, None, spec), y[first:last])
