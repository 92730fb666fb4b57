// AMX: rows of codes times a weight's columns, for more than 4 rows.
//
// What the blocking rests on (what was tried besides, and the times, are in tests/bench/NOTES.md):
// - Up to 32 rows wait for memory more than for products (amx_code_few.h).
// - For more, column tiles unpacked in chunks of 256 inputs of 32 outputs, 8 KB, stay in L1 while all rows meet them.
// - A tile product costs 16 cycles at any depth, so groups of 32 cost two products a block however they are arranged:
//   here with full tiles that are zero in the other group's half, which needs no second tile configuration.
#include "amx_codes.h"

#include "amx_code_few.h"
#include "amx_code_many.h"
#include "scratch.h"

namespace qpass {
namespace {

// Rows as RowTiles says.
QPASS_AMX const int8_t* tiles_of(const QuantRows& x, const RowTiles& tiles) {
  if (x.tiles) return x.tiles;
  int8_t* made = (int8_t*)scratch(5, tiles.bytes(x.M));
  tile_codes(x.q, x.Kp, x.M, 0, x.M, made);
  return made;
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
    const auto function = x.M <= 16 ? few_rows<1> : few_rows<2>;
    function(w, x, out, tiles, rows, sums, gain, block_begin, block_end);
  }
  for (int64_t m = 0; m < x.M && x.M > 32; m += tiles.rows) {
    const int64_t M = x.M - m < tiles.rows ? x.M - m : tiles.rows;
    const int32_t* sums = w.zero_point ? sum_groups(w, x, m, (M + 31) / 32 * 32) : nullptr;
    many_rows(w, x, out, tiles, rows + tiles.row(m), sums, m, M, gain, block_begin, block_end);
  }
  _tile_release();
}

}  // namespace qpass
