// Attention over a quantized cache: queries in, keys and values read as codes, one row at a time, outputs in float.
// For decoding: every code is read from memory once, and there is no copy of the cache in float.
#include <new>

#include "attention_call.h"
#include "scratch.h"

namespace qpass {
namespace {

// Scores of one row become weights exp(score - most). Returns what makes them add up to 1; all weights are 0 if no key may
// be seen, and NaN if one score is.
QPASS_AVX2 float weigh(float* s, int64_t size, const float* largest, const float* wrong) {
  const __m256 bad = _mm256_loadu_ps(wrong);
  float most = largest[0];
  for (int j = 1; j < 8; j++) most = largest[j] > most ? largest[j] : most;
  const bool numbers = _mm256_movemask_ps(bad) == 0;
  if (most == -INFINITY || !numbers) {
    for (int64_t t = 0; t < size; t++) s[t] = numbers ? 0 : NAN;
    return 1;
  }
  __m256 sum = _mm256_setzero_ps();
  for (int64_t t = 0; t < size; t += 8) {
    const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + t), _mm256_set1_ps(most)));
    _mm256_storeu_ps(s + t, e);
    sum = _mm256_add_ps(sum, e);
  }
  return 1 / sum8(sum);
}

// Scores of N rows from r on with 8 keys: scaled, capped, masked and stored.
template <int kind, int N>
QPASS_AVX2_INLINE void score8(const Call& c, const qp_cached& k, const uint8_t* const (&keys)[8], const Work& w, int64_t t,
                              int64_t r, bool one_mask, __m256 factor) {
  const int64_t ld = padded(c.S, 8), parts = parts_of(k, c.kind);
  __m128 half[2][N];
  for (int i = 0; i < 2; i++)
    dots4<kind, N>(keys + i * 4, w.x + r * c.D, w.less + r * parts, c.D, parts, k.groups, w.scale + i * 4, half[i]);
  const __m256 hidden = _mm256_set1_ps(-INFINITY);
  for (int n = 0; n < N; n++) {
    __m256 s = _mm256_mul_ps(_mm256_set_m128(half[1][n], half[0][n]), factor);
    if (c.softcap > 0) {
      float each[8];
      _mm256_storeu_ps(each, s);
      for (float& one : each) one = c.softcap * std::tanh(one / c.softcap);
      s = _mm256_loadu_ps(each);
    }
    const __m256 add = _mm256_loadu_ps(w.add + (one_mask ? 0 : r + n) * 8);
    s = _mm256_blendv_ps(_mm256_add_ps(s, add), hidden, _mm256_cmp_ps(add, hidden, _CMP_EQ_OQ));
    _mm256_storeu_ps(w.scores + (r + n) * ld + t, s);
    float *largest = w.largest + (r + n) * 8, *wrong = w.wrong + (r + n) * 8;
    _mm256_storeu_ps(largest, _mm256_max_ps(_mm256_loadu_ps(largest), s));
    _mm256_storeu_ps(wrong, _mm256_or_ps(_mm256_loadu_ps(wrong), _mm256_cmp_ps(s, s, _CMP_UNORD_Q)));
  }
}

template <int kind>
QPASS_AVX2 void all_scores(const Call& c, const qp_cached& k, int64_t b, int64_t h, const Work& w) {
  const int64_t G = c.Hq / c.Hkv, R = G * c.M, ld = padded(c.S, 8);
  const bool one_mask = c.M == 1 && (c.mask_dtype == 0 || c.mask_head == 0);  // the same for all rows of a head
  const uint8_t* first = c.codes_of(k, b, h);
  for (int64_t t = 0; t < c.S; t += kRows) {
    const int64_t count = c.S - t < kRows ? c.S - t : kRows;
    bool seen = false;
    for (int64_t r = 0; r < (one_mask ? 1 : R); r++)
      seen |= masked8(c, b, h * G + r / c.M, r % c.M, t, count, w.add + r * 8);
    if (!seen) {
      for (int64_t r = 0; r < R; r++) _mm256_storeu_ps(w.scores + r * ld + t, _mm256_set1_ps(-INFINITY));
      continue;
    }
    const uint8_t* keys[8];
    for (int64_t j = 0; j < kRows; j++) {
      const int64_t there = j < count ? j : count - 1;
      keys[j] = kind == kFloat ? (const uint8_t*)(w.rows + there * c.D) : first + (t + there) * k.token;
    }
    __m256 factor = _mm256_set1_ps(1);
    if (kind == kFloat) {
      decode_rows(c.kind, k, b, h, t, count, c.D, w.rows);
    } else {
      scales_of(k, b, h, t, count, kRows, w.scale);
      if (kind != kInt4) factor = _mm256_mul_ps(_mm256_loadu_ps(w.scale), _mm256_set1_ps(half_unit<kind>));
    }
    for (int64_t r = 0; r < R;) {
      const int64_t left = R - r;
      if (left == 1) score8<kind, 1>(c, k, keys, w, t, r, one_mask, factor), r += 1;
      else if (kind == kInt4 && left == 4) score8<kind, 4>(c, k, keys, w, t, r, one_mask, factor), r += 4;
      else if (left == 2 || left == 4) score8<kind, 2>(c, k, keys, w, t, r, one_mask, factor), r += 2;
      else score8<kind, 3>(c, k, keys, w, t, r, one_mask, factor), r += 3;
    }
  }
}

