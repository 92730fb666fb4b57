"""x86 experts: the native kernels for whole layers of experts in the table, one for each family and instruction set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.experts_spec import GATE_FUNCTIONS, ExpertsSpec
from qpass.kernels.cpu import native
from qpass.kernels.cpu.x86 import FAMILIES, ISAS, X86_TILE64
from qpass.kernels.registry import ExpertsCall, kernel, register_kernel
from qpass.spec import LinearSpec

_ZERO_POINT, _COLSUM, _BIAS = 1, 2, 4
_GATED, _LIMIT, _UP_LIMIT = 1, 2, 4


def _refuses(call: ExpertsCall) -> str | None:
    for part in call.spec.parts:
        if part is None:
            return "needs both weights quantized"
        if part.kernel and part.kernel != "linear_reference" and kernel(part.kernel).layout is not X86_TILE64:
            return f"reads weights in layout x86_tile64, and these are packed for {part.kernel}"
        if part.activation is not None and part.activation != ActivationArgs(symmetric=part.activation.symmetric):
            return f"rounds activations once per token, not as {part} asks"
    for one in call.parts():
        like = kernel(f"linear_{one.spec.family}_plain")
        if (why := like.refuses(one)) is not None:
            return why
    return None


def _activation(part: LinearSpec) -> int:
    return 0 if part.activation is None else 1 if part.activation.symmetric else 2


def _arguments(packed: Sequence[Any], bias: Sequence[Any], spec: ExpertsSpec) -> tuple[Any, ...]:
    """The arguments of the native ops from `tensors` to `down_activation`; tensors may stand as fx nodes."""
    tensors: list[Any] = []
    has, start = [], 0
    for part, b in zip(spec.parts, bias, strict=True):
        assert part is not None
        names = X86_TILE64.names(part)
        tensors += [*packed[start:start + len(names)], *([] if b is None else [b])]
        start += len(names)
        has.append(_ZERO_POINT * ("zero_point" in names) + _COLSUM * ("colsum" in names) + _BIAS * (b is not None))
    gate, (up, down) = spec.gate, spec.parts
    assert up is not None and down is not None
    options = _GATED * gate.gated + _LIMIT * (gate.limit is not None) + _UP_LIMIT * (gate.up_limit is not None)
    sizes = [spec.experts, spec.hidden, spec.intermediate, up.weight.bits, down.weight.bits,
             GATE_FUNCTIONS.index(gate.function), options]
    return (tensors, has, sizes, float(gate.alpha), float(gate.limit or 0), float(gate.up_limit or 0),
            float(gate.shift), _activation(down))


def _native_call(isa: int) -> Callable[[str, Sequence[Any]], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Arguments of a `qpass` op to those of the `qpass_x86` op that runs on instruction set `isa`."""

    def call(op: str, args: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        native.library()
        quantized = op == "experts_q"
        count = 5 if quantized else 3
        packed, bias, text = args[count:count + 3]
        spec = ExpertsSpec.parse(text)
        assert spec.up is not None
        last = args[count + 3] if quantized else _activation(spec.up)
        return native.op(op), (*args[:count], *_arguments(packed, bias, spec), last, isa)

    return call


def _register(family: str, short: str) -> None:
    isa, priority = ISAS[short]
    number = native.ISA_INDEX[isa]
    options: dict[str, Any] = {"op": "experts", "scheme": family, "device": "cpu", "isa": isa, "priority": priority,
                               "linear": f"linear_{family}_{short}", "refuses": _refuses, "prepare": native.prepare,
                               "native_call": _native_call(number)}

    @register_kernel(name=f"experts_{family}_{short}", **options)
    def experts(x: Tensor, index: Tensor, weight: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None],
                spec: ExpertsSpec) -> Tensor:
        assert spec.up is not None
        return native.op("experts")(x, index, weight, *_arguments(packed, bias, spec),  # type: ignore[no-any-return]
                                   _activation(spec.up), number)

    if not family.endswith("a8"):
        return

    @experts.form("experts_q")
    def experts_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
                  packed: Sequence[Tensor], bias: Sequence[Tensor | None], spec: ExpertsSpec,
                  dtype: torch.dtype) -> Tensor:
        return native.op("experts_q")(xq, x_scale, x_zero_point, index, weight,  # type: ignore[no-any-return]
                                     *_arguments(packed, bias, spec), dtype, number)


for _family in FAMILIES:
    for _short in ISAS:
        _register(_family, _short)
