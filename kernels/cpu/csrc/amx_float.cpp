// AMX: products of float rows with integer weights, in bf16 tiles, whatever the number of rows.
//
// A weight minus its zero point is an integer that bf16 holds exactly; a row is the exact sum of one to three rows of
// bf16. So products are exact, and sums of a group round as float32 does, in an order that is the same for any rows.
//
// 32 x 32 outputs in four sum tiles. Up to 32 rows, column tiles of 128 inputs (8 KB) stay in L1; with more rows it is
// 2048 inputs whose column tiles (128 KB) and row tiles (1 MB) stay in L2, and what is added up so far goes to memory and
// back between stretches of 2048. Up to 16 rows tiles are as high as there are rows.
//
// Whoever calls this has asked the kernel for the use of tile data (runtime.cpp).
#include "amx_float.h"

#include "amx_float_block.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int64_t kRowPanelBytes = 1 << 20, kMaxRows = 512, kFewRows = 32;
constexpr int64_t kFewBlocks = 2, kManyBlocks = 32;  // of 64 inputs, to a chunk

// The sizes of one product: rows to a pass, rows of a tile, blocks of 64 inputs to a chunk and to a stretch.
struct Blocking {
  int64_t rows, row_blocks, blocks, chunk, stretch, panel_bytes;
  int height;
};

Blocking blocking_of(const Weight& w, const FloatRows& x) {
  Blocking b;
  const bool few = x.M <= kFewRows;
  b.height = x.M < 16 ? (int)x.M : 16;
  b.blocks = w.Kp / 64;
  b.chunk = few ? kFewBlocks : kManyBlocks;
  if (b.chunk > b.blocks) b.chunk = b.blocks;
  b.stretch = few ? b.blocks : b.chunk;
  const int64_t padded = (x.M + b.height - 1) / b.height * b.height;
  b.rows = kRowPanelBytes / (b.stretch * 128 * x.bf16_parts) / 32 * 32;
  b.rows = b.rows < 32 ? 32 : b.rows > kMaxRows ? kMaxRows : b.rows;
  if (b.rows > padded) b.rows = padded;
  b.row_blocks = (b.rows + 31) / 32;
  b.panel_bytes = b.chunk * 2 * kTile;
  return b;
}

struct Space {
  int8_t* rows;       // [chunks][row tiles][runs of the chunk][parts] tiles, of one stretch
  int8_t* panels[2];  // of this chunk and of the next: two column panels each
  float* sums;        // [pairs of blocks of outputs, if there are several stretches][row blocks]: two 32 x 32, the open
};                    // group's sums and what is added up

QPASS_AMX_INLINE void write_rows(const Weight& w, const Output& out, int64_t block, const float* sums, int64_t m0,
                                 int64_t M) {
  const Columns c0 = columns_of(w, out, block, 1.f), c1 = columns_of(w, out, block + 1, 1.f);
  for (int64_t m = 0; m < M; m++) {
    const float* acc = sums + m / 32 * 2048 + 1024 + m % 32 * 32;
    const int64_t row = (m0 + m) * out.ld;
    store_floats(out.data, out.dtype, row + c0.first, c0.mask, _mm512_add_ps(_mm512_load_ps(acc), c0.bias));
    store_floats(out.data, out.dtype, row + c1.first, c1.mask, _mm512_add_ps(_mm512_load_ps(acc + 16), c1.bias));
  }
}

