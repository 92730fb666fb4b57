// Up to 32 rows of codes times a range of 16-output blocks on AMX, over all of K.
//
// Few rows wait for memory, and a core that asks it for several places at once gets more: up to 16 rows meet four blocks,
// from the four quarters of the range, up to 32 rows two, from its halves.
#pragma once
#include "amx_code_groups.h"
#include "scratch.h"

namespace qpass {
namespace {

// Work space of a call. T row tiles meet P blocks.
struct FewSpace {
  int32_t* sums;     // [T][P][16][16]: of a group
  float* acc;        // [T * 16][P][16]: of the groups before, scaled
  int8_t* panel;     // [2][P][slot]: column tiles of two blocks of 64 inputs in turn
  int32_t* opening;  // [groups][T][16][16], of bytes; there is no panel then
};

FewSpace few_space(const Weight& w, Take take, int64_t tiles) {
  FewSpace s;
  const int64_t last = take == Take::bytes ? w.groups * tiles * 1024 : 2 * kSumTiles * kSplitTile;
  s.sums = (int32_t*)scratch(6, 2 * kSums * 4 + last);
  s.acc = (float*)(s.sums + kSums);
  s.panel = (int8_t*)(s.acc + kSums);
  s.opening = (int32_t*)s.panel;
  return s;
}

// Column tiles of 64 inputs of the blocks, which lie at `q`.
template <int PLACES>
QPASS_AMX_INLINE void few_unpack(const Weight& w, Take take, const int64_t (&block)[PLACES], int64_t k, int64_t slot,
                                 const uint8_t* (&q)[PLACES], int8_t* panel) {
#pragma GCC unroll 1
  for (int s = 0; s < PLACES; s++, panel += slot) {
    if (take == Take::general) {
      unpack_codes(w, block[s], k, 1, panel);
      continue;
    }
    for (int r = 0; r < 8; r++) _mm_prefetch((const char*)q[s] + r * 64 + 1024, _MM_HINT_T0);
    unpack_nibbles(q[s], panel, panel + 512);
    q[s] += 512;
  }
}

// Ends a group, and begins the next unless that was the last.
template <int PLACES>
QPASS_AMX_INLINE void next_group(const Weight& w, Take take, const int64_t (&block)[PLACES], int64_t& group,
                                 const int32_t* row_sums, int64_t rows, const FewSpace& space) {
  constexpr int TILES = kSumTiles / PLACES;
  store_sums(space.sums);
  add_groups<PLACES, 1>(w, block, group, row_sums, rows, space.sums, space.acc);
  if (++group == w.groups) return;
  const int32_t* opening = space.opening + group * TILES * 256;
  open_group<PLACES>(take, opening, opening + 256);
}

template <int TILES>
QPASS_AMX void few_rows(const Weight& w, const QuantRows& x, const Output& out, const RowTiles& to, const int8_t* rows,
                        const int32_t* row_sums, float gain, int64_t block_begin, int64_t block_end) {
  constexpr int PLACES = kSumTiles / TILES;
  const Take take = take_of(w);
  const int64_t blocks = w.Kp / 64, runs = w.group_size / 32, slot = runs % 2 ? kSplitTile : kTile;
  const int64_t count = (block_end - block_begin + PLACES - 1) / PLACES, row_stride = to.row(16);
  const FewSpace space = few_space(w, take, TILES);
  if (take == Take::bytes) make_opening(w, to, rows, TILES, space.opening);
  for (int64_t i = 0; i < count; i++) {
    int64_t block[PLACES], group = 0, left = runs;  // runs of 32 inputs until the group ends
    const uint8_t* q[PLACES];
    blocks_at(block_begin, block_end, i, block);
    for (int s = 0; s < PLACES; s++) q[s] = w.q + block[s] * blocks * w.bits * 128;
    if (take != Take::bytes) few_unpack(w, take, block, 0, slot, q, space.panel);
    open_group<PLACES>(take, space.opening, space.opening + 256);
    for (int64_t k = 0; k < blocks; k++) {
      const int8_t *row = rows + to.block(k), *columns = space.panel + k % 2 * PLACES * slot;
      if (take == Take::bytes) {  // asking for lines ahead of the tile loads made this slower
        multiply_bytes<PLACES>(row, row_stride, q);
        for (int s = 0; s < PLACES; s++) q[s] += kTile;
      } else {
        if (k + 1 < blocks) few_unpack(w, take, block, k + 1, slot, q, space.panel + (k + 1) % 2 * PLACES * slot);
        multiply<PLACES>(row, row_stride, columns, slot);
      }
      left -= 2;
      if (left == -1 && group + 1 < w.groups) {  // the group ended between the halves, which are two tiles
        next_group(w, take, block, group, row_sums, x.M, space);
        multiply<PLACES>(row, row_stride, columns + 512, slot);
        left += runs;
      }
      if (left > 0 && k + 1 < blocks) continue;
      next_group(w, take, block, group, row_sums, x.M, space);
      left = runs;
    }
    write_rows(w, x, out, block, gain, 0, x.M, space.acc);
  }
}

}  // namespace
}  // namespace qpass
