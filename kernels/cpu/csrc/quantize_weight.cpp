// Weight quantization: a float weight [N, K] in, integers with their scales and zero points out, rounded to nearest,
// in canonical form or packed at once. The same operations in the same precision as qpass/weight.py, so integers, scales and zero points agree bit for bit.
#include <cmath>
#include <cstdint>

#include "abi.h"
#include "convert.h"
#include "pack_tile.h"
#include "scratch.h"

namespace qpass {

const Isa* available_isa(int32_t isa);

namespace {

struct Job {
  int64_t group_size;
  float qmin, qmax;
  bool symmetric;
  DType dtype;
};

inline uint32_t bits_at(const float* w, int64_t i) { return bits_of(w[i]); }
inline uint32_t bits_at(const uint16_t* w, int64_t i) { return (uint32_t)w[i] << 16; }

struct Half {
  uint16_t h;
};
inline uint32_t bits_at(const Half* w, int64_t i) { return bits_of(from_f16(w[i].h)); }

// NaN and Inf count as 0: whoever does not want that has refused them before.
inline uint32_t finite(uint32_t u) { return (u & 0x7f800000u) == 0x7f800000u ? 0 : u; }

// Floats in the order of these integers; unlike a maximum of floats, one of integers becomes vector code.
inline int32_t ordered(uint32_t u) { return (int32_t)(u ^ (uint32_t)((int32_t)u >> 31 & 0x7fffffff)); }
inline float number_of(int32_t order) { return float_of((uint32_t)(order ^ (order >> 31 & 0x7fffffff))); }

// A scale as it will be read back: rounded to the stored dtype, finite, and not zero.
inline float storable(float s, DType dtype) {
  const float most[] = {3.40282347e38f, 3.38953139e38f, 65504.0f};
  const float eps[] = {1.1920929e-7f, 0.0078125f, 0.0009765625f}, tiny[] = {1.17549435e-38f, 1.17549435e-38f, 6.103515625e-5f};
  const int d = (int)dtype;
  float stored = s < most[d] ? s : most[d];
  if (dtype == DType::bf16) stored = from_bf16(to_bf16(stored));
  if (dtype == DType::f16) stored = from_f16(to_f16(stored));
  return stored != 0 ? stored : s == 0 ? eps[d] : tiny[d];
}

// The scale and zero point of a group whose numbers, and 0, lie between `least` and `most`.
inline void numbers_of(const Job& job, float least, float most, float& scale, float& zero_point) {
  const float range = job.symmetric ? (-least > most ? -least : most) : most - least;
  scale = storable(range / (job.symmetric ? (job.qmax - job.qmin) / 2 : job.qmax - job.qmin), job.dtype);
  zero_point = 0;
  if (job.symmetric) return;
  zero_point = job.qmin - rintf(least / scale);
  zero_point = zero_point < job.qmin ? job.qmin : zero_point > job.qmax ? job.qmax : zero_point;
}

template <class T>
__attribute__((always_inline)) inline void quantize_group(const Job& job, const T* __restrict w,
                                                          int8_t* __restrict q, float& scale,
                                                          float& zero_point) {
  int32_t low = 0, high = 0;  // the order of 0.0f: zero belongs to every asymmetric range, and bounds every |w| below
  const int64_t size = job.group_size;
  for (int64_t i = 0; i < size; i++) {
    const int32_t at = ordered(finite(bits_at(w, i)));
    low = at < low ? at : low;
    high = at > high ? at : high;
  }
  float s, zp;
  numbers_of(job, low < 0 ? number_of(low) : 0, number_of(high), s, zp);
  // clamp(round(v) + zp, qmin, qmax), in an order that becomes vector code: the bounds are integers, so clamping first
  // changes nothing, and a number below 2^22 is rounded, half to even, by adding 1.5 * 2^23.
  const float first = job.qmin - zp, last = job.qmax - zp;
  for (int64_t i = 0; i < size; i++) {
    float v = float_of(finite(bits_at(w, i))) / s;
    v = v < first ? first : v;
    v = v > last ? last : v;
    v = (v + 12582912.0f) - 12582912.0f;
    q[i] = (int8_t)(int32_t)(v + zp);
  }
  scale = s;
  zero_point = zp;
}

}  // namespace
}  // namespace qpass

