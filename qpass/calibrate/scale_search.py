"""Scale search: a float weight in, group scales and zero points out, from the weight alone; pure mathematics.

Every method returns scales as they are stored (rounded to `dtype`, never 0) and w ~ (q - zero_point) * scale with
qmin = -2^(bits-1), qmax = 2^(bits-1) - 1; a scale may be negative. Ranges are searched by
`kernels/reference/range_search.py`, or faster where there is a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.kernels.range_search import search_ranges
from qpass.kernels.reference.range_search import RangeSearch, storable
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight

_ELEMENTS_AT_ONCE = 1 << 18  # the solver goes over its numbers many times: they stay in the cache
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
    if method == "hqq":
        parts = [_hqq(rows, *grid_ends(spec), dtype, symmetric=spec.weight.symmetric) for rows in grouped.split(
            max(1, _ELEMENTS_AT_ONCE // spec.in_features))]
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        return Grid(torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None)
    search = RangeSearch(bits=spec.weight.bits, symmetric=spec.weight.symmetric, signed=method == "signed",
                         compensated=compensated, dtype=dtype)
    return Grid(*search_ranges(grouped, None if importance is None else importance.view(spec.groups, -1), search))


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
