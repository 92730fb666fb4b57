// Weights that become float32 before they are multiplied: small floats, codebooks, integers with float offsets.
//
//   w[n][k] = value(code[n][k]) * scale[n][g] + shift[n][g],    y[m][n] = gain[n] * sum over k of x[m][k] * w[n][k]
// with g = k / group_size, a multiple of 16 or the whole row; the last group may be smaller.
//   codes   4 or 8 bits in the tiles of 16 outputs x 64 inputs of product.h, with nothing added to them
//   scale   [Np/16][groups][16] in scale_dtype (1 for padded outputs)
//   third   [Np/16][groups][16] in third_dtype, or null: Third says how it makes the shift
//   gain    [Np] float, or null for 1
//
// Where the values of a table are small integers of one unit, AVX2 makes integers of x too: in each run of 16 inputs
// x = step * i, rounded to nearest, step a power of two such that 2^21 <= |i| <= 2^22 for the largest. So i is three digits
// of 256, d[0] + 256 d[1] + 65536 d[2], what is lost is 2^-22 of the run's largest, and a run's sum is exact until it
// becomes a float. Inf and NaN make NaN of the row.
//
// Plain C and AVX2 add in one order: a chain over each run of 16 inputs, runs in ascending order within a group, groups in
// ascending order. AMX adds in the order of amx_float_product.h, in which the weight is a sum of bf16: exactly, but for
// tables that need more than two of them, of which rows of bf16 meet two, 2^-17 off at most. Every implementation has one order for any
// number of rows, so the result of a row does not depend on the other rows, nor on how n is split.
#pragma once
#include "abi.h"
#include "convert.h"

namespace qpass {

// table: 4 bits, an index into 16 floats. The others are a byte each.
enum class Code : int32_t { table, e4m3, e5m2, int8, uint8 };

// What `third` holds: an offset, shift = third; or a zero, shift = -third * scale.
enum class Third : int32_t { none, offset, zero };

// DType's numbers go on for scales and zeros of a byte.
constexpr DType kE8m0 = (DType)4, kE4m3 = (DType)5, kInt8 = (DType)6;

// table[c] = unit * (above_least[c] + least), where these are integers, above_least <= 24 and |table| <= 24 units.
struct SmallIntegers {
  bool there;
  float unit;
  int32_t least;
  uint8_t above_least[16];
};

struct Decoded {
  const uint8_t* q;
  const void *scale, *third;
  const float *table, *gain;
  int64_t N, K, Np, Kp, groups, group_size;  // group_size is Kp if there is one group
  Code code;
  Third kind;
  DType scale_dtype, third_dtype;
  SmallIntegers small;
};

// x [M][Kp] float, K..Kp zero; `sums` [M][groups] of x over each group of this weight, null unless it has shifts.
// For weights of small integers that run on AVX2: digits [M][3][Kp], and for each run [M][Kp / 16] step * unit of the weight
// and least * (sum of the integers); else null.
struct DecodedRows {
  const float *x, *sums;
  int64_t M, Kp;
  const int8_t* digits;
  const float* step;
  const int32_t* offset;
};

using DecodedProduct = void (*)(const Decoded& w, const DecodedRows& x, const Output& out, int64_t block_begin,
                                int64_t block_end);
extern const DecodedProduct decoded_plain, decoded_avx2;

// AMX, for weights that it `takes`: from rows as they came (FloatRows::raw).
struct DecodedTiles {
  bool (*takes)(const Decoded& w);
  void (*product)(const Decoded& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end);
};

// One row of x as integers: digits [3][Kp], and for each run of 16 its step and the sum of its integers.
using MakeDigits = void (*)(const float* x, int64_t Kp, int8_t* digits, float* step, int32_t* whole);
extern const MakeDigits digits_avx2;

}  // namespace qpass

extern "C" {

struct qp_decoded_weight {
  const void *q, *scale, *third, *table, *gain, *bias;
  void* out;
  int64_t q_bytes, scale_bytes, third_bytes, table_bytes, gain_bytes, bias_bytes, out_bytes;
  int64_t N, group_size, out_stride;
  int32_t code, kind, scale_dtype, third_dtype, bias_dtype, out_dtype;
};

// out = x @ weight.T + bias for each weight. x is [M, K] of x_dtype, contiguous.
int32_t qp_decoded(int32_t isa, const void* x, int32_t x_dtype, int64_t M, int64_t K, const qp_decoded_weight* weights,
                   int64_t count, int32_t threads);

}  // extern "C"
