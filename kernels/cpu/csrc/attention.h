// Attention over keys and values in float: what one call is, between its C ABI and its kernel.
#pragma once
#include <cstdint>

#include "abi.h"

namespace qpass {

// Rows of a block are ordered by query first, then by head: row r is head r % shared of those that share the keys'
// head, query r / shared. `shared` = Hq / Hkv.
struct FloatAttention {
  int64_t B, Hq, Hkv, M, S, D, Dv, shared;
  DType dtype;
  qp_rows q, k, v, mask;  // mask.token steps from query to query
  int32_t mask_dtype;     // 0 none, 1 bytes (0 hides), else 2 + DType, to be added
  bool causal;            // query m sees the keys up to m
  float scale;
  void* out;              // [B, M, Hq, Dv]
};

constexpr int64_t kRowBlock = 32;  // rows that meet the keys together
constexpr int64_t kChunk = 256;    // keys whose softmax is one piece; pieces are joined in ascending order, by whomever

// A softmax that is under way, for the rows of a block: the largest score, the sum of exp(score - most), and the sum of
// the values by those weights, [rows][Dv]. Nothing was seen yet where most is -inf; total and sum are then not set.
struct Piece {
  float *most, *total, *sum;
};

inline int64_t piece_floats(int64_t Dv) { return kRowBlock * (Dv + 2); }
inline Piece piece_at(float* p) { return {p, p + kRowBlock, p + 2 * kRowBlock}; }
inline int64_t work_floats(const FloatAttention& c) { return kRowBlock * (c.D + kChunk); }

// The rows [first, first + count) of one head of keys of one sequence; work holds work_floats.
struct Block {
  int64_t b, h, first, count;
  float* work;
};

// What an instruction set gives: scaled queries into a block's work space; the softmax of one chunk of keys; a piece
// joined to those before it; outputs.
struct FloatSteps {
  void (*begin)(const FloatAttention& c, const Block& block);
  void (*chunk)(const FloatAttention& c, const Block& block, int64_t from, const Piece& out);
  void (*join)(const FloatAttention& c, const Block& block, const Piece& into, const Piece& one);
  void (*finish)(const FloatAttention& c, const Block& block, const Piece& piece);
};
extern const FloatSteps float_attention_avx2, float_attention_avx512;

}  // namespace qpass
