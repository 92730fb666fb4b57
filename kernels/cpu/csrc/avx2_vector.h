// AVX2 loads, stores and reductions that the AVX2 kernels share. Included inside avx2.cpp's target region only.
#pragma once

namespace qpass {
namespace {

inline __m256 load8(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return _mm256_loadu_ps((const float*)p + i);
  __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + i));
  if (dtype == DType::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m128i bf16_of(__m256 v) {
  __m256i u = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}

inline void store8(void* p, DType dtype, int64_t i, __m256 v) {
  if (dtype == DType::f32) {
    _mm256_storeu_ps((float*)p + i, v);
    return;
  }
  __m128i half = dtype == DType::bf16 ? bf16_of(v) : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128((__m128i*)((uint16_t*)p + i), half);
}

inline float max_of(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// Adds the bias to 16 outputs of row m, starting at column n, and stores those that exist (n + i < N).
inline void finish16(const Output& out, int64_t m, int64_t n, int64_t N, __m256 y0, __m256 y1) {
  const int64_t at = m * out.ld + n;
  if (n + 16 <= N) {
    if (out.bias) {
      y0 = _mm256_add_ps(y0, load8(out.bias, out.bias_dtype, n));
      y1 = _mm256_add_ps(y1, load8(out.bias, out.bias_dtype, n + 8));
    }
    store8(out.data, out.dtype, at, y0);
    store8(out.data, out.dtype, at + 8, y1);
    return;
  }
  alignas(32) float y[16];
  _mm256_store_ps(y, y0);
  _mm256_store_ps(y + 8, y1);
  for (int64_t i = 0; n + i < N; i++) {
    float v = out.bias ? y[i] + load_float(out.bias, out.bias_dtype, n + i) : y[i];
    store_float(out.data, out.dtype, at + i, v);
  }
}

// Scales row m by its activation's scale, after taking off its zero point, and stores its outputs of one block.
inline __attribute__((always_inline)) void finish_row(const Weight& w, const QuantRows& x, const Output& out, int64_t m,
                                                      int64_t block, __m256 y0, __m256 y1) {
  if (x.zero_point) {
    const __m256 zero_point = _mm256_set1_ps(x.zero_point[m]);
    y0 = _mm256_fnmadd_ps(zero_point, _mm256_loadu_ps(w.colsum + block * 16), y0);
    y1 = _mm256_fnmadd_ps(zero_point, _mm256_loadu_ps(w.colsum + block * 16 + 8), y1);
  }
  const __m256 scale = _mm256_set1_ps(x.scale[m]);
  finish16(out, m, block * 16, w.N, _mm256_mul_ps(y0, scale), _mm256_mul_ps(y1, scale));
}

// The scales of 8 outputs: half h of block, group g.
inline __m256 scales8(const Weight& w, int64_t block, int64_t g, int h) {
  return load8(w.scale, w.scale_dtype, (block * w.groups + g) * 16 + h * 8);
}

inline __m256i zero_points8(const Weight& w, int64_t block, int64_t g, int h) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(w.zero_point + (block * w.groups + g) * 16 + h * 8)));
}

}  // namespace
}  // namespace qpass
