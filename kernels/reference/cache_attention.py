"""Attention over a quantized cache, in plain torch: keys and values are decoded, then it is attention as ever."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.cache_numbers import numbers_of


def cache_attention(query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
                    mask: Tensor | None, kind: str, causal: bool, scaling: float, softcap: float) -> Tensor:
    """query [B, Hq, M, D] -> [B, M, Hq, Dv] in its dtype.

    keys, values  codes [B, Hkv, S, ...] of `CacheNumbers`, their scales broadcast against them; Hq / Hkv heads of
                  queries share one of keys
    mask          bool (False hides) or float (added), broadcast to [B, Hq, M, S]; None shows all
    causal        row m sees the keys up to S - M + m
    softcap       scores become softcap * tanh(score / softcap) before the mask; 0 leaves them
    """
    numbers = numbers_of(kind, key_scale.shape[-1])
    k = numbers.decode(keys, key_scale, query.dtype)
    v = numbers_of(kind, value_scale.shape[-1]).decode(values, value_scale, query.dtype)
    return attend(query, k, v, mask, causal, scaling, softcap)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float,
           softcap: float) -> Tensor:
    """The same for keys [B, Hkv, S, D] and values [B, Hkv, S, Dv] in float. A row that sees nothing gives 0."""
    if causal:
        m, s = query.shape[2], key.shape[2]
        seen = torch.ones(m, s, dtype=torch.bool, device=query.device).tril(s - m)
        mask = seen if mask is None else mask & seen if mask.dtype == torch.bool else mask.masked_fill(
            ~seen, float("-inf"))
    shared = query.shape[1] // key.shape[1]
    q = query.unflatten(1, (-1, shared))
    scores = torch.matmul(q, key.unsqueeze(2).transpose(-1, -2)).float() * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        wide = mask.expand(query.shape[0], query.shape[1], *mask.shape[-2:]).unflatten(1, (-1, shared))
        scores = scores.masked_fill(~wide, float("-inf")) if mask.dtype == torch.bool else scores + wide.float()
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # softmax gives NaN there; a NaN of the input stays one
    weights = torch.softmax(scores, -1).masked_fill(blind, 0.0)
    out = torch.matmul(weights.to(value.dtype), value.unsqueeze(2)).flatten(1, 2)
    return out.transpose(1, 2).contiguous()
