"""torch._int_mm and torch._scaled_mm as kernels, on the CPU, which has both, agree with float64."""

from __future__ import annotations

import pytest
import torch

from qpass.kernels.registry import kernel
from tests.kernels.cuda.products import (
    FP8,
    INT8,
    INT8_ASYM,
    activation_rows,
    make_product,
    spec_for,
    weight_args,
    worst_error,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("n", "k", "m"), [(33, 77, 3), (16, 64, 17), (70, 96, 40)])
def test_int_mm_equals_float64(dtype: torch.dtype, n: int, k: int, m: int) -> None:
    for activation, text in ((INT8, "int8:channel"), (INT8_ASYM, "int8:tensor")):
        made = make_product(spec_for(weight_args(text), activation, n, k), dtype)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
        y = kernel("linear_w8a8_int_mm").forms["linear"](x, made.packed, bias, made.spec)
        assert worst_error(y, activation_rows(x, activation)[1], made, bias) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_scaled_mm_equals_float64(dtype: torch.dtype) -> None:
    for text in ("fp8:channel", "fp8:tensor"):
        made = make_product(spec_for(weight_args(text), FP8, 33, 77), dtype)
        x, bias = torch.randn(5, 77).to(dtype), torch.randn(33)
        y = kernel("linear_fp8_w8afp8_scaled_mm").forms["linear"](x, made.packed, bias, made.spec)
        assert worst_error(y, activation_rows(x, FP8)[1], made, bias) <= 1


def test_batches_of_any_shape() -> None:
    made = make_product(spec_for(weight_args("int8:channel"), INT8, 21, 96), torch.float32)
    for shape in ((96,), (2, 5, 96), (0, 96)):
        y = kernel("linear_w8a8_int_mm").forms["linear"](torch.randn(shape), made.packed, None, made.spec)
        assert y.shape == (*shape[:-1], 21)
