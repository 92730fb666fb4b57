// Attention over a quantized cache: queries in, keys and values read as codes, one row at a time, outputs in float.
// For decoding: every code is read from memory once, and there is no copy of the cache in float.
#include <cmath>
#include <new>

#include "avx2_intrinsics.h"
#include "abi.h"
#include "avx2_exp.h"
#include "convert.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int kRows = 8;  // of keys or values at a time: decoded ones stay in the first cache
enum Kind { kInt8 = 0, kFp8 = 1, kInt4 = 2 };

struct Call {
  int64_t B, Hq, Hkv, M, S, D, Dv;
  int32_t kind, mask_dtype, causal;
  float scaling, softcap;
  const void* mask;
  int64_t mask_batch, mask_head, mask_row;
};

// 8 codes of e4m3 in the low bytes, their signs above: moved up so that exponent and mantissa lie in float's place, the
// sign is there too. e4m3 has bias 7: in float's place its numbers are 2^120 too small, the subnormal ones too.
QPASS_AVX2_INLINE __m256 of_fp8(__m256i extended) {
  const __m256i number = _mm256_and_si256(_mm256_slli_epi32(extended, 20), _mm256_set1_epi32((int)0x87f00000u));
  return _mm256_mul_ps(_mm256_castsi256_ps(number), _mm256_set1_ps(0x1p120f));
}

// 8 numbers from element i of a row of `size`; int4 has element j and j + size / 2 in one byte, 8 stands for 0.
template <int kind>
QPASS_AVX2_INLINE __m256 load8(const uint8_t* row, int64_t i, int64_t size) {
  if (kind == kInt8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + i))));
  if (kind == kFp8) return of_fp8(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + i))));
  const bool high = i >= size / 2;
  __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(row + (high ? i - size / 2 : i))));
  u = high ? _mm256_srli_epi32(u, 4) : _mm256_and_si256(u, _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(u, _mm256_set1_epi32(8)));
}

inline float scale_at(const qp_cached& c, int64_t at) { return load_float(c.scale, (DType)c.scale_dtype, at); }

// One row of codes as floats; returns the factor that is still missing, 1 where the row has several scales.
template <int kind>
QPASS_AVX2_INLINE float decode(const qp_cached& c, int64_t b, int64_t h, int64_t t, int64_t size, float* out) {
  const uint8_t* row = (const uint8_t*)c.codes + b * c.batch + h * c.head + t * c.token;
  const int64_t at = b * c.scale_batch + h * c.scale_head + t * c.scale_token;
  if (c.groups == 1) {
    for (int64_t i = 0; i < size; i += 8) _mm256_storeu_ps(out + i, load8<kind>(row, i, size));
    return scale_at(c, at);
  }
  const int64_t group = size / c.groups;
  for (int64_t g = 0; g < c.groups; g++) {
    const __m256 scale = _mm256_set1_ps(scale_at(c, at + g * c.scale_group));
    for (int64_t i = g * group; i < (g + 1) * group; i += 8)
      _mm256_storeu_ps(out + i, _mm256_mul_ps(load8<kind>(row, i, size), scale));
  }
  return 1;
}

QPASS_AVX2_INLINE float dot(const float* x, const float* y, int64_t size) {
  __m256 one = _mm256_setzero_ps(), two = one;
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    one = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), one);
    two = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8), _mm256_loadu_ps(y + i + 8), two);
  }
  if (i < size) one = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), one);
  return sum8(_mm256_add_ps(one, two));
}

// Scores [S] become weights that add up to 1; all 0 if no key may be seen, all NaN if one score is.
QPASS_AVX2 void softmax(float* s, int64_t size) {
  float most = -INFINITY, total = 0;
  bool numbers = true;
  int64_t t = 0;
  __m256 largest = _mm256_set1_ps(-INFINITY), wrong = _mm256_setzero_ps();
  for (; t + 8 <= size; t += 8) {
    const __m256 x = _mm256_loadu_ps(s + t);
    largest = _mm256_max_ps(largest, x);
    wrong = _mm256_or_ps(wrong, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  alignas(32) float parts[8];
  _mm256_store_ps(parts, largest);
  for (float part : parts) most = part > most ? part : most;
  for (; t < size; t++) {
    most = s[t] > most ? s[t] : most;
    numbers &= s[t] == s[t];
  }
  numbers &= _mm256_movemask_ps(wrong) == 0;
  if (most == -INFINITY || !numbers) {
    for (t = 0; t < size; t++) s[t] = numbers ? 0 : NAN;
    return;
  }
  __m256 sum = _mm256_setzero_ps();
  for (t = 0; t + 8 <= size; t += 8) {
    const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + t), _mm256_set1_ps(most)));
    _mm256_storeu_ps(s + t, e);
    sum = _mm256_add_ps(sum, e);
  }
  for (; t < size; t++) total += s[t] = std::exp(s[t] - most);
  const float factor = 1 / (total + sum8(sum));
  for (t = 0; t < size; t++) s[t] *= factor;
}

}  // namespace
}  // namespace qpass

