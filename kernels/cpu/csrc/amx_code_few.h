// Up to 32 rows of codes times a range of 16-output blocks on AMX, over all of K.
//
// Four sum tiles are of four blocks of outputs, from the four quarters of the range, for up to 16 rows, or of two blocks, from
// its halves, for 32: a core that asks memory for several places at once gets more. In the order of the code, weights of 64
// inputs are unpacked, those of the 64 before are multiplied, and sums of a group that ended are scaled, so that the
// processor finds all three kinds of work within its window and does them at once.
#pragma once
#include "amx_tiles.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int kSumTiles = 4;
constexpr int64_t kSums = kSumTiles * 256;  // of a group

// How column tiles come about: from nibbles; from bytes, which are multiplied where they lie; or as `unpack_codes` says.
enum class Take { nibbles, bytes, general };

inline Take take_of(const Weight& w) {
  if (w.multiplier || w.group_size / 32 % 2) return Take::general;
  return w.bits == 4 ? Take::nibbles : Take::bytes;
}

// Work space of a call. T row tiles meet P = 4 / T blocks.
struct FewSpace {
  int8_t* panel;     // [2][P][slot]: column tiles of two blocks of 64 inputs in turn
  int32_t* sums;     // [T][P][16][16]: of a group
  float* acc;        // [T][16][P][16]: of the groups before, scaled
  int32_t* opening;  // [groups][T][16][16]: what sums of bytes begin with, which hold weight + 128
};

FewSpace few_space(const Weight& w, int tiles) {
  const bool bytes = take_of(w) == Take::bytes;
  FewSpace s;
  s.sums = (int32_t*)scratch(6, 2 * kSums * 4 + (bytes ? w.groups * tiles * 1024 : 2 * kSumTiles * kSplitTile));
  s.acc = (float*)(s.sums + kSums);
  s.opening = (int32_t*)(s.acc + kSums);
  s.panel = (int8_t*)s.opening;
  return s;
}

// -128 * (sum of the codes of a row and group), in each of 16 columns.
QPASS_AMX void make_opening(const Weight& w, const RowTiles& to, const int8_t* rows, int tiles, int32_t* opening) {
  alignas(64) int8_t least[kTile];
  memset(least, 0x80, sizeof least);
  QPASS_STORES_DONE();
  _tile_loadd(6, least, 64);
  const int64_t blocks = w.Kp / 64, each = w.group_size / 64;
  for (int64_t g = 0; g < w.groups; g++)
    for (int t = 0; t < tiles; t++, opening += 256) {
      _tile_zero(0);
      for (int64_t k = g * each; k < (g + 1 < w.groups ? (g + 1) * each : blocks); k++) {
        _tile_loadd(4, rows + to.row(t * 16) + to.block(k), 64);
        _tile_dpbssd(0, 4, 6);
      }
      _tile_stored(0, opening, 64);
    }
}

// Column tiles of 64 inputs of the blocks, which lie at `q`.
template <Take TAKE, int PLACES>
QPASS_AMX_INLINE void few_unpack(const Weight& w, const int64_t (&block)[PLACES], int64_t k, int64_t slot,
                                 const uint8_t* (&q)[PLACES], int8_t* panel) {
#pragma GCC unroll 1
  for (int s = 0; s < PLACES; s++, panel += slot) {
    if (TAKE == Take::general) {
      unpack_codes(w, block[s], k, 1, panel);
      continue;
    }
    for (int r = 0; r < 8; r++) _mm_prefetch((const char*)q[s] + r * 64 + 1024, _MM_HINT_T0);
    unpack_nibbles(q[s], panel, panel + 512);
    q[s] += 512;
  }
}

// Products with 64 inputs of the blocks, whose column tiles are `step` bytes apart; sum tile t * PLACES + s is of row tile t
// and block s.
template <int TILES>
QPASS_AMX_INLINE void few_products(const int8_t* rows, int64_t row_stride, const int8_t* columns, int64_t step) {
  QPASS_STORES_DONE();
  _tile_loadd(4, rows, 64);
  if (TILES == 2) _tile_loadd(5, rows + row_stride, 64);
  _tile_loadd(6, columns, 64);
  _tile_dpbssd(0, 4, 6);
  if (TILES == 2) _tile_dpbssd(2, 5, 6);
  _tile_loadd(7, columns + step, 64);
  _tile_dpbssd(1, 4, 7);
  if (TILES == 2) {
    _tile_dpbssd(3, 5, 7);
    return;
  }
  _tile_loadd(6, columns + 2 * step, 64);
  _tile_dpbssd(2, 4, 6);
  _tile_loadd(7, columns + 3 * step, 64);
  _tile_dpbssd(3, 4, 7);
}

// The same of bytes as they lie in memory. Asking for lines ahead of the tile loads made this slower.
template <int TILES, int PLACES>
QPASS_AMX_INLINE void few_products_of_bytes(const int8_t* rows, int64_t row_stride, const uint8_t* (&q)[PLACES]) {
  _tile_loadd(4, rows, 64);
  if (TILES == 2) _tile_loadd(5, rows + row_stride, 64);
  _tile_loadd(6, q[0], 64);
  _tile_dpbsud(0, 4, 6);
  if (TILES == 2) _tile_dpbsud(2, 5, 6);
  _tile_loadd(7, q[1], 64);
  _tile_dpbsud(1, 4, 7);
  if (TILES == 2) _tile_dpbsud(3, 5, 7);
  if (TILES == 1) {
    _tile_loadd(6, q[PLACES - 2], 64);
    _tile_dpbsud(2, 4, 6);
    _tile_loadd(7, q[PLACES - 1], 64);
    _tile_dpbsud(3, 4, 7);
  }
#pragma GCC unroll 4
  for (int s = 0; s < PLACES; s++) q[s] += kTile;
}