// Weights of the values t .. t + count - 1, times their scales, to w.weight; false if all are 0.
QPASS_AVX2_INLINE bool scaled_weights(const Call& c, const Work& w, int64_t R, int64_t t, int64_t count,
                                      int64_t parts, int64_t groups) {
  const int64_t ld = padded(c.S, 8);
  const __m256 zero = _mm256_setzero_ps();
  __m256 any = zero;
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0; i < count; i += 8) any = _mm256_or_ps(any, _mm256_loadu_ps(w.scores + r * ld + t + i));
  if (_mm256_testz_si256(_mm256_castps_si256(any), _mm256_castps_si256(any))) return false;
  for (int64_t p = 0; p < parts; p++)
    for (int64_t r = 0; r < R; r++) {
      float *to = w.weight + (p * R + r) * kTokens, *taken = w.taken + (p * R + r) * 8;
      __m256 sum = _mm256_loadu_ps(taken);
      for (int64_t i = 0; i < count; i += 8) {  // a scale that no row sees may be anything
        const __m256 e = _mm256_loadu_ps(w.scores + r * ld + t + i);
        const __m256 scale = _mm256_loadu_ps(w.scale + (groups == 1 ? 0 : p) * kTokens + i);
        const __m256 scaled = _mm256_and_ps(_mm256_mul_ps(e, scale), _mm256_cmp_ps(e, zero, _CMP_NEQ_UQ));
        _mm256_storeu_ps(to + i, scaled);
        sum = _mm256_add_ps(sum, scaled);
      }
      _mm256_storeu_ps(taken, sum);
    }
  return true;
}

template <int kind>
QPASS_AVX2 void all_values(const Call& c, const qp_cached& v, int64_t b, int64_t h, const Work& w) {
  const int64_t R = c.Hq / c.Hkv * c.M, parts = kind == kFloat ? 1 : parts_of(v, c.kind);
  const int64_t step = kind == kFloat ? c.Dv * 4 : v.token, part = c.Dv / parts;
  for (int64_t i = 0; i < R * c.Dv; i++) w.sum[i] = 0;
  for (int64_t i = 0; i < parts * R * 8; i++) w.taken[i] = 0;
  for (int64_t t = 0; t < c.S; t += kTokens) {
    const int64_t count = c.S - t < kTokens ? c.S - t : kTokens;
    if (kind == kFloat)
      for (int64_t j = 0; j < kTokens; j++) w.scale[j] = 1;
    else
      scales_of(v, b, h, t, count, kTokens, w.scale);
    for (int64_t j = 0; kind == kFp8 && j < kTokens; j++) w.scale[j] *= half_unit<kind>;
    if (!scaled_weights(c, w, R, t, count, parts, kind == kFloat ? 1 : v.groups)) continue;
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
      if (n == 1) add_values<kind, 1>(first, step, count, weight, R * kTokens, part, c.Dv, sum);
      if (n == 2) add_values<kind, 2>(first, step, count, weight, R * kTokens, part, c.Dv, sum);
      if (n == 3) add_values<kind, 3>(first, step, count, weight, R * kTokens, part, c.Dv, sum);
      if (n == 4) add_values<kind, 4>(first, step, count, weight, R * kTokens, part, c.Dv, sum);
      r += n;
    }
  }
  for (int64_t r = 0; r < R && kind == kInt4; r++)
    for (int64_t p = 0; p < parts; p++) {
      const float eight = 8 * sum8(_mm256_loadu_ps(w.taken + (p * R + r) * 8));
      for (int64_t i = p * part; i < (p + 1) * part; i++) w.sum[r * c.Dv + i] -= eight;
    }
}

