// AVX2: bfloat16 weights to codes of small floats by their bits, 16 in a register. What avx2_encode_floats.h gives, bit for
// bit.
#pragma once
#include <cstdint>

#include "avx2_encode_floats.h"

namespace qpass {
namespace {

// What a row's buffer holds of 32 bfloat16 whose magnitudes have the codes a and b; `sign` of a code, which packing adds.
QPASS_AVX2_INLINE void put32(const uint16_t* w, __m256i a, __m256i b, int8_t sign, int8_t* q) {
  const __m256i low = _mm256_loadu_si256((const __m256i*)w), high = _mm256_loadu_si256((const __m256i*)(w + 16));
  const __m256i negative = _mm256_packs_epi16(_mm256_srai_epi16(low, 15), _mm256_srai_epi16(high, 15));
  const __m256i bytes = _mm256_or_si256(_mm256_packus_epi16(a, b), _mm256_andnot_si256(negative, _mm256_set1_epi8(sign)));
  _mm256_storeu_si256((__m256i*)q, _mm256_permute4x64_epi64(bytes, 0xd8));
}

// Codes of bfloat16 by `code`, which takes 16 magnitudes and says of each in `hard` if it is none for it. Those are for
// `slow`, which takes 16 weights, as is what is left of `size`, a multiple of 16.
template <class Code, class Slow>
QPASS_AVX2_INLINE void codes_of(const uint16_t* w, int64_t size, int8_t sign, int8_t* q, Code code, Slow slow) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  const __m128i flip = _mm_set1_epi8(sign);
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    __m256i hard = _mm256_setzero_si256();
    const __m256i a = code(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)(w + i)), magnitude), hard);
    const __m256i b = code(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)(w + i + 16)), magnitude), hard);
    if (__builtin_expect(_mm256_testz_si256(hard, hard), 1)) {
      put32(w + i, a, b, sign, q + i);
    } else {
      put16(slow(w + i), flip, q + i);
      put16(slow(w + i + 16), flip, q + i + 16);
    }
  }
  if (i < size) put16(slow(w + i), flip, q + i);
}

// RNE(steps / 2^kShift), numbers of 16 bits without sign.
template <int kShift>
QPASS_AVX2_INLINE __m256i rounded16(__m256i steps) {
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(steps, kShift), _mm256_set1_epi16(1));
  const __m256i up = _mm256_add_epi16(steps, _mm256_set1_epi16((1 << (kShift - 1)) - 1));
  return _mm256_srli_epi16(_mm256_add_epi16(up, odd), kShift);
}

// e4m3 codes of bfloat16 divided by what has 16 bits too, with its inverse; no quotient is 500 or more. One is a tie of
// the rounding to 3 bits after the point or lies 2^-12 of its power of two or more from every tie. The product, off by
// 2^-22, is cut to 12 bits after the point, and made larger by 2^-13 of itself before, so that ties are found and nothing
// else becomes one. 16 bits hold that and the exponents of normal numbers, counted from 2^-7; what is below them is hard.
QPASS_AVX2_INLINE void codes_by_product(const uint16_t* w, int64_t size, float divisor, int8_t* q) {
  const __m256 inverse = _mm256_set1_ps((1 / divisor) * 1.0001220703125f), by = _mm256_set1_ps(divisor);
  const __m256i least = _mm256_set1_epi16((int16_t)(bits_of(divisor * 0.0156860352f) >> 16));  // a little more than 2^-6
  const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000), start = _mm256_set1_epi16((int16_t)(120 << 12 & 0xffff));
  codes_of(
      w, size, (int8_t)128, q,
      [&](__m256i size16, __m256i& hard) QPASS_AVX2 {
        const __m256 even = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(size16, 16)), inverse);
        const __m256 odd = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(size16, upper)), inverse);
        const __m256i steps = _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 11),
                                                 _mm256_slli_epi32(_mm256_castps_si256(odd), 5), 0xaa);
        hard = _mm256_or_si256(hard, _mm256_cmpgt_epi16(least, size16));
        return rounded16<9>(_mm256_sub_epi16(steps, start));
      },
      [&](const uint16_t* at) QPASS_AVX2 { return codes16<false, uint16_t, Element::e4m3>(at, by); });
}

// Codes of bfloat16 divided by 2^exponent, which is far from the ends, so that it is taken from their bits.
template <Element kElement>
QPASS_AVX2_INLINE void codes_by_bits(const uint16_t* w, int64_t size, int exponent, int8_t* q) {
  const __m256 inverse = _mm256_set1_ps(float_of((uint32_t)(127 - exponent) << 23));
  const auto slow = [&](const uint16_t* at) QPASS_AVX2 { return codes16<true, uint16_t, kElement>(at, inverse); };
  if constexpr (kElement == Element::e2m1) {
    // Bits count from 2^-1. From 1 on they are rounded to one after the point; below, the middles between values are
    // counted, of which 1/4 belongs to the value below it and 3/4 to the one above.
    const __m256i start = _mm256_set1_epi16((int16_t)((exponent + 126) * 128)), most = _mm256_set1_epi16(7 << 6);
    const __m256i quarter = _mm256_set1_epi16(-128), below = _mm256_set1_epi16(63), one = _mm256_set1_epi16(1);
    codes_of(
        w, size, 8, q,
        [&](__m256i size16, __m256i&) QPASS_AVX2 {
          const __m256i at = _mm256_min_epi16(_mm256_sub_epi16(size16, start), most);
          const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(at, 6), one);
          const __m256i above = _mm256_srai_epi16(_mm256_add_epi16(_mm256_add_epi16(at, _mm256_set1_epi16(31)), odd), 6);
          const __m256i few = _mm256_add_epi16(_mm256_cmpgt_epi16(at, quarter), _mm256_cmpgt_epi16(at, below));
          return _mm256_max_epi16(above, _mm256_abs_epi16(few));
        },
        slow);
  } else {  // e4m3, and e2m3, whose bytes are e4m3's: normal numbers are rounded to three bits after the point
    constexpr bool six = kElement == Element::e2m3;
    const __m256i start = _mm256_set1_epi16((int16_t)((exponent + 120) * 128));
    const __m256i most = _mm256_set1_epi16((six ? 0x4f : 0x7e) << 4), least = _mm256_set1_epi16((six ? 0x38 : 8) << 4);
    const __m256 eighths = _mm256_set1_ps(float_of((uint32_t)(127 + 3 - exponent) << 23));
    const __m256i small = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kSmallSixes));
    const __m256i none = _mm256_setzero_si256();
    codes_of(
        w, size, (int8_t)128, q,
        [&](__m256i size16, __m256i& hard) QPASS_AVX2 {
          const __m256i at = _mm256_min_epi16(_mm256_sub_epi16(size16, start), most), below = _mm256_cmpgt_epi16(least, at);
          const __m256i normal = rounded16<4>(at);
          if constexpr (!six) {
            hard = _mm256_or_si256(hard, below);
            return normal;
          } else {  // below 1 they are eighths, of which 8 are 1
            const __m256 low = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, size16));
            const __m256 high = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, size16));
            const __m256i count = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(low, eighths)),
                                                     _mm256_cvtps_epi32(_mm256_mul_ps(high, eighths)));
            return _mm256_blendv_epi8(normal, _mm256_shuffle_epi8(small, count), below);
          }
        },
        slow);
  }
}
template <Element kElement>
QPASS_AVX2_INLINE void codes_by_bits(const void*, int64_t, int, int8_t*) {}
QPASS_AVX2_INLINE void codes_by_product(const void*, int64_t, float, int8_t*) {}

}  // namespace
}  // namespace qpass
