"""CUDA ops: the products as ops of namespace qpass_cuda, whose Triton programs torch.compile sees and may fuse around.

They have the schemas of the `qpass` ops of the same name; the specs of a list are one text, a line each. They are what
torch.library.triton_op makes of a function, an op that functionalization replaces by the function's own lines, written
out because triton_op imports Triton when it is called, and an op must be known before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from qpass.kernels.cuda.linear import forward, forward_q
from qpass.spec import LinearSpec

LIBRARY = torch.library.Library("qpass_cuda", "DEF")
OPS = torch.ops.qpass_cuda
_CODES = "Tensor xq, Tensor x_scale, Tensor? x_zero_point"
_SCHEMAS = {
    "linear": "(Tensor x, Tensor[] packed, Tensor? bias, str spec) -> Tensor",
    "linear_q": f"({_CODES}, Tensor[] packed, Tensor? bias, str spec, ScalarType dtype) -> Tensor",
    "linear_list": "(Tensor x, Tensor[] packed, Tensor?[] bias, str specs) -> Tensor[]",
    "linear_q_list": f"({_CODES}, Tensor[] packed, Tensor?[] bias, str specs, ScalarType dtype) -> Tensor[]",
}


def _parsed(specs: str) -> list[LinearSpec]:
    return [LinearSpec.parse(spec) for spec in specs.split("\n")]


def linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """x [..., K] floating -> [..., N]."""
    return forward(x, packed, [bias], _parsed(spec))[0]


def linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor], bias: Tensor | None,
             spec: str, dtype: torch.dtype) -> Tensor:
    """xq codes [..., K] -> [..., N] in `dtype`."""
    return forward_q(xq, x_scale, x_zero_point, packed, [bias], _parsed(spec), dtype)[0]


def linear_list(x: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None], specs: str) -> list[Tensor]:
    """x [..., K] floating -> [..., N] of each weight."""
    return forward(x, packed, bias, _parsed(specs))


def linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                  bias: Sequence[Tensor | None], specs: str, dtype: torch.dtype) -> list[Tensor]:
    """xq codes [..., K] -> [..., N] of each weight in `dtype`."""
    return forward_q(xq, x_scale, x_zero_point, packed, bias, _parsed(specs), dtype)


FUNCTIONS: dict[str, Callable[..., Any]] = {"linear": linear, "linear_q": linear_q, "linear_list": linear_list,
                                            "linear_q_list": linear_q_list}


def _shapes(name: str) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        specs = _parsed(args[3] if not name.startswith("linear_q") else args[5])
        dtype = args[-1] if name.startswith("linear_q") else args[0].dtype
        made = [args[0].new_empty((*args[0].shape[:-1], spec.out_features), dtype=dtype) for spec in specs]
        return made if name.endswith("list") else made[0]

    return fake


def _seen(fn: Callable[..., Any]) -> Callable[..., Any]:
    def decomposed(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        with mode:
            return fn(*args, **kwargs)

    return decomposed


for _name, _fn in FUNCTIONS.items():
    LIBRARY.define(_name + _SCHEMAS[_name])
    LIBRARY.impl(_name, _fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpass_cuda::{_name}", _shapes(_name), lib=LIBRARY)
    torch.library.register_torch_dispatch(f"qpass_cuda::{_name}", FunctionalTensorMode, _seen(_fn), lib=LIBRARY)
