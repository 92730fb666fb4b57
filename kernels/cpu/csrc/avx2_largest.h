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
