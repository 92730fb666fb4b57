// More than 32 rows of codes times a range of 16-output blocks on AMX, one chunk of K at a time.
//
// 32 x 32 outputs in four sum tiles; column tiles of a chunk of two blocks stay in the first cache while all rows meet
// them. Sums of two groups are scaled at once, which reads and writes those of the groups before half as often. A group
// that does not end with the chunk goes on in the next; until then its int32 sums lie in memory.
#pragma once
#include "amx_code_groups.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int kWaiting = 2;  // groups that are scaled at once

constexpr int64_t kChunk = kTilesTogether;  // blocks of 64 inputs; twice as many are slower for bytes, and else no faster

// The sizes of one product: blocks of 64 inputs, bytes of an unpacked one, and runs of 32 inputs in a group.
struct Blocking {
  Take take;
  int64_t blocks, slot, runs;

  explicit Blocking(const Weight& w) : take(take_of(w)), blocks(w.Kp / 64), runs(w.group_size / 32) {
    slot = runs % 2 ? kSplitTile : kTile;
  }
};

// Work space of a pass.
struct ManySpace {
  int32_t* sums;     // [kWaiting][4][16][16]: of groups that wait to be scaled
  float* acc;        // [row blocks][32][2][16]: of the groups before, scaled
  int32_t* open;     // [row blocks][4][16][16]: of a group that goes on in the next chunk
  int8_t* panel;     // [2][kChunk][slot]
  int32_t* opening;  // [groups][row tiles][16][16]; only of bytes, and there is no panel then
};

ManySpace many_space(const Weight& w, const Blocking& b, int64_t row_tiles) {
  ManySpace s;
  const int64_t row_blocks = (row_tiles + 1) / 2;
  const int64_t last = b.take == Take::bytes ? w.groups * row_tiles * 1024 : 2 * kChunk * b.slot;
  s.sums = (int32_t*)scratch(6, (kWaiting + 2 * row_blocks) * kSums * 4 + last);
  s.acc = (float*)(s.sums + kWaiting * kSums);
  s.open = (int32_t*)(s.acc + row_blocks * kSums);
  s.panel = (int8_t*)(s.open + row_blocks * kSums);
  s.opening = (int32_t*)s.panel;
  return s;
}

// The next chunk of weights of two blocks of outputs, `apart` bytes from each other: `lines_each` lines of both are
// fetched after each product. In one go they would fill the buffers of the first cache, for which tile loads then wait.
struct Ahead {
  const char* at;
  int64_t apart, left;
  int lines_each;
};

QPASS_AMX_INLINE void fetch_some(Ahead& ahead) {
  for (int i = 0; i < ahead.lines_each && ahead.left > 0; i++) {
    _mm_prefetch(ahead.at, _MM_HINT_T0);
    _mm_prefetch(ahead.at + ahead.apart, _MM_HINT_T0);
    ahead.at += 64;
    ahead.left--;
  }
}

// What comes after blocks [k, end) of `block`, for `products` steps to fetch.
inline Ahead ahead_of(const Weight& w, const Blocking& b, int64_t block, int64_t block_end, int64_t end,
                      int64_t products) {
  const int64_t k = end < b.blocks ? end : 0, next = k ? block : block + 2, block_bytes = w.bits * 128;
  const int64_t count = b.blocks - k < kChunk ? b.blocks - k : kChunk;
  const int64_t lines = next < block_end ? count * block_bytes / 64 : 0;
  return {(const char*)w.q + (next * b.blocks + k) * block_bytes, b.blocks * block_bytes, lines,
          (int)((lines + products - 1) / products)};
}

// Up to 32 rows, a row block, and what it has of its own.
struct RowBlock {
  const int8_t* rows;
  int64_t row_stride;  // to the second row tile, or 0
  int64_t count;
  const int32_t *row_sums, *opening;
  int64_t opening_step;  // from group to group
  float* acc;
  int32_t* open;
};

// Where a row block stands: the group, the runs of 32 inputs until it ends, and how many groups wait to be scaled.
struct Standing {
  int64_t group, left;
  int waiting;
};

QPASS_AMX_INLINE void open_group_of(const Blocking& b, const RowBlock& r, int64_t group) {
  const int32_t* opening = r.opening + group * r.opening_step;
  open_group<2>(b.take, opening, r.row_stride ? opening + 256 : opening);
}

