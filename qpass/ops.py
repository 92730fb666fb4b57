"""Ops: the schemas of what swap and lowering leave in a graph, and the shapes they give; no arithmetic is here.

`linear` quantizes its activation as the spec says and multiplies. `linear_q` takes an activation that is already
integers, so that its quantization can stand in the graph as plain ATen and fuse into whatever came before.
The `_list` forms multiply one activation with several weights in one call. `dequantize` gives the weight [N, K] back,
`embedding` those of its rows that `ids` names: plain torch, which a compiler sees through.
`packed` holds the tensors of the kernel's layout in the layout's order; `spec` is `str(LinearSpec)`. What the ops
compute is defined in `kernels/reference`.

`experts` is a whole layer of experts: x [T, H], index int [T, top_k], weight floating [T, top_k] -> [T, H], and
`experts_q` takes the activation as integers. An index below 0 or from the number of experts on contributes nothing.
`packed` holds the tensors of the first weight, then those of the second, each as its LinearSpec's layout has them with
a leading dimension of experts: expert e's block is `tensor[e]`. A weight that stays float is one tensor [E, N, K].
`bias` has two entries, [E, N] of the first weight and [E, H] of the second, or None. `spec` is `str(ExpertsSpec)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass.experts_spec import ExpertsSpec
from qpass.spec import LinearSpec

LIBRARY = torch.library.Library("qpass", "DEF")
LIBRARY.define("linear(Tensor x, Tensor[] packed, Tensor? bias, str spec, Tensor? input_scale=None, "
               "Tensor? input_zero_point=None) -> Tensor")
LIBRARY.define("linear_q(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor? bias, str spec, "
               "ScalarType dtype) -> Tensor")
LIBRARY.define("linear_list(Tensor x, Tensor[] packed, Tensor?[] bias, str[] specs) -> Tensor[]")
LIBRARY.define("linear_q_list(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor?[] bias, "
               "str[] specs, ScalarType dtype) -> Tensor[]")
LIBRARY.define("embedding(Tensor ids, Tensor[] packed, str spec, ScalarType dtype) -> Tensor")
LIBRARY.define("dequantize(Tensor[] packed, str spec, ScalarType dtype) -> Tensor")
LIBRARY.define("experts(Tensor x, Tensor index, Tensor weight, Tensor[] packed, Tensor?[] bias, str spec) -> Tensor")
LIBRARY.define("experts_q(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor index, Tensor weight, "
               "Tensor[] packed, Tensor?[] bias, str spec, ScalarType dtype) -> Tensor")


def _product(x: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    parsed = LinearSpec.parse(spec)
    torch._check(x.shape[-1] == parsed.in_features,
                 lambda: f"qpass: input has {x.shape[-1]} features, the weight takes {parsed.in_features} ({spec})")
    return x.new_empty((*x.shape[:-1], parsed.out_features), dtype=dtype)


def _linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, input_scale: Tensor | None = None,
            input_zero_point: Tensor | None = None) -> Tensor:
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


def _mixed(x: Tensor, index: Tensor, weight: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    hidden = ExpertsSpec.parse(spec).hidden
    torch._check(x.dim() == 2 and index.dim() == 2 and weight.dim() == 2,
                 lambda: f"qpass: experts take x [T, {hidden}], index and weight [T, top_k], got {tuple(x.shape)}, "
                         f"{tuple(index.shape)} and {tuple(weight.shape)}")
    torch._check(x.shape[1] == hidden, lambda: f"qpass: input has {x.shape[1]} features, experts take {hidden}")
    torch._check(index.shape[0] == x.shape[0] and weight.shape[0] == x.shape[0] and index.shape[1] == weight.shape[1],
                 lambda: f"qpass: index {tuple(index.shape)} and weight {tuple(weight.shape)} must have one row for "
                         f"each of {x.shape[0]} tokens")
    torch._check(not index.is_floating_point(), lambda: f"qpass: index must hold integers, got {index.dtype}")
    return x.new_empty((x.shape[0], hidden), dtype=dtype)


def _experts(x: Tensor, index: Tensor, weight: Tensor, packed: list[Tensor], bias: list[Tensor | None],
             spec: str) -> Tensor:
    return _mixed(x, index, weight, spec, x.dtype)


def _experts_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
               packed: list[Tensor], bias: list[Tensor | None], spec: str, dtype: torch.dtype) -> Tensor:
    return _mixed(xq, index, weight, spec, dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "linear": _linear, "linear_q": _linear_q, "linear_list": _linear_list, "linear_q_list": _linear_q_list,
    "dequantize": _dequantize, "experts": _experts, "experts_q": _experts_q}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"qpass::{_name}", _fake, lib=LIBRARY)
