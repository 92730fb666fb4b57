"""GPTQ mathematics: a weight, its input's Hessian and a grid in, integers out; pure mathematics, no model.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Columns are
rounded one after another; the error of each is spread over the columns still to come so that the change of the output,
tr((W - Q) H (W - Q)^T) with H = X^T X, is smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.calibrate.scale_search import Grid
from qpass.kernels.reference.range_search import storable
from qpass.kernels.round_columns import descend_columns, round_columns

_MOST_DAMPENING = 1e3
_SOLVED_WHOLE = 256  # columns
_AT_ONCE = 64  # columns: more spread their errors slower
_HELD = 1e-3  # part of a scale's own curvature that holds it where it is


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U [K, K] float32 with H^-1 = U^T U, in the order given; and the dampening that it took."""

    upper: Tensor
    dampening: float

    def importance(self, order: Tensor) -> Tensor:
        """How much an error of each column costs [K], mean 1, once the columns rounded after it make up for it: U^-2.

        GPTQ's whole error is the sum over columns of (w - q)^2 / U_jj^2, w with what the columns before added to it.
        """
        costs = self.upper.diagonal().pow(-2)
        found = torch.empty_like(costs)
        found[order] = costs / costs.mean()
        return found


def inverse_factor(hessian: Tensor, order: Tensor, dampening_frac: float) -> InverseFactor:
    """Factor the inverse of the dampened Hessian [K, K], columns taken in `order` [K].

    With the columns reversed, H = L L^T gives H = R R^T with R upper triangular, and U = R^-1: one factorization and no
    inverse of H. Float32 first, float64 where that fails. Columns that no input reaches (a zero on the diagonal) get a
    1 there and stay uncoupled. Where the matrix is not positive definite the dampening is raised tenfold until it is.
    Raises ValueError for a Hessian with NaN or Inf.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or Inf")
    backwards = order.flip(0)
    h = hessian[backwards][:, backwards]
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    mean, part = float(diagonal.mean()), dampening_frac
    while True:
        for dtype in (torch.float32, torch.float64):
            damped = h.to(dtype, copy=True)
            damped.diagonal().add_(part * mean)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                upper = _inverse_of_lower(factor).flip(0, 1).float()
                if bool(torch.isfinite(upper).all()):
                    return InverseFactor(upper.contiguous(), part)
        part = max(part * 10, 1e-3)
        if part > _MOST_DAMPENING:
            raise ValueError(f"the Hessian is not positive definite even with dampening {part:g}")


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [K, K]; halves and products take a third of what solving for I takes."""
    size = len(lower)
    if size <= _SOLVED_WHOLE:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return inverse
    half = size // 2
    first, last = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    found = torch.zeros_like(lower)
    found[:half, :half], found[half:, half:] = first, last
    torch.mm(last @ lower[half:, :half], first, out=found[half:, :half]).neg_()
    return found