QPASS_AMX_INLINE void close_group(const Weight& w, const int64_t (&block)[2], const RowBlock& r, int32_t* sums,
                                  Standing& at) {
  store_sums(sums + at.waiting * kSums);
  at.group++;
  if (++at.waiting < kWaiting) return;
  add_groups<2, kWaiting>(w, block, at.group - kWaiting, r.row_sums, r.count, sums, r.acc);
  at.waiting = 0;
}

// A row block times blocks [k, end) of 64 inputs of two blocks of outputs.
QPASS_AMX void multiply_chunk(const Weight& w, const Blocking& b, const RowTiles& to, const RowBlock& r,
                              const int64_t (&block)[2], const ManySpace& space, int64_t k, int64_t end, Standing at,
                              Ahead& fetching) {
  Ahead ahead = fetching;
  const int64_t block_bytes = w.bits * 128;
  const uint8_t* q[2] = {w.q + (block[0] * b.blocks + k) * block_bytes, w.q + (block[1] * b.blocks + k) * block_bytes};
  const int8_t* columns = space.panel;
  if (at.left < b.runs) load_sums(r.open);
  else open_group_of(b, r, at.group);
  for (; k < end; k++, columns += b.slot) {
    const int8_t* rows = r.rows + to.block(k);
    if (b.take == Take::bytes) {
      multiply_bytes<2>(rows, r.row_stride, q);
      q[0] += kTile, q[1] += kTile;
    } else {
      multiply<2>(rows, r.row_stride, columns, kChunk * b.slot);
    }
    fetch_some(ahead);
    at.left -= 2;
    if (at.left == -1 && at.group + 1 < w.groups) {  // the group ended between the halves, which are two tiles
      close_group(w, block, r, space.sums, at);
      open_group_of(b, r, at.group);
      multiply<2>(rows, r.row_stride, columns + 512, kChunk * b.slot);
      at.left += b.runs;
    }
    if (at.left > 0 && k + 1 < b.blocks) continue;
    close_group(w, block, r, space.sums, at);
    at.left = b.runs;
    if (k + 1 < end) open_group_of(b, r, at.group);
  }
  if (at.waiting) add_groups<2, 1>(w, block, at.group - 1, r.row_sums, r.count, space.sums, r.acc);
  if (at.left < b.runs) store_sums(r.open);
  fetching = ahead;
}

// Rows [m0, m0 + M), which lie at `rows`, times all blocks.
QPASS_AMX void many_rows(const Weight& w, const QuantRows& x, const Output& out, const RowTiles& to, const int8_t* rows,
                         const int32_t* row_sums, int64_t m0, int64_t M, float gain, int64_t block_begin,
                         int64_t block_end) {
  const Blocking b(w);
  const int64_t row_tiles = (M + 15) / 16, row_blocks = (M + 31) / 32;
  const ManySpace space = many_space(w, b, row_tiles);
  if (b.take == Take::bytes) make_opening(w, to, rows, row_tiles, space.opening);
  for (int64_t first = block_begin; first < block_end; first += 2) {
    const int64_t block[2] = {first, first + 1};
    for (int64_t k = 0; k < b.blocks; k += kChunk) {
      const int64_t end = k + kChunk < b.blocks ? k + kChunk : b.blocks;
      for (int c = 0; c < 2 && b.take != Take::bytes; c++)
        unpack_codes(w, block[c], k, end - k, space.panel + c * kChunk * b.slot);
      QPASS_STORES_DONE();
      const Standing at = {2 * k / b.runs, b.runs - 2 * k % b.runs, 0};
      Ahead ahead = ahead_of(w, b, first, block_end, end, row_blocks * (end - k));
      for (int64_t i = 0; i < row_blocks; i++) {
        const int64_t m = i * 32, count = M - m < 32 ? M - m : 32;
        RowBlock r = {};
        r.rows = rows + to.row(m);
        r.row_stride = count > 16 ? to.row(m + 16) - to.row(m) : 0;
        r.count = count;
        r.row_sums = row_sums ? row_sums + m * w.groups : nullptr;
        r.opening = space.opening + i * 512;
        r.opening_step = row_tiles * 256;
        r.acc = space.acc + i * kSums;
        r.open = space.open + i * kSums;
        multiply_chunk(w, b, to, r, block, space, k, end, at, ahead);
        if (end == b.blocks) write_rows(w, x, out, block, gain, m0 + m, count, r.acc);
      }
    }
  }
}

}  // namespace
}  // namespace qpass
