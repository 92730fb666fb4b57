// AMX tiles: configuration, row tiles packed from codes, column tiles of bytes unpacked from the weight's nibbles and bytes.
#pragma once
#include "amx_rows.h"
#include "avx512_multiplied.h"

namespace qpass {
namespace {

constexpr int64_t kSplitTile = 1536;  // inputs 0..31, zeros, inputs 32..63: see `splits`

// Whether a group ends between the two halves of 64-input block `k`. Such a block is unpacked with 512 zero bytes
// between its halves, so that (half, zeros) and (zeros, half) are two tiles: a tile product costs the same at any depth.
inline bool splits(const Weight& w, int64_t k) {
  const int64_t runs = w.group_size / 32, next = 2 * k + 1;
  return next % runs == 0 && next < w.groups * runs;
}

// Tile registers 0..3 are sums, 4 and 5 row tiles, 6 and 7 column tiles, of 16 rows of 64 bytes; of sums and rows fewer
// where there are fewer, which takes the processor 9 to 16 cycles a product instead of 16. Loaded for one
// product and released after it, so that other users of AMX in this thread find no configuration but their own.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

QPASS_AMX_INLINE void configure_tiles(int rows = 16) {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = (uint8_t)(i < 6 ? rows : 16);
  }
  QPASS_STORES_DONE();
  _tile_loadconfig(&config);
}

// Rows [begin, end) of M into their tiles, and rows of zeros after the last one, to the end of its tile. `q` is row `begin`.
QPASS_AMX_INLINE void tile_codes(const int8_t* q, int64_t Kp, int64_t M, int64_t begin, int64_t end, int8_t* tiles) {
  const RowTiles to(M, Kp);
  for (int64_t m = begin; m < (end == M ? (M + 15) / 16 * 16 : end); m++, q += Kp) {
    int8_t* line = tiles + to.row(m);
    for (int64_t k = 0; k < Kp / 64; k++)
      _mm512_store_si512(line + to.block(k), m < M ? _mm512_loadu_si512(q + k * 64) : _mm512_setzero_si512());
  }
}

// The nibbles of 64 inputs of 16 outputs as signed bytes, 16 * weight, which costs one instruction a line.
QPASS_AMX_INLINE void unpack_nibbles(const uint8_t* q, int8_t* first, int8_t* second) {
  const __m512i sign = _mm512_set1_epi8((char)0x80), upper = _mm512_set1_epi8((char)0xf0);
  const __m512i up4 = _mm512_set1_epi64(0x01020408);  // output bits 4..7 are input bits 0..3
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    const __m512i v = _mm512_loadu_si512(q + r * 64);
    _mm512_store_si512(first + r * 64, _mm512_gf2p8affine_epi64_epi8(v, up4, 0x80));       // (v << 4) ^ 0x80
    _mm512_store_si512(second + r * 64, _mm512_ternarylogic_epi64(v, upper, sign, 0x6A));  // (v & 0xf0) ^ 0x80
  }
}

// Blocks [k, k + count) of 16 outputs as signed bytes: 4 bits as 16 * weight, 8 bits as they are.
QPASS_AMX_INLINE void unpack_codes(const Weight& w, int64_t block, int64_t k, int64_t count, int8_t* panel) {
  if (w.multiplier) return unpack_multiplied(w, block, k, count, 0, (uint8_t*)panel);
  const bool halves = w.group_size / 32 % 2;
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  const uint8_t* q = w.q + (block * (w.Kp / 64) + k) * (w.bits * 128);
  for (int64_t i = 0; i < count; i++, panel += halves ? kSplitTile : kTile, q += w.bits * 128) {
    int8_t *first = panel, *second = panel + 512;
    if (halves && splits(w, k + i)) {
      for (int r = 0; r < 8; r++) _mm512_store_si512(second + r * 64, _mm512_setzero_si512());
      second += 512;
    }
    if (w.bits == 4) {
      unpack_nibbles(q, first, second);
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      _mm512_store_si512(first + r * 64, _mm512_xor_si512(_mm512_loadu_si512(q + r * 64), sign));
      _mm512_store_si512(second + r * 64, _mm512_xor_si512(_mm512_loadu_si512(q + 512 + r * 64), sign));
    }
  }
}

// Sums of a group of 16 outputs without `zero` times the sum of the codes that met them; those of 4 bits come 16 times too
// large.
QPASS_AMX_INLINE __m512i without_zero(const Weight& w, __m512i sum, __m512i zero, int32_t codes) {
  const __m512i shift = _mm512_set1_epi32(w.bits == 4 ? 4 : 0);
  return _mm512_sub_epi32(_mm512_srav_epi32(sum, shift), _mm512_mullo_epi32(zero, _mm512_set1_epi32(codes)));
}

}  // namespace
}  // namespace qpass
