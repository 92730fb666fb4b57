// AMX tiles of bf16: row tiles packed from float rows, column tiles unpacked from the weight's nibbles and bytes.
//
// A tile holds 32 inputs, in pairs. Four inputs 4r .. 4r + 3 make the pairs (4r, 4r + 2) and (4r + 1, 4r + 3), in row tiles
// and column tiles alike: so lie the nibbles of a line of product.h in its 16-bit lanes, from where vpermw looks up 32
// weights at a time, its index being the low 5 bits of each lane.
#pragma once
#include "amx_tiles.h"
#include "avx512_decode.h"

namespace qpass {
namespace {

// 32 halves in order of inputs, as the pairs of a row tile.
QPASS_AMX_INLINE __m512i paired(__m512i halves) {
  return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(halves, 0xd8), 0xd8);
}

// The upper 16 bits of floats in place: bf16 by truncation, which cannot overflow; NaN is made quiet first.
QPASS_AMX_INLINE __m512 truncated(__m512 v) {
  __m512i u = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32((int)0xffff0000u));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                                   _mm512_set1_epi32(0x7fc00000)));
}

// (first, second) as bf16 in each lane; both have nothing below their upper 16 bits but for what is dropped.
QPASS_AMX_INLINE __m512i bf16_pair(__m512 first, __m512 second) {
  __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
  return _mm512_ternarylogic_epi32(_mm512_castps_si512(second), high, low, 0xEA);  // (second & high) | low
}

// What the parts before have not covered. Infinite values are covered by the first part.
QPASS_AMX_INLINE __m512 remainder_of(__m512 v, __m512 part) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  return _mm512_maskz_sub_ps(finite, v, part);
}

// Numbers [at, at + 32) of a row as `parts` lines that sum to them, `stride` bytes apart; those from `end` on are 0.
QPASS_AMX_INLINE void pack_run(const void* row, DType dtype, int64_t at, int64_t end, int64_t parts, int64_t stride,
                               int8_t* line) {
  __m512 v0 = load_floats(row, dtype, at, first_lanes(end - at));
  __m512 v1 = load_floats(row, dtype, at + 16, first_lanes(end - at - 16));
  for (int64_t part = 0; part < parts; part++, line += stride) {
    const __m512 p0 = truncated(v0), p1 = truncated(v1);
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(p0), 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(p1), 16));
    _mm512_store_si512(line, paired(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
    v0 = remainder_of(v0, p0);
    v1 = remainder_of(v1, p1);
  }
}

// Rows from m on in runs [2k, 2(k + count)) of 32 inputs: for each run and each of its parts `tiles` tiles of `height` rows.
// Rows from M on are 0. A row is read eight lines at a time, while their tiles stay in L1.
QPASS_AMX_OUTLINE void pack_floats(const FloatRows& x, int64_t m, int64_t k, int64_t count, int height, int tiles,
                                   int8_t* to) {
  const int64_t row_bytes = x.width * (x.dtype == DType::f32 ? 4 : 2), stride = tiles * height * 64, most = tiles * height;
  const int64_t rows = x.M - m < most ? x.M - m : most, parts = x.bf16_parts, end = (k + count) * 64;
  for (int64_t first = k * 64; first < end; first += 256) {
    const int64_t last = first + 256 < end ? first + 256 : end;
    int8_t* line = to + (first - k * 64) / 32 * parts * stride;
    for (int64_t r = 0; r < most; r++, line += 64) {
      const char* row = (const char*)x.raw + (m + r) * row_bytes;
      int8_t* at_line = line;
      for (int64_t at = first; at < last; at += 32, at_line += parts * stride) {
        const int64_t left = x.width - at;
        if (r >= rows || left <= 0) {
          for (int64_t p = 0; p < parts; p++) _mm512_store_si512(at_line + p * stride, _mm512_setzero_si512());
        } else if (x.dtype == DType::bf16) {
          const __mmask32 mask = left >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
          _mm512_store_si512(at_line, paired(_mm512_maskz_loadu_epi16(mask, (const uint16_t*)row + at)));
        } else {
          pack_run(row, x.dtype, at, x.width, parts, stride, at_line);
        }
      }
    }
  }
}

// bf16 of 0 .. 15, -16 .. -1: a difference of two nibbles by its low 5 bits.
alignas(64) const uint16_t kDifferences[32] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150,
    0x4160, 0x4170, 0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0,
    0xc080, 0xc040, 0xc000, 0xbf80};
// bf16 of -8 .. 7, twice: a nibble by its 4 bits, whatever the fifth.
alignas(64) const uint16_t kNibbles[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
    0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040,
    0x4080, 0x40a0, 0x40c0, 0x40e0};