#include "attention_rows.h"

namespace qpass {
namespace {

// What a mask adds to the score of key t for row m of head hq: 0 or a number, -inf where it may not be seen.
inline float masked(const Call& c, int64_t b, int64_t hq, int64_t m, int64_t t) {
  if (c.causal && t > c.S - c.M + m) return -INFINITY;
  if (c.mask_dtype == 0) return 0;
  const int64_t at = b * c.mask_batch + hq * c.mask_head + m * c.mask_row + t;
  if (c.mask_dtype == 1) return ((const uint8_t*)c.mask)[at] ? 0 : -INFINITY;
  return ((const float*)c.mask)[at];
}

// The same for 8 keys from t on, of which `count` exist; returns whether one of them may be seen.
QPASS_AVX2_INLINE bool masked8(const Call& c, int64_t b, int64_t hq, int64_t m, int64_t t, int64_t count, float* out) {
  __m256 add = _mm256_setzero_ps();
  const __m256 hidden = _mm256_set1_ps(-INFINITY);
  if (count < 8 || (c.causal && t + 7 > c.S - c.M + m)) {
    for (int64_t j = 0; j < 8; j++) out[j] = j < count ? masked(c, b, hq, m, t + j) : -INFINITY;
    add = _mm256_loadu_ps(out);
  } else if (c.mask_dtype != 0) {
    const int64_t at = b * c.mask_batch + hq * c.mask_head + m * c.mask_row + t;
    if (c.mask_dtype == 1) {
      const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const uint8_t*)c.mask + at)));
      add = _mm256_and_ps(hidden, _mm256_castsi256_ps(_mm256_cmpeq_epi32(bytes, _mm256_setzero_si256())));
    } else {
      add = _mm256_loadu_ps((const float*)c.mask + at);
    }
  }
  _mm256_storeu_ps(out, add);
  return _mm256_movemask_ps(_mm256_cmp_ps(add, hidden, _CMP_NEQ_UQ)) != 0;
}

template <int kind>
QPASS_AVX2 void one_head(const Call& c, const qp_cached& k, const qp_cached& v, const void* q, DType dtype, void* out,
                         int64_t b, int64_t h, float* work) {
  const int64_t G = c.Hq / c.Hkv, R = G * c.M, widest = c.D > c.Dv ? c.D : c.Dv, ld = padded(c.S, 8);
  float *x = work, *rows = x + R * c.D, *eight = rows + kRows * widest, *scores = eight + R * kRows;
  float* sum = scores + R * ld;
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0; i < c.D; i++)
      x[r * c.D + i] = c.scaling * load_float(q, dtype, ((b * c.Hq + h * G) * c.M + r) * c.D + i);
  const bool one_mask = c.M == 1 && (c.mask_dtype == 0 || c.mask_head == 0);  // the same for all rows of a head
  for (int64_t t = 0; t < c.S; t += kRows) {
    const int64_t count = c.S - t < kRows ? c.S - t : kRows;
    bool seen = false;
    for (int64_t r = 0; r < R; r++) {
      float* to = scores + r * ld + t;
      if (r && one_mask) _mm256_storeu_ps(to, _mm256_loadu_ps(scores + t));
      else seen |= masked8(c, b, h * G + r / c.M, r % c.M, t, count, to);
    }
    if (!seen) continue;
    score8<kind>(k, b, h, t, count, x, R, c.D, rows, eight);
    for (int64_t r = 0; r < R; r++) {
      float *s = eight + r * kRows, *to = scores + r * ld + t;
      for (int64_t j = 0; j < count && c.softcap > 0; j++) s[j] = c.softcap * std::tanh(s[j] / c.softcap);
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_loadu_ps(s)));
    }
  }
  for (int64_t r = 0; r < R; r++) softmax(scores + r * ld, c.S);
  for (int64_t i = 0; i < R * c.Dv; i++) sum[i] = 0;
  for (int64_t t = 0; t < c.S; t += kRows) {
    const int64_t count = c.S - t < kRows ? c.S - t : kRows;
    bool seen = false;
    for (int64_t r = 0; r < R && !seen; r++)
      for (int64_t j = 0; j < count; j++) seen |= scores[r * ld + t + j] != 0;
    if (seen) add8<kind>(v, b, h, t, count, scores + t, ld, R, c.Dv, rows, sum);
  }
  for (int64_t r = 0; r < R; r++)  // out is [B, M, Hq, Dv]
    for (int64_t i = 0; i < c.Dv; i++)
      store_float(out, dtype, ((b * c.M + r % c.M) * c.Hq + h * G + r / c.M) * c.Dv + i, sum[r * c.Dv + i]);
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
  const int64_t R = c.Hq / c.Hkv * c.M, widest = c.D > c.Dv ? c.D : c.Dv;
  const int64_t need = 4 * (R * (c.D + c.Dv + padded(c.S, 8) + kRows) + kRows * widest);
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
