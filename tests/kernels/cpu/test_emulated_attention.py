"""Attention on AVX512, compiled over emulated intrinsics, agrees with float64 on any machine."""

from __future__ import annotations

import ctypes

import pytest
import torch

from qpass.kernels.cpu import native, x86_attention
from tests.kernels.cpu.emulated_kernels import COMPILER, DTYPES
from tests.kernels.test_attention import exact as exact_of_floats
from tests.kernels.test_attention import given, masks
from tests.kernels.test_cache_attention import NUMBERS, exact, made

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
AVX512 = 2


class CRows(ctypes.Structure):
    """qp_rows of csrc/abi.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token", "count"))]


def rows_of(tensor: torch.Tensor) -> CRows:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return CRows(tensor.data_ptr(), *tensor.stride()[:3], last + 1)


@pytest.mark.parametrize("kind", NUMBERS)
def test_over_a_quantized_cache(library: ctypes.CDLL, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library.qp_attention.argtypes = native._SIGNATURES["qp_attention"]
    monkeypatch.setattr(native, "library", lambda part: library)
    monkeypatch.setattr(native, "attention_isa", lambda: AVX512)
    numbers = NUMBERS[kind]
    for heads, shared, m, s, d, dv in ((3, 1, 1, 37, 48, 80), (4, 4, 3, 17, 80, 48), (2, 1, 2, 70, 16, 64)):
        q = torch.randn(1, heads, m, d)
        keys, values = made(numbers, (1, shared, s, d)), made(numbers, (1, shared, s, dv))
        mask = torch.rand(1, 1, m, s) < 0.6
        for shown, causal, softcap in ((None, True, 0.0), (mask, False, 5.0)):
            want = exact(q.double(), keys[2], values[2], shown, causal, 0.3, softcap)
            out = x86_attention.cache_attention_x86(q, *keys[:2], *values[:2], shown, numbers.kind, causal, 0.3,
                                                    softcap)
            assert (out.double() - want).abs().max() <= 2e-5 * values[2].abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_floats(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    for sizes in ((1, 6, 2, 1, 37, 24, 72), (2, 5, 1, 2, 290, 40, 16)):
        for way in ("plain", "bool", "float"):
            (q, k, v), mask = given(sizes, dtype), masks(way, sizes, dtype)
            want = exact_of_floats(q, k, v, mask, False, 0.2)
            out = torch.full(want.shape, torch.nan, dtype=dtype)
            shown = None if mask is None else mask.expand(*sizes[:2], *sizes[3:5])
            mask_dtype = 0 if shown is None else 1 if shown.dtype == torch.bool else 2 + DTYPES[dtype]
            done = library.qp_float_attention(
                ctypes.c_int32(AVX512), (ctypes.c_int64 * 7)(*sizes), ctypes.c_int32(DTYPES[dtype]),
                *(ctypes.byref(rows_of(one)) for one in (q, k, v)),
                None if shown is None else ctypes.byref(rows_of(shown)), ctypes.c_int32(mask_dtype), ctypes.c_int32(0),
                ctypes.c_float(0.2), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.numel()), ctypes.c_int32(1))
            assert done == 0
            assert (out.double() - want).abs().max() <= 1e-5 + torch.finfo(dtype).eps * want.abs().max(), way
