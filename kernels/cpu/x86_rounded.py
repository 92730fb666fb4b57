"""x86 rounded: kernels for `exact` specs in the table: what an activation is rounded to, multiplied in float32.

On machines that cannot multiply fp8 or fp4 this gives the numbers of those that can, at the price of the rounding,
which is written in plain torch; the product is that of csrc/decoded.h.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qpass.kernels.cpu import native
from qpass.kernels.cpu.x86_codes import FAMILIES
from qpass.kernels.cpu.x86_decoded import ISAS, X86_DECODED, arguments, refuses
from qpass.kernels.cpu.x86_ops import OPS
from qpass.kernels.reference.activation import cannot_round, rounded
from qpass.kernels.registry import LinearCall, register_kernel
from qpass.spec import LinearSpec

_FLOATS = tuple(family.removesuffix("16") + number for family in FAMILIES for number in ("fp8", "fp4"))


def _refuses(call: LinearCall) -> str | None:
    if not call.spec.exact:
        return "rounds the activation in plain torch and multiplies in float32, for exact=True"
    assert call.spec.activation is not None
    return cannot_round(call.spec.activation, call.spec.in_features) or refuses(call)


def _register(short: str) -> None:
    isa, priority = ISAS[short]
    index = native.ISA_INDEX[isa]

    @register_kernel(name=f"linear_round_{short}", scheme=_FLOATS, device="cpu", isa=isa, layout=X86_DECODED,
                     refuses=_refuses, priority=priority, prepare=native.prepare)
    def linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
        assert spec.activation is not None
        native.library()
        y: Tensor = OPS.decoded.default(rounded(x, spec.activation), *arguments(packed, bias, spec), index)
        return y.to(x.dtype)


for _short in ISAS:
    _register(_short)
