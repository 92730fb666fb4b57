// What every instruction set implements: one product of quantized (or float) rows with a slice of a packed weight.
//
// Packed weight ("x86_tile64"), one format for every instruction set, decode and prefill:
//   N is padded to Np, a multiple of 32, and K to Kp, a multiple of 64; padding holds the code of weight 0.
//   4 bits: q is [Np/16][Kp/64][8][64] bytes. In line r of a block, byte b belongs to output n = b/4 and holds
//           k = 4*r + b%4 in its low nibble and k = 32 + 4*r + b%4 in its high nibble, each as weight + 8 (0..15).
//           So a line holds 16 outputs x 4 inputs twice, and the block is a 16 x 64 AMX B tile halved.
//   8 bits: q is [Np/16][Kp/64][16][64] bytes, byte b of line r is output b/4, input 4*r + b%4, as weight + 128 (0..255).
//   scale      [Np/16][G][16] in scale_dtype (1 for padded outputs)
//   zero_point [Np/16][G][16] int8 (0 for padded outputs), null when symmetric
//   colsum     [Np] float, sum over k of (q - zero_point) * scale: only for asymmetric activations, else null
// Integer scales (symmetric 4 bits): scale[n][g] = multiplier[n][g] * channel[n]. One int8 buffer [Np/16][G + 5][16] then
// holds, one after the other, channel [Np] float, Np bytes of which the first is the dtype that the scales had, and
// multiplier [Np/16][G][16], -15..15. Kernels see one group a row, scaled by `channel`, and add
// multiplier * (sum of the inputs that share it) in int32: |sum| <= 15 * 8 * 128 * K < 2^31 for K < 2^17.
// G = groups, group_size = K / G. Native kernels take group sizes that are multiples of 32, or one group per row
// (then any K: group_size is set to Kp).
//
// Invariants every implementation keeps: exact int32 sums within a group; group results are scaled and added in
// float32 in ascending order of groups; the result of a row does not depend on the other rows, nor on how n is split.
#pragma once
#include <cstdint>

namespace qpass {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct Weight {
  const uint8_t* q;
  const void* scale;
  const int8_t* zero_point;
  const float* colsum;
  int64_t N, K, Np, Kp, groups, group_size;
  int32_t bits;
  DType scale_dtype;
  const int8_t* multiplier = nullptr;  // only with integer scales; then groups is 1
  int64_t multipliers = 0;             // of a row, each for K / multipliers inputs, a multiple of 32
};

// Runs of inputs whose codes are summed before anything else happens to the sum: groups, or those of one multiplier.
inline int64_t inner_groups(const Weight& w) { return w.multiplier ? w.multipliers : w.groups; }
inline int64_t inner_size(const Weight& w) { return w.multiplier ? w.K / w.multipliers : w.group_size; }

// Rows quantized to int8. Row m starts at q + m * Kp; bytes K..Kp are 0. q may be null where there are tiles.
struct QuantRows {
  const int8_t* q;
  const float* scale;       // [M]
  const float* zero_point;  // [M], integers in float; null when symmetric
  const int32_t* sums;      // [M][Kp/32]: sum of each run of 32 codes, which every group sum is made of
  int64_t M, Kp;
  const int8_t* tiles = nullptr;  // the codes as `Isa::tile_rows` arranges them, or null
};

// `QuantRows::sums` of one row.
inline void sum_runs(const int8_t* q, int64_t Kp, int32_t* sums) {
  for (int64_t run = 0; run < Kp / 32; run++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < 32; k++) sum += q[run * 32 + k];
    sums[run] = sum;
  }
}

// Rows left in float, converted to float32. Row m starts at x + m * Kp; values K..Kp are 0.
// Every value is the exact sum of `bf16_parts` bf16 values, as far as those reach: 1 when it came from bf16, 2 from f16.
// An instruction set with `any_rows` reads `raw` alone: rows of `width` numbers of `dtype`, to which the others are 0.
struct FloatRows {
  const float* x;
  int64_t M, Kp;
  int32_t bf16_parts = 3;
  const void* raw = x;
  DType dtype = DType::f32;
  int64_t width = Kp;
};

// out[m * ld + n] = dtype(row m . weight n * scales + bias[n]) for n in [16 * block_begin, 16 * block_end), n < N.
struct Output {
  void* data;
  int64_t ld;
  DType dtype;
  const void* bias;  // [N] in bias_dtype, or null
  DType bias_dtype;
};

// One instruction set. Every function may be called from several threads at once on disjoint block ranges.
// Block ranges that the driver makes are even numbers of 16-column blocks (32 columns) but for nothing: Np % 32 == 0.
struct Isa {
  const char* name;
  // x [M][ld] of dtype -> codes, scales, (zero points), sums; `asymmetric` chooses the formula. K..Kp is zero-filled.
  // `sums` may be null where tile_rows is not.
  void (*quantize)(const void* x, DType dtype, int64_t M, int64_t K, int64_t Kp, bool asymmetric, int8_t* q,
                   float* scale, float* zero_point, int32_t* sums);
  void (*product_q)(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin, int64_t block_end);
  void (*product_f)(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end);
  bool any_rows = false;
  // Rows [begin, end) of M rows of codes, of which q is row `begin`, into the arrangement that product_q wants, and the
  // bytes which that takes (0: for so few rows it wants none); null where it takes rows as they are. Several threads may
  // arrange rows at once.
  void (*tile_rows)(const int8_t* q, int64_t M, int64_t Kp, int64_t begin, int64_t end, int8_t* tiles) = nullptr;
  int64_t (*tile_bytes)(int64_t M, int64_t Kp) = nullptr;
};

extern const Isa plain_isa, avx2_isa, vnni_isa, amx_isa;

}  // namespace qpass
