// 4-bit weights times their multipliers as bytes, (code - 8) * multiplier, for products that are integer to the end.
#pragma once
#include "avx512_vector.h"

namespace qpass {
namespace {

// What multiplies 16 outputs in one run of inputs: |multiplier| in both halves of each 32-bit lane, 8 * |multiplier| in
// each byte, and all ones where the multiplier is negative.
struct Multiplied {
  __m512i size, offset, negative;
};

QPASS_AVX512_INLINE Multiplied multiplied_of(const Weight& w, int64_t block, int64_t k) {
  int64_t g = k / inner_size(w);
  if (g >= w.multipliers) g = w.multipliers - 1;  // padding: its inputs are 0
  const int8_t* at = w.multiplier + (block * w.multipliers + g) * 16;
  const __m512i m = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
  Multiplied by;
  by.negative = _mm512_srai_epi32(m, 31);
  const __m512i size = _mm512_sub_epi32(_mm512_xor_si512(m, by.negative), by.negative);
  by.size = _mm512_mullo_epi32(size, _mm512_set1_epi32(0x00010001));
  by.offset = _mm512_mullo_epi32(size, _mm512_set1_epi32(0x08080808));
  return by;
}

// Two bytes are multiplied at once: 15 * 15 = 225 stays below 256, so the lower does not reach into the upper.
QPASS_AVX512_INLINE __m512i times(__m512i codes, const Multiplied& by) {
  const __m512i signless = _mm512_sub_epi8(_mm512_mullo_epi16(codes, by.size), by.offset);
  return _mm512_sub_epi8(_mm512_xor_si512(signless, by.negative), by.negative);
}

// Blocks [k, k + count) of 64 inputs of 16 outputs, 16 lines of 64 bytes each; `flip` is xored into every byte.
QPASS_AVX512_OUTLINE void unpack_multiplied(const Weight& w, int64_t block, int64_t k, int64_t count, int flip,
                                            uint8_t* panel) {
  const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8((char)flip);
  const uint8_t* q = w.q + (block * (w.Kp / 64) + k) * 512;
  for (int64_t i = 0; i < count; i++, panel += 1024, q += 512) {
    const Multiplied low = multiplied_of(w, block, (k + i) * 64), high = multiplied_of(w, block, (k + i) * 64 + 32);
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      const __m512i line = _mm512_loadu_si512(q + r * 64);
      const __m512i upper = _mm512_and_si512(_mm512_srli_epi32(line, 4), nibble);
      _mm512_store_si512(panel + r * 64, _mm512_xor_si512(times(_mm512_and_si512(line, nibble), low), sign));
      _mm512_store_si512(panel + 512 + r * 64, _mm512_xor_si512(times(upper, high), sign));
    }
  }
}

}  // namespace
}  // namespace qpass
