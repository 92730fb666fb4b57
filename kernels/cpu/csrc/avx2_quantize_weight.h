// AVX2: groups of a float weight to integers, 32 at a time. The same operations in the same precision as quantize_group of
// quantize_weight.cpp, whose number_of this is: bit for bit the same.
#pragma once
#include <cstdint>

#include "avx2_largest.h"
#include "avx2_pack_tile.h"
#include "avx2_target.h"

namespace qpass {
namespace {

// 32 weights as floats. Those of bfloat16 are spread within each half of a register (`in_lanes`), as packing integers to
// 16 bits puts them together again; the others are in order.
QPASS_AVX2_INLINE void floats32(const float* w, __m256 (&v)[4]) {
  for (int j = 0; j < 4; j++) v[j] = _mm256_loadu_ps(w + j * 8);
}
QPASS_AVX2_INLINE void floats32(const Half* w, __m256 (&v)[4]) {
  for (int j = 0; j < 4; j++) v[j] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + j * 8)));
}
QPASS_AVX2_INLINE void floats32(const uint16_t* w, __m256 (&v)[4]) {
  const __m256i none = _mm256_setzero_si256();
  for (int j = 0; j < 4; j += 2) {
    const __m256i u = _mm256_loadu_si256((const __m256i*)(w + j * 8));
    v[j] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, u));
    v[j + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, u));
  }
}
constexpr bool in_lanes(const uint16_t*) { return true; }
constexpr bool in_lanes(const void*) { return false; }

// The least and the largest of a group and of 0, as floats; false if one of the group is NaN or Inf.
// Floats compare as integers do once the negative ones have their magnitude turned over.
QPASS_AVX2_INLINE bool range_of(const float* w, int64_t size, float& least, float& most) {
  __m256i low = _mm256_setzero_si256(), high = low;
  const __m256i turned = _mm256_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < size; i += 8) {
    const __m256i u = _mm256_loadu_si256((const __m256i*)(w + i));
    const __m256i order = _mm256_xor_si256(u, _mm256_and_si256(_mm256_srai_epi32(u, 31), turned));
    low = _mm256_min_epi32(low, order);
    high = _mm256_max_epi32(high, order);
  }
  alignas(32) int32_t l[8], h[8];
  _mm256_store_si256((__m256i*)l, low);
  _mm256_store_si256((__m256i*)h, high);
  for (int i = 1; i < 8; i++) {
    l[0] = l[i] < l[0] ? l[i] : l[0];
    h[0] = h[i] > h[0] ? h[i] : h[0];
  }
  least = l[0] < 0 ? number_of(l[0]) : 0;
  most = number_of(h[0]);
  return h[0] < 0x7f800000 && l[0] > ~0x7f800000;
}

QPASS_AVX2_INLINE bool orders16(const void* w, int64_t size, int16_t infinite, int16_t& least, int16_t& most) {
  __m256i low = _mm256_setzero_si256(), high = low;
  const __m256i turned = _mm256_set1_epi16(0x7fff);
  for (int64_t i = 0; i < size; i += 16) {
    const __m256i u = _mm256_loadu_si256((const __m256i*)((const uint16_t*)w + i));
    const __m256i order = _mm256_xor_si256(u, _mm256_and_si256(_mm256_srai_epi16(u, 15), turned));
    low = _mm256_min_epi16(low, order);
    high = _mm256_max_epi16(high, order);
  }
  // minpos finds the least of 8 unsigned numbers: orders with their sign bit turned over, and for the most all bits.
  const __m128i up = _mm_set1_epi16((int16_t)0x8000), down = _mm_set1_epi16(0x7fff);
  const __m128i l = _mm_min_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i h = _mm_max_epi16(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  least = (int16_t)(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(l, up)), 0) ^ 0x8000);
  most = (int16_t)(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(h, down)), 0) ^ 0x7fff);
  return most < infinite && least > (int16_t)~infinite;
}