def gptq(weight: Tensor, factor: InverseFactor, order: Tensor, grid: Grid, ends: tuple[int, int],
         block_size: int = 64) -> Tensor:
    """Codes float32 [N, K], whole numbers from `ends`, for `weight` float32 [N, K] on a grid of static groups.

    `order` [K] is the order in which columns are rounded, the one that `factor` was made in.
    """
    k = weight.shape[1]
    block_size = min(block_size, _AT_ONCE)
    group = order // (k // grid.scale.shape[1])
    # Columns as rows, so that each step reads and writes memory in one piece.
    w = weight.t()[order].contiguous()
    scale = grid.scale.t()[group].contiguous()
    zero = None if grid.zero_point is None else grid.zero_point.t()[group].contiguous()
    codes = torch.empty_like(w)
    upper = factor.upper
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        beyond = upper[start:stop, start:] / upper[start:stop, start:stop].diagonal()[:, None]
        codes[start:stop], errors = round_columns(w[start:stop], scale[start:stop], None if zero is None else
                                                  zero[start:stop], beyond[:, :stop - start].t(), ends)
        if stop < k:
            w[stop:].addmm_(beyond[:, stop - start:].t(), errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous()


def descend(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, ends: tuple[int, int],
            dampening: float, block_size: int = 64) -> Tensor:
    """`codes` [N, K] after one sweep of coordinate descent: each integer in turn goes where tr(E H E^T) is smallest.

    E = W_q - W for `target` W [N, K], H dampened as for GPTQ; all other integers stay meanwhile. GPTQ settles each
    column before those after it are known; here each is looked at again with all of them (Behdin et al., "QuantEase",
    2023). The error never grows.
    """
    k = target.shape[1]
    group = torch.arange(k, device=codes.device) // (k // grid.scale.shape[1])
    # Columns as rows, as in `gptq`.
    scale, q, w = grid.scale.t()[group].contiguous(), codes.t().contiguous(), target.t().contiguous()
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.t()[group].contiguous()
    error = torch.addcmul(-w, q - zero, scale)
    extra = dampening * float(hessian.diagonal().mean())
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        slope = torch.addmm(error[start:stop], hessian[start:stop], error, beta=extra)
        inside = hessian[start:stop, start:stop].clone()
        inside.diagonal().add_(extra)
        pivots = inside.diagonal()
        rates = torch.where(pivots > 0, -1 / pivots, 0.0)  # a column that no input reaches stays
        q[start:stop], steps = descend_columns(slope, q[start:stop], scale[start:stop], inside, rates, ends)
        error[start:stop] += steps
    return q.t().contiguous()


def refit(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, dtype: torch.dtype,
          pull: Tensor | None = None) -> Grid:
    """The scales, as stored in `dtype`, with which `codes` [N, K] come nearest to `target` [N, K] in the output.

    For each row the least squares of (W_q - W) H (W_q - W)^T in its group scales: one [G, G] system, held near the
    scales as they are where H says little. `pull` is H target^T [K, N], where it is known already.
    """
    n, groups = grid.scale.shape
    q = codes.t().contiguous()
    if grid.zero_point is not None:
        q.view(groups, -1, n).sub_(grid.zero_point.t().unsqueeze(1))
    size = len(q) // groups
    pull = hessian @ target.t() if pull is None else pull
    linear = (q * pull).view(groups, size, n).sum(1).t()
    quadratic = torch.empty(groups, groups, n, dtype=codes.dtype, device=codes.device)
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        reach = (hessian[start:, start:stop] @ q[start:stop]).mul_(q[start:])
        torch.sum(reach.view(groups - group, size, n), 1, out=quadratic[group, group:])
        quadratic[group + 1:, group] = quadratic[group, group + 1:]
    quadratic = quadratic.permute(2, 0, 1).contiguous()
    held = quadratic.diagonal(dim1=1, dim2=2) * _HELD + 1e-30
    scale, failed = torch.linalg.solve_ex(quadratic + torch.diag_embed(held), linear + held * grid.scale)
    good = torch.isfinite(scale) & (scale * grid.scale > 0) & (failed == 0)[:, None]
    return Grid(storable(torch.where(good, scale, grid.scale), dtype), grid.zero_point)


def polish(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, ends: tuple[int, int], dtype: torch.dtype, *,
           refits: bool, sweeps: int, dampening: float) -> tuple[Tensor, Grid]:
    """Codes [N, K] and their grid after `sweeps` of `descend`, with a `refit` before and after each if `refits`."""
    pull = hessian @ target.t() if refits else None
    if refits:
        grid = refit(codes, grid, target, hessian, dtype, pull)
    for _ in range(sweeps):
        codes = descend(codes, grid, target, hessian, ends, dampening)
        if refits:
            grid = refit(codes, grid, target, hessian, dtype, pull)
    return codes, grid


def energy_order(hessian: Tensor, actorder: str | None) -> Tensor:
    """Columns by falling diagonal for "static", as they stand for None."""
    if actorder is None:
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)
