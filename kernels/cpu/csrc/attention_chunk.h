// Attention over float keys and values where they lie: a chunk of keys with the queries of a block. After the vectors of
// an instruction set: this is compiled for each.
//
// One number's way does not depend on the other rows of its block (attention_rows.h), and what a mask hides adds
// nothing, NaN and Inf included.
#pragma once
#include "attention.h"
#include "attention_rows.h"
#include "convert.h"

namespace qpass {
namespace {

constexpr int64_t kTile = 32;  // keys or values that stay in the first cache while all rows meet them

constexpr Kind kind_of(DType dtype) { return dtype == DType::f32 ? kFloat : dtype == DType::bf16 ? kBf16 : kF16; }

// The mask of one row: where it starts in memory, and how many keys it may see at most.
struct Line {
  int64_t at, limit;
};

inline Line line_of(const FloatAttention& c, const Block& block, int64_t r) {
  const int64_t m = (block.first + r) / c.shared, head = block.h * c.shared + (block.first + r) % c.shared;
  return {block.b * c.mask.batch + head * c.mask.head + m * c.mask.token, c.causal && m + 1 < c.S ? m + 1 : c.S};
}

// What is added to the scores of kLanes keys from t on: -inf hides one.
QPASS_VECTOR_INLINE Vector added(const FloatAttention& c, const Line& line, int64_t t) {
  if (t + kLanes <= line.limit) {
    const uint8_t* mask = (const uint8_t*)c.mask.data;
    if (c.mask_dtype == 0) return all(0);
    if (c.mask_dtype == 1) return added_by(mask + line.at + t);
    if (c.mask_dtype == 2) return numbers<kFloat, false, false>(mask, line.at + t);
    if (c.mask_dtype == 3) return numbers<kBf16, false, false>(mask, line.at + t);
    return numbers<kF16, false, false>(mask, line.at + t);
  }
  alignas(64) float add[kLanes];
  store(add, all(-INFINITY));
  for (int64_t j = 0; j < kLanes && t + j < line.limit; j++) {
    if (c.mask_dtype > 1) add[j] = load_float(c.mask.data, (DType)(c.mask_dtype - 2), line.at + t + j);
    else if (c.mask_dtype == 0 || ((const uint8_t*)c.mask.data)[line.at + t + j]) add[j] = 0;
  }
  return load(add);
}

QPASS_VECTOR_INLINE bool all_hidden(Vector add) { return hidden(add) == (1u << kLanes) - 1; }

// Which of the keys [from, to) some row of the block sees: from a multiple of kLanes beyond `from`, up to `to` at most.
QPASS_VECTOR void seen_range(const FloatAttention& c, const Block& block, int64_t from, int64_t to, int64_t& low,
                             int64_t& high) {
  low = to, high = from;
  for (int64_t r = 0; r < block.count; r++) {
    if (r && c.mask.head == 0 && (block.first + r) % c.shared) continue;  // the query's first row had the same mask
    const Line line = line_of(c, block, r);
    const int64_t end = line.limit < to ? line.limit : to;
    int64_t t = from;
    while (t < low && t < end && all_hidden(added(c, line, t))) t += kLanes;
    if (t < end && t < low) low = t;
    t = from + padded(end > from ? end - from : 0, kLanes);
    while (t > high && t > from && all_hidden(added(c, line, t - kLanes))) t -= kLanes;
    if (t > high) high = t;
  }
  high = high < to ? high : to;
}

// Scores of N rows with `count` keys; up to a multiple of kLanes, those of the last one again.
template <int kind, int N>
QPASS_VECTOR_INLINE void scores(const FloatAttention& c, const float* q, const uint8_t* key, int64_t step,
                                int64_t count, float* s) {
  const int64_t ahead = ahead_of(step, row_bytes(kind, c.D));
  for (int64_t t = 0; t < count; t += kLanes) {
    const uint8_t* keys[kLanes];
    for (int64_t j = 0; j < kLanes; j++) keys[j] = key + (t + j < count ? t + j : count - 1) * step;
    Half low[N], high[N];
    dots<kind, N>(keys, q, nullptr, c.D, 1, 1, nullptr, ahead, low);
    dots<kind, N>(keys + kHalf, q, nullptr, c.D, 1, 1, nullptr, ahead, high);
    for (int n = 0; n < N; n++) store(s + n * kChunk + t, sums(low[n], high[n]));
  }
}

template <int kind>
QPASS_VECTOR_INLINE void tile_scores(const FloatAttention& c, int64_t rows, const float* q, const uint8_t* key,
                                     int64_t step, int64_t count, float* s) {
  int64_t r = 0;
  for (; r + 3 <= rows && rows - r != 4; r += 3) scores<kind, 3>(c, q + r * c.D, key, step, count, s + r * kChunk);
  for (; r + 2 <= rows; r += 2) scores<kind, 2>(c, q + r * c.D, key, step, count, s + r * kChunk);
  if (r < rows) scores<kind, 1>(c, q + r * c.D, key, step, count, s + r * kChunk);
}

template <int kind>
QPASS_VECTOR_INLINE void tile_values(const FloatAttention& c, int64_t rows, const float* p, const uint8_t* value,
                                     int64_t step, int64_t count, float* sum) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r, n = left == 5 ? 3 : left < 4 ? left : left == 6 ? 3 : 4, Dv = c.Dv;
    const float* weight = p + r * kChunk;
    if (n == 1) add_values<kind, 1>(value, step, count, weight, kChunk, 0, Dv, Dv, sum + r * Dv);
    if (n == 2) add_values<kind, 2>(value, step, count, weight, kChunk, 0, Dv, Dv, sum + r * Dv);
    if (n == 3) add_values<kind, 3>(value, step, count, weight, kChunk, 0, Dv, Dv, sum + r * Dv);
    if (n == 4) add_values<kind, 4>(value, step, count, weight, kChunk, 0, Dv, Dv, sum + r * Dv);
    r += n;
  }
}

