"""Rounding mathematics: a weight and its grid in, a weight that gradients can move between grid points out; no model.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (2023), and with it
learned scales: q = clamp(round(w / (scale * a) + v) + zero_point), |v| <= 1/2 and a near 1. Rounding passes gradients
straight through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.calibrate.scale_search import Grid
from qpass.kernels.reference.range_search import storable

_LEAST, _MOST = 0.6, 1.4  # of `a`


class LearnedRounding:
    """One weight [N, K] float32 on `grid`; `shift` [N, G, K/G] is v, `stretch` [N, G, 1] is a."""

    def __init__(self, weight: Tensor, grid: Grid, ends: tuple[int, int], dtype: torch.dtype,
                 codes: Tensor | None = None) -> None:
        """`codes` [N, K] are where to start from; by default where rounding to nearest starts."""
        n, groups = weight.shape[0], grid.scale.shape[1]
        self.weight = weight.reshape(n, groups, -1)
        self.scale = grid.scale.unsqueeze(-1)
        self.zero = None if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
        self.ends, self.dtype = ends, dtype
        self.middle = torch.zeros_like(self.weight)
        if codes is not None:
            steps = codes.reshape(self.weight.shape).float() - (0 if self.zero is None else self.zero)
            nearest = (self.weight / self.scale).round()
            # Where the start is not the nearest point, v is measured from what makes it so.
            self.middle = torch.where(steps == nearest, 0.0, steps - self.weight / self.scale)
        self.shift = torch.zeros_like(self.weight).requires_grad_()
        self.stretch = torch.ones_like(self.scale).requires_grad_()
        self.keep()

    def __call__(self) -> Tensor:
        """The weight on its grid, [N, K], with gradients to `shift` and `stretch`."""
        scale = self._scale()
        steps = self.weight / scale + self.middle + self.shift
        q = steps + (steps.round() - steps).detach()
        if self.zero is not None:
            q = q + self.zero
        q = q.clamp(*self.ends)
        if self.zero is not None:
            q = q - self.zero
        return (q * scale).reshape(len(self.weight), -1)

    def _scale(self) -> Tensor:
        exact = self.scale * self.stretch
        return exact + (storable(exact.detach(), self.dtype) - exact.detach())

    @torch.no_grad()
    def step(self, rate: float, stretch_rate: float) -> None:
        """Move against the sign of the gradients and forget these."""
        for value, size, low, high in ((self.shift, rate, -0.5, 0.5), (self.stretch, stretch_rate, _LEAST, _MOST)):
            if value.grad is not None:
                value.sub_(value.grad.sign_(), alpha=size).clamp_(low, high)
                value.grad = None

    def keep(self) -> None:
        """Remember the state as it is, in place of one remembered before."""
        self._kept = self.shift.detach().clone(), self.stretch.detach().clone()

    @torch.no_grad()
    def reset(self) -> None:
        """Go to where it started."""
        self.shift.zero_()
        self.stretch.fill_(1)

    @torch.no_grad()
    def go_back(self) -> None:
        """Take the remembered state."""
        self.shift.copy_(self._kept[0])
        self.stretch.copy_(self._kept[1])

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Grid]:
        """Codes [N, K] and the grid that they are on."""
        scale = self._scale()
        q = (self.weight / scale + self.middle + self.shift).round()
        zero = None if self.zero is None else self.zero.squeeze(-1)
        if self.zero is not None:
            q = q + self.zero
        return q.clamp(*self.ends).reshape(len(self.weight), -1), Grid(scale.squeeze(-1), zero)