QPASS_AVX2_INLINE uint16_t bits_of_order(int16_t order) { return (uint16_t)(order < 0 ? order ^ 0x7fff : order); }

QPASS_AVX2_INLINE bool range_of(const uint16_t* w, int64_t size, float& least, float& most) {
  int16_t low, high;
  const bool finite = orders16(w, size, 0x7f80, low, high);
  least = low < 0 ? from_bf16(bits_of_order(low)) : 0;
  most = from_bf16(bits_of_order(high));
  return finite;
}

QPASS_AVX2_INLINE bool range_of(const Half* w, int64_t size, float& least, float& most) {
  int16_t low, high;
  const bool finite = orders16(w, size, 0x7c00, low, high);
  least = low < 0 ? from_f16(bits_of_order(low)) : 0;
  most = from_f16(bits_of_order(high));
  return finite;
}

// 1536 + w / s for 8 numbers that have 16 bits, as s has: with 1 / s at hand, in a third of the time. A quotient of theirs
// is a tie of the rounding that follows, n + 1/2, or lies 2^-9 or more from every tie that is not 0. The product is off
// by 2^-15 at most below 256, where ties decide; next to 1536 it is rounded to a multiple of 2^-13, which finds the ties.
QPASS_AVX2_INLINE __m256 beyond_1536(__m256 w, __m256 inverse) { return _mm256_fmadd_ps(w, inverse, _mm256_set1_ps(1536)); }

// q[i] = clamp(round(w[i] / s) + zp, qmin, qmax), halves to even. A group's own scale leaves |w / s| below 512, so
// that nothing is lost on the way to 8 bits. `size` is a multiple of 32.
template <bool kInverse, class T>
QPASS_AVX2_INLINE void codes_by(const T* w, int64_t size, float s, float zp, float qmin, float qmax, int8_t* q) {
  const __m256 scale = _mm256_set1_ps(kInverse ? 1 / s : s);
  const __m256i zero = _mm256_set1_epi16((int16_t)(zp - (kInverse ? 1536 : 0)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i first = _mm256_set1_epi8((int8_t)qmin), last = _mm256_set1_epi8((int8_t)qmax);
  for (int64_t i = 0; i < size; i += 32) {
    __m256i v[4];
    __m256 at[4];
    floats32(w + i, at);
    for (int j = 0; j < 4; j++)
      v[j] = _mm256_cvtps_epi32(kInverse ? beyond_1536(at[j], scale) : _mm256_div_ps(at[j], scale));
    const __m256i ab = _mm256_add_epi16(_mm256_packs_epi32(v[0], v[1]), zero);
    const __m256i cd = _mm256_add_epi16(_mm256_packs_epi32(v[2], v[3]), zero);
    const __m256i both = _mm256_packs_epi16(ab, cd);
    const __m256i all = in_lanes(w) ? _mm256_permute4x64_epi64(both, 0xd8) : _mm256_permutevar8x32_epi32(both, order);
    _mm256_storeu_si256((__m256i*)(q + i), _mm256_min_epi8(_mm256_max_epi8(all, first), last));
  }
}

template <class T>
QPASS_AVX2_INLINE void codes_of(const T* w, int64_t size, float s, float zp, float qmin, float qmax, int8_t* q) {
  if (sizeof(T) == 2 && s > 0x1p-100f && s < 0x1p100f)
    codes_by<true>(w, size, s, zp, qmin, qmax, q);
  else
    codes_by<false>(w, size, s, zp, qmin, qmax, q);
}

// The least and the largest of each of 8 groups, side by side, and of 0, for 16 bits; false if one is not finite.
template <class T>
QPASS_AVX2_INLINE bool ranges_of_8(const T* w, int64_t size, __m256& least, __m256& most) {
  const __m256i turned = _mm256_set1_epi16(0x7fff);
  __m256i low[8], high[8];  // of ~order and of order
  for (int g = 0; g < 8; g++) {
    __m256i below = _mm256_setzero_si256(), above = below;
    for (int64_t i = 0; i < size; i += 16) {
      const __m256i u = _mm256_loadu_si256((const __m256i*)((const uint16_t*)w + g * size + i));
      const __m256i order = _mm256_xor_si256(u, _mm256_and_si256(_mm256_srai_epi16(u, 15), turned));
      below = _mm256_min_epi16(below, order);
      above = _mm256_max_epi16(above, order);
    }
    low[g] = _mm256_xor_si256(below, _mm256_set1_epi16(-1));
    high[g] = above;
  }
  // ~order of a negative number is its magnitude; where there is none, -1 is left
  const __m128i l = _mm_max_epi16(largest_of_each(low), _mm_setzero_si128()), h = largest_of_each(high);
  least = _mm256_xor_ps(floats8(w, l), _mm256_set1_ps(-0.0f));
  most = floats8(w, h);
  return !_mm_movemask_epi8(_mm_cmpgt_epi16(_mm_max_epi16(l, h), _mm_set1_epi16((int16_t)(infinity_of(w) - 1))));
}
inline bool ranges_of_8(const float*, int64_t, __m256&, __m256&) { return false; }

// storable of weight_numbers.h, for types of 16 bits.
QPASS_AVX2_INLINE __m256 storable8(const uint16_t*, __m256 s) {
  const __m256i u = _mm256_castps_si256(_mm256_min_ps(s, _mm256_set1_ps(3.38953139e38f)));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int32_t)0xffff0000)));
}
QPASS_AVX2_INLINE __m256 storable8(const Half*, __m256 s) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_min_ps(s, _mm256_set1_ps(65504)), _MM_FROUND_TO_NEAREST_INT));
}
QPASS_AVX2_INLINE __m256 storable8(const float*, __m256 s) { return s; }

