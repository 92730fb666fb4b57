"""x86 rounded: kernels that multiply rounded activations in float32, where no native product has their types.

`linear_round_*`, for `exact` specs: on machines that cannot multiply fp8 or fp4, the numbers of those that can, at the
price of the rounding, which is written in plain torch. `linear_codes_*`: int8 activations with integer weights of
widths that x86_tile64 does not pack; codes are integers, whose sums over a group float32 holds exactly up to 2^24,
which groups of 512 do not reach, and beyond it rounds. The product of both is that of csrc/decoded.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qpass.kernels.cpu import native
from qpass.kernels.cpu.x86_codes import FAMILIES
from qpass.kernels.cpu.x86_decoded import ISAS, X86_DECODED, arguments, refuses
from qpass.kernels.reference.activation import cannot_round, quantize_activation, rounded
from qpass.kernels.registry import LinearCall, register_kernel
from qpass.spec import LinearSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FLOATS = tuple(family.removesuffix("16") + number for family in FAMILIES for number in ("fp8", "fp4"))
_INTEGERS = tuple(f"w{bits}a8" for bits in (2, 3, 5, 6, 7))


def _refuses_float(call: LinearCall) -> str | None:
    if not call.spec.exact:
        return "rounds the activation in plain torch and multiplies in float32, for exact=True"
    assert call.spec.activation is not None
    return cannot_round(call.spec.activation, call.spec.in_features) or refuses(call)


def _refuses_integer(call: LinearCall) -> str | None:
    if call.spec.weight.type != "int":
        return f"computes integer weights, not {call.spec.weight.type}"
    return refuses(call)


def _register(short: str) -> None:
    isa, priority = ISAS[short]
    index = native.ISA_INDEX[isa]

    def product(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        native.library()
        y: Tensor = native.op("decoded")(x, *arguments(packed, bias, spec), index)
        return y

    @register_kernel(name=f"linear_round_{short}", scheme=_FLOATS, device="cpu", isa=isa, layout=X86_DECODED,
                     refuses=_refuses_float, priority=priority, prepare=native.prepare)
    def linear_round(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        assert spec.activation is not None
        return product(rounded(x, spec.activation), packed, bias, spec).to(x.dtype)

    @register_kernel(name=f"linear_codes_{short}", scheme=_INTEGERS, device="cpu", isa=isa, layout=X86_DECODED,
                     refuses=_refuses_integer, priority=priority, prepare=native.prepare)
    def linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        assert spec.activation is not None
        return linear_q(*quantize_activation(x, spec.activation), packed, bias, spec, x.dtype)

    @linear.form("linear_q")
    def linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: Sequence[Tensor],
                 bias: Tensor | None, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        codes = xq.float() if x_zero_point is None else xq.float() - x_zero_point
        y = product(codes, packed, None, spec) * x_scale
        return (y if bias is None else y + bias.float()).to(dtype)


for _short in ISAS:
    _register(_short)
