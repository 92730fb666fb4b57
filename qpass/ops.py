"""Ops: the schemas of what swap and lowering leave in a graph, and the shapes they give; no arithmetic is here.

`linear` quantizes its activation as the spec says and multiplies. `linear_q` takes an activation that is already
integers, so that its quantization can stand in the graph as plain ATen and fuse into whatever came before.
The `_list` forms multiply one activation with several weights in one call. `dequantize` gives the weight [N, K] back.
`packed` holds the tensors of the kernel's layout in the layout's order; `spec` is `str(LinearSpec)`. What the ops
compute is defined in `kernels/reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass.spec import LinearSpec

LIBRARY = torch.library.Library("qpass", "DEF")
LIBRARY.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str spec) -> Tensor")
LIBRARY.define("linear_q(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor? bias, str spec, "
               "ScalarType dtype) -> Tensor")
LIBRARY.define("linear_list(Tensor x, Tensor[] packed, Tensor?[] bias, str[] specs) -> Tensor[]")
LIBRARY.define("linear_q_list(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor?[] bias, "
               "str[] specs, ScalarType dtype) -> Tensor[]")
LIBRARY.define("dequantize(Tensor[] packed, str spec, ScalarType dtype) -> Tensor")


def _product(x: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    parsed = LinearSpec.parse(spec)
    torch._check(x.shape[-1] == parsed.in_features,
                 lambda: f"qpass: input has {x.shape[-1]} features, the weight takes {parsed.in_features} ({spec})")
    return x.new_empty((*x.shape[:-1], parsed.out_features), dtype=dtype)


def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return _product(x, spec, x.dtype)


def _linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor], bias: Tensor | None,
              spec: str, dtype: torch.dtype) -> Tensor:
    return _product(xq, spec, dtype)


def _linear_list(x: Tensor, packed: list[Tensor], bias: list[Tensor | None], specs: list[str]) -> list[Tensor]:
    return [_product(x, spec, x.dtype) for spec in specs]


def _linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor],
                   bias: list[Tensor | None], specs: list[str], dtype: torch.dtype) -> list[Tensor]:
    return [_product(xq, spec, dtype) for spec in specs]


def _dequantize(packed: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    parsed = LinearSpec.parse(spec)
    return packed[0].new_empty((parsed.out_features, parsed.in_features), dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "linear": _linear, "linear_q": _linear_q, "linear_list": _linear_list, "linear_q_list": _linear_q_list,
    "dequantize": _dequantize}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"qpass::{_name}", _fake, lib=LIBRARY)
