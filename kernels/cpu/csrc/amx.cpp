// AMX: integer products for more than 8 rows in int8 tiles; amx_float.cpp has the products of float rows.
//
// What the blocking rests on, measured on a 2-core Sapphire Rapids Xeon:
// - 32 x 32 outputs in four sum tiles; column tiles unpacked in chunks of 512 inputs (32 x 512 bytes, 16 KB) stay in
//   L1: 5.3-5.6 TOPS against 4.6-4.7 without chunks of K. Chunks of 256 are best up to 64 rows, 512 from 256 rows on.
// - Rows are packed into contiguous tiles, chunk by chunk (2-4 %), for at most 1 MB of rows at a time, which stay in L2.
// - A tile product costs 16 cycles at any depth, so groups of 32 cost two products a block however they are arranged:
//   here with full tiles that are zero in the other group's half, which needs no second tile configuration.
// - Scaling a group costs more than its products at small groups: it runs between the next group's products. One group
//   per row has nothing to scale: its int32 sums go to memory and back between chunks.
// - The next chunk of weights is prefetched while rows pass over this one (0-8 %). Prefetching rows or sums was slower.
//
// Rows <= 8 run on VNNI (`vnni_isa`), to the same bits: exact int32 sums, the same fma per group in the same order.
//
// Whoever calls this has asked the kernel for the use of tile data (runtime.cpp).
#include "amx_block.h"
#include "amx_float.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int64_t kRowPanelBytes = 1 << 20, kMaxRows = 512;

// The sizes of one product: rows per pass, blocks of 64 inputs per chunk, bytes of a row tile and a column panel.
struct Blocking {
  int64_t blocks, chunk, rows, slot;
};

Blocking blocking_of(const Weight& w, int64_t M) {
  Blocking b;
  b.blocks = w.Kp / 64;
  const bool split = w.group_size / 32 % 2;
  b.slot = split ? kSplitTile : kTile;
  b.chunk = split || (M > 16 && M <= 64) ? 4 : 8;
  const int64_t padded = (M + 15) / 16 * 16;
  b.rows = kRowPanelBytes / w.Kp / 32 * 32;
  b.rows = b.rows < 32 ? 32 : b.rows > kMaxRows ? kMaxRows : b.rows;
  if (b.rows > padded) b.rows = padded;
  return b;
}

// Prefetches this row block's share of the chunk of weights that comes next for two blocks of outputs.
QPASS_AMX_INLINE void prefetch_next(const Weight& w, int64_t block, int64_t next_k, int64_t count, int64_t part,
                                    int64_t parts) {
  if (next_k >= w.Kp / 64) next_k = 0, block += 2;
  const int64_t bytes = w.bits * 128, lines = count * bytes / 64, share = (lines + parts - 1) / parts;
  const uint8_t* q = w.q + (block * (w.Kp / 64) + next_k) * bytes;
  for (int64_t i = part * share; i < (part + 1) * share && i < lines; i++) {
    _mm_prefetch((const char*)q + i * 64, _MM_HINT_T0);
    _mm_prefetch((const char*)q + w.Kp / 64 * bytes + i * 64, _MM_HINT_T0);
  }
}

QPASS_AMX_INLINE void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) _mm512_store_ps(p + i, _mm512_setzero_ps());
}

// Work space of one pass over `Blocking::rows` rows, in this thread's scratch memory.
struct Space {
  int8_t* rows;      // [chunks][row tiles][blocks of the chunk] tiles
  int8_t* panel;     // two column panels of a chunk
  int32_t* open;     // [row blocks][4][16][16]
  float* acc;        // [row blocks][32][32]
  int32_t* sums;     // [rows][groups], zero for padding rows
};

Space space_of(const Weight& w, const Blocking& b, bool zero_points) {
  const int64_t row_blocks = (b.rows + 31) / 32;
  Space s;
  s.rows = (int8_t*)scratch(5, row_blocks * 2 * b.blocks * kTile);
  s.open = (int32_t*)scratch(6, row_blocks * 8192 + 2 * b.chunk * b.slot);
  s.acc = (float*)s.open + row_blocks * 1024;
  s.panel = (int8_t*)(s.acc + row_blocks * 1024);
  s.sums = zero_points ? (int32_t*)scratch(7, row_blocks * 32 * w.groups * 4) : nullptr;
  return s;
}

void sum_groups(const Weight& w, const QuantRows& x, int64_t m, int64_t rows, int32_t* sums) {
  const int64_t runs = w.group_size / 32;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t g = 0; g < w.groups; g++) {
      int32_t sum = 0;
      if (m + r < x.M) {
        for (int64_t i = 0; i < runs; i++) sum += x.sums[(m + r) * (x.Kp / 32) + g * runs + i];
      }
      sums[r * w.groups + g] = sum;
    }
  }
}

