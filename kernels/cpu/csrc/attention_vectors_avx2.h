// Vectors of attention on AVX2: 8 numbers, and what the loops over keys and values do with them.
//
// HALF is for vectors of 16, and never asked for here.
#pragma once
#include <cmath>

#include "avx2_target.h"
#include "attention_kinds.h"
#include "convert.h"
#include "product.h"

#include "avx2_begin.h"

#include "avx2_vector.h"

#include "avx2_end.h"

#define QPASS_VECTOR QPASS_AVX2
#define QPASS_VECTOR_INLINE QPASS_AVX2_INLINE

namespace qpass {
namespace {

using Vector = __m256;
constexpr int kLanes = 8;

QPASS_VECTOR_INLINE Vector all(float v) { return _mm256_set1_ps(v); }
QPASS_VECTOR_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
QPASS_VECTOR_INLINE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
QPASS_VECTOR_INLINE Vector plus(Vector a, Vector b) { return _mm256_add_ps(a, b); }
QPASS_VECTOR_INLINE Vector minus(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
QPASS_VECTOR_INLINE Vector times(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
QPASS_VECTOR_INLINE Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
QPASS_VECTOR_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
QPASS_VECTOR_INLINE Vector minus_product(Vector c, Vector a, Vector b) { return _mm256_fnmadd_ps(a, b, c); }
QPASS_VECTOR_INLINE Vector nearest(Vector v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QPASS_VECTOR_INLINE float sum_of(Vector v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// 2^n for integers n from -126 to 127.
QPASS_VECTOR_INLINE Vector power_of_two(Vector n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

// v where x >= least, else 0.
QPASS_VECTOR_INLINE Vector where_at_least(Vector x, Vector least, Vector v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(x, least, _CMP_GE_OQ));
}
QPASS_VECTOR_INLINE Vector where_not_0(Vector x, Vector v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}

QPASS_VECTOR_INLINE bool any_not_0(Vector v) {
  return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)) != 0;
}
QPASS_VECTOR_INLINE bool any_nan(Vector v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
// NaN where v has one, else as `kept`.
QPASS_VECTOR_INLINE Vector nan_kept(Vector kept, Vector v) {
  return _mm256_or_ps(kept, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

// One bit a number of what is added to a score: whether it hides the key.
QPASS_VECTOR_INLINE uint32_t hidden(Vector add) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(add, all(-INFINITY), _CMP_EQ_OQ));
}

// s + add, and -inf where `add` is, whatever s is.
QPASS_VECTOR_INLINE Vector masked_sum(Vector s, Vector add) {
  return _mm256_blendv_ps(_mm256_add_ps(s, add), add, _mm256_cmp_ps(add, all(-INFINITY), _CMP_EQ_OQ));
}

// -inf for each byte that is 0, 0 for others.
QPASS_VECTOR_INLINE Vector added_by(const uint8_t* seen) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)seen));
  return _mm256_and_ps(all(-INFINITY), _mm256_castsi256_ps(_mm256_cmpeq_epi32(bytes, _mm256_setzero_si256())));
}

template <bool HALF>
QPASS_VECTOR_INLINE Vector load_part(const float* p) {
  return _mm256_loadu_ps(p);
}
template <bool HALF>
QPASS_VECTOR_INLINE void store_part(float* p, Vector v) {
  _mm256_storeu_ps(p, v);
}
template <bool HALF>
QPASS_VECTOR_INLINE void store_as(DType dtype, void* p, int64_t at, Vector v) {
  store8(p, dtype, at, v);
}

// Numbers of a row from element `at` on; fp8 too small by 2^120. Of int4, whose byte `at` it is, those of the low
// nibbles or of the high ones, 0 to 15.
template <int kind, bool HIGH, bool HALF>
QPASS_VECTOR_INLINE Vector numbers(const uint8_t* row, int64_t at) {
  if constexpr (kind == kFloat) {
    return _mm256_loadu_ps((const float*)row + at);
  } else if constexpr (kind == kBf16 || kind == kF16) {
    const __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)row + at));
    if (kind == kF16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  } else {
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)(row + at));
    if (kind == kInt8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    if (kind == kFp8) {
      // Moved up so that exponent and mantissa lie in float's place; the sign above is there too.
      const __m256i moved = _mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), 20);
      return _mm256_castsi256_ps(_mm256_and_si256(moved, _mm256_set1_epi32((int)0x87f00000u)));
    }
    const __m256i u = _mm256_cvtepu8_epi32(bytes);
    return _mm256_cvtepi32_ps(HIGH ? _mm256_srli_epi32(u, 4) : _mm256_and_si256(u, _mm256_set1_epi32(15)));
  }
}

// Half of the sums of 8 vectors.
using Half = __m128;
QPASS_VECTOR_INLINE Half half_sums(const Vector (&a)[4]) {
  const Vector s = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
QPASS_VECTOR_INLINE Vector sums(Half low, Half high) { return _mm256_set_m128(high, low); }

}  // namespace
}  // namespace qpass
