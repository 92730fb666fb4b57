// AVX2: exp of 8 numbers and the sum of 8, for softmax; each function says for itself which instructions it uses.
#pragma once
#include "avx2_target.h"

namespace qpass {
namespace {

QPASS_AVX2_INLINE float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// exp for x <= 0, within 2 units of the last place; 0 below -87. Coefficients of Cephes' expf.
QPASS_AVX2_INLINE __m256 exp8(__m256 x) {
  const __m256 small = _mm256_set1_ps(-87.0f), kept = _mm256_max_ps(x, small);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(kept, _mm256_set1_ps(1.44269504f)), 8);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), kept);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  const float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (float c : rest) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(exponent)), _mm256_cmp_ps(x, small, _CMP_GE_OQ));
}

}  // namespace
}  // namespace qpass