// numbers_of for 8 groups.
template <class T>
QPASS_AVX2_INLINE void numbers_of_8(const Job& job, const T* w, __m256 least, __m256 most, float* scale, float* zero_point) {
  const __m256 none = _mm256_setzero_ps(), first = _mm256_set1_ps(job.qmin), last = _mm256_set1_ps(job.qmax);
  const float steps = job.symmetric ? (job.qmax - job.qmin) / 2 : job.qmax - job.qmin;
  const __m256 range = job.symmetric ? most : _mm256_sub_ps(most, least), s = _mm256_div_ps(range, _mm256_set1_ps(steps));
  const __m256 stored = storable8(w, s), instead = _mm256_blendv_ps(
      _mm256_set1_ps(storable(1e-45f, job.dtype)), _mm256_set1_ps(storable(0, job.dtype)), _mm256_cmp_ps(s, none, _CMP_EQ_OQ));
  const __m256 kept = _mm256_blendv_ps(stored, instead, _mm256_cmp_ps(stored, none, _CMP_EQ_OQ));
  _mm256_storeu_ps(scale, kept);
  if (job.symmetric) return _mm256_storeu_ps(zero_point, none);
  const __m256 below = _mm256_round_ps(_mm256_div_ps(least, kept), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_ps(zero_point, _mm256_min_ps(_mm256_max_ps(_mm256_sub_ps(first, below), first), last));
}

QPASS_AVX2 int64_t sum_avx2(const int8_t* q, int64_t K) {
  const __m256i flip = _mm256_set1_epi8((char)0x80), none = _mm256_setzero_si256();
  __m256i sums = none;
  int64_t k = 0, sum = 0;
  for (; k + 32 <= K; k += 32)  // of bytes with 128 added, which are not negative
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(q + k)), flip), none));
  alignas(32) int64_t parts[4];
  _mm256_store_si256((__m256i*)parts, sums);
  sum = parts[0] + parts[1] + parts[2] + parts[3] - 128 * k;
  for (; k < K; k++) sum += q[k];
  return sum;
}

}  // namespace
}  // namespace qpass
