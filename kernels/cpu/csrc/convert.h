// Conversions between float and the 16-bit float types, in plain C, rounding to nearest even as torch does.
#pragma once
#include <cstdint>
#include <cstring>

#include "product.h"

namespace qpass {

static inline uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

static inline uint16_t to_bf16(float f) {
  uint32_t u = bits_of(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // the one NaN that torch writes
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  float small = (float)fraction * 5.9604644775390625e-8f;  // 2^-24, exact
  return sign ? -small : small;
}

static inline uint16_t to_f16(float f) {
  uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the fraction, rounded, in the low bits
    float shifted = float_of(magnitude) + 0.5f;
    return (uint16_t)(sign | (bits_of(shifted) - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float load_float(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return ((const float*)p)[i];
    case DType::bf16: return from_bf16(((const uint16_t*)p)[i]);
    default: return from_f16(((const uint16_t*)p)[i]);
  }
}

static inline void store_float(void* p, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::f32: ((float*)p)[i] = value; break;
    case DType::bf16: ((uint16_t*)p)[i] = to_bf16(value); break;
    default: ((uint16_t*)p)[i] = to_f16(value);
  }
}

static inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace qpass
