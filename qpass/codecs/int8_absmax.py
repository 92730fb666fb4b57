"""int8 by absmax: bitsandbytes' 8-bit rows, w = (q * absmax) * (1 / 127).

Source: bitsandbytes 0.50, backends/default/ops.py, int8_vectorwise_dequant: the constant is 7.874015718698502e-3 and
the product with it is the last, so that a single scale a row would round otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qpass.scheme import RowCodec, Stored, WeightArgs, register_codec

if TYPE_CHECKING:
    from torch import Tensor

PART = 7.874015718698502e-3


class Int8Absmax(RowCodec):
    """`weight` int8 [N, K], `absmax` float32 [N]."""

    names = ("weight", "absmax")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        return {"weight": (("int8",), shape), "absmax": (("float32",), (shape[0],))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        absmax = weight.abs().amax(1)
        q = (weight * (127 / absmax.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round().clamp(-127, 127)
        return {"weight": q.to(torch.int8), "absmax": absmax}

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        return tensors["weight"][rows] * tensors["absmax"][rows, None] * PART


register_codec("int8_absmax", Int8Absmax())
