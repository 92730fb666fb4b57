// Weights of decoded.h as bf16 tiles, and what takes them there: one Source (amx_float_block.h) for each kind of code.
//
// A value of a table is the sum of one to three bf16. A scale that is a power of two, or an e4m3 that a value times it needs
// at most 8 bits for, becomes part of the weight, so that there is nothing to scale; any other scales a group's sums.
#pragma once
#include "amx_floats.h"
#include "decoded.h"

namespace qpass {
namespace {

// 16 scales of any dtype of decoded.h.
QPASS_AMX_INLINE __m512 scales_any(const void* p, DType dtype, int64_t i) {
  if ((int32_t)dtype <= 2) return load_floats(p, dtype, i, 0xffff);
  const __m128i bytes = _mm_loadu_si128((const __m128i*)((const uint8_t*)p + i));
  const __m512i v = _mm512_cvtepu8_epi32(bytes);
  if (dtype == kE4m3) {
    const __m512i top = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 4);
    const __m512i bits = _mm512_and_si512(top, _mm512_set1_epi32((int)0x87f00000u));
    return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
  }
  if (dtype == kInt8) return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24));
  const __m512i one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(254);
  __m512i bits = _mm512_slli_epi32(v, 23);
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmplt_epi32_mask(v, one), _mm512_set1_epi32(1 << 22));  // 2^-127
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmplt_epi32_mask(most, v), _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(bits);
}

// What all sources have in common. Groups are multiples of 32 inputs, or the row.
struct DecodedSource {
  const Decoded& w;
  const uint8_t* q;
  const float* gain;
  int64_t N, blocks, total, runs;

  explicit DecodedSource(const Decoded& w)
      : w(w), q(w.q), gain(w.gain), N(w.N), blocks(w.Kp / 64), total((w.K + 31) / 32),
        runs(w.groups == 1 ? total : w.group_size / 32) {}
  QPASS_AMX_MEMBER void choose(int64_t) {}
  QPASS_AMX_MEMBER __m512 scales(int64_t block, int64_t group) const {
    return scales_any(w.scale, w.scale_dtype, (block * w.groups + group) * 16);
  }
};

// Scales that are powers of two, one for each run of 32 inputs: added to the exponents of weights, unless one of 32 outputs
// is so large or small, or no number, that this could leave bf16's range. Those outputs' sums are scaled.
struct PowerSource : DecodedSource {
  bool folded = false;

  explicit PowerSource(const Decoded& w) : DecodedSource(w) {}
  QPASS_AMX_MEMBER void choose(int64_t block) {
    const uint8_t* at = (const uint8_t*)w.scale + block * w.groups * 16;
    const __m512i low = _mm512_set1_epi32(67), high = _mm512_set1_epi32(187);
    __mmask16 outside = 0;
    for (int64_t i = 0; i < 2 * w.groups; i++) {
      const __m512i s = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(at + i * 16)));
      outside |= _mm512_cmplt_epi32_mask(s, low) | _mm512_cmplt_epi32_mask(high, s);
    }
    folded = outside == 0;
    runs = folded ? total : 1;
  }
  QPASS_AMX_MEMBER __m512 scales(int64_t block, int64_t group) const {
    return folded ? _mm512_set1_ps(1.f) : DecodedSource::scales(block, group);
  }
  // What is to be added to the 16 outputs' weights of a run; inputs from K on are 0, whatever is added.
  QPASS_AMX_MEMBER __m512i exponents(int64_t block, int64_t run) const {
    if (!folded) return _mm512_setzero_si512();
    const uint8_t* at = (const uint8_t*)w.scale + (block * w.groups + (run < total ? run : total - 1)) * 16;
    const __m512i s = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
    const __m512i e = _mm512_slli_epi32(_mm512_sub_epi32(s, _mm512_set1_epi32(127)), 7);
    return _mm512_or_si512(_mm512_and_si512(e, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(e, 16));
  }
};

// 16 floats as `parts` tables of bf16, each twice; returns whether they are their sums.
inline bool split_table(const float* table, int parts, uint16_t (*to)[32]) {
  bool exact = true;
  for (int c = 0; c < 16; c++) {
    float left = table[c];
    for (int i = 0; i < parts; i++) {
      to[i][c] = to[i][c + 16] = to_bf16(left);
      left -= from_bf16(to[i][c]);
    }
    exact = exact && left == 0;
  }
  return exact;
}

