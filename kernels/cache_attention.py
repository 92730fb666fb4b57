"""The op `qpass::cache_attention`: queries and a quantized cache in, outputs out; native where it can be."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.kernels.cpu import x86_attention
from qpass.kernels.cuda import attention as cuda_attention
from qpass.kernels.reference.cache_attention import cache_attention as reference


@torch.library.custom_op("qpass::cache_attention", mutates_args=())
def cache_attention(query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
                    mask: Tensor | None, kind: str, causal: bool, scaling: float, softcap: float) -> Tensor:
    """query [B, Hq, M, D] -> [B, M, Hq, Dv]; see qpass.kernels.reference.cache_attention."""
    if query.device.type == "cuda":
        why, native = cuda_attention.refuses(query, keys, values), cuda_attention.cache_attention_triton
    else:
        why = x86_attention.refuses(query, keys, key_scale, values, value_scale, mask, kind)
        native = x86_attention.cache_attention_x86
    run = native if why is None else reference
    return run(query, keys, key_scale, values, value_scale, mask, kind, causal, scaling, softcap)


@cache_attention.register_fake
def _(query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor, mask: Tensor | None,
      kind: str, causal: bool, scaling: float, softcap: float) -> Tensor:
    size = values.shape[-1] * (2 if kind == "int4" else 1)
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], size)
