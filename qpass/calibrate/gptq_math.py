"""GPTQ mathematics: a weight, its input's Hessian and a grid in, integers out; pure mathematics, no model.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Columns are
rounded one after another; the error of each is spread over the columns still to come so that the change of the output,
tr((W - Q) H (W - Q)^T) with H = X^T X, is smallest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.calibrate.scale_search import Grid, storable

_MOST_DAMPENING = 1e3
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
                eye = torch.eye(len(h), dtype=dtype, device=h.device)
                upper = torch.linalg.solve_triangular(factor, eye, upper=False).flip(0, 1).float()
                if bool(torch.isfinite(upper).all()):
                    return InverseFactor(upper.contiguous(), part)
        part = max(part * 10, 1e-3)
        if part > _MOST_DAMPENING:
            raise ValueError(f"the Hessian is not positive definite even with dampening {part:g}")


def gptq(weight: Tensor, factor: InverseFactor, order: Tensor, grid: Grid, ends: tuple[int, int],
         block_size: int = 128) -> Tensor:
    """Codes float32 [N, K], whole numbers from `ends`, for `weight` float32 [N, K] on a grid of static groups.

    `order` [K] is the order in which columns are rounded, the one that `factor` was made in.
    """
    n, k = weight.shape
    group = order // (k // grid.scale.shape[1])
    # Columns as rows, so that each step reads and writes memory in one piece.
    w = weight.t()[order].contiguous()
    scale = grid.scale.t()[group].contiguous()
    zero = None if grid.zero_point is None else grid.zero_point.t()[group].contiguous()
    codes = torch.empty_like(w)
    upper = factor.upper
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        errors = torch.empty(stop - start, n, dtype=w.dtype, device=w.device)
        inside = upper[start:stop, start:stop]
        pivots = inside.diagonal().tolist()
        for i in range(stop - start):
            column = w[start + i]
            q = torch.div(column, scale[start + i]).round_()
            if zero is None:
                q.clamp_(*ends)
                error = torch.addcmul(column, q, scale[start + i], value=-1)
            else:
                z = zero[start + i]
                q.add_(z).clamp_(*ends)
                error = torch.addcmul(column, q - z, scale[start + i], value=-1)
            codes[start + i] = q
            errors[i] = error.div_(pivots[i])
            if start + i + 1 < stop:
                w[start + i + 1:stop].addr_(inside[i, i + 1:], errors[i], alpha=-1)
        if stop < k:
            w[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
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
        # A column that no input reaches stays.
        pivots = [pivot if pivot > 0 else math.inf for pivot in inside.diagonal().tolist()]
        for i in range(stop - start):
            j = start + i
            moved = torch.addcdiv(q[j], slope[i], scale[j], value=-1 / pivots[i]).round_().clamp_(*ends)
            step = (moved - q[j]).mul_(scale[j])
            q[j] = moved
            error[j] += step
            slope[i + 1:].addr_(inside[i + 1:, i], step)
    return q.t().contiguous()


def refit(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, dtype: torch.dtype) -> Grid:
    """The scales, as stored in `dtype`, with which `codes` [N, K] come nearest to `target` [N, K] in the output.

    For each row the least squares of (W_q - W) H (W_q - W)^T in its group scales: one [G, G] system, held near the
    scales as they are where H says little.
    """
    n, groups = grid.scale.shape
    q = codes.view(n, groups, -1)
    if grid.zero_point is not None:
        q = q - grid.zero_point.unsqueeze(-1)
    size = q.shape[-1]
    quadratic = torch.empty(n, groups, groups, dtype=codes.dtype, device=codes.device)
    linear = torch.empty(n, groups, dtype=codes.dtype, device=codes.device)
    for group in range(groups):
        reach = q[:, group] @ hessian[group * size:(group + 1) * size]
        quadratic[:, group] = (reach.view(q.shape) * q).sum(-1)
        linear[:, group] = (reach * target).sum(-1)
    held = quadratic.diagonal(dim1=1, dim2=2) * _HELD + 1e-30
    scale, failed = torch.linalg.solve_ex(quadratic + torch.diag_embed(held), linear + held * grid.scale)
    good = torch.isfinite(scale) & (scale * grid.scale > 0) & (failed == 0)[:, None]
    return Grid(storable(torch.where(good, scale, grid.scale), dtype), grid.zero_point)


def polish(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, ends: tuple[int, int], dtype: torch.dtype, *,
           refits: bool, sweeps: int, dampening: float) -> tuple[Tensor, Grid]:
    """Codes [N, K] and their grid after `sweeps` of `descend`, with a `refit` before and after each if `refits`."""
    if refits:
        grid = refit(codes, grid, target, hessian, dtype)
    for _ in range(sweeps):
        codes = descend(codes, grid, target, hessian, ends, dampening)
        if refits:
            grid = refit(codes, grid, target, hessian, dtype)
    return codes, grid


def energy_order(hessian: Tensor, actorder: str | None) -> Tensor:
    """Columns by falling diagonal for "static", as they stand for None."""
    if actorder is None:
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)
