"""Emulated kernels: builds the AVX512 and AMX sources over emulated intrinsics, and calls them on torch tensors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import qpass.kernels.cpu

SOURCES = Path(qpass.kernels.cpu.__file__).parent / "csrc"
EMULATION = Path(__file__).parent / "emulate"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARTS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}
VNNI, AMX = 0, 1


class CWeight(ctypes.Structure):
    _fields_ = [("q", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero_point", ctypes.c_void_p),
                ("colsum", ctypes.c_void_p), ("N", ctypes.c_int64), ("K", ctypes.c_int64), ("Np", ctypes.c_int64),
                ("Kp", ctypes.c_int64), ("groups", ctypes.c_int64), ("group_size", ctypes.c_int64),
                ("bits", ctypes.c_int32), ("scale_dtype", ctypes.c_int32), ("multiplier", ctypes.c_void_p),
                ("multipliers", ctypes.c_int64)]


class CQuantRows(ctypes.Structure):
    _fields_ = [("q", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero_point", ctypes.c_void_p),
                ("sums", ctypes.c_void_p), ("M", ctypes.c_int64), ("Kp", ctypes.c_int64), ("tiles", ctypes.c_void_p)]


class CFloatRows(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("M", ctypes.c_int64), ("Kp", ctypes.c_int64), ("bf16_parts", ctypes.c_int32),
                ("raw", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("width", ctypes.c_int64)]


class COutput(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("ld", ctypes.c_int64), ("dtype", ctypes.c_int32),
                ("bias", ctypes.c_void_p), ("bias_dtype", ctypes.c_int32)]


def compile_emulation(folder: Path, *flags: str) -> Path:
    library = folder / "emulated.so"
    # Without optimization: the emulation is fast enough, and inlining it everywhere would take half a minute.
    names = ("vnni", "amx", "amx_codes", "amx_float", "decoded_amx", "experts", "attention",
             "attention_avx512", "attention_float", "attention_float_avx512")
    sources = [*(SOURCES / f"{name}.cpp" for name in names), EMULATION / "harness.cpp"]
    subprocess.run([str(COMPILER), "-O0", "-ffp-contract=off", "-std=c++17", "-fPIC", "-shared", "-DQPASS_EMULATE",
                    *flags, f"-I{EMULATION}", f"-I{SOURCES}", *map(str, sources), "-o", str(library)], check=True)
    return library


def padded(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Integers [N, K] with scale [N, G], zero_point int8 [N, G] or None, and the packed copies that kernels read."""

    bits: int
    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    packed: tuple[Tensor | None, ...]
    c: CWeight

    @property
    def centred(self) -> Tensor:
        """q - zero_point, float64 [N, G, K / G]."""
        q = self.q.double().view(*self.scale.shape, -1)
        return q if self.zero_point is None else q - self.zero_point.double().unsqueeze(-1)

    @property
    def dense(self) -> Tensor:
        return (self.centred * self.scale.double().unsqueeze(-1)).flatten(1)


def blocks_of(per_group: Tensor, fill: float) -> Tensor:
    """[N, G] -> [Np / 16, G, 16]."""
    n, groups = per_group.shape
    full = torch.full((padded(n, 32), groups), fill, dtype=per_group.dtype)
    full[:n] = per_group
    return full.view(-1, 16, groups).transpose(1, 2).contiguous()


