// Up to 32 rows times 32 outputs in bf16 tiles: a few rows over all inputs, or one block of many rows over one K chunk.
//
// `Source` is the weight: piece() makes the two column tiles of 64 inputs x 16 outputs (kParts of them in a row where a
// weight is the sum of several bf16), scales() what the sums of a group are multiplied by; choose() is told
// of every two blocks of outputs before they begin.
#pragma once
#include "amx_floats.h"

namespace qpass {
namespace {

alignas(64) const uint8_t kZeros[64] = {};

// Makes block k of 64 inputs of two blocks of outputs: tiles [2 sides][2 runs][kParts]. Prefetches what is 3 KB further on
// in each; at a row's end that is in the next two blocks of outputs.
template <class Source>
QPASS_AMX_OUTLINE void make_tiles(const Source& source, int64_t blocks, int64_t block, int64_t k, int8_t* tiles,
                                 int64_t side_bytes) {
  constexpr int64_t kAhead = 3072 / Source::kBytes;
  const int64_t later = k + kAhead + (k + kAhead < blocks ? 0 : blocks);
  const uint8_t* ahead = source.q + (block * blocks + later) * Source::kBytes;
  source.piece(block, k, ahead, tiles);
  source.piece(block + 1, k, ahead + blocks * Source::kBytes, tiles + side_bytes);
}

// acc [rows][32] += sums [2][16][16] * scale, for rows of one tile.
QPASS_AMX_INLINE void scale_rows(const float* sums, __m512 scale0, __m512 scale1, int rows, float* acc) {
  for (int r = 0; r < rows; r++, sums += 16, acc += 32) {
    _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_load_ps(sums), scale0, _mm512_load_ps(acc)));
    _mm512_store_ps(acc + 16, _mm512_fmadd_ps(_mm512_load_ps(sums + 256), scale1, _mm512_load_ps(acc + 16)));
  }
}

// Sum tiles 0..3 from memory, and back. Zeros are loaded: a product that follows _tile_zero waits for it (50 cycles
// instead of 16).
template <int TILES>
QPASS_AMX_INLINE void load_sums(const float* from, int64_t stride, int64_t step) {
  _tile_loadd(0, from, stride);
  _tile_loadd(1, from + step, stride);
  if (TILES == 2) {
    _tile_loadd(2, from + 2 * step, stride);
    _tile_loadd(3, from + 3 * step, stride);
  }
}

template <int TILES>
QPASS_AMX_INLINE void store_sums(float* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + 256, 64);
  if (TILES == 2) {
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
  }
}

