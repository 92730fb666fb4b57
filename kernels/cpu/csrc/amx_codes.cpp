// AMX: rows of codes times a weight's columns, for more than 4 rows.
//
// What the blocking rests on (what was tried besides, and the times, are in tests/bench/NOTES.md):
// - 32 x 32 outputs in four sum tiles; column tiles unpacked in chunks of 512 inputs (32 x 512 bytes, 16 KB) stay in L1.
//   Chunks of 256 up to 64 rows.
// - A tile product costs 16 cycles at any depth, so groups of 32 cost two products a block however they are arranged:
//   here with full tiles that are zero in the other group's half, which needs no second tile configuration.
// - One group per row has nothing to scale: its int32 sums go to memory and back between chunks.
// - Up to 32 rows wait for memory more than for products, and go another way (amx_code_few.h).
#include "amx_codes.h"

#include "amx_code_block.h"
#include "amx_code_few.h"
#include "scratch.h"

namespace qpass {
namespace {

// The sizes of one product: blocks of 64 inputs, and of a chunk of them, and bytes of an unpacked block.
struct Blocking {
  int64_t blocks, chunk, slot;
};

Blocking blocking_of(const Weight& w, int64_t M) {
  const bool split = w.group_size / 32 % 2;
  return {w.Kp / 64, split || M <= 64 ? 4 : 8, split ? kSplitTile : kTile};
}

// Rows as RowTiles says.
QPASS_AMX const int8_t* tiles_of(const QuantRows& x, const RowTiles& tiles) {
  if (x.tiles) return x.tiles;
  int8_t* made = (int8_t*)scratch(5, tiles.bytes(x.M));
  tile_codes(x.q, x.Kp, x.M, 0, x.M, made);
  return made;
}

// Work space of one pass, in this thread's scratch memory.
struct Space {
  const Plan* plans;   // of each chunk
  int8_t* panel;       // column tiles of a chunk
  int32_t* open;       // [row blocks][4][16][16]
  int32_t* spare;      // [2][4][16][16]
  float* acc;          // [row blocks][32][32]
};

Space space_of(const Weight& w, const Blocking& b, const RowTiles& tiles) {
  Space s;
  const int64_t row_blocks = (tiles.count + 1) / 2, chunks = (b.blocks + b.chunk - 1) / b.chunk;
  Plan* plans = (Plan*)scratch(4, chunks * (int64_t)sizeof(Plan));
  for (int64_t i = 0, k = 0; i < chunks; i++, k += b.chunk)
    plan_codes(w, tiles, k, b.blocks - k < b.chunk ? b.blocks - k : b.chunk, plans[i]);
  s.plans = plans;
  s.open = (int32_t*)scratch(6, (2 * row_blocks + 2) * 4096 + 2 * b.chunk * b.slot);
  s.spare = s.open + row_blocks * 1024;
  s.acc = (float*)s.spare + 2048;
  s.panel = (int8_t*)(s.acc + row_blocks * 1024);
  return s;
}

// Sums of the codes of rows [m, m + rows) over each group, [rows][groups], zero for padding rows.
const int32_t* sum_groups(const Weight& w, const QuantRows& x, int64_t m, int64_t rows) {
  const int64_t runs = w.group_size / 32;
  int32_t* sums = (int32_t*)scratch(7, rows * w.groups * 4);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t g = 0; g < w.groups; g++) {
      int32_t sum = 0;
      if (m + r < x.M) {
        for (int64_t i = 0; i < runs; i++) sum += x.sums[(m + r) * (x.Kp / 32) + g * runs + i];
      }
      sums[r * w.groups + g] = sum;
    }
  }
  return sums;
}