struct Codes {
  const QuantRows& x;
  const Output& out;
  float gain;

  QPASS_AMX void pack(int64_t m, int64_t k, int64_t count, int8_t* tile) const { pack_codes(x, m, k, count, tile); }
  void plan(const Weight& w, int64_t k, int64_t count, Plan& p) const { plan_codes(w, k, count, p); }
  QPASS_AMX void unpack(const Weight& w, int64_t b, int64_t k, int64_t count, int8_t* panel) const {
    unpack_codes(w, b, k, count, panel);
  }
  QPASS_AMX void write(const Columns& c, int64_t m, __m512 sum) const { finish(c, x, out, m, sum, gain); }
};

template <Sums SUMS, class Rows>
QPASS_AMX void amx_product(const Weight& w, const Rows& rows, const Output& out, const Blocking& b, const Space& space,
                           int64_t m0, int64_t M, int64_t block_begin, int64_t block_end) {
  const int64_t row_tiles = (M + 15) / 16, row_blocks = (M + 31) / 32;
  for (int64_t k = 0; k < b.blocks; k += b.chunk) {
    const int64_t count = b.blocks - k < b.chunk ? b.blocks - k : b.chunk;
    for (int64_t t = 0; t < row_tiles; t++) {
      rows.pack(m0 + t * 16, k, count, space.rows + (k * row_tiles + t * count) * kTile);
    }
  }
  for (int64_t block = block_begin; block < block_end; block += 2) {
    clear(space.acc, row_blocks * 1024);
    for (int64_t k = 0; k < b.blocks; k += b.chunk) {
      const int64_t count = b.blocks - k < b.chunk ? b.blocks - k : b.chunk;
      Plan plan;
      rows.plan(w, k, count, plan);
      int8_t* second = space.panel + b.chunk * b.slot;
      rows.unpack(w, block, k, count, space.panel);
      rows.unpack(w, block + 1, k, count, second);
      for (int64_t i = 0; i < row_blocks; i++) {
        prefetch_next(w, block, k + count, count, i, row_blocks);
        const Panels panels = {space.rows + (k * row_tiles + 2 * i * count) * kTile, count * kTile,
                               {space.panel, second}};
        const int32_t* sums = SUMS == Sums::codes_zero ? space.sums + i * 32 * w.groups : nullptr;
        const auto function = 2 * i + 1 < row_tiles ? amx_block<SUMS, 2> : amx_block<SUMS, 1>;
        function(w, plan, panels, block, sums, space.open + i * 1024, space.acc + i * 1024);
      }
    }
    const Columns c0 = columns_of(w, out, block, rows.gain), c1 = columns_of(w, out, block + 1, rows.gain);
    for (int64_t m = 0; m < M; m++) {
      rows.write(c0, m0 + m, _mm512_load_ps(space.acc + m * 32));
      rows.write(c1, m0 + m, _mm512_load_ps(space.acc + m * 32 + 16));
    }
  }
}

QPASS_AMX void product_q(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin,
                         int64_t block_end) {
  if (x.M <= 8) return vnni_isa.product_q(w, x, out, block_begin, block_end);
  const Blocking b = blocking_of(w, x.M);
  const Space space = space_of(w, b, w.zero_point != nullptr);
  // Without zero points 4-bit sums stay 16 times too large to the end, where a power of two is taken out exactly.
  const Codes rows = {x, out, w.bits == 4 && !w.zero_point && !w.multiplier ? 16.f : 1.f};
  configure_tiles();
  for (int64_t m = 0; m < x.M; m += b.rows) {
    const int64_t M = x.M - m < b.rows ? x.M - m : b.rows;
    if (w.zero_point) {
      sum_groups(w, x, m, (M + 31) / 32 * 32, space.sums);
      amx_product<Sums::codes_zero>(w, rows, out, b, space, m, M, block_begin, block_end);
    } else {
      amx_product<Sums::codes>(w, rows, out, b, space, m, M, block_begin, block_end);
    }
  }
  _tile_release();
}

void quantize(const void* x, DType dtype, int64_t M, int64_t K, int64_t Kp, bool asymmetric, int8_t* q, float* scale,
              float* zero_point, int32_t* sums) {
  vnni_isa.quantize(x, dtype, M, K, Kp, asymmetric, q, scale, zero_point, sums);
}

}  // namespace

const Isa amx_isa = {"amx", quantize, product_q, product_f_amx, true};

}  // namespace qpass
