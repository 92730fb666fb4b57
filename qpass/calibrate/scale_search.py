"""Scale search: a float weight in, group scales and zero points out, from the weight alone; pure mathematics.

Every method returns scales as they are stored (rounded to `dtype`, never 0) and w ~ (q - zero_point) * scale with
qmin = -2^(bits-1), qmax = 2^(bits-1) - 1. A scale may be negative: the grid qmin..qmax is longer on its negative side,
and a negative scale turns that side to where the group's largest weight is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qpass.integer_scales import BIAS_WEIGHT
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight

_ELEMENTS_AT_ONCE = 1 << 18  # a search goes over its numbers many times: they stay in the cache
_HQQ_NORM, _HQQ_BETA, _HQQ_GROWTH, _HQQ_ROUNDS = 0.7, 10.0, 1.01, 20


@dataclass(frozen=True)
class Grid:
    """Scales [N, G] and, if asymmetric, zero points [N, G], float32 with values as stored."""

    scale: Tensor
    zero_point: Tensor | None


def find_grid(weight: Tensor, spec: LinearSpec, method: str, dtype: torch.dtype,
              importance: Tensor | None = None, *, compensated: bool = False) -> Grid:
    """The grid of `weight` float32 [N, K]; `importance` [K] weighs the error of each column in the searches.

    `compensated` says that whoever rounds on the grid makes up for the errors, as GPTQ does: then what they have in
    common with the weight does not count more than the rest, and symmetric grids try more ranges.
    """
    if method == "absmax" or spec.weight.granularity == "per_tensor" or spec.weight.scales == "integer":
        plain = quantize_weight(weight, spec, dtype)
        zero = plain.zero_point
        return Grid(plain.scale.float(), None if zero is None else zero.float())
    grouped = weight.view(spec.out_features, spec.groups, -1)
    weights = None if importance is None else importance.view(1, spec.groups, -1)
    parts = [_find(rows, spec, method, dtype, weights, compensated) for rows in grouped.split(
        max(1, _ELEMENTS_AT_ONCE // spec.in_features))]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return Grid(torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None)


def _find(grouped: Tensor, spec: LinearSpec, method: str, dtype: torch.dtype, weights: Tensor | None,
          compensated: bool) -> Grid:
    qmin, qmax = grid_ends(spec)
    if method == "hqq":
        return _hqq(grouped, qmin, qmax, dtype, symmetric=spec.weight.symmetric)
    across = grouped.permute(2, 1, 0).contiguous()  # sums over a group then run over whole vectors
    full = None if weights is None else weights.permute(2, 1, 0).expand(across.shape).contiguous()
    groups = _Groups(across.flatten(1), None if full is None else full.flatten(1), compensated)
    found = (_search_symmetric(groups, qmin, qmax, dtype, signed=method == "signed") if spec.weight.symmetric else
             _search_asymmetric(groups, qmin, qmax, dtype))
    scale, zero = (None if part is None else part.view(spec.groups, -1).t().contiguous()
                   for part in (found.scale, found.zero_point))
    assert scale is not None
    return Grid(scale, zero)


def round_to_grid(weight: Tensor, grid: Grid, spec: LinearSpec, dtype: torch.dtype) -> CanonicalWeight:
    """`weight` [N, K] rounded to the nearest point of `grid`."""
    qmin, qmax = grid_ends(spec)
    q = (weight.view(spec.out_features, spec.groups, -1) / grid.scale.unsqueeze(-1)).round_()
    if grid.zero_point is not None:
        q += grid.zero_point.unsqueeze(-1)
    return canonical_of(q.clamp_(qmin, qmax).view(spec.out_features, -1), grid, dtype)


def canonical_of(codes: Tensor, grid: Grid, dtype: torch.dtype) -> CanonicalWeight:
    """Codes [N, K] of any dtype and their grid as a canonical weight."""
    tensors = {"qweight": codes.to(torch.int8), "scale": grid.scale.to(dtype)}
    if grid.zero_point is not None:
        tensors["zero_point"] = grid.zero_point.to(torch.int8)
    return CanonicalWeight(tensors)


def grid_ends(spec: LinearSpec) -> tuple[int, int]:
    """qmin and qmax."""
    return -(1 << spec.weight.bits - 1), (1 << spec.weight.bits - 1) - 1


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it will be read back, in float32: rounded to `dtype`, finite, not zero; its sign is kept."""
    info = torch.finfo(dtype)
    stored = scale.clamp(-info.max, info.max).to(dtype).float()
    return torch.where(stored == 0, torch.full_like(stored, info.tiny), stored)


