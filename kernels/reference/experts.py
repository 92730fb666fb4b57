"""experts_reference: each token through its experts, weighted and added, in plain torch; the meaning of qpass::experts.

x [T, H], index int [T, k], weight floating [T, k]; for each token t and each place j with e = index[t, j]

    a = the activation of the first weight, quantized once per token and shared by the token's experts
    y = a @ up[e].T + up_bias[e]         float32
    h = gate(y)                          float32, see experts_spec.Gate
    z = quantize(h) @ down[e].T + down_bias[e]
    result[t] = weight[t, 0] * z_0 + weight[t, 1] * z_1 + ...    in float32, in this order, then in x's dtype

An index outside 0 .. E-1 (expert parallelism gives E for an expert that lives elsewhere) adds nothing, whatever its
weight. Nothing is rounded to x's dtype in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.experts_spec import ExpertsSpec, Gate
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.kernels.registry import ExpertsCall, kernel, register_kernel
from qpass.spec import LinearSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """An activation as integers: codes int8 [T, K], scale float32 [T, 1], zero point float32 [T, 1] or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def rows(self, which: Tensor) -> Codes:
        return Codes(codes=self.codes[which], scale=self.scale[which],
                     zero_point=None if self.zero_point is None else self.zero_point[which])


def part_names(spec: ExpertsSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the packed tensors of the first weight and of the second, in the order in which ops get them."""
    up, down = (("weight",) if part is None else kernel(part.kernel).layout.names(part) for part in spec.parts)
    return up, down


def apply_gate(y: Tensor, gate: Gate) -> Tensor:
    """y float [..., 2I] (or [..., I] if not gated) -> h [..., I]."""
    if not gate.gated:
        return _function(y if gate.limit is None else y.clamp(max=gate.limit), gate)
    g, u = y.chunk(2, dim=-1)
    if gate.limit is not None:
        g = g.clamp(max=gate.limit)
    if gate.up_limit is not None:
        u = u.clamp(-gate.up_limit, gate.up_limit)
    return _function(g, gate) * (u + gate.shift if gate.shift else u)


def _function(g: Tensor, gate: Gate) -> Tensor:
    name = gate.function
    if name == "silu":
        return F.silu(g) if gate.alpha == 1.0 else g * torch.sigmoid(g * gate.alpha)
    if name == "gelu" or name == "gelu_tanh":
        return F.gelu(g, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "relu2":
        return torch.relu(g).square()
    return g if name == "identity" else {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[name](g)


def quantize_for(x: Tensor, part: LinearSpec | None) -> Codes | None:
    """`x` as the first weight wants it; None if it is not quantized."""
    if part is None or part.activation is None:
        return None
    if part.activation.symmetric:
        codes, scale = quantize_symmetric(x)
        return Codes(codes=codes, scale=scale, zero_point=None)
    codes, scale, zero_point = quantize_asymmetric(x)
    return Codes(codes=codes, scale=scale, zero_point=zero_point)


def rounded(x: Tensor, part: LinearSpec | None) -> Tensor:
    """x float32 [R, K] rounded as `part` asks and multiplied out again, float32 [R, K]."""
    codes = quantize_for(x, part)
    if codes is None:
        return x
    q = codes.codes.float()
    return (q if codes.zero_point is None else q - codes.zero_point) * codes.scale


def mix(x: Tensor | Codes, index: Tensor, weight: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None],
        spec: ExpertsSpec, dtype: torch.dtype) -> Tensor:
    """The formula above, expert by expert, only those that were chosen, each on the linear kernel its part names."""
    tokens, places = index.shape
    count = len(part_names(spec)[0])
    up, down = packed[:count], packed[count:]
    flat = index.reshape(-1)
    known = (flat >= 0) & (flat < spec.experts)
    chosen = torch.where(known, flat, spec.experts)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=spec.experts + 1).tolist()
    each = torch.zeros(flat.shape[0], spec.hidden, dtype=torch.float32, device=index.device)
    start = 0
    for expert, size in enumerate(counts[:spec.experts]):
        if size == 0:
            continue
        rows = order[start:start + size]
        start += size
        token = rows.div(places, rounding_mode="floor")
        given = x.rows(token) if isinstance(x, Codes) else x[token].float()
        y = _product(given, [t[expert] for t in up], _of(bias[0], expert), spec.up)
        h = apply_gate(y, spec.gate)
        each[rows] = _product(h, [t[expert] for t in down], _of(bias[1], expert), spec.down)
    # A weight of NaN at a place that counts for nothing must not come through.
    w = torch.where(known, weight.reshape(-1).float(), 0.0).view(tokens, places, 1)
    terms = each.view(tokens, places, spec.hidden) * w
    total = torch.zeros(tokens, spec.hidden, dtype=torch.float32, device=index.device)
    for j in range(places):
        total = total + terms[:, j]
    return total.to(dtype)


def _of(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _product(x: Tensor | Codes, packed: Sequence[Tensor], bias: Tensor | None, part: LinearSpec | None) -> Tensor:
    """x float32 or integers [R, K] -> float32 [R, N]."""
    if isinstance(x, Codes):
        assert part is not None
        form = kernel(part.kernel).forms["linear_q"]
        return form(x.codes, x.scale, x.zero_point, packed, bias, part, torch.float32)  # type: ignore[no-any-return]
    if part is not None:
        return kernel(part.kernel).forms["linear"](x, packed, bias, part)  # type: ignore[no-any-return]
    return F.linear(x, packed[0].float(), None if bias is None else bias.float())


def refuses_activation(call: ExpertsCall) -> str | None:
    """A sentence for activations that the definition above does not know; parts may be of any weight."""
    for part in call.spec.parts:
        if part is not None and part.activation is not None and not _known(part.activation):
            return "rounds the activations of experts to int8, dynamic, per token, not otherwise"
    return None


def _known(activation: ActivationArgs) -> bool:
    return (activation.bits, activation.type, activation.granularity, activation.dynamic) == (8, "int", "per_token",
                                                                                            True)


def _refuses(call: ExpertsCall) -> str | None:
    if (why := refuses_activation(call)) is not None:
        return why
    odd = [part for part in call.spec.parts if part is not None and part.kernel not in ("", "linear_reference")]
    return f"multiplies with linear_reference, and these are packed for {odd[0].kernel}" if odd else None


@register_kernel(op="experts", scheme="*", device="*", priority=0, linear="linear_reference", refuses=_refuses)
def experts_reference(x: Tensor, index: Tensor, weight: Tensor, packed: Sequence[Tensor],
                      bias: Sequence[Tensor | None], spec: ExpertsSpec) -> Tensor:
    """x [T, H] floating -> [T, H] in x's dtype."""
    return mix(quantize_for(x, spec.up) or x, index, weight, packed, bias, spec, x.dtype)


@experts_reference.form("experts_q")
def experts_q_reference(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
                        packed: Sequence[Tensor], bias: Sequence[Tensor | None], spec: ExpertsSpec,
                        dtype: torch.dtype) -> Tensor:
    """xq int8 [T, H], x_scale float32 [T, 1], x_zero_point float32 [T, 1] or None -> [T, H] in `dtype`."""
    return mix(Codes(codes=xq, scale=x_scale, zero_point=x_zero_point), index, weight, packed, bias, spec, dtype)