// Scores of one row, [low, high) of a chunk at s, to weights exp(score - most). False if one is NaN or +inf: then so is
// the row, and its weights are 0.
QPASS_VECTOR bool weigh(const FloatAttention& c, const Line& line, int64_t from, int64_t low, int64_t high, float* s,
                        float& most, float& total) {
  Vector largest = all(-INFINITY), wrong = all(0), sum = all(0);
  for (int64_t t = low; t < high; t += kLanes) {
    const Vector x = masked_sum(load(s + t - from), added(c, line, t));
    wrong = nan_kept(wrong, x);
    largest = larger(largest, x);
    store(s + t - from, x);
  }
  most = max_of(largest);
  const bool right = !any_nan(wrong) && most != INFINITY;
  for (int64_t t = low; t < high; t += kLanes) {
    const Vector e = right && most != -INFINITY ? exp_of(minus(load(s + t - from), all(most))) : all(0);
    store(s + t - from, e);
    sum = plus(sum, e);
  }
  total = sum_of(sum);
  return right;
}

// A row whose sum has a NaN: it is one of a value that the row sees, or 0 times what a mask hides, which is left out.
template <int kind>
QPASS_VECTOR void sum_of_seen(const FloatAttention& c, const Line& line, const float* p, const uint8_t* value,
                              int64_t step, int64_t low, int64_t high, float* sum) {
  for (int64_t i = 0; i < c.Dv; i++) sum[i] = 0;
  for (int64_t t = low; t < high; t++)
    if (!(hidden(added(c, line, t)) & 1))
      add_values<kind, 1>(value + (t - low) * step, step, 1, p + t - low, kChunk, 0, c.Dv, c.Dv, sum);
}

template <int kind>
QPASS_VECTOR void chunk_of(const FloatAttention& c, const Block& block, int64_t from, const Piece& out) {
  const int64_t to = from + kChunk < c.S ? from + kChunk : c.S, k_step = c.k.token * bytes_of(kind);
  const int64_t v_step = c.v.token * bytes_of(kind);
  const uint8_t* key = (const uint8_t*)c.k.data + (block.b * c.k.batch + block.h * c.k.head) * bytes_of(kind);
  const uint8_t* value = (const uint8_t*)c.v.data + (block.b * c.v.batch + block.h * c.v.head) * bytes_of(kind);
  float* s = block.work + kRowBlock * c.D;
  int64_t low, high;
  seen_range(c, block, from, to, low, high);
  for (int64_t r = 0; r < block.count; r++) out.most[r] = -INFINITY;
  if (low >= high) return;
  for (int64_t t = low; t < high; t += kTile) {
    const int64_t count = high - t < kTile ? high - t : kTile;
    tile_scores<kind>(c, block.count, block.work, key + t * k_step, k_step, count, s + t - from);
  }
  uint32_t wrong = 0;
  for (int64_t r = 0; r < block.count; r++)
    if (!weigh(c, line_of(c, block, r), from, low, high, s + r * kChunk, out.most[r], out.total[r])) wrong |= 1u << r;
  for (int64_t i = 0; i < block.count * c.Dv; i++) out.sum[i] = 0;
  for (int64_t t = low; t < high; t += kTile) {
    const int64_t count = high - t < kTile ? high - t : kTile;
    tile_values<kind>(c, block.count, s + t - from, value + t * v_step, v_step, count, out.sum);
  }
  for (int64_t r = 0; r < block.count; r++) {
    float* sum = out.sum + r * c.Dv;
    bool number = true;
    for (int64_t i = 0; i < c.Dv; i++) number &= sum[i] == sum[i];
    if (wrong >> r & 1) {
      out.most[r] = 0, out.total[r] = NAN;
      for (int64_t i = 0; i < c.Dv; i++) sum[i] = NAN;
    } else if (!number) {
      const float* p = s + r * kChunk + low - from;
      sum_of_seen<kind>(c, line_of(c, block, r), p, value + low * v_step, v_step, low, high, sum);
    }
  }
}

