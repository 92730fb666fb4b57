// AVX512-VNNI: integer products for few rows (and any number where there is no AMX), float products in float32.
//
// What the blocking rests on, measured on a 2-core Sapphire Rapids Xeon:
// - The weight is the unsigned operand of vpdpbusd and x the signed one, broadcast from memory four codes at a time: no
//   offset on x and no compensation per column; the weight's offset costs one subtraction of 8 * sum(x) a group.
// - The high nibble is used un-shifted (16 * weight) with an accumulator of its own, shifted by 4 once per group: two
//   ANDs and two vpdpbusd per 64 bytes and row. This runs at twice DRAM speed up to 4 rows, and at DRAM speed at 8.
// - 8 rows at once: 16 accumulators and 3 operands stay in registers; where there is AMX, it takes more than 4.
// - Up to 4 rows, four blocks of 16 outputs at once, from four places of the weight: one core asks memory for more that
//   way, 1.12 to 1.25 times the bytes a second of one place (4 bits). From row 5 on the registers do not suffice.
// - A prefetch 1 KB ahead of each line, and another 4 KB ahead into L2 but for four places of 4 bits.
//
// |code * weight * 16| <= 240 * 128, so int32 sums are exact for groups of up to 131072 inputs.
// With integer scales more than 8 rows read panels whose weights were multiplied once for all of them.
// Row i's arithmetic does not depend on how many rows are processed together.
#include "vnni_block.h"
#include "avx512_float.h"
#include "avx512_multiplied.h"
#include "avx512_quantize.h"
#include "scratch.h"

namespace qpass {
namespace {

using RowsFunction = void (*)(const Weight&, const QuantRows&, const Output&, const int32_t*, const uint8_t*, int64_t,
                              int64_t, int64_t);

template <int BITS, bool INTEGER = false>
RowsFunction rows_function(int64_t rows) {
  static constexpr RowsFunction table[8] = {
      vnni_rows<BITS, 1, INTEGER>, vnni_rows<BITS, 2, INTEGER>, vnni_rows<BITS, 3, INTEGER>, vnni_rows<BITS, 4, INTEGER>,
      vnni_rows<BITS, 5, INTEGER>, vnni_rows<BITS, 6, INTEGER>, vnni_rows<BITS, 7, INTEGER>, vnni_rows<BITS, 8, INTEGER>};
  return table[rows - 1];
}

constexpr int64_t kRowBytes = 256 << 10;  // codes that stay in L2 while blocks of outputs pass over them

// The sums of codes of `groups` runs of inputs a row.
int32_t* sums_of(const QuantRows& x, int64_t groups, int64_t size) {
  int32_t* sums = (int32_t*)scratch(4, x.M * groups * 4);
  for (int64_t m = 0; m < x.M; m++) {
    for (int64_t g = 0; g < groups; g++) {
      int32_t sum = 0;
      for (int64_t r = 0; r < size / 32; r++) sum += x.sums[m * (x.Kp / 32) + g * (size / 32) + r];
      sums[m * groups + g] = sum;
    }
  }
  return sums;
}

void product_q(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  const int64_t M = x.M;
  const bool panels = w.multiplier && M > 8;
  // A panel holds bytes for which all that is left of the scales is one a row: a weight of 8 bits a channel.
  const int32_t* sums = panels ? sums_of(x, 1, x.Kp) : sums_of(x, inner_groups(w), inner_size(w));
  const auto function = w.bits == 8 || panels ? rows_function<8> : w.multiplier ? rows_function<4, true> : rows_function<4>;
  const int64_t block_bytes = w.Kp / 64 * w.bits * 128;
  if (M <= 8) {
    if (M > 0) function(M)(w, x, out, sums, w.q + block_begin * block_bytes, 0, block_begin, block_end);
    return;
  }
  constexpr int64_t kBlocks = streams_of(1);
  uint8_t* panel = panels ? (uint8_t*)scratch(5, kBlocks * w.Kp * 16) : nullptr;
  int64_t step = kRowBytes / x.Kp / 8 * 8;
  if (step < 8) step = 8;
  for (int64_t m0 = 0; m0 < M; m0 += step) {
    const int64_t end = m0 + step < M ? m0 + step : M;
    for (int64_t b = block_begin; b < block_end; b += kBlocks) {
      const int64_t last = b + kBlocks < block_end ? b + kBlocks : block_end;
      for (int64_t i = b; i < last && panels; i++)
        unpack_multiplied(w, i, 0, w.Kp / 64, 128, panel + (i - b) * w.Kp * 16);
      const uint8_t* first = panels ? panel : w.q + b * block_bytes;
      for (int64_t m = m0; m < end; m += 8) {
        const int64_t rows = end - m < 8 ? end - m : 8;
        function(rows)(w, x, out, sums, first, m, b, last);
      }
    }
  }
}

}  // namespace

const Isa vnni_isa = {"avx512_vnni", quantize_avx512, product_q, product_f_avx512, false};

}  // namespace qpass
