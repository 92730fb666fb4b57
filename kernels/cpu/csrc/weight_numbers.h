// Numbers of a weight: how the float types are read, and what a scale becomes once it is stored.
#pragma once
#include <cstdint>

#include "convert.h"

namespace qpass {

struct Half {
  uint16_t h;
};

static inline uint32_t bits_at(const float* w, int64_t i) { return bits_of(w[i]); }
static inline uint32_t bits_at(const uint16_t* w, int64_t i) { return (uint32_t)w[i] << 16; }
static inline uint32_t bits_at(const Half* w, int64_t i) { return bits_of(from_f16(w[i].h)); }

// NaN and Inf count as 0: whoever does not want that has refused them before.
static inline uint32_t finite(uint32_t u) { return (u & 0x7f800000u) == 0x7f800000u ? 0 : u; }

// Whether all of them are numbers.
template <class T>
static inline bool all_finite(const T* w, int64_t size) {
  uint32_t most = 0;
  for (int64_t i = 0; i < size; i++) {
    const uint32_t u = bits_at(w, i) & 0x7fffffffu;
    most = u > most ? u : most;
  }
  return most < 0x7f800000u;
}

// The largest magnitude of any number of weights, as the bits of a float. NaN and Inf count as 0, or AS_THEY_ARE: as larger
// than every number.
template <bool AS_THEY_ARE = false, class T>
static inline uint32_t largest_plain(const T* w, int64_t size) {
  uint32_t most = 0;
  for (int64_t i = 0; i < size; i++) {
    const uint32_t u = (AS_THEY_ARE ? bits_at(w, i) : finite(bits_at(w, i))) & 0x7fffffffu;
    most = u > most ? u : most;
  }
  return most;
}

// A number as it will be read back once stored in `dtype`; what is too large is the largest.
static inline float rounded_to(float s, DType dtype) {
  static constexpr float most[] = {3.40282347e38f, 3.38953139e38f, 65504.0f};
  const float stored = s < most[(int)dtype] ? s : most[(int)dtype];
  return dtype == DType::bf16 ? from_bf16(to_bf16(stored)) : dtype == DType::f16 ? from_f16(to_f16(stored)) : stored;
}

static inline float eps_of(DType dtype) {
  static constexpr float eps[] = {1.1920929e-7f, 0.0078125f, 0.0009765625f};
  return eps[(int)dtype];
}

// A scale of integers: not zero, unless all its weights are, and then eps.
static inline float storable(float s, DType dtype) {
  static constexpr float tiny[] = {1.17549435e-38f, 1.17549435e-38f, 6.103515625e-5f};
  const float stored = rounded_to(s, dtype);
  return stored != 0 ? stored : s == 0 ? eps_of(dtype) : tiny[(int)dtype];
}

}  // namespace qpass
