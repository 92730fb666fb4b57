"""Attention over float keys and values on x86: what the native op of csrc/attention_float.cpp refuses, and the op."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.kernels.cpu import native, x86_ops
from qpass.kernels.isa import machine_has, machine_refuses

OP = x86_ops.OPS.attention.default
FEW_ROWS = 32  # of queries: what a step of decoding has, with guessed tokens


def refuses(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why the native op does not take these, real or fake, or None. No size that is a symbol is asked for a number."""
    if query.device.type != "cpu":
        return f"runs on the CPU, the query is on {query.device}"
    if (why := machine_refuses("avx2") or native.refuses("attention")) is not None:
        return why
    if query.dtype not in native.dtype_index() or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"takes one of float32, bfloat16 and float16, got {query.dtype}, {key.dtype} and {value.dtype}"
    for what, size in (("keys", query.shape[-1]), ("values", value.shape[-1])):
        if not isinstance(size, int) or size % 8:
            return f"needs heads of a multiple of 8, those of the {what} have {size}"
    heads, shared = query.shape[1], key.shape[1]
    if not isinstance(heads, int) or not isinstance(shared, int) or heads % shared:
        return f"needs heads of queries that share those of keys evenly, got {heads} and {shared}"
    if mask is not None and mask.dtype not in x86_ops.MASKS:
        return f"takes masks of bool, float32, bfloat16 and float16, got {mask.dtype}"
    few = isinstance(query.shape[2], int) and query.shape[2] <= FEW_ROWS
    if query.dtype != torch.float32 and "avx512_vnni" in machine_has() and not few:
        # PyTorch multiplies 16 bits with what the machine has for them: the native op is 6 times as fast for one query
        # and level at 32, but half as fast for a prompt; in float32 it is always faster (tests/bench/NOTES.md).
        return f"is for at most {FEW_ROWS} queries of 16 bits on machines with AVX512, got {query.shape[2]}"
    return native.prepare("attention")
