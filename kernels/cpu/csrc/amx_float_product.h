// The product of float rows with any weight that becomes bf16 tiles, on AMX, whatever the number of rows.
//
// A row is the exact sum of one to three rows of bf16, and products of bf16 are exact in the float32 that they are added
// in. The order of addition is the same for any rows: runs of 32 inputs in ascending order, in each the parts of the weight
// and of the row; groups in ascending order.
//
// Up to 32 rows, weights pass through L1 once, unpacked just ahead of the tiles. More rows are packed for 2048 inputs at a
// time, 1 MB of them in L2, and meet chunks of 256 inputs of 32 outputs, whose column tiles (16 KB) stay in L1; what is
// added up so far goes to memory and back between stretches of 2048.
#pragma once
#include "amx_float_block.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int64_t kFewRows = 32;
constexpr int64_t kChunk = 4, kStretch = 32;  // blocks of 64 inputs

// Rows [m0, m0 + M) of acc [row blocks] of `step` floats, each [32][32], times the outputs' gain, with bias.
template <class Source>
QPASS_AMX void write_rows(const Source& source, const Output& out, int64_t block, const float* acc, int64_t step,
                          int64_t m0, int64_t M) {
  for (int64_t side = 0; side < 2; side++) {
    const int64_t first = (block + side) * 16;
    const __mmask16 mask = first_lanes(source.N - first);
    const __m512 bias = out.bias ? load_floats(out.bias, out.bias_dtype, first, mask) : _mm512_setzero_ps();
    const __m512 gain = source.gain ? _mm512_loadu_ps(source.gain + first) : _mm512_set1_ps(1.f);
    for (int64_t m = 0; m < M; m++) {
      const __m512 sum = _mm512_load_ps(acc + m / 32 * step + m % 32 * 32 + side * 16);
      store_any(out.data, out.dtype, (m0 + m) * out.ld + first, mask, _mm512_add_ps(_mm512_mul_ps(sum, gain), bias));
    }
  }
}

template <class Source>
QPASS_AMX void product_of_few(Source& source, const FloatRows& x, const Output& out, int64_t block_begin,
                              int64_t block_end) {
  const int height = x.M < 16 ? (int)x.M : 16, tiles = x.M > 16 ? 2 : 1;
  int8_t* rows = (int8_t*)scratch(5, source.blocks * 2 * x.bf16_parts * tiles * height * 64);
  float* acc = (float*)scratch(7, 4096);
  pack_floats(x, 0, 0, source.blocks, height, tiles, rows);
  configure_tiles(height);
  for (int64_t block = block_begin; block < block_end; block += 2) {
    source.choose(block);
    if (tiles == 1) few_rows<Source, 1>(source, rows, height, x.bf16_parts, block, acc);
    else few_rows<Source, 2>(source, rows, height, x.bf16_parts, block, acc);
    write_rows(source, out, block, acc, 0, 0, x.M);
  }
}

// Rows [m0, m0 + M), of which `most` fit the work space.
template <class Source>
QPASS_AMX void product_of_many(Source& source, const FloatRows& x, const Output& out, int64_t most, int64_t m0,
                               int64_t M, int64_t block_begin, int64_t block_end) {
  const int64_t blocks = source.blocks, row_blocks = (M + 31) / 32, most_blocks = most / 32;
  const int64_t stretch = blocks < kStretch ? blocks : kStretch, block_bytes = 4 * x.bf16_parts * kTile;
  const bool several = stretch < blocks;
  constexpr int64_t kSide = kChunk * 2 * Source::kParts * kTile;
  int8_t* rows = (int8_t*)scratch(5, most_blocks * stretch * block_bytes);
  int8_t* columns = (int8_t*)scratch(6, 2 * kSide);
  // Of each row block the sums of an open group, and what is added up.
  float* sums = (float*)scratch(7, (several ? (block_end - block_begin) / 2 : 1) * most_blocks * 8192);
  for (int64_t k0 = 0; k0 < blocks; k0 += stretch) {
    const int64_t k1 = k0 + stretch < blocks ? k0 + stretch : blocks;
    for (int64_t k = k0; k < k1; k += kChunk) {
      const int64_t count = k1 - k < kChunk ? k1 - k : kChunk;
      for (int64_t i = 0; i < row_blocks; i++)
        pack_floats(x, m0 + i * 32, k, count, 16, 2, rows + ((k - k0) * row_blocks + i * count) * block_bytes);
    }
    for (int64_t block = block_begin; block < block_end; block += 2) {
      source.choose(block);
      float* of = sums + (several ? (block - block_begin) / 2 * most_blocks * 2048 : 0);
      for (int64_t i = 0; i < row_blocks * 2048 && k0 == 0; i += 16) _mm512_store_ps(of + i, _mm512_setzero_ps());
      for (int64_t k = k0; k < k1; k += kChunk) {
        const int64_t count = k1 - k < kChunk ? k1 - k : kChunk;
        const int64_t end = 2 * (k + count) < source.total ? 2 * (k + count) : source.total;
        for (int64_t i = 0; i < count; i++)
          make_tiles(source, blocks, block, k + i, columns + i * 2 * Source::kParts * kTile, kSide);
        for (int64_t i = 0; i < row_blocks; i++)
          many_rows(source, rows + ((k - k0) * row_blocks + i * count) * block_bytes, x.bf16_parts, columns, kSide, block,
                    2 * k, end, of + i * 2048, of + i * 2048 + 1024);
      }
      if (k1 == blocks) write_rows(source, out, block, of + 1024, 2048, m0, M);
    }
  }
}

template <class Source>
QPASS_AMX void product_of(Source source, const FloatRows& x, const Output& out, int64_t block_begin,
                          int64_t block_end) {
  if (x.M == 0) return;
  if (x.M <= kFewRows) {
    product_of_few(source, x, out, block_begin, block_end);
  } else {
    const int64_t stretch = source.blocks < kStretch ? source.blocks : kStretch, padded = (x.M + 31) / 32 * 32;
    int64_t rows = kPanelBytes / (stretch * 128 * x.bf16_parts) / 32 * 32;
    rows = rows < 32 ? 32 : rows > kPanelRows ? kPanelRows : rows;
    if (rows > padded) rows = padded;
    configure_tiles(16);
    for (int64_t m = 0; m < x.M; m += rows)
      product_of_many(source, x, out, rows, m, x.M - m < rows ? x.M - m : rows, block_begin, block_end);
  }
  _tile_release();
}

}  // namespace
}  // namespace qpass
