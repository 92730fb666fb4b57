// AVX2: weights to codes of small floats or of a codebook, 16 at a time as floats. The same operations in the same precision
// as code_of and code_in_book of encode_numbers.h: bit for bit the same.
#pragma once
#include <cstdint>

#include "avx2_target.h"
#include "encode_numbers.h"
#include "weight_numbers.h"

namespace qpass {
namespace {

// 16 weights as floats. Those of bfloat16 are spread within each half of a register, as packing integers to 16 bits puts
// them together again; the others are in order.
QPASS_AVX2_INLINE void floats16(const float* w, __m256 (&v)[2]) {
  for (int j = 0; j < 2; j++) v[j] = _mm256_loadu_ps(w + j * 8);
}
QPASS_AVX2_INLINE void floats16(const Half* w, __m256 (&v)[2]) {
  for (int j = 0; j < 2; j++) v[j] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + j * 8)));
}
QPASS_AVX2_INLINE void floats16(const uint16_t* w, __m256 (&v)[2]) {
  const __m256i none = _mm256_setzero_si256(), u = _mm256_loadu_si256((const __m256i*)w);
  v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, u));
  v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, u));
}

constexpr bool in_lanes(const uint16_t*) { return true; }
constexpr bool in_lanes(const void*) { return false; }

// 16 integers of two registers from floats16, 16 bits each, in order.
QPASS_AVX2_INLINE __m256i joined(const void*, __m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}
QPASS_AVX2_INLINE __m256i joined(const uint16_t*, __m256i a, __m256i b) { return _mm256_packs_epi32(a, b); }

// The sign bits of 16 weights, 0x8000 or 0.
QPASS_AVX2_INLINE __m256i signs16(const float* w) {
  const __m256i a = _mm256_srai_epi32(_mm256_loadu_si256((const __m256i*)w), 31);
  const __m256i b = _mm256_srai_epi32(_mm256_loadu_si256((const __m256i*)(w + 8)), 31);
  return _mm256_and_si256(joined(w, a, b), _mm256_set1_epi16((int16_t)0x8000));
}
QPASS_AVX2_INLINE __m256i signs16_of(const void* w) {
  return _mm256_and_si256(_mm256_loadu_si256((const __m256i*)w), _mm256_set1_epi16((int16_t)0x8000));
}
QPASS_AVX2_INLINE __m256i signs16(const Half* w) { return signs16_of(w); }
QPASS_AVX2_INLINE __m256i signs16(const uint16_t* w) { return signs16_of(w); }

// code_of, of e2m3 before it becomes a byte.
template <Element kElement>
QPASS_AVX2_INLINE __m256i codes8(__m256 size) {
  using N = Numbers<kElement>;
  size = _mm256_min_ps(size, _mm256_set1_ps(N::largest));
  const __m256 least = _mm256_castsi256_ps(_mm256_set1_epi32((128 - N::bias) << 23));
  const __m256 exponent = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
  const __m256 binade = _mm256_and_ps(_mm256_max_ps(size, least), exponent);
  const __m256 next = _mm256_mul_ps(binade, _mm256_set1_ps(1.5f * (1 << (23 - N::mantissa))));
  const __m256i steps = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(size, next)), _mm256_castps_si256(next));
  return _mm256_add_epi32(_mm256_srli_epi32(_mm256_castps_si256(binade), 23 - N::mantissa), steps);
}

struct BookVectors {
  __m256 first, low, high, third, fourth;
};
QPASS_AVX2_INLINE BookVectors vectors_of(const Book& book) {
  return {_mm256_set1_ps(book.bounds[7]), _mm256_set1_ps(book.bounds[3]), _mm256_set1_ps(book.bounds[11]),
          _mm256_loadu_ps(book.third), _mm256_loadu_ps(book.fourth)};
}

