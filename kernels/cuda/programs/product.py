# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Product: y[m, n] = sum over k of x[m, k] w[n, k], with packed weights of any format, as one Triton program.

One launch multiplies with one weight, or with up to three of the same numbers (q, k, v; gate, up), or, GROUPED, sorted
rows with the experts that they chose. Weights are the first operand of each dot, so that a few rows of x are the narrow
side and decoded weights reach the tensor cores from registers. Sums of a group are exact (int32) or float32 and are
scaled into a float32 sum; with SPLITS > 1 each part of K gives a float32 sum of its own, which the caller adds up in
order.

Packed weights are described in kernels/cuda/layouts.py: HALVES are tiles of 16 rows x 64 inputs of 4 bits.
"""

import triton
import triton.language as tl

from qpass.kernels.cuda.programs.decode import e4m3, e8m0, halves, whole


@triton.jit
def _dot(w, x, EXACT: tl.constexpr):
    """w [N, J], x [J, M] -> float32 or int32 [N, M]."""
    if w.dtype == tl.int8:
        y = tl.dot(w, x, out_dtype=tl.int32)
    elif w.dtype == tl.float8e4nv:
        # Hopper adds fp8 products with 14 bits; after each step of K the sum goes on in float32.
        y = tl.dot(w, x, out_dtype=tl.float32, max_num_imprecise_acc=32)
    elif EXACT:
        y = tl.dot(w, x, out_dtype=tl.float32, input_precision="ieee")
    else:
        y = tl.dot(w, x, out_dtype=tl.float32)
    return y


@triton.jit
def _scale(s, g, rows, scale_rows, SCALES: tl.constexpr, ROWS: tl.constexpr):
    """The scales of group `g` for weight rows `rows`, float32 [N]; one for ROWS rows."""
    at = s + g.to(tl.int64) * scale_rows + rows // ROWS
    if SCALES == "e8m0":
        value = e8m0(tl.load(at).to(tl.int32))
    elif SCALES == "e4m3":
        value = e4m3(tl.load(at).to(tl.int32))
    else:
        value = tl.load(at).to(tl.float32)
    return value


@triton.jit
def _add(acc, w, x, s, z, xs, g, rows, scale_rows, x_rows, x_groups, GROUP: tl.constexpr, SCALES: tl.constexpr,
         ROWS: tl.constexpr, ZERO: tl.constexpr, X_GROUP: tl.constexpr, EXACT: tl.constexpr, TIMES: tl.constexpr):
    """acc + the part of group `g`: w [N, J] decoded and TIMES too large, x [J, M]."""
    if SCALES == "integer":  # multipliers times 4-bit codes still fit int8
        w = (w * tl.load(s + g.to(tl.int64) * scale_rows + rows)[:, None]).to(tl.int8)
    part = _dot(w, x, EXACT)
    if ZERO and w.dtype == tl.int8:
        total = tl.sum(x.to(tl.int32), axis=0)
        zero = tl.load(z + g.to(tl.int64) * scale_rows + rows).to(tl.int32) * TIMES
        part -= zero[:, None] * total[None, :]
    if GROUP and SCALES != "integer":
        part = part.to(tl.float32) * _scale(s, g, rows, scale_rows, SCALES, ROWS)[:, None]
        if X_GROUP:
            part *= tl.load(xs + x_rows * x_groups + g * GROUP // X_GROUP)[None, :]
    return acc + part


@triton.jit
def _shifted(w, z, g, rows, scale_rows, ZERO: tl.constexpr):
    """w less its zero point, which floats of 8 bits and more hold exactly; int8 is corrected in `_add`."""
    if ZERO and w.dtype != tl.int8:
        zero = tl.load(z + g.to(tl.int64) * scale_rows + rows)[:, None]
        if w.dtype == tl.float8e4nv:
            w = (w.to(tl.float32) - zero.to(tl.float32)).to(tl.float8e4nv)
        else:
            w = w - zero.to(w.dtype)
    return w


@triton.jit(do_not_specialize=["m", "steps_each"])
def product(x, xs, xz, factor, book, slots, owners, w0, s0, z0, c0, b0, o0, w1, s1, z1, c1, b1, o1, w2, s2, z2, c2, b2,
            o2, m, k, n0, n1, n2, k_padded, rows0, rows1, rows2, steps_each, xs_stride, x_groups, w_expert, s_expert,
            z_expert, c_expert, b_expert, places,
            COUNT: tl.constexpr, FORMAT: tl.constexpr, HALVES: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
            SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, FACTOR: tl.constexpr, X_GROUP: tl.constexpr,
            GROUPED: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers: x [m, k]; xs, xz of its rows; of each weight i: w, s scales, z zero points, c column sums or channel
    scales, b bias, o output [m, n]; `rows` is the length of a row of s and z. Those that do not apply are None."""
    blocks0 = tl.cdiv(n0, BLOCK_N)
    blocks = blocks0
    if COUNT > 1:
        blocks += tl.cdiv(n1, BLOCK_N)
    if COUNT > 2:
        blocks += tl.cdiv(n2, BLOCK_N)
    # Programs that run together share weights: all rows of x, up to 8 blocks of them, then the next rows of weights.
    pid = tl.program_id(0)
    blocks_m = tl.num_programs(0) // blocks
    band = pid // (8 * blocks)
    in_band = tl.minimum(blocks_m - band * 8, 8)
    block_m = band * 8 + (pid % (8 * blocks)) % in_band
    block_n = (pid % (8 * blocks)) // in_band

    w, s, z, c, b, o, n, scale_rows = w0, s0, z0, c0, b0, o0, n0, rows0
    if COUNT > 1:
        if block_n >= blocks0:
            w, s, o, n, scale_rows = w1, s1, o1, n1, rows1
            if z0 is not None:
                z = z1
            if c0 is not None:
                c = c1
            if b0 is not None:
                b = b1
            block_n -= blocks0
            if COUNT > 2:
                blocks1 = tl.cdiv(n1, BLOCK_N)
                if block_n >= blocks1:
                    w, s, o, n, scale_rows = w2, s2, o2, n2, rows2
                    if z0 is not None:
                        z = z2
                    if c0 is not None:
                        c = c2
                    if b0 is not None:
                        b = b2
                    block_n -= blocks1

    rm = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if GROUPED:
        owner = tl.load(owners + block_m)
        if owner < 0:
            return
        w += owner.to(tl.int64) * w_expert
        s += owner.to(tl.int64) * s_expert
        if z0 is not None:
            z += owner.to(tl.int64) * z_expert
        if c0 is not None:
            c += owner.to(tl.int64) * c_expert
        if b0 is not None:
            b += owner.to(tl.int64) * b_expert
        rm = tl.load(slots + rm)
    valid = rm < m
    x_rows = tl.where(valid, rm // places if GROUPED else rm, 0).to(tl.int64)

    ZERO: tl.constexpr = z0 is not None
    rn = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wn = tl.minimum(rn, n - 1)
    first = tl.program_id(1) * steps_each
    last = tl.minimum(first + steps_each, tl.cdiv(k_padded, BLOCK_K))
    TIMES: tl.constexpr = 16 if FAST and HALVES and DTYPE == tl.int8 else 1
    WHOLE: tl.constexpr = GROUP == 0 or SCALES == "integer"
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if WHOLE and DTYPE == tl.int8 else tl.float32)
    if HALVES:
        j = tl.arange(0, BLOCK_K // 2)
        w_at = w + ((wn // 16).to(tl.int64) * (k_padded // 64) * 512 + (wn % 16) * 32)[:, None]
    else:
        j = tl.arange(0, BLOCK_K)
        w_at = w + (wn.to(tl.int64) * k_padded)[:, None]
    x_at = x + (x_rows * k)[None, :]
    for step in range(first, last):
        if HALVES:
            tile = step * (BLOCK_K // 64) + j // 32
            packed = tl.load(w_at + (tile * 512 + j % 32)[None, :], mask=(tile < k_padded // 64)[None, :], other=0)
            k_low = tile * 64 + j % 32
            x_low = tl.load(x_at + k_low[:, None], mask=(k_low < k)[:, None] & valid[None, :], other=0.0).to(DTYPE)
            inside = (k_low + 32 < k)[:, None] & valid[None, :]
            x_high = tl.load(x_at + k_low[:, None] + 32, mask=inside, other=0.0).to(DTYPE)
            g_low = step * BLOCK_K // GROUP if GROUP else step * 0
            # A half tile of nothing but padding has no group of its own; x is 0 there, and the last scale is finite.
            g_high = tl.minimum((step * BLOCK_K + 32) // GROUP, (k - 1) // GROUP) if GROUP and GROUP % 64 else g_low
            low, high = halves(packed, book, FORMAT, DTYPE, FAST)
            if FORMAT == "book":  # two parts each, for 16 bits do not hold the numbers of the book
                low_part, high_part = low.to(DTYPE), high.to(DTYPE)
                rest_low, rest_high = low - low_part.to(tl.float32), high - high_part.to(tl.float32)
                acc = _add(acc, rest_low.to(DTYPE), x_low, s, z, xs, g_low, wn, scale_rows, x_rows, x_groups, GROUP,
                           SCALES, SCALE_ROWS, False, X_GROUP, EXACT, 1)
                acc = _add(acc, rest_high.to(DTYPE), x_high, s, z, xs, g_high, wn, scale_rows, x_rows, x_groups, GROUP,
                           SCALES, SCALE_ROWS, False, X_GROUP, EXACT, 1)
                low, high = low_part, high_part
            if GROUP == 16:  # four groups in a tile; the scaled number is exact in 16 bits, so it is scaled first
                g = tile * 4 + (j % 32) // 16
                at = s + g.to(tl.int64)[None, :] * scale_rows + wn[:, None]
                s_low = tl.load(at, mask=(g < k // 16)[None, :], other=0).to(tl.int32)
                s_high = tl.load(at + 2 * scale_rows, mask=(g + 2 < k // 16)[None, :], other=0).to(tl.int32)
                low *= e4m3(s_low).to(DTYPE)
                high *= e4m3(s_high).to(DTYPE)
                acc += _dot(low, x_low, EXACT) + _dot(high, x_high, EXACT)
            else:
                low = _shifted(low, z, g_low, wn, scale_rows, ZERO)
                high = _shifted(high, z, g_high, wn, scale_rows, ZERO)
                acc = _add(acc, low, x_low, s, z, xs, g_low, wn, scale_rows, x_rows, x_groups, GROUP, SCALES,
                           SCALE_ROWS, ZERO, X_GROUP, EXACT, TIMES)
                acc = _add(acc, high, x_high, s, z, xs, g_high, wn, scale_rows, x_rows, x_groups, GROUP, SCALES,
                           SCALE_ROWS, ZERO, X_GROUP, EXACT, TIMES)
        else:
            rk = step * BLOCK_K + j
            byte = tl.load(w_at + rk[None, :], mask=(rk < k_padded)[None, :], other=0)
            some = tl.load(x_at + rk[:, None], mask=(rk < k)[:, None] & valid[None, :], other=0.0).to(DTYPE)
            g = step * BLOCK_K // GROUP if GROUP else step * 0
            number = _shifted(whole(byte, FORMAT, DTYPE), z, g, wn, scale_rows, ZERO)
            acc = _add(acc, number, some, s, z, xs, g, wn, scale_rows, x_rows, x_groups, GROUP, SCALES, SCALE_ROWS,
                       ZERO, X_GROUP, EXACT, 1)

    y = acc.to(tl.float32)
    if SCALES == "integer":
        y *= tl.load(c + wn)[:, None]
    elif GROUP == 0:
        y *= _scale(s, block_n * 0, wn, scale_rows, SCALES, SCALE_ROWS)[:, None]
    if TIMES > 1:
        y *= 1.0 / TIMES
    if FACTOR == "times":
        y *= tl.load(factor)
    elif FACTOR == "over":
        y *= 1.0 / tl.load(factor)
    if xz is not None:
        part = tl.load(xz + x_rows * xs_stride)[None, :] * tl.load(c + wn)[:, None]
        y -= tl.where(tl.program_id(1) == 0, part, 0.0)
    if xs is not None and not X_GROUP:
        y *= tl.load(xs + x_rows * xs_stride)[None, :]
    if b0 is not None:
        y += tl.load(b + wn).to(tl.float32)[:, None]
    if SPLIT:
        o += tl.program_id(1).to(tl.int64) * m * n
    at = o + rm.to(tl.int64)[None, :] * n + rn[:, None]
    tl.store(at, y.to(o.dtype.element_ty), mask=valid[None, :] & (rn < n)[:, None])
