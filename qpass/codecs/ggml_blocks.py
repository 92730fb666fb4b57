"""GGML blocks: the types of GGUF files that are neither plain integers nor affine, kept as the bytes that stand there.

Each row is a run of blocks of `group_size` weights. Their meaning is taken from the gguf package (gguf/quants.py), the
tool's own Python reference, so reading one of these needs that package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qpass.errors import QPassError, RecipeError
from qpass.scheme import RowCodec, Stored, WeightArgs, register_codec

if TYPE_CHECKING:
    from torch import Tensor

# name -> (number in `enum ggml_type`, weights in a block, bytes in a block, bits as the name says them)
BLOCKS = {
    "q2_k": (10, 256, 84, 2), "q3_k": (11, 256, 110, 3), "iq2_xxs": (16, 256, 66, 2), "iq2_xs": (17, 256, 74, 2),
    "iq3_xxs": (18, 256, 98, 3), "iq1_s": (19, 256, 50, 1), "iq4_nl": (20, 32, 18, 4), "iq3_s": (21, 256, 110, 3),
    "iq2_s": (22, 256, 82, 2), "iq4_xs": (23, 256, 136, 4), "iq1_m": (29, 256, 56, 1), "tq1_0": (34, 256, 54, 1),
    "tq2_0": (35, 256, 66, 2), "nvfp4_blocks": (40, 64, 36, 4),
}


@dataclass(frozen=True)
class GgmlBlocks(RowCodec):
    """`blocks` uint8 [N, K / size * nbytes]."""

    number: int
    size: int
    nbytes: int
    names = ("blocks",)

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        n, k = shape
        if k % self.size or args.group_size != self.size:
            raise ValueError(f"rows of {k} weights are not made of blocks of {self.size}")
        return {"blocks": (("uint8",), (n, k // self.size * self.nbytes))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        raise RecipeError(f"{args.type} is read from GGUF files, and cannot be made here")

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        try:
            from gguf import GGMLQuantizationType, dequantize
        except ImportError as error:
            raise QPassError(f"{args.type} weights need the gguf package: pip install gguf") from error
        blocks = tensors["blocks"][rows]
        decoded = dequantize(blocks.cpu().numpy(), GGMLQuantizationType(self.number))
        return torch.from_numpy(decoded).to(blocks.device)


for _name, (_number, _size, _nbytes, _bits) in BLOCKS.items():
    register_codec(_name, GgmlBlocks(_number, _size, _nbytes))
