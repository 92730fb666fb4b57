// Float rows times integer weights on AVX512: weights become float32 in registers, products and sums are float32 fma.
//
// Per group and row there are four partial sums (inputs k % 4), enough chains to hide the latency of fma at one row;
// they are added pairwise, scaled, and added in ascending order of groups. The order is the same for any number of rows.
#pragma once
#include "avx512_decode.h"

namespace qpass {
namespace {

template <Decode DECODE, int ROWS>
QPASS_AVX512 void float_rows(const Weight& w, const FloatRows& x, const Output& out, int64_t m0, int64_t block_begin,
                             int64_t block_end) {
  const int64_t runs = w.group_size / 32;
  for (int64_t b = block_begin; b < block_end; b++) {
    __m512 acc[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.groups; g++) {
      const Decoder decoder = decoder_of(w, b, g);
      __m512 part[ROWS][4];
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) part[m][j] = _mm512_setzero_ps();
      }
      for (int64_t run = g * runs; run < (g + 1) * runs; run++) {
        const uint8_t* q = run_lines(w, b, run);
        const float* row = x.x + m0 * x.Kp + run * 32;
        const bool upper = run % 2;
        for (int r = 0; r < 8; r++) {
          const __m512i line = _mm512_loadu_si512(q + r * 64);
          _mm_prefetch((const char*)q + r * 64 + 2048, _MM_HINT_T0);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) {
            const __m512 weight = decoded<DECODE>(line, j, upper, decoder);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) {
              const __m512 value = _mm512_set1_ps(row[m * x.Kp + r * 4 + j]);
              part[m][j] = _mm512_fmadd_ps(weight, value, part[m][j]);
            }
          }
        }
      }
      const __m512 scale = group_scales(w, b, g);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
        __m512 sum = _mm512_add_ps(_mm512_add_ps(part[m][0], part[m][1]), _mm512_add_ps(part[m][2], part[m][3]));
        acc[m] = _mm512_fmadd_ps(sum, scale, acc[m]);
      }
    }
    const Columns columns = columns_of(w, out, b, 1.f);
    for (int m = 0; m < ROWS; m++) {
      store_floats(out.data, out.dtype, (m0 + m) * out.ld + columns.first, columns.mask,
                   _mm512_add_ps(acc[m], columns.bias));
    }
  }
}

template <Decode DECODE>
void float_product(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  // Weights of a block pass through the cache once for all rows when there are more rows than registers hold.
  const int64_t step = x.M <= 4 ? block_end - block_begin : 1;
  for (int64_t b = block_begin; b < block_end; b += step) {
    int64_t m = 0;
    for (; m + 4 <= x.M; m += 4) float_rows<DECODE, 4>(w, x, out, m, b, b + step);
    if (m + 2 <= x.M) float_rows<DECODE, 2>(w, x, out, m, b, b + step), m += 2;
    if (m < x.M) float_rows<DECODE, 1>(w, x, out, m, b, b + step);
  }
}

void product_f_avx512(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  if (w.bits == 8) return float_product<Decode::byte_zero>(w, x, out, block_begin, block_end);
  if (w.zero_point) return float_product<Decode::nibble_zero>(w, x, out, block_begin, block_end);
  float_product<Decode::nibble_table>(w, x, out, block_begin, block_end);
}

}  // namespace
}  // namespace qpass
