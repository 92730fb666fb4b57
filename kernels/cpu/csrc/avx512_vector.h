// AVX512 loads, stores and roundings that the VNNI and AMX kernels share: 16 outputs of any float type at a time.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa_target.h"
#include "product.h"

namespace qpass {
namespace {

// A mask of the first `count` of 16 lanes; any count.
inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

// The i-th block of each of STREAMS runs into which [begin, end) is cut. The last may be shorter: they end with the last
// block again.
template <int STREAMS>
inline void blocks_at(int64_t begin, int64_t end, int64_t i, int64_t (&block)[STREAMS]) {
  const int64_t count = (end - begin + STREAMS - 1) / STREAMS;
#pragma GCC unroll 4
  for (int s = 0; s < STREAMS; s++) block[s] = begin + s * count + i < end ? begin + s * count + i : end - 1;
}

inline int32_t four_codes(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return word;
}

// p[i .. i + 16) as float32; lanes outside the mask are 0 and not read.
QPASS_AVX512_INLINE __m512 load_floats(const void* p, DType dtype, int64_t i, __mmask16 mask) {
  if (dtype == DType::f32) return _mm512_maskz_loadu_ps(mask, (const float*)p + i);
  __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)p + i);
  if (dtype == DType::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Rounds to nearest even and keeps subnormals, as torch does (vcvtneps2bf16 would flush them); every NaN becomes 0x7fc0.
QPASS_AVX512_INLINE __m256i bf16_of(__m512 v) {
  __m512i u = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(up);
}

QPASS_AVX512_INLINE void store_any(void* p, DType dtype, int64_t i, __mmask16 mask, __m512 v) {
  if (dtype == DType::f32) {
    _mm512_mask_storeu_ps((float*)p + i, mask, v);
    return;
  }
  __m256i half = dtype == DType::bf16 ? bf16_of(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16((uint16_t*)p + i, mask, half);
}

QPASS_AVX512_OUTLINE void store_floats(void* p, DType dtype, int64_t i, __mmask16 mask, __m512 v) {
  store_any(p, dtype, i, mask, v);
}

// Scales and zero points of the 16 outputs of a block, for one group.
QPASS_AVX512_INLINE __m512 group_scales(const Weight& w, int64_t block, int64_t group) {
  return load_floats(w.scale, w.scale_dtype, (block * w.groups + group) * 16, 0xffff);
}

QPASS_AVX512_INLINE __m512i group_zero_points(const Weight& w, int64_t block, int64_t group) {
  const int8_t* at = w.zero_point + (block * w.groups + group) * 16;
  return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
}

// What turns the scaled sums of a block of 16 outputs into results: (sum - x_zero_point * colsum) * x_scale + bias.
// `gain` is a power of two that the sums carry (16 where nibbles were left in the high half of a byte).
struct Columns {
  __m512 bias, colsum;
  int64_t first;
  __mmask16 mask;
};

// Called once per output block: kept out of line, so that the kernels' many variants stay small.
QPASS_AVX512_OUTLINE Columns columns_of(const Weight& w, const Output& out, int64_t block, float gain) {
  Columns c;
  c.first = block * 16;
  c.mask = first_lanes(w.N - c.first);
  c.bias = out.bias ? load_floats(out.bias, out.bias_dtype, c.first, c.mask) : _mm512_setzero_ps();
  c.colsum = w.colsum ? _mm512_mul_ps(_mm512_loadu_ps(w.colsum + c.first), _mm512_set1_ps(gain)) : _mm512_setzero_ps();
  return c;
}

QPASS_AVX512_OUTLINE void finish(const Columns& c, const QuantRows& x, const Output& out, int64_t row, __m512 sum,
                                float gain) {
  if (x.zero_point) sum = _mm512_fnmadd_ps(_mm512_set1_ps(x.zero_point[row]), c.colsum, sum);
  // Written as one fma, so that no compiler flag can change the rounding between instruction sets.
  sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(x.scale[row] / gain), c.bias);
  store_floats(out.data, out.dtype, row * out.ld + c.first, c.mask, sum);
}

}  // namespace
}  // namespace qpass
