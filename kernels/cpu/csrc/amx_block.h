// One row block (16 or 32 rows) times 32 outputs over one K chunk, on AMX, with the scaling of groups interleaved.
#pragma once
#include "amx_tiles.h"

namespace qpass {
namespace {

// What becomes of a group's sums before they are scaled: they are codes', or codes' minus zero points.
enum class Sums { codes, codes_zero };

// Scaling of one finished group, done a few rows at a time between the tile products of the next group.
// sums [2 row tiles][2 column tiles][16][16]; acc [32][32] float32 += sums * scale.
struct Pending {
  const int32_t* sums;
  __m512 scale[2];
  __m512i zero[2];
  const int32_t* row_sums;  // [rows][groups], at this group; only with zero points
  int row, end;
};

template <Sums SUMS>
QPASS_AMX_INLINE __m512 as_float(__m512i sum, __m512i zero, int32_t row_sum, __m512i shift) {
  if (SUMS == Sums::codes_zero) {
    __m512i offset = _mm512_mullo_epi32(zero, _mm512_set1_epi32(row_sum));
    sum = _mm512_sub_epi32(_mm512_srav_epi32(sum, shift), offset);
  }
  return _mm512_cvtepi32_ps(sum);
}

template <Sums SUMS>
QPASS_AMX_INLINE void scale_rows(Pending& p, const Weight& w, float* acc, __m512i shift, int count) {
  const int end = p.row + count < p.end ? p.row + count : p.end;
  for (int r = p.row; r < end; r++) {
    const int32_t* sums = p.sums + (r / 16) * 512 + (r % 16) * 16;
    const int32_t row_sum = SUMS == Sums::codes_zero ? p.row_sums[r * w.groups] : 0;
    float* out = acc + r * 32;
    __m512 s0 = as_float<SUMS>(_mm512_load_si512(sums), p.zero[0], row_sum, shift);
    __m512 s1 = as_float<SUMS>(_mm512_load_si512(sums + 256), p.zero[1], row_sum, shift);
    _mm512_store_ps(out, _mm512_fmadd_ps(s0, p.scale[0], _mm512_load_ps(out)));
    _mm512_store_ps(out + 16, _mm512_fmadd_ps(s1, p.scale[1], _mm512_load_ps(out + 16)));
  }
  p.row = end;
}

// Panels of one K chunk: `rows` is the first row tile, the second follows `row_stride` bytes later.
struct Panels {
  const int8_t* rows;
  int64_t row_stride;
  const int8_t* columns[2];
};

#define QPASS_TILE_PRODUCT(sum, row, column)                            \
  do {                                                                  \
    _tile_dpbssd(sum, row, column);                                     \
    scale_rows<SUMS>(pending, w, acc, shift, count);                    \
  } while (0)

// `open` [4][16][16] keeps the sums of a group that continues in the next chunk. `block` is the first of two blocks of
// 16 outputs. `row_sums` [rows][groups] starts at this row block.
template <Sums SUMS, int TILES>
QPASS_AMX void amx_block(const Weight& w, const Plan& plan, const Panels& panels, int64_t block,
                         const int32_t* row_sums, int32_t* open, float* acc) {
  alignas(64) int32_t buffers[2][1024];
  const __m512i shift = _mm512_set1_epi32(w.bits == 4 ? 4 : 0);
  Pending pending;
  pending.row = pending.end = 0;
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
      _tile_loadd(0, open, 64);
      _tile_loadd(1, open + 256, 64);
      if (TILES == 2) {
        _tile_loadd(2, open + 512, 64);
        _tile_loadd(3, open + 768, 64);
      }
    }
    // Rows scaled after each product: all of them within the products of the segment.
    const int count = segment.end - segment.begin == 1 ? 8 : 4;
    for (int i = segment.begin; i < segment.end; i++) {
      const int8_t* rows = panels.rows + plan.steps[i].a;
      _tile_loadd(6, panels.columns[0] + plan.steps[i].b, 64);
      _tile_loadd(4, rows, 64);
      QPASS_TILE_PRODUCT(0, 4, 6);
      if (TILES == 2) {
        _tile_loadd(5, rows + panels.row_stride, 64);
        QPASS_TILE_PRODUCT(2, 5, 6);
      }
      _tile_loadd(7, panels.columns[1] + plan.steps[i].b, 64);
      QPASS_TILE_PRODUCT(1, 4, 7);
      if (TILES == 2) QPASS_TILE_PRODUCT(3, 5, 7);
    }
    scale_rows<SUMS>(pending, w, acc, shift, 32);
    int32_t* sums = segment.closes ? buffers[s & 1] : open;
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (TILES == 2) {
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
    }
    if (!segment.closes) continue;
    pending.sums = sums;
    pending.row = 0;
    pending.end = TILES * 16;
    for (int c = 0; c < 2; c++) {
      pending.scale[c] = group_scales(w, block + c, segment.group);
      if (SUMS == Sums::codes_zero) pending.zero[c] = group_zero_points(w, block + c, segment.group);
    }
    if (SUMS == Sums::codes_zero) pending.row_sums = row_sums + segment.group;
  }
  scale_rows<SUMS>(pending, w, acc, shift, 32);
}

}  // namespace
}  // namespace qpass