// Minus how many bounds lie below each number.
QPASS_AVX2_INLINE __m256i ranks8(const BookVectors& book, __m256 v) {
  const __m256 above = _mm256_cmp_ps(v, book.first, _CMP_GT_OQ);
  __m256i n = _mm256_castps_si256(above);
  n = _mm256_add_epi32(_mm256_add_epi32(n, n), _mm256_castps_si256(_mm256_cmp_ps(
                                                   v, _mm256_blendv_ps(book.low, book.high, above), _CMP_GT_OQ)));
  n = _mm256_add_epi32(_mm256_add_epi32(n, n), _mm256_castps_si256(_mm256_cmp_ps(
                                                   v, _mm256_permutevar8x32_ps(book.third, n), _CMP_GT_OQ)));
  return _mm256_add_epi32(_mm256_add_epi32(n, n), _mm256_castps_si256(_mm256_cmp_ps(
                                                      v, _mm256_permutevar8x32_ps(book.fourth, n), _CMP_GT_OQ)));
}

// What a row's buffer holds of 16 codes of 16 bits.
QPASS_AVX2_INLINE void put16(__m256i codes, __m128i flip, int8_t* q) {
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storeu_si128((__m128i*)q, _mm_xor_si128(bytes, flip));
}

// 16 codes with their signs, 16 bits each. kInverse: `scale` is the inverse of a power of two, and a product is the quotient.
template <bool kInverse, class T, Element kElement>
QPASS_AVX2_INLINE __m256i codes16(const T* w, __m256 scale) {
  using N = Numbers<kElement>;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i first = _mm256_set1_epi16((128 - N::bias) << N::mantissa);
  __m256 v[2];
  __m256i code[2];
  floats16(w, v);
  for (int j = 0; j < 2; j++) {
    const __m256 at = _mm256_and_ps(v[j], magnitude);
    code[j] = codes8<kElement>(kInverse ? _mm256_mul_ps(at, scale) : _mm256_div_ps(at, scale));
  }
  __m256i codes = _mm256_sub_epi16(joined(w, code[0], code[1]), first);
  if (kElement == Element::e2m3) {
    const __m256i small = _mm256_broadcastsi128_si256(_mm_loadl_epi64((const __m128i*)kSmallSixes));
    const __m256i is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), codes);
    codes = _mm256_blendv_epi8(_mm256_add_epi16(codes, _mm256_set1_epi16(48)), _mm256_shuffle_epi8(small, codes),
                               is_small);
  }
  return _mm256_or_si256(codes, _mm256_srli_epi16(signs16(w), kElement == Element::e2m1 ? 12 : 8));
}

// `size` is a multiple of 16.
template <bool kInverse, class T, Element kElement>
QPASS_AVX2_INLINE void codes_by(const T* w, int64_t size, float by, int8_t* q) {
  const __m256 scale = _mm256_set1_ps(by);
  const __m128i flip = _mm_set1_epi8((char)(kElement == Element::e2m1 ? 8 : 128));
  for (int64_t i = 0; i < size; i += 16) put16(codes16<kInverse, T, kElement>(w + i, scale), flip, q + i);
}

template <class T>
QPASS_AVX2_INLINE void codes_in_book(const Book& book, const T* w, int64_t size, float by, int8_t* q) {
  const BookVectors found = vectors_of(book);
  const __m256 scale = _mm256_set1_ps(by);
  const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)book.backwards));
  const __m256i low = _mm256_set1_epi16(15);
  for (int64_t i = 0; i < size; i += 16) {
    __m256 v[2];
    floats16(w + i, v);
    const __m256i a = ranks8(found, _mm256_mul_ps(v[0], scale)), b = ranks8(found, _mm256_mul_ps(v[1], scale));
    const __m256i of_rank = _mm256_shuffle_epi8(codes, _mm256_and_si256(joined(w, a, b), low));
    put16(_mm256_and_si256(of_rank, low), _mm_set1_epi8(8), q + i);
  }
}

}  // namespace
}  // namespace qpass
