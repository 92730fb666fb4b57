"""Attention `qpass`, registered with Transformers: as `sdpa`, and over a quantized cache without decoding it first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import qpass.kernels.cache_attention  # noqa: F401  (which defines the op)
from qpass.errors import QPassError
from qpass.kernels.reference.cache_attention import attend

NAME = "qpass"


class Cached(NamedTuple):
    """Keys or values as a cache holds them: what its layers hand to the attention in place of float tensors."""

    codes: Tensor
    scale: Tensor
    kind: str


def attention(module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None,
              dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None, **kwargs: Any
              ) -> tuple[Tensor, None]:
    """query [B, Hq, M, D] -> [B, M, Hq, Dv]; keys and values are tensors [B, Hkv, S, D], or `Cached`."""
    if not isinstance(key, Cached) and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise QPassError(f"{type(module).__name__} adds {name} to its scores, which attention over a quantized "
                             "cache does not know; give QuantizedCache the config of a model with another "
                             "attn_implementation: keys and values are then decoded")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = attention_mask is None and query.shape[2] > 1 and bool(getattr(module, "is_causal", True))
    # Without a mask Transformers means keys from the first on, as many as queries: what a static cache has room for
    # beyond them is empty.
    seen = query.shape[2] if causal else None
    if not isinstance(key, Cached):
        keys, values = key[:, :, :seen], value[:, :, :seen]
        return attend(query, keys, values, attention_mask, causal, scaling, softcap or 0.0), None
    key, value = _first(key, seen), _first(value, seen)
    mask = None if attention_mask is None else attention_mask[..., :key.codes.shape[2]]
    out: Tensor = torch.ops.qpass.cache_attention(query, key.codes, key.scale, value.codes, value.scale, mask, key.kind,
                                                  causal, float(scaling), float(softcap or 0.0))
    return out, None


def _first(cached: Cached, tokens: int | None) -> Cached:
    if tokens is None:
        return cached
    scale = cached.scale if cached.scale.shape[2] == 1 else cached.scale[:, :, :tokens]
    return Cached(cached.codes[:, :, :tokens], scale, cached.kind)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
