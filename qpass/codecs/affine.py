"""Affine: unsigned integers with a float scale and a float offset or zero for each group along K.

`affine`       w = q * scale + offset     (GGUF's Q4_1 and K-quants with minimums, quanto's qint2 and qint4)
`affine_signed` the same with q from -2^(bits-1) (torchao's Int4Tensor)
`affine_zero`  w = (q - zero) * scale     (HQQ)
They round differently, so all are kept. Codes are packed as compressed-tensors packs them (formats/bits.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qpass.dtype import FLOATS
from qpass.formats.bits import pack_rows, unpack_rows
from qpass.scheme import RowCodec, Stored, WeightArgs, register_codec

if TYPE_CHECKING:
    from torch import Tensor


class Affine(RowCodec):
    """`packed` int32 [N, ceil(K bits / 32)], `scale` and `offset` floating [N, G]."""

    names = ("packed", "scale", "offset")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        n, k = shape
        size = args.group_size or k
        if k % size:
            raise ValueError(f"groups of {size} do not divide {k} inputs")
        return {"packed": (("int32",), (n, -(-k * args.bits // 32))), "scale": (FLOATS, (n, k // size)),
                self.names[2]: (FLOATS, (n, k // size))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """scale = (max - min) / (2^bits - 1), offset = min, q = round((w - offset) / scale)."""
        groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / ((1 << args.bits) - 1)).to(scale_dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)
        low = low.to(scale_dtype).float()
        q = ((groups - low) / scale).round().clamp(0, (1 << args.bits) - 1)
        offset = low if self.names[2] == "offset" else -low / scale
        return {"packed": pack_unsigned(q.view(weight.shape).to(torch.uint8), args.bits),
                "scale": scale.squeeze(-1).to(scale_dtype), self.names[2]: offset.squeeze(-1).to(scale_dtype)}

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        q = self.codes(tensors["packed"][rows], args.bits, shape[1]).float()
        scale = tensors["scale"][rows].float()
        third = tensors[self.names[2]][rows].float()
        return self.value(q.unflatten(1, (scale.shape[1], -1)), scale[..., None], third[..., None]).flatten(1)

    def codes(self, packed: Tensor, bits: int, k: int) -> Tensor:
        """The integers, of any dtype, [N, K]."""
        return unpack_unsigned(packed, bits, k)

    def value(self, q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """The formula, in float32."""
        return q * scale + offset


class AffineZero(Affine):
    """The same with `zero` floating [N, G]."""

    names = ("packed", "scale", "zero")

    def value(self, q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return (q - offset) * scale


def pack_unsigned(q: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits, [N, K] -> int32 [N, ceil(K bits / 32)]."""
    return pack_rows((q.to(torch.int16) - (1 << bits - 1)).to(torch.int8), bits)


def unpack_unsigned(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of pack_unsigned; int16 [N, K]."""
    return unpack_rows(packed, bits, k).to(torch.int16) + (1 << bits - 1)


class AffineSigned(Affine):
    """The same with q less 2^(bits - 1): the codes are two's complement."""

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        made = super().encode(weight, args, torch.float32)
        middle = made["offset"] + made["scale"] * (1 << args.bits - 1)
        return {**made, "scale": made["scale"].to(scale_dtype), "offset": middle.to(scale_dtype)}

    def codes(self, packed: Tensor, bits: int, k: int) -> Tensor:
        return unpack_rows(packed, bits, k)


register_codec("affine", Affine())
register_codec("affine_signed", AffineSigned())
register_codec("affine_zero", AffineZero())