// Rows [m0, m0 + M), which lie at `tiled`, times all blocks.
template <bool ZERO>
QPASS_AMX void pass(const Weight& w, const QuantRows& x, const Output& out, const Blocking& b, const RowTiles& to,
                    const Space& space, const int8_t* tiled, const int32_t* sums, int64_t m0, int64_t M, float gain,
                    int64_t block_begin, int64_t block_end) {
  const int64_t row_tiles = (M + 15) / 16, row_blocks = (M + 31) / 32, block_bytes = w.bits * 128;
  const int8_t* rows = tiled + to.row(m0);
  int8_t* panel[2] = {space.panel, space.panel + b.chunk * b.slot};
  Waiting waiting = {};
  Ending endings[2] = {};  // rows may wait while the next two blocks begin
  int turn = 0;
  for (int64_t block = block_begin; block < block_end; block += 2) {
    Ending& ending = endings[block / 2 % 2];
    ending = {&x, &out, 1.f / gain, {columns_of(w, out, block, gain), columns_of(w, out, block + 1, gain)}};
    for (int64_t k = 0; k < b.blocks; k += b.chunk) {
      const int64_t count = b.blocks - k < b.chunk ? b.blocks - k : b.chunk;
      const Plan& plan = space.plans[k / b.chunk];
      for (int c = 0; c < 2; c++) unpack_codes(w, block + c, k, count, panel[c]);
      const int64_t next_k = k + count < b.blocks ? k + count : 0, next_block = next_k ? block : block + 2;
      const int64_t left = b.blocks - next_k < b.chunk ? b.blocks - next_k : b.chunk;
      const int64_t lines = next_block < block_end ? left * block_bytes / 64 : 0, products = row_tiles * 2 * plan.step_count;
      Ahead ahead = {(const char*)w.q + (next_block * b.blocks + next_k) * block_bytes, b.blocks * block_bytes, lines,
                     (int)((lines + products - 1) / products)};
      for (int64_t i = 0; i < row_blocks; i++) {
        const Tiles tiles = {rows + to.row(i * 32) + to.block(k), kTilesTogether * kTile, {panel[0], panel[1]}};
        Waiting here = {};
        here.ending = &ending;
        here.acc = space.acc + i * 1024;
        here.row_sums = ZERO ? sums + i * 32 * w.groups : nullptr;
        here.m = m0 + i * 32;
        here.end = (int)(M - i * 32 < 32 ? M - i * 32 : 32);
        const auto function = 2 * i + 1 < row_tiles ? multiply_codes<ZERO, 2> : multiply_codes<ZERO, 1>;
        function(w, plan, tiles, block, here, {space.open + i * 1024, space.spare, &turn}, waiting, ahead);
      }
    }
  }
  take_rows<ZERO>(waiting, w, waiting.end);
}

}  // namespace

QPASS_AMX void tile_rows_amx(const int8_t* q, int64_t M, int64_t Kp, int64_t begin, int64_t end, int8_t* tiles) {
  tile_codes(q, Kp, M, begin, end, tiles);
}

int64_t tile_bytes_amx(int64_t M, int64_t Kp) { return M > 4 ? RowTiles(M, Kp).bytes(M) : 0; }

QPASS_AMX void product_q_amx(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin,
                             int64_t block_end) {
  const RowTiles tiles(x.M, x.Kp);
  const int8_t* rows = tiles_of(x, tiles);
  // Without zero points 4-bit sums stay 16 times too large to the end, where a power of two is taken out exactly.
  const float gain = w.bits == 4 && !w.zero_point && !w.multiplier ? 16.f : 1.f;
  configure_tiles(x.M <= 8 ? 8 : 16);
  if (x.M <= 32) {
    const int32_t* sums = w.zero_point ? sum_groups(w, x, 0, (x.M + 15) / 16 * 16) : nullptr;
    few_function(w, x.M)(w, x, out, tiles, rows, sums, gain, block_begin, block_end);
    return _tile_release();
  }
  const Blocking b = blocking_of(w, x.M);
  const Space space = space_of(w, b, tiles);
  for (int64_t m = 0; m < x.M; m += tiles.rows) {
    const int64_t M = x.M - m < tiles.rows ? x.M - m : tiles.rows;
    const int32_t* sums = w.zero_point ? sum_groups(w, x, m, (M + 31) / 32 * 32) : nullptr;
    const auto function = w.zero_point ? pass<true> : pass<false>;
    function(w, x, out, b, tiles, space, rows, sums, m, M, gain, block_begin, block_end);
  }
  _tile_release();
}

}  // namespace qpass
