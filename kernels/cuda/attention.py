"""Attention over a cache of 8-bit keys and values: query, codes and scales in, the weighted values out, on a GPU.

`attend_quantized` is what a cache calls; it takes plain tensors. Scales are one for each key, of each head; a scale of
a head, or of everything, is such a tensor that was expanded. A scale of each channel belongs on the query before
(q * k_scale) and on the result after.
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


def attention_refuses(q: Tensor, k: Tensor) -> str | None:
    """Why the program cannot run on these, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16 queries, not {str(q.dtype).removeprefix('torch.')}"
    if k.dtype not in (torch.int8, torch.float8_e4m3fn):
        return f"reads int8 or float8_e4m3fn keys, not {str(k.dtype).removeprefix('torch.')}"
    if q.shape[-1] > 256:
        return f"takes heads of up to 256 numbers, got {q.shape[-1]}"
    if (why := needs(80, q.device, "tensor cores that Triton uses")) is not None:
        return why
    return triton_refuses()


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
    if (why := attention_refuses(q, k)) is not None:
        raise NoKernel(f"attention over 8-bit keys {why}; dequantize the cache, or keep it in float")
    batch, heads, keys, size = k.shape
    if (v.shape != k.shape or v.dtype != k.dtype or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != size
            or lengths.shape != (batch,)):
        found = ", ".join(str(tuple(t.shape)) for t in (q, k, v, lengths))
        raise ValueError("attention takes q [B, heads * shared, L, D], k and v [B, heads, S, D] of one dtype and "
                         f"lengths [B]; got {found}")
    parts = parts_of(batch * heads, rows_of(keys), capability_of(q.device) or 90)
    acc, top, total = _parts(q, k, k_scale.expand(batch, heads, keys), v, v_scale.expand(batch, heads, keys), lengths,
                             parts, 1 / math.sqrt(size) if scale is None else scale)
    highest = top.amax(0)
    share = torch.exp(top - highest)
    whole = (total * share).sum(0)
    out = (acc * share.unsqueeze(-1)).sum(0) / torch.where(whole > 0, whole, 1.0).unsqueeze(-1)
    return out.view(q.shape).to(q.dtype)


def parts_of(programs: int, keys: int, capability: int) -> int:
    """Into how many parts the keys are split, so that two programs fall on each multiprocessor."""
    wanted, parts = 2 * PROCESSORS.get(capability, 108), 1
    while parts < 64 and programs * parts * 2 <= wanted and keys >= parts * 2 * 4 * _STEP:
        parts *= 2
    return parts


def _parts(q: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, lengths: Tensor, parts: int,
           factor: float) -> tuple[Tensor, Tensor, Tensor]:
    from qpass.kernels.cuda.programs.attention import attend
    from qpass.kernels.cuda.programs.launcher import language, launcher

    batch, heads, keys, size = k.shape
    queries, shared = q.shape[2], q.shape[1] // heads
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    rows = shared * queries
    top, total = (q.new_empty((parts, batch, heads, rows), dtype=torch.float32) for _ in range(2))
    acc = q.new_empty((parts, batch, heads, rows, size), dtype=torch.float32)
    block_r = 16 if rows_of(rows) <= 16 else 64
    each = -(-keys // (parts * _STEP)) * _STEP
    with on_device(q):
        launcher(attend)[(batch * heads, parts * -(-rows // block_r))](
            q, _bytes(k), _bytes(v), k_scale, v_scale, lengths.int(), acc, top, total, queries, size, heads, keys, each,
            factor, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_scale.stride(), *v_scale.stride(),
            SHARED=shared, FORMAT="int8" if k.dtype == torch.int8 else "e4m3", DTYPE=language(q.dtype, q.device),
            BLOCK_R=block_r, BLOCK_S=_STEP, BLOCK_D=max(16, 1 << (size - 1).bit_length()), num_warps=4, num_stages=2)
    return acc, top, total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.int8 else tensor.view(torch.uint8)
