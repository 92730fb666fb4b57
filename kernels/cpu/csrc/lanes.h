// Lanes: 8 floats, in vector code of whatever machine the function that is inlined into is compiled for.
#pragma once
#include <cstdint>

// Every function that takes or gives Lanes is inlined, so how they would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#define QPASS_INLINE __attribute__((always_inline)) static inline

namespace qpass {
namespace {

typedef float Lanes __attribute__((vector_size(32)));  // two registers of 4 where there are none of 8

QPASS_INLINE Lanes all(float v) { return Lanes{v, v, v, v, v, v, v, v}; }
QPASS_INLINE float total(const Lanes& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
QPASS_INLINE Lanes clamp(const Lanes& v, const Lanes& low, const Lanes& high) {
  const Lanes above = v < low ? low : v;
  return above > high ? high : above;
}
// Halves to even below 2^22; above, numbers stay above.
QPASS_INLINE Lanes rounded(const Lanes& v) { return (v + all(12582912.0f)) - all(12582912.0f); }

}  // namespace
}  // namespace qpass