template <int kind>
QPASS_AVX2 void one_head(const Call& c, const qp_cached& k, const qp_cached& v, const void* q, DType dtype, void* out,
                         int64_t b, int64_t h, float* space) {
  const int64_t G = c.Hq / c.Hkv, R = G * c.M, parts = parts_of(k, c.kind);
  const bool direct_k = has_parts(k, c.kind), direct_v = has_parts(v, c.kind);
  Work w;
  work_of(c, k, v, space, w);
  for (int64_t r = 0; r < R; r++) {
    const int64_t from = ((b * c.Hq + h * G) * c.M + r) * c.D;
    const float by = c.scaling * (direct_k ? half_unit<kind> : 1);
    for (int64_t i = 0; i < c.D; i++) w.x[r * c.D + i] = by * load_float(q, dtype, from + i);
    for (int64_t p = 0; p < parts; p++) {
      float sum = 0;
      for (int64_t i = p * (c.D / parts); i < (p + 1) * (c.D / parts); i++) sum += w.x[r * c.D + i];
      w.less[r * parts + p] = -sum;  // in each of 8 lanes
    }
    _mm256_storeu_ps(w.largest + r * 8, _mm256_set1_ps(-INFINITY));
    _mm256_storeu_ps(w.wrong + r * 8, _mm256_setzero_ps());
  }
  (direct_k ? all_scores<kind> : all_scores<kFloat>)(c, k, b, h, w);
  for (int64_t r = 0; r < R; r++)
    w.factor[r] = weigh(w.scores + r * padded(c.S, 8), padded(c.S, 8), w.largest + r * 8, w.wrong + r * 8);
  (direct_v ? all_values<kind> : all_values<kFloat>)(c, v, b, h, w);
  for (int64_t r = 0; r < R; r++) {  // out is [B, M, Hq, Dv]
    const float factor = w.factor[r] * (direct_v ? half_unit<kind> : 1);
    for (int64_t i = 0; i < c.Dv; i++)
      store_float(out, dtype, ((b * c.M + r % c.M) * c.Hq + h * G + r / c.M) * c.Dv + i, w.sum[r * c.Dv + i] * factor);
  }
}

bool fits(const Call& c, const qp_cached& t, int64_t size) {
  const int64_t row = c.kind == kInt4 ? size / 2 : size;
  if (t.batch < 0 || t.head < 0 || t.token < 0 || t.scale_batch < 0 || t.scale_head < 0 || t.scale_token < 0) return false;
  if (t.groups < 1 || t.scale_group < 0 || size % t.groups || (size / t.groups) % 8) return false;
  if (c.kind == kInt4 && size % 16) return false;
  if (t.scale_dtype < 0 || t.scale_dtype > 2 || !t.codes || !t.scale) return false;
  return (c.B - 1) * t.batch + (c.Hkv - 1) * t.head + (c.S - 1) * t.token + row <= t.bytes &&
         (c.B - 1) * t.scale_batch + (c.Hkv - 1) * t.scale_head + (c.S - 1) * t.scale_token +
                 (t.groups - 1) * t.scale_group < t.scales;
}

}  // namespace
}  // namespace qpass

extern "C" int32_t qp_attention(const void* q, int32_t dtype, const int64_t* sizes, int32_t kind, const qp_cached* k,
                                const qp_cached* v, const void* mask, int32_t mask_dtype, const int64_t* mask_strides,
                                int64_t mask_count, int32_t causal, float scaling, float softcap, void* out,
                                int32_t threads) {
  using namespace qpass;
  if (!machine_runs(1)) return fail("attention over a quantized cache needs avx2, this machine has none");
  Call c = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], kind, mask_dtype, causal, scaling,
            softcap, mask, mask_strides[0], mask_strides[1], mask_strides[2]};
  for (int i = 0; i < 7; i++)
    if (sizes[i] < 1 || sizes[i] > (int64_t)1 << 31) return fail("attention: size %d is %lld", i, (long long)sizes[i]);
  if (c.Hq % c.Hkv) return fail("attention: %lld heads of queries do not share %lld of keys", (long long)c.Hq, (long long)c.Hkv);
  if (dtype < 0 || dtype > 2 || kind < 0 || kind > 2 || !q || !out) return fail("attention: unknown dtype or kind");
  if (!fits(c, *k, c.D) || !fits(c, *v, c.Dv)) return fail("attention: keys or values are smaller than their sizes say");
  if (mask_dtype && (!mask || c.mask_batch < 0 || c.mask_head < 0 || c.mask_row < 0 ||
                     (c.B - 1) * c.mask_batch + (c.Hq - 1) * c.mask_head + (c.M - 1) * c.mask_row + c.S > mask_count))
    return fail("attention: the mask is smaller than [B, H, M, S]");
  Work none;
  const int64_t need = 4 * work_of(c, *k, *v, nullptr, none);
  bool failed = false;
#pragma omp parallel for num_threads(team_size(threads, c.B * c.Hkv)) schedule(dynamic)
  for (int64_t task = 0; task < c.B * c.Hkv; task++) {
    try {
      float* work = (float*)scratch(0, need);
      const auto run = kind == kInt8 ? one_head<kInt8> : kind == kFp8 ? one_head<kFp8> : one_head<kInt4>;
      run(c, *k, *v, q, (DType)dtype, out, task / c.Hkv, task % c.Hkv, work);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  }
  return failed ? fail("attention: out of memory for %lld bytes of scores", (long long)need) : 0;
}
