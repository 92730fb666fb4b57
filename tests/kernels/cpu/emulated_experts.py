"""Emulated experts: a layer of experts through csrc/experts.cpp on the emulated instruction sets, and in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.experts_spec import GATE_FUNCTIONS, Gate
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.kernels.reference.experts import apply_gate
from tests.kernels.cpu.emulated_kernels import DTYPES, Weight, make_weight, pointer

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CGate(ctypes.Structure):
    _fields_ = [("function", _INT), ("gated", _INT), ("alpha", _FLOAT), ("limit", _FLOAT), ("up_limit", _FLOAT),
                ("shift", _FLOAT)]


class CTokens(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("x", "codes", "scale", "zero_point", "index", "weight", "out")] + [
        ("T", _LONG), ("places", _LONG), ("x_dtype", _INT), ("out_dtype", _INT)]


class CBlocks(ctypes.Structure):
    """qp_weight of csrc/abi.h."""

    _fields_ = [(name, _POINTER) for name in ("q", "scale", "zero_point", "colsum", "bias", "out")] + [
        (f"{name}_bytes", _LONG) for name in ("q", "scale", "zero_point", "colsum", "bias", "out")] + [
        (name, _LONG) for name in ("N", "groups", "out_stride")] + [
        (name, _INT) for name in ("bits", "scale_dtype", "bias_dtype", "out_dtype")]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights [experts], biases or None, the gate, and how activations are rounded: None, or whether symmetric."""

    up: Sequence[Weight]
    down: Sequence[Weight]
    gate: Gate
    bias: tuple[Tensor | None, Tensor | None]
    symmetric: bool | None


def make_layer(experts: int, hidden: int, inner: int, group: int | None, bits: int, symmetric: bool | None,
               scale: Callable[[Tensor], Tensor], gate: Gate, biased: bool = False, *, w_symmetric: bool = True
               ) -> Layer:
    rows = inner * (2 if gate.gated else 1)
    up = [make_weight(rows, hidden, group, bits, w_symmetric, scale) for _ in range(experts)]
    down = [make_weight(hidden, inner, group, bits, w_symmetric, scale) for _ in range(experts)]
    bias = (torch.randn(experts, rows), torch.randn(experts, hidden)) if biased else (None, None)
    return Layer(up=up, down=down, gate=gate, bias=bias, symmetric=symmetric)


def run_experts(library: ctypes.CDLL, isa: int, layer: Layer, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    gate, kept = layer.gate, []
    hidden, inner = layer.down[0].q.shape
    out = torch.full((len(x), hidden), 77.0)
    c_gate = CGate(GATE_FUNCTIONS.index(gate.function), gate.gated, gate.alpha,
                   float("inf") if gate.limit is None else gate.limit,
                   float("inf") if gate.up_limit is None else gate.up_limit, gate.shift)
    tokens = CTokens(x=x.data_ptr(), index=index.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), T=len(x),
                     places=index.shape[1], x_dtype=DTYPES[x.dtype], out_dtype=0)
    parts = [_blocks(weights, bias, kept) for weights, bias in zip((layer.up, layer.down), layer.bias, strict=True)]
    activation = 0 if layer.symmetric is None else 1 if layer.symmetric else 2
    assert library.qp_experts(isa, ctypes.byref(tokens), _LONG(len(layer.up)), _LONG(hidden), _LONG(inner),
                              ctypes.byref(c_gate), ctypes.byref(parts[0]), activation, ctypes.byref(parts[1]),
                              activation, 1) == 0
    assert library.emulated_tiles_configured() == 0
    return out


def _blocks(weights: Sequence[Weight], bias: Tensor | None, kept: list[Tensor]) -> CBlocks:
    first = weights[0]
    made = CBlocks(N=first.q.shape[0], groups=first.c.groups, bits=first.bits, scale_dtype=DTYPES[first.scale.dtype],
                   bias_dtype=0 if bias is None else DTYPES[bias.dtype])
    stacked = [None if one is None else torch.stack([w.packed[i] for w in weights])  # type: ignore[misc]
               for i, one in enumerate(first.packed)]
    for name, tensor in zip(("q", "scale", "zero_point", "colsum", "bias"), (*stacked, bias), strict=True):
        if tensor is not None:
            kept.append(tensor)
            setattr(made, name, pointer(tensor))
            setattr(made, f"{name}_bytes", tensor.nbytes)
    return made


def exact_experts(layer: Layer, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The definition in float64, pair by pair."""
    y = torch.zeros(len(x), layer.down[0].q.shape[0], dtype=torch.float64)
    for t in range(len(x)):
        for j, expert in enumerate(index[t].tolist()):
            if 0 <= expert < len(layer.up):
                z = _product(layer, x[t, None], layer.up[expert], layer.bias[0], expert)
                h = apply_gate(z, layer.gate).float()
                y[t] += weight[t, j].double() * _product(layer, h, layer.down[expert], layer.bias[1], expert)[0]
    return y


def _product(layer: Layer, x: Tensor, w: Weight, bias: Tensor | None, expert: int) -> Tensor:
    if layer.symmetric is None:
        real = x.double()
    elif layer.symmetric:
        codes, scale = quantize_symmetric(x)
        real = codes.double() * scale.double()
    else:
        codes, scale, zero_point = quantize_asymmetric(x)
        real = (codes.double() - zero_point.double()) * scale.double()
    y = real @ w.dense.t()
    return y if bias is None else y + bias[expert].double()
