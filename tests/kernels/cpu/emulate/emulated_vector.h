// AVX512 intrinsics on arrays of lanes: the same names, the same results bit for bit (but for NaN payloads).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

[[noreturn]] inline void emulated_fault(const char* what) {
  fprintf(stderr, "emulated fault: %s\n", what);
  abort();
}

template <class T, int N>
struct Lanes {
  T at[N];
};
struct __m512 : Lanes<float, 16> {};
struct __m512i : Lanes<uint32_t, 16> {};
struct __m256i : Lanes<uint16_t, 16> {};
struct __m128i : Lanes<uint8_t, 16> {};
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8;
constexpr int _CMP_EQ_OQ = 0, _CMP_UNORD_Q = 3, _CMP_NEQ_UQ = 4, _CMP_ORD_Q = 7, _CMP_NLT_UQ = 21, _CMP_GE_OQ = 29;
constexpr int _MM_HINT_T0 = 3, _MM_HINT_T1 = 2;
inline void _mm_prefetch(const char*, int) {}
inline unsigned _mm_getcsr() { return 0; }
inline void _mm_setcsr(unsigned) {}

template <class To, class From>
To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps every bit");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// A vector whose lane i is f(i).
template <class V, class F>
V each(F f) {
  V v;
  for (int i = 0; i < (int)(sizeof v.at / sizeof v.at[0]); i++) v.at[i] = f(i);
  return v;
}

inline void need_aligned(const void* p, int bytes) {
  if ((uintptr_t)p % bytes) emulated_fault("an aligned load or store at an unaligned address");
}

template <class V>
V load_vector(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// --- loads and stores
inline __m512 _mm512_loadu_ps(const void* p) { return load_vector<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return load_vector<__m512i>(p); }
inline __m512 _mm512_load_ps(const void* p) { return need_aligned(p, 64), load_vector<__m512>(p); }
inline __m512i _mm512_load_si512(const void* p) { return need_aligned(p, 64), load_vector<__m512i>(p); }
inline __m128i _mm_loadu_si128(const __m128i* p) { return load_vector<__m128i>(p); }
inline void _mm512_store_ps(void* p, __m512 v) { need_aligned(p, 64), memcpy(p, &v, 64); }
inline void _mm512_store_si512(void* p, __m512i v) { need_aligned(p, 64), memcpy(p, &v, 64); }
inline void _mm256_storeu_si256(__m256i* p, __m256i v) { memcpy((void*)p, &v, 32); }
inline void _mm_storeu_si128(__m128i* p, __m128i v) { memcpy((void*)p, &v, 16); }

inline __m512 _mm512_maskz_loadu_ps(__mmask16 k, const float* p) {
  return each<__m512>([&](int i) { return k >> i & 1 ? p[i] : 0.f; });
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const uint16_t* p) {
  return each<__m256i>([&](int i) { return k >> i & 1 ? p[i] : (uint16_t)0; });
}
inline void _mm512_mask_storeu_ps(float* p, __mmask16 k, __m512 v) {
  for (int i = 0; i < 16; i++)
    if (k >> i & 1) p[i] = v.at[i];
}
inline void _mm256_mask_storeu_epi16(uint16_t* p, __mmask16 k, __m256i v) {
  for (int i = 0; i < 16; i++)
    if (k >> i & 1) p[i] = v.at[i];
}

// --- constants and casts
inline __m512 _mm512_set1_ps(float f) { return each<__m512>([&](int) { return f; }); }
inline __m512i _mm512_set1_epi32(int32_t n) { return each<__m512i>([&](int) { return (uint32_t)n; }); }
inline __m512i _mm512_set1_epi8(char n) { return _mm512_set1_epi32((int32_t)((uint8_t)n * 0x01010101u)); }
inline __m512i _mm512_set1_epi64(int64_t n) {
  return each<__m512i>([&](int i) { return (uint32_t)((uint64_t)n >> (i % 2 * 32)); });
}
template <class... F>
__m512 _mm512_setr_ps(F... f) {
  const float all[16] = {(float)f...};
  return _mm512_loadu_ps(all);
}
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.f); }
inline __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
inline __m512i _mm512_castps_si512(__m512 v) { return same_bits<__m512i>(v); }
inline __m512 _mm512_castsi512_ps(__m512i v) { return same_bits<__m512>(v); }

