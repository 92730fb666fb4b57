// One row block (up to 32 rows) times 32 outputs over one K chunk in bf16 tiles, with the scaling of groups, and the
// unpacking of the next chunk, interleaved: neither the tiles nor the vector units wait for the other.
#pragma once
#include "amx_floats.h"

namespace qpass {
namespace {

alignas(64) const uint8_t kZeros[64] = {};

// Unpacks one chunk, blocks [k, k + count) of 64 inputs of two blocks of outputs, in pieces of 64 inputs x 16 outputs.
template <Codes CODES>
struct Unpacker {
  static constexpr int64_t kBytes = CODES == Codes::bytes ? 1024 : 512, kAhead = 3072 / kBytes;
  const Weight& w;
  int64_t block, k, count, done;
  int8_t *panel, *second;  // column tiles [2 * count] of each block of outputs
};

template <Codes CODES>
QPASS_AMX_INLINE void unpack_to(Unpacker<CODES>& u, int64_t pieces) {
  const int64_t blocks = u.w.Kp / 64;
  for (; u.done < pieces; u.done++) {
    const int64_t i = u.done / 2, side = u.done % 2, later = u.k + i + u.kAhead;
    // What is kAhead blocks further on: at a row's end those of the next two blocks of outputs.
    const int64_t next = (u.block + side) * blocks + later + (later < blocks ? 0 : blocks);
    unpack_block<CODES>(u.w, u.block + side, u.k + i, u.w.q + next * u.kBytes, (side ? u.second : u.panel) + i * 2 * kTile);
  }
}

// Row tiles of one chunk, in the order of runs of 32 inputs and of the parts of each: `tile` bytes each, those of the
// second 16 rows `second` bytes behind those of the first. Column tiles [runs] for each of two blocks of outputs.
struct FloatPanels {
  const int8_t* rows;
  int64_t tile, second;
  const int8_t* columns[2];
  int height, parts;  // rows of a tile
};

// acc [rows][32] += sums [2][16][16] * scale, for rows of one tile.
QPASS_AMX_INLINE void scale_rows(const float* sums, __m512 scale0, __m512 scale1, int rows, float* acc) {
#pragma GCC unroll 2
  for (int r = 0; r < rows; r++, sums += 16, acc += 32) {
    _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_load_ps(sums), scale0, _mm512_load_ps(acc)));
    _mm512_store_ps(acc + 16, _mm512_fmadd_ps(_mm512_load_ps(sums + 256), scale1, _mm512_load_ps(acc + 16)));
  }
}

// A group's sums [2 row tiles][2 column tiles][16][16] that wait to be scaled, a quarter after each run of the next group.
template <int TILES>
struct Waiting {
  const float* sums;
  __m512 scale0, scale1;
  int quarter;  // 4: none left
};

template <int TILES>
QPASS_AMX_INLINE void scale_quarter(Waiting<TILES>& s, int height, float* acc) {
  if (s.quarter == 4) return;
  if (TILES == 1) {
    scale_rows(s.sums, s.scale0, s.scale1, height, acc);
    s.quarter = 4;
    return;
  }
  const int64_t at = s.quarter * 8;
  scale_rows(s.sums + (at / 16) * 512 + at % 16 * 16, s.scale0, s.scale1, 8, acc + at * 32);
  s.quarter++;
}

// Runs [begin, end). `open` [4][16][16] keeps the sums of a group that continues in the next chunk. Meanwhile `unpacker`
// gets as far as `pieces`: with `each`, by one after each run.
template <Codes CODES, int TILES>
QPASS_AMX void float_block(const Weight& w, const FloatPanels& panels, int64_t block, int64_t begin, int64_t end,
                           float* open, float* acc, Unpacker<CODES>& unpacker, int64_t pieces, bool each) {
  alignas(64) float buffers[2][1024];
  Waiting<TILES> waiting = {nullptr, _mm512_setzero_ps(), _mm512_setzero_ps(), 4};
  const int64_t runs = w.group_size / 32, tile = panels.tile, second = panels.second;
  const int parts = panels.parts, height = panels.height;
  const int8_t *rows = panels.rows, *column0 = panels.columns[0], *column1 = panels.columns[1];
  int64_t group = begin / runs, closing = (group + 1) * runs, run = begin;
  bool opens = begin == group * runs;
  int turn = 0;
  QPASS_STORES_DONE();
  if (!each) unpack_to(unpacker, pieces);
  while (run < end) {
    // Zeros are loaded: a product that follows _tile_zero waits for it (50 cycles instead of 16).
    const float* from = opens ? (const float*)kZeros : open;
    const int64_t stride = opens ? 0 : 64, step = opens ? 0 : 256;
    _tile_loadd(0, from, stride);
    _tile_loadd(1, from + step, stride);
    if (TILES == 2) {
      _tile_loadd(2, from + 2 * step, stride);
      _tile_loadd(3, from + 3 * step, stride);
    }
    const int64_t last = closing < end ? closing : end;
    for (; run < last; run++) {
      _tile_loadd(6, column0, 64);
      _tile_loadd(7, column1, 64);
      column0 += kTile;
      column1 += kTile;
      int part = parts;
      do {
        _tile_loadd(4, rows, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TILES == 2) {
          _tile_loadd(5, rows + second, 64);
          _tile_dpbf16ps(2, 5, 6);
        }
        _tile_dpbf16ps(1, 4, 7);
        if (TILES == 2) _tile_dpbf16ps(3, 5, 7);
        rows += tile;
      } while (--part);
      scale_quarter(waiting, height, acc);
      if (each && unpacker.done < pieces) unpack_to(unpacker, unpacker.done + 1);
    }
    while (waiting.quarter < 4) scale_quarter(waiting, height, acc);
    const bool closes = last == closing;
    float* sums = closes ? buffers[turn ^= 1] : open;
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (TILES == 2) {
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
    }
    if (!closes) break;
    waiting = {sums, group_scales(w, block, group), group_scales(w, block + 1, group), 0};
    group++;
    closing += runs;
    opens = true;
  }
  while (waiting.quarter < 4) scale_quarter(waiting, height, acc);
  unpack_to(unpacker, pieces);
}

}  // namespace
}  // namespace qpass
