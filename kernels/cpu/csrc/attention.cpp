// Attention over a quantized cache: queries in, keys and values read as codes, one row at a time, outputs in float.
// For decoding: every code is read from memory once, and there is no copy of the cache in float.
#include <new>

#include "attention_call.h"
#include "scratch.h"

namespace qpass {

extern const CacheHead cache_head_avx2 __attribute__((weak)), cache_head_avx512 __attribute__((weak));

namespace {

bool fits(const CacheCall& c, const qp_cached& t, int64_t size) {
  const int64_t row = c.kind == kInt4 ? size / 2 : size;
  if (t.batch < 0 || t.head < 0 || t.token < 0) return false;
  if (t.scale_batch < 0 || t.scale_head < 0 || t.scale_token < 0) return false;
  if (t.groups < 1 || t.scale_group < 0 || size % t.groups || (size / t.groups) % 8) return false;
  if (c.kind == kInt4 && size % 16) return false;
  if (t.scale_dtype < 0 || t.scale_dtype > 2 || !t.codes || !t.scale) return false;
  return (c.B - 1) * t.batch + (c.Hkv - 1) * t.head + (c.S - 1) * t.token + row <= t.bytes &&
         (c.B - 1) * t.scale_batch + (c.Hkv - 1) * t.scale_head + (c.S - 1) * t.scale_token +
                 (t.groups - 1) * t.scale_group < t.scales;
}

}  // namespace
}  // namespace qpass

extern "C" int32_t qp_attention(int32_t isa, const void* q, int32_t dtype, const int64_t* sizes, int32_t kind,
                                const qp_cached* k, const qp_cached* v, const void* mask, int32_t mask_dtype,
                                const int64_t* mask_strides, int64_t mask_count, int32_t causal, float scaling,
                                float softcap, void* out, int32_t threads) {
  using namespace qpass;
  const CacheHead* head = isa >= 2 ? &cache_head_avx512 : isa == 1 ? &cache_head_avx2 : nullptr;
  if (!head || !machine_runs(isa)) return fail("attention: instruction set %d is not here", (int)isa);
  const CacheCall c = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], kind, mask_dtype, causal,
                       scaling, softcap, mask, mask_strides[0], mask_strides[1], mask_strides[2], *k, *v, q,
                       (DType)dtype, out};
  for (int i = 0; i < 7; i++)
    if (sizes[i] < 1 || sizes[i] > (int64_t)1 << 31) return fail("attention: size %d is %lld", i, (long long)sizes[i]);
  if (c.Hq % c.Hkv)
    return fail("attention: %lld heads of queries do not share %lld of keys", (long long)c.Hq, (long long)c.Hkv);
  if (dtype < 0 || dtype > 2 || kind < 0 || kind > 2 || !q || !out) return fail("attention: unknown dtype or kind");
  if (!fits(c, *k, c.D) || !fits(c, *v, c.Dv))
    return fail("attention: keys or values are smaller than their sizes say");
  if (mask_dtype && (!mask || c.mask_batch < 0 || c.mask_head < 0 || c.mask_row < 0 ||
                     (c.B - 1) * c.mask_batch + (c.Hq - 1) * c.mask_head + (c.M - 1) * c.mask_row + c.S > mask_count))
    return fail("attention: the mask is smaller than [B, H, M, S]");
  Work none;
  const int64_t need = 4 * work_of(c, nullptr, none);
  bool failed = false;
#pragma omp parallel for num_threads(team_size(threads, c.B * c.Hkv)) schedule(dynamic)
  for (int64_t task = 0; task < c.B * c.Hkv; task++) {
    try {
      (*head)(c, task / c.Hkv, task % c.Hkv, (float*)scratch(0, need));
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  }
  return failed ? fail("attention: out of memory for %lld bytes of scores", (long long)need) : 0;
}
