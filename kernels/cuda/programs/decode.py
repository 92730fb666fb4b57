# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Decode: bytes of a packed weight in, numbers that a matrix product multiplies out, inside a Triton program.

Formats: `int4` and `int8` two's complement, `e2m1` (FP4), `e4m3` and `e5m2` (FP8), `book` (indices into 16 floats).
With FAST, 4-bit integers are unpacked by instructions that handle 2 or 4 of them at once, which Triton does not find
by itself; the plain lines beside them mean the same.
"""

import triton
import triton.language as tl

# Bytes b0..b3 -> the pairs (b0, b1), (b2, b3) of 16-bit floats. A nibble t in the low mantissa bits of 128.0 (bfloat16)
# or 1024.0 (float16), its sign bit flipped, is 136 + q or 1032 + q. 0x6A is (a & b) ^ c.
_TO_HALF = """{{
.reg .b32 t, u, c;
prmt.b32 t, $4, $4, 0x3120;
mov.b32 c, {bias};
lop3.b32 $0, t, 0x000F000F, {magic}, 0x6A;
shr.u32 u, t, 8;
lop3.b32 $1, u, 0x000F000F, {magic}, 0x6A;
shr.u32 u, t, 4;
lop3.b32 $2, u, 0x000F000F, {magic}, 0x6A;
shr.u32 u, t, 12;
lop3.b32 $3, u, 0x000F000F, {magic}, 0x6A;
{subtract}
}}"""
_BF16_ONE = "mov.b32 t, 0x3F803F80;\n"
_FMA = "\n".join(f"fma.rn.bf16x2 ${i}, ${i}, t, c;" for i in range(4))
_SUB = "\n".join(f"sub.f16x2 ${i}, ${i}, c;" for i in range(4))
# bfloat16 subtracts by fma with 1, for sub.bf16x2 needs sm_90; -136.0 is 0xC308, 1032.0 is 0x6408.
INT4_TO_BF16 = tl.constexpr(_TO_HALF.format(magic="0x43084308", bias="0xC308C308", subtract=_BF16_ONE + _FMA))
INT4_TO_FP16 = tl.constexpr(_TO_HALF.format(magic="0x64086408", bias="0x64086408", subtract=_SUB))
# q * 16 as int8: the nibble moved to the high half of its byte. Four at once; the product is 16 times too large.
INT4_TO_INT8 = tl.constexpr("""{
.reg .b32 t;
shl.b32 t, $2, 4;
and.b32 $0, t, 0xF0F0F0F0;
and.b32 $1, $2, 0xF0F0F0F0;
}""")


@triton.jit
def e2m1(code):
    """int32 codes 0..15 -> float32. The magnitude stands where a float32 has its exponent, 2^126 too small."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def e4m3(byte):
    """int32 bytes -> float32, 0x7F and 0xFF NaN; by integer arithmetic, for every GPU."""
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e5m2(byte):
    """int32 bytes -> float32: the high byte of a float16."""
    return (byte << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e8m0(byte):
    """int32 bytes -> float32 2^(byte - 127), 255 NaN."""
    bits = tl.where(byte == 0, 1 << 22, tl.where(byte == 255, 0x7FC00000, byte << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def halves(packed, book, FORMAT: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """uint8 [N, J] -> low and high nibbles as DTYPE [N, J]; int8 with FAST times 16, `book` in float32."""
    if FAST and FORMAT == "int4" and DTYPE == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(INT4_TO_BF16, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16),
                                              is_pure=True, pack=4)
    elif FAST and FORMAT == "int4" and DTYPE == tl.float16:
        low, high = tl.inline_asm_elementwise(INT4_TO_FP16, "=r,=r,=r,=r,r", [packed], (tl.float16, tl.float16),
                                              is_pure=True, pack=4)
    elif FAST and FORMAT == "int4" and DTYPE == tl.int8:
        low, high = tl.inline_asm_elementwise(INT4_TO_INT8, "=&r,=&r,r", [packed], (tl.int8, tl.int8),
                                              is_pure=True, pack=4)
    elif FORMAT == "int4":
        signed = packed.to(tl.int8, bitcast=True)
        low, high = ((signed << 4) >> 4).to(tl.int8), signed >> 4
        if DTYPE == tl.float8e4nv:
            low, high = low.to(tl.float32), high.to(tl.float32)
        low, high = low.to(DTYPE), high.to(DTYPE)
    elif FORMAT == "e2m1":
        low, high = e2m1((packed & 15).to(tl.int32)).to(DTYPE), e2m1((packed >> 4).to(tl.int32)).to(DTYPE)
    else:
        low, high = tl.load(book + (packed & 15).to(tl.int32)), tl.load(book + (packed >> 4).to(tl.int32))
    return low, high


@triton.jit
def whole(byte, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes [N, J] (int8, or uint8 of a float8) -> DTYPE [N, J]."""
    if FORMAT == "int8":
        value = byte if DTYPE == tl.int8 else byte.to(DTYPE)
    elif DTYPE == tl.float8e4nv:
        value = byte.to(tl.float8e4nv, bitcast=True)
    elif FORMAT == "e4m3":
        value = e4m3(byte.to(tl.int32)).to(DTYPE)
    else:
        value = e5m2(byte.to(tl.int32)).to(DTYPE)
    return value
