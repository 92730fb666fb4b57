// Products of row tiles with column tiles of codes on AMX, summed by groups: what few rows and many are multiplied with.
//
// Four sum tiles are of T row tiles and P = 4 / T blocks of 16 outputs; sum tile t * P + s is of row tile t and block s.
// Nothing is arranged to run beside the products by hand: written in the order unpack, multiply, scale, all of it in short
// stretches, the processor finds the three kinds of work within its window and does them at once.
#pragma once
#include "amx_tiles.h"

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

// Products with 64 inputs of PLACES blocks, whose column tiles are `step` bytes apart. A second row tile, if T is 2 and
// there is one, lies `row_stride` bytes after the first.
template <int PLACES>
QPASS_AMX_INLINE void multiply(const int8_t* rows, int64_t row_stride, const int8_t* columns, int64_t step) {
  QPASS_STORES_DONE();
  const bool two = PLACES == 2 && row_stride;
  _tile_loadd(4, rows, 64);
  if (two) _tile_loadd(5, rows + row_stride, 64);
  _tile_loadd(6, columns, 64);
  _tile_dpbssd(0, 4, 6);
  if (two) _tile_dpbssd(2, 5, 6);
  _tile_loadd(7, columns + step, 64);
  _tile_dpbssd(1, 4, 7);
  if (two) _tile_dpbssd(3, 5, 7);
  if (PLACES == 2) return;
  _tile_loadd(6, columns + 2 * step, 64);
  _tile_dpbssd(2, 4, 6);
  _tile_loadd(7, columns + 3 * step, 64);
  _tile_dpbssd(3, 4, 7);
}

// The same of bytes that hold weight + 128, as they lie in memory.
template <int PLACES>
QPASS_AMX_INLINE void multiply_bytes(const int8_t* rows, int64_t row_stride, const uint8_t* const (&q)[PLACES]) {
  const bool two = PLACES == 2 && row_stride;
  _tile_loadd(4, rows, 64);
  if (two) _tile_loadd(5, rows + row_stride, 64);
  _tile_loadd(6, q[0], 64);
  _tile_dpbsud(0, 4, 6);
  if (two) _tile_dpbsud(2, 5, 6);
  _tile_loadd(7, q[1], 64);
  _tile_dpbsud(1, 4, 7);
  if (two) _tile_dpbsud(3, 5, 7);
  if (PLACES == 2) return;
  _tile_loadd(6, q[PLACES - 2], 64);
  _tile_dpbsud(2, 4, 6);
  _tile_loadd(7, q[PLACES - 1], 64);
  _tile_dpbsud(3, 4, 7);
}

QPASS_AMX_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// A group begins: with zeros, or with `opening` for each row tile.
template <int PLACES>
QPASS_AMX_INLINE void open_group(Take take, const int32_t* first, const int32_t* second) {
  if (take == Take::bytes) {
    QPASS_STORES_DONE();
    _tile_loadd(0, first, 64);
    _tile_loadd(1, first, 64);
    _tile_loadd(2, PLACES == 2 ? second : first, 64);
    _tile_loadd(3, PLACES == 2 ? second : first, 64);
  } else {
    zero_sums();
  }
}

QPASS_AMX_INLINE void load_sums(const int32_t* sums) {
  QPASS_STORES_DONE();
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  _tile_loadd(2, sums + 512, 64);
  _tile_loadd(3, sums + 768, 64);
}

