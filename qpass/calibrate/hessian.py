"""Hessian: the inputs of a product in, X^T X over all of them out."""

from __future__ import annotations

import torch
from torch import Tensor

_PANEL = 384  # columns: narrower ones multiply less and slower


class Hessian:
    """X^T X over all rows seen, float32 [K, K]. Only panels that touch the upper triangle are multiplied."""

    def __init__(self, size: int) -> None:
        self.rows = 0
        self._upper = torch.zeros(size, size)

    def add(self, x: Tensor) -> None:
        self._upper = self._upper.to(x.device)
        for start in range(0, x.shape[1], _PANEL):
            stop = start + _PANEL
            self._upper[:stop, start:stop].addmm_(x[:, :stop].t(), x[:, start:stop])
        self.rows += len(x)

    def __add__(self, other: Hessian) -> Hessian:
        whole = Hessian(len(self._upper))
        whole.rows, whole._upper = self.rows + other.rows, self._upper + other._upper.to(self._upper.device)
        return whole

    def divide(self, factors: Tensor) -> None:
        """What it is once the input's channels are divided by `factors` [K]."""
        self._upper = self._upper / factors / factors[:, None]

    @property
    def value(self) -> Tensor:
        """The whole symmetric matrix."""
        return self._upper.triu().add_(self._upper.triu(1).t())
