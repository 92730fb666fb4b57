// The library's C ABI: called by the torch shim and, through ctypes, by Python. No function throws or trusts a size.
//
// Functions return 0, or a negative number after which qp_last_error() says why (per thread).
#pragma once
#include <cstdint>

#include "product.h"

extern "C" {

// One weight, with the size of every buffer, and where its output goes: out_bytes are what lies in memory from `out` on,
// out_stride the numbers from one row to the next. dtypes are qpass::DType's numbers; 3 as scale_dtype means integer
// scales (product.h), for rounded activations only.
struct qp_weight {
  const void *q, *scale, *zero_point, *colsum, *bias;
  void* out;
  int64_t q_bytes, scale_bytes, zero_point_bytes, colsum_bytes, bias_bytes, out_bytes;
  int64_t N, groups, out_stride;
  int32_t bits, scale_dtype, bias_dtype, out_dtype;
};

const char* qp_last_error();
int32_t qp_isa_available(int32_t isa);      // 1 if this machine can run it, and the library holds it

// out = x @ weight.T + bias for each weight. x is [M, K], contiguous. activation: 0 leaves x in float, 1 rounds it to
// int8 symmetric, 2 asymmetric (then every weight needs colsum).
int32_t qp_linear(int32_t isa, const void* x, int32_t x_dtype, int64_t M, int64_t K, int32_t activation,
                  const qp_weight* weights, int64_t count, int32_t threads);

// The same for x already rounded: codes [M, K], scale [M], zero_point [M] or null.
int32_t qp_linear_q(int32_t isa, const int8_t* xq, const float* x_scale, const float* x_zero_point, int64_t M, int64_t K,
                    const qp_weight* weights, int64_t count, int32_t threads);

// x [M, K] -> codes [M, K], scale [M], zero_point [M] (null unless asymmetric), for tests.
int32_t qp_quantize(int32_t isa, const void* x, int32_t x_dtype, int64_t M, int64_t K, int8_t* q, float* scale,
                    float* zero_point);

int32_t qp_pack(const int8_t* q, int64_t q_bytes, int64_t N, int64_t K, int32_t bits, uint8_t* packed,
                int64_t packed_bytes, int32_t threads);
int32_t qp_unpack(const uint8_t* packed, int64_t packed_bytes, int64_t N, int64_t K, int32_t bits, int8_t* q,
                  int64_t q_bytes, int32_t threads);

// A float weight [N, K] -> integers q [N, K], scale [N, K / group_size] in its dtype, zero_point likewise in int8 (null if
// symmetric), rounded to nearest as qpass/weight.py says.
int32_t qp_quantize_weight(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K, int64_t group_size,
                           int32_t bits, int32_t symmetric, int8_t* q, void* scale, int8_t* zero_point, int32_t threads);

// The same and packing in one: for 4 and 8 bits as product.h says; if `decoded`, for 2 to 8 bits as decoded.h says. scale and
// zero_point are [Np / 16][G][16]. colsum, if not null: of each row, which is one group then, the sum as rounded [Np].
// finite, if not null: whether all of w is; else NaN and Inf count as 0 all the same.
int32_t qp_quantize_pack(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K, int64_t group_size,
                         int32_t bits, int32_t symmetric, int32_t decoded, uint8_t* packed, int64_t packed_bytes,
                         void* scale, int8_t* zero_point, float* colsum, int32_t* finite, int32_t threads);

// A float weight [N, K] -> codes of small floats or of a codebook, packed as decoded.h says, and scale [Np / 16][G][16], as
// the codecs of qpass/codecs make them. element: 0 e2m1, 1 e4m3, 2 e2m3 in bytes of e4m3, 3 a codebook. rule, how scales
// are made, and what it is `given`: 0 powers of two in a byte; 1 e4m3, given the tensor's scale; 2 amax / 448 in the dtype of
// w; 3 given all, [N][G]; 4, of codebooks, the largest magnitude as float, given 15 bounds and the 16 codes between them;
// 5 as 2, of blocks of group_size rows and columns.
// finite as above.
int32_t qp_encode_pack(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K, int64_t group_size,
                       int32_t element, int32_t rule, const float* given, int64_t given_count, uint8_t* packed,
                       int64_t packed_bytes, void* scale, int64_t scale_bytes, int32_t* finite, int32_t threads);

// The largest magnitude of each group of each row, [N][G]; NaN and Inf count as 0.
int32_t qp_amax(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K, int64_t group_size, float* amax,
                int32_t threads);

// Groups of weights w [N][groups][size], the importance of each column's error [groups][size] or null -> scale and, if not
// symmetric, zero_point [N][groups] as floats: of the ranges `tried` those of least error, as
// kernels/reference/range_search.py says. with_sign: scales may be negative. dtype: what scales are stored in.
int32_t qp_search_ranges(const float* w, int64_t count, int64_t N, int64_t groups, int64_t size, const float* importance,
                         int64_t importance_count, int32_t bits, int32_t symmetric, int32_t with_sign,
                         int32_t compensated, float bias_weight, const float* tried, int64_t tried_count, int32_t dtype,
                         float* scale, float* zero_point, int32_t threads);

// Columns of a weight, as rows [count][N], rounded one after another as kernels/reference/round_columns.py says. All tensors
// are contiguous float32: zero_point may be null; within and inside are [count][count], rates [count].
int32_t qp_round_columns(const float* w, const float* scale, const float* zero_point, const float* within, int64_t count,
                         int64_t N, float first, float last, float* codes, float* errors, int32_t threads);
int32_t qp_descend_columns(const float* slope, const float* codes, const float* scale, const float* inside,
                           const float* rates, int64_t count, int64_t N, float first, float last, float* moved,
                           float* steps, int32_t threads);

// Keys or values of a quantized cache: strides of codes in bytes, of scales in numbers (0 where one scale serves
// several), the sizes of both buffers, and how many scales a row of a head has.
struct qp_cached {
  const void *codes, *scale;
  int64_t batch, head, token, scale_batch, scale_head, scale_token, scale_group, bytes, scales, groups;
  int32_t scale_dtype, unused;
};

// q [B, Hq, M, D] contiguous, out [B, M, Hq, Dv]; sizes are B, Hq, Hkv, M, S, D, Dv. kind: 0 int8, 1 e4m3, 2 int4 (low
// nibbles are the first half of a row; 8 stands for 0). mask_dtype: 0 none, 1 bytes (0 hides), 2 float32 to be added;
// its strides (batch, head, row) in numbers. causal: row m sees the keys up to S - M + m. softcap 0 is none.
int32_t qp_attention(int32_t isa, const void* q, int32_t dtype, const int64_t* sizes, int32_t kind,
                     const struct qp_cached* k, const struct qp_cached* v, const void* mask, int32_t mask_dtype,
                     const int64_t* mask_strides, int64_t mask_count, int32_t causal, float scaling, float softcap,
                     void* out, int32_t threads);

// Rows of numbers, each side by side: steps from batch to batch, head to head and token to token, and how many numbers
// lie in memory from `data` on.
struct qp_rows {
  const void* data;
  int64_t batch, head, token, count;
};

// softmax(scale * q k^T + mask) v for q [B, Hq, M, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] of one dtype; out is contiguous,
// [B, M, Hq, Dv]. sizes as in qp_attention. mask_dtype: 0 none, 1 bytes (0 hides), else 2 + DType, to be added; its
// tokens are queries. causal: query m sees the keys up to m. What a mask hides is not read into any sum.
int32_t qp_float_attention(int32_t isa, const int64_t* sizes, int32_t dtype, const struct qp_rows* q, const struct qp_rows* k,
                           const struct qp_rows* v, const struct qp_rows* mask, int32_t mask_dtype, int32_t causal,
                           float scale, void* out, int64_t out_count, int32_t threads);

// The largest magnitude of `count` numbers, 0 of none; Inf or NaN if one of them is.
int32_t qp_largest(const void* w, int32_t dtype, int64_t count, float* largest, int32_t threads);

}  // extern "C"

namespace qpass {

// Sets qp_last_error() and returns -1.
int32_t fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Whether this machine can run the instruction set of that number.
bool machine_runs(int32_t isa);

// How many threads to use for `parts` independent parts: 1 inside a parallel region or in a forked child, whose
// OpenMP threads stayed in the parent.
int32_t team_size(int32_t threads, int64_t parts);

// Whether `bytes` hold M rows of N numbers of `size` bytes, `stride` numbers apart.
constexpr bool holds_rows(int64_t bytes, int64_t size, int64_t M, int64_t N, int64_t stride) {
  return stride >= N && bytes / size >= N && (bytes / size - N) / stride >= M - 1;
}

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace qpass