@dataclass(frozen=True)
class _Groups:
    """Groups w [K/G, G n] in float32 whose errors e = rounded - w are weighed by `weights` [K/G, G n]."""

    w: Tensor
    weights: Tensor | None
    compensated: bool

    @cached_property
    def weighed(self) -> Tensor:
        return self.w if self.weights is None else self.w * self.weights

    @cached_property
    def energy(self) -> Tensor:
        return (self.weighed * self.w).sum(0).clamp_min(1e-30)

    @cached_property
    def negative(self) -> Tensor:
        return -self.w

    def error(self, q: Tensor, scale: Tensor) -> Tensor:
        """[G n]: sum of e^2, and BIAS_WEIGHT times the square of what of e points along w, for e = scale * q - w.

        Without the second term a search prefers ranges that shrink every weight a little, which costs a model more than
        errors that point anywhere; `qpass/integer_scales.py` has the numbers. Compensated errors need no such term.
        Overwrites q.
        """
        if self.compensated:
            e = torch.addcmul(self.negative, q, scale, out=q).square_()
            return (e if self.weights is None else e.mul_(self.weights)).sum(0)
        along = scale * (q * self.weighed).sum(0)
        square = q.square_() if self.weights is None else q.square_().mul_(self.weights)
        plain = scale.square() * square.sum(0) - 2 * along + self.energy
        return plain + BIAS_WEIGHT * (along - self.energy).square() / self.energy


def _search_symmetric(groups: _Groups, qmin: int, qmax: int, dtype: torch.dtype, *, signed: bool) -> Grid:
    """Try ranges around the one in which the largest weight meets the end of the grid, the longer end if `signed`."""
    w = groups.w
    amax = w.abs().amax(0)
    top = w.gather(0, w.abs().argmax(0, keepdim=True)).squeeze(0)
    toward = torch.where(top > 0, -1.0, 1.0)
    best = torch.full_like(amax, torch.inf)
    found = torch.ones_like(amax)
    end = -qmin if signed else (qmax - qmin) / 2
    tried = torch.linspace(end - 2, end + 1.75, 16) if groups.compensated else torch.linspace(end - 1, end + 0.75, 8)
    for steps in tried.tolist():
        for sign in (toward, -toward) if signed else (torch.ones_like(amax),):
            scale = storable(sign * amax / steps, dtype)
            error = groups.error((w / scale).round_().clamp_(qmin, qmax), scale)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return Grid(storable(torch.where(amax == 0, torch.finfo(dtype).eps, found), dtype), None)


def _search_asymmetric(groups: _Groups, qmin: int, qmax: int, dtype: torch.dtype) -> Grid:
    """Try ranges scaled about their middle, each with the zero points next to the exact one."""
    w = groups.w
    low, high = w.amin(0).clamp_max(0), w.amax(0).clamp_min(0)
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for part in torch.linspace(0.80, 1.04, 13).tolist():
        scale = storable(span * part / (qmax - qmin), dtype)
        middle = (qmin + qmax) / 2 - (low + high) / 2 / scale
        nearest = (w / scale).round_()
        for zero in (middle.floor(), middle.ceil()):
            zero = zero.clamp(qmin, qmax)
            error = groups.error(nearest.clamp(qmin - zero, qmax - zero), scale)
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
            zeros = torch.where(better, zero, zeros)
    return Grid(torch.where(high == low, torch.finfo(dtype).eps, scales), zeros)


def _hqq(w: Tensor, qmin: int, qmax: int, dtype: torch.dtype, *, symmetric: bool) -> Grid:
    """Half-quadratic quantization: min |e|_p + b/2 |e - (w - w_q)|^2 over e and the grid, in turns, b growing.

    The e step is the generalized soft threshold of the p-norm. The grid step fits scale and zero point (the scale
    alone if symmetric) to w - e; HQQ's own fits the zero point alone.
    """
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    if symmetric:
        top = w.gather(-1, w.abs().argmax(-1, keepdim=True))
        scale, zero = torch.where(top > 0, -1.0, 1.0) * top.abs() / -qmin, torch.zeros_like(low)
    else:
        scale = (high - low) / (qmax - qmin)
        zero = (qmin - low / scale.clamp_min(1e-30)).round().clamp(qmin, qmax)
    scale = storable(scale, dtype)
    beta, best = _HQQ_BETA, torch.full_like(low, torch.inf)
    found, zeros = scale, zero
    for _ in range(_HQQ_ROUNDS):
        q = ((w / scale).round_() + zero).clamp_(qmin, qmax) - zero
        e = w - q * scale
        cost = e.abs().pow_(_HQQ_NORM).sum(-1, keepdim=True)
        better = cost < best
        best, found, zeros = (torch.where(better, cost, best), torch.where(better, scale, found),
                              torch.where(better, zero, zeros))
        size = e.abs()
        shrunk = torch.sign(e) * (size - size.clamp_min(1e-8).pow_(_HQQ_NORM - 1) / beta).clamp_min_(0)
        aim = w - shrunk
        scale = storable((q * aim).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True).clamp_min(1e-30), dtype)
        if not symmetric:
            zero = (zero + (q - aim / scale).mean(-1, keepdim=True)).round().clamp(qmin, qmax)
        beta *= _HQQ_GROWTH
    scale = storable(torch.where(high == low, torch.finfo(dtype).eps, found).squeeze(-1), dtype)
    return Grid(scale, None if symmetric else zeros.squeeze(-1))