// One run of 32 inputs: `parts` row tiles (pairs of them, if TILES is 2) times PARTS column tiles of each side.
template <int PARTS, int TILES>
QPASS_AMX_INLINE const int8_t* multiply_run(const int8_t* rows, int64_t tile, int parts, const int8_t* column0,
                                            const int8_t* column1) {
#pragma GCC unroll 2
  for (int i = 0; i < PARTS; i++) {
    const int8_t* row = rows;
    _tile_loadd(6, column0 + i * kTile, 64);
    _tile_loadd(7, column1 + i * kTile, 64);
    for (int part = 0; part < parts; part++) {
      _tile_loadd(4, row, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (TILES == 2) {
        _tile_loadd(5, row + tile, 64);
        _tile_dpbf16ps(2, 5, 6);
      }
      _tile_dpbf16ps(1, 4, 7);
      if (TILES == 2) _tile_dpbf16ps(3, 5, 7);
      row += TILES * tile;
    }
  }
  return rows + parts * TILES * tile;
}

// All inputs. Row tiles [run][parts][TILES] of `height` rows. Unpacking is one block of 64 inputs ahead of the products, and
// scaling one group behind, so that neither the tiles nor the vector units wait for the other.
template <class Source, int TILES>
QPASS_AMX void few_rows(const Source& source, const int8_t* rows, int height, int parts, int64_t block, float* acc) {
  constexpr int64_t kSide = 2 * Source::kParts * kTile;
  alignas(64) int8_t ring[2][2 * kSide];
  alignas(64) float buffers[2][TILES * 512];
  const int64_t blocks = source.blocks, total = source.total, runs = source.runs, tile = height * 64;
  int64_t left = runs, group = 0;
  float* waiting = nullptr;
  __m512 scale0 = _mm512_setzero_ps(), scale1 = scale0;
  for (int r = 0; r < TILES * height; r++) {
    _mm512_store_ps(acc + r * 32, scale0);
    _mm512_store_ps(acc + r * 32 + 16, scale0);
  }
  make_tiles(source, blocks, block, 0, ring[0], kSide);
  QPASS_STORES_DONE();
  load_sums<TILES>((const float*)kZeros, 0, 0);
  for (int64_t k = 0; k < blocks; k++) {
    if (k + 1 < blocks) make_tiles(source, blocks, block, k + 1, ring[(k + 1) & 1], kSide);
    QPASS_STORES_DONE();
    const int8_t* columns = ring[k & 1];
    for (int64_t run = 2 * k; run < 2 * k + 2 && run < total; run++, columns += Source::kParts * kTile) {
      rows = multiply_run<Source::kParts, TILES>(rows, tile, parts, columns, columns + kSide);
      if (--left > 0 && run + 1 < total) continue;
      if (waiting) {
        for (int t = 0; t < TILES; t++) scale_rows(waiting + t * 512, scale0, scale1, height, acc + t * 512);
      }
      waiting = buffers[group & 1];
      store_sums<TILES>(waiting);
      load_sums<TILES>((const float*)kZeros, 0, 0);
      scale0 = source.scales(block, group);
      scale1 = source.scales(block + 1, group);
      group++;
      left = runs;
    }
  }
  for (int t = 0; t < TILES; t++) scale_rows(waiting + t * 512, scale0, scale1, height, acc + t * 512);
}

// Runs [begin, end) of 32 rows. Row tiles [run][parts][2], column tiles [2 sides][runs][kParts] in L1. `open` [4][16][16]
// keeps the sums of a group that continues in the next chunk.
template <class Source>
QPASS_AMX void many_rows(const Source& source, const int8_t* rows, int parts, const int8_t* columns, int64_t side_bytes,
                         int64_t block, int64_t begin, int64_t end, float* open, float* acc) {
  alignas(64) float buffers[2][1024];
  const int64_t runs = source.runs, total = source.total;
  int64_t group = begin / runs, left = (group + 1) * runs - begin;
  float* waiting = nullptr;
  int quarter = 4;  // of the waiting group's 32 rows
  __m512 scale0 = _mm512_setzero_ps(), scale1 = scale0;
  QPASS_STORES_DONE();
  if (left == runs) load_sums<2>((const float*)kZeros, 0, 0);
  else load_sums<2>(open, 64, 256);
  for (int64_t run = begin; run < end; run++, columns += Source::kParts * kTile) {
    rows = multiply_run<Source::kParts, 2>(rows, kTile, parts, columns, columns + side_bytes);
    if (quarter < 4) {
      scale_rows(waiting + quarter / 2 * 512 + quarter % 2 * 128, scale0, scale1, 8, acc + quarter * 256);
      quarter++;
    }
    if (--left > 0 && run + 1 < total) continue;
    for (; quarter < 4; quarter++)
      scale_rows(waiting + quarter / 2 * 512 + quarter % 2 * 128, scale0, scale1, 8, acc + quarter * 256);
    waiting = buffers[group & 1];
    store_sums<2>(waiting);
    load_sums<2>((const float*)kZeros, 0, 0);
    scale0 = source.scales(block, group);
    scale1 = source.scales(block + 1, group);
    quarter = 0;
    group++;
    left = runs;
  }
  if (left < runs) store_sums<2>(open);
  for (; quarter < 4; quarter++)
    scale_rows(waiting + quarter / 2 * 512 + quarter % 2 * 128, scale0, scale1, 8, acc + quarter * 256);
}

}  // namespace
}  // namespace qpass