template <Take TAKE, int TILES>
QPASS_AMX_INLINE void few_open(const int32_t* opening, int64_t group) {
  if (TAKE == Take::bytes) {
    const int32_t *first = opening + group * TILES * 256, *second = first + (TILES - 1) * 256;
    QPASS_STORES_DONE();
    _tile_loadd(0, first, 64);
    _tile_loadd(1, first, 64);
    _tile_loadd(2, second, 64);
    _tile_loadd(3, second, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

// Adds the sums of a group, scaled, to those of the groups before. `row_sums` [rows][groups] are of codes.
template <bool ZERO, int PLACES>
QPASS_AMX_INLINE void few_close(const Weight& w, const int64_t (&block)[PLACES], int64_t group, const int32_t* row_sums,
                                int64_t rows, const FewSpace& space) {
  _tile_stored(0, space.sums, 64);
  _tile_stored(1, space.sums + 256, 64);
  _tile_stored(2, space.sums + 512, 64);
  _tile_stored(3, space.sums + 768, 64);
  __m512 scale[PLACES];
  __m512i zero[PLACES];
#pragma GCC unroll 4
  for (int s = 0; s < PLACES; s++) {
    scale[s] = group_scales(w, block[s], group);
    if (ZERO) zero[s] = group_zero_points(w, block[s], group);
  }
  for (int64_t r = 0; r < rows; r++) {
    const int32_t* sums = space.sums + r / 16 * (PLACES * 256) + r % 16 * 16;
    float* acc = space.acc + r * PLACES * 16;
#pragma GCC unroll 4
    for (int s = 0; s < PLACES; s++) {
      __m512i sum = _mm512_load_si512(sums + s * 256);
      if (ZERO) sum = without_zero(w, sum, zero[s], row_sums[r * w.groups + group]);
      const __m512 before = group == 0 ? _mm512_setzero_ps() : _mm512_load_ps(acc + s * 16);
      _mm512_store_ps(acc + s * 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[s], before));
    }
  }
}

template <bool ZERO, Take TAKE, int TILES>
QPASS_AMX void few_rows(const Weight& w, const QuantRows& x, const Output& out, const RowTiles& to, const int8_t* rows,
                        const int32_t* row_sums, float gain, int64_t block_begin, int64_t block_end) {
  constexpr int PLACES = kSumTiles / TILES;
  const int64_t blocks = w.Kp / 64, runs = w.group_size / 32, slot = runs % 2 ? kSplitTile : kTile;
  const int64_t count = (block_end - block_begin + PLACES - 1) / PLACES, row_stride = to.row(16);
  const FewSpace space = few_space(w, TILES);
  if (TAKE == Take::bytes) make_opening(w, to, rows, TILES, space.opening);
  for (int64_t i = 0; i < count; i++) {
    int64_t block[PLACES], group = 0, left = runs;  // runs of 32 inputs until the group ends
    const uint8_t* q[PLACES];
    blocks_at(block_begin, block_end, i, block);
    for (int s = 0; s < PLACES; s++) q[s] = w.q + block[s] * blocks * w.bits * 128;
    if (TAKE != Take::bytes) few_unpack<TAKE>(w, block, 0, slot, q, space.panel);
    few_open<TAKE, TILES>(space.opening, 0);
    for (int64_t k = 0; k < blocks; k++) {
      const int8_t *row = rows + to.block(k), *columns = space.panel + k % 2 * PLACES * slot;
      if (TAKE == Take::bytes) {
        few_products_of_bytes<TILES>(row, row_stride, q);
      } else {
        if (k + 1 < blocks) few_unpack<TAKE>(w, block, k + 1, slot, q, space.panel + (k + 1) % 2 * PLACES * slot);
        few_products<TILES>(row, row_stride, columns, slot);
      }
      left -= 2;
      if (left == -1 && group + 1 < w.groups) {  // the group ended between the halves, which are two tiles
        few_close<ZERO>(w, block, group++, row_sums, x.M, space);
        few_open<TAKE, TILES>(space.opening, group);
        few_products<TILES>(row, row_stride, columns + 512, slot);
        left += runs;
      }
      if (left > 0 && k + 1 < blocks) continue;
      few_close<ZERO>(w, block, group++, row_sums, x.M, space);
      if (k + 1 < blocks) few_open<TAKE, TILES>(space.opening, group);
      left = runs;
    }
    for (int s = 0; s < PLACES; s++) {
      const Columns columns = columns_of(w, out, block[s], gain);
      for (int64_t m = 0; m < x.M; m++)
        finish(columns, x, out, m, _mm512_load_ps(space.acc + (m * PLACES + s) * 16), gain);
    }
  }
}

template <bool ZERO, int TILES>
auto few_function_of(Take take) {
  if (take == Take::bytes) return few_rows<ZERO, Take::bytes, TILES>;
  return take == Take::nibbles ? few_rows<ZERO, Take::nibbles, TILES> : few_rows<ZERO, Take::general, TILES>;
}

inline auto few_function(const Weight& w, int64_t M) {
  if (M <= 16) return w.zero_point ? few_function_of<true, 1>(take_of(w)) : few_function_of<false, 1>(take_of(w));
  return w.zero_point ? few_function_of<true, 2>(take_of(w)) : few_function_of<false, 2>(take_of(w));
}

}  // namespace
}  // namespace qpass
