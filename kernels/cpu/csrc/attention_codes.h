// Codes of a quantized cache: rows of keys or values in, floats in registers or memory out, and their scales.
#pragma once
#include "abi.h"
#include "avx2_exp.h"
#include "convert.h"

namespace qpass {
namespace {

// kFloat: rows that were decoded to memory, because they have scales that registers do not take (see has_parts).
enum Kind { kInt8 = 0, kFp8 = 1, kInt4 = 2, kFloat = 3 };

// What a register of `codes8` still has to be multiplied by, half of it: fp8 comes out 2^120 too small, which no float
// can make up for at once.
template <int kind>
constexpr float half_unit = kind == kFp8 ? 0x1p60f : 1.0f;

// 8 codes of e4m3 in the low bytes, their signs above: moved up so that exponent and mantissa lie in float's place, the
// sign is there too. e4m3 has bias 7: in float's place its numbers are 2^120 too small, the subnormal ones too.
QPASS_AVX2_INLINE __m256 of_fp8(__m256i extended) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(extended, 20), _mm256_set1_epi32((int)0x87f00000u)));
}

// 8 codes of a row from byte `at`, without their unit; of int4 those of the low nibbles or of the high ones, 0 to 15.
template <int kind, bool HIGH = false>
QPASS_AVX2_INLINE __m256 codes8(const uint8_t* row, int64_t at) {
  if (kind == kFloat) return _mm256_loadu_ps((const float*)row + at);
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)(row + at));
  if (kind == kInt8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  if (kind == kFp8) return of_fp8(_mm256_cvtepi8_epi32(bytes));
  const __m256i u = _mm256_cvtepu8_epi32(bytes);
  return _mm256_cvtepi32_ps(HIGH ? _mm256_srli_epi32(u, 4) : _mm256_and_si256(u, _mm256_set1_epi32(15)));
}

// Into how many parts of one scale the products of a row are split: int4 has element j and j + size / 2 in one byte.
inline int64_t parts_of(const qp_cached& c, int kind) { return kind == kInt4 && c.groups == 1 ? 2 : c.groups; }

// Whether products read the codes themselves: rows of one scale, and of int4 whose scales no byte's two codes share.
inline bool has_parts(const qp_cached& c, int kind) { return c.groups == 1 || (kind == kInt4 && c.groups % 2 == 0); }

QPASS_AVX2_INLINE float scale_at(const qp_cached& c, int64_t at) {
  if (c.scale_dtype == (int32_t)DType::f16) return _cvtsh_ss(((const uint16_t*)c.scale)[at]);
  return load_float(c.scale, (DType)c.scale_dtype, at);
}

// Scales of `count` rows from token t on, [groups][room], 0 where there is no row.
QPASS_AVX2_INLINE void scales_of(const qp_cached& c, int64_t b, int64_t h, int64_t t, int64_t count, int64_t room,
                                 float* out) {
  const int64_t at = b * c.scale_batch + h * c.scale_head + t * c.scale_token;
  int64_t j = 0;
  if (c.groups == 1 && c.scale_token == 1 && c.scale_dtype == (int32_t)DType::f16)
    for (; j + 8 <= count; j += 8)
      _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)c.scale + at + j))));
  for (int64_t g = 0; g < c.groups; g++)
    for (int64_t i = j; i < room; i++)
      out[g * room + i] = i < count ? scale_at(c, at + i * c.scale_token + g * c.scale_group) : 0;
}

template <int kind>
QPASS_AVX2 void decode_row(const qp_cached& c, const uint8_t* row, int64_t scale, int64_t size, float* out) {
  const int64_t group = size / c.groups;
  const __m256 unit = _mm256_set1_ps(half_unit<kind>), zero = _mm256_set1_ps(kind == kInt4 ? 8 : 0);
  for (int64_t i = 0; i < size; i += 8) {
    const bool high = kind == kInt4 && i >= size / 2;
    const __m256 code = high ? codes8<kind, true>(row, i - size / 2) : codes8<kind>(row, i);
    const __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_sub_ps(code, zero), unit), unit);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(value, _mm256_set1_ps(scale_at(c, scale + i / group * c.scale_group))));
  }
}

// `count` rows from token t on as floats, scaled.
inline void decode_rows(int32_t kind, const qp_cached& c, int64_t b, int64_t h, int64_t t, int64_t count, int64_t size,
                        float* out) {
  const auto one = kind == kInt8 ? decode_row<kInt8> : kind == kFp8 ? decode_row<kFp8> : decode_row<kInt4>;
  for (int64_t j = t; j < t + count; j++, out += size)
    one(c, (const uint8_t*)c.codes + b * c.batch + h * c.head + j * c.token,
        b * c.scale_batch + h * c.scale_head + j * c.scale_token, size, out);
}

}  // namespace
}  // namespace qpass