QPASS_AMX_INLINE void store_sums(int32_t* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// What makes up for the 128 in bytes: -128 * (sum of the codes of a row and group), in each of 16 columns,
// [groups][tiles][16][16]. One product after the other into one sum would wait 52 cycles for each.
QPASS_AMX void make_opening(const Weight& w, const RowTiles& to, const int8_t* rows, int64_t tiles, int32_t* opening) {
  alignas(64) int8_t least[kTile];
  alignas(64) int32_t sums[kSums];
  memset(least, 0x80, sizeof least);
  QPASS_STORES_DONE();
  _tile_loadd(6, least, 64);
  const int64_t blocks = w.Kp / 64, each = w.groups == 1 ? blocks : w.group_size / 64;
  for (int64_t g = 0; g < w.groups; g++)
    for (int64_t t = 0; t < tiles; t++, opening += 256) {
      const int8_t* row = rows + to.row(t * 16);
      zero_sums();
      for (int64_t k = g * each, end = k + each; k < end; k += 4) {
        _tile_loadd(4, row + to.block(k), 64);
        _tile_dpbssd(0, 4, 6);
        if (k + 1 < end) {
          _tile_loadd(5, row + to.block(k + 1), 64);
          _tile_dpbssd(1, 5, 6);
        }
        if (k + 2 < end) {
          _tile_loadd(4, row + to.block(k + 2), 64);
          _tile_dpbssd(2, 4, 6);
        }
        if (k + 3 < end) {
          _tile_loadd(5, row + to.block(k + 3), 64);
          _tile_dpbssd(3, 5, 6);
        }
      }
      store_sums(sums);
      for (int r = 0; r < 256; r += 16) {
        const __m512i a = _mm512_add_epi32(_mm512_load_si512(sums + r), _mm512_load_si512(sums + 256 + r));
        const __m512i b = _mm512_add_epi32(_mm512_load_si512(sums + 512 + r), _mm512_load_si512(sums + 768 + r));
        _mm512_store_si512(opening + r, _mm512_add_epi32(a, b));
      }
    }
}

// Adds the sums of COUNT groups from `group` on, scaled, one after the other, to `acc` [rows][PLACES][16]. `row_sums`
// [rows][groups] are of codes; only with zero points.
template <bool ZERO, int PLACES, int COUNT>
QPASS_AMX_INLINE void scale_groups(const Weight& w, const int64_t (&block)[PLACES], int64_t group, const int32_t* row_sums,
                                   int64_t rows, const int32_t* sums, float* acc) {
  __m512 scale[COUNT][PLACES];
  __m512i zero[COUNT][PLACES];
#pragma GCC unroll 2
  for (int g = 0; g < COUNT; g++) {
#pragma GCC unroll 4
    for (int s = 0; s < PLACES; s++) {
      scale[g][s] = group_scales(w, block[s], group + g);
      if (ZERO) zero[g][s] = group_zero_points(w, block[s], group + g);
    }
  }
  for (int64_t r = 0; r < rows; r++, acc += PLACES * 16) {
    const int32_t* at = sums + r / 16 * (PLACES * 256) + r % 16 * 16;
#pragma GCC unroll 4
    for (int s = 0; s < PLACES; s++) {
      __m512 total = group == 0 ? _mm512_setzero_ps() : _mm512_load_ps(acc + s * 16);
#pragma GCC unroll 2
      for (int g = 0; g < COUNT; g++) {
        __m512i sum = _mm512_load_si512(at + g * kSums + s * 256);
        if (ZERO) sum = without_zero(w, sum, zero[g][s], row_sums[r * w.groups + group + g]);
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[g][s], total);
      }
      _mm512_store_ps(acc + s * 16, total);
    }
  }
}

template <int PLACES, int COUNT>
QPASS_AMX_INLINE void add_groups(const Weight& w, const int64_t (&block)[PLACES], int64_t group, const int32_t* row_sums,
                                 int64_t rows, const int32_t* sums, float* acc) {
  if (w.zero_point) return scale_groups<true, PLACES, COUNT>(w, block, group, row_sums, rows, sums, acc);
  scale_groups<false, PLACES, COUNT>(w, block, group, row_sums, rows, sums, acc);
}

// Rows [m, m + rows) of the results of PLACES blocks, whose sums carry `gain`, a power of two.
template <int PLACES>
QPASS_AMX_INLINE void write_rows(const Weight& w, const QuantRows& x, const Output& out, const int64_t (&block)[PLACES],
                                 float gain, int64_t m, int64_t rows, const float* acc) {
  for (int s = 0; s < PLACES; s++) {
    const Columns columns = columns_of(w, out, block[s], gain);
    const float inverse = 1.f / gain;
    for (int64_t r = 0; r < rows; r++) {  // the arithmetic of avx512_vector.h's `finish`
      __m512 sum = _mm512_load_ps(acc + (r * PLACES + s) * 16);
      if (x.zero_point) sum = _mm512_fnmadd_ps(_mm512_set1_ps(x.zero_point[m + r]), columns.colsum, sum);
      sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(x.scale[m + r] * inverse), columns.bias);
      store_any(out.data, out.dtype, (m + r) * out.ld + columns.first, columns.mask, sum);
    }
  }
}

}  // namespace
}  // namespace qpass
