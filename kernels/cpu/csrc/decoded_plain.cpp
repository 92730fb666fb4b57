// Decoded weights in plain C, for any x86 (and for reading): one output at a time.
#include <cmath>

#include "decoded.h"

namespace qpass {
namespace {

float e4m3_of(uint8_t byte) {
  const float size = float_of((uint32_t)(byte & 127) << 20) * 0x1p120f;
  return (byte & 127) == 127 ? NAN : byte & 128 ? -size : size;
}

float e5m2_of(uint8_t byte) { return from_f16((uint16_t)(byte << 8)); }

float e8m0_of(uint8_t byte) { return byte == 255 ? NAN : byte ? float_of((uint32_t)byte << 23) : 0x1p-127f; }

float load_any(const void* p, DType dtype, int64_t i) {
  const uint8_t byte = ((const uint8_t*)p)[(int32_t)dtype > 2 ? i : 0];
  if (dtype == kE8m0) return e8m0_of(byte);
  if (dtype == kE4m3) return e4m3_of(byte);
  if (dtype == kInt8) return (int8_t)byte;
  return load_float(p, dtype, i);
}

float value_at(const Decoded& w, int64_t block, int64_t column, int64_t k) {
  const int64_t line = k % 64 / 4, byte = column * 4 + k % 4, tile = block * (w.Kp / 64) + k / 64;
  if (w.code == Code::table) {
    const uint8_t both = w.q[(tile * 8 + line % 8) * 64 + byte];
    return w.table[line < 8 ? both & 15 : both >> 4];
  }
  const uint8_t code = w.q[(tile * 16 + line) * 64 + byte];
  switch (w.code) {
    case Code::e4m3: return e4m3_of(code);
    case Code::e5m2: return e5m2_of(code);
    case Code::int8: return (int8_t)code;
    default: return code;
  }
}

void product(const Decoded& w, const DecodedRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  for (int64_t n = block_begin * 16; n < block_end * 16 && n < w.N; n++) {
    const int64_t block = n / 16, column = n % 16;
    for (int64_t m = 0; m < x.M; m++) {
      float y = 0;
      for (int64_t g = 0; g < w.groups; g++) {
        const int64_t at = (block * w.groups + g) * 16 + column;
        const int64_t end = (g + 1) * w.group_size < w.Kp ? (g + 1) * w.group_size : w.Kp;
        float total = 0;
        for (int64_t run = g * w.group_size; run < end; run += 16) {
          float sum = 0;
          for (int64_t k = run; k < run + 16; k++) sum = fmaf(x.x[m * x.Kp + k], value_at(w, block, column, k), sum);
          total += sum;
        }
        const float scale = load_any(w.scale, w.scale_dtype, at);
        y = fmaf(total, scale, y);
        if (!w.third) continue;
        const float third = load_any(w.third, w.third_dtype, at);
        const float shift = w.kind == Third::offset ? third : -third * scale;
        y = fmaf(shift, x.sums[m * w.groups + g], y);
      }
      if (w.gain) y *= w.gain[n];
      if (out.bias) y += load_float(out.bias, out.bias_dtype, n);
      store_float(out.data, out.dtype, m * out.ld + n, y);
    }
  }
}

}  // namespace

const DecodedProduct decoded_plain = product;

}  // namespace qpass
