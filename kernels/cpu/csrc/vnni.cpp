// AVX512-VNNI: integer products for few rows (and any number where there is no AMX), float products in float32.
//
// What the blocking rests on, measured on a 2-core Sapphire Rapids Xeon:
// - The weight is the unsigned operand of vpdpbusd and x the signed one, broadcast from memory four codes at a time: no
//   offset on x and no compensation per column; the weight's offset costs one subtraction of 8 * sum(x) a group.
// - The high nibble is used un-shifted (16 * weight) with an accumulator of its own, shifted by 4 once per group: two
//   ANDs and two vpdpbusd per 64 bytes and row. This runs at twice DRAM speed up to 4 rows, and at DRAM speed at 8.
// - 8 rows at once: 16 accumulators and 3 operands stay in registers; AMX is faster from row 9 on.
// - A prefetch 2 KB ahead of each line.
//
// |code * weight * 16| <= 240 * 128, so int32 sums are exact for groups of up to 131072 inputs.
// Row i's arithmetic does not depend on how many rows are processed together.
#include "vnni_block.h"
#include "avx512_float.h"
#include "avx512_quantize.h"
#include "scratch.h"

namespace qpass {
namespace {

using RowsFunction = void (*)(const Weight&, const QuantRows&, const Output&, const int32_t*, int64_t, int64_t, int64_t);

template <int BITS>
RowsFunction rows_function(int64_t rows) {
  static constexpr RowsFunction table[8] = {vnni_rows<BITS, 1>, vnni_rows<BITS, 2>, vnni_rows<BITS, 3>,
                                            vnni_rows<BITS, 4>, vnni_rows<BITS, 5>, vnni_rows<BITS, 6>,
                                            vnni_rows<BITS, 7>, vnni_rows<BITS, 8>};
  return table[rows - 1];
}

constexpr int64_t kRowBytes = 256 << 10;  // codes that stay in L2 while a block of 16 outputs passes over them

void product_q(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  const int64_t M = x.M, runs = w.group_size / 32;
  int32_t* sums = (int32_t*)scratch(4, M * w.groups * 4);
  for (int64_t m = 0; m < M; m++) {
    for (int64_t g = 0; g < w.groups; g++) {
      int32_t sum = 0;
      for (int64_t r = 0; r < runs; r++) sum += x.sums[m * (x.Kp / 32) + g * runs + r];
      sums[m * w.groups + g] = sum;
    }
  }
  const auto function = w.bits == 4 ? rows_function<4> : rows_function<8>;
  if (M <= 8) {
    if (M > 0) function(M)(w, x, out, sums, 0, block_begin, block_end);
    return;
  }
  int64_t step = kRowBytes / x.Kp / 8 * 8;
  if (step < 8) step = 8;
  for (int64_t m0 = 0; m0 < M; m0 += step) {
    const int64_t end = m0 + step < M ? m0 + step : M;
    for (int64_t b = block_begin; b < block_end; b++) {
      for (int64_t m = m0; m < end; m += 8) {
        const int64_t rows = end - m < 8 ? end - m : 8;
        function(rows)(w, x, out, sums, m, b, b + 1);
      }
    }
  }
}

}  // namespace

const Isa vnni_isa = {"avx512_vnni", quantize_avx512, product_q, product_f_avx512};

}  // namespace qpass
