// Codes of a quantized cache: which rows products read as they are, scales in, floats out. After attention_rows.h.
#pragma once
#include "attention_call.h"
#include "convert.h"

namespace qpass {
namespace {

// What `numbers` of a kind still have to be multiplied by, half of it: fp8 comes out 2^120 too small, which no float
// can make up for at once.
template <int kind>
constexpr float half_unit = kind == kFp8 ? 0x1p60f : 1.0f;

QPASS_VECTOR_INLINE float scale_at(const qp_cached& c, int64_t at) {
  if (c.scale_dtype == (int32_t)DType::f16) return _cvtsh_ss(((const uint16_t*)c.scale)[at]);
  return load_float(c.scale, (DType)c.scale_dtype, at);
}

// Scales of `count` rows from token t on, [groups][room], 0 where there is no row.
QPASS_VECTOR_INLINE void scales_of(const qp_cached& c, int64_t b, int64_t h, int64_t t, int64_t count, int64_t room,
                                   float* out) {
  const int64_t at = b * c.scale_batch + h * c.scale_head + t * c.scale_token;
  int64_t j = 0;
  if (c.scale_token == c.groups && (c.groups == 1 || c.scale_group == 1) && c.scale_dtype == (int32_t)DType::f16) {
    const uint8_t* scale = (const uint8_t*)c.scale;
    for (; j + kLanes <= count; j += kLanes) {
      if (c.groups == 1) {
        store(out + j, numbers<kF16, false, false>(scale, at + j));
        continue;
      }
      alignas(64) float some[kLanes];
      for (int64_t n = 0, g = 0, t = j; n < kLanes * c.groups; n += kLanes) {
        store(some, numbers<kF16, false, false>(scale, at + j * c.groups + n));
        for (int64_t i = 0; i < kLanes; i++) {
          out[g * room + t] = some[i];
          if (++g == c.groups) g = 0, t++;
        }
      }
    }
  }
  for (int64_t g = 0; g < c.groups; g++)
    for (int64_t i = j; i < room; i++)
      out[g * room + i] = i < count ? scale_at(c, at + i * c.scale_token + g * c.scale_group) : 0;
}

template <int kind>
QPASS_VECTOR void decode_row(const qp_cached& c, const uint8_t* row, int64_t scale, int64_t size, float* out) {
  constexpr bool kEight = kLanes > 8;  // groups and halves of a row are multiples of 8
  const int64_t group = size / c.groups;
  const Vector unit = all(half_unit<kind>), zero = all(kind == kInt4 ? 8 : 0);
  for (int64_t i = 0; i < size; i += 8) {
    const bool high = kind == kInt4 && i >= size / 2;
    const Vector code = high ? numbers<kind, true, kEight>(row, i - size / 2) : numbers<kind, false, kEight>(row, i);
    const Vector value = times(times(minus(code, zero), unit), unit);
    store_part<kEight>(out + i, times(value, all(scale_at(c, scale + i / group * c.scale_group))));
  }
}

// `count` rows from token t on as floats, scaled.
inline void decode_rows(int32_t kind, const qp_cached& c, int64_t b, int64_t h, int64_t t, int64_t count, int64_t size,
                        float* out) {
  const auto one = kind == kInt8 ? decode_row<kInt8> : kind == kFp8 ? decode_row<kFp8> : decode_row<kInt4>;
  for (int64_t j = t; j < t + count; j++, out += size)
    one(c, (const uint8_t*)c.codes + b * c.batch + h * c.head + j * c.token,
        b * c.scale_batch + h * c.scale_head + j * c.scale_token, size, out);
}

}  // namespace
}  // namespace qpass
