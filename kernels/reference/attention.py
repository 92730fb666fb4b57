"""Attention over keys and values in float, in plain torch: what `qpass_x86::attention` means, and its oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.kernels.reference.cache_attention import attend


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """query [B, Hq, M, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] -> [B, M, Hq, Dv], all of one dtype.

    mask    bool (False hides) or float (added), broadcast to [B, Hq, M, S]; None shows all
    causal  row m sees the keys 0 to m

    Hq / Hkv heads of queries share one of keys. A row that sees nothing gives 0. Sums are in float32.
    """
    m, s = query.shape[2], key.shape[2]
    mask = None if mask is None else torch.atleast_2d(mask)
    if causal:
        seen = torch.ones(m, s, dtype=torch.bool, device=query.device).tril()
        mask = seen if mask is None else mask & seen if mask.dtype == torch.bool else mask.masked_fill(
            ~seen, float("-inf"))
    return attend(query.float(), key.float(), value.float(), mask, False, scale, 0.0).to(query.dtype)
