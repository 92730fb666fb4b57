"""x86 experts: the native kernels for whole layers of experts in the table, one for each family and instruction set."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.experts_spec import ExpertsSpec, Gate
from qpass.kernels.cpu import native
from qpass.kernels.cpu.x86 import FAMILIES, ISAS, X86_TILE64
from qpass.kernels.registry import ExpertsCall, kernel, register_kernel
from qpass.spec import LinearSpec

_FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity")  # GateFunction, experts.h
_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Gate(ctypes.Structure):
    _fields_ = [("function", _I32), ("gated", _I32), ("alpha", _F32), ("limit", _F32), ("up_limit", _F32),
                ("shift", _F32)]


class _Tokens(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("x", "codes", "scale", "zero_point", "index", "weight", "out")] + [
        ("T", _I64), ("places", _I64), ("x_dtype", _I32), ("out_dtype", _I32)]


class _Weight(ctypes.Structure):  # qp_weight of csrc/abi.h
    _fields_ = [(name, _POINTER) for name in ("q", "scale", "zero_point", "colsum", "bias", "out")] + [
        (f"{name}_bytes", _I64) for name in ("q", "scale", "zero_point", "colsum", "bias", "out")] + [
        ("N", _I64), ("groups", _I64), ("bits", _I32), ("scale_dtype", _I32), ("bias_dtype", _I32),
        ("out_dtype", _I32)]


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


def _gate(gate: Gate) -> _Gate:
    return _Gate(_FUNCTIONS.index(gate.function), gate.gated, gate.alpha,
                 math.inf if gate.limit is None else gate.limit,
                 math.inf if gate.up_limit is None else gate.up_limit, gate.shift)


def _weight(packed: Sequence[Tensor], bias: Tensor | None, part: LinearSpec, keep: list[Tensor]) -> _Weight:
    """The C description of one weight of all experts; what had to be copied for it is kept alive in `keep`."""
    named: dict[str, Tensor] = dict(zip(X86_TILE64.names(part), packed, strict=True))
    dtypes = {"qweight": torch.uint8, "scale": named["scale"].dtype, "zero_point": torch.int8, "colsum": torch.float32}
    if bias is not None:
        named["bias"], dtypes["bias"] = bias, bias.dtype
    made = _Weight(N=part.out_features, groups=named["scale"].shape[2], bits=part.weight.bits,
                   scale_dtype=native.DTYPE_INDEX[named["scale"].dtype],
                   bias_dtype=0 if bias is None else native.DTYPE_INDEX[bias.dtype])
    for name, tensor in named.items():
        if tensor.dtype != dtypes[name] or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be {dtypes[name]} on the CPU, got {tensor.dtype} on {tensor.device}")
        tensor = tensor.contiguous()
        keep.append(tensor)
        field = "q" if name == "qweight" else name
        setattr(made, field, tensor.data_ptr())
        setattr(made, f"{field}_bytes", tensor.nbytes)
    return made


def _activation(part: LinearSpec) -> int:
    return 0 if part.activation is None else 1 if part.activation.symmetric else 2


def _run(isa: int, tokens: dict[str, Tensor | None], index: Tensor, weight: Tensor, packed: Sequence[Tensor],
         bias: Sequence[Tensor | None], spec: ExpertsSpec, dtype: torch.dtype) -> Tensor:
    up, down = spec.up, spec.down
    assert up is not None and down is not None
    library = native.library()
    some = next(t for t in tokens.values() if t is not None)
    out = torch.empty(some.shape[0], spec.hidden, dtype=dtype)
    if some.shape[1] != spec.hidden or index.shape != weight.shape or index.shape[0] != some.shape[0]:
        raise ValueError(f"experts take x [T, {spec.hidden}], index and weight [T, top_k], got {tuple(some.shape)}, "
                         f"{tuple(index.shape)} and {tuple(weight.shape)}")
    given: dict[str, Tensor] = {name: t.contiguous() for name, t in tokens.items() if t is not None}
    given |= {"index": index.to(torch.int64).contiguous(), "weight": weight.float().contiguous(), "out": out}
    if any(t.device.type != "cpu" for t in given.values()):
        raise ValueError("the native kernels of experts take tensors on the CPU")
    made = _Tokens(T=some.shape[0], places=index.shape[1], out_dtype=native.DTYPE_INDEX[dtype],
                   x_dtype=native.DTYPE_INDEX.get(some.dtype, 0), **{name: t.data_ptr() for name, t in given.items()})
    count = len(X86_TILE64.names(up))
    keep: list[Tensor] = []
    gate = _gate(spec.gate)
    parts = [_weight(packed[:count], bias[0], up, keep), _weight(packed[count:], bias[1], down, keep)]
    native.succeed(library.qp_experts(
        isa, ctypes.byref(made), spec.experts, spec.hidden, spec.intermediate, ctypes.byref(gate),
        ctypes.byref(parts[0]), _activation(up), ctypes.byref(parts[1]), _activation(down), torch.get_num_threads()))
    return out


def _register(family: str, short: str) -> None:
    isa, priority = ISAS[short]
    number = native.ISA_INDEX[isa]
    options: dict[str, Any] = {"op": "experts", "scheme": family, "device": "cpu", "isa": isa, "priority": priority,
                               "linear": f"linear_{family}_{short}", "refuses": _refuses, "prepare": native.prepare}

    @register_kernel(name=f"experts_{family}_{short}", **options)
    def experts(x: Tensor, index: Tensor, weight: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None],
                spec: ExpertsSpec) -> Tensor:
        return _run(number, {"x": x}, index, weight, packed, bias, spec, x.dtype)

    if not family.endswith("a8"):
        return

    @experts.form("experts_q")
    def experts_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
                  packed: Sequence[Tensor], bias: Sequence[Tensor | None], spec: ExpertsSpec,
                  dtype: torch.dtype) -> Tensor:
        if xq.dtype != torch.int8 or x_scale.dtype != torch.float32 or x_scale.numel() != xq.shape[0]:
            raise ValueError("xq must be int8 [T, H] and x_scale float32 [T, 1]")
        if x_zero_point is not None and (x_zero_point.dtype != torch.float32 or x_zero_point.numel() != xq.shape[0]):
            raise ValueError("x_zero_point must be float32 [T, 1]")
        return _run(number, {"codes": xq, "scale": x_scale, "zero_point": x_zero_point}, index, weight, packed, bias,
                    spec, dtype)


for _family in FAMILIES:
    for _short in ISAS:
        _register(_family, _short)
