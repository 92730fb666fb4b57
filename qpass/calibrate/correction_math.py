"""Correction mathematics: what outputs lack, seen in two halves of the data, in; a change of each weight out; no model.

The change D of a weight [N, K] that makes up for E [T, N] on inputs x [T, K] is the regression E^T x (x^T x)^-1. With
few tokens a column it fits noise, which later layers then build on. So it is held back twice, by a ridge on x^T x and
by one factor on the result, both chosen so that what is found on each half of the data serves the other half best:

    gain = 2 a <D_0, C_1> - a^2 <D_0 H_1, D_0>, and the same with the halves exchanged,    C = E^T x, H = x^T x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RIDGES = (0.01, 0.1, 1.0)  # parts of the mean of H's diagonal

Halves = tuple[Tensor, Tensor]


def confirmed_changes(hessians: Halves, products: Sequence[Halves]) -> list[Tensor]:
    """D [N, K] for each of `products`, C of a weight by halves, given H [K, K] by halves; zeros where nothing holds."""
    sizes = [len(first) for first, _ in products]
    stacked = [torch.cat([pair[half] for pair in products]) for half in (0, 1)]
    best: list[tuple[float, float, float]] = [(0.0, _RIDGES[0], 0.0)] * len(products)  # gain, ridge, factor
    for ridge in _RIDGES:
        served, spent = [0.0] * len(products), [0.0] * len(products)
        for here, there in ((0, 1), (1, 0)):
            found = _regression(hessians[here], stacked[here], ridge)
            if found is None:
                break
            parts = zip(found.split(sizes), stacked[there].split(sizes), (found @ hessians[there]).split(sizes),
                        strict=True)
            for index, (change, wanted, reached) in enumerate(parts):
                served[index] += float((change * wanted).sum())
                spent[index] += float((change * reached).sum())
        else:
            for index, (s, t) in enumerate(zip(served, spent, strict=True)):
                factor = min(1.0, max(0.0, s / t)) if t > 0 else 0.0
                best[index] = max(best[index], (2 * factor * s - factor * factor * t, ridge, factor))
    changes = [torch.zeros_like(first) for first, _ in products]
    for ridge in {ridge for gain, ridge, _ in best if gain > 0}:
        found = _regression(hessians[0] + hessians[1], stacked[0] + stacked[1], ridge)
        for index, change in enumerate([] if found is None else found.split(sizes)):
            gain, own, factor = best[index]
            if gain > 0 and own == ridge:
                changes[index] = change * factor
    return changes


def _regression(hessian: Tensor, products: Tensor, ridge: float) -> Tensor | None:
    """`products` [N, K] times the inverse of the ridged Hessian; None where that is not positive definite."""
    damped = hessian.clone()
    damped.diagonal().add_(ridge * float(hessian.diagonal().mean()) + 1e-30)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    found = torch.cholesky_solve(products.t(), factor).t()
    return found if bool(torch.isfinite(found).all()) else None
