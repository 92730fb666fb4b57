// Emulation of the vector instructions that rounding rows to codes takes (avx512_quantize.h).
#pragma once
#include "emulated_vector.h"

#define EMULATED_LANES(name, lane) \
  inline __m512i name(__m512i a, __m512i b) { return each<__m512i>([&](int i) { return lane; }); }
EMULATED_LANES(_mm512_max_epi32, (int32_t)a.at[i] > (int32_t)b.at[i] ? a.at[i] : b.at[i])
EMULATED_LANES(_mm512_min_epi32, (int32_t)a.at[i] < (int32_t)b.at[i] ? a.at[i] : b.at[i])
EMULATED_LANES(_mm512_permutexvar_epi32, b.at[a.at[i] & 15])
#undef EMULATED_LANES

inline void _mm512_storeu_si512(void* p, __m512i v) { memcpy(p, &v, 64); }
inline __m512i _mm512_set1_epi16(int n) { return _mm512_set1_epi32((int32_t)(((uint32_t)n & 0xffff) * 0x10001)); }
inline __m512i _mm512_max_epu16(__m512i a, __m512i b) {
  const auto x = same_bits<Lanes<uint16_t, 32>>(a), y = same_bits<Lanes<uint16_t, 32>>(b);
  return same_bits<__m512i>(each<Lanes<uint16_t, 32>>([&](int i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; }));
}
template <typename... Int>
__m512i _mm512_setr_epi32(Int... lanes) {
  const int32_t all[16] = {lanes...};
  return each<__m512i>([&](int lane) { return (uint32_t)all[lane]; });
}
// Within each 128 bits: the numbers of a, then those of b, narrowed with saturation.
inline __m512i _mm512_packs_epi32(__m512i a, __m512i b) {
  return same_bits<__m512i>(each<Lanes<int16_t, 32>>([&](int i) {
    const int32_t n = (int32_t)(i % 8 < 4 ? a : b).at[i / 8 * 4 + i % 4];
    return (int16_t)(n < -32768 ? -32768 : n > 32767 ? 32767 : n);
  }));
}
inline __m512i _mm512_packs_epi16(__m512i a, __m512i b) {
  const auto x = same_bits<Lanes<int16_t, 32>>(a), y = same_bits<Lanes<int16_t, 32>>(b);
  return same_bits<__m512i>(each<Lanes<int8_t, 64>>([&](int i) {
    const int16_t n = (i % 16 < 8 ? x : y).at[i / 16 * 8 + i % 8];
    return (int8_t)(n < -128 ? -128 : n > 127 ? 127 : n);
  }));
}
inline __m512i _mm512_maskz_mov_epi32(__mmask16 k, __m512i a) {
  return each<__m512i>([&](int i) { return k >> i & 1 ? a.at[i] : 0u; });
}
inline int32_t _mm512_reduce_max_epi32(__m512i v) {
  int32_t most = (int32_t)v.at[0];
  for (uint32_t lane : v.at) most = (int32_t)lane > most ? (int32_t)lane : most;
  return most;
}
inline int32_t _mm512_mask_reduce_add_epi32(__mmask16 k, __m512i v) {
  return _mm512_reduce_add_epi32(_mm512_maskz_mov_epi32(k, v));
}
inline __m512i _mm512_cvtps_epi32(__m512 v) { return _mm512_maskz_cvtps_epi32(0xffff, v); }
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return each<__m512>([&](int i) { return std::fmaf(a.at[i], b.at[i], -c.at[i]); });
}
// The larger of two magnitudes; the other one where one is NaN.
inline __m512 _mm512_range_ps(__m512 a, __m512 b, int imm8) {
  if (imm8 != 11) emulated_fault("only the larger magnitude is emulated");
  return each<__m512>([&](int i) { return std::fmax(std::fabs(a.at[i]), std::fabs(b.at[i])); });
}