// Symmetric 4 bits: a block of 64 inputs x 16 outputs, 512 bytes, to two tiles. `ahead` is prefetched.
QPASS_AMX_INLINE void unpack_nibbles(const uint8_t* q, const uint8_t* ahead, int8_t* panel) {
  const __m512i table = _mm512_load_si512(kNibbles);
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    const __m512i line = _mm512_loadu_si512(q + r * 64);
    _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
    int8_t* to = panel + r * 128;
    _mm512_store_si512(to, _mm512_permutexvar_epi16(line, table));
    _mm512_store_si512(to + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), table));
    _mm512_store_si512(to + kTile, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4), table));
    _mm512_store_si512(to + kTile + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), table));
  }
}

QPASS_AMX_INLINE __m512i both_halves(__m512i v) { return _mm512_or_si512(v, _mm512_slli_epi32(v, 16)); }

// With zero points: 8 + zero point, of the first 32 inputs' group and of the others'.
QPASS_AMX_INLINE void unpack_differences(const uint8_t* q, const uint8_t* ahead, __m512i zero0, __m512i zero1,
                                         int8_t* panel) {
  const __m512i table = _mm512_load_si512(kDifferences), nibble = _mm512_set1_epi32(0x000f000f);
  const __m512i zero[2] = {both_halves(zero0), both_halves(zero1)};
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    const __m512i line = _mm512_loadu_si512(q + r * 64);
    _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
    int8_t* to = panel + r * 128;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi16(line, 4 * j), nibble);
      const __m512i difference = _mm512_sub_epi16(code, zero[j % 2]);
      _mm512_store_si512(to + j % 2 * kTile + j / 2 * 64, _mm512_permutexvar_epi16(difference, table));
    }
  }
}

// 32 inputs x 16 outputs, 8 lines, through float32: bytes, and nibbles whose zero point is no nibble.
template <Decode DECODE>
QPASS_AMX_INLINE void unpack_run(const uint8_t* q, const uint8_t* ahead, bool upper, const Decoder& decoder,
                                 int8_t* tile) {
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    const __m512i line = _mm512_loadu_si512(q + r * 64);
    _mm_prefetch((const char*)ahead + r * 64, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
      const __m512 first = decoded<DECODE>(line, p, upper, decoder), second = decoded<DECODE>(line, p + 2, upper, decoder);
      _mm512_store_si512(tile + r * 128 + p * 64, bf16_pair(first, second));
    }
  }
}

// How a weight's codes are unpacked.
enum class Codes { nibbles, differences, bytes };

QPASS_AMX void unpack_far(const Weight& w, int64_t block, int64_t g0, int64_t g1, const uint8_t* q, int8_t* panel) {
  unpack_run<Decode::nibble_zero>(q, q, false, decoder_of(w, block, g0), panel);
  unpack_run<Decode::nibble_zero>(q, q, true, decoder_of(w, block, g1), panel + kTile);
}

// Block k of 64 inputs x 16 outputs as two tiles of 32 inputs: weight - zero point, which bf16 has exactly.
template <Codes CODES>
QPASS_AMX_INLINE void unpack_block(const Weight& w, int64_t block, int64_t k, const uint8_t* ahead, int8_t* panel) {
  const uint8_t* q = w.q + (block * (w.Kp / 64) + k) * (CODES == Codes::bytes ? 1024 : 512);
  if (CODES == Codes::nibbles) return unpack_nibbles(q, ahead, panel);
  // Inputs from K on are in no group: they take the last one's zero points, for rows are 0 there.
  const int64_t runs = w.group_size / 32, g0 = 2 * k / runs;
  const int64_t g1 = (2 * k + 1) / runs < w.groups ? (2 * k + 1) / runs : g0;
  if (CODES == Codes::bytes) {
    unpack_run<Decode::byte_zero>(q, ahead, false, decoder_of(w, block, g0), panel);
    unpack_run<Decode::byte_zero>(q + 512, ahead + 512, false, decoder_of(w, block, g1), panel + kTile);
    return;
  }
  const __m512i eight = _mm512_set1_epi32(8), most = _mm512_set1_epi32(16);
  const __m512i zero0 = _mm512_add_epi32(group_zero_points(w, block, g0), eight);
  const __m512i zero1 = _mm512_add_epi32(group_zero_points(w, block, g1), eight);
  const __m512i none = _mm512_setzero_si512();
  if (_mm512_cmplt_epi32_mask(zero0, none) | _mm512_cmplt_epi32_mask(most, zero0) |
      _mm512_cmplt_epi32_mask(zero1, none) | _mm512_cmplt_epi32_mask(most, zero1))
    return unpack_far(w, block, g0, g1, q, panel);
  unpack_differences(q, ahead, zero0, zero1, panel);
}

}  // namespace
}  // namespace qpass
