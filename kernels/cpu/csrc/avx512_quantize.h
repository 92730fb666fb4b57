// Activation quantization on AVX512: the codes, scales and zero points of kernels/reference/activation.py, bit for bit.
#pragma once
#include "avx512_vector.h"

namespace qpass {
namespace {

constexpr float kEps = 1e-10f;

// max(value, floor) that keeps NaN, as torch's clamp_min does.
inline float at_least(float value, float floor) { return value < floor ? floor : value; }

struct Range {
  float low, high;  // min(x, 0) and max(x, 0); both NaN if any value is
};

QPASS_AVX512 Range range_of(const void* x, DType dtype, int64_t at, int64_t K) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t k = 0; k < K; k += 16) {
    __m512 v = load_floats(x, dtype, at + k, first_lanes(K - k));
    nan = (__mmask16)(nan | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q));
    low = _mm512_min_ps(low, v);
    high = _mm512_max_ps(high, v);
  }
  if (nan) return {__builtin_nanf(""), __builtin_nanf("")};
  return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

// 16 codes from x[at + k ..]; lanes at or after K, and NaN (whose scale is NaN too), give 0.
QPASS_AVX512_INLINE __m512i codes_of(const void* x, DType dtype, int64_t at, int64_t k, int64_t K, __m512 scale,
                                     __m512 zero_point, __m512 lowest) {
  __mmask16 mask = first_lanes(K - k);
  __m512 v = _mm512_div_ps(load_floats(x, dtype, at + k, mask), scale);
  v = _mm512_add_ps(_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), zero_point);
  mask = (__mmask16)(mask & _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q));
  v = _mm512_min_ps(_mm512_max_ps(v, lowest), _mm512_set1_ps(127.f));
  return _mm512_maskz_cvtps_epi32(mask, v);
}

QPASS_AVX512 void quantize_avx512(const void* x, DType dtype, int64_t M, int64_t K, int64_t Kp, bool asymmetric,
                                  int8_t* q, float* scale, float* zero_point, int32_t* sums) {
  for (int64_t m = 0; m < M; m++) {
    const int64_t at = m * K;
    const Range r = range_of(x, dtype, at, K);
    float z = 0.f;
    if (asymmetric) {
      scale[m] = at_least(r.high - r.low, kEps) / 255.f;
      zero_point[m] = z = -128.f - __builtin_rintf(r.low / scale[m]);
    } else {
      scale[m] = at_least(r.high > -r.low ? r.high : -r.low, kEps) / 127.f;
    }
    const __m512 s = _mm512_set1_ps(scale[m]), zp = _mm512_set1_ps(z), lowest = _mm512_set1_ps(asymmetric ? -128.f : -127.f);
    int8_t* codes = q + m * Kp;
    for (int64_t k = 0; k < Kp; k += 32) {
      __m512i c0 = codes_of(x, dtype, at, k, K, s, zp, lowest), c1 = codes_of(x, dtype, at, k + 16, K, s, zp, lowest);
      _mm_storeu_si128((__m128i*)(codes + k), _mm512_cvtsepi32_epi8(c0));
      _mm_storeu_si128((__m128i*)(codes + k + 16), _mm512_cvtsepi32_epi8(c1));
      sums[(m * Kp + k) / 32] = _mm512_reduce_add_epi32(_mm512_add_epi32(c0, c1));
    }
  }
}

}  // namespace
}  // namespace qpass
