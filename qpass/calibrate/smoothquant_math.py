"""SmoothQuant mathematics: sizes of an input's channels and of the columns that meet them in, a factor each out.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022): channel
j of the input is divided by s_j and column j of every weight that reads it multiplied by s_j,
s_j = amax(|x_j|)^alpha / amax(|w_j|)^(1 - alpha).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-5  # of a factor; keeps channels that are never used finite
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Round = Callable[[Tensor], Tensor]


def factors_of(x_amax: Tensor, w_amax: Tensor, alpha: float) -> Tensor:
    """s [K] as above; 1 for a channel that is zero in the input or in the weights."""
    s = x_amax.clamp_min(_SMALLEST).pow(alpha) / w_amax.clamp_min(_SMALLEST).pow(1 - alpha)
    return torch.where((x_amax == 0) | (w_amax == 0), 1.0, s.clamp_min(_SMALLEST))


def search_factors(rows: Tensor, weights: Sequence[Tensor], round_input: Round, rounds: Sequence[Round],
                   x_amax: Tensor, w_amax: Tensor, common: Round) -> Tensor:
    """The factors [K], of several alphas or none at all, whose rounded products come nearest to the float ones.

    rows [T, K] are inputs seen and `weights` float32 [N, K] their readers; `round_input` and `rounds` round as the
    schemes do, and `common` makes factors equal that must be. Each row counts by its error relative to its output.
    """
    whole = torch.cat(list(weights))
    wanted = rows @ whole.t()
    size = wanted.square().sum(-1).clamp_min(1e-30)
    best, found = torch.inf, torch.ones_like(x_amax)
    for alpha in (None, *_ALPHAS):
        s = torch.ones_like(x_amax) if alpha is None else common(factors_of(x_amax, w_amax, alpha))
        rounded = torch.cat([round_it(w * s) for w, round_it in zip(weights, rounds, strict=True)])
        error = float(((round_input(rows / s) @ rounded.t() - wanted).square().sum(-1) / size).mean())
        if error < best:
            best, found = error, s
    return found
