// Emulation of the vector instructions that attention takes (attention_vectors_avx512.h).
#pragma once
#include "emulated_rounding.h"

inline float _cvtsh_ss(uint16_t half) { return (float)same_bits<_Float16>(half); }
inline __m128i _mm_loadl_epi64(const __m128i* p) {
  __m128i v = {};
  memcpy(&v, (const void*)p, 8);
  return v;
}
inline __m256i _mm256_loadu_si256(const __m256i* p) { return load_vector<__m256i>(p); }
inline void _mm512_storeu_ps(void* p, __m512 v) { memcpy(p, &v, sizeof v); }
inline __m512 _mm512_mask_mov_ps(__m512 src, __mmask16 k, __m512 a) {
  return each<__m512>([&](int i) { return k >> i & 1 ? a.at[i] : src.at[i]; });
}
inline __m512 _mm512_mask_blend_ps(__mmask16 k, __m512 a, __m512 b) { return _mm512_mask_mov_ps(a, k, b); }
inline __m512 _mm512_maskz_mov_ps(__mmask16 k, __m512 a) { return _mm512_mask_mov_ps(_mm512_setzero_ps(), k, a); }
inline __m512 _mm512_mask_add_ps(__m512 src, __mmask16 k, __m512 a, __m512 b) {
  return _mm512_mask_mov_ps(src, k, _mm512_add_ps(a, b));
}
inline __mmask16 _mm512_testn_epi32_mask(__m512i a, __m512i b) {
  unsigned k = 0;
  for (int i = 0; i < 16; i++) k |= (unsigned)((a.at[i] & b.at[i]) == 0) << i;
  return (__mmask16)k;
}
// Of each four: two of a and two of b, named by pairs of bits.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int imm8) {
  return each<__m512>([&](int i) { return (i % 4 < 2 ? a : b).at[i / 4 * 4 + (imm8 >> 2 * (i % 4) & 3)]; });
}
// The same of the fours themselves.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int imm8) {
  return each<__m512>([&](int i) { return (i < 8 ? a : b).at[(imm8 >> 2 * (i / 4) & 3) * 4 + i % 4]; });
}
// Upper half to lower half, again and again.
inline float _mm512_reduce_add_ps(__m512 v) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v.at[i] += v.at[i + half];
  return v.at[0];
}
