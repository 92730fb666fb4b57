// The C ABI of a layer of experts: routing in, weighted sums out; see kernels/reference/experts.py for the meaning.
#pragma once
#include <cstdint>

#include "abi.h"

extern "C" {

// limit and up_limit are infinite where there is none. Functions have qpass::GateFunction's numbers.
struct qp_gate {
  int32_t function, gated;
  float alpha, limit, up_limit, shift;
};

// The activation: codes with scales (and zero points), or floats of x_dtype when `codes` is null.
struct qp_tokens {
  const void* x;
  const int8_t* codes;
  const float *scale, *zero_point;
  const int64_t* index;  // [T, places]; outside 0 .. experts - 1 adds nothing
  const float* weight;   // [T, places]
  void* out;             // [T, hidden]
  int64_t T, places;
  int32_t x_dtype, out_dtype;
};

// Each field of `up` and `down` holds all experts' blocks one after the other; their `out` is not used. `activation`
// and `down_activation` are as in qp_linear.
int32_t qp_experts(int32_t isa, const qp_tokens* tokens, int64_t experts, int64_t hidden, int64_t intermediate,
                   const qp_gate* gate, const qp_weight* up, int32_t activation, const qp_weight* down,
                   int32_t down_activation, int32_t threads);

}  // extern "C"

namespace qpass {

enum GateFunction : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSigmoid, kTanh, kIdentity };

}  // namespace qpass
