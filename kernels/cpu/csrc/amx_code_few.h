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

// Adds the sums of inputs that share a multiplier, times it, to those before, which are integers too.
template <int PLACES>
QPASS_AMX_INLINE void multiply_group(const Weight& w, const int8_t* multiplier, const int64_t (&block)[PLACES], int64_t group,
                                     int64_t rows, const int32_t* sums, int32_t* acc) {
  __m512i by[PLACES];
#pragma GCC unroll 4
  for (int s = 0; s < PLACES; s++)
    by[s] = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(multiplier + (block[s] * w.groups + group) * 16)));
  for (int64_t r = 0; r < rows; r++, acc += PLACES * 16) {
    const int32_t* at = sums + r / 16 * (PLACES * 256) + r % 16 * 16;
#pragma GCC unroll 4
    for (int s = 0; s < PLACES; s++) {
      const __m512i before = group == 0 ? _mm512_setzero_si512() : _mm512_load_si512(acc + s * 16);
      const __m512i sum = _mm512_srai_epi32(_mm512_load_si512(at + s * 256), 4);
      _mm512_store_si512(acc + s * 16, _mm512_add_epi32(before, _mm512_mullo_epi32(sum, by[s])));
    }
  }
}

// Integer sums of rows to floats, times their channels' scales.
template <int PLACES>
QPASS_AMX_INLINE void scale_channels(const Weight& w, const int64_t (&block)[PLACES], int64_t rows, float* acc) {
  for (int s = 0; s < PLACES; s++) {
    const __m512 scale = group_scales(w, block[s], 0);
    for (int64_t r = 0; r < rows; r++) {
      float* at = acc + (r * PLACES + s) * 16;
      _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), scale, _mm512_setzero_ps()));
    }
  }
}

// Ends a group, and begins the next unless that was the last.
template <int PLACES>
QPASS_AMX_INLINE void next_group(const Weight& w, const int8_t* multiplier, Take take, const int64_t (&block)[PLACES],
                                 int64_t& group, const int32_t* row_sums, int64_t rows, const FewSpace& space) {
  constexpr int TILES = kSumTiles / PLACES;
  store_sums(space.sums);
  if (multiplier) multiply_group(w, multiplier, block, group, rows, space.sums, (int32_t*)space.acc);
  else add_groups<PLACES, 1>(w, block, group, row_sums, rows, space.sums, space.acc);
  if (++group == w.groups) return;
  const int32_t* opening = space.opening + group * TILES * 256;
  open_group<PLACES>(take, opening, opening + 256);
}

// A weight with integer scales as one of groups: what shares a multiplier.
inline Weight grouped(const Weight& w) {
  Weight as = w;
  if (!w.multiplier) return as;
  as.groups = w.multipliers, as.group_size = inner_size(w);
  as.multiplier = nullptr;
  return as;
}

template <int TILES>
QPASS_AMX void few_rows(const Weight& whole, const QuantRows& x, const Output& out, const RowTiles& to, const int8_t* rows,
                        const int32_t* row_sums, float gain, int64_t block_begin, int64_t block_end) {
  constexpr int PLACES = kSumTiles / TILES;
  const Weight w = grouped(whole);
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
        next_group(w, whole.multiplier, take, block, group, row_sums, x.M, space);
        multiply<PLACES>(row, row_stride, columns + 512, slot);
        left += runs;
      }
      if (left > 0 && k + 1 < blocks) continue;
      next_group(w, whole.multiplier, take, block, group, row_sums, x.M, space);
      left = runs;
    }
    if (whole.multiplier) scale_channels(whole, block, x.M, space.acc);
    write_rows(w, x, out, block, gain, 0, x.M, space.acc);
  }
}

}  // namespace
}  // namespace qpass
