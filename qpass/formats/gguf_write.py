"""GGUF writing: metadata and tensors, made one at a time, to one file that llama.cpp reads.

Q4_0 and Q8_0 hold symmetric integers, Q4_1 those with an offset; scales and offsets become float16, which is exact for
float16 and for bfloat16 within its range. Source: ggml's docs/gguf.md and ggml-quants.c.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.codecs.affine import unpack_unsigned
from qpass.dtype import torch_dtype
from qpass.errors import CheckpointError
from qpass.formats.gguf_file import ARRAY, MAGIC, PLAIN, STRING, TYPES
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

_ALIGNMENT = 32
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
_SIZES = {name: (block, nbytes) for name, block, nbytes in TYPES.values()}
_KINDS = {torch_dtype(dtype): kind for kind, dtype in PLAIN.items()}
_BOOL, _INT32, _UINT32, _FLOAT32 = 7, 5, 4, 6
_LARGEST_HALF = 65504.0
_GROUP = 32


@dataclass(frozen=True, kw_only=True)
class GgufEntry:
    """One tensor to be written: its type's name, its shape, and how to get its bytes, uint8, when its turn comes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        block, count = _SIZES[self.kind]
        for size in (*self.shape[:-1], self.shape[-1] // block):
            count *= size
        return count


def write_gguf(path: Path, metadata: Mapping[str, Any], entries: Sequence[GgufEntry]) -> None:
    """Write version 3. Values are bool, int (signed or not), float, str, or a list of one of these."""
    head = MAGIC + struct.pack("<IQQ", 3, len(entries), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    offset = 0
    for entry in entries:
        head += _text(entry.name) + struct.pack(f"<I{len(entry.shape)}QIQ", len(entry.shape), *reversed(entry.shape),
                                                _NUMBERS[entry.kind], offset)
        offset += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        for entry in entries:
            raw = entry.make()
            if raw.dtype != torch.uint8 or raw.numel() != entry.nbytes:
                raise CheckpointError(f"{entry.name} became {raw.numel()} bytes of {raw.dtype}; {entry.kind} "
                                      f"{list(entry.shape)} has {entry.nbytes}")
            file.write(raw.cpu().contiguous().numpy().data)
            file.write(bytes(-entry.nbytes % _ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())


def plain_bytes(tensor: Tensor) -> tuple[str, Tensor]:
    """A float tensor's type and bytes; one dimension is always F32, as llama.cpp wants it."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dim() < 2 or tensor.dtype not in _KINDS:
        tensor = tensor.float()
    return _KINDS[tensor.dtype], tensor.reshape(-1).view(torch.uint8)


def weight_kind(spec: LinearSpec) -> str | None:
    """The type whose blocks hold the integers of `spec`, and None if there is none."""
    args = spec.weight
    if spec.in_features % _GROUP or spec.group_size % _GROUP:
        return None
    if args.type == "int" and (args.symmetric or args.bits <= 4):
        return "Q8_0" if args.bits > 4 else "Q4_0" if args.symmetric else "Q4_1"
    return "Q4_1" if args.type == "affine" and args.bits == 4 else None


def weight_bytes(weight: CanonicalWeight, spec: LinearSpec, kind: str, rows: Tensor | None = None) -> Tensor:
    """The blocks of a weight for which weight_kind gave `kind`, its rows in the order `rows`."""
    scale = weight.scale.float().repeat_interleave(spec.group_size // _GROUP, dim=1)
    codes, offset = _codes(weight, scale, spec.weight.bits)
    if rows is not None:
        there = rows.to(codes.device)
        codes, scale, offset = codes[there], scale[there], None if offset is None else offset[there]
    return integer_blocks(codes, scale, kind, offset)


def _codes(weight: CanonicalWeight, scale: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Signed codes [N, K], and the offset of (code + 8) * scale + offset if there is one, both by groups of 32."""
    if "offset" in weight.tensors:
        spread = scale.shape[1] // weight.tensors["offset"].shape[1]
        codes = unpack_unsigned(weight.tensors["packed"], bits, scale.shape[1] * _GROUP) - 8
        return codes.to(torch.int8), weight.tensors["offset"].float().repeat_interleave(spread, dim=1)
    if weight.zero_point is None:
        return weight.qweight, None
    zero = weight.zero_point.float().repeat_interleave(scale.shape[1] // weight.zero_point.shape[1], dim=1)
    return weight.qweight, -(zero + 8) * scale


def integer_blocks(qweight: Tensor, scale: Tensor, kind: str, offset: Tensor | None = None) -> Tensor:
    """qweight int8 [N, K], scale [N, K / 32], offset [N, K / 32] -> the bytes of Q4_0, Q4_1 or Q8_0.

    w = q * scale, or (q + 8) * scale + offset for Q4_1. Raises CheckpointError if float16 cannot hold the scales.
    """
    n, k = qweight.shape
    halves = [_half(scale)] + ([] if offset is None else [_half(offset)])
    head = torch.cat([half.view(n, -1, 1).view(torch.uint8) for half in halves], dim=-1)
    if kind == "Q8_0":
        body = qweight.contiguous().view(torch.uint8).view(n, k // 32, 32)
    else:
        codes = (qweight + 8).to(torch.uint8).view(n, k // 32, 2, 16)
        body = codes[:, :, 0] | codes[:, :, 1] << 4
    return torch.cat([head, body], dim=-1).reshape(-1)


def _half(scale: Tensor) -> Tensor:
    if float(scale.abs().max() if scale.numel() else 0) > _LARGEST_HALF:
        raise CheckpointError(f"scales up to {float(scale.abs().max())} do not fit GGUF's float16")
    return scale.to(torch.float16).contiguous()


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, list | tuple):
        kind = _kind(value[0]) if value else STRING
        kind = _INT32 if kind == _UINT32 else kind  # as llama.cpp wants the types of tokens
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_bare(item, kind) for item in value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _bare(value, kind)


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _INT32 if value < 0 else _UINT32
    return _FLOAT32 if isinstance(value, float) else STRING


def _bare(value: Any, kind: int) -> bytes:
    if kind == STRING:
        return _text(str(value))
    return struct.pack({_BOOL: "<?", _INT32: "<i", _UINT32: "<I", _FLOAT32: "<f"}[kind], value)