#include "avx2_quantize_weight.h"

namespace qpass {
namespace {

struct Plain {
  template <class T>
  static void group(const Job& job, const T* w, int8_t* q, float& s, float& zp) {
    quantize_group(job, w, q, s, zp);
  }
};

struct Avx2 {
  template <class T>
  QPASS_AVX2 static void group(const Job& job, const T* w, int8_t* q, float& s, float& zp) {
    float least, most;
    if (job.group_size % 32 || !range_of(w, job.group_size, least, most)) return quantize_group(job, w, q, s, zp);
    numbers_of(job, least, most, s, zp);
    codes_of(w, job.group_size, s, zp, job.qmin, job.qmax, q);
  }
};

template <class How, class T>
void quantize_row(const Job& job, const T* w, int64_t groups, int8_t* q, void* scale, int8_t* zero_point, int64_t first,
                  int64_t step) {
  for (int64_t g = 0; g < groups; g++) {
    float s, zp;
    How::group(job, w + g * job.group_size, q + g * job.group_size, s, zp);
    store_float(scale, job.dtype, first + g * step, s);
    if (zero_point) zero_point[first + g * step] = (int8_t)zp;
  }
}

// One row, to q, its scales `step` apart from `first`.
template <class How>
void row(const Job& job, const void* w, int64_t row, int64_t groups, int8_t* q, void* scale, int8_t* zero_point,
         int64_t first, int64_t step) {
  const int64_t at = row * groups * job.group_size;
  if (job.dtype == DType::f32)
    quantize_row<How>(job, (const float*)w + at, groups, q, scale, zero_point, first, step);
  else if (job.dtype == DType::bf16)
    quantize_row<How>(job, (const uint16_t*)w + at, groups, q, scale, zero_point, first, step);
  else
    quantize_row<How>(job, (const Half*)w + at, groups, q, scale, zero_point, first, step);
}

void pack_any(const int8_t* rows, int64_t stride, int32_t bits, uint8_t* out) { pack_tile(rows, stride, bits, out); }

// Whether one of `count` numbers of 16 bits has all bits of `mask`, as NaN and Inf have those of the exponent.
#define QPASS_ANY(name, attribute)                                            \
  attribute bool name(const void* w, int64_t count, int32_t dtype) {          \
    if (dtype == 0) {                                                         \
      int32_t any = 0;                                                        \
      for (int64_t i = 0; i < count; i++)                                     \
        any |= -((((const int32_t*)w)[i] & 0x7f800000) == 0x7f800000);        \
      return any != 0;                                                        \
    }                                                                         \
    const int16_t mask = dtype == 1 ? 0x7f80 : 0x7c00;                        \
    int16_t any = 0;                                                          \
    for (int64_t i = 0; i < count; i++)                                       \
      any |= (int16_t)(-((int16_t)(((const int16_t*)w)[i] & mask) == mask));  \
    return any != 0;                                                          \
  }
QPASS_ANY(any_plain, )
QPASS_ANY(any_avx2, __attribute__((target("avx2"))))

const char* check(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K, int64_t group_size, int32_t bits,
                  const void* q, const void* scale, const void* zero_point, int32_t symmetric) {
  if (!w || !q || !scale) return "a null pointer was given";
  if (dtype < 0 || dtype > 2) return "the weight must be float32, bfloat16 or float16";
  if (bits < 2 || bits > 8) return "bits must be 2 to 8";
  if (N < 1 || K < 1 || N > (int64_t(1) << 40) / K) return "sizes must be positive and reasonable";
  if (w_bytes != N * K * bytes_of((DType)dtype)) return "the weight does not hold N * K numbers";
  if (group_size < 1 || K % group_size) return "the group size does not divide K";
  if (!symmetric != !!zero_point) return "zero points go with asymmetric weights, and only with them";
  return nullptr;
}

}  // namespace
}  // namespace qpass