// --- integers
#define EMULATED_LANES(name, lane) \
  inline __m512i name(__m512i a, __m512i b) { return each<__m512i>([&](int i) { return lane; }); }
EMULATED_LANES(_mm512_add_epi32, a.at[i] + b.at[i])
EMULATED_LANES(_mm512_sub_epi32, a.at[i] - b.at[i])
EMULATED_LANES(_mm512_mullo_epi32, a.at[i] * b.at[i])
EMULATED_LANES(_mm512_mullo_epi16, (a.at[i] * (b.at[i] & 0xffff) & 0xffff) | (a.at[i] >> 16) * (b.at[i] >> 16) << 16)
// Bytes borrow nothing from each other: the upper bits are set aside and put right afterwards.
EMULATED_LANES(_mm512_sub_epi8, ((a.at[i] | 0x80808080) - (b.at[i] & 0x7f7f7f7f)) ^ ((a.at[i] ^ ~b.at[i]) & 0x80808080))
EMULATED_LANES(_mm512_add_epi16, (a.at[i] + b.at[i] & 0xffff) | (a.at[i] >> 16) + (b.at[i] >> 16) << 16)
EMULATED_LANES(_mm512_sub_epi16, (a.at[i] - b.at[i] & 0xffff) | (a.at[i] >> 16) - (b.at[i] >> 16) << 16)
EMULATED_LANES(_mm512_and_si512, a.at[i] & b.at[i])
EMULATED_LANES(_mm512_or_si512, a.at[i] | b.at[i])
EMULATED_LANES(_mm512_andnot_si512, ~a.at[i] & b.at[i])
EMULATED_LANES(_mm512_xor_si512, a.at[i] ^ b.at[i])
EMULATED_LANES(_mm512_srav_epi32, (uint32_t)((int32_t)a.at[i] >> (b.at[i] > 31 ? 31 : b.at[i])))
#undef EMULATED_LANES
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return each<__m512i>([&](int i) { return n > 31 ? 0 : a.at[i] << n; });
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  return each<__m512i>([&](int i) { return n > 15 ? 0 : (a.at[i] & 0xffff) >> n | a.at[i] >> 16 >> n << 16; });
}
inline __m512i _mm512_slli_epi16(__m512i a, unsigned n) {
  return each<__m512i>([&](int i) { return n > 15 ? 0 : (a.at[i] << n & 0xffff) | a.at[i] >> 16 << (16 + n); });
}
inline __m512i _mm512_srai_epi16(__m512i a, unsigned n) {
  return each<__m512i>([&](int i) {
    const int lower = (int16_t)(uint16_t)a.at[i] >> (n > 15 ? 15 : n), upper = (int16_t)(a.at[i] >> 16) >> (n > 15 ? 15 : n);
    return (uint32_t)(uint16_t)lower | (uint32_t)upper << 16;
  });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return each<__m512i>([&](int i) { return n > 31 ? 0 : a.at[i] >> n; });
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) { return _mm512_srav_epi32(a, _mm512_set1_epi32((int32_t)n)); }
inline __m512i _mm512_mask_mov_epi32(__m512i src, __mmask16 k, __m512i a) {
  return each<__m512i>([&](int i) { return k >> i & 1 ? a.at[i] : src.at[i]; });
}
inline __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) {
  unsigned k = 0;
  for (int i = 0; i < 16; i++) k |= (unsigned)((int32_t)a.at[i] < (int32_t)b.at[i]) << i;
  return (__mmask16)k;
}
inline int32_t _mm512_reduce_add_epi32(__m512i v) {
  uint32_t sum = 0;
  for (uint32_t lane : v.at) sum += lane;
  return (int32_t)sum;
}
// Bit by bit: the bit of imm8 that the bits of a, b, c, read as a number, point at.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int imm8) {
  return each<__m512i>([&](int i) {
    uint32_t result = 0;
    for (int n = 0; n < 32; n++) {
      const unsigned index = (a.at[i] >> n & 1) << 2 | (b.at[i] >> n & 1) << 1 | (c.at[i] >> n & 1);
      result |= (uint32_t)(imm8 >> index & 1) << n;
    }
    return result;
  });
}
inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int imm8) {
  return _mm512_ternarylogic_epi32(a, b, c, imm8);
}
// Unsigned bytes of a times signed bytes of b, four products added to each 32-bit lane without saturation.
inline __m512i _mm512_dpbusd_epi32(__m512i src, __m512i a, __m512i b) {
  return each<__m512i>([&](int i) {
    uint32_t sum = src.at[i];
    for (int j = 0; j < 4; j++) {
      sum += (uint32_t)((int32_t)(uint8_t)(a.at[i] >> (8 * j)) * (int32_t)(int8_t)(uint8_t)(b.at[i] >> (8 * j)));
    }
    return sum;
  });
}
// Each byte x of a 64-bit lane becomes A * x + b over GF(2); row i of A is byte 7 - i.
inline __m512i _mm512_gf2p8affine_epi64_epi8(__m512i x, __m512i A, int b) {
  const auto bytes = same_bits<Lanes<uint8_t, 64>>(x);
  const auto matrix = same_bits<Lanes<uint8_t, 64>>(A);
  Lanes<uint8_t, 64> result;
  for (int n = 0; n < 64; n++) {
    unsigned out = 0;
    for (int i = 0; i < 8; i++) {
      const unsigned row = matrix.at[n / 8 * 8 + 7 - i];
      out |= ((unsigned)__builtin_parity(row & bytes.at[n]) ^ ((unsigned)b >> i & 1)) << i;
    }
    result.at[n] = (uint8_t)out;
  }
  return same_bits<__m512i>(result);
}

