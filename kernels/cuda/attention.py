"""Attention over a cache of 8-bit keys and values: query, codes and scales in, the weighted values out, on a GPU.

`cache_attention_triton` takes what an 8-bit cache of a model holds; `attend_quantized` takes sequences of different
lengths. Neither makes a float copy of the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpass.errors import NoKernel
from qpass.kernels.cuda.capability import capability_of, needs, triton_refuses
from qpass.kernels.cuda.configs import PROCESSORS, rows_of
from qpass.kernels.cuda.launch import on_device

_STEP = 64  # keys of one step
_MOST_ROWS = 32  # of queries: for more, decoding the cache once and torch's own attention are quicker
_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


def attention_refuses(q: Tensor, k: Tensor) -> str | None:
    """Why the program cannot run on these, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16 queries, not {str(q.dtype).removeprefix('torch.')}"
    if k.dtype not in _FORMATS:
        return f"reads int8 or float8_e4m3fn keys, not {str(k.dtype).removeprefix('torch.')}"
    if q.shape[-1] > 256 or k.shape[-1] != q.shape[-1]:
        return f"takes heads of up to 256 numbers, all of one size, got {q.shape[-1]} and {k.shape[-1]}"
    if (why := needs(80, q.device, "tensor cores that Triton uses")) is not None:
        return why
    return triton_refuses()


def refuses(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why `cache_attention_triton` is not for these, or None."""
    if query.shape[2] > _MOST_ROWS:
        return f"is for at most {_MOST_ROWS} tokens at a time, got {query.shape[2]}"
    if keys.shape != values.shape or keys.dtype != values.dtype:
        return f"takes keys and values of one shape and dtype, got {tuple(keys.shape)} and {tuple(values.shape)}"
    return attention_refuses(query, keys)


def attend_quantized(q: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, lengths: Tensor,
                     scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale, causal) v for the last L positions of each sequence.

    q        floating [B, heads * shared, L, D]; query i of a sequence of length n stands at position n - L + i
    k, v     int8 or float8_e4m3fn [B, heads, S, D], numbers of a row next to each other
    scales   floating, broadcasting to [B, heads, S]: key = codes * scale
    lengths  integer [B], how many of the S keys each sequence has; a query that sees none gives 0
    scale    1 / sqrt(D) if None

    Returns [B, heads * shared, L, D] in q's dtype. Raises NoKernel where it cannot run, ValueError for odd shapes.
    """
    _check(q, k, v)
    batch, heads, keys, size = k.shape
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be [{batch}], one for each sequence, got {tuple(lengths.shape)}")
    scales = [s.expand(batch, heads, keys).unsqueeze(-1) for s in (k_scale, v_scale)]
    factor = 1 / math.sqrt(size) if scale is None else scale
    return _attend(q, k, scales[0], v, scales[1], lengths.int(), None, True, factor, 0.0).to(q.dtype)


def cache_attention_triton(query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
                           mask: Tensor | None, kind: str, causal: bool, scaling: float, softcap: float) -> Tensor:
    """query [B, Hq, M, D] -> [B, M, Hq, D] in its dtype.

    keys, values  codes of `kind` int8 or fp8 [B, Hkv, S, D]; Hq / Hkv heads of queries share one of keys
    scales        floating, broadcasting to [B, Hkv, S, G], each for D / G numbers of a head
    mask          bool (False hides) or float (added), broadcast to [B, Hq, M, S]; None shows all
    causal        row m sees the keys up to S - M + m
    softcap       scores become softcap * tanh(score / softcap) before the mask; 0 leaves them

    A row that sees nothing gives 0. Raises NoKernel where it cannot run, ValueError for odd shapes.
    """
    _check(query, keys, values)
    batch, heads, count, _ = keys.shape
    scales = [s.expand(batch, heads, count, s.shape[-1]) for s in (key_scale, value_scale)]
    if mask is not None:
        mask = mask.expand(batch, query.shape[1], query.shape[2], count)
    out = _attend(query, keys, scales[0], values, scales[1], None, mask, causal, scaling, softcap)
    return out.to(query.dtype).transpose(1, 2).contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (why := attention_refuses(q, k)) is not None:
        raise NoKernel(f"attention over 8-bit keys {why}; dequantize the cache, or keep it in float")
    if v.shape != k.shape or v.dtype != k.dtype or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        found = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError("attention takes queries [B, heads * shared, L, D], keys and values [B, heads, S, D] of one "
                         f"dtype; got {found}")


def parts_of(programs: int, keys: int, capability: int) -> int:
    """Into how many parts the keys are split, so that two programs fall on each multiprocessor."""
    wanted, parts = 2 * PROCESSORS.get(capability, 108), 1
    while parts < 64 and programs * parts * 2 <= wanted and keys >= parts * 2 * 4 * _STEP:
        parts *= 2
    return parts


def _attend(q: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, lengths: Tensor | None,
            mask: Tensor | None, causal: bool, factor: float, softcap: float) -> Tensor:
    """float32 [B, heads * shared, L, D]; scales [B, heads, S, G] and mask are read by their strides."""
    from qpass.kernels.cuda.programs.attention import attend
    from qpass.kernels.cuda.programs.launcher import language, launcher

    batch, heads, keys, size = k.shape
    queries, shared = q.shape[2], q.shape[1] // heads
    rows = shared * queries
    if 0 in (batch, heads, keys, rows):
        return q.new_zeros(q.shape, dtype=torch.float32)
    parts = parts_of(batch * heads, rows_of(keys), capability_of(q.device) or 90)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    top, total = (q.new_empty((parts, batch, heads, rows), dtype=torch.float32) for _ in range(2))
    acc = q.new_empty((parts, batch, heads, rows, size), dtype=torch.float32)
    block_r = 16 if rows_of(rows) <= 16 else 64
    each = -(-keys // (parts * _STEP)) * _STEP
    groups = [0 if s.shape[-1] == 1 else size // s.shape[-1] for s in (k_scale, v_scale)]
    shown = None if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    with on_device(q):
        launcher(attend)[(batch * heads, parts * -(-rows // block_r))](
            q, _bytes(k), _bytes(v), k_scale, v_scale, lengths, shown, acc, top, total, queries, size, heads, keys,
            each, float(factor), float(softcap), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_scale.stride(),
            *v_scale.stride(), *((0, 0, 0, 0) if mask is None else mask.stride()), SHARED=shared,
            FORMAT=_FORMATS[k.dtype], DTYPE=language(q.dtype, q.device), CAUSAL=causal,
            BOOL_MASK=mask is not None and mask.dtype == torch.bool, SOFTCAP=softcap != 0, K_GROUP=groups[0],
            V_GROUP=groups[1], BLOCK_R=block_r, BLOCK_S=_STEP, BLOCK_D=max(16, 1 << (size - 1).bit_length()),
            num_warps=4, num_stages=2)
    highest = top.amax(0)
    share = torch.exp(top - highest)
    whole = (total * share).sum(0)
    out = (acc * share.unsqueeze(-1)).sum(0) / torch.where(whole > 0, whole, 1.0).unsqueeze(-1)
    return out.view(q.shape)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.int8 else tensor.view(torch.uint8)
