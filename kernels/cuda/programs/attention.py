# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention: softmax(q k^T) v over a cache of 8-bit keys and values, as one Triton program, K split over programs.

Each program takes the query heads that share a key head, all L queries of them, and a part of the keys, and gives an
unscaled sum of values with the largest score and the sum of exponentials; the caller adds the parts up.
"""

import triton
import triton.language as tl

from qpass.kernels.cuda.programs.decode import e4m3


@triton.jit
def _number(byte, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    if FORMAT == "e4m3":
        value = e4m3(byte.to(tl.int32)).to(DTYPE)
    else:
        value = byte.to(DTYPE)
    return value


@triton.jit(do_not_specialize=["keys_each", "keys"])
def attend(q, k, v, k_scale, v_scale, lengths, mask, acc_out, top_out, sum_out, queries, size, heads, keys, keys_each,
           factor, softcap, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, ks_batch, ks_head,
           ks_row, ks_group, vs_batch, vs_head, vs_row, vs_group, m_batch, m_head, m_row, m_key,
           SHARED: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, CAUSAL: tl.constexpr,
           BOOL_MASK: tl.constexpr, SOFTCAP: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr,
           BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """q [B, heads * SHARED, queries, size]; k, v [B, heads, keys, size] bytes; scales by strides, [B, heads, keys,
    groups], GROUP numbers of a head sharing one, 0 for all; lengths int32 [B] or None; mask by strides, [B, heads *
    SHARED, queries, keys], or None; outputs float32 [parts, B, heads, SHARED * queries(, size)]."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    blocks_r = tl.cdiv(SHARED * queries, BLOCK_R)
    part, block_r = tl.program_id(1) // blocks_r, tl.program_id(1) % blocks_r
    r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < SHARED * queries
    d = tl.arange(0, BLOCK_D)
    length = keys
    if lengths is not None:
        length = tl.load(lengths + batch)
    position = length - queries + r % queries  # of each query among the keys: it sees those up to itself

    wide = batch.to(tl.int64)
    q_at = q + wide * q_batch + ((head * SHARED + r // queries).to(tl.int64) * q_head + (r % queries) * q_row)[:, None]
    query = tl.load(q_at + d[None, :], mask=inside[:, None] & (d < size)[None, :], other=0).to(DTYPE)
    k_at = k + wide * k_batch + head.to(tl.int64) * k_head
    v_at = v + wide * v_batch + head.to(tl.int64) * v_head
    ks_at, vs_at = k_scale + wide * ks_batch + head * ks_head, v_scale + wide * vs_batch + head * vs_head
    if mask is not None:
        mask_row = (head * SHARED + r // queries) * m_head + (r % queries) * m_row
        mask_at = mask + wide * m_batch + mask_row.to(tl.int64)[:, None]

    top = tl.full((BLOCK_R,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    first = part * keys_each
    for start in range(first, tl.minimum(first + keys_each, length), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        there = s < length
        rows = s.to(tl.int64)
        inner = there[None, :] & (d < size)[:, None]
        codes = tl.load(k_at + (rows * k_row)[None, :] + d[:, None], mask=inner, other=0)
        if K_GROUP:
            scale_at = ks_at + (rows * ks_row)[None, :] + (d // K_GROUP * ks_group)[:, None]
            scales = tl.load(scale_at, mask=inner, other=0).to(tl.float32)
            number = (_number(codes, FORMAT, tl.float32) * scales).to(DTYPE)
        else:
            number = _number(codes, FORMAT, DTYPE)
        score = tl.dot(query, number, out_dtype=tl.float32, input_precision="ieee") * factor
        if not K_GROUP:
            score *= tl.load(ks_at + rows * ks_row, mask=there, other=0).to(tl.float32)[None, :]
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)  # softcap * tanh(score / softcap)
        seen = inside[:, None] & there[None, :]
        if CAUSAL:
            seen = seen & (s[None, :] <= position[:, None])
        if mask is not None:
            shown = tl.load(mask_at + (rows * m_key)[None, :], mask=seen, other=0)
            if BOOL_MASK:
                seen = seen & (shown != 0)
            else:
                score += shown.to(tl.float32)
                seen = seen & (score > -1e30)
        score = tl.where(seen, score, -1e30)
        higher = tl.maximum(top, tl.max(score, axis=1))
        p = tl.where(seen, tl.exp(score - higher[:, None]), 0.0)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        inner = there[:, None] & (d < size)[None, :]
        values = tl.load(v_at + (rows * v_row)[:, None] + d[None, :], mask=inner, other=0)
        if V_GROUP:
            scale_at = vs_at + (rows * vs_row)[:, None] + (d // V_GROUP * vs_group)[None, :]
            scales = tl.load(scale_at, mask=inner, other=0).to(tl.float32)
            number = (_number(values, FORMAT, tl.float32) * scales).to(DTYPE)
        else:
            number = _number(values, FORMAT, DTYPE)
            p *= tl.load(vs_at + rows * vs_row, mask=there, other=0).to(tl.float32)[None, :]
        acc = acc * shrink[:, None] + tl.dot(p.to(DTYPE), number, out_dtype=tl.float32, input_precision="ieee")
        top = higher
    at = ((part * (tl.num_programs(0) // heads) + batch) * heads + head).to(tl.int64) * SHARED * queries + r
    tl.store(top_out + at, top, mask=inside)
    tl.store(sum_out + at, total, mask=inside)
    tl.store(acc_out + at[:, None] * size + d[None, :], acc, mask=inside[:, None] & (d < size)[None, :])