// --- 16-bit lanes
using Halves = Lanes<uint16_t, 32>;
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const uint16_t* p) {
  Halves v;
  for (int i = 0; i < 32; i++) v.at[i] = k >> i & 1 ? p[i] : (uint16_t)0;
  return same_bits<__m512i>(v);
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  const auto from = same_bits<Halves>(index), table = same_bits<Halves>(a);
  Halves v;
  for (int i = 0; i < 32; i++) v.at[i] = table.at[from.at[i] & 31];
  return same_bits<__m512i>(v);
}
inline __mmask32 _mm512_test_epi16_mask(__m512i a, __m512i b) {
  const auto x = same_bits<Halves>(a), y = same_bits<Halves>(b);
  __mmask32 k = 0;
  for (int i = 0; i < 32; i++) k |= (__mmask32)((x.at[i] & y.at[i]) != 0) << i;
  return k;
}
inline __mmask32 _mm512_testn_epi16_mask(__m512i a, __m512i b) { return ~_mm512_test_epi16_mask(a, b); }
inline __m512i _mm512_mask_mov_epi16(__m512i src, __mmask32 k, __m512i a) {
  auto v = same_bits<Halves>(src);
  const auto from = same_bits<Halves>(a);
  for (int i = 0; i < 32; i++)
    if (k >> i & 1) v.at[i] = from.at[i];
  return same_bits<__m512i>(v);
}
inline __m512i _mm512_mask_add_epi16(__m512i src, __mmask32 k, __m512i a, __m512i b) {
  return _mm512_mask_mov_epi16(src, k, _mm512_add_epi16(a, b));
}
// Half j of the lower (upper) four of each eight is the one that bits 2j and 2j + 1 of imm8 name.
inline __m512i shuffled_halves(__m512i a, int imm8, int first) {
  const auto from = same_bits<Halves>(a);
  Halves v = from;
  for (int i = 0; i < 32; i += 8)
    for (int j = 0; j < 4; j++) v.at[i + first + j] = from.at[i + first + (imm8 >> 2 * j & 3)];
  return same_bits<__m512i>(v);
}
inline __m512i _mm512_shufflelo_epi16(__m512i a, int imm8) { return shuffled_halves(a, imm8, 0); }
inline __m512i _mm512_shufflehi_epi16(__m512i a, int imm8) { return shuffled_halves(a, imm8, 4); }
inline __m512i _mm512_castsi256_si512(__m256i a) {
  __m512i v = _mm512_set1_epi32((int)0xa5a5a5a5);  // what is above is undefined
  memcpy(&v, &a, sizeof a);
  return v;
}
inline __m512i _mm512_inserti64x4(__m512i a, __m256i b, int upper) {
  memcpy((char*)&a + 32 * (upper & 1), &b, sizeof b);
  return a;
}

