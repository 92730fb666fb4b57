"""CUDA experts: whole layers of experts in the table, two grouped Triton products with plain torch between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qpass.experts_spec import ExpertsSpec
from qpass.kernels.cuda.capability import triton_refuses
from qpass.kernels.cuda.launch import Rows, multiply, operands
from qpass.kernels.cuda.layouts import CUDA_TILES, names
from qpass.kernels.cuda.linear import FLOAT_FAMILIES, FP8_FAMILIES, INT8_FAMILIES, LEAST, PRIORITY, kind_of, name_of
from qpass.kernels.cuda.linear import refuses as linear_refuses
from qpass.kernels.cuda.routing import group_rows
from qpass.kernels.reference.activation import quantize_activation
from qpass.kernels.reference.experts import apply_gate
from qpass.kernels.registry import ExpertsCall, kernel, register_kernel

BLOCKS = (16, 32, 64, 128)


def refuses(call: ExpertsCall) -> str | None:
    """Why the programs do not take a layer of experts, or None."""
    for part in call.spec.parts:
        if part is None:
            return "needs both weights quantized"
        if part.kernel and part.kernel != "linear_reference" and kernel(part.kernel).layout is not CUDA_TILES:
            return f"reads weights in layout cuda_tiles, and these are packed for {part.kernel}"
    for one in call.parts():
        if (why := linear_refuses(one)) is not None:
            return why
    return None


def rows_of(x: Tensor, spec: ExpertsSpec) -> Rows:
    """x [T, H], rounded as the first weight wants it."""
    return _rounded(x.contiguous(), spec.up.activation if spec.up else None)


def run(rows: Rows, index: Tensor, weight: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None],
        spec: ExpertsSpec, dtype: torch.dtype) -> Tensor:
    """The formula of kernels/reference/experts.py: rows [T, H] -> [T, H] in `dtype`."""
    up, down = spec.up, spec.down
    assert up is not None and down is not None
    tokens, places = index.shape
    if tokens == 0 or places == 0:
        return torch.zeros(tokens, spec.hidden, dtype=dtype, device=index.device)
    grouping = group_rows(index, spec.experts, block_of(tokens * places, spec.experts))
    count = len(names(up))
    first, = operands(packed[:count], bias[:1], [up])
    second, = operands(packed[count:], bias[1:], [down])
    y, = multiply(rows, [first], torch.float32, grouping)
    known = ((index >= 0) & (index < spec.experts)).reshape(-1, 1)
    # Places that no expert computes hold whatever memory held; they count for nothing.
    h = apply_gate(torch.where(known, y, 0.0), spec.gate)
    between = h if down.activation is not None else h.to(_half(rows.x.dtype, dtype))
    z, = multiply(_rounded(between, down.activation), [second], torch.float32, replace(grouping, places=1))
    terms = torch.where(known, z * weight.reshape(-1, 1).float(), 0.0).view(tokens, places, -1)
    total = terms[:, 0]
    for j in range(1, places):  # in this order, as the reference adds
        total = total + terms[:, j]
    return total.to(dtype)


def block_of(places: int, experts: int) -> int:
    """Rows of a block: about as many as an expert gets, for what is filled up is computed for nothing."""
    each = places / max(experts, 1)
    return next((size for size in BLOCKS if each <= size), BLOCKS[-1])


def _half(given: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What float activations between the products are: those that came in."""
    return given if given in (torch.bfloat16, torch.float16, torch.float32) else dtype


def _rounded(x: Tensor, activation: object) -> Rows:
    if activation is None:
        return Rows(x=x)
    codes, scale, zero_point = quantize_activation(x, activation)  # type: ignore[arg-type]
    return Rows(x=codes.contiguous(), scale=scale, zero_point=zero_point)


def _register(family: str) -> None:
    @register_kernel(op="experts", name=f"experts_{family}_triton", scheme=family, device="cuda",
                     isa=f"sm_{LEAST[kind_of(family)]}", linear=name_of(family), refuses=refuses, priority=PRIORITY,
                     prepare=triton_refuses)
    def experts(x: Tensor, index: Tensor, weight: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None],
                spec: ExpertsSpec) -> Tensor:
        return run(rows_of(x, spec), index, weight, packed, bias, spec, x.dtype)

    if kind_of(family) == "half":
        return

    @experts.form("experts_q")
    def experts_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
                  packed: Sequence[Tensor], bias: Sequence[Tensor | None], spec: ExpertsSpec,
                  dtype: torch.dtype) -> Tensor:
        rows = Rows(x=xq.contiguous(), scale=x_scale, zero_point=x_zero_point)
        return run(rows, index, weight, packed, bias, spec, dtype)


for _family in (*FLOAT_FAMILIES, *INT8_FAMILIES, *FP8_FAMILIES):
    _register(_family)
