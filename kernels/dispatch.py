"""Dispatch: the ops' implementations, which hand each call to the kernel that its spec names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import qpass.kernels.cpu.x86_ops
import qpass.kernels.cuda.ops  # noqa: F401  (both: ops that graphs compiled earlier call)
from qpass.experts_spec import ExpertsSpec
from qpass.kernels.reference.activation import quantize_static, static_rows
from qpass.kernels.registry import Kernel, kernel
from qpass.ops import LIBRARY
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight


def split_packed(packed: Sequence[Tensor], specs: Sequence[LinearSpec], chosen: Kernel) -> list[Sequence[Tensor]]:
    """The tensors of several weights, given as one list, weight by weight."""
    parts, start = [], 0
    for spec in specs:
        count = len(chosen.layout.names(spec))
        parts.append(packed[start:start + count])
        start += count
    return parts


def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, input_scale: Tensor | None = None,
            input_zero_point: Tensor | None = None) -> Tensor:
    parsed = LinearSpec.parse(spec)
    if input_scale is not None:
        codes = quantize_static(x, input_scale, input_zero_point)
        scale, zero_point = static_rows(x, input_scale, input_zero_point)
        return kernel(parsed.kernel).forms["linear_q"](codes, scale, zero_point, packed, bias, parsed, x.dtype)  # type: ignore[no-any-return]
    return kernel(parsed.kernel).forms["linear"](x, packed, bias, parsed)  # type: ignore[no-any-return]


def _linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor], bias: Tensor | None,
              spec: str, dtype: torch.dtype) -> Tensor:
    parsed = LinearSpec.parse(spec)
    form = kernel(parsed.kernel).forms["linear_q"]
    return form(xq, x_scale, x_zero_point, packed, bias, parsed, dtype)  # type: ignore[no-any-return]


def _linear_list(x: Tensor, packed: list[Tensor], bias: list[Tensor | None], specs: list[str]) -> list[Tensor]:
    parsed = [LinearSpec.parse(spec) for spec in specs]
    chosen = kernel(parsed[0].kernel)
    if (form := chosen.forms.get("linear_list")) is not None:
        return form(x, packed, bias, parsed)  # type: ignore[no-any-return]
    parts = split_packed(packed, parsed, chosen)
    return [chosen.forms["linear"](x, p, b, s) for p, b, s in zip(parts, bias, parsed, strict=True)]


def _linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor],
                   bias: list[Tensor | None], specs: list[str], dtype: torch.dtype) -> list[Tensor]:
    parsed = [LinearSpec.parse(spec) for spec in specs]
    chosen = kernel(parsed[0].kernel)
    if (form := chosen.forms.get("linear_q_list")) is not None:
        return form(xq, x_scale, x_zero_point, packed, bias, parsed, dtype)  # type: ignore[no-any-return]
    one, parts = chosen.forms["linear_q"], split_packed(packed, parsed, chosen)
    return [one(xq, x_scale, x_zero_point, p, b, s, dtype) for p, b, s in zip(parts, bias, parsed, strict=True)]


def _dequantize(packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    parsed = LinearSpec.parse(spec)
    layout = kernel(parsed.kernel).layout
    weight = layout.unpack(dict(zip(layout.names(parsed), packed, strict=True)), parsed)
    return dequantize_weight(weight, parsed, dtype)


def _experts(x: Tensor, index: Tensor, weight: Tensor, packed: list[Tensor], bias: list[Tensor | None],
             spec: str) -> Tensor:
    parsed = ExpertsSpec.parse(spec)
    return kernel(parsed.kernel).forms["experts"](x, index, weight, packed, bias, parsed)  # type: ignore[no-any-return]


def _experts_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
               packed: list[Tensor], bias: list[Tensor | None], spec: str, dtype: torch.dtype) -> Tensor:
    parsed = ExpertsSpec.parse(spec)
    form = kernel(parsed.kernel).forms["experts_q"]
    return form(xq, x_scale, x_zero_point, index, weight, packed, bias, parsed, dtype)  # type: ignore[no-any-return]


def _embedding(ids: Tensor, packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    parsed = LinearSpec.parse(spec)
    layout = kernel(parsed.kernel).layout
    assert layout.rows is not None, f"{layout.name} gives no single rows; the planner refuses it for a table"
    rows = layout.rows(dict(zip(layout.names(parsed), packed, strict=True)), parsed, ids.reshape(-1))
    return dequantize_weight(rows, parsed, dtype).view(*ids.shape, parsed.in_features)


# Composite: a trace holds the lines of it, so that a compiler fuses the look-up into what reads it.
LIBRARY.impl("embedding", _embedding, "CompositeImplicitAutograd")
for _name, _fn in {"linear": _linear, "linear_q": _linear_q, "linear_list": _linear_list,
                   "linear_q_list": _linear_q_list, "dequantize": _dequantize, "experts": _experts,
                   "experts_q": _experts_q}.items():
    LIBRARY.impl(_name, _fn, "CompositeExplicitAutograd")