// A line of nibbles to rows 2r and 2r + 1 of the tiles of two runs.
QPASS_AMX_INLINE void look_up(__m512i line, __m512i table, __m512i (&found)[4]) {
  found[0] = _mm512_permutexvar_epi16(line, table);
  found[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), table);
  found[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4), table);
  found[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), table);
}

template <int PARTS>
struct TableSource : DecodedSource {
  static constexpr int64_t kBytes = 512;
  static constexpr int kParts = PARTS;
  alignas(64) uint16_t table[PARTS][32];

  explicit TableSource(const Decoded& w) : DecodedSource(w) { split_table(w.table, PARTS, table); }
  QPASS_AMX_MEMBER void piece(int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles) const {
    const uint8_t* at = q + (block * blocks + k) * kBytes;
    for (int part = 0; part < PARTS; part++) {
      const __m512i values = _mm512_load_si512(table[part]);
      int8_t *first = tiles + part * kTile, *second = first + PARTS * kTile;
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        __m512i found[4];
        if (part == 0) _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
        look_up(_mm512_loadu_si512(at + r * 64), values, found);
        _mm512_store_si512(first + r * 128, found[0]);
        _mm512_store_si512(first + r * 128 + 64, found[1]);
        _mm512_store_si512(second + r * 128, found[2]);
        _mm512_store_si512(second + r * 128 + 64, found[3]);
      }
    }
  }
};

// Exponents are added to what is not zero.
QPASS_AMX_INLINE __m512i with_exponents(__m512i values, __m512i exponents) {
  const __mmask32 there = _mm512_test_epi16_mask(values, _mm512_set1_epi32(0x7fff7fff));
  return _mm512_mask_add_epi16(values, there, values, exponents);
}

struct PowerTableSource : PowerSource {
  static constexpr int64_t kBytes = 512;
  static constexpr int kParts = 1;
  alignas(64) uint16_t table[1][32];

  explicit PowerTableSource(const Decoded& w) : PowerSource(w) { split_table(w.table, 1, table); }
  QPASS_AMX_MEMBER void piece(int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles) const {
    const uint8_t* at = q + (block * blocks + k) * kBytes;
    const __m512i values = _mm512_load_si512(table[0]);
    const __m512i low = exponents(block, 2 * k), high = exponents(block, 2 * k + 1);
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      __m512i found[4];
      _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
      look_up(_mm512_loadu_si512(at + r * 64), values, found);
      _mm512_store_si512(tiles + r * 128, with_exponents(found[0], low));
      _mm512_store_si512(tiles + r * 128 + 64, with_exponents(found[1], low));
      _mm512_store_si512(tiles + kTile + r * 128, with_exponents(found[2], high));
      _mm512_store_si512(tiles + kTile + r * 128 + 64, with_exponents(found[3], high));
    }
  }
};

// Values of at most 4 bits times e4m3 scales of 16 inputs each: at most 8 bits, exact in bf16.
struct ProductSource : DecodedSource {
  static constexpr int64_t kBytes = 512;
  static constexpr int kParts = 1;

  explicit ProductSource(const Decoded& w) : DecodedSource(w) { runs = total; }
  QPASS_AMX_MEMBER __m512 scales(int64_t, int64_t) const { return _mm512_set1_ps(1.f); }
  QPASS_AMX_MEMBER void piece(int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles) const {
    const uint8_t* at = q + (block * blocks + k) * kBytes;
    const __m512 values = _mm512_loadu_ps(w.table);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {  // lines 0..3 are the first group of a run, 4..7 the second
      __m512 scale[2];
      for (int h = 0; h < 2; h++) {
        const int64_t group = 4 * k + 2 * h + half;
        scale[h] = DecodedSource::scales(block, group < w.groups ? group : w.groups - 1);
      }
#pragma GCC unroll 4
      for (int r = 4 * half; r < 4 * half + 4; r++) {
        const __m512i line = _mm512_loadu_si512(at + r * 64);
        _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
#pragma GCC unroll 2
          for (int p = 0; p < 2; p++) {
            const __m512i first = _mm512_srli_epi32(line, (unsigned)(8 * p + 4 * h));
            const __m512i second = _mm512_srli_epi32(line, (unsigned)(8 * p + 16 + 4 * h));
            const __m512 w0 = _mm512_mul_ps(_mm512_permutexvar_ps(first, values), scale[h]);
            const __m512 w1 = _mm512_mul_ps(_mm512_permutexvar_ps(second, values), scale[h]);
            _mm512_store_si512(tiles + h * kTile + r * 128 + p * 64, bf16_pair(w0, w1));
          }
        }
      }
    }
  }
};

