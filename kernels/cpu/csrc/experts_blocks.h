// Blocks: the packed weights of all experts for one of their two products, checked, and the block of any one expert.
#pragma once
#include <cstdint>

#include "abi.h"
#include "convert.h"

namespace qpass {
namespace {

// The weights of one of the two products, of all experts.
struct Blocks {
  Weight first;
  Output out;
  int64_t bias_bytes;

  Weight of(int64_t e) const {
    Weight w = first;
    const int64_t per_group = e * w.Np * w.groups;
    w.q += e * w.Np * w.Kp * w.bits / 8;
    w.scale = (const char*)w.scale + per_group * bytes_of(w.scale_dtype);
    if (w.zero_point) w.zero_point += per_group;
    if (w.colsum) w.colsum += e * w.Np;
    return w;
  }
};

const char* read_blocks(const qp_weight& w, int64_t E, int64_t N, int64_t K, int32_t activation, Blocks& blocks) {
  if (w.bits != 4 && w.bits != 8) return "bits must be 4 or 8";
  if (w.scale_dtype < 0 || w.scale_dtype > 2 || w.bias_dtype < 0 || w.bias_dtype > 2) return "unknown dtype";
  const int64_t Np = padded(N, 32), Kp = padded(K, 64), G = w.groups;
  if (w.N != N) return "another number of outputs than the experts have";
  if (G < 1 || G > K || (G > 1 && (K % G != 0 || K / G % 32 != 0)))
    return "groups must divide K into multiples of 32, or be 1";
  if (K / G >= 1 << 17) return "more than 131071 inputs in one group could overflow int32";
  if (!w.q || w.q_bytes != E * (Np * Kp * w.bits / 8)) return "qweight has the wrong size";
  if (!w.scale || w.scale_bytes != E * Np * G * bytes_of((DType)w.scale_dtype)) return "scale has the wrong size";
  if (w.zero_point && w.zero_point_bytes != E * Np * G) return "zero_point has the wrong size";
  if (activation < 0 || activation > 2) return "activation must be 0, 1 or 2";
  if (activation == 2 && !w.colsum) return "asymmetric activations need colsum";
  if (w.colsum && w.colsum_bytes != E * Np * 4) return "colsum has the wrong size";
  const int64_t bias_bytes = N * bytes_of((DType)w.bias_dtype);
  if (w.bias && w.bias_bytes != E * bias_bytes) return "bias has the wrong size";
  blocks.first = {(const uint8_t*)w.q, w.scale, (const int8_t*)w.zero_point, (const float*)w.colsum, N, K, Np, Kp, G,
                  G == 1 ? Kp : K / G, w.bits, (DType)w.scale_dtype};
  blocks.out = {nullptr, N, DType::f32, w.bias, (DType)w.bias_dtype};
  blocks.bias_bytes = bias_bytes;
  return nullptr;
}

}  // namespace
}  // namespace qpass
