// AMX tiles: configuration, row tiles packed from rows, column tiles unpacked from the weight's nibbles and bytes.
#pragma once
#include "amx_plan.h"
#include "avx512_decode.h"
#include "avx512_multiplied.h"

namespace qpass {
namespace {

// Tile registers 0..3 are sums, 4 and 5 row tiles, 6 and 7 column tiles; all 16 rows of 64 bytes. Loaded for one
// product and released after it, so that other users of AMX in this thread find no configuration but their own.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

QPASS_AMX_INLINE void configure_tiles() {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = 16;
  }
  QPASS_STORES_DONE();
  _tile_loadconfig(&config);
}

// 16 rows of codes starting at row m, blocks [k, k + count): contiguous tiles; rows from M on are zero.
QPASS_AMX_INLINE void pack_codes(const QuantRows& x, int64_t m, int64_t k, int64_t count, int8_t* tile) {
  for (int64_t i = 0; i < count; i++) {
    for (int64_t r = 0; r < 16; r++, tile += 64) {
      __m512i line = m + r < x.M ? _mm512_loadu_si512(x.q + (m + r) * x.Kp + (k + i) * 64) : _mm512_setzero_si512();
      _mm512_store_si512(tile, line);
    }
  }
}

// The upper 16 bits of 32 floats, in order: bf16 by truncation, which cannot overflow; NaN is made quiet first.
QPASS_AMX_INLINE __m512 truncated(__m512 v) {
  __m512i u = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32((int)0xffff0000u));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                                   _mm512_set1_epi32(0x7fc00000)));
}

QPASS_AMX_INLINE __m512i bf16_pair(__m512 first, __m512 second) {
  __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
  return _mm512_ternarylogic_epi32(_mm512_castps_si512(second), high, low, 0xEA);  // (second & high) | low
}

// What the parts before have not covered. Infinite values are covered by the first part.
QPASS_AMX_INLINE __m512 remainder_of(__m512 v, __m512 part) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  return _mm512_maskz_sub_ps(finite, v, part);
}

// 16 rows of floats starting at row m, runs [2k, 2(k + count)) of 32 inputs, each as `parts` bf16 tiles that sum to it.
QPASS_AMX_INLINE void pack_floats(const FloatRows& x, int64_t m, int64_t k, int64_t count, int parts, int8_t* tile) {
  for (int64_t i = 0; i < 2 * count; i++, tile += parts * kTile) {
    for (int64_t r = 0; r < 16; r++) {
      __m512 v0 = _mm512_setzero_ps(), v1 = v0;
      if (m + r < x.M) {
        const float* row = x.x + (m + r) * x.Kp + (2 * k + i) * 32;
        v0 = _mm512_loadu_ps(row);
        v1 = _mm512_loadu_ps(row + 16);
      }
      for (int part = 0; part < parts; part++) {
        const __m512 p0 = truncated(v0), p1 = truncated(v1);
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(p0), 16);
        const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(p1), 16);
        int8_t* line = tile + part * kTile + r * 64;
        _mm256_storeu_si256((__m256i*)line, _mm512_cvtepi32_epi16(low));
        _mm256_storeu_si256((__m256i*)(line + 32), _mm512_cvtepi32_epi16(high));
        v0 = remainder_of(v0, p0);
        v1 = remainder_of(v1, p1);
      }
    }
  }
}

// Blocks [k, k + count) of 16 outputs as signed bytes: 4 bits as 16 * weight, which costs one instruction a line
// (unpacking was measured to be free beside the products), 8 bits as they are.
QPASS_AMX_INLINE void unpack_codes(const Weight& w, int64_t block, int64_t k, int64_t count, int8_t* panel) {
  if (w.multiplier) return unpack_multiplied(w, block, k, count, 0, (uint8_t*)panel);
  const int64_t slot = w.group_size / 32 % 2 ? kSplitTile : kTile;
  const __m512i sign = _mm512_set1_epi8((char)0x80), upper = _mm512_set1_epi8((char)0xf0);
  const __m512i up4 = _mm512_set1_epi64(0x01020408);  // output bits 4..7 are input bits 0..3
  const uint8_t* q = w.q + (block * (w.Kp / 64) + k) * (w.bits * 128);
  for (int64_t i = 0; i < count; i++, panel += slot, q += w.bits * 128) {
    int8_t *first = panel, *second = panel + 512;
    if (splits(w, k + i)) {
      for (int r = 0; r < 8; r++) _mm512_store_si512(second + r * 64, _mm512_setzero_si512());
      second += 512;
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      __m512i v = _mm512_loadu_si512(q + r * 64);
      if (w.bits == 4) {
        _mm512_store_si512(first + r * 64, _mm512_gf2p8affine_epi64_epi8(v, up4, 0x80));           // (v << 4) ^ 0x80
        _mm512_store_si512(second + r * 64, _mm512_ternarylogic_epi64(v, upper, sign, 0x6A));      // (v & 0xf0) ^ 0x80
      } else {
        _mm512_store_si512(first + r * 64, _mm512_xor_si512(v, sign));
        _mm512_store_si512(second + r * 64, _mm512_xor_si512(_mm512_loadu_si512(q + 512 + r * 64), sign));
      }
    }
  }
}

// The same blocks as bf16 tiles of 32 inputs: weight - zero point is an integer of at most 8 bits and a sign, so exact.
// Row p of a tile holds inputs 2p and 2p + 1 of each output.
template <Decode DECODE>
QPASS_AMX_INLINE void unpack_floats(const Weight& w, int64_t block, int64_t k, int64_t count, int8_t* panel) {
  const int64_t runs = w.group_size / 32, last = w.groups * runs;
  for (int64_t run = 2 * k; run < 2 * (k + count) && run < last; run++, panel += kTile) {
    const Decoder decoder = decoder_of(w, block, run / runs);
    const uint8_t* q = run_lines(w, block, run);
    for (int r = 0; r < 8; r++) {
      const __m512i line = _mm512_loadu_si512(q + r * 64);
      for (int p = 0; p < 2; p++) {
        const __m512 first = decoded<DECODE>(line, 2 * p, run % 2, decoder);
        const __m512 second = decoded<DECODE>(line, 2 * p + 1, run % 2, decoder);
        _mm512_store_si512(panel + (2 * r + p) * 64, bf16_pair(first, second));
      }
    }
  }
}

}  // namespace
}  // namespace qpass
