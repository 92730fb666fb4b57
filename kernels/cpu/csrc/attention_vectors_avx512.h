// Vectors of attention on AVX512: 16 numbers, and what the loops over keys and values do with them.
//
// HALF loads and stores 8 of them: heads and groups are multiples of 8. What is not loaded is 0.
#pragma once
#include <cmath>

#include "attention_kinds.h"
#include "avx512_vector.h"

#define QPASS_VECTOR QPASS_AVX512
#define QPASS_VECTOR_INLINE QPASS_AVX512_INLINE

namespace qpass {
namespace {

using Vector = __m512;
constexpr int kLanes = 16;

QPASS_VECTOR_INLINE Vector all(float v) { return _mm512_set1_ps(v); }
QPASS_VECTOR_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
QPASS_VECTOR_INLINE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
QPASS_VECTOR_INLINE Vector plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
QPASS_VECTOR_INLINE Vector minus(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
QPASS_VECTOR_INLINE Vector times(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
QPASS_VECTOR_INLINE Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
QPASS_VECTOR_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
QPASS_VECTOR_INLINE Vector minus_product(Vector c, Vector a, Vector b) { return _mm512_fnmadd_ps(a, b, c); }
QPASS_VECTOR_INLINE Vector nearest(Vector v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QPASS_VECTOR_INLINE float sum_of(Vector v) { return _mm512_reduce_add_ps(v); }
QPASS_VECTOR_INLINE float max_of(Vector v) { return _mm512_reduce_max_ps(v); }

// 2^n for integers n from -126 to 127.
QPASS_VECTOR_INLINE Vector power_of_two(Vector n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

// v where x >= least, else 0.
QPASS_VECTOR_INLINE Vector where_at_least(Vector x, Vector least, Vector v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_GE_OQ), v);
}
QPASS_VECTOR_INLINE Vector where_not_0(Vector x, Vector v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), v);
}

QPASS_VECTOR_INLINE bool any_not_0(Vector v) {
  return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
}
QPASS_VECTOR_INLINE bool any_nan(Vector v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
// NaN where v has one, else as `kept`.
QPASS_VECTOR_INLINE Vector nan_kept(Vector kept, Vector v) {
  return _mm512_mask_mov_ps(kept, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
}

// One bit a number of what is added to a score: whether it hides the key.
QPASS_VECTOR_INLINE uint32_t hidden(Vector add) { return _mm512_cmp_ps_mask(add, all(-INFINITY), _CMP_EQ_OQ); }

// s + add, and -inf where `add` is, whatever s is.
QPASS_VECTOR_INLINE Vector masked_sum(Vector s, Vector add) {
  return _mm512_mask_add_ps(add, _mm512_cmp_ps_mask(add, all(-INFINITY), _CMP_NEQ_UQ), s, add);
}

// -inf for each byte that is 0, 0 for others.
QPASS_VECTOR_INLINE Vector added_by(const uint8_t* seen) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)seen));
  return _mm512_maskz_mov_ps(_mm512_testn_epi32_mask(bytes, bytes), all(-INFINITY));
}

template <bool HALF>
QPASS_VECTOR_INLINE Vector load_part(const float* p) {
  return HALF ? _mm512_maskz_loadu_ps(0xff, p) : _mm512_loadu_ps(p);
}
template <bool HALF>
QPASS_VECTOR_INLINE void store_part(float* p, Vector v) {
  if (HALF) _mm512_mask_storeu_ps(p, 0xff, v);
  else _mm512_storeu_ps(p, v);
}
template <bool HALF>
QPASS_VECTOR_INLINE void store_as(DType dtype, void* p, int64_t at, Vector v) {
  store_any(p, dtype, at, HALF ? 0xff : 0xffff, v);
}

// Numbers of a row from element `at` on; fp8 too small by 2^120. Of int4, whose byte `at` it is, those of the low
// nibbles or of the high ones, 0 to 15.
template <int kind, bool HIGH, bool HALF>
QPASS_VECTOR_INLINE Vector numbers(const uint8_t* row, int64_t at) {
  if constexpr (kind == kFloat) {
    return load_part<HALF>((const float*)row + at);
  } else if constexpr (kind == kBf16 || kind == kF16) {
    const uint16_t* p = (const uint16_t*)row + at;
    const __m256i half = HALF ? _mm256_maskz_loadu_epi16(0xff, p) : _mm256_loadu_si256((const __m256i*)p);
    if (kind == kF16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  } else {
    const __m128i* p = (const __m128i*)(row + at);
    const __m128i bytes = HALF ? _mm_loadl_epi64(p) : _mm_loadu_si128(p);
    if (kind == kInt8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    if (kind == kFp8) {
      // Moved up so that exponent and mantissa lie in float's place; the sign above is there too.
      const __m512i moved = _mm512_slli_epi32(_mm512_cvtepi8_epi32(bytes), 20);
      return _mm512_castsi512_ps(_mm512_and_si512(moved, _mm512_set1_epi32((int)0x87f00000u)));
    }
    const __m512i u = _mm512_cvtepu8_epi32(bytes);
    return _mm512_cvtepi32_ps(HIGH ? _mm512_srli_epi32(u, 4) : _mm512_and_si512(u, _mm512_set1_epi32(15)));
  }
}

// Sums of each of two and of four vectors, some lanes still apart: in each run of 4 two lanes of a and two of b; and one
// of each.
QPASS_VECTOR_INLINE Vector of_two(Vector a, Vector b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}
QPASS_VECTOR_INLINE Vector of_four(Vector a, Vector b, Vector c, Vector d) {
  const Vector x = of_two(a, b), y = of_two(c, d);
  return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}

// Half of the way to the 16 sums of 16 vectors.
using Half = Vector;
QPASS_VECTOR_INLINE Half half_sums(const Vector (&a)[8]) {
  const Vector x = of_four(a[0], a[1], a[2], a[3]), y = of_four(a[4], a[5], a[6], a[7]);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, x, y), _mm512_shuffle_f32x4(x, y, 0x4e));
}
QPASS_VECTOR_INLINE Vector sums(Half low, Half high) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

}  // namespace
}  // namespace qpass
