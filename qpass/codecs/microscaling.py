"""Microscaling: MXFP4, MXFP6, MXFP8: small floats in groups of 32 with a power of two; w = value * 2^(s - 127).

Source: OCP Microscaling Formats 1.0; scales as compressed-tensors 0.20 makes them (quantization/utils/mxfp_utils.py):
amax rounded to a power of two with the element's mantissa in mind, less the exponent of the element's largest value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qpass.codecs.elements import (
    E2M1,
    E2M3,
    E3M2,
    magnitudes,
    pack_nibbles,
    pack_sixes,
    to_codes,
    unpack_nibbles,
    unpack_sixes,
    values,
)
from qpass.dtype import FLOAT8
from qpass.scheme import ActivationArgs, RowCodec, Scheme, Stored, WeightArgs, register_codec, register_scheme

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32


def power_of_two(exponent: Tensor) -> Tensor:
    """E8M0 bytes -> float32 2^(s - 127), exactly, the subnormal 2^-127 included; 255 is NaN."""
    s = exponent.view(torch.uint8).to(torch.int32)
    bits = torch.where(s == 0, 1 << 22, torch.where(s == 255, 0x7FC00000, s << 23))
    return bits.view(torch.float32)


def _spread(scale: Tensor, args: WeightArgs, k: int) -> Tensor:
    return power_of_two(scale).repeat_interleave(args.group_size or GROUP, dim=1)[:, :k]


def _divided(weight: Tensor, scale: Tensor) -> Tensor:
    divided: Tensor = weight.unflatten(1, (-1, GROUP)) / power_of_two(scale).unsqueeze(-1)
    return divided.flatten(1)


def shared_exponent(x: Tensor, offset: int, mantissa: int) -> Tensor:
    """E8M0 bytes of groups of 32 of x [..., K]: floor(log2(round_to_power_2(amax))) - offset + 127, within a byte."""
    amax = x.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    bits = amax.view(torch.int32) + (1 << 23 - mantissa - 1)
    exponent: Tensor = (bits >> 23) - offset
    return exponent.clamp(0, 254).to(torch.uint8)


@dataclass(frozen=True)
class MxPacked(RowCodec):
    """`packed` uint8 [N, K * bits / 8], `scale` E8M0 bytes uint8 [N, K / 32]."""

    element: tuple[int, int]
    bits: int
    names = ("packed", "scale")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        n, k = shape
        _must_divide(k, args)
        return {"packed": (("uint8",), (n, k * self.bits // 8)), "scale": (("uint8",), (n, k // GROUP))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        _must_divide(weight.shape[1], args)
        # The exponent of the largest value: 2 for E2M1's 6 and E2M3's 7.5, 4 for E3M2's 28.
        offset = torch.tensor(magnitudes(self.element)[-1]).log2().floor().int().item()
        scale = shared_exponent(weight, int(offset), self.element[1])
        codes = to_codes(_divided(weight, scale), self.element)
        return {"packed": (pack_nibbles if self.bits == 4 else pack_sixes)(codes), "scale": scale}

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        packed = tensors["packed"][rows]
        codes = unpack_nibbles(packed) if self.bits == 4 else unpack_sixes(packed)
        return values(self.element, packed.device)[codes.int()] * _spread(tensors["scale"][rows], args, shape[1])


class MxFp8(RowCodec):
    """`weight` float8_e4m3fn [N, K], `scale` E8M0 bytes uint8 [N, K / 32]."""

    names = ("weight", "scale")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        _must_divide(shape[1], args)
        return {"weight": (FLOAT8, shape),
                "scale": (("uint8",), (shape[0], shape[1] // GROUP))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        _must_divide(weight.shape[1], args)
        scale = shared_exponent(weight, 8, 1)  # 448 = 1.75 * 2^8; mantissa 1 as compressed-tensors has it
        q = _divided(weight, scale).clamp(-448, 448)
        return {"weight": q.to(torch.float8_e4m3fn), "scale": scale}

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        return tensors["weight"][rows].float() * _spread(tensors["scale"][rows], args, shape[1])


def _must_divide(k: int, args: WeightArgs) -> None:
    if k % GROUP or args.group_size != GROUP:
        raise ValueError(f"microscaling groups are {GROUP} weights; {k} inputs in groups of {args.group_size} are none")


register_codec("mxfp4", MxPacked(E2M1, 4))
register_codec("mxfp6_e3m2", MxPacked(E3M2, 6))
register_codec("mxfp6_e2m3", MxPacked(E2M3, 6))
register_codec("mxfp8", MxFp8())


def _preset(name: str, bits: int, kind: str, activation: ActivationArgs | None = None) -> None:
    weight = WeightArgs(bits=bits, type=kind, granularity="per_group", group_size=GROUP)
    register_scheme(Scheme(name=name, weight=weight, activation=activation))


_FP8_32 = ActivationArgs(type="float", granularity="per_group", group_size=GROUP)
_preset("mxfp4a16", 4, "mxfp4")
_preset("mxfp4", 4, "mxfp4", ActivationArgs(bits=4, type="float", granularity="per_group", group_size=GROUP))
_preset("mxfp4xfp8", 4, "mxfp4", ActivationArgs(type="float", granularity="per_group", group_size=128))
_preset("mxfp6a16", 6, "mxfp6_e2m3")
_preset("mxfp6a8", 6, "mxfp6_e2m3", _FP8_32)
_preset("mxfp8a16", 8, "mxfp8")
_preset("mxfp8", 8, "mxfp8", _FP8_32)
