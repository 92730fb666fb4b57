"""nvfp4: E2M1 in groups of 16 with an e4m3 scale each, and one float32 scale for the tensor.

Three conventions exist, and they round differently, so all are kept. compressed-tensors divides by its global scale,
`nvfp4`, w = value * (scale / global_scale); ModelOpt and torchao multiply, `nvfp4_mul`, w = value * (scale * scale_2);
AutoRound multiplies by the reciprocal, `nvfp4_reciprocal`, w = (value * (1 / global_scale)) * scale.
Source: compressed-tensors 0.20, compressors/nvfp4 and quantization/utils/helpers.py (generate_gparam).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qpass.codecs.elements import E2M1, pack_nibbles, to_codes, unpack_nibbles, values
from qpass.scheme import ActivationArgs, RowCodec, Scheme, Stored, WeightArgs, register_codec, register_scheme

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
_ROWS_AT_ONCE = 64  # so that what they need on the way stays in a cache


def global_scale_of(amax: Tensor) -> Tensor:
    """The scale, a divisor, of a tensor whose largest magnitude is `amax`: float32 [1]."""
    info = torch.finfo(torch.float32)
    return (448.0 * 6.0 / amax.clamp_min(info.tiny)).clamp_max(info.max).reshape(1)


@dataclass(frozen=True)
class NvFp4(RowCodec):
    """`packed` uint8 [N, K/2], `scale` float8_e4m3fn [N, K/16], `global_scale` float32 [1], a divisor.

    With `rows` it is [N, 1]: several weights below each other, each with a scale of its own.
    """

    rows: bool = False
    names = ("packed", "scale", "global_scale")
    one_scale = True

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        n, k = shape
        if k % GROUP or args.group_size != GROUP:
            raise ValueError(f"nvfp4 groups are {GROUP} weights; {k} inputs in groups of {args.group_size} are none")
        return {"packed": (("uint8",), (n, k // 2)), "scale": (("float8_e4m3fn",), (n, k // GROUP)),
                self.names[2]: (("float32",), (n, 1) if self.rows else (1,))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        return self.encode_within(weight, args, scale_dtype, weight.abs().amax())

    def encode_within(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype, largest: Tensor
                      ) -> dict[str, Tensor]:
        self.stored(args, (weight.shape[0], weight.shape[1]))
        global_scale = global_scale_of(largest)
        scale = global_scale * (weight.unflatten(1, (-1, GROUP)).abs().amax(-1) / 6.0)
        scale = scale.clamp(max=448.0).to(torch.float8_e4m3fn)
        scale = torch.where(scale.float() == 0, torch.finfo(torch.float8_e4m3fn).eps, scale.float())
        scale = scale.to(torch.float8_e4m3fn)
        tensors = {"packed": torch.empty(0), "scale": scale, "global_scale": global_scale}
        tensors = self.rows_apart(tensors, args, (weight.shape[0], 0)) if self.rows else tensors
        tensors["packed"] = self._packed(weight, tensors)
        return tensors

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        codes = unpack_nibbles(tensors["packed"][rows]).int()
        return values(E2M1, codes.device)[codes] * self._spread(tensors, rows)

    def by_rows(self, args: WeightArgs, shape: tuple[int, int]) -> WeightArgs:
        return args if args.type.endswith("_rows") else replace(args, type=f"{args.type}_rows")

    def rows_apart(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {**tensors, self.names[2]: tensors[self.names[2]].reshape(-1, 1).expand(shape[0], 1).contiguous()}

    def _shared(self, tensors: dict[str, Tensor], rows: slice) -> Tensor:
        """The scale of the tensor, or of these rows."""
        return tensors[self.names[2]][rows] if self.rows else tensors[self.names[2]]

    def _packed(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        parts = [slice(row, row + _ROWS_AT_ONCE) for row in range(0, weight.shape[0], _ROWS_AT_ONCE)]
        return torch.cat([pack_nibbles(to_codes(weight[rows] / self._spread(tensors, rows), E2M1)) for rows in parts])

    def _spread(self, tensors: dict[str, Tensor], rows: slice) -> Tensor:
        scale = tensors["scale"][rows].float() / self._shared(tensors, rows)
        return scale.repeat_interleave(GROUP, dim=1)


class NvFp4Multiplied(NvFp4):
    """The same with `scale_2` float32 [1], a factor."""

    names = ("packed", "scale", "scale_2")

    def encode_within(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype, largest: Tensor
                      ) -> dict[str, Tensor]:
        divided = NvFp4(self.rows).encode_within(weight, args, scale_dtype, largest)
        tensors = {"packed": torch.empty(0), "scale": divided["scale"], "scale_2": 1 / divided["global_scale"]}
        tensors["packed"] = self._packed(weight, tensors)
        return tensors

    def _spread(self, tensors: dict[str, Tensor], rows: slice) -> Tensor:
        return (tensors["scale"][rows].float() * self._shared(tensors, rows)).repeat_interleave(GROUP, dim=1)


class NvFp4Reciprocal(NvFp4):
    """The tensors of nvfp4, decoded as AutoRound does."""

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        codes = unpack_nibbles(tensors["packed"][rows]).int()
        scale = tensors["scale"][rows].float().repeat_interleave(GROUP, dim=1)
        return values(E2M1, codes.device)[codes] * (1 / self._shared(tensors, rows)) * scale


for _suffix, _rows in (("", False), ("_rows", True)):
    register_codec(f"nvfp4{_suffix}", NvFp4(_rows))
    register_codec(f"nvfp4_reciprocal{_suffix}", NvFp4Reciprocal(_rows))
    register_codec(f"nvfp4_mul{_suffix}", NvFp4Multiplied(_rows))

_WEIGHT = WeightArgs(bits=4, type="nvfp4", granularity="per_group", group_size=GROUP)
register_scheme(Scheme(name="nvfp4a16", weight=_WEIGHT))
register_scheme(Scheme(name="nvfp4", weight=_WEIGHT, activation=ActivationArgs(
    bits=4, type="float", granularity="per_group", group_size=GROUP, dynamic="local")))
