// Attention: keys or values times queries that share them, from codes in registers, each code read once for up to 3 or 4
// queries. What a query gets does not depend on which others are taken with it.
//
// int4 stands for code - 8: a sum over a part of a key starts at -8 * (sum of the query), which is `less`; of values
// 8 * (sum of the weights) is taken off at the end.
#pragma once
#include "attention_codes.h"

namespace qpass {
namespace {

constexpr int kRows = 8;      // keys at a time
constexpr int kTokens = 32;   // values at a time

// Adds products of one part of K keys to the sums of N queries.
template <int kind, bool HIGH, int N, int K>
QPASS_AVX2_INLINE void add_part(const uint8_t* const (&row)[K], int64_t at, const float* x, int64_t ld, int64_t size,
                                __m256 (&a)[N][K]) {
  for (int64_t i = 0; i < size; i += 8) {
    __m256 q[N];
    for (int n = 0; n < N; n++) q[n] = _mm256_loadu_ps(x + n * ld + i);
#pragma GCC unroll 4
    for (int j = 0; j < K; j++) {
      const __m256 key = codes8<kind, HIGH>(row[j], at + i);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) a[n][j] = _mm256_fmadd_ps(key, q[n], a[n][j]);
    }
  }
}

// The four sums of four registers.
QPASS_AVX2_INLINE __m128 sums4(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

// Products of N queries with 4 keys; scaled already if int4, by `scale` [groups][kRows].
template <int kind, int N>
QPASS_AVX2_INLINE void dots4(const uint8_t* const* keys, const float* x, const float* less, int64_t size, int64_t parts,
                             int64_t groups, const float* scale, __m128 (&out)[N]) {
  if constexpr (kind != kInt4) {
    const uint8_t* row[4] = {keys[0], keys[1], keys[2], keys[3]};
    __m256 a[N][4];
    for (int n = 0; n < N; n++)
      for (int j = 0; j < 4; j++) a[n][j] = _mm256_setzero_ps();
    add_part<kind, false, N, 4>(row, 0, x, size, size, a);
    for (int n = 0; n < N; n++) out[n] = sums4(a[n][0], a[n][1], a[n][2], a[n][3]);
  } else {
    const int64_t part = size / parts;
    alignas(32) float total[2][N][2][8];
    for (int i = 0; i < 2; i++) {
      const uint8_t* row[2] = {keys[i * 2], keys[i * 2 + 1]};
      for (int64_t p = 0; p < parts; p++) {
        __m256 a[N][2];
        for (int n = 0; n < N; n++) a[n][0] = a[n][1] = _mm256_broadcast_ss(less + n * parts + p);
        if (p < parts / 2) add_part<kind, false, N, 2>(row, p * part, x + p * part, size, part, a);
        else add_part<kind, true, N, 2>(row, p * part - size / 2, x + p * part, size, part, a);
        for (int j = 0; j < 2; j++) {
          const __m256 s = _mm256_broadcast_ss(scale + (groups == 1 ? 0 : p) * kRows + i * 2 + j);
          for (int n = 0; n < N; n++) {
            float* at = total[i][n][j];
            _mm256_store_ps(at, _mm256_fmadd_ps(a[n][j], s, p ? _mm256_load_ps(at) : _mm256_setzero_ps()));
          }
        }
        __asm__ volatile("" : : "r"(total) : "memory");  // in registers they would leave none for the sums under way
      }
    }
    for (int n = 0; n < N; n++)
      out[n] = sums4(_mm256_load_ps(total[0][n][0]), _mm256_load_ps(total[0][n][1]), _mm256_load_ps(total[1][n][0]),
                     _mm256_load_ps(total[1][n][1]));
  }
}

// Adds `count` values from `first` on, `step` bytes apart, to the sums of N queries, weighted by `weight`
// [parts][..][kTokens], whose parts are `part_step` apart.
template <int kind, int N>
QPASS_AVX2_INLINE void add_values(const uint8_t* first, int64_t step, int64_t count, const float* weight,
                                  int64_t part_step, int64_t part, int64_t size, float* sum) {
  constexpr bool kTwo = kind == kInt4;
  const int64_t rest = kTwo ? size / 2 : 8, end = kTwo ? size / 2 : size;  // from one register's outputs to the other's
  for (int64_t i = 0; i < end; i += kTwo ? 8 : 16) {
    const bool both = kTwo || i + 16 <= size;
    const float* low = weight + (kTwo ? i / part * part_step : 0);
    const float* high = weight + (kTwo ? (i + rest) / part * part_step : 0);
    __m256 a[N], b[N];
    for (int n = 0; n < N; n++) {
      a[n] = _mm256_loadu_ps(sum + n * size + i);
      b[n] = both ? _mm256_loadu_ps(sum + n * size + i + rest) : _mm256_setzero_ps();
    }
    const uint8_t* row = first;
    if (both)
      for (int64_t t = 0; t < count; t++, row += step) {
        const __m256 one = codes8<kind>(row, i), two = codes8<kind, kTwo>(row, kTwo ? i : i + 8);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const __m256 w = _mm256_broadcast_ss(low + n * kTokens + t);
          a[n] = _mm256_fmadd_ps(w, one, a[n]);
          b[n] = _mm256_fmadd_ps(kTwo ? _mm256_broadcast_ss(high + n * kTokens + t) : w, two, b[n]);
        }
      }
    else
      for (int64_t t = 0; t < count; t++, row += step)
        for (int n = 0; n < N; n++)
          a[n] = _mm256_fmadd_ps(_mm256_broadcast_ss(low + n * kTokens + t), codes8<kind>(row, i), a[n]);
    for (int n = 0; n < N; n++) {
      _mm256_storeu_ps(sum + n * size + i, a[n]);
      if (both) _mm256_storeu_ps(sum + n * size + i + rest, b[n]);
    }
  }
}

}  // namespace
}  // namespace qpass
