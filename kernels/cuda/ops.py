"""CUDA ops: the products as ops of namespace qpass_cuda, whose Triton programs torch.compile sees and may fuse around.

They have the schemas of the `qpass` ops of the same name, specs as text; `linear_list` takes weights of one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qpass.kernels.cuda.linear import forward, forward_q
from qpass.spec import LinearSpec

OPS = torch.ops.qpass_cuda
_CODES = "Tensor xq, Tensor x_scale, Tensor? x_zero_point"


def _op(name: str, schema: str) -> Any:
    return torch.library.triton_op(f"qpass_cuda::{name}", mutates_args=(), schema=schema)


def _parsed(specs: Sequence[str]) -> list[LinearSpec]:
    return [LinearSpec.parse(spec) for spec in specs]


@_op("linear", "(Tensor x, Tensor[] packed, Tensor? bias, str spec, Tensor? input_scale=None, "
               "Tensor? input_zero_point=None) -> Tensor")
def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, input_scale: Tensor | None = None,
            input_zero_point: Tensor | None = None) -> Tensor:
    return forward(x, packed, [bias], _parsed([spec]))[0]


@_op("linear_q", f"({_CODES}, Tensor[] packed, Tensor? bias, str spec, ScalarType dtype) -> Tensor")
def _linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor], bias: Tensor | None,
              spec: str, dtype: torch.dtype) -> Tensor:
    return forward_q(xq, x_scale, x_zero_point, packed, [bias], _parsed([spec]), dtype)[0]


@_op("linear_list", "(Tensor x, Tensor[] packed, Tensor?[] bias, str[] specs) -> Tensor[]")
def _linear_list(x: Tensor, packed: list[Tensor], bias: list[Tensor | None], specs: list[str]) -> list[Tensor]:
    return forward(x, packed, bias, _parsed(specs))


@_op("linear_q_list", f"({_CODES}, Tensor[] packed, Tensor?[] bias, str[] specs, ScalarType dtype) -> Tensor[]")
def _linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor],
                   bias: list[Tensor | None], specs: list[str], dtype: torch.dtype) -> list[Tensor]:
    return forward_q(xq, x_scale, x_zero_point, packed, bias, _parsed(specs), dtype)
