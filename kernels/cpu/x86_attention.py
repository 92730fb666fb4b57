"""Attention over a quantized cache on x86: what the native kernel refuses, and its call through the C ABI.

A graph has one call a layer and token here, so ctypes' microseconds do not show; the library needs no torch for it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qpass.kernels.cpu import native
from qpass.kernels.isa import machine_refuses

KINDS = {"int8": 0, "fp8": 1, "int4": 2}
MOST_ROWS = 32  # of queries: for more, decoding the cache once and a matrix product are faster


class _Cached(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("scale", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("batch", "head", "token", "scale_batch", "scale_head",
                                                      "scale_token", "scale_group", "bytes", "scales", "groups")),
                ("scale_dtype", ctypes.c_int32), ("unused", ctypes.c_int32)]


def refuses(query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor, mask: Tensor | None,
            kind: str) -> str | None:
    """Why the native kernel does not take these, or None."""
    if query.device.type != "cpu":
        return f"runs on the CPU, the query is on {query.device}"
    if (why := machine_refuses("avx2") or native.refuses("cache")) is not None:
        return why
    if query.dtype not in native.dtype_index():
        return f"takes float32, bfloat16 and float16, got {query.dtype}"
    if query.shape[2] > MOST_ROWS:
        return f"is for at most {MOST_ROWS} tokens at a time, got {query.shape[2]}"
    for codes, scale in ((keys, key_scale), (values, value_scale)):
        size = codes.shape[-1] * (2 if kind == "int4" else 1)
        if size % (16 if kind == "int4" else 8) or (size // scale.shape[-1]) % 8:
            return f"needs heads and groups of a multiple of 8, got {size} and {size // scale.shape[-1]}"
        if codes.stride(-1) != 1 or codes.numel() == 0:
            return "needs codes of a head side by side"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, torch.bfloat16, torch.float16):
        return f"takes masks of bool and float, got {mask.dtype}"
    return native.prepare("cache")


def cache_attention_x86(query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor,
                        mask: Tensor | None, kind: str, causal: bool, scaling: float, softcap: float) -> Tensor:
    """As the reference, without a copy of the cache in float."""
    q = query.contiguous()
    b, heads, m, d = q.shape
    s, dv = keys.shape[2], values.shape[-1] * (2 if kind == "int4" else 1)
    out = torch.empty(b, m, heads, dv, dtype=q.dtype)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask.expand(b, heads, m, mask.shape[-1])
        mask = mask if mask.stride(-1) == 1 or mask.shape[-1] == 1 else mask.contiguous()
    strides = (0, 0, 0) if mask is None else mask.stride()[:3]
    count = 0 if mask is None else _span(mask)
    k, v = _cached(keys, key_scale), _cached(values, value_scale)
    native.succeed(native.library("cache").qp_attention(
        native.attention_isa(), q.data_ptr(), native.dtype_index()[q.dtype],
        (ctypes.c_int64 * 7)(b, heads, keys.shape[1], m, s, d, dv), KINDS[kind], ctypes.byref(k), ctypes.byref(v),
        None if mask is None else mask.data_ptr(),
        0 if mask is None else 1 if mask.dtype == torch.bool else 2, (ctypes.c_int64 * 3)(*strides), count,
        int(causal), scaling, softcap, out.data_ptr(), torch.get_num_threads()), "cache")
    return out


def _cached(codes: Tensor, scale: Tensor) -> _Cached:
    steps = [0 if size == 1 else step for size, step in zip(scale.shape, scale.stride(), strict=True)]
    return _Cached(codes=codes.data_ptr(), scale=scale.data_ptr(), batch=codes.stride(0), head=codes.stride(1),
                   token=codes.stride(2), scale_batch=steps[0], scale_head=steps[1], scale_token=steps[2],
                   scale_group=steps[3], bytes=_span(codes), scales=_span(scale), groups=scale.shape[-1],
                   scale_dtype=native.dtype_index()[scale.dtype])


def _span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
