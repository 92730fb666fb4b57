// AVX2: SiLU times the up part, eight numbers at a time, with the operations of experts_gate.h in their order: the same bits.
#pragma once
#include <cstdint>

#include "avx2_target.h"
#include "experts.h"

namespace qpass {
namespace {

inline bool has_eights() { return __builtin_cpu_supports("avx2"); }

QPASS_AVX2_INLINE __m256 by(__m256 v, float c) { return _mm256_mul_ps(v, _mm256_set1_ps(c)); }
QPASS_AVX2_INLINE __m256 plus(__m256 v, float c) { return _mm256_add_ps(v, _mm256_set1_ps(c)); }
QPASS_AVX2_INLINE __m256 two_to(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// e^x as fast_exp gives it; NaN stays, for it is the second operand of each maximum.
QPASS_AVX2_INLINE __m256 fast_exp8(__m256 x) {
  const __m256 v = _mm256_min_ps(_mm256_set1_ps(89.f), _mm256_max_ps(_mm256_set1_ps(-104.f), x));
  const __m256 shifted = plus(by(v, 1.44269504f), 12582912.f);
  const __m256 n = plus(shifted, -12582912.f);
  const __m256 r = _mm256_add_ps(_mm256_sub_ps(v, by(n, 0.693359375f)), by(n, 2.12194440e-4f));
  __m256 p = by(r, 1.9875691500e-4f);
  p = plus(p, 1.3981999507e-3f);
  for (float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = plus(_mm256_mul_ps(p, r), c);
  p = plus(_mm256_add_ps(_mm256_mul_ps(_mm256_mul_ps(p, r), r), r), 1.f);
  const __m256i power = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(_mm256_set1_ps(12582912.f)));
  const __m256i half = _mm256_srai_epi32(_mm256_add_epi32(power, _mm256_srli_epi32(power, 31)), 1);  // towards 0
  return _mm256_mul_ps(_mm256_mul_ps(p, two_to(half)), two_to(_mm256_sub_epi32(power, half)));
}

// y [2I] (gate, then up) -> h [I]; h may be y. Returns how many were done: all but the last I % 8.
QPASS_AVX2 inline int64_t silu_eights(const qp_gate& gate, const float* y, int64_t I, float* h) {
  const __m256 limit = _mm256_set1_ps(gate.limit), bound = _mm256_set1_ps(gate.up_limit);
  const __m256 least = _mm256_set1_ps(-gate.up_limit), alpha = _mm256_set1_ps(gate.alpha), one = _mm256_set1_ps(1.f);
  const __m256 shift = _mm256_set1_ps(gate.shift), sign = _mm256_set1_ps(-0.f);
  int64_t i = 0;
  for (; i + 8 <= I; i += 8) {
    const __m256 g = _mm256_min_ps(limit, _mm256_loadu_ps(y + i));
    const __m256 u = _mm256_max_ps(least, _mm256_min_ps(bound, _mm256_loadu_ps(y + I + i)));
    const __m256 e = fast_exp8(_mm256_xor_ps(sign, _mm256_mul_ps(alpha, g)));
    const __m256 silu = _mm256_mul_ps(g, _mm256_div_ps(one, _mm256_add_ps(one, e)));
    _mm256_storeu_ps(h + i, _mm256_mul_ps(silu, _mm256_add_ps(u, shift)));
  }
  return i;
}

}  // namespace
}  // namespace qpass
