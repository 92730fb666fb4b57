"""Range search: float groups in; of the ranges tried, each group's scale and zero point with the least error, out.

Scales come as they are stored (rounded to a dtype, never 0), w ~ (q - zero_point) * scale with qmin = -2^(bits-1) and
qmax = 2^(bits-1) - 1. A scale may be negative: the grid qmin..qmax is longer on its negative side, and a negative scale
turns that side to where the group's largest weight is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qpass.integer_scales import BIAS_WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 18  # a search goes over its numbers many times: they stay in the cache


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """What is searched for: integers of `bits`, scales stored in `dtype`.

    signed       of symmetric numbers: scales may be negative
    compensated  whoever rounds makes up for the errors, as GPTQ does: then what they have in common with the weight
                 does not count more than the rest, and symmetric grids try more ranges
    """

    bits: int
    symmetric: bool
    signed: bool
    compensated: bool
    dtype: torch.dtype

    @property
    def ends(self) -> tuple[int, int]:
        """qmin and qmax."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    @property
    def tried(self) -> list[float]:
        """Symmetric: on how many steps the largest weight is put, around the end of the grid, the longer end if
        `signed`. Asymmetric: parts of the whole range. Each a number that float32 holds."""
        if not self.symmetric:
            return torch.linspace(0.80, 1.04, 13).tolist()
        qmin, qmax = self.ends
        end = -qmin if self.signed else (qmax - qmin) / 2
        return (torch.linspace(end - 2, end + 1.75, 16) if self.compensated else
                torch.linspace(end - 1, end + 0.75, 8)).tolist()


def search_ranges(w: Tensor, importance: Tensor | None, search: RangeSearch) -> tuple[Tensor, Tensor | None]:
    """w float32 [N, G, S] -> scale and, if asymmetric, zero point, float32 [N, G], with values as stored.

    `importance` [G, S] weighs the error of each column.
    """
    n, groups, _ = w.shape
    parts = [_search(rows, importance, search) for rows in w.split(max(1, _ELEMENTS_AT_ONCE // max(1, w[0].numel())))]
    scale, zero = (None if tensors[0] is None else torch.cat([part.view(groups, -1).t() for part in tensors])
                   for tensors in zip(*parts, strict=True))
    assert scale is not None and len(scale) == n
    return scale, zero


def _search(w: Tensor, importance: Tensor | None, search: RangeSearch) -> tuple[Tensor, Tensor | None]:
    across = w.permute(2, 1, 0).contiguous()  # sums over a group then run over whole vectors
    full = None if importance is None else importance.t().unsqueeze(-1).expand(across.shape).contiguous()
    groups = _Groups(across.flatten(1), None if full is None else full.flatten(1), search.compensated)
    return _search_symmetric(groups, search) if search.symmetric else _search_asymmetric(groups, search)


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


def _search_symmetric(groups: _Groups, search: RangeSearch) -> tuple[Tensor, None]:
    """Try ranges around the one in which the largest weight meets the end of the grid, with either sign if `signed`."""
    w, dtype = groups.w, search.dtype
    amax = w.abs().amax(0)
    top = w.gather(0, w.abs().argmax(0, keepdim=True)).squeeze(0)
    toward = torch.where(top > 0, -1.0, 1.0)
    best = torch.full_like(amax, torch.inf)
    found = torch.ones_like(amax)
    for steps in search.tried:
        for sign in (toward, -toward) if search.signed else (torch.ones_like(amax),):
            scale = storable(sign * amax / steps, dtype)
            error = groups.error((w / scale).round_().clamp_(*search.ends), scale)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return storable(torch.where(amax == 0, torch.finfo(dtype).eps, found), dtype), None


def _search_asymmetric(groups: _Groups, search: RangeSearch) -> tuple[Tensor, Tensor]:
    """Try ranges scaled about their middle, each with the zero points next to the exact one."""
    w, dtype, (qmin, qmax) = groups.w, search.dtype, search.ends
    low, high = w.amin(0).clamp_max(0), w.amax(0).clamp_min(0)
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for part in search.tried:
        scale = storable(span * part / (qmax - qmin), dtype)
        middle = (qmin + qmax) / 2 - (low + high) / 2 / scale
        nearest = (w / scale).round_()
        for zero in (middle.floor(), middle.ceil()):
            zero = zero.clamp(qmin, qmax)
            error = groups.error(nearest.clamp(qmin - zero, qmax - zero), scale)
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
            zeros = torch.where(better, zero, zeros)
    return torch.where(high == low, torch.finfo(dtype).eps, scales), zeros
