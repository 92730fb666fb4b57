"""Canonical weight: float weight in, integers with scales out, and back; the portable form that layouts repack.

Formulas are those of compressed-tensors (`quantization/utils/helpers.py`, calculate_qparams):
symmetric   scale = amax(|w|) / ((qmax - qmin) / 2),                 q = clamp(round(w / scale), qmin, qmax)
asymmetric  scale = (max(w, 0) - min(w, 0)) / (qmax - qmin), zero_point = clamp(qmin - round(min / scale), qmin, qmax),
            q = clamp(round(w / scale) + zero_point, qmin, qmax)
with qmin = -2^(bits-1), qmax = 2^(bits-1) - 1. The scale is rounded to its stored dtype before it is used.
Where the scheme asks for integer scales they come from qpass/integer_scales.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import qpass.codecs  # noqa: F401  (so that every type that a spec can name is known)
from qpass.errors import WeightError
from qpass.integer_scales import integer_scales
from qpass.scheme import RowCodec, codec_of
from qpass.spec import LinearSpec

if TYPE_CHECKING:
    from torch import Tensor

_ROWS_AT_ONCE_ELEMENTS = 1 << 18  # float32 work space of 1 MB, so that a layer costs little more than its result


@dataclass(frozen=True)
class CanonicalWeight:
    """Named tensors of one weight [N, K].

    For int types: `qweight` int8 [N, K], `scale` floating [N, G], and `zero_point` int8 [N, G] if asymmetric, with
    w = (qweight - zero_point) * scale, column k in group k // group_size. A codec names its own tensors.
    """

    tensors: dict[str, Tensor]

    @property
    def qweight(self) -> Tensor:
        return self.tensors["qweight"]

    @property
    def scale(self) -> Tensor:
        return self.tensors["scale"]

    @property
    def zero_point(self) -> Tensor | None:
        return self.tensors.get("zero_point")

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def check_weight(weight: Tensor, name: str, *, allow_nonfinite: bool = False) -> None:
    """Raise WeightError, naming `name`, unless `weight` can be quantized."""
    if not weight.is_floating_point():
        raise WeightError(f"{name} has dtype {weight.dtype}: only floating-point weights can be quantized; "
                          "if the checkpoint is quantized already, load it with qpass.load")
    if weight.is_meta:
        raise WeightError(f"{name} is on the meta device and holds no numbers; load the weights before quantize, "
                          "or use qpass.plan, which needs none")
    if weight.numel() == 0:
        raise WeightError(f"{name} has shape {tuple(weight.shape)} and holds no numbers; add it to ignore")
    if allow_nonfinite:
        return
    # One sum a row shows NaN and Inf in one read; a row whose sum overflowed is looked at again. In the weight's own
    # dtype: sum(dtype=...) would convert the whole weight first.
    rows = weight.detach().reshape(-1, weight.shape[-1])
    suspect = rows[~torch.isfinite(rows.sum(dim=-1))]
    nans, infs = int(torch.isnan(suspect).sum()), int(torch.isinf(suspect).sum())
    if nans or infs:
        raise WeightError(f"{name} holds {nans} NaN and {infs} Inf; repair the checkpoint, add {name!r} to ignore, or "
                          "pass allow_nonfinite=True to quantize them as 0")


def quantize_weight(weight: Tensor, spec: LinearSpec, scale_dtype: torch.dtype | None = None,
                    largest: Tensor | None = None) -> CanonicalWeight:
    """Round `weight` [N, K] to `spec.weight`; scales are stored in `scale_dtype`, by default the weight's own
    (float32 for a float64 weight, for they are computed in float32).

    `largest` is the largest magnitude, float32 [], in this weight and those that share one scale for the tensor with
    it; formats without such a scale do not look at it. Non-finite values become 0 (callers refuse them first with
    `check_weight`). Works in blocks of rows.
    """
    scale_dtype = scale_dtype or (torch.float32 if weight.dtype is torch.float64 else weight.dtype)
    codec = codec_of(spec.weight)
    if isinstance(codec, RowCodec):
        return CanonicalWeight(_encoded(weight.detach(), spec, codec, scale_dtype, largest))
    if codec is not None:
        return CanonicalWeight(codec.quantize(weight.detach().float(), spec.group_size))
    n, k = weight.shape
    bits, groups = spec.weight.bits, spec.groups
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    shared = _tensor_range(weight) if spec.weight.granularity == "per_tensor" else None
    qweight = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scale = torch.empty(n, groups, dtype=scale_dtype, device=weight.device)
    zero_point = None if spec.weight.symmetric else torch.empty(n, groups, dtype=torch.int8, device=weight.device)
    step = max(1, _ROWS_AT_ONCE_ELEMENTS // max(k, 1))
    for row in range(0, n, step):
        rows = slice(row, min(row + step, n))
        w = weight[rows].detach().float().nan_to_num(0.0, 0.0, 0.0).view(-1, groups, spec.group_size)
        low, high = shared or (w.amin(-1, keepdim=True), w.amax(-1, keepdim=True))
        if spec.weight.scales == "integer":
            s = integer_scales(w, bits, scale_dtype)
        elif spec.weight.symmetric:
            s = torch.maximum(low.abs(), high.abs()) / ((qmax - qmin) / 2)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            s = (high - low) / (qmax - qmin)
        s = (s if spec.weight.scales == "integer" else _storable(s, scale_dtype)).expand(w.shape[0], groups, 1)
        q = w / s
        if zero_point is None:
            q = q.round_()
        else:
            zp = (qmin - (low / s).round()).clamp(qmin, qmax)
            q = q.round_().add_(zp)
            zero_point[rows] = zp.squeeze(-1).to(torch.int8)
        qweight[rows] = q.clamp_(qmin, qmax).view(-1, k).to(torch.int8)
        scale[rows] = s.squeeze(-1).to(scale_dtype)
    tensors = {"qweight": qweight, "scale": scale}
    if zero_point is not None:
        tensors["zero_point"] = zero_point
    return CanonicalWeight(tensors)


def dequantize_weight(weight: CanonicalWeight, spec: LinearSpec, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as quantized, [N, K] in `dtype` (float32), or any number of its rows: (q - zero_point) * scale in
    float32."""
    dtype = dtype or torch.float32
    codec = codec_of(spec.weight)
    if isinstance(codec, RowCodec):
        whole = torch.empty(spec.out_features, spec.in_features, dtype=dtype, device=weight.device)
        for rows in row_blocks(spec):
            whole[rows] = codec.decode(weight.tensors, spec.weight, spec.shape, rows)
        return whole
    if codec is not None:
        return codec.dequantize(weight.tensors, spec.group_size).to(dtype)
    q = weight.qweight.view(-1, spec.groups, spec.in_features // spec.groups).to(torch.float32, copy=True)
    if weight.zero_point is not None:
        q.sub_(weight.zero_point.unsqueeze(-1))
    # In place: memory that is new to the process costs more than the product.
    return q.mul_(weight.scale.float().unsqueeze(-1)).view(-1, spec.in_features).to(dtype)


def row_blocks(spec: LinearSpec) -> Iterator[slice]:
    """The rows of a weight in blocks whose float32 values fit a megabyte."""
    step = max(1, _ROWS_AT_ONCE_ELEMENTS // max(spec.in_features, 1))
    for start in range(0, spec.out_features, step):
        yield slice(start, min(start + step, spec.out_features))


def _encoded(weight: Tensor, spec: LinearSpec, codec: RowCodec, scale_dtype: torch.dtype,
             largest: Tensor | None = None) -> dict[str, Tensor]:
    """What the codec makes of the whole weight; some rows at a time where none of its tensors is of more than those."""
    (n, k), args = weight.shape, spec.weight
    unit = max(1, codec.unit(args, (n, k)))
    one, two = (codec.stored(args, (rows * unit, k)) for rows in (1, 2))
    apart = codec.unit(args, (n, k)) > 0 and all(two[name][1][0] == 2 * one[name][1][0] for name in one)
    step = max(unit, _ROWS_AT_ONCE_ELEMENTS // max(k, 1) // unit * unit) if apart else max(n, 1)
    rows = (weight[row:row + step].float().nan_to_num(0.0, 0.0, 0.0) for row in range(0, max(n, 1), step))
    parts = [codec.encode_within(part, args, scale_dtype, largest.to(part.device)) if codec.one_scale and
             largest is not None else codec.encode(part, args, scale_dtype) for part in rows]
    return parts[0] if len(parts) == 1 else {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, also of the small floats for which it is not there on every device."""
    bits = parts[0].dtype if parts[0].dtype.itemsize > 1 else torch.uint8
    return torch.cat([part.view(bits) for part in parts]).view(parts[0].dtype)


def _tensor_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    finite = weight.detach().nan_to_num(0.0, 0.0, 0.0)
    return finite.amin().float().view(1, 1, 1), finite.amax().float().view(1, 1, 1)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it will be read back: rounded to `dtype`, finite, and not zero (an all-zero group gets eps)."""
    info = torch.finfo(dtype)
    stored = scale.clamp(max=info.max).to(dtype).float()
    return torch.where(stored == 0, torch.where(scale == 0, info.eps, info.tiny), stored)
