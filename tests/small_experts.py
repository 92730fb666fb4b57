"""Small experts: a module of fused experts as people write them, and a mixture of them with a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """[E, 2 * inner, hidden] and [E, hidden, inner]; gate and up rows in halves, or alternating."""

    def __init__(self, experts: int, hidden: int, inner: int, *, biased: bool = False, alternating: bool = False
                 ) -> None:
        super().__init__()
        self.alternating = alternating
        self.up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) / inner**0.5)
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * inner)) if biased else None
        self.down_bias = nn.Parameter(torch.randn(experts, hidden)) if biased else None

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x [T, hidden], index and weight [T, k] -> [T, hidden]."""
        ids, rows = index.reshape(-1), x.repeat_interleave(index.shape[1], 0).unsqueeze(-1)
        y = torch.bmm(self.up[ids], rows).squeeze(-1)
        y = y if self.up_bias is None else y + self.up_bias[ids]
        g, u = (y[..., ::2], y[..., 1::2]) if self.alternating else y.chunk(2, -1)
        z = torch.bmm(self.down[ids], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        z = z if self.down_bias is None else z + self.down_bias[ids]
        return (z * weight.reshape(-1, 1)).view(*index.shape, -1).sum(1)


class Mixture(nn.Module):
    """A router and its experts."""

    def __init__(self, experts: Experts, top_k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(experts.up.shape[2], len(experts.up), bias=False)
        self.experts, self.top_k = experts, top_k

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).softmax(-1).topk(self.top_k, -1)
        return self.experts(x, index, weight)  # type: ignore[no-any-return]
