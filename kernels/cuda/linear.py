"""CUDA linears: the Triton products in the table, one for each family, with what each needs of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qpass.dtype import FLOATS
from qpass.kernels.cuda.capability import needs, triton_refuses
from qpass.kernels.cuda.launch import Rows, multiply, operands
from qpass.kernels.cuda.layouts import CUDA_TILES, LARGEST_GROUP
from qpass.kernels.reference.activation import quantize_activation
from qpass.kernels.registry import LinearCall, register_kernel
from qpass.spec import LinearSpec

FLOAT_FAMILIES = ("w4a16", "w8a16", "mxfp4_w4a16", "nvfp4_w4a16", "nvfp4_mul_w4a16", "nvfp4_reciprocal_w4a16",
                  "nf4_w4a16", "fp4_w4a16", "mxfp8_w8a16", "fp8_w8a16")
INT8_FAMILIES = ("w4a8", "w8a8")
FP8_FAMILIES = ("w4afp8", "fp8_w8afp8", "mxfp4_w4afp8")
PRIORITY = 20
LEAST = {"half": 80, "int8": 80, "fp8": 89}
"""The capability from which Triton has tensor cores for a kind of product. For sm_75 Triton 3.6 compiles no int8
product at all, and others without tensor cores."""


def kind_of(family: str) -> str:
    """`half`, `int8` or `fp8`: what the tensor cores multiply for a family."""
    return "int8" if family in INT8_FAMILIES else "fp8" if family in FP8_FAMILIES else "half"


def name_of(family: str) -> str:
    """`linear_w4a16_triton`."""
    return f"linear_{family}_triton"


def refuses(call: LinearCall) -> str | None:
    """Why the programs do not take a product, or None."""
    spec = call.spec
    if (why := machine_refuses(call)) is not None:
        return why
    if call.dtype_name not in FLOATS:
        return f"takes float32, bfloat16 or float16 activations, not {call.dtype_name}"
    size, groups = spec.group_size, spec.weight.granularity in ("per_group", "per_block")
    if spec.weight.granularity == "per_block" and size != 128:
        return f"needs blocks of 128, got {size}"
    if groups and size % 32 and not (size == 16 and spec.weight.type.startswith("nvfp4")):
        return f"needs group_size % 32 == 0, got {size}"
    if groups and spec.in_features % size and spec.weight.type != "fp8":
        return f"needs whole groups of {size}, and a row has {spec.in_features} inputs"
    if size > LARGEST_GROUP:
        return f"needs at most {LARGEST_GROUP} inputs in a group, got {size}"
    return _activation_refuses(spec)


def machine_refuses(call: LinearCall) -> str | None:
    """Why a GPU lacks what the product needs, or None; without a GPU to ask, None."""
    if call.device_type == "cuda" and torch.cuda.is_available() and (why := triton_refuses()) is not None:
        return why
    kind = kind_of(call.spec.family)
    return needs(LEAST[kind], call.device, {"fp8": "float8 products"}.get(kind, "tensor cores that Triton uses"))


def _activation_refuses(spec: LinearSpec) -> str | None:
    activation = spec.activation
    if activation is None or activation.number == "int8":
        return None
    if activation.static or activation.dynamic == "local":
        return "rounds activations itself, and these have a scale given for the tensor"
    if activation.granularity == "per_tensor":
        return "rounds activations per token or group, not per tensor"
    if activation.group_size is not None:
        weight = spec.weight.group_size
        if weight is None or activation.group_size % weight:
            return f"needs groups of weights that divide those of the activation, {activation.group_size}"
        if spec.in_features % activation.group_size:
            return f"needs whole groups of {activation.group_size} activations, a token has {spec.in_features}"
    return None


def forward(x: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None], specs: Sequence[LinearSpec]
            ) -> list[Tensor]:
    """x [..., K] floating -> [..., N] of each weight, in x's dtype; rounds x first if the specs say so."""
    activation = specs[0].activation
    if activation is None:
        return _shaped(Rows(x=_two(x)), x, packed, bias, specs, x.dtype)
    codes, scale, zero_point = quantize_activation(x, activation)
    return forward_q(codes, scale, zero_point, packed, bias, specs, x.dtype)


def forward_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
              bias: Sequence[Tensor | None], specs: Sequence[LinearSpec], dtype: torch.dtype) -> list[Tensor]:
    """The same for an activation that is rounded: codes [..., K], x_scale and x_zero_point float32 [..., 1], or
    x_scale [..., K / group]."""
    scale = x_scale.reshape(-1, x_scale.shape[-1])
    zero_point = None if x_zero_point is None else x_zero_point.reshape(-1, 1)
    return _shaped(Rows(x=_two(xq), scale=scale, zero_point=zero_point), xq, packed, bias, specs, dtype)


def _two(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _shaped(rows: Rows, x: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None],
            specs: Sequence[LinearSpec], dtype: torch.dtype) -> list[Tensor]:
    made = multiply(rows, operands(packed, bias, specs), dtype)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in made]


def _native_call(op: str, args: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    specs = 5 if op.startswith("linear_q") else 3
    given = list(args[:7 if op.startswith("linear_q") else 4])  # without a static scale, which lowering has exposed
    if op.endswith("list"):
        given[specs] = "\n".join(given[specs])
    return getattr(torch.ops.qpass_cuda, op).default, tuple(given)


def _register(family: str) -> None:
    kind = kind_of(family)

    @register_kernel(name=name_of(family), scheme=family, device="cuda", isa=f"sm_{LEAST[kind]}", layout=CUDA_TILES,
                     refuses=refuses, priority=PRIORITY, native_call=_native_call, prepare=triton_refuses)
    def linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        return forward(x, packed, [bias], [spec])[0]

    @linear.form("linear_list")
    def linear_list(x: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None], specs: Sequence[LinearSpec]
                    ) -> list[Tensor]:
        return forward(x, packed, bias, specs)

    if kind == "half":
        return

    @linear.form("linear_q")
    def linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                 bias: Tensor | None, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        return forward_q(xq, x_scale, x_zero_point, packed, [bias], [spec], dtype)[0]

    @linear.form("linear_q_list")
    def linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                      bias: Sequence[Tensor | None], specs: Sequence[LinearSpec], dtype: torch.dtype) -> list[Tensor]:
        return forward_q(xq, x_scale, x_zero_point, packed, bias, specs, dtype)


for _family in (*FLOAT_FAMILIES, *INT8_FAMILIES, *FP8_FAMILIES):
    _register(_family)