// bf16 of the subnormal numbers of e4m3, 0 .. 7 times 2^-9, by the low 5 bits of a byte whose exponent is 0.
alignas(64) const uint16_t kSubnormals[32] = {0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};

// 32 bytes of e4m3, in the upper halves of 16-bit lanes, to bf16 with `exponents` added. NaN is for `gain` to say.
QPASS_AMX_INLINE __m512i e4m3_halves(__m512i upper, __m512i exponents) {
  const __m512i t = _mm512_and_si512(_mm512_srai_epi16(upper, 4), _mm512_set1_epi32((int)0x87f087f0u));
  const __m512i normal = _mm512_add_epi16(t, _mm512_add_epi16(exponents, _mm512_set1_epi32(0x3c003c00)));
  const __mmask32 small = _mm512_testn_epi16_mask(t, _mm512_set1_epi32(0x07800780));
  if (!small) return normal;
  const __m512i found = _mm512_permutexvar_epi16(_mm512_srli_epi16(t, 4), _mm512_load_si512(kSubnormals));
  const __m512i sign = _mm512_and_si512(t, _mm512_set1_epi32((int)0x80008000u));
  return _mm512_mask_mov_epi16(normal, small, _mm512_or_si512(with_exponents(found, exponents), sign));
}

// 64 inputs of a byte each, in two tiles.
template <class Source>
QPASS_AMX_INLINE void e4m3_piece(const Source& source, int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles,
                                 __m512i low, __m512i high) {
  const uint8_t* at = source.q + (block * source.blocks + k) * 1024;
#pragma GCC unroll 4
  for (int r = 0; r < 16; r++) {
    const __m512i line = _mm512_loadu_si512(at + r * 64);
    _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
    _mm512_store_si512(tiles + r * 128, e4m3_halves(_mm512_slli_epi16(line, 8), r < 8 ? low : high));
    _mm512_store_si512(tiles + r * 128 + 64, e4m3_halves(line, r < 8 ? low : high));
  }
}

struct E4m3Source : DecodedSource {
  static constexpr int64_t kBytes = 1024;
  static constexpr int kParts = 1;

  explicit E4m3Source(const Decoded& w) : DecodedSource(w) {}
  QPASS_AMX_MEMBER void piece(int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles) const {
    const __m512i none = _mm512_setzero_si512();
    e4m3_piece(*this, block, k, ahead, tiles, none, none);
  }
};

struct PowerE4m3Source : PowerSource {
  static constexpr int64_t kBytes = 1024;
  static constexpr int kParts = 1;

  explicit PowerE4m3Source(const Decoded& w) : PowerSource(w) {}
  QPASS_AMX_MEMBER void piece(int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles) const {
    e4m3_piece(*this, block, k, ahead, tiles, exponents(block, 2 * k), exponents(block, 2 * k + 1));
  }
};

// Integers of a byte; `flip` makes two's complement of them what the codes of product.h are, 128 more.
struct ByteSource : DecodedSource {
  static constexpr int64_t kBytes = 1024;
  static constexpr int kParts = 1;

  explicit ByteSource(const Decoded& w) : DecodedSource(w) {}
  QPASS_AMX_MEMBER void piece(int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles) const {
    const uint8_t* at = q + (block * blocks + k) * kBytes;
    const bool two = w.code == Code::int8;
    Decoder decoder;
    decoder.table = _mm512_setzero_ps();
    decoder.offset = _mm512_set1_ps(kMagic + (two ? 128.f : 0.f));
    const __m512i flip = _mm512_set1_epi8((char)(two ? 0x80 : 0));
#pragma GCC unroll 4
    for (int r = 0; r < 16; r++) {
      const __m512i line = _mm512_xor_si512(_mm512_loadu_si512(at + r * 64), flip);
      _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
      for (int p = 0; p < 2; p++) {
        const __m512 first = decoded<Decode::byte_zero>(line, p, false, decoder);
        const __m512 second = decoded<Decode::byte_zero>(line, p + 2, false, decoder);
        _mm512_store_si512(tiles + r * 128 + p * 64, bf16_pair(first, second));
      }
    }
  }
};

}  // namespace
}  // namespace qpass
