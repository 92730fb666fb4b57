"""Codebook: 4-bit indices into a table of 16 floats, with a scale for each block of the flattened weight.

Source: bitsandbytes 0.50, functional.py. w[i] = code[index[i]] * absmax[i // block], i running over the rows; the even
element stands in the high nibble. Blocks may run across rows. The table is stored with the weight.

Codes and scales are those of its CPU, backends/default/ops.py (quantize_4bit), bit for bit: weights times 1 / absmax,
where absmax counts as 1e-38 if it is less, or divided by it in a last block that is not full; the middle of two values
becomes the lower. CUDA's kernel multiplies in the last block too, and of FP4's middles it takes the one next
to zero. Numbers are decoded as there; its AVX512 kernel, unlike these two, uses scales of other blocks where rows are
whole vectors and not whole blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qpass.scheme import RowCodec, Scheme, Stored, WeightArgs, register_codec, register_scheme

if TYPE_CHECKING:
    from torch import Tensor

# bitsandbytes functional.py, create_normal_map(offset=0.9677083) and the FP4 map, both over their largest value.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
       0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25)
LEAST = 1e-38  # what a block's largest magnitude counts as when it is less


@dataclass(frozen=True)
class Codebook(RowCodec):
    """`packed` uint8 [ceil(N K / 2)], `absmax` float32 [ceil(N K / block)], `code` float32 [16]."""

    table: tuple[float, ...]
    names = ("packed", "absmax", "code")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        count = shape[0] * shape[1]
        if args.group_size is None:
            raise ValueError("codebook weights need a block size")
        return {"packed": (("uint8",), (-(-count // 2),)),
                "absmax": (("float32",), (-(-count // args.group_size),)), "code": (("float32",), (16,))}

    def unit(self, args: WeightArgs, shape: tuple[int, int]) -> int:
        return math.lcm(2, args.group_size or 1) // math.gcd(math.lcm(2, args.group_size or 1), shape[1])

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        block = args.group_size or 64
        flat = weight.reshape(-1)
        whole = flat.numel() // block * block
        blocks, rest = flat[:whole].view(-1, block), flat[whole:]
        absmax = blocks.abs().amax(1)
        scaled = (blocks * (1 / absmax.clamp_min(LEAST))[:, None]).view(-1)
        if rest.numel():
            last = rest.abs().amax().clamp_min(LEAST)
            absmax, scaled = torch.cat([absmax, last.view(1)]), torch.cat([scaled, rest / last])
        scaled = torch.nn.functional.pad(scaled, (0, flat.numel() % 2))
        code = torch.tensor(self.table, device=weight.device)
        order = torch.argsort(code, stable=True)
        ordered = code[order]
        index = order[torch.bucketize(scaled, (ordered[1:] + ordered[:-1]) / 2)].to(torch.uint8)
        return {"packed": index[0::2] << 4 | index[1::2], "absmax": absmax, "code": code}

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        assert args.group_size is not None
        k = shape[1]
        first, last = rows.start * k, rows.stop * k
        packed = tensors["packed"][first // 2:-(-last // 2)]
        index = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[first % 2:][:last - first]
        block = torch.arange(first // args.group_size, -(-last // args.group_size), device=packed.device)
        absmax = tensors["absmax"][block].repeat_interleave(args.group_size)[first % args.group_size:][:last - first]
        return (tensors["code"][index.int()] * absmax).view(-1, k)


register_codec("nf4", Codebook(NF4))
register_codec("fp4", Codebook(FP4))

for _name in ("nf4", "fp4"):  # as bitsandbytes makes them by default, in blocks of 64
    register_scheme(Scheme(name=_name, weight=WeightArgs(bits=4, type=_name, granularity="per_group", group_size=64)))
