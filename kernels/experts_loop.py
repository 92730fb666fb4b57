"""experts_loop: chosen experts one after the other, each on the best linear kernel of the machine; takes every scheme.

What runs where no kernel computes a layer of experts whole. Of the experts that no token chose, no byte is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.experts_spec import ExpertsSpec
from qpass.kernels.reference.experts import Codes, mix, quantize_for, refuses_activation
from qpass.kernels.registry import kernel, register_kernel


@register_kernel(op="experts", scheme="*", device="*", priority=5, refuses=refuses_activation)
def experts_loop(x: Tensor, index: Tensor, weight: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None],
                 spec: ExpertsSpec) -> Tensor:
    """x [T, H] floating -> [T, H] in x's dtype."""
    shared = spec.up is not None and "linear_q" in kernel(spec.up.kernel).forms
    codes = quantize_for(x, spec.up) if shared else None
    return mix(codes or x, index, weight, packed, bias, spec, x.dtype)


@experts_loop.form("experts_q")
def experts_q_loop(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
                   packed: Sequence[Tensor], bias: Sequence[Tensor | None], spec: ExpertsSpec,
                   dtype: torch.dtype) -> Tensor:
    """xq int8 [T, H], x_scale float32 [T, 1], x_zero_point float32 [T, 1] or None -> [T, H] in `dtype`."""
    return mix(Codes(codes=xq, scale=x_scale, zero_point=x_zero_point), index, weight, packed, bias, spec, dtype)
