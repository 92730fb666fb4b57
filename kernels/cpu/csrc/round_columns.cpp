// Round columns: columns of a weight, as rows, rounded one after another, each with what those before it have left.
//
// kernels/reference/round_columns.py says what is computed. Rows of the weight do not meet: 32 of them at a time go
// through all columns, in the first cache.
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "lanes.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int64_t kRows = 32, kParts = kRows / 8;

struct Columns {
  const float *given, *codes, *scale, *zero_point, *above, *rates;  // above: [i][j], what column i takes of column j
  int64_t count, N;
  float first, last;
  float *rounded, *left;
};

// Some rows of one column, the rest of kRows filled up.
QPASS_INLINE void load(const float* from, int64_t rows, float rest, Lanes (&to)[kParts]) {
  float all_rows[kRows];
  if (rows == kRows) {
    memcpy(to, from, sizeof to);
    return;
  }
  for (int64_t r = 0; r < kRows; r++) all_rows[r] = r < rows ? from[r] : rest;
  memcpy(to, all_rows, sizeof to);
}
QPASS_INLINE void store(const Lanes (&from)[kParts], int64_t rows, float* to) {
  memcpy(to, from, (size_t)rows * sizeof(float));
}

// What column i takes of those before it, which left `left`.
QPASS_INLINE void taken(const Columns& c, int64_t i, const Lanes (*left)[kParts], Lanes (&sum)[kParts]) {
  for (Lanes& part : sum) part = all(0);
  for (int64_t j = 0; j < i; j++) {
    const Lanes factor = all(c.above[i * c.count + j]);
    for (int64_t p = 0; p < kParts; p++) sum[p] += left[j][p] * factor;
  }
}

QPASS_INLINE void round_rows(const Columns& c, int64_t from, int64_t rows, Lanes (*left)[kParts]) {
  const Lanes first = all(c.first), last = all(c.last);
  for (int64_t i = 0; i < c.count; i++) {
    const int64_t at = i * c.N + from;
    Lanes w[kParts], scale[kParts], zero[kParts], sum[kParts], q[kParts];
    load(c.given + at, rows, 0, w);
    load(c.scale + at, rows, 1, scale);
    for (Lanes& part : zero) part = all(0);
    if (c.zero_point) load(c.zero_point + at, rows, 0, zero);
    taken(c, i, left, sum);
    for (int64_t p = 0; p < kParts; p++) {
      w[p] -= sum[p];
      q[p] = clamp(rounded(w[p] / scale[p]) + zero[p], first, last);
      left[i][p] = w[p] - (q[p] - zero[p]) * scale[p];
    }
    store(q, rows, c.rounded + at);
    store(left[i], rows, c.left + at);
  }
}

QPASS_INLINE void descend_rows(const Columns& c, int64_t from, int64_t rows, Lanes (*left)[kParts]) {
  const Lanes first = all(c.first), last = all(c.last);
  for (int64_t i = 0; i < c.count; i++) {
    const int64_t at = i * c.N + from;
    const Lanes rate = all(c.rates[i]);
    Lanes slope[kParts], before[kParts], scale[kParts], sum[kParts], q[kParts];
    load(c.given + at, rows, 0, slope);
    load(c.codes + at, rows, 0, before);
    load(c.scale + at, rows, 1, scale);
    taken(c, i, left, sum);
    for (int64_t p = 0; p < kParts; p++) {
      q[p] = clamp(rounded(before[p] + rate * (slope[p] + sum[p]) / scale[p]), first, last);
      left[i][p] = (q[p] - before[p]) * scale[p];
    }
    store(q, rows, c.rounded + at);
    store(left[i], rows, c.left + at);
  }
}

typedef void (*Rows)(const Columns&, int64_t, int64_t, Lanes (*)[kParts]);
#define QPASS_TARGET __attribute__((target("avx2,fma,f16c")))

void round_plain(const Columns& c, int64_t from, int64_t rows, Lanes (*left)[kParts]) { round_rows(c, from, rows, left); }
QPASS_TARGET void round_avx2(const Columns& c, int64_t from, int64_t rows, Lanes (*left)[kParts]) {
  round_rows(c, from, rows, left);
}
void descend_plain(const Columns& c, int64_t from, int64_t rows, Lanes (*left)[kParts]) {
  descend_rows(c, from, rows, left);
}
QPASS_TARGET void descend_avx2(const Columns& c, int64_t from, int64_t rows, Lanes (*left)[kParts]) {
  descend_rows(c, from, rows, left);
}

int32_t run(const char* name, const Columns& c, Rows rows, int32_t threads) {
  if (!c.given || !c.scale || !c.above || !c.rounded || !c.left) return fail("%s: a null pointer", name);
  if (c.count < 1 || c.N < 1 || c.count > (1 << 16) || c.N > (int64_t(1) << 40) / c.count)
    return fail("%s: sizes must be positive and reasonable", name);
  const int64_t parts = (c.N + kRows - 1) / kRows;
  const int32_t team = team_size(threads, parts);
  int32_t failed = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : failed)
  for (int64_t part = 0; part < parts; part++) {
    try {
      const int64_t from = part * kRows, left = c.N - from;
      rows(c, from, left < kRows ? left : kRows, (Lanes(*)[kParts])scratch(0, c.count * kRows * (int64_t)sizeof(float)));
    } catch (...) {
      failed++;
    }
  }
  return failed ? fail("%s: out of memory", name) : 0;
}

}  // namespace
}  // namespace qpass

extern "C" int32_t qp_round_columns(const float* w, const float* scale, const float* zero_point, const float* within,
                                    int64_t count, int64_t N, float first, float last, float* codes, float* errors,
                                    int32_t threads) {
  using namespace qpass;
  const Columns columns = {w, nullptr, scale, zero_point, within, nullptr, count, N, first, last, codes, errors};
  return run("round_columns", columns, machine_runs(1) ? round_avx2 : round_plain, threads);
}

extern "C" int32_t qp_descend_columns(const float* slope, const float* codes, const float* scale, const float* inside,
                                      const float* rates, int64_t count, int64_t N, float first, float last,
                                      float* moved, float* steps, int32_t threads) {
  using namespace qpass;
  if (!codes || !rates) return fail("descend_columns: a null pointer");
  const Columns columns = {slope, codes, scale, nullptr, inside, rates, count, N, first, last, moved, steps};
  return run("descend_columns", columns, machine_runs(1) ? descend_avx2 : descend_plain, threads);
}