void chunk(const FloatAttention& c, const Block& block, int64_t from, const Piece& out) {
  if (c.dtype == DType::f32) return chunk_of<kFloat>(c, block, from, out);
  if (c.dtype == DType::bf16) return chunk_of<kBf16>(c, block, from, out);
  chunk_of<kF16>(c, block, from, out);
}

template <int kind, bool HALF>
QPASS_VECTOR_INLINE void scaled(const FloatAttention& c, int64_t at, int64_t i, float* to) {
  store_part<HALF>(to + i, times(all(c.scale), numbers<kind, false, HALF>((const uint8_t*)c.q.data, at + i)));
}

template <int kind>
QPASS_VECTOR void begin_of(const FloatAttention& c, const Block& block) {
  for (int64_t r = 0; r < block.count; r++) {
    const int64_t m = (block.first + r) / c.shared, head = block.h * c.shared + (block.first + r) % c.shared;
    const int64_t at = block.b * c.q.batch + head * c.q.head + m * c.q.token;
    int64_t i = 0;
    for (; i + kLanes <= c.D; i += kLanes) scaled<kind, false>(c, at, i, block.work + r * c.D);
    if (i < c.D) scaled<kind, true>(c, at, i, block.work + r * c.D);
  }
}

void begin(const FloatAttention& c, const Block& block) {
  if (c.dtype == DType::f32) return begin_of<kFloat>(c, block);
  if (c.dtype == DType::bf16) return begin_of<kBf16>(c, block);
  begin_of<kF16>(c, block);
}

void join(const FloatAttention& c, const Block& block, const Piece& into, const Piece& one) {
  for (int64_t r = 0; r < block.count; r++) {
    if (one.most[r] == -INFINITY) continue;
    const bool first = into.most[r] == -INFINITY;
    const float most = first || one.most[r] > into.most[r] ? one.most[r] : into.most[r];
    const float mine = first ? 0 : std::exp(into.most[r] - most), theirs = std::exp(one.most[r] - most);
    into.most[r] = most;
    into.total[r] = (first ? 0 : into.total[r] * mine) + one.total[r] * theirs;
    float* sum = into.sum + r * c.Dv;
    for (int64_t i = 0; i < c.Dv; i++) sum[i] = (first ? 0 : sum[i] * mine) + one.sum[r * c.Dv + i] * theirs;
  }
}

QPASS_VECTOR void finish(const FloatAttention& c, const Block& block, const Piece& piece) {
  for (int64_t r = 0; r < block.count; r++) {
    const int64_t m = (block.first + r) / c.shared, head = block.h * c.shared + (block.first + r) % c.shared;
    const int64_t at = ((block.b * c.M + m) * c.Hq + head) * c.Dv;
    const bool seen = piece.most[r] != -INFINITY;
    float* sum = piece.sum + r * c.Dv;
    for (int64_t i = 0; i < c.Dv && !seen; i++) sum[i] = 0;
    const Vector factor = all(seen ? 1 / piece.total[r] : 0);
    int64_t i = 0;
    for (; i + kLanes <= c.Dv; i += kLanes) store_as<false>(c.dtype, c.out, at + i, times(factor, load(sum + i)));
    if (i < c.Dv) store_as<true>(c.dtype, c.out, at + i, times(factor, load_part<kLanes != 8>(sum + i)));
  }
}

}  // namespace
}  // namespace qpass
