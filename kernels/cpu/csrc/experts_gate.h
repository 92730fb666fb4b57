// What an expert computes between its two products, on float32.
//
// SiLU takes four numbers at a time, eight with AVX2 (experts_silu_avx2.h), with the operations of one in their order: bits
// depend neither on the machine nor on where a row ends. GCC makes no vectors of it, for it keeps comparisons as branches.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "experts.h"
#include "experts_silu_avx2.h"

namespace qpass {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

inline int32_t as_int(float f) { return (int32_t)bits_of(f); }
inline FourInts as_int(Four f) { return (FourInts)f; }
inline float as_float(int32_t i) { return float_of((uint32_t)i); }
inline Four as_float(FourInts i) { return (Four)i; }

// v, or `bound` where v is beyond it; NaN stays.
template <typename F>
inline F at_least(F v, float bound) {
  const F end = F{} + bound;
  return v < end ? end : v;
}
template <typename F>
inline F at_most(F v, float bound) {
  const F end = F{} + bound;
  return v > end ? end : v;
}

// e^x to about one unit in the last place; NaN stays, the ends saturate to 0 and infinity.
template <typename F>
inline F fast_exp(F x) {
  const F v = at_most(at_least(x, -104.f), 89.f);
  const F shifted = v * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer in the low mantissa bits
  const F n = shifted - 12582912.f;
  const F r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f;
  p = p + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.f;
  // 2^n in two factors, so that neither overflows nor becomes subnormal before the product does.
  const auto power = as_int(shifted) - as_int(12582912.f), half = power / 2;
  return p * as_float((half + 127) << 23) * as_float((power - half + 127) << 23);
}

template <typename F>
inline F sigmoid(F x) {
  return 1.f / (1.f + fast_exp(-x));
}

inline float gate_function(int32_t function, float g, float alpha) {
  switch (function) {
    case kSilu: return g * sigmoid(alpha * g);
    case kGelu: return 0.5f * g * (1.f + erff(g * 0.70710678f));
    case kGeluTanh: return 0.5f * g * (1.f + tanhf(0.79788456f * (g + 0.044715f * g * g * g)));
    case kRelu: return g < 0.f ? 0.f : g;
    case kRelu2: return g < 0.f ? 0.f : g * g;
    case kSigmoid: return sigmoid(g);
    case kTanh: return tanhf(g);
    default: return g;
  }
}

// y [2I] (gate, then up) or [I] -> h [I]; h may be y.
template <int FUNCTION>
void gate_row(const qp_gate& gate, const float* y, int64_t I, float* h) {
  const float limit = gate.limit, bound = gate.up_limit, shift = gate.shift, alpha = gate.alpha;
  if (!gate.gated) {
    for (int64_t i = 0; i < I; i++) h[i] = gate_function(FUNCTION, y[i] > limit ? limit : y[i], alpha);
    return;
  }
  const float* up = y + I;
  int64_t i = FUNCTION == kSilu && has_eights() ? silu_eights(gate, y, I, h) : 0;
  for (; FUNCTION == kSilu && i + 4 <= I; i += 4) {
    Four g, u;
    memcpy(&g, y + i, 16);
    memcpy(&u, up + i, 16);
    g = at_most(g, limit), u = at_least(at_most(u, bound), -bound);
    g = g * sigmoid(alpha * g) * (u + shift);
    memcpy(h + i, &g, 16);
  }
  for (; i < I; i++) {
    const float g = y[i] > limit ? limit : y[i];
    float u = up[i] > bound ? bound : up[i];
    u = u < -bound ? -bound : u;
    h[i] = gate_function(FUNCTION, g, alpha) * (u + shift);
  }
}

inline void apply_gate(const qp_gate& gate, const float* y, int64_t I, float* h) {
  switch (gate.function) {
    case kSilu: return gate_row<kSilu>(gate, y, I, h);
    case kGelu: return gate_row<kGelu>(gate, y, I, h);
    case kGeluTanh: return gate_row<kGeluTanh>(gate, y, I, h);
    case kRelu: return gate_row<kRelu>(gate, y, I, h);
    case kRelu2: return gate_row<kRelu2>(gate, y, I, h);
    case kSigmoid: return gate_row<kSigmoid>(gate, y, I, h);
    case kTanh: return gate_row<kTanh>(gate, y, I, h);
    default: return gate_row<kIdentity>(gate, y, I, h);
  }
}

}  // namespace
}  // namespace qpass
