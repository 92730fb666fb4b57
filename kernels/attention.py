"""Attention: queries, keys and values as a graph has them in, the op that computes it out, or why there is none."""

from __future__ import annotations

from torch import Tensor
from torch._ops import OpOverload

from qpass.kernels.cpu import native, x86_float_attention


def native_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[OpOverload, int] | str:
    """An op of (query, key, value, mask, causal, scale), as `kernels/reference/attention.py` says, and what it takes
    behind them; or a refusal.

    The tensors may be fake, their sizes symbols: no question is asked of a symbol.
    """
    return x86_float_attention.refuses(query, key, value, mask) or (x86_float_attention.OP, native.attention_isa())


DECIDES = (native_attention, native.attention_isa, x86_float_attention.refuses)
"""What chooses the op: a compiler's cache key holds their sources."""
