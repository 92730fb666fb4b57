// Rows of codes times 32 outputs on AMX, one chunk of K at a time, with all else done between the tile products.
//
// A tile product keeps the matrix unit busy for 16 cycles, in which four times as many other instructions can run. So the
// sums of a finished group are not scaled, nor finished sums turned into results, where they arise: they wait in `Waiting`,
// and a few rows of them are taken after each product of what comes next. Weights to come are prefetched the same way, a
// line or two at a time: in one go they fill the buffers of the first cache, on which the tile loads then wait.
#pragma once
#include "amx_tiles.h"

namespace qpass {
namespace {

// The next chunk of weights of two blocks of outputs, `apart` bytes from each other: `lines_each` lines of both are fetched
// after each product.
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

// What is the same for all rows of two blocks of outputs.
struct Ending {
  const QuantRows* x;
  const Output* out;
  float gain_inverse;  // a power of two
  Columns columns[2];
};

// Sums of one group, of up to 32 rows and 32 outputs, rows [row, end) of which are still to be taken.
struct Waiting {
  const Ending* ending;
  const int32_t* sums;      // [2 row tiles][2 column tiles][16][16]
  float* acc;               // [32][32], of the groups before
  const int32_t* row_sums;  // [rows][groups] of the codes of x, at this group; only with zero points
  __m512 scale[2];
  __m512i zero[2];
  bool first, last;         // of the row's groups: nothing to add to, and results to be written
  int64_t m;                // row of x and of the output that row 0 is
  int row, end;
};

template <bool ZERO>
QPASS_AMX_INLINE __m512 scaled(const Waiting& p, const Weight& w, const int32_t* sums, int r, int c, __m512 before) {
  __m512i sum = _mm512_load_si512(sums + c * 256);
  if (ZERO) sum = without_zero(w, sum, p.zero[c], p.row_sums[r * w.groups]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), p.scale[c], before);
}

inline const int32_t* sums_of_row(const Waiting& p, int r) { return p.sums + (r / 16) * 512 + (r % 16) * 16; }

template <bool ZERO, int COUNT>
QPASS_AMX_INLINE void scale_rows(const Waiting& p, const Weight& w, int row) {
  const int32_t* sums = sums_of_row(p, row);
  float* acc = p.acc + row * 32;
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; r++, sums += 16, acc += 32) {
    const __m512 a = scaled<ZERO>(p, w, sums, row + r, 0, _mm512_load_ps(acc));
    const __m512 b = scaled<ZERO>(p, w, sums, row + r, 1, _mm512_load_ps(acc + 16));
    _mm512_store_ps(acc, a);
    _mm512_store_ps(acc + 16, b);
  }
}

// Rows [p.row, end) of the first group, of the last, or of fewer rows than fill two tiles.
template <bool ZERO>
QPASS_AMX_OUTLINE void take_rows(Waiting& p, const Weight& w, int end) {
  const Ending& e = *p.ending;
  for (; p.row < end; p.row++) {
    const int r = p.row;
    __m512 sum[2];
    for (int c = 0; c < 2; c++) {
      float* acc = p.acc + r * 32 + c * 16;
      sum[c] = scaled<ZERO>(p, w, sums_of_row(p, r), r, c, p.first ? _mm512_setzero_ps() : _mm512_load_ps(acc));
      if (!p.last) _mm512_store_ps(acc, sum[c]);
    }
    if (!p.last) continue;
    // The arithmetic of avx512_vector.h's `finish`, with what does not depend on the row taken out of it.
    const int64_t m = p.m + r;
    const __m512 scale = _mm512_set1_ps(e.x->scale[m] * e.gain_inverse);
    for (int c = 0; c < 2; c++) {
      const Columns& columns = e.columns[c];
      if (e.x->zero_point) sum[c] = _mm512_fnmadd_ps(_mm512_set1_ps(e.x->zero_point[m]), columns.colsum, sum[c]);
      sum[c] = _mm512_fmadd_ps(sum[c], scale, columns.bias);
      store_any(e.out->data, e.out->dtype, m * e.out->ld + columns.first, columns.mask, sum[c]);
    }
  }
}

