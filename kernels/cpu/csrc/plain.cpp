// Plain C: the product for any x86 (and for reading); one output at a time, the same sums as every instruction set.
#include <cmath>
#include <cstdint>

#include "convert.h"
#include "product.h"

namespace qpass {
namespace {

constexpr float kEps = 1e-10f;

int8_t code(float value, float low, float high) {
  if (!(value == value)) return 0;  // NaN: the row's scale is NaN or Inf, so the output is not finite either
  return (int8_t)(value < low ? low : value > high ? high : value);
}

void quantize(const void* x, DType dtype, int64_t M, int64_t K, int64_t Kp, bool asymmetric, int8_t* q, float* scale,
              float* zero_point, int32_t* sums) {
  for (int64_t m = 0; m < M; m++, q += Kp, sums += Kp / 32) {
    float low = 0, high = 0, nan = 0;
    for (int64_t k = 0; k < K; k++) {
      float v = load_float(x, dtype, m * K + k);
      if (v != v) nan = v;
      if (v < low) low = v;
      if (v > high) high = v;
    }
    float s, zp = 0;
    if (asymmetric) {
      float range = high - low;
      s = (range > kEps ? range : kEps) / 255 + nan;
      zp = -128 - rintf(low / s);
      zero_point[m] = zp;
    } else {
      float amax = -low > high ? -low : high;
      s = (amax > kEps ? amax : kEps) / 127 + nan;
    }
    scale[m] = s;
    for (int64_t k = 0; k < K; k++) {
      float v = rintf(load_float(x, dtype, m * K + k) / s);
      q[k] = asymmetric ? code(v + zp, -128, 127) : code(v, -127, 127);
    }
    for (int64_t k = K; k < Kp; k++) q[k] = 0;
    for (int64_t i = 0; i < Kp / 32; i++) {
      sums[i] = 0;
      for (int64_t k = 0; k < 32; k++) sums[i] += q[i * 32 + k];
    }
  }
}

// The integer weight of column n (within its block of 16) and input k.
inline int weight_at(const Weight& w, int64_t block, int64_t n, int64_t k) {
  const int64_t line = k % 64 / 4, byte = n * 4 + k % 4;
  if (w.bits == 8) return w.q[((block * (w.Kp / 64) + k / 64) * 16 + line) * 64 + byte] - 128;
  const uint8_t both = w.q[((block * (w.Kp / 64) + k / 64) * 8 + line % 8) * 64 + byte];
  return (line < 8 ? both & 15 : both >> 4) - 8;
}

inline void finish(const Output& out, int64_t m, int64_t n, float y) {
  if (out.bias) y += load_float(out.bias, out.bias_dtype, n);
  store_float(out.data, out.dtype, m * out.ld + n, y);
}

// Integer scales: the exact sum over the row, each run of inputs times its multiplier.
int32_t whole_row(const Weight& w, const int8_t* codes, int64_t block, int64_t column) {
  const int64_t size = inner_size(w);
  uint32_t total = 0;  // unsigned: buffers that hold other multipliers than product.h allows may wrap around
  for (int64_t g = 0; g < w.multipliers; g++) {
    int32_t sum = 0;
    for (int64_t k = g * size; k < (g + 1) * size; k++) sum += (int32_t)codes[k] * weight_at(w, block, column, k);
    total += (uint32_t)sum * (uint32_t)w.multiplier[(block * w.multipliers + g) * 16 + column];
  }
  return (int32_t)total;
}

void product_q(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  for (int64_t n = block_begin * 16; n < block_end * 16 && n < w.N; n++) {
    const int64_t block = n / 16, column = n % 16;
    for (int64_t m = 0; m < x.M; m++) {
      float y = 0;
      for (int64_t g = 0; g < w.groups; g++) {
        const int64_t at = (block * w.groups + g) * 16 + column;
        const int zp = w.zero_point ? w.zero_point[at] : 0;
        int32_t sum = w.multiplier ? whole_row(w, x.q + m * x.Kp, block, column) : 0;
        for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size && !w.multiplier; k++)
          sum += (int32_t)x.q[m * x.Kp + k] * weight_at(w, block, column, k);
        for (int64_t i = g * w.group_size / 32; i < (g + 1) * w.group_size / 32; i++)
          sum -= zp * x.sums[m * (x.Kp / 32) + i];
        y += (float)sum * load_float(w.scale, w.scale_dtype, at);
      }
      if (x.zero_point) y -= x.zero_point[m] * w.colsum[n];
      finish(out, m, n, y * x.scale[m]);
    }
  }
}

void product_f(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  for (int64_t n = block_begin * 16; n < block_end * 16 && n < w.N; n++) {
    const int64_t block = n / 16, column = n % 16;
    for (int64_t m = 0; m < x.M; m++) {
      float y = 0;
      for (int64_t g = 0; g < w.groups; g++) {
        const int64_t at = (block * w.groups + g) * 16 + column;
        const int zp = w.zero_point ? w.zero_point[at] : 0;
        float sum = 0;
        for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; k++)
          sum += x.x[m * x.Kp + k] * (float)(weight_at(w, block, column, k) - zp);
        y += sum * load_float(w.scale, w.scale_dtype, at);
      }
      finish(out, m, n, y);
    }
  }
}

}  // namespace

const Isa plain_isa = {"plain", quantize, product_q, product_f, false};

}  // namespace qpass
