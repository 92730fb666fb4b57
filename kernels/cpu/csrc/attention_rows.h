// Attention: keys or values times queries that share them, each read once for up to 3 or 4 queries. What a query gets
// does not depend on which others are taken with it: a score is a chain of FMA over its key in each lane, an output one
// over values.
//
// After the vectors of an instruction set. int4 stands for code - 8: a sum over a part of a key starts at -8 * (sum of
// the query), a share of it, `less`, in each lane; of values 8 * (sum of the weights) is taken off at the end.
#pragma once
#include <cmath>

namespace qpass {
namespace {

constexpr int kHalf = kLanes / 2;     // keys whose sums are under way together
constexpr int64_t kAhead = 2048;      // bytes

// exp for x <= 0, within 2 units of the last place; 0 below -87. Coefficients of Cephes' expf.
QPASS_VECTOR_INLINE Vector exp_of(Vector x) {
  const Vector small = all(-87.0f), kept = larger(x, small), n = nearest(times(kept, all(1.44269504f)));
  const Vector r = minus_product(minus_product(kept, n, all(0.693359375f)), n, all(-2.12194440e-4f));
  Vector p = all(1.9875691500e-4f);
  const float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (float c : rest) p = fma(p, r, all(c));
  p = plus(fma(p, times(r, r), r), all(1));
  return where_at_least(x, small, times(p, power_of_two(n)));
}

// How far behind what is read memory is asked for, in rows that are `step` bytes apart: line by line between products,
// which is faster than many lines at once.
inline int64_t ahead_of(int64_t step, int64_t row) { return kAhead / row * step; }

// Adds products of one vector's numbers of K keys to the sums of N queries, `ld` apart.
template <int kind, bool HIGH, bool HALF, int N, int K>
QPASS_VECTOR_INLINE void add_products(const uint8_t* const (&row)[K], int64_t at, const float* x, int64_t ld,
                                      int64_t ahead, Vector (&a)[N][K]) {
  Vector q[N];
  for (int n = 0; n < N; n++) q[n] = load_part<HALF>(x + n * ld);
#pragma GCC unroll 8
  for (int j = 0; j < K; j++) {
    const Vector key = numbers<kind, HIGH, HALF>(row[j], at);
    _mm_prefetch((const char*)row[j] + at * bytes_of(kind) + ahead, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) a[n][j] = fma(key, q[n], a[n][j]);
  }
}

// The same of a part of the keys, `size` numbers from `at` on.
template <int kind, bool HIGH, int N, int K>
QPASS_VECTOR_INLINE void add_part(const uint8_t* const (&row)[K], int64_t at, const float* x, int64_t ld, int64_t size,
                                  int64_t ahead, Vector (&a)[N][K]) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) add_products<kind, HIGH, false>(row, at + i, x + i, ld, ahead, a);
  if constexpr (kLanes > 8)
    if (i < size) add_products<kind, HIGH, true>(row, at + i, x + i, ld, ahead, a);
}

// Products of N queries with kHalf keys; of int4 scaled already, by `scale` [groups][kLanes].
template <int kind, int N>
QPASS_VECTOR_INLINE void dots(const uint8_t* const* keys, const float* x, const float* less, int64_t size,
                              int64_t parts, int64_t groups, const float* scale, int64_t ahead, Half (&out)[N]) {
  if constexpr (kind != kInt4) {
    const uint8_t* row[kHalf];
    Vector a[N][kHalf];
    for (int j = 0; j < kHalf; j++) row[j] = keys[j];
    for (int n = 0; n < N; n++)
      for (int j = 0; j < kHalf; j++) a[n][j] = all(0);
    add_part<kind, false>(row, 0, x, size, size, ahead, a);
    for (int n = 0; n < N; n++) out[n] = half_sums(a[n]);
  } else {
    constexpr int kFew = kHalf / 2;  // sums of parts are in registers, sums of keys in memory
    const int64_t part = size / parts;
    alignas(64) float total[N][kHalf][kLanes];
    for (int i = 0; i < kHalf; i += kFew) {
      const uint8_t* row[kFew];
      for (int j = 0; j < kFew; j++) row[j] = keys[i + j];
      for (int64_t p = 0; p < parts; p++) {
        Vector a[N][kFew];
        for (int n = 0; n < N; n++)
          for (int j = 0; j < kFew; j++) a[n][j] = all(less[n * parts + p]);
        if (p < parts / 2) add_part<kind, false>(row, p * part, x + p * part, size, part, ahead, a);
        else add_part<kind, true>(row, p * part - size / 2, x + p * part, size, part, ahead, a);
        for (int j = 0; j < kFew; j++) {
          const Vector s = all(scale[(groups == 1 ? 0 : p) * kLanes + i + j]);
          for (int n = 0; n < N; n++) {
            float* at = total[n][i + j];
            store(at, fma(a[n][j], s, p ? load(at) : all(0)));
          }
        }
        __asm__ volatile("" : : "r"(total) : "memory");  // in registers they would leave none for the sums under way
      }
    }
    for (int n = 0; n < N; n++) {
      Vector a[kHalf];
      for (int j = 0; j < kHalf; j++) a[j] = load(total[n][j]);
      out[n] = half_sums(a);
    }
  }
}

