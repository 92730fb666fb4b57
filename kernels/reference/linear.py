"""linear_reference: y = x @ w.T on quantized weights, in plain torch, for every scheme, dtype and device.

Integers are multiplied in float64, which is exact for every sum that fits int32, one group at a time; group results
are scaled and added in float32, as every kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qpass.kernels.layout import CANONICAL
from qpass.kernels.reference.activation import cannot_round, quantize_activation
from qpass.kernels.registry import LinearCall, register_kernel
from qpass.scheme import RowCodec, codec_of
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight, row_blocks

if TYPE_CHECKING:
    from torch import Tensor


def unpack(packed: Sequence[Tensor], spec: LinearSpec) -> CanonicalWeight:
    """The canonical weight of a list of tensors in the reference's layout."""
    return CanonicalWeight(dict(zip(CANONICAL.names(spec), packed, strict=True)))


def _refuses(call: LinearCall) -> str | None:
    activation = call.spec.activation
    if activation is None or (activation.number == "int8" and (
            activation.static or (activation.dynamic is True and activation.granularity == "per_token"))):
        return None
    if call.spec.exact:
        return cannot_round(activation, call.spec.in_features)
    words = " ".join((activation.granularity.replace("_", " "), *(("static",) if activation.static else ())))
    return f"activation rounding to {activation.number} {words} is not computed on {call.device_type}"


@register_kernel(scheme="*", device="*", priority=0, refuses=_refuses)
def linear_reference(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
    """x [..., K] floating -> [..., N] in x's dtype."""
    if spec.activation is None:
        y = _times(x.float(), unpack(packed, spec), spec)
        return (y if bias is None else y + bias.float()).to(x.dtype)
    return linear_q_reference(*quantize_activation(x, spec.activation), packed, bias, spec, x.dtype)


@linear_reference.form("linear_q")
def linear_q_reference(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                       bias: Tensor | None, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """xq int8 or float8 [..., K], x_scale float32 [..., 1], or [..., G] of groups, x_zero_point float32 [..., 1] or
    None -> [..., N] in `dtype`."""
    weight = unpack(packed, spec)
    x = xq.double() if x_zero_point is None else xq.double() - x_zero_point.double()
    if x_scale.shape[-1] > 1:
        x, x_scale = x * x_scale.repeat_interleave(x.shape[-1] // x_scale.shape[-1], dim=-1), torch.ones_like(
            x_scale[..., :1])
    if spec.weight.type != "int":  # a codec's weights are not integers: one float product of the rounded activation
        y = _times(x.float(), weight, spec) * x_scale
        return (y if bias is None else y + bias.float()).to(dtype)
    y = torch.zeros(*x.shape[:-1], spec.out_features, dtype=torch.float32, device=x.device)
    size = spec.group_size
    for g in range(spec.groups):
        columns = slice(g * size, (g + 1) * size)
        w = weight.qweight[:, columns].double()
        if weight.zero_point is not None:
            w = w - weight.zero_point[:, g, None].double()
        y = y + (x[..., columns] @ w.t()).float() * weight.scale[:, g].float()
    y = y * x_scale
    return (y if bias is None else y + bias.float()).to(dtype)


def _times(x: Tensor, weight: CanonicalWeight, spec: LinearSpec) -> Tensor:
    """x float32 [..., K] @ weight.T, float32; a codec's weight is decoded some rows at a time, never as a whole."""
    codec = codec_of(spec.weight)
    if not isinstance(codec, RowCodec):
        return x @ dequantize_weight(weight, spec).t()
    y = x.new_empty(*x.shape[:-1], spec.out_features)
    for rows in row_blocks(spec):
        y[..., rows] = x @ codec.decode(weight.tensors, spec.weight, spec.shape, rows).t()
    return y
