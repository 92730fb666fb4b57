// AVX2 activation quantization: float rows in, int8 codes, scales, zero points and sums of 32 codes out.
// The same operations in the same precision as kernels/reference/activation.py, so codes and scales agree bit for bit.
#pragma once

namespace qpass {
namespace {

constexpr float kEps = 1e-10f;

// The last values of a row that ends at K; zeros after the end change neither the largest nor the smallest.
__attribute__((noinline)) __m256 tail8(const void* row, DType dtype, int64_t k, int64_t K) {
  alignas(32) float tail[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = k; i < K; i++) tail[i - k] = load_float(row, dtype, i);
  return _mm256_load_ps(tail);
}

inline __m256 row8(const void* row, DType dtype, int64_t k, int64_t K) {
  return k + 8 <= K ? load8(row, dtype, k) : tail8(row, dtype, k, K);
}

inline int32_t sum32(__m256i codes) {  // of 32 int8
  __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <bool ASYMMETRIC>
void quantize_rows(const char* x, DType dtype, int64_t M, int64_t K, int64_t Kp, int8_t* q, float* scale,
                   float* zero_point, int32_t* sums) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const int64_t stride = K * bytes_of(dtype);
  for (int64_t m = 0; m < M; m++, x += stride, q += Kp) {
    __m256 high = _mm256_setzero_ps(), low = high, nan = high;
    for (int64_t k = 0; k < K; k += 8) {
      __m256 v = row8(x, dtype, k, K);
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      if (ASYMMETRIC) {
        low = _mm256_min_ps(low, v);
        high = _mm256_max_ps(high, v);
      } else {
        high = _mm256_max_ps(high, _mm256_andnot_ps(sign, v));
      }
    }
    const bool any_nan = _mm256_movemask_ps(nan) != 0;
    const float top = max_of(high);
    float s, zp = 0;
    if (ASYMMETRIC) {
      const float bottom = -max_of(_mm256_xor_ps(low, sign)), range = top - bottom;
      s = any_nan ? __builtin_nanf("") : (range > kEps ? range : kEps) / 255;
      zp = -128 - _mm_cvtss_f32(_mm_round_ss(_mm_setzero_ps(), _mm_set_ss(bottom / s), _MM_FROUND_TO_NEAREST_INT));
      zero_point[m] = zp;
    } else {
      s = any_nan ? __builtin_nanf("") : (top > kEps ? top : kEps) / 127;
    }
    scale[m] = s;
    const __m256 divisor = _mm256_set1_ps(s), offset = _mm256_set1_ps(zp);
    const __m256 least = _mm256_set1_ps(ASYMMETRIC ? -128 : -127), most = _mm256_set1_ps(127);
    for (int64_t k0 = 0; k0 < Kp; k0 += 32) {
      __m256i c[4];
#pragma GCC unroll 1
      for (int i = 0; i < 4; i++) {
        const int64_t k = k0 + i * 8;
        if (k >= K) {
          c[i] = _mm256_setzero_si256();
          continue;
        }
        __m256 v = _mm256_div_ps(row8(x, dtype, k, K), divisor);
        if (ASYMMETRIC) v = _mm256_add_ps(_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT), offset);
        __m256 number = _mm256_cmp_ps(v, v, _CMP_ORD_Q);  // a NaN gets code 0; its row's scale is NaN or Inf
        v = _mm256_and_ps(_mm256_min_ps(_mm256_max_ps(v, least), most), number);
        c[i] = _mm256_cvtps_epi32(v);
      }
      __m256i ab = _mm256_packs_epi32(c[0], c[1]), cd = _mm256_packs_epi32(c[2], c[3]);
      __m256i codes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256((__m256i*)(q + k0), codes);
      if (ASYMMETRIC && k0 + 32 > K) {  // a padded input would have the zero point as its code
        for (int64_t k = K > k0 ? K : k0; k < k0 + 32; k++) q[k] = 0;
        codes = _mm256_loadu_si256((const __m256i*)(q + k0));
      }
      *sums++ = sum32(codes);
    }
  }
}

void quantize(const void* x, DType dtype, int64_t M, int64_t K, int64_t Kp, bool asymmetric, int8_t* q, float* scale,
              float* zero_point, int32_t* sums) {
  if (asymmetric) quantize_rows<true>((const char*)x, dtype, M, K, Kp, q, scale, zero_point, sums);
  else quantize_rows<false>((const char*)x, dtype, M, K, Kp, q, scale, zero_point, sums);
}

}  // namespace
}  // namespace qpass
