// What keys and values of attention are stored as.
#pragma once
#include "abi.h"

namespace qpass {

// The codes of a quantized cache; then numbers: float32, which rows that were decoded to memory are too, and 16 bits.
enum Kind { kInt8 = 0, kFp8 = 1, kInt4 = 2, kFloat = 3, kBf16 = 4, kF16 = 5 };

// Of one element, a byte of int4's that holds two; and of a row of `size` numbers.
constexpr int64_t bytes_of(int kind) { return kind == kFloat ? 4 : kind >= kBf16 ? 2 : 1; }
constexpr int64_t row_bytes(int kind, int64_t size) { return kind == kInt4 ? size / 2 : size * bytes_of(kind); }

}  // namespace qpass
