// Attention over a quantized cache: one call, and the work space of a head of keys in it.
#pragma once
#include <cmath>
#include <cstdint>

#include "attention_kinds.h"

namespace qpass {

constexpr int64_t kTokens = 32;  // values at a time

struct CacheCall {
  int64_t B, Hq, Hkv, M, S, D, Dv;
  int32_t kind, mask_dtype, causal;
  float scaling, softcap;
  const void* mask;
  int64_t mask_batch, mask_head, mask_row;
  qp_cached k, v;
  const void* q;
  DType dtype;
  void* out;

  // The codes of token 0.
  const uint8_t* codes_of(const qp_cached& t, int64_t b, int64_t h) const {
    return (const uint8_t*)t.codes + b * t.batch + h * t.head;
  }
  int64_t rows() const { return Hq / Hkv * M; }      // of queries that share a head of keys
  int64_t scores() const { return padded(S, 16); }  // from one row's to the next one's
};

// Into how many parts of one scale the products of a row are split: int4 has element j and j + size / 2 in one byte.
inline int64_t parts_of(const qp_cached& c, int kind) { return kind == kInt4 && c.groups == 1 ? 2 : c.groups; }

// Whether products read the codes themselves: rows of one scale, and of int4 whose scales no byte's two codes share.
inline bool has_parts(const qp_cached& c, int kind) { return c.groups == 1 || (kind == kInt4 && c.groups % 2 == 0); }

// Work space of one head, in floats: queries, what their int4 sums start at, rows decoded to memory, scores and what is
// added to some of them, sums of values, weights times scales and their sums, scales, what makes weights add up to 1.
struct Work {
  float *x, *less, *rows, *scores, *add, *sum, *weight, *taken, *scale, *factor;
};

inline int64_t work_of(const CacheCall& c, float* from, Work& w) {
  const int64_t R = c.rows(), widest = c.D > c.Dv ? c.D : c.Dv, parts = parts_of(c.v, c.kind);
  int64_t total = 0;
  const auto next = [&](int64_t size) {
    float* here = from ? from + total : nullptr;
    total += padded(size, 16);
    return here;
  };
  w.x = next(R * c.D), w.less = next(R * parts_of(c.k, c.kind)), w.rows = next(kTokens * widest);
  w.scores = next(R * c.scores()), w.add = next(R * 16), w.sum = next(R * c.Dv);
  w.weight = next(parts * R * kTokens), w.taken = next(parts * R * 16);
  w.scale = next((c.k.groups > parts ? c.k.groups : parts) * kTokens), w.factor = next(R);
  return total;
}

// One head of keys of one sequence, in work space of `work_of`.
using CacheHead = void (*)(const CacheCall& c, int64_t b, int64_t h, float* space);
extern const CacheHead cache_head_avx2, cache_head_avx512;

}  // namespace qpass