// The weights of values: of N queries, `ld` apart; of int4 those of the low nibbles' group and of the high ones'.
struct Weights {
  const float *low, *high;
  int64_t ld;
};

// Adds `count` values' numbers from the i-th on, weighted, to VECTORS vectors of sums of N queries; of int4, to as many
// `size` / 2 behind. Rows of values are `step` bytes apart, sums of queries `size` numbers.
template <int kind, int N, int VECTORS, bool HALF>
QPASS_VECTOR_INLINE void add_block(const uint8_t* row, int64_t step, int64_t count, const Weights& w, int64_t i,
                                   int64_t size, float* sum) {
  constexpr bool kTwo = kind == kInt4;
  const int64_t ahead = ahead_of(step, row_bytes(kind, size));
  Vector a[N][VECTORS], b[N][kTwo ? VECTORS : 1];
  for (int n = 0; n < N; n++)
    for (int v = 0; v < VECTORS; v++) {
      const float* at = sum + n * size + i + v * kLanes;
      a[n][v] = load_part<HALF>(at);
      if (kTwo) b[n][v] = load_part<HALF>(at + size / 2);
    }
  for (int64_t t = 0; t < count; t++, row += step) {
    Vector x[VECTORS], y[VECTORS];
    _mm_prefetch((const char*)row + i * bytes_of(kind) + ahead, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      x[v] = numbers<kind, false, HALF>(row, i + v * kLanes);
      if (kTwo) y[v] = numbers<kind, kTwo, HALF>(row, i + v * kLanes);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Vector low = all(w.low[n * w.ld + t]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) a[n][v] = fma(low, x[v], a[n][v]);
      if (!kTwo) continue;
      const Vector high = all(w.high[n * w.ld + t]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) b[n][v] = fma(high, y[v], b[n][v]);
    }
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < VECTORS; v++) {
      float* at = sum + n * size + i + v * kLanes;
      store_part<HALF>(at, a[n][v]);
      if (kTwo) store_part<HALF>(at + size / 2, b[n][v]);
    }
}

// Adds `count` values from `row` on, `step` bytes apart, to the sums of N queries. `weight` is [parts][..], its parts
// `part_step` and its queries `ld` apart; a part has `part` outputs.
template <int kind, int N>
QPASS_VECTOR_INLINE void add_values(const uint8_t* row, int64_t step, int64_t count, const float* weight, int64_t ld,
                                    int64_t part_step, int64_t part, int64_t size, float* sum) {
  constexpr bool kTwo = kind == kInt4;
  constexpr int kMany = kLanes / (kTwo ? 8 : 4);  // what registers hold for 4 queries
  const int64_t end = kTwo ? size / 2 : size;
  for (int64_t p = 0; p * part < end; p++) {
    const float* low = weight + p * part_step;
    const Weights w = {low, low + (kTwo ? end / part * part_step : 0), ld};
    int64_t i = p * part;
    for (; i + kMany * kLanes <= (p + 1) * part; i += kMany * kLanes)
      add_block<kind, N, kMany, false>(row, step, count, w, i, size, sum);
    if constexpr (kMany > 1)
      for (; i + kLanes <= (p + 1) * part; i += kLanes) add_block<kind, N, 1, false>(row, step, count, w, i, size, sum);
    if constexpr (kLanes > 8)
      if (i < (p + 1) * part) add_block<kind, N, 1, true>(row, step, count, w, i, size, sum);
  }
}

}  // namespace
}  // namespace qpass