// --- conversions
inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  return each<__m512i>([&](int i) { return (uint32_t)v.at[i]; });
}
inline __m512i _mm512_cvtepu8_epi32(__m128i v) {
  return each<__m512i>([&](int i) { return (uint32_t)v.at[i]; });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i v) {
  return each<__m512i>([&](int i) { return (uint32_t)(int32_t)(int8_t)v.at[i]; });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
  return each<__m256i>([&](int i) { return (uint16_t)v.at[i]; });
}
inline __m128i _mm512_cvtsepi32_epi8(__m512i v) {
  return each<__m128i>([&](int i) {
    const int32_t n = (int32_t)v.at[i];
    return (uint8_t)(int8_t)(n < -128 ? -128 : n > 127 ? 127 : n);
  });
}
inline __m512 _mm512_cvtepi32_ps(__m512i v) {
  return each<__m512>([&](int i) { return (float)(int32_t)v.at[i]; });
}
inline __m512i _mm512_maskz_cvtps_epi32(__mmask16 k, __m512 v) {
  return each<__m512i>([&](int i) {
    if (!(k >> i & 1)) return 0u;
    const float f = std::nearbyintf(v.at[i]);
    return f >= -2147483648.f && f < 2147483648.f ? (uint32_t)(int32_t)f : 0x80000000u;
  });
}
inline __m512 _mm512_cvtph_ps(__m256i v) {
  return each<__m512>([&](int i) { return (float)same_bits<_Float16>(v.at[i]); });
}
inline __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) emulated_fault("only rounding to nearest is emulated");
  return each<__m256i>([&](int i) { return same_bits<uint16_t>((_Float16)v.at[i]); });
}

// --- floats
#define EMULATED_LANES(name, lane) \
  inline __m512 name(__m512 a, __m512 b) { return each<__m512>([&](int i) { return lane; }); }
EMULATED_LANES(_mm512_add_ps, a.at[i] + b.at[i])
EMULATED_LANES(_mm512_sub_ps, a.at[i] - b.at[i])
EMULATED_LANES(_mm512_mul_ps, a.at[i] * b.at[i])
EMULATED_LANES(_mm512_div_ps, a.at[i] / b.at[i])
EMULATED_LANES(_mm512_min_ps, a.at[i] < b.at[i] ? a.at[i] : b.at[i])  // the second if either is NaN
EMULATED_LANES(_mm512_max_ps, a.at[i] > b.at[i] ? a.at[i] : b.at[i])
#undef EMULATED_LANES
inline __m512 _mm512_maskz_sub_ps(__mmask16 k, __m512 a, __m512 b) {
  return each<__m512>([&](int i) { return k >> i & 1 ? a.at[i] - b.at[i] : 0.f; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each<__m512>([&](int i) { return std::fmaf(a.at[i], b.at[i], c.at[i]); });
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each<__m512>([&](int i) { return std::fmaf(-a.at[i], b.at[i], c.at[i]); });
}
inline __m512 _mm512_roundscale_ps(__m512 v, int imm8) {
  if (imm8 != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) emulated_fault("only rounding to integers is emulated");
  return each<__m512>([&](int i) { return std::nearbyintf(v.at[i]); });
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
  return each<__m512>([&](int i) { return a.at[index.at[i] & 15]; });
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  unsigned k = 0;
  for (int i = 0; i < 16; i++) {
    const float x = a.at[i], y = b.at[i];
    const bool unordered = x != x || y != y;
    switch (predicate) {
      case _CMP_EQ_OQ: k |= (unsigned)(x == y) << i; break;
      case _CMP_UNORD_Q: k |= (unsigned)unordered << i; break;
      case _CMP_NEQ_UQ: k |= (unsigned)!(x == y) << i; break;
      case _CMP_ORD_Q: k |= (unsigned)!unordered << i; break;
      case _CMP_NLT_UQ: k |= (unsigned)!(x < y) << i; break;
      case _CMP_GE_OQ: k |= (unsigned)(x >= y) << i; break;
      default: emulated_fault("this comparison is not emulated");
    }
  }
  return (__mmask16)k;
}
inline float _mm512_reduce_min_ps(__m512 v) {
  float least = v.at[0];
  for (float lane : v.at) least = lane < least ? lane : least;
  return least;
}
inline float _mm512_reduce_max_ps(__m512 v) {
  float most = v.at[0];
  for (float lane : v.at) most = lane > most ? lane : most;
  return most;
}
