// Attention over keys and values in float, as they lie in a cache: strided, one head for several of the queries'.
#include <new>

#include "attention.h"
#include "scratch.h"

namespace qpass {

extern const FloatSteps float_attention_avx2 __attribute__((weak)), float_attention_avx512 __attribute__((weak));

namespace {

constexpr int64_t kMinWork = 1 << 15;  // multiply-adds that are worth a thread

// Blocks of rows of all heads of all sequences, and how many chunks their keys have.
struct Plan {
  int64_t blocks, units, chunks;

  Block unit(const FloatAttention& c, int64_t u, float* work) const {
    const int64_t first = u % blocks * kRowBlock, rows = c.shared * c.M;
    return {u / blocks / c.Hkv, u / blocks % c.Hkv, first, rows - first < kRowBlock ? rows - first : kRowBlock, work};
  }
};

// Runs `task(0)` to `task(count - 1)` on a team; false if one ran out of memory.
template <typename Task>
bool each(int64_t count, int32_t team, const Task& task) {
  bool failed = false;
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
  for (int64_t i = 0; i < count; i++) {
    try {
      task(i);
    } catch (const std::bad_alloc&) {  // must not leave a parallel region
#pragma omp atomic write
      failed = true;
    }
  }
  return !failed;
}

bool whole_units(const FloatSteps& steps, const FloatAttention& c, const Plan& plan, int32_t team) {
  return each(plan.units, team, [&](int64_t u) {
    float* memory = (float*)scratch(0, 4 * (work_floats(c) + 2 * piece_floats(c.Dv)));
    const Piece sum = piece_at(memory + work_floats(c)), one = piece_at(memory + work_floats(c) + piece_floats(c.Dv));
    const Block block = plan.unit(c, u, memory);
    steps.begin(c, block);
    steps.chunk(c, block, 0, sum);
    for (int64_t n = 1; n < plan.chunks; n++) {
      steps.chunk(c, block, n * kChunk, one);
      steps.join(c, block, sum, one);
    }
    steps.finish(c, block, sum);
  });
}

// For few heads and many keys: every chunk is a task of its own, and they are joined afterwards, in the same order.
bool split_units(const FloatSteps& steps, const FloatAttention& c, const Plan& plan, int32_t team) {
  float* pieces = (float*)scratch(1, 4 * plan.units * plan.chunks * piece_floats(c.Dv));
  const bool done = each(plan.units * plan.chunks, team, [&](int64_t i) {
    const Block block = plan.unit(c, i / plan.chunks, (float*)scratch(0, 4 * work_floats(c)));
    steps.begin(c, block);
    steps.chunk(c, block, i % plan.chunks * kChunk, piece_at(pieces + i * piece_floats(c.Dv)));
  });
  return done && each(plan.units, team, [&](int64_t u) {
    const Block block = plan.unit(c, u, nullptr);
    float* first = pieces + u * plan.chunks * piece_floats(c.Dv);
    for (int64_t n = 1; n < plan.chunks; n++)
      steps.join(c, block, piece_at(first), piece_at(first + n * piece_floats(c.Dv)));
    steps.finish(c, block, piece_at(first));
  });
}

// Whether [batches, heads, tokens, width] numbers lie in the buffer.
bool fits(const qp_rows& t, int64_t batches, int64_t heads, int64_t tokens, int64_t width) {
  return t.data && t.batch >= 0 && t.head >= 0 && t.token >= 0 &&
         (batches - 1) * t.batch + (heads - 1) * t.head + (tokens - 1) * t.token + width <= t.count;
}

}  // namespace
}  // namespace qpass

extern "C" int32_t qp_float_attention(int32_t isa, const int64_t* sizes, int32_t dtype, const qp_rows* q,
                                      const qp_rows* k, const qp_rows* v, const qp_rows* mask, int32_t mask_dtype, int32_t causal,
                                      float scale, void* out, int64_t out_count, int32_t threads) {
  using namespace qpass;
  const FloatSteps* steps = isa >= 2 ? &float_attention_avx512 : isa == 1 ? &float_attention_avx2 : nullptr;
  if (!steps || !machine_runs(isa)) return fail("attention: instruction set %d is not here", (int)isa);
  for (int i = 0; i < 7; i++)
    if (sizes[i] < 1 || sizes[i] > (int64_t)1 << 31) return fail("attention: size %d is %lld", i, (long long)sizes[i]);
  FloatAttention c = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[1] / sizes[2],
                      (DType)dtype, *q, *k, *v, {}, mask_dtype, causal != 0, scale, out};
  if (c.Hq % c.Hkv)
    return fail("attention: %lld heads of queries do not share %lld of keys", (long long)c.Hq, (long long)c.Hkv);
  if (c.D % 8 || c.Dv % 8)
    return fail("attention: heads of %lld and %lld are no multiples of 8", (long long)c.D, (long long)c.Dv);
  if (dtype < 0 || dtype > 2 || mask_dtype < 0 || mask_dtype > 4 || !out) return fail("attention: unknown dtype");
  if (!fits(*q, c.B, c.Hq, c.M, c.D) || !fits(*k, c.B, c.Hkv, c.S, c.D) || !fits(*v, c.B, c.Hkv, c.S, c.Dv))
    return fail("attention: queries, keys or values are smaller than their sizes say");
  if (c.B * c.M * c.Hq * c.Dv > out_count) return fail("attention: the output is smaller than [B, M, Hq, Dv]");
  if (mask_dtype) {
    if (!mask || !fits(*mask, c.B, c.Hq, c.M, c.S)) return fail("attention: the mask is smaller than [B, Hq, M, S]");
    c.mask = *mask;
  }
  const int64_t blocks = (c.shared * c.M + kRowBlock - 1) / kRowBlock, units = c.B * c.Hkv * blocks;
  const int64_t keys = c.causal && c.M < c.S ? c.M : c.S;
  const Plan plan = {blocks, units, (keys + kChunk - 1) / kChunk};
  const int64_t worth = c.B * c.Hq * c.M * keys * (c.D + c.Dv) / kMinWork + 1;
  const int32_t team = team_size(threads, worth < units * plan.chunks ? worth : units * plan.chunks);
  try {
    const bool split = team > 1 && plan.chunks > 1 && units < 4 * (int64_t)team;
    if (split ? split_units(*steps, c, plan, team) : whole_units(*steps, c, plan, team)) return 0;
  } catch (const std::bad_alloc&) {
  }
  return fail("attention: out of memory for %lld queries and %lld keys", (long long)c.M, (long long)c.S);
}
