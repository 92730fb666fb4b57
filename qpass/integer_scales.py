"""Integer scales: float groups in, scales out that are integers times one scale a row; and such scales taken apart.

scale[n, g] = multiplier[n, g] * channel[n], with |multiplier| <= 15 and a channel scale of at most 4 significant bits,
so that the product has 8 and is exact in bfloat16, float16 and float32: the file is like any other. A kernel that finds
the two parts (`factor`) multiplies whole rows in integers and scales once.

The scale of a group is negative where its largest weight is positive: the grid -8..7 reaches further down, and -8 then
falls on the largest weight. Among the channel scales of one octave and the two multipliers around the ideal one, those
with the least

    sum of e^2  +  BIAS_WEIGHT * (sum of e * w)^2 / (sum of w^2),    e = rounded - w

are taken, summed over the row. The first term alone prefers smaller scales, which shrink every weight a little in the
same direction; a model's outputs feel that more than errors that point anywhere (numbers in tests/bench/NOTES.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_MULTIPLIER = 15
"""A code of 4 bits times this still fits int8: |-8 * 15| = 120."""

BIAS_WEIGHT = 16.0  # 4 to 32 gave KL 0.31 to 0.34 on the permuted SmolLM2 in groups of 64, amax scales 0.36
_CHANNEL_STEPS = 8  # channel scales in an octave: 4 significant bits
_AT_ONCE = 1 << 17  # scales taken apart at a time, in ten tensors of float64 and int64: 10 MB of work space


def integer_scales(w: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Scales float32 [n, G, 1], exact in `dtype`, for finite groups `w` float32 [n, G, group_size] of `bits` bits."""
    # In units near each row's largest weight, so that no square below overflows or vanishes.
    largest = w.abs().amax((1, 2), keepdim=True)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-100, 100))
    w = w / unit
    most = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    ideal = most / -(1 << bits - 1)
    size, sign = ideal.abs(), torch.where(most > 0, -1.0, 1.0)
    energy = w.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best, least = ideal, torch.full_like(ideal[:, :1], torch.inf)
    for channel in _channels(size.amax(1, keepdim=True), unit, dtype):
        low = (size / channel).floor()
        s, cost = ideal, torch.full_like(ideal, torch.inf)
        for step in (0, 1):
            tried = (low + step).clamp(1, LARGEST_MULTIPLIER) * channel * sign
            of_tried = _cost(w, tried, energy, bits)
            s, cost = torch.where(of_tried < cost, tried, s), torch.minimum(of_tried, cost)
        of_row = cost.sum(1, keepdim=True)
        best, least = torch.where(of_row < least, s, best), torch.minimum(of_row, least)
    return best * unit


def factor(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """scale [N, G] of any float dtype -> multiplier int8 [N, G] and channel float32 [N], or None.

    Holds: (multiplier * channel).to(scale.dtype) is `scale`, bit for bit, the product being exact in float32, and
    1 <= |multiplier| <= 15. None where no such parts exist for every row.
    """
    n, groups = scale.shape
    if groups < 2:
        return None
    multiplier = torch.empty(n, groups, dtype=torch.int8, device=scale.device)
    channel = torch.empty(n, device=scale.device)
    begin, rows = 0, 16  # most scales cannot be factored, and a few rows show it
    while begin < n:
        end = min(begin + rows, n)
        parts = _factor(scale[begin:end])
        if parts is None:
            return None
        multiplier[begin:end], channel[begin:end] = parts
        begin, rows = end, max(16, _AT_ONCE // groups)
    return multiplier, channel


def _channels(largest: Tensor, unit: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[n, 1, 1] each, in `unit`s, of 4 significant bits: the least that reaches `largest` times 15, and 7 more."""
    info = torch.finfo(dtype)
    # Below, 4 bits would not all be there; above, a multiple could overflow. A row of zeros has any scale.
    lowest, highest = info.tiny * info.eps * 8, info.max / 32
    wanted = torch.where(largest == 0, 1.0, largest / LARGEST_MULTIPLIER).clamp(lowest / unit, highest / unit)
    mantissa, exponent = torch.frexp(wanted)
    first = (mantissa * 16).ceil()  # 8 to 16
    found = []
    for step in range(_CHANNEL_STEPS):
        of_octave = first + step
        over = of_octave > 16
        of_octave = torch.where(over, (of_octave / 2).ceil(), of_octave)
        found.append(torch.ldexp(of_octave / 16, exponent + over.to(exponent.dtype)))
    return found


def _cost(w: Tensor, s: Tensor, energy: Tensor, bits: int) -> Tensor:
    """What the module says, of each group; the sums are those of e = s * q - w, written out."""
    q = (w / s).round_().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1)
    along = s * (q * w).sum(-1, keepdim=True)
    square = s.square() * q.square().sum(-1, keepdim=True) - 2 * along + energy
    return square + BIAS_WEIGHT * (along - energy).square() / energy


def _factor(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    size = scale.detach().double().abs()
    least, most = size.amin(-1, keepdim=True), size.amax(-1, keepdim=True)
    if not bool(((least > 0) & torch.isfinite(most) & (most <= LARGEST_MULTIPLIER * least)).all()):
        return None
    # As integers times one power of two a row: a float32 has 24 bits, and the sizes differ by at most 4 more.
    unit = torch.ldexp(torch.ones_like(least), torch.frexp(least).exponent - 24)
    whole = (size / unit).long()
    divisor = whole[:, 0]
    for g in range(1, whole.shape[1]):
        divisor = torch.gcd(divisor, whole[:, g])
    multiplier = whole // divisor[:, None]
    if int(multiplier.max()) > LARGEST_MULTIPLIER:
        return None
    channel = (divisor.double() * unit[:, 0]).float()
    signed = torch.where(torch.signbit(scale), -multiplier, multiplier).to(torch.int8)
    back = signed.float() * channel[:, None]
    return (signed, channel) if torch.equal(back.to(scale.dtype), scale) and bool((channel > 0).all()) else None
