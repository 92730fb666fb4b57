// Attention over a quantized cache: one head of keys with the queries that share it. After the vectors of an
// instruction set: this is compiled for each.
#pragma once
#include "attention_rows.h"
#include "attention_codes.h"

namespace qpass {
namespace {

// What a mask adds to the score of key t for row m of head hq: 0 or a number, -inf where it may not be seen.
inline float masked(const CacheCall& c, int64_t b, int64_t hq, int64_t m, int64_t t) {
  if (c.causal && t > c.S - c.M + m) return -INFINITY;
  if (c.mask_dtype == 0) return 0;
  const int64_t at = b * c.mask_batch + hq * c.mask_head + m * c.mask_row + t;
  if (c.mask_dtype == 1) return ((const uint8_t*)c.mask)[at] ? 0 : -INFINITY;
  return ((const float*)c.mask)[at];
}

// The same for kLanes keys from t on, of which `count` exist; returns whether one of them may be seen.
QPASS_VECTOR_INLINE bool mask_of(const CacheCall& c, int64_t b, int64_t hq, int64_t m, int64_t t, int64_t count,
                                 float* out) {
  Vector add = all(0);
  if (count < kLanes || (c.causal && t + kLanes - 1 > c.S - c.M + m)) {
    for (int64_t j = 0; j < kLanes; j++) out[j] = j < count ? masked(c, b, hq, m, t + j) : -INFINITY;
    add = load(out);
  } else if (c.mask_dtype != 0) {
    const int64_t at = b * c.mask_batch + hq * c.mask_head + m * c.mask_row + t;
    add = c.mask_dtype == 1 ? added_by((const uint8_t*)c.mask + at) : load((const float*)c.mask + at);
  }
  store(out, add);
  return hidden(add) != (1u << kLanes) - 1;
}

// Scores of one row become weights exp(score - most). Returns what makes them add up to 1; all weights are 0 if no key
// may be seen, and NaN if one score is.
QPASS_VECTOR float weigh(float* s, int64_t size) {
  Vector largest = all(-INFINITY), wrong = all(0);
  for (int64_t t = 0; t < size; t += kLanes) {
    const Vector score = load(s + t);
    largest = larger(largest, score);
    wrong = nan_kept(wrong, score);
  }
  const float most = max_of(largest);
  const bool numbers = !any_nan(wrong);
  if (most == -INFINITY || !numbers) {
    for (int64_t t = 0; t < size; t++) s[t] = numbers ? 0 : NAN;
    return 1;
  }
  Vector sum = all(0);
  for (int64_t t = 0; t < size; t += kLanes) {
    const Vector e = exp_of(minus(load(s + t), all(most)));
    store(s + t, e);
    sum = plus(sum, e);
  }
  return 1 / sum_of(sum);
}

// Scores of N rows from r on with kLanes keys: scaled, capped, masked and stored.
template <int kind, int N>
QPASS_VECTOR_INLINE void score(const CacheCall& c, const uint8_t* const (&keys)[kLanes], const Work& w, int64_t t,
                               int64_t r, bool one_mask, Vector factor) {
  const int64_t parts = parts_of(c.k, c.kind);
  const float* less = w.less + r * parts;
  const int64_t ahead = kind == kFloat ? 0 : ahead_of(c.k.token, row_bytes(kind, c.D));
  Half low[N], high[N];
  dots<kind, N>(keys, w.x + r * c.D, less, c.D, parts, c.k.groups, w.scale, ahead, low);
  dots<kind, N>(keys + kHalf, w.x + r * c.D, less, c.D, parts, c.k.groups, w.scale + kHalf, ahead, high);
  for (int n = 0; n < N; n++) {
    Vector s = times(sums(low[n], high[n]), factor);
    if (c.softcap > 0) {
      float each[kLanes];
      store(each, s);
      for (float& one : each) one = c.softcap * std::tanh(one / c.softcap);
      s = load(each);
    }
    store(w.scores + (r + n) * c.scores() + t, masked_sum(s, load(w.add + (one_mask ? 0 : r + n) * kLanes)));
  }
}

template <int kind>
QPASS_VECTOR void all_scores(const CacheCall& c, int64_t b, int64_t h, const Work& w) {
  const int64_t G = c.Hq / c.Hkv, R = c.rows(), ld = c.scores();
  const bool one_mask = c.M == 1 && (c.mask_dtype == 0 || c.mask_head == 0);  // the same for all rows of a head
  const uint8_t* first = c.codes_of(c.k, b, h);
  for (int64_t t = 0; t < c.S; t += kLanes) {
    const int64_t count = c.S - t < kLanes ? c.S - t : kLanes;
    bool seen = false;
    for (int64_t r = 0; r < (one_mask ? 1 : R); r++)
      seen |= mask_of(c, b, h * G + r / c.M, r % c.M, t, count, w.add + r * kLanes);
    if (!seen) {
      for (int64_t r = 0; r < R; r++) store(w.scores + r * ld + t, all(-INFINITY));
      continue;
    }
    const uint8_t* keys[kLanes];
    for (int64_t j = 0; j < kLanes; j++) {
      const int64_t there = j < count ? j : count - 1;
      keys[j] = kind == kFloat ? (const uint8_t*)(w.rows + there * c.D) : first + (t + there) * c.k.token;
    }
    Vector factor = all(1);
    if (kind == kFloat) {
      decode_rows(c.kind, c.k, b, h, t, count, c.D, w.rows);
    } else {
      scales_of(c.k, b, h, t, count, kLanes, w.scale);
      if (kind != kInt4) factor = times(load(w.scale), all(half_unit<kind>));
    }
    for (int64_t r = 0; r < R;) {
      const int64_t left = R - r;
      if (left == 1) score<kind, 1>(c, keys, w, t, r, one_mask, factor), r += 1;
      else if (kind == kInt4 && left == 4) score<kind, 4>(c, keys, w, t, r, one_mask, factor), r += 4;
      else if (left == 2 || left == 4) score<kind, 2>(c, keys, w, t, r, one_mask, factor), r += 2;
      else score<kind, 3>(c, keys, w, t, r, one_mask, factor), r += 3;
    }
  }
}

// Weights of the values t .. t + count - 1, times their scales, to w.weight; false if all are 0.
QPASS_VECTOR_INLINE bool scaled_weights(const CacheCall& c, const Work& w, int64_t t, int64_t count, int64_t parts,
                                        int64_t groups) {
  const int64_t R = c.rows(), ld = c.scores();
  bool any = false;
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0; i < count; i += kLanes) any |= any_not_0(load(w.scores + r * ld + t + i));
  if (!any) return false;
  for (int64_t p = 0; p < parts; p++)
    for (int64_t r = 0; r < R; r++) {
      float *to = w.weight + (p * R + r) * kTokens, *taken = w.taken + (p * R + r) * kLanes;
      Vector sum = load(taken);
      for (int64_t i = 0; i < count; i += kLanes) {  // a scale that no row sees may be anything
        const Vector e = load(w.scores + r * ld + t + i), scale = load(w.scale + (groups == 1 ? 0 : p) * kTokens + i);
        const Vector scaled = where_not_0(e, times(e, scale));
        store(to + i, scaled);
        sum = plus(sum, scaled);
      }
      store(taken, sum);
    }
  return true;
}

template <int kind>
QPASS_VECTOR void all_values(const CacheCall& c, int64_t b, int64_t h, const Work& w) {
  const qp_cached& v = c.v;
  const int64_t R = c.rows(), parts = kind == kFloat ? 1 : parts_of(v, c.kind);
  const int64_t step = kind == kFloat ? c.Dv * 4 : v.token, part = c.Dv / parts;
  for (int64_t i = 0; i < R * c.Dv; i++) w.sum[i] = 0;
  for (int64_t i = 0; i < parts * R * kLanes; i++) w.taken[i] = 0;
  for (int64_t t = 0; t < c.S; t += kTokens) {
    const int64_t count = c.S - t < kTokens ? c.S - t : kTokens;
    if (kind == kFloat)
      for (int64_t j = 0; j < kTokens; j++) w.scale[j] = 1;
    else
      scales_of(v, b, h, t, count, kTokens, w.scale);
    for (int64_t j = 0; kind == kFp8 && j < kTokens; j++) w.scale[j] *= half_unit<kind>;
    if (!scaled_weights(c, w, t, count, parts, kind == kFloat ? 1 : v.groups)) continue;
    const uint8_t* first = c.codes_of(v, b, h) + t * v.token;
    if (kind == kFloat) {
      decode_rows(c.kind, v, b, h, t, count, c.Dv, w.rows);
      for (int64_t j = 0; j < count; j++) {
        bool seen = false;
        for (int64_t r = 0; r < R; r++) seen |= w.weight[r * kTokens + j] != 0;
        for (int64_t i = 0; i < c.Dv && !seen; i++) w.rows[j * c.Dv + i] = 0;
      }
      first = (const uint8_t*)w.rows;
    }
    for (int64_t r = 0; r < R;) {
      const int64_t left = R - r, n = left == 5 ? 3 : left < 4 ? left : left == 6 ? 3 : 4;
      const float* weight = w.weight + r * kTokens;
      float* sum = w.sum + r * c.Dv;
      if (n == 1) add_values<kind, 1>(first, step, count, weight, kTokens, R * kTokens, part, c.Dv, sum);
      if (n == 2) add_values<kind, 2>(first, step, count, weight, kTokens, R * kTokens, part, c.Dv, sum);
      if (n == 3) add_values<kind, 3>(first, step, count, weight, kTokens, R * kTokens, part, c.Dv, sum);
      if (n == 4) add_values<kind, 4>(first, step, count, weight, kTokens, R * kTokens, part, c.Dv, sum);
      r += n;
    }
  }
  for (int64_t r = 0; r < R && kind == kInt4; r++)
    for (int64_t p = 0; p < parts; p++) {
      const float eight = 8 * sum_of(load(w.taken + (p * R + r) * kLanes));
      for (int64_t i = p * part; i < (p + 1) * part; i++) w.sum[r * c.Dv + i] -= eight;
    }
}

template <int kind>
QPASS_VECTOR void head_of(const CacheCall& c, int64_t b, int64_t h, float* space) {
  const int64_t G = c.Hq / c.Hkv, R = c.rows(), parts = parts_of(c.k, c.kind);
  const bool direct_k = has_parts(c.k, c.kind), direct_v = has_parts(c.v, c.kind);
  Work w;
  work_of(c, space, w);
  for (int64_t r = 0; r < R; r++) {
    const int64_t from = ((b * c.Hq + h * G) * c.M + r) * c.D;
    const float by = c.scaling * (direct_k ? half_unit<kind> : 1);
    for (int64_t i = 0; i < c.D; i++) w.x[r * c.D + i] = by * load_float(c.q, c.dtype, from + i);
    for (int64_t p = 0; p < parts; p++) {
      float sum = 0;
      for (int64_t i = p * (c.D / parts); i < (p + 1) * (c.D / parts); i++) sum += w.x[r * c.D + i];
      w.less[r * parts + p] = -8 * sum / kLanes;
    }
  }
  (direct_k ? all_scores<kind> : all_scores<kFloat>)(c, b, h, w);
  for (int64_t r = 0; r < R; r++) w.factor[r] = weigh(w.scores + r * c.scores(), padded(c.S, kLanes));
  (direct_v ? all_values<kind> : all_values<kFloat>)(c, b, h, w);
  for (int64_t r = 0; r < R; r++) {  // out is [B, M, Hq, Dv]
    const float factor = w.factor[r] * (direct_v ? half_unit<kind> : 1);
    const int64_t at = ((b * c.M + r % c.M) * c.Hq + h * G + r / c.M) * c.Dv;
    for (int64_t i = 0; i < c.Dv; i++) store_float(c.out, c.dtype, at + i, w.sum[r * c.Dv + i] * factor);
  }
}

void head_of_any(const CacheCall& c, int64_t b, int64_t h, float* space) {
  if (c.kind == kInt8) return head_of<kInt8>(c, b, h, space);
  if (c.kind == kFp8) return head_of<kFp8>(c, b, h, space);
  head_of<kInt4>(c, b, h, space);
}

}  // namespace
}  // namespace qpass