// Rows [m0, m0 + M).
template <Codes CODES>
QPASS_AMX void multiply(const Weight& w, const FloatRows& x, const Output& out, const Blocking& b, const Space& s,
                        int64_t m0, int64_t M, int64_t block_begin, int64_t block_end) {
  const int64_t row_tiles = (M + 15) / 16, row_blocks = (M + 31) / 32, last = w.groups * (w.group_size / 32);
  const int64_t tile = b.height * 64, block_bytes = 2 * x.bf16_parts * tile;
  const auto counted = [&](int64_t k, int64_t end) { return end - k < b.chunk ? end - k : b.chunk; };
  const auto until = [&](int64_t k) { return k + b.stretch < b.blocks ? k + b.stretch : b.blocks; };
  Unpacker<CODES> next = {w, block_begin, 0, counted(0, until(0)), 0, s.panels[0], s.panels[0] + b.panel_bytes};
  unpack_to(next, 2 * next.count);
  int turn = 0;
  for (int64_t k0 = 0; k0 < b.blocks; k0 += b.stretch) {
    const int64_t k1 = until(k0);
    for (int64_t k = k0; k < k1; k += b.chunk) {
      const int64_t count = counted(k, k1);
      for (int64_t t = 0; t < row_tiles; t++) {
        pack_floats(x, m0 + t * 16, k, count, b.height, s.rows + ((k - k0) * row_tiles + t * count) * block_bytes);
      }
    }
    for (int64_t block = block_begin; block < block_end; block += 2) {
      float* sums = s.sums + (b.stretch < b.blocks ? (block - block_begin) / 2 * b.row_blocks * 2048 : 0);
      for (int64_t i = 0; i < row_blocks * 2048 && k0 == 0; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());
      for (int64_t k = k0; k < k1; k += b.chunk, turn ^= 1) {
        const int64_t count = counted(k, k1), end = 2 * (k + count) < last ? 2 * (k + count) : last;
        next.k = k + count;
        if (next.k == k1) {
          next.block += 2;
          next.k = next.block < block_end ? k0 : k1;
          if (next.block >= block_end) next.block = block_begin;
        }
        next.count = next.k < b.blocks ? counted(next.k, until(next.k < k1 ? k0 : k1)) : 0;
        next.panel = s.panels[turn ^ 1];
        next.second = next.panel + b.panel_bytes;
        next.done = 0;
        const int8_t *panel = s.panels[turn], *second = panel + b.panel_bytes;
        for (int64_t i = 0; i < row_blocks; i++) {
          const FloatPanels p = {s.rows + ((k - k0) * row_tiles + 2 * i * count) * block_bytes, tile, count * block_bytes,
                                 {panel, second}, b.height, x.bf16_parts};
          const auto function = M - i * 32 > 16 ? float_block<CODES, 2> : float_block<CODES, 1>;
          function(w, p, block, 2 * k, end, sums + i * 2048, sums + i * 2048 + 1024, next,
                   2 * next.count * (i + 1) / row_blocks, row_blocks == 1);
        }
      }
      if (k1 == b.blocks) write_rows(w, out, block, sums, m0, M);
    }
  }
}

}  // namespace

QPASS_AMX void product_f_amx(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin,
                             int64_t block_end) {
  if (x.M == 0) return;
  const Blocking b = blocking_of(w, x);
  const int64_t pairs = b.stretch < b.blocks ? (block_end - block_begin) / 2 : 1;
  Space s;
  s.rows = (int8_t*)scratch(5, (b.rows + b.height - 1) / b.height * b.height * b.stretch * 128 * x.bf16_parts);
  s.panels[0] = (int8_t*)scratch(6, 4 * b.panel_bytes);
  s.panels[1] = s.panels[0] + 2 * b.panel_bytes;
  s.sums = (float*)scratch(7, pairs * b.row_blocks * 8192);
  const Codes codes = codes_of(w);
  const auto function = codes == Codes::bytes         ? multiply<Codes::bytes>
                        : codes == Codes::differences ? multiply<Codes::differences>
                                                      : multiply<Codes::nibbles>;
  configure_tiles(b.height);
  for (int64_t m = 0; m < x.M; m += b.rows) {
    function(w, x, out, b, s, m, x.M - m < b.rows ? x.M - m : b.rows, block_begin, block_end);
  }
  _tile_release();
}

}  // namespace qpass