def pack(q: Tensor, bits: int) -> Tensor:
    """Integers [N, K] -> x86_tile64 bytes, as product.h words it."""
    n, k = q.shape
    offset = 8 if bits == 4 else 128
    full = torch.full((padded(n, 32), padded(k, 64)), offset, dtype=torch.int16)
    full[:n, :k] = q.short() + offset
    # [Np / 16, 16 outputs, Kp / 64, 16 lines, 4 inputs] -> [Np / 16, Kp / 64, 16 lines, 16 outputs, 4 inputs]
    lines = full.view(full.shape[0] // 16, 16, -1, 16, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        lines = lines[:, :, :8] | lines[:, :, 8:] << 4
    return lines.to(torch.uint8).contiguous()


def make_weight(n: int, k: int, group: int | None, bits: int, symmetric: bool, scale: Callable[[Tensor], Tensor],
                q: Tensor | None = None) -> Weight:
    groups = k // group if group else 1
    if q is None:
        q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k), dtype=torch.int8)
    # Mostly small, so that sums stay below 2^24, where float32 is exact; extremes have a test of their own.
    zero_point = None if symmetric else torch.randint(-8, 8, (n, groups), dtype=torch.int8)
    scales = scale(torch.rand(n, groups))
    kp, np_ = padded(k, 64), padded(n, 32)
    colsum = torch.zeros(np_)
    packed = (pack(q, bits), blocks_of(scales, 1), None if zero_point is None else blocks_of(zero_point, 0), colsum)
    weight = Weight(bits=bits, q=q, scale=scales, zero_point=zero_point, packed=packed, c=CWeight(
        *map(pointer, packed), n, k, np_, kp, groups, k // groups if groups > 1 else kp, bits, DTYPES[scales.dtype]))
    colsum[:n] = weight.dense.sum(1)
    return weight


def make_integer_weight(n: int, k: int, group: int, channel: Callable[[Tensor], Tensor], q: Tensor | None = None,
                        multiplier: Tensor | None = None) -> Weight:
    """A symmetric 4-bit weight whose scales are multipliers -15..15 (never 0) times a float32 scale a row."""
    groups, kp, np_ = k // group, padded(k, 64), padded(n, 32)
    if q is None:
        q = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    if multiplier is None:
        multiplier = (torch.randint(1, 16, (n, groups)) * (torch.randint(0, 2, (n, groups)) * 2 - 1)).to(torch.int8)
    channels = channel(torch.rand(n, 1)).float()
    packed = (pack(q, 4), blocks_of(channels, 1), blocks_of(multiplier, 1), torch.zeros(np_))
    weight = Weight(bits=4, q=q, scale=multiplier * channels, zero_point=None, packed=packed, c=CWeight(
        pointer(packed[0]), pointer(packed[1]), None, pointer(packed[3]), n, k, np_, kp, 1, kp, 4, 0,
        pointer(packed[2]), groups))
    packed[3][:n] = weight.dense.sum(1)
    return weight


def random_scale(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda u: (u * 0.02 + 0.001).to(dtype)


def power_of_two(u: Tensor) -> Tensor:
    return torch.exp2(-(u * 3).floor())


@dataclass(frozen=True, kw_only=True)
class Codes:
    q: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def rows(self, index: slice) -> Codes:
        return Codes(q=self.q[index], scale=self.scale[index],
                     zero_point=None if self.zero_point is None else self.zero_point[index])


def random_codes(m: int, k: int, symmetric: bool, scale: Callable[[Tensor], Tensor]) -> Codes:
    q = torch.randint(-127 if symmetric else -128, 128, (m, k), dtype=torch.int8)
    zero_point = None if symmetric else torch.randint(-128, 128, (m,)).float()
    return Codes(q=q, scale=scale(torch.rand(m)), zero_point=zero_point)


def ends(blocks: int, cut: int | None) -> list[tuple[int, int]]:
    return [(0, blocks)] if cut is None else [(0, cut), (cut, blocks)]


def run(call: Callable[..., None], isa: int, w: Weight, rows: ctypes.Structure, m: int, bias: Tensor | None,
        dtype: torch.dtype, cut: int | None) -> Tensor:
    n = w.q.shape[0]
    out = torch.full((m, n + 3), 77, dtype=dtype)  # wider than N: what lies beside the output must stay
    c_out = COutput(out.data_ptr(), n + 3, DTYPES[dtype], pointer(bias), DTYPES[bias.dtype] if bias is not None else 0)
    for begin, end in ends(w.c.Np // 16, cut):
        call(isa, ctypes.byref(w.c), ctypes.byref(rows), ctypes.byref(c_out), ctypes.c_int64(begin),
             ctypes.c_int64(end))
    assert (out[:, n:] == 77).all()
    return out[:, :n]


def product_q(library: ctypes.CDLL, isa: int, w: Weight, x: Codes, bias: Tensor | None = None,
              dtype: torch.dtype = torch.float32, cut: int | None = None) -> Tensor:
    m, k = x.q.shape
    q = torch.zeros(m, padded(k, 64), dtype=torch.int8)
    q[:, :k] = x.q
    sums = q.view(m, -1, 32).sum(-1, dtype=torch.int32)
    rows = CQuantRows(q.data_ptr(), x.scale.data_ptr(), pointer(x.zero_point), sums.data_ptr(), m, q.shape[1], None)
    out = run(library.emulated_product_q, isa, w, rows, m, bias, dtype, cut)
    assert library.emulated_tiles_configured() == 0
    return out


def product_f(library: ctypes.CDLL, isa: int, w: Weight, x: Tensor, bias: Tensor | None = None,
              cut: int | None = None, widened: bool = False) -> Tensor:
    """AMX takes rows as they are, VNNI as float32, which AMX takes too (`widened`)."""
    m, k = x.shape
    full = torch.zeros(m, padded(k, 64))
    full[:, :k] = x.float()
    raw = full if widened or isa == VNNI else x.contiguous()
    rows = CFloatRows(full.data_ptr() if raw is full else None, m, full.shape[1], PARTS[x.dtype], raw.data_ptr(),
                      DTYPES[raw.dtype], raw.shape[1])
    out = run(library.emulated_product_f, isa, w, rows, m, bias, torch.float32, cut)
    assert library.emulated_tiles_configured() == 0
    return out


def oracle(w: Weight, x: Codes, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of magnitudes that bounds its rounding errors."""
    zero = torch.zeros(len(x.q), 1) if x.zero_point is None else x.zero_point[:, None]
    y = (x.q.double() - zero) @ w.dense.t() * x.scale.double()[:, None]
    size = (x.q.double().abs() + zero.abs()) @ w.dense.abs().t() * x.scale.double()[:, None]
    b = 0 if bias is None else bias.double()
    return y + b, size + (0 if bias is None else bias.double().abs())