// Takes up to `count` waiting rows. `full` is whether 32 rows of a group between the first and the last wait; then p.row
// stays a multiple of 4, for every step of a plan is two or four products.
template <bool ZERO>
QPASS_AMX_INLINE void take_some(Waiting& p, const Weight& w, bool full, int count) {
  if (p.row >= p.end) return;
  if (!full) return take_rows<ZERO>(p, w, p.row + count < p.end ? p.row + count : p.end);
  if (count == 8) {
    scale_rows<ZERO, 8>(p, w, p.row);
  } else if (count == 4) {
    scale_rows<ZERO, 4>(p, w, p.row);
  } else {
    scale_rows<ZERO, 2>(p, w, p.row);
  }
  p.row += count;
}

// What a row block works on: `rows` is its first row tile of this chunk, the second follows `row_stride` bytes later.
struct Tiles {
  const int8_t* rows;
  int64_t row_stride;
  const int8_t* columns[2];
};

// Where sums are kept: `open` [4][16][16] for a group that goes on in the next chunk, and `spare`, two such blocks in turn,
// for sums that wait.
struct Sums {
  int32_t *open, *spare;
  int* turn;
};

// 16 or 32 rows times 32 outputs over one chunk. What closes waits as `here` says, after what waited before.
template <bool ZERO, int TILES>
QPASS_AMX void multiply_codes(const Weight& w, const Plan& plan, const Tiles& tiles, int64_t block, const Waiting& here,
                              const Sums& sums, Waiting& waiting, Ahead& fetching) {
  Ahead ahead = fetching;
  const int64_t row_stride = tiles.row_stride;
  QPASS_STORES_DONE();
  for (int s = 0; s < plan.segment_count; s++) {
    const Segment segment = plan.segments[s];
    if (segment.opens) {
      _tile_zero(0);
      _tile_zero(1);
      if (TILES == 2) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, sums.open, 64);
      _tile_loadd(1, sums.open + 256, 64);
      if (TILES == 2) {
        _tile_loadd(2, sums.open + 512, 64);
        _tile_loadd(3, sums.open + 768, 64);
      }
    }
    // Rows taken after each product: all that wait within the products of the segment.
    const int count = segment.end - segment.begin == 1 ? 8 : segment.end - segment.begin < 4 ? 4 : 2;
    const bool full = waiting.row == 0 && waiting.end == 32 && !waiting.first && !waiting.last;
    for (int i = segment.begin; i < segment.end; i++) {
      const int8_t* rows = tiles.rows + plan.steps[i].a;
      _tile_loadd(6, tiles.columns[0] + plan.steps[i].b, 64);
      _tile_loadd(4, rows, 64);
      _tile_dpbssd(0, 4, 6);
      take_some<ZERO>(waiting, w, full, count);
      fetch_some(ahead);
      if (TILES == 2) {
        _tile_loadd(5, rows + row_stride, 64);
        _tile_dpbssd(2, 5, 6);
        take_some<ZERO>(waiting, w, full, count);
        fetch_some(ahead);
      }
      _tile_loadd(7, tiles.columns[1] + plan.steps[i].b, 64);
      _tile_dpbssd(1, 4, 7);
      take_some<ZERO>(waiting, w, full, count);
      fetch_some(ahead);
      if (TILES == 2) {
        _tile_dpbssd(3, 5, 7);
        take_some<ZERO>(waiting, w, full, count);
        fetch_some(ahead);
      }
    }
    int32_t* to = sums.open;
    if (segment.closes) {
      while (waiting.row < waiting.end) take_some<ZERO>(waiting, w, full, 4);
      to = sums.spare + *sums.turn * 1024;
      *sums.turn ^= 1;
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    if (TILES == 2) {
      _tile_stored(2, to + 512, 64);
      _tile_stored(3, to + 768, 64);
    }
    if (!segment.closes) continue;
    waiting = here;
    waiting.sums = to;
    waiting.first = segment.group == 0;
    waiting.last = segment.group == w.groups - 1;
    for (int c = 0; c < 2; c++) {
      waiting.scale[c] = group_scales(w, block + c, segment.group);
      if (ZERO) waiting.zero[c] = group_zero_points(w, block + c, segment.group);
    }
    if (ZERO) waiting.row_sums += segment.group;
  }
  fetching = ahead;
}

}  // namespace
}  // namespace qpass
