"""AWQ mathematics: weights that share an input and its Hessian in, a factor a channel out; pure mathematics, no model.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023). The factors are
s = mean(|x|)^r / mean(|w|)^(1 - r) (without the second part if `duo` is False), r from a grid, the one whose rounded
weights change the products' outputs least: sum over them of tr(D H D^T), D = round(W s) / s - W, H = X^T X.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LEAST = 1e-4

Round = Callable[[Tensor], Tensor]


def search_factors(weights: Sequence[Tensor], rounds: Sequence[Round], x_mean: Tensor, hessian: Tensor, *,
                   grid: int, duo: bool, common: Round) -> Tensor:
    """Factors [K] for `weights` float32 [N, K], each rounded by its own of `rounds` ([N, K] -> [N, K]).

    x_mean [K] is mean(|x|); `common` makes factors equal that must be. All ones if rounding as it stands is best.
    """
    size = torch.cat(list(weights)).abs()
    w_mean = (size / size.amax(-1, keepdim=True).clamp_min(_LEAST)).mean(0)
    best, found = torch.inf, torch.ones_like(x_mean)
    for number in range(grid + 1):
        r = number / grid
        s = x_mean.clamp_min(_LEAST).pow(r)
        if duo and number:
            s = s / w_mean.clamp_min(_LEAST).pow(1 - r)
        s = torch.where(x_mean == 0, 1.0, s)
        s = common(s / (s.max() * s.min()).sqrt())
        s = torch.ones_like(s) if number == 0 else s
        error = sum(output_error(round_it(w * s) / s - w, hessian) for w, round_it in zip(weights, rounds, strict=True))
        if error < best:
            best, found = error, s
    return found


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T), the squared change of the outputs over all rows of the input."""
    return float((difference @ hessian * difference).sum())
