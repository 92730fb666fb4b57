// Rows of codes in AMX tiles: how they lie, so that a pass over the weights finds them in the second cache.
//
// Rows go in panels of at most 1 MB, which a pass reads once for every 32 outputs. Within one, tiles that are read together
// lie together: [panel][K / 256][row tile of the panel][4][16 rows][64]. By rows they would be a power of two of bytes
// apart for most K, and a chunk of all of them would share a few sets of the cache.
#pragma once
#include <cstdint>

#include "product.h"

namespace qpass {
namespace {

constexpr int64_t kTile = 1024;  // 16 rows of 64 bytes
constexpr int64_t kPanelBytes = 1 << 20, kPanelRows = 512, kTilesTogether = 4;

struct RowTiles {
  int64_t rows;    // of a panel, a multiple of 32 but if all rows are fewer
  int64_t count;   // row tiles of a panel
  int64_t stride;  // bytes from four blocks of 64 inputs to the next four
  int64_t panel;   // bytes of a panel

  RowTiles(int64_t M, int64_t Kp) {
    rows = kPanelBytes / Kp / 32 * 32;
    rows = rows < 32 ? 32 : rows > kPanelRows ? kPanelRows : rows;
    if (rows > (M + 15) / 16 * 16) rows = (M + 15) / 16 * 16;
    count = rows / 16;
    stride = count * kTilesTogether * kTile;
    panel = (Kp + 255) / 256 * stride;
  }
  int64_t bytes(int64_t M) const { return (M + rows - 1) / rows * panel; }
  // Where a row's bytes of block 0 are; those of block k follow `block(k)` later.
  int64_t row(int64_t m) const { return m / rows * panel + m % rows / 16 * (kTilesTogether * kTile) + m % 16 * 64; }
  int64_t block(int64_t k) const { return k / kTilesTogether * stride + k % kTilesTogether * kTile; }
};

}  // namespace
}  // namespace qpass
