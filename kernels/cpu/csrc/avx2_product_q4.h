// AVX2 product of int8 rows with 4-bit weights whose groups are multiples of 64 inputs: one int16 sum over 64 inputs.
//
// A sum of 64 inputs of one output lies in two int16 lanes of 32 inputs each. It starts at -8 * (sum of the inputs) and
// adds code * input: what comes out is weight * input, at most 32 * 8 * 127 = 32512, so that it does not matter that
// sums on the way wrap around. An input of -128 would reach 32768: rows that hold one go the other way.
// So a row needs two registers for 16 outputs, four rows fit, and a line of weights is read once for all four.
#pragma once

namespace qpass {
namespace {

constexpr int64_t kPrefetch = 3072;  // bytes ahead: about what DRAM delivers in its own latency

// [M][Kp / 64]: where the sums of a row start, two int16 as one int32; null if a code is -128.
const int32_t* starts_of(const QuantRows& x) {
  const int64_t blocks = x.Kp / 64;
  int32_t* starts = (int32_t*)scratch(6, x.M * blocks * 4);
  const __m256i one = _mm256_set1_epi8(1), least = _mm256_set1_epi8(-128);
  __m256i found = _mm256_setzero_si256();
  for (int64_t i = 0; i < x.M * blocks; i++) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)(x.q + i * 64));
    const __m256i b = _mm256_loadu_si256((const __m256i*)(x.q + i * 64 + 32));
    found = _mm256_or_si256(found, _mm256_or_si256(_mm256_cmpeq_epi8(a, least), _mm256_cmpeq_epi8(b, least)));
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(one, a), _mm256_maddubs_epi16(one, b));
    __m128i s = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0xb1));
    starts[i] = _mm_cvtsi128_si32(_mm_mullo_epi16(s, _mm_set1_epi16(-8)));
  }
  return _mm256_testz_si256(found, found) ? starts : nullptr;
}

// sum += w * x in pairs. Left to itself GCC adds products to each other first, and keeps more of them than it has
// registers for.
inline __attribute__((always_inline)) void multiply_add(__m256i w, __m256i x, __m256i& sum) {
  __m256i product;
  __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(x));
}

// 64 inputs of R rows times 16 outputs, added to `sum`.
template <int R>
inline __attribute__((always_inline)) void add64(const uint8_t* w, const int8_t* x, int64_t ld, int64_t ahead,
                                                 __m256i (&sum)[R][2]) {
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 1
  for (int r = 0; r < 8; r++) {
    _mm_prefetch((const char*)w + r * 64 + ahead, _MM_HINT_T0);
    __m256i both[2], u[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      both[h] = _mm256_loadu_si256((const __m256i*)(w + r * 64 + h * 32));
      u[h] = _mm256_and_si256(both[h], nibble);
    }
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
      int32_t four;
      __builtin_memcpy(&four, x + m * ld + r * 4, 4);
      const __m256i codes = _mm256_set1_epi32(four);
      multiply_add(u[0], codes, sum[m][0]);
      multiply_add(u[1], codes, sum[m][1]);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) u[h] = _mm256_and_si256(_mm256_srli_epi16(both[h], 4), nibble);
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
      int32_t four;
      __builtin_memcpy(&four, x + m * ld + 32 + r * 4, 4);
      const __m256i codes = _mm256_set1_epi32(four);
      multiply_add(u[0], codes, sum[m][0]);
      multiply_add(u[1], codes, sum[m][1]);
    }
  }
}

// R rows from m0 on times one block of 16 outputs; `group_sums` [M][groups] only with zero points of the weight.
template <int R>
__attribute__((noinline)) void multiply64(const Weight& w, const QuantRows& x, const int32_t* starts,
                                          const int32_t* group_sums, const Output& out, int64_t m0, int64_t block,
                                          int64_t ahead) {
  const int64_t blocks = w.Kp / 64, runs = inner_groups(w) == 1 ? blocks : inner_size(w) / 64, groups = inner_groups(w);
  const uint8_t* line = w.q + block * blocks * 512;
  const int8_t* codes = x.q + m0 * x.Kp;
  const __m256i one = _mm256_set1_epi16(1);
  __m256i whole[R][2];  // with integer scales
  __m256 y[R][2];
  for (int m = 0; m < R; m++)
    for (int h = 0; h < 2; h++) y[m][h] = _mm256_setzero_ps(), whole[m][h] = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; g++) {
    __m256i total[R][2];
    for (int m = 0; m < R; m++)
      for (int h = 0; h < 2; h++) total[m][h] = _mm256_setzero_si256();
    for (int64_t kb = g * runs; kb < (g + 1) * runs; kb++, line += 512, codes += 64) {
      __m256i sum[R][2];
      for (int m = 0; m < R; m++) sum[m][0] = sum[m][1] = _mm256_set1_epi32(starts[(m0 + m) * blocks + kb]);
      add64<R>(line, codes, x.Kp, ahead, sum);
      for (int m = 0; m < R; m++)
        for (int h = 0; h < 2; h++)
          total[m][h] = _mm256_add_epi32(total[m][h], _mm256_madd_epi16(sum[m][h], one));
    }
    for (int h = 0; h < 2; h++) {
      if (w.multiplier) {
        const __m128i* at = (const __m128i*)(w.multiplier + (block * groups + g) * 16 + h * 8);
        const __m256i multiplier = _mm256_cvtepi8_epi32(_mm_loadl_epi64(at));
        for (int m = 0; m < R; m++)
          whole[m][h] = _mm256_add_epi32(whole[m][h], _mm256_mullo_epi32(total[m][h], multiplier));
        continue;
      }
      const __m256 scale = scales8(w, block, g, h);
      for (int m = 0; m < R; m++) {
        __m256i exact = total[m][h];
        if (w.zero_point) {
          const __m256i sums = _mm256_set1_epi32(group_sums[(m0 + m) * groups + g]);
          exact = _mm256_sub_epi32(exact, _mm256_mullo_epi32(zero_points8(w, block, g, h), sums));
        }
        y[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), scale, y[m][h]);
      }
    }
  }
  for (int m = 0; m < R; m++) {
    for (int h = 0; h < 2 && w.multiplier; h++)
      y[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[m][h]), scales8(w, block, 0, h), y[m][h]);
    finish_row(w, x, out, m0 + m, block, y[m][0], y[m][1]);
  }
}

// Rows [m0, m1): only the first of them read their weights from memory, and far ahead.
void multiply_rows64(const Weight& w, const QuantRows& x, const int32_t* starts, const int32_t* group_sums,
                     const Output& out, int64_t m0, int64_t m1, int64_t block) {
  int64_t m = m0, ahead = kPrefetch;
  for (; m + 4 <= m1; m += 4, ahead = 0) multiply64<4>(w, x, starts, group_sums, out, m, block, ahead);
  if (m1 - m == 3) multiply64<3>(w, x, starts, group_sums, out, m, block, ahead);
  else if (m1 - m == 2) multiply64<2>(w, x, starts, group_sums, out, m, block, ahead);
  else if (m1 - m == 1) multiply64<1>(w, x, starts, group_sums, out, m, block, ahead);
}

}  // namespace
}  // namespace qpass
