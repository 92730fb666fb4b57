"""Torch's own 8-bit products as kernels: `torch._int_mm` and `torch._scaled_mm`, with scales applied in plain torch.

They read the layout of the Triton kernels. `PRIORITY` is below those until a measurement says otherwise; forced by name
they can be compared: linear_w8a8_int_mm, linear_fp8_w8afp8_scaled_mm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qpass.dtype import FLOATS
from qpass.kernels.cuda import linear as triton_linear
from qpass.kernels.cuda.capability import needs
from qpass.kernels.cuda.layouts import CUDA_TILES, names
from qpass.kernels.reference.activation import quantize_activation
from qpass.kernels.registry import LinearCall, register_kernel
from qpass.spec import LinearSpec

PRIORITY = triton_linear.PRIORITY - 5
_LEAST_ROWS = 17  # torch._int_mm takes no fewer


def _whole_rows(call: LinearCall) -> str | None:
    weight = call.spec.weight
    if weight.granularity not in ("per_channel", "per_tensor"):
        return f"needs one scale a row or tensor, got {weight.grouping}"
    if call.dtype_name not in FLOATS:
        return f"takes float32, bfloat16 or float16 activations, not {call.dtype_name}"
    return None


def _int_refuses(call: LinearCall) -> str | None:
    if not call.spec.weight.symmetric:
        return "needs weights without zero points"
    return needs(75, call.device) or _whole_rows(call)


def _fp8_refuses(call: LinearCall) -> str | None:
    activation = call.spec.activation
    if activation is None or activation.static or activation.granularity != "per_token":
        return "rounds activations per token, dynamically"
    if call.dtype_name == "float32":
        return "gives bfloat16 or float16, not float32"
    return needs(89, call.device, "float8 products") or _whole_rows(call)


def _padded(x: Tensor, k: int, rows: int = 0) -> Tensor:
    """x [..., K] -> [M, k], M at least `rows`."""
    x = x.reshape(-1, x.shape[-1])
    missing = torch.sym_max(rows - x.shape[0], 0) if rows else 0
    return F.pad(x.view(torch.int8), (0, k - x.shape[1], 0, missing)).view(x.dtype)


def _named(packed: Sequence[Tensor], spec: LinearSpec) -> dict[str, Tensor]:
    return dict(zip(names(spec), packed, strict=True))


@register_kernel(name="linear_w8a8_int_mm", scheme="w8a8", device="cuda", isa="sm_75", layout=CUDA_TILES,
                 refuses=_int_refuses, priority=PRIORITY)
def linear_w8a8_int_mm(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
    """x [..., K] floating -> [..., N] in x's dtype."""
    assert spec.activation is not None
    return linear_q_w8a8_int_mm(*quantize_activation(x, spec.activation), packed, bias, spec, x.dtype)


@linear_w8a8_int_mm.form("linear_q")
def linear_q_w8a8_int_mm(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                         bias: Tensor | None, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """xq int8 [..., K], x_scale and x_zero_point float32 [..., 1] -> [..., N] in `dtype`."""
    t, n = _named(packed, spec), spec.out_features
    weight = t["qweight"]
    shape, m = (*xq.shape[:-1], n), xq.numel() // max(xq.shape[-1], 1)
    sums = torch._int_mm(_padded(xq, weight.shape[1], _LEAST_ROWS), weight.t())
    y = sums[:m, :n].reshape(shape).float() * t["scale"][0, :n].float()
    if x_zero_point is not None:
        y = y - x_zero_point * t["colsum"][:n]
    y = y * x_scale
    return (y if bias is None else y + bias.float()).to(dtype)


@register_kernel(name="linear_fp8_w8afp8_scaled_mm", scheme="fp8_w8afp8", device="cuda", isa="sm_89",
                 layout=CUDA_TILES, refuses=_fp8_refuses, priority=PRIORITY)
def linear_fp8_w8afp8_scaled_mm(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
    """x [..., K] bfloat16 or float16 -> [..., N] in x's dtype."""
    assert spec.activation is not None
    return linear_q_fp8_w8afp8_scaled_mm(*quantize_activation(x, spec.activation), packed, bias, spec, x.dtype)


@linear_fp8_w8afp8_scaled_mm.form("linear_q")
def linear_q_fp8_w8afp8_scaled_mm(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                                  bias: Tensor | None, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """xq float8_e4m3fn [..., K], x_scale float32 [..., 1] -> [..., N] in `dtype`.

    Scales of rows and columns go into the product on sm_90; on sm_89, which has them for whole tensors only, they are
    applied after it. The product comes in bfloat16 where torch gives no other with such scales.
    """
    t, n = _named(packed, spec), spec.out_features
    weight, shape = t["weight"], (*xq.shape[:-1], n)
    x, rows = _padded(xq, weight.shape[1]), x_scale.reshape(-1, 1).float().contiguous()
    scale = t["scale"].view(-1)[:1].expand(weight.shape[0]) if t["scale"].numel() == 1 else t["scale"][0]
    columns = scale.float().view(1, -1).contiguous()
    if dtype == torch.bfloat16 and needs(90, xq.device) is None and xq.device.type == "cuda":
        y = torch._scaled_mm(x, weight.t(), scale_a=rows, scale_b=columns, out_dtype=dtype)[:, :n]
        return (y if bias is None else y.float() + bias.float()).to(dtype).reshape(shape)
    one = torch.ones((), device=x.device)
    sums = torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    y = sums[:, :n] * columns[:, :n] * rows
    return (y if bias is None else y + bias.float()).to(dtype).reshape(shape)
