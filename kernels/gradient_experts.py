"""Gradient of experts: what `qpass::experts` passes back to its input, routing weights and biases.

Rounding counts as the identity (straight through), weights are as quantized and do not learn. With y, h and z as in
kernels/reference/experts.py, computed again from the rounded input, and e = index[t, j]:

    grad_weight[t, j] = sum(grad[t] * z)
    grad_h = weight[t, j] * grad[t] @ down[e],   grad_y = grad_h through the gate,   grad_x[t] += grad_y @ up[e]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.experts_spec import ExpertsSpec
from qpass.kernels.experts_choice import unpack_block
from qpass.kernels.reference.experts import apply_gate, part_names, rounded
from qpass.ops import LIBRARY
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight

LIBRARY.define("experts_backward(Tensor grad, Tensor x, Tensor index, Tensor weight, Tensor[] packed, Tensor?[] bias, "
               "str spec) -> (Tensor, Tensor, Tensor, Tensor)")
_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def both_or_none(bias: list[Tensor | None], spec: ExpertsSpec) -> list[Tensor | None]:
    """The two biases of a call that is to be differentiated: zeros for one that is missing beside one that is not.

    For torch passes no gradient to the tensors in a list that holds None as well.
    """
    there = [b for b in bias if b is not None]
    sizes = (spec.experts, spec.up_features), (spec.experts, spec.hidden)
    return [there[0].new_zeros(size) if b is None and there else b for b, size in zip(bias, sizes, strict=True)]


def _empty(x: Tensor, weight: Tensor, spec: ExpertsSpec) -> _Four:
    """Of the input [T, H], the routing weights [T, k], and the two biases [E, N]; float32."""
    sizes = (x.shape, weight.shape, (spec.experts, spec.up_features), (spec.experts, spec.hidden))
    return tuple(x.new_zeros(size, dtype=torch.float32) for size in sizes)  # type: ignore[return-value]


def _experts_backward(grad: Tensor, x: Tensor, index: Tensor, weight: Tensor, packed: list[Tensor],
                      bias: list[Tensor | None], spec: str) -> _Four:
    parsed = ExpertsSpec.parse(spec)
    grad_x, grad_weight, grad_first, grad_second = found = _empty(x, weight, parsed)
    count = len(part_names(parsed)[0])
    wide = rounded(x.float(), parsed.up)
    known = index[(index >= 0) & (index < parsed.experts)]
    for expert in known.unique().tolist():
        token, place = (index == expert).nonzero(as_tuple=True)
        up = _float(packed[:count], parsed.up, expert)
        down = _float(packed[count:], parsed.down, expert)
        y = wide[token] @ up.t()
        if (first := bias[0]) is not None:
            y = y + first[expert].float()
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            h = apply_gate(leaf, parsed.gate)
        z = rounded(h.detach(), parsed.down) @ down.t()
        if (second := bias[1]) is not None:
            z = z + second[expert].float()
        grad_weight[token, place] = (grad[token].float() * z).sum(-1)
        grad_z = grad[token].float() * weight[token, place, None].float()
        grad_y, = torch.autograd.grad(h, leaf, grad_z @ down)
        grad_x.index_add_(0, token, grad_y @ up)
        grad_first[expert], grad_second[expert] = grad_y.sum(0), grad_z.sum(0)
    return found


def _float(packed: list[Tensor], part: LinearSpec | None, expert: int) -> Tensor:
    """One expert's weight [N, K] in float32."""
    if part is None:
        return packed[0][expert].float()
    return dequantize_weight(unpack_block(packed, part, expert), part, torch.float32)


@torch.library.register_fake("qpass::experts_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(grad: Tensor, x: Tensor, index: Tensor, weight: Tensor, packed: list[Tensor], bias: list[Tensor | None],
          spec: str) -> _Four:
    return _empty(x, weight, ExpertsSpec.parse(spec))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, weight, packed, bias, spec = inputs
    ctx.spec, ctx.count = spec, len(packed)
    ctx.biased = [b is not None for b in bias]
    ctx.save_for_backward(x, index, weight, *packed, *(b for b in bias if b is not None))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, index, weight, *rest = ctx.saved_tensors
    packed, given = rest[:ctx.count], iter(rest[ctx.count:])
    bias = [next(given) if there else None for there in ctx.biased]
    grad_x, grad_weight, *grad_bias = torch.ops.qpass.experts_backward(grad, x, index, weight, packed, bias, ctx.spec)
    # torch takes a list for tensors if all in it are, and anything else for one argument, whose gradient is None.
    of_bias = ([g.to(b.dtype) for b, g in zip(bias, grad_bias, strict=True) if b is not None]
               if all(ctx.biased) else None)
    return grad_x.to(x.dtype), None, grad_weight.to(weight.dtype), [None] * ctx.count, of_bias, None


LIBRARY.impl("experts_backward", _experts_backward, "CompositeExplicitAutograd")
torch.library.register_autograd("qpass::experts", _backward, setup_context=_setup, lib=LIBRARY)
