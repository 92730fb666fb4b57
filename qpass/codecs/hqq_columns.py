"""HQQ along axis 0: unsigned integers in groups of elements that stand a fixed stride apart, float scale and zero.

Source: hqq 0.2.8, core/quantize.py with axis=0. Element i of the flattened weight is in group i % M, M = N K / G:
w[i] = (q[i] - zero[i % M]) * scale[i % M].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qpass.codecs.affine import pack_unsigned, unpack_unsigned
from qpass.dtype import FLOATS
from qpass.scheme import RowCodec, Stored, WeightArgs, register_codec

if TYPE_CHECKING:
    from torch import Tensor


class HqqColumns(RowCodec):
    """`packed` int32 [N, ceil(K bits / 32)] in the weight's own order, `scale` and `zero` floating [N K / G]."""

    names = ("packed", "scale", "zero")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        n, k = shape
        if args.group_size is None or n * k % args.group_size:
            raise ValueError(f"groups of {args.group_size} do not divide {n} x {k} weights")
        groups = n * k // args.group_size
        return {"packed": (("int32",), (n, -(-k * args.bits // 32))), "scale": (FLOATS, (groups,)),
                "zero": (FLOATS, (groups,))}

    def unit(self, args: WeightArgs, shape: tuple[int, int]) -> int:
        return 0  # a group has elements of every so many rows

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        groups = weight.reshape(args.group_size or 64, -1)
        low, high = groups.amin(0), groups.amax(0)
        scale = (high - low) / ((1 << args.bits) - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        zero = -low / scale
        q = (groups / scale + zero).round().clamp(0, (1 << args.bits) - 1)
        return {"packed": pack_unsigned(q.view(weight.shape).to(torch.uint8), args.bits), "scale": scale, "zero": zero}

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        q = unpack_unsigned(tensors["packed"][rows], args.bits, shape[1]).float()
        scale = tensors["scale"].float()
        k = shape[1]
        group = torch.arange(rows.start * k, rows.stop * k, device=scale.device).remainder_(scale.numel()).view(-1, k)
        return (q - tensors["zero"].float()[group]) * scale[group]


register_codec("hqq_columns", HqqColumns())
