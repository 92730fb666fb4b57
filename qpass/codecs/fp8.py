"""fp8: 8-bit floats with a float scale for a tensor, a row, a group or a square block; w = weight * scale.

The scales are those of compressed-tensors (calculate_qparams): scale = amax(|w|) / 448, rounded to its stored dtype,
and that dtype's eps in place of zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qpass.dtype import FLOAT8, DType
from qpass.scheme import ActivationArgs, RowCodec, Scheme, Stored, WeightArgs, register_codec, register_scheme

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0  # of e4m3fn
SCALES: tuple[DType, ...] = ("float32", "bfloat16", "float16", "float8_e8m0fnu")


class Fp8(RowCodec):
    """`weight` float8 [N, K]; `scale` of any float dtype: [1], [N, 1], [N, ceil(K/G)] or [ceil(N/G), ceil(K/G)]."""

    names = ("weight", "scale")

    def stored(self, args: WeightArgs, shape: tuple[int, int]) -> dict[str, Stored]:
        return {"weight": (FLOAT8, shape), "scale": (SCALES, scale_shape(args, shape))}

    def encode(self, weight: Tensor, args: WeightArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        scale = stored_scale(largest(weight, args) / LARGEST, scale_dtype)
        q = (weight / spread(scale, args, slice(0, weight.shape[0]), weight.shape[1])).clamp(-LARGEST, LARGEST)
        return {"weight": q.to(torch.float8_e4m3fn), "scale": scale.to(scale_dtype)}

    def decode(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int], rows: slice) -> Tensor:
        return tensors["weight"][rows].float() * spread(tensors["scale"].float(), args, rows, shape[1])

    def unit(self, args: WeightArgs, shape: tuple[int, int]) -> int:
        return args.group_size or 1 if args.granularity == "per_block" else 1

    def by_rows(self, args: WeightArgs, shape: tuple[int, int]) -> WeightArgs:
        if args.granularity == "per_tensor":
            return replace(args, granularity="per_channel")
        return replace(args, granularity="per_group") if args.granularity == "per_block" else args

    def rows_apart(self, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]) -> dict[str, Tensor]:
        scale = tensors["scale"].reshape(1, 1) if args.granularity == "per_tensor" else tensors["scale"]
        if args.granularity in ("per_tensor", "per_block"):
            scale = scale[torch.arange(shape[0], device=scale.device) // (args.group_size or shape[0])]
        return {"weight": tensors["weight"], "scale": scale}


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales float32 as they are read back from `dtype`: finite, and its eps in place of zero."""
    info = torch.finfo(dtype)
    stored = scale.clamp(max=info.max).to(dtype).float()
    return torch.where(stored == 0, info.eps, stored)


def scale_shape(args: WeightArgs, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of one scale for each tensor, row, group or block."""
    n, k = shape
    if args.group_size is None:
        return (1,) if args.granularity == "per_tensor" else (n, 1)
    columns = -(-k // args.group_size)
    return (-(-n // args.group_size) if args.granularity == "per_block" else n, columns)


def spread(scale: Tensor, args: WeightArgs, rows: slice, k: int) -> Tensor:
    """Scales of `scale_shape` to what broadcasts with [rows, k]."""
    if args.granularity == "per_tensor":
        return scale
    if args.granularity == "per_block":
        assert args.group_size is not None
        scale = scale[torch.arange(rows.start, rows.stop, device=scale.device) // args.group_size]
    else:
        scale = scale[rows]
    return scale if args.group_size is None else scale.repeat_interleave(args.group_size, dim=1)[:, :k]


def largest(weight: Tensor, args: WeightArgs) -> Tensor:
    """amax(|w|) over each tensor, row, group or block, in the shape of the scales."""
    size = weight.abs()
    if args.granularity == "per_tensor":
        return size.amax().reshape(1)
    if args.group_size is None:
        return size.amax(1, keepdim=True)
    g, (n, k) = args.group_size, weight.shape
    size = torch.nn.functional.pad(size, (0, -k % g, 0, -n % g if args.granularity == "per_block" else 0))
    found: Tensor = size.unflatten(1, (-1, g)).amax(-1)
    if args.granularity == "per_block":
        found = found.unflatten(0, (-1, g)).amax(1)
    return found


register_codec("fp8", Fp8())

_TOKEN = ActivationArgs(type="float")
register_scheme(Scheme(name="fp8", weight=WeightArgs(bits=8, type="fp8", granularity="per_tensor"),
                       activation=ActivationArgs(type="float", granularity="per_tensor", dynamic=False)))
register_scheme(Scheme(name="fp8_per_tensor", weight=WeightArgs(bits=8, type="fp8", granularity="per_tensor"),
                       activation=ActivationArgs(type="float", granularity="per_tensor")))
register_scheme(Scheme(name="fp8_dynamic", weight=WeightArgs(bits=8, type="fp8"), activation=_TOKEN))
register_scheme(Scheme(
    name="fp8_block", weight=WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=128),
    activation=ActivationArgs(type="float", granularity="per_group", group_size=128)))
