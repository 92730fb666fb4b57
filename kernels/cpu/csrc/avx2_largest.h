// AVX2: the largest magnitude among weights of any float dtype.
#pragma once
#include <cstdint>

#include "avx2_target.h"
#include "weight_numbers.h"

namespace qpass {
namespace {

// The largest magnitude of `size` weights, a multiple of 16, as the bits of a float, and whether all are finite; else
// whoever asks looks again.
QPASS_AVX2_INLINE uint32_t largest16(const float* w, int64_t size, bool& all_finite) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < size; i += 8)
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(w + i)), magnitude));
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  const uint32_t found = (uint32_t)_mm_cvtsi128_si32(m);
  all_finite = found < 0x7f800000u;
  return found;
}

// The largest of each of 8 registers of 16 signed numbers: the first in this order, so that they come out in order.
QPASS_AVX2_INLINE __m128i largest_of_each(const __m256i (&m)[8]) {
  constexpr int order[8] = {0, 4, 2, 6, 1, 5, 3, 7};
  __m256i a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const __m256i x = m[order[2 * i]], y = m[order[2 * i + 1]];
    a[i] = _mm256_max_epi16(_mm256_unpacklo_epi16(x, y), _mm256_unpackhi_epi16(x, y));
  }
  for (int i = 0; i < 2; i++)
    b[i] = _mm256_max_epi16(_mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]));
  const __m256i c = _mm256_max_epi16(_mm256_unpacklo_epi16(b[0], b[1]), _mm256_unpackhi_epi16(b[0], b[1]));
  return _mm_max_epi16(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
}

// 8 numbers as floats.
QPASS_AVX2_INLINE __m256 floats8(const uint16_t*, __m128i u) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16));
}
QPASS_AVX2_INLINE __m256 floats8(const Half*, __m128i u) { return _mm256_cvtph_ps(u); }
constexpr uint16_t infinity_of(const uint16_t*) { return 0x7f80; }
constexpr uint16_t infinity_of(const Half*) { return 0x7c00; }

// The largest magnitude of each of 8 groups, side by side, of `size` weights, a multiple of 16; false if one is not finite.
template <class T>
QPASS_AVX2_INLINE bool largest_of_8(const T* w, int64_t size, __m256& most) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i m[8];
  for (int g = 0; g < 8; g++) {
    m[g] = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(w + g * size)), magnitude);
    for (int64_t i = 16; i < size; i += 16)
      m[g] = _mm256_max_epi16(
          m[g], _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(w + g * size + i)), magnitude));
  }
  const __m128i found = largest_of_each(m);
  most = floats8(w, found);
  return !_mm_movemask_epi8(_mm_cmpgt_epi16(found, _mm_set1_epi16((int16_t)(infinity_of(w) - 1))));
}

inline bool largest_of_8(const float*, int64_t, __m256&) { return false; }

QPASS_AVX2_INLINE uint16_t largest_of_16_bits(const void* w, int64_t size) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < size; i += 16)
    most = _mm256_max_epi16(most,
                            _mm256_and_si256(_mm256_loadu_si256((const __m256i*)((const uint16_t*)w + i)), magnitude));
  const __m128i m = _mm_max_epi16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  // minpos finds the least of 8 unsigned numbers
  return (uint16_t)(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi16(0x7fff))), 0) ^ 0x7fff);
}
QPASS_AVX2_INLINE uint32_t largest16(const uint16_t* w, int64_t size, bool& all_finite) {
  const uint16_t found = largest_of_16_bits(w, size);
  all_finite = found < 0x7f80;
  return (uint32_t)found << 16;
}
QPASS_AVX2_INLINE uint32_t largest16(const Half* w, int64_t size, bool& all_finite) {
  const uint16_t found = largest_of_16_bits(w, size);
  all_finite = found < 0x7c00;
  return bits_of(from_f16(found));
}

}  // namespace
}  // namespace qpass