using namespace qpass;

extern "C" int32_t qp_quantize_weight(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K,
                                      int64_t group_size, int32_t bits, int32_t symmetric, int8_t* q, void* scale,
                                      int8_t* zero_point, int32_t threads) {
  if (const char* why = check(w, dtype, w_bytes, N, K, group_size, bits, q, scale, zero_point, symmetric))
    return fail("quantize_weight: %s", why);
  const float half = (float)(1 << (bits - 1));
  const Job job = {group_size, -half, half - 1, symmetric != 0, (DType)dtype};
  const auto quantize = available_isa(1) ? row<Avx2> : row<Plain>;
  const int32_t team = team_size(threads, N);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t n = 0; n < N; n++)
    quantize(job, w, n, K / group_size, q + n * K, scale, zero_point, n * (K / group_size), 1);
  return 0;
}

extern "C" int32_t qp_quantize_pack(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K,
                                    int64_t group_size, int32_t bits, int32_t symmetric, uint8_t* packed,
                                    int64_t packed_bytes, void* scale, int8_t* zero_point, int32_t threads) {
  if (const char* why = check(w, dtype, w_bytes, N, K, group_size, bits, packed, scale, zero_point, symmetric))
    return fail("quantize_pack: %s", why);
  if (bits != 4 && bits != 8) return fail("quantize_pack: bits must be 4 or 8");
  const int64_t blocks = padded(N, 32) / 16, Kp = padded(K, 64), groups = K / group_size;
  if (packed_bytes != blocks * 16 * Kp * bits / 8) return fail("quantize_pack: the packed weight has the wrong size");
  const float half = (float)(1 << (bits - 1));
  const Job job = {group_size, -half, half - 1, symmetric != 0, (DType)dtype};
  const auto quantize = available_isa(1) ? row<Avx2> : row<Plain>;
  const auto tile = available_isa(1) ? pack_tile_avx2 : pack_any;
  const int32_t team = team_size(threads, blocks);
  int32_t failed = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : failed)
  for (int64_t b = 0; b < blocks; b++) {
    int8_t* rows = nullptr;
    try {
      rows = (int8_t*)scratch(0, 16 * Kp);
    } catch (...) {
      failed++;
      continue;
    }
    for (int64_t r = 0; r < 16; r++) {
      int8_t* q = rows + r * Kp;
      const int64_t there = b * 16 + r < N ? K : 0;
      if (there) quantize(job, w, b * 16 + r, groups, q, scale, zero_point, b * groups * 16 + r, 16);
      memset(q + there, 0, (size_t)(Kp - there));
      for (int64_t g = 0; !there && g < groups; g++) {  // outputs that only pad: scale 1, zero point 0
        store_float(scale, job.dtype, (b * groups + g) * 16 + r, 1.0f);
        if (zero_point) zero_point[(b * groups + g) * 16 + r] = 0;
      }
    }
    for (int64_t j = 0; j < Kp / 64; j++) tile(rows + j * 64, Kp, bits, packed + (b * (Kp / 64) + j) * bits * 128);
  }
  return failed ? fail("quantize_pack: out of memory") : 0;
}

extern "C" int32_t qp_all_finite(const void* w, int32_t dtype, int64_t count, int32_t threads) {
  if ((!w && count) || count < 0 || dtype < 0 || dtype > 2) return fail("all_finite: a null pointer, size or dtype that cannot be");
  constexpr int64_t part = 1 << 16;
  const int64_t parts = (count + part - 1) / part;
  const int32_t team = team_size(threads, parts);
  const auto any = available_isa(1) ? any_avx2 : any_plain;
  const int64_t size = bytes_of((DType)dtype);
  int32_t bad = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(| : bad)
  for (int64_t p = 0; p < parts; p++) {
    const int64_t last = (p + 1) * part < count ? (p + 1) * part : count;
    bad |= any((const uint8_t*)w + p * part * size, last - p * part, dtype);
  }
  return bad ? 1 : 0;
}
