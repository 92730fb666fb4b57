// Attention: up to 8 keys or values times all queries that share them, from codes. For attention.cpp alone, whose kRows,
// load8, decode and dot these use.
//
// Codes with one scale a row become floats in registers, for 4 rows and up to 3 queries at a time; those with several
// scales a row are decoded to memory first.
#pragma once

namespace qpass {
namespace {

constexpr int kMostRows = 32;  // of queries whose weights are scaled at a time

// Scales of up to 8 rows from token t on, for rows that have one.
QPASS_AVX2_INLINE void scales_of(const qp_cached& c, int64_t b, int64_t h, int64_t t, int64_t count, float* out) {
  const int64_t at = b * c.scale_batch + h * c.scale_head + t * c.scale_token;
  if (c.scale_dtype == (int32_t)DType::f16 && c.scale_token == 1 && count == 8) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)c.scale + at))));
    return;
  }
  for (int64_t j = 0; j < 8; j++) out[j] = j < count ? scale_at(c, at + j * c.scale_token) : 0;
}

// Where the codes of 4 rows lie, the last one again for those that are not there.
QPASS_AVX2_INLINE void rows_of(const qp_cached& c, int64_t b, int64_t h, int64_t t, int64_t count,
                               const uint8_t* (&row)[4]) {
  for (int64_t j = 0; j < 4; j++)
    row[j] = (const uint8_t*)c.codes + b * c.batch + h * c.head + (t + (j < count ? j : count - 1)) * c.token;
}

// Products of N queries with 4 keys, each added up by itself: it does not depend on which are taken together.
template <int kind, int N>
QPASS_AVX2_INLINE void dots4(const uint8_t* const (&row)[4], const float* x, int64_t size, float* out, int64_t ld) {
  __m256 a[N][4];
  for (int n = 0; n < N; n++)
    for (int j = 0; j < 4; j++) a[n][j] = _mm256_setzero_ps();
  for (int64_t i = 0; i < size; i += 8) {
    __m256 q[N];
    for (int n = 0; n < N; n++) q[n] = _mm256_loadu_ps(x + n * size + i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256 key = load8<kind>(row[j], i, size);
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) a[n][j] = _mm256_fmadd_ps(key, q[n], a[n][j]);
    }
  }
  for (int n = 0; n < N; n++) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a[n][0], a[n][1]), _mm256_hadd_ps(a[n][2], a[n][3]));
    _mm_storeu_ps(out + n * ld, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
}

// Adds 4 values, weighted for N queries, to their sums.
template <int kind, int N>
QPASS_AVX2_INLINE void add4(const uint8_t* const (&row)[4], const float* weight, int64_t ld, int64_t size, float* sum) {
  __m256 p[N][4];
  for (int n = 0; n < N; n++)
    for (int j = 0; j < 4; j++) p[n][j] = _mm256_broadcast_ss(weight + n * ld + j);
  for (int64_t i = 0; i < size; i += 8) {
    __m256 total[N];
    for (int n = 0; n < N; n++) total[n] = _mm256_loadu_ps(sum + n * size + i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256 value = load8<kind>(row[j], i, size);
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) total[n] = _mm256_fmadd_ps(p[n][j], value, total[n]);
    }
    for (int n = 0; n < N; n++) _mm256_storeu_ps(sum + n * size + i, total[n]);
  }
}

// Calls f(r, N) for queries r .. r + N - 1 until all R are done; 3 fill the registers.
template <class F>
QPASS_AVX2_INLINE void by_threes(int64_t R, F f) {
  for (int64_t r = 0; r < R;) {
    const int64_t left = R - r, n = left == 4 || left == 2 ? 2 : left == 1 ? 1 : 3;
    f(r, (int)n);
    r += n;
  }
}

// Products of R queries with the keys t .. t + 7, scaled, at `scores`, rows `ld` apart.
template <int kind>
QPASS_AVX2_INLINE void score8(const qp_cached& k, int64_t b, int64_t h, int64_t t, int64_t count, const float* x,
                              int64_t R, int64_t D, float* rows, float* scores) {
  float factor[kRows];
  if (k.groups > 1) {
    for (int64_t j = 0; j < count; j++) factor[j] = decode<kind>(k, b, h, t + j, D, rows + j * D);
    for (int64_t r = 0; r < R; r++)
      for (int64_t j = 0; j < count; j++) scores[r * 8 + j] = factor[j] * dot(x + r * D, rows + j * D, D);
    return;
  }
  scales_of(k, b, h, t, count, factor);
  for (int64_t j = 0; j < count; j += 4) {
    const uint8_t* row[4];
    rows_of(k, b, h, t + j, count - j, row);
    by_threes(R, [&](int64_t r, int n) QPASS_AVX2 {
      float* out = scores + r * 8 + j;
      if (n == 3) dots4<kind, 3>(row, x + r * D, D, out, 8);
      if (n == 2) dots4<kind, 2>(row, x + r * D, D, out, 8);
      if (n == 1) dots4<kind, 1>(row, x + r * D, D, out, 8);
    });
  }
  const __m256 scale = _mm256_loadu_ps(factor);
  for (int64_t r = 0; r < R; r++)
    _mm256_storeu_ps(scores + r * 8, _mm256_mul_ps(_mm256_loadu_ps(scores + r * 8), scale));
}

// Adds the values t .. t + 7, weighted, to the sums of R queries; `weights` rows are `ld` apart.
template <int kind>
QPASS_AVX2_INLINE void add8(const qp_cached& v, int64_t b, int64_t h, int64_t t, int64_t count, const float* weights,
                            int64_t ld, int64_t R, int64_t Dv, float* rows, float* sum) {
  float factor[kRows], scaled[kMostRows * kRows];
  if (v.groups > 1)
    for (int64_t j = 0; j < kRows; j++) factor[j] = j < count ? decode<kind>(v, b, h, t + j, Dv, rows + j * Dv) : 0;
  else
    scales_of(v, b, h, t, count, factor);
  for (int64_t r0 = 0; r0 < R; r0 += kMostRows) {
    const int64_t n0 = R - r0 < kMostRows ? R - r0 : kMostRows;
    for (int64_t r = 0; r < n0; r++)
      for (int64_t j = 0; j < kRows; j++) scaled[r * kRows + j] = j < count ? factor[j] * weights[(r0 + r) * ld + j] : 0;
    if (v.groups > 1) {
      for (int64_t r = 0; r < n0; r++)
        for (int64_t i = 0; i < Dv; i += 8) {
          __m256 total = _mm256_loadu_ps(sum + (r0 + r) * Dv + i);
          for (int64_t j = 0; j < count; j++)
            total = _mm256_fmadd_ps(_mm256_set1_ps(scaled[r * kRows + j]), _mm256_loadu_ps(rows + j * Dv + i), total);
          _mm256_storeu_ps(sum + (r0 + r) * Dv + i, total);
        }
      continue;
    }
    for (int64_t j = 0; j < count; j += 4) {
      const uint8_t* row[4];
      rows_of(v, b, h, t + j, count - j, row);
      by_threes(n0, [&](int64_t r, int n) QPASS_AVX2 {
        const float* p = scaled + r * kRows + j;
        float* to = sum + (r0 + r) * Dv;
        if (n == 3) add4<kind, 3>(row, p, kRows, Dv, to);
        if (n == 2) add4<kind, 2>(row, p, kRows, Dv, to);
        if (n == 1) add4<kind, 1>(row, p, kRows, Dv, to);
      });
    }
  }
}

}  // namespace
}  // namespace qpass
