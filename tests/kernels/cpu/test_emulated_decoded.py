"""Weights of csrc/decoded.h on AMX, compiled over emulated intrinsics, agree with float64 on any machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.cpu.emulated_kernels import (
    COMPILER,
    DTYPES,
    PARTS,
    CFloatRows,
    COutput,
    blocks_of,
    pack,
    padded,
    pointer,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
TABLE, E4M3, E5M2, INT8, UINT8 = range(5)
E8M0 = 4  # as a dtype of scales; 5 is e4m3
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
N, M = 45, 35


class CDecoded(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("q", "scale", "third", "table", "gain")),
                *((name, ctypes.c_int64) for name in ("N", "K", "Np", "Kp", "groups", "group_size")),
                *((name, ctypes.c_int32) for name in ("code", "kind", "scale_dtype", "third_dtype")),
                ("small", ctypes.c_char * 28)]


def packed_bytes(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> tiles with nothing added; padding holds 0."""
    full = torch.full((padded(codes.shape[0], 32), padded(codes.shape[1], 64)), 0, dtype=torch.uint8)
    full[:codes.shape[0], :codes.shape[1]] = codes
    return pack((full ^ 128).view(torch.int8), 8)  # which adds 128 again


def run(library: ctypes.CDLL, code: int, codes: Tensor, values: Tensor, scale: Tensor, decoded: Tensor,
        scale_dtype: int, group: int, table: Tensor | None = None, *, refused: bool = False) -> None:
    """`values` and `decoded` are what the codes and scales mean; `scale` is as the kernel reads it."""
    n, k = codes.shape
    groups = decoded.shape[1]
    q = pack((codes.to(torch.int8) - 8), 4) if code == TABLE else packed_bytes(codes)
    blocks, gain = blocks_of(scale, 1), torch.rand(padded(n, 32)) + 0.5
    w = CDecoded(*map(pointer, (q, blocks, None, table, gain)), n, k, padded(n, 32), padded(k, 64), groups,
                 group if groups > 1 else padded(k, 64), code, 0, scale_dtype, 0, bytes(28))
    dense = values.double() * decoded.double().repeat_interleave(group, 1)[:, :k] * gain[:n, None].double()
    for dtype in DTYPES:
        x, bias = torch.randn(M, k).to(dtype), torch.randn(n)

        def product(x: Tensor, bias: Tensor = bias) -> Tensor:
            out = torch.full((len(x), n), float("nan"))
            rows = CFloatRows(None, len(x), padded(k, 64), PARTS[x.dtype], x.data_ptr(), DTYPES[x.dtype], k)
            to = COutput(out.data_ptr(), n, 0, bias.data_ptr(), 0)
            done = library.emulated_decoded(ctypes.byref(w), ctypes.byref(rows), ctypes.byref(to), ctypes.c_int64(0),
                                            ctypes.c_int64(padded(n, 32) // 16))
            assert library.emulated_tiles_configured() == 0
            assert bool(done) is not refused
            return out

        every = product(x)
        if refused:
            return
        exact, size = x.double() @ dense.t() + bias.double(), x.double().abs() @ dense.abs().t() + 1
        # Rows of bf16 meet two parts of a value of a table: it is rounded by 2^-17 of itself at most.
        least = 2.0**-17 if dtype == torch.bfloat16 and table is not None and table is not E2M1 else 1e-6
        assert bool(((every.double() - exact).abs() <= least * size).all()), (dtype, (every - exact).abs().max())
        for m in (1, 2, 16, 17, 33):
            assert torch.equal(product(x[M - m:].contiguous()), every[M - m:]), (dtype, m)


def powers(count: int, groups: int) -> tuple[Tensor, Tensor]:
    bytes_ = torch.randint(110, 140, (count, groups), dtype=torch.uint8)
    return bytes_, torch.exp2(bytes_.double() - 127)


def e4m3(count: int, k: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (count, k), dtype=torch.uint8)
    codes[codes & 127 == 127] = 1  # NaN is for the gain to say
    codes[:, ::3] &= 0x87  # subnormal
    return codes, codes.view(torch.float8_e4m3fn).double()


Case = Callable[[ctypes.CDLL, int], None]


def mxfp4(library: ctypes.CDLL, k: int) -> None:
    codes = torch.randint(0, 16, (N, k), dtype=torch.uint8)
    scale, _ = powers(N, -(-k // 32))
    for outside in (False, True):  # the second time out of the range that is added to exponents: sums are scaled
        if outside:
            scale[3, 0], scale[40, 0] = 60, 190
        run(library, TABLE, codes, E2M1[codes.int()], scale, torch.exp2(scale.double() - 127), E8M0, 32, E2M1)


def nvfp4(library: ctypes.CDLL, k: int) -> None:
    codes = torch.randint(0, 16, (N, k), dtype=torch.uint8)
    scale, decoded = e4m3(N, -(-k // 16))
    run(library, TABLE, codes, E2M1[codes.int()], scale & 127, decoded.abs(), 5, 16, E2M1)


def any_table(library: ctypes.CDLL, k: int) -> None:
    codes, table = torch.randint(0, 16, (N, k), dtype=torch.uint8), torch.randn(16)
    for group in (64, 4096):
        scale = torch.rand(N, -(-k // group))
        run(library, TABLE, codes, table[codes.int()], scale, scale, 0, group, table)


def fp8(library: ctypes.CDLL, k: int) -> None:
    codes, values = e4m3(N, k)
    for group in (128, 4096):
        scale = torch.rand(N, -(-k // group)).to(torch.bfloat16)
        run(library, E4M3, codes, values, scale, scale, 1, group)
    scale, decoded = powers(N, -(-k // 32))
    run(library, E4M3, codes, values, scale, decoded, E8M0, 32)


def bytes_(library: ctypes.CDLL, k: int) -> None:
    codes, scale = torch.randint(0, 256, (N, k), dtype=torch.uint8), torch.rand(N, -(-k // 32))
    run(library, INT8, codes, codes.view(torch.int8), scale, scale, 0, 32)
    run(library, UINT8, codes, codes, scale, scale, 0, 32)


@pytest.mark.parametrize("k", [64, 100, 2144])
@pytest.mark.parametrize("case", [mxfp4, nvfp4, any_table, fp8, bytes_], ids=lambda case: case.__name__)
def test_agrees_with_float64(library: ctypes.CDLL, case: Case, k: int) -> None:
    torch.manual_seed(k)
    case(library, k)


def test_what_is_left_to_avx2(library: ctypes.CDLL) -> None:
    codes, scale = torch.randint(0, 256, (N, 64), dtype=torch.uint8), torch.rand(N, 4)
    run(library, E4M3, codes, codes, scale, scale, 0, 16, refused=True)
    run(library, E5M2, codes, codes, scale, scale[:, :2], 0, 32, refused=True)
    bytes_of_scale = torch.ones(N, 4, dtype=torch.uint8)
    run(library, TABLE, codes & 15, codes, bytes_of_scale, scale, 5, 16, torch.randn(16), refused=True)
