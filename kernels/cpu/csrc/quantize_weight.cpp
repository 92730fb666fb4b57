// Weight quantization: a float weight [N, K] in, integers with their scales and zero points out, rounded to nearest.
// The same operations in the same precision as qpass/weight.py, so integers, scales and zero points agree bit for bit.
#include <cmath>
#include <cstdint>

#include "abi.h"
#include "convert.h"

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
  const float least = low < 0 ? number_of(low) : 0, most = number_of(high);
  const float range = job.symmetric ? (-least > most ? -least : most) : most - least;
  const float s = storable(range / (job.symmetric ? (job.qmax - job.qmin) / 2 : job.qmax - job.qmin), job.dtype);
  float zp = 0;
  if (!job.symmetric) {
    zp = job.qmin - rintf(least / s);
    zp = zp < job.qmin ? job.qmin : zp > job.qmax ? job.qmax : zp;
  }
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

template <class T>
__attribute__((always_inline)) inline void quantize_row(const Job& job, const T* w, int64_t groups, int8_t* q,
                                                        void* scale, int8_t* zero_point, int64_t first) {
  for (int64_t g = 0; g < groups; g++) {
    float s, zp;
    quantize_group(job, w + g * job.group_size, q + g * job.group_size, s, zp);
    store_float(scale, job.dtype, first + g, s);
    if (zero_point) zero_point[first + g] = (int8_t)zp;
  }
}

// A row in the instruction set of every machine, and the same lines again for one that has AVX2.
#define QPASS_ROW(name, attribute)                                                                               \
  attribute void name(const Job& job, const void* w, int64_t row, int64_t groups, int8_t* q, void* scale,        \
                      int8_t* zero_point) {                                                                      \
    const int64_t K = groups * job.group_size, at = row * K;                                                     \
    if (job.dtype == DType::f32)                                                                                 \
      quantize_row(job, (const float*)w + at, groups, q + at, scale, zero_point, row * groups);                  \
    else if (job.dtype == DType::bf16)                                                                           \
      quantize_row(job, (const uint16_t*)w + at, groups, q + at, scale, zero_point, row * groups);               \
    else                                                                                                         \
      quantize_row(job, (const Half*)w + at, groups, q + at, scale, zero_point, row * groups);                   \
  }
QPASS_ROW(row_plain, )
QPASS_ROW(row_avx2, __attribute__((target("avx2"))))

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
  const auto row = available_isa(1) ? row_avx2 : row_plain;
  const int32_t team = team_size(threads, N);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t n = 0; n < N; n++) row(job, w, n, K / group_size, q, scale, zero_point);
  return 0;
}
