"""GGUF types: a tensor of blocks in, the weight it holds out, in the packed form that kernels or codecs read.

Source: llama.cpp's ggml-quants.c as gguf/quants.py 0.19 states it. Scales are multiplied in float32, where the products
of a half and a 6- or 8-bit integer are exact, so what is decoded later equals the tool's own numbers bit for bit.

    Q4_0 Q5_0 Q8_0   int4, int5, int8, groups of 32, float16 scales: w = q * d
    Q6_K             int6, groups of 16, float32 scales d * sc
    Q4_1 Q5_1        affine, groups of 32, float16: w = q * d + m
    Q4_K Q5_K        affine, groups of 32, float32: w = q * (d * sc) + -(dmin * m)
    MXFP4            mxfp4, the nibbles in compressed-tensors' order
    others           as the file has them (codecs/ggml_blocks.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from qpass.codecs.affine import pack_unsigned
from qpass.codecs.elements import pack_nibbles
from qpass.codecs.ggml_blocks import BLOCKS
from qpass.formats.gguf_file import TYPES
from qpass.scheme import WeightArgs

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = {name: nbytes for name, _, nbytes in TYPES.values()}
_INT = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8, "Q6_K": 6}
_AFFINE = {"Q4_1": 4, "Q5_1": 5, "Q4_K": 4, "Q5_K": 5}


def args_of(kind: str) -> WeightArgs:
    """The numbers of a ggml type. Raises KeyError for types that are no quantized weights."""
    if kind in _INT:
        return WeightArgs(bits=_INT[kind], granularity="per_group", group_size=16 if kind == "Q6_K" else 32)
    if kind in _AFFINE:
        return WeightArgs(bits=_AFFINE[kind], type="affine", granularity="per_group", group_size=32, symmetric=False)
    if kind == "MXFP4":
        return WeightArgs(bits=4, type="mxfp4", granularity="per_group", group_size=32)
    name = "nvfp4_blocks" if kind == "NVFP4" else kind.lower()
    _, size, _, bits = BLOCKS[name]
    return WeightArgs(bits=bits, type=name, granularity="per_group", group_size=size)


def unpack_blocks(raw: Tensor, kind: str) -> dict[str, Tensor]:
    """uint8 [N, row bytes] -> the canonical tensors of `args_of(kind)`. Raises ValueError for non-finite scales."""
    nbytes = _BYTES[kind]
    if (split := _SPLIT.get(kind)) is None:
        return {"blocks": raw}
    n = raw.shape[0]
    q, *scales = split(raw.view(n, -1, nbytes))
    if not all(bool(torch.isfinite(s).all()) for s in scales if s.is_floating_point()):
        raise ValueError(f"{kind} blocks hold scales that are NaN or infinite")
    q = q.reshape(n, -1)
    scales = [s.reshape(n, -1).contiguous() for s in scales]
    if kind in _INT:
        return {"qweight": q.contiguous(), "scale": scales[0]}
    if kind == "MXFP4":
        return {"packed": pack_nibbles(q), "scale": scales[0]}
    return {"packed": pack_unsigned(q, _AFFINE[kind]), "scale": scales[0], "offset": scales[1]}


def _half(raw: Tensor, at: int) -> Tensor:
    """A float16 of each block: [N, B, 1]."""
    return raw[..., at:at + 2].contiguous().view(torch.float16)


def _nibbles(raw: Tensor) -> Tensor:
    """Bytes [..., 16] -> codes [..., 32]: the low nibbles first, then the high ones."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """4 bytes [..., 4] -> 32 bits [..., 32], each shifted to bit 4."""
    return ((raw[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2) << 4


def _q4_0(raw: Tensor) -> tuple[Tensor, Tensor]:
    return _nibbles(raw[..., 2:]).to(torch.int8) - 8, _half(raw, 0)


def _q4_1(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(raw[..., 4:]), _half(raw, 0), _half(raw, 2)


def _q5_0(raw: Tensor) -> tuple[Tensor, Tensor]:
    return (_nibbles(raw[..., 6:]) | _fifth_bits(raw[..., 2:6])).to(torch.int8) - 16, _half(raw, 0)


def _q5_1(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(raw[..., 8:]) | _fifth_bits(raw[..., 4:8]), _half(raw, 0), _half(raw, 2)


def _q8_0(raw: Tensor) -> tuple[Tensor, Tensor]:
    return raw[..., 2:].contiguous().view(torch.int8), _half(raw, 0)


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """d, dmin and 12 bytes of 6-bit sub-scales and minimums -> float32 scale and offset [N, B, 8]."""
    low, middle, high = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scale = torch.cat([low & 63, high & 15 | low >> 2 & 48], dim=-1).float()
    least = torch.cat([middle & 63, high >> 4 | middle >> 2 & 48], dim=-1).float()
    return _half(raw, 0).float() * scale, -(_half(raw, 2).float() * least)


def _q4_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(raw[..., 16:].unflatten(-1, (4, 32))), *_k_scales(raw)


def _q5_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _nibbles(raw[..., 48:].unflatten(-1, (4, 32))).flatten(-2).unflatten(-1, (8, 32))
    high = (raw[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    return q | high << 4, *_k_scales(raw)


def _q6_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    # Two halves of 128 weights: the low nibbles of 64 bytes, then their high ones; 2 more bits from 32 bytes, by shift.
    low = _nibbles(raw[..., :128].unflatten(-1, (2, 64)))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts) & 3).flatten(-2)
    scale = raw[..., 192:208].contiguous().view(torch.int8).float()
    return (low | high << 4).to(torch.int8) - 32, _half(raw, 208).float() * scale


def _mxfp4(raw: Tensor) -> tuple[Tensor, Tensor]:
    if bool((raw[..., 0] == 255).any()):
        raise ValueError("MXFP4 blocks hold scales that are NaN")
    return _nibbles(raw[..., 1:]), raw[..., 0]


_SPLIT: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k, "MXFP4": _mxfp4}
