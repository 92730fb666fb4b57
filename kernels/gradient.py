"""Gradient: what `qpass::linear` passes back to its input and bias; packed weights themselves do not learn.

Rounding the activation counts as the identity (straight through): grad_x = grad_y @ w, w as quantized. So adapters and
norms around packed layers can be trained, and a model can be compiled outside `torch.no_grad()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.ops import LIBRARY


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, spec, *scales = inputs
    # A trailing None that is the schema's default was never passed, and has no place in what backward returns.
    ctx.scales = 2 if scales[1] is not None else 1 if scales[0] is not None else 0
    ctx.spec, ctx.count = spec, len(packed)
    ctx.dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*packed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.qpass.dequantize(list(ctx.saved_tensors), ctx.spec, ctx.dtype)
        grad_x = grad @ weight
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, [None] * ctx.count, grad_bias, None, *[None] * ctx.scales


torch.library.register_autograd("qpass::linear", _backward, setup_context=_setup, lib=LIBRARY)
