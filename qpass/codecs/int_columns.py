"""Integer columns: integers whose groups of inputs are not all of one size, or do not stand together; read from GPTQ.

w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g] with g = group[k].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpass.dtype import FLOATS
from qpass.errors import RecipeError
from qpass.formats.bits import unpack_rows
from qpass.scheme import RowCodec, Stored, WeightArgs, register_codec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class IntColumns(RowCodec):
    """`packed` int32 [N, ceil(K bits / 32)], `scale` floating and `zero` int8 [N, G], `group` int32 [K]."""

    names = ("packed", "scale", "zero", "group")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        n, k = shape
        groups = -(-k // (args.group_size or max(k, 1)))
        return {"packed": (("int32",), (n, -(-k * args.bits // 32))), "scale": (FLOATS, (n, groups)),
                "zero": (("int8",), (n, groups)), "group": (("int32",), (k,))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        raise RecipeError("groups of different sizes are read from checkpoints, and cannot be made here; choose a "
                          "group size that divides the inputs")

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        group = tensors["group"].long()
        q = unpack_rows(tensors["packed"][rows], args.bits, shape[1]).float()
        return (q - tensors["zero"][rows].float()[:, group]) * tensors["scale"][rows].float()[:, group]

    def check(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]) -> None:
        super().check(tensors, args, shape)
        group, groups = tensors["group"], tensors["scale"].shape[1]
        if group.numel() and (int(group.min()) < 0 or int(group.max()) >= groups):
            raise ValueError(f"weight_group holds {int(group.min())} to {int(group.max())}, and there are {groups} "
                             "groups")


register_codec("int_columns", IntColumns())
