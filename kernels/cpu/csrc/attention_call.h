// Attention over a quantized cache: one call, the work space of a head of keys in it, and its mask.
#pragma once
#include <cmath>

#include "attention_rows.h"

namespace qpass {
namespace {

struct Call {
  int64_t B, Hq, Hkv, M, S, D, Dv;
  int32_t kind, mask_dtype, causal;
  float scaling, softcap;
  const void* mask;
  int64_t mask_batch, mask_head, mask_row;

  // The codes of token 0.
  const uint8_t* codes_of(const qp_cached& t, int64_t b, int64_t h) const {
    return (const uint8_t*)t.codes + b * t.batch + h * t.head;
  }
};

// Work space of one head, in floats: queries, what their int4 sums start at, rows decoded to memory, scores and what is
// added to 8 of them, sums of values, the largest score and the look for NaN, weights with and without scales.
struct Work {
  float *x, *less, *rows, *scores, *add, *sum, *largest, *wrong, *weight, *taken, *scale, *factor;
};

int64_t work_of(const Call& c, const qp_cached& k, const qp_cached& v, float* from, Work& w) {
  const int64_t R = c.Hq / c.Hkv * c.M, widest = c.D > c.Dv ? c.D : c.Dv, parts = parts_of(v, c.kind);
  int64_t total = 0;
  const auto next = [&](int64_t size) {
    float* here = from ? from + total : nullptr;
    total += padded(size, 8);
    return here;
  };
  w.x = next(R * c.D), w.less = next(R * parts_of(k, c.kind)), w.rows = next(kTokens * widest);
  w.scores = next(R * padded(c.S, 8)), w.add = next(R * 8), w.sum = next(R * c.Dv);
  w.largest = next(R * 8), w.wrong = next(R * 8), w.weight = next(parts * R * kTokens), w.taken = next(parts * R * 8);
  w.scale = next((k.groups > parts ? k.groups : parts) * kTokens), w.factor = next(R);
  return total;
}

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

}  // namespace
}  // namespace qpass
