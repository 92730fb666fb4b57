// Activation quantization on AVX512: the codes, scales and zero points of kernels/reference/activation.py, bit for bit.
//
// A code is x / scale rounded to nearest even. 16 divisions take as long as 40 other instructions, so x is multiplied with
// 1 / scale, which gives the quotient but for 2^-22 of it, and only where that is too near the middle of two integers to
// tell is the vector divided.
#pragma once
#include "avx512_vector.h"

namespace qpass {
namespace {

constexpr float kEps = 1e-10f;
constexpr float kNearMiddle = 0.5f - 1.f / 16384;  // |quotient| < 256

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

// The largest magnitude, NaN if any value is: without its sign a float is ordered as an integer, with NaN above all.
template <DType DTYPE>
QPASS_AVX512 float magnitude_of(const void* x, int64_t at, int64_t K) {
  const __m512i sign = _mm512_set1_epi32(0x7fffffff), sign16 = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512(), most16 = most;
  int64_t k = 0;
  if (DTYPE == DType::bf16) {
    __m512i other = most16;
    for (; k + 64 <= K; k += 64) {
      const uint16_t* from = (const uint16_t*)x + at + k;
      most16 = _mm512_max_epu16(most16, _mm512_and_si512(_mm512_loadu_si512(from), sign16));
      other = _mm512_max_epu16(other, _mm512_and_si512(_mm512_loadu_si512(from + 32), sign16));
    }
    most16 = _mm512_max_epu16(most16, other);
    most = _mm512_max_epi32(_mm512_slli_epi32(most16, 16), _mm512_andnot_si512(_mm512_set1_epi32(0xffff), most16));
  }
  for (; k < K; k += 16) {
    const __m512 v = load_floats(x, DTYPE, at + k, first_lanes(K - k));
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(v), sign));
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct Rounding {
  __m512 scale, inverse, zero_point;
};

// 16 codes of a row whose numbers are finite, before they are clamped: only those of an asymmetric range need that.
// Adding 1.5 * 2^23 rounds to an integer, which is then in the lower bits. `off` is what was rounded away.
QPASS_AVX512_INLINE __m512i nearest(__m512 v, const Rounding& r, __m512& off) {
  const __m512 middle = _mm512_set1_ps(12582912.f);
  const __m512 whole = _mm512_fmadd_ps(v, r.inverse, middle);
  off = _mm512_fmsub_ps(v, r.inverse, _mm512_sub_ps(whole, middle));
  return _mm512_sub_epi32(_mm512_castps_si512(whole), _mm512_castps_si512(middle));
}

// 16 codes of any row, by division; NaN gives 0.
QPASS_AVX512_INLINE __m512i divided(__m512 v, const Rounding& r, bool asymmetric) {
  __m512 whole = _mm512_roundscale_ps(_mm512_div_ps(v, r.scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  whole = _mm512_add_ps(whole, r.zero_point);
  const __mmask16 number = _mm512_cmp_ps_mask(whole, whole, _CMP_ORD_Q);
  whole = _mm512_min_ps(_mm512_max_ps(whole, _mm512_set1_ps(asymmetric ? -128.f : -127.f)), _mm512_set1_ps(127.f));
  return _mm512_maskz_cvtps_epi32(number, whole);
}

// The sums of codes 0..31 and 32..63 of a line.
QPASS_AVX512_INLINE void sum_line(__m512i line, int32_t* sums) {
  __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), line);
  sums[0] = _mm512_mask_reduce_add_epi32(0x00ff, sum);
  sums[1] = _mm512_mask_reduce_add_epi32(0xff00, sum);
}

// `sums` may be null. `next` is the row that comes after this one, or null: it is fetched meanwhile, for the range of a row
// is found faster than memory gives it.
template <DType DTYPE, bool ASYMMETRIC>
QPASS_AVX512 void quantize_row(const void* x, int64_t at, int64_t K, int64_t Kp, int8_t* q, float* scale,
                               float* zero_point, int32_t* sums, const char* next) {
  constexpr int64_t kBytes = DTYPE == DType::f32 ? 4 : 2;
  float s, z = 0.f;
  if (ASYMMETRIC) {
    const Range r = range_of(x, DTYPE, at, K);
    s = at_least(r.high - r.low, kEps) / 255.f;
    *zero_point = z = -128.f - __builtin_rintf(r.low / s);
  } else {
    s = at_least(magnitude_of<DTYPE>(x, at, K), kEps) / 127.f;
  }
  *scale = s;
  const Rounding r = {_mm512_set1_ps(s), _mm512_set1_ps(1.f / s), _mm512_set1_ps(z)};
  const bool always_divides = !(s < 1e37f);  // Inf, NaN, or an inverse that is no normal number
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t k = 0; k < Kp; k += 64) {
    __m512 v[4], off[4];
    __m512i c[4];
    const bool whole = k + 64 <= K;
    if (next && whole) {
      for (int64_t line = 0; line < 64 * kBytes; line += 64) _mm_prefetch(next + k * kBytes + line, _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      v[i] = load_floats(x, DTYPE, at + k + i * 16, whole ? (__mmask16)0xffff : first_lanes(K - k - i * 16));
      c[i] = nearest(v[i], r, off[i]);
      if (ASYMMETRIC) {
        c[i] = _mm512_add_epi32(c[i], _mm512_cvtps_epi32(r.zero_point));
        c[i] = _mm512_min_epi32(_mm512_max_epi32(c[i], _mm512_set1_epi32(-128)), _mm512_set1_epi32(127));
      }
    }
    const __m512 most = _mm512_range_ps(_mm512_range_ps(off[0], off[1], 11), _mm512_range_ps(off[2], off[3], 11), 11);
    if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(kNearMiddle), _CMP_NLT_UQ) || always_divides) {
      for (int i = 0; i < 4; i++) {
        const __m512 away = _mm512_range_ps(off[i], off[i], 11);
        if (_mm512_cmp_ps_mask(away, _mm512_set1_ps(kNearMiddle), _CMP_NLT_UQ) || always_divides)
          c[i] = divided(v[i], r, ASYMMETRIC);
      }
    }
    if (ASYMMETRIC && !whole) {
      for (int i = 0; i < 4; i++) c[i] = _mm512_maskz_mov_epi32(first_lanes(K - k - i * 16), c[i]);
    }
    // Packing works within 128 bits, so that the words of the four vectors have to be put in order afterwards.
    const __m512i mixed = _mm512_packs_epi16(_mm512_packs_epi32(c[0], c[1]), _mm512_packs_epi32(c[2], c[3]));
    const __m512i line = _mm512_permutexvar_epi32(in_order, mixed);
    _mm512_storeu_si512(q + k, line);
    if (sums) sum_line(line, sums + k / 32);
  }
}

template <DType DTYPE>
void quantize_rows(const void* x, int64_t M, int64_t K, int64_t Kp, bool asymmetric, int8_t* q, float* scale,
                   float* zero_point, int32_t* sums) {
  const auto row = asymmetric ? quantize_row<DTYPE, true> : quantize_row<DTYPE, false>;
  for (int64_t m = 0; m < M; m++) {
    const char* next = m + 1 < M ? (const char*)x + (m + 1) * K * (DTYPE == DType::f32 ? 4 : 2) : nullptr;
    row(x, m * K, K, Kp, q + m * Kp, scale + m, zero_point + m, sums ? sums + m * (Kp / 32) : nullptr, next);
  }
}

void quantize_avx512(const void* x, DType dtype, int64_t M, int64_t K, int64_t Kp, bool asymmetric, int8_t* q,
                     float* scale, float* zero_point, int32_t* sums) {
  const auto rows = dtype == DType::f32    ? quantize_rows<DType::f32>
                    : dtype == DType::bf16 ? quantize_rows<DType::bf16>
                                           : quantize_rows<DType::f16>;
  rows(x, M, K, Kp, asymmetric, q, scale, zero_point, sums);
}

}  // namespace
}  // namespace qpass
