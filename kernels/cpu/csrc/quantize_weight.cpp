// Weight quantization: a float weight [N, K] in, integers with their scales and zero points out, rounded to nearest,
// in canonical form or packed at once. The same operations in the same precision as qpass/weight.py, so integers, scales and zero points agree bit for bit.
#include <cmath>
#include <cstdint>

#include "abi.h"
#include "pack_tile.h"
#include "scratch.h"
#include "weight_numbers.h"

namespace qpass {
namespace {

struct Job {
  int64_t group_size;
  float qmin, qmax;
  bool symmetric;
  DType dtype;
};

// Floats in the order of these integers; unlike a maximum of floats, one of integers becomes vector code.
inline int32_t ordered(uint32_t u) { return (int32_t)(u ^ (uint32_t)((int32_t)u >> 31 & 0x7fffffff)); }
inline float number_of(int32_t order) { return float_of((uint32_t)(order ^ (order >> 31 & 0x7fffffff))); }

// The scale and zero point of a group whose numbers, and 0, lie between `least` and `most`.
inline void numbers_of(const Job& job, float least, float most, float& scale, float& zero_point) {
  const float range = job.symmetric ? (-least > most ? -least : most) : most - least;
  scale = storable(range / (job.symmetric ? (job.qmax - job.qmin) / 2 : job.qmax - job.qmin), job.dtype);
  zero_point = 0;
  if (job.symmetric) return;
  zero_point = job.qmin - rintf(least / scale);
  zero_point = zero_point < job.qmin ? job.qmin : zero_point > job.qmax ? job.qmax : zero_point;
}

// What a group's weights become: round(w / scale) + zero_point, within the bounds of the Job.
struct Group {
  float scale, zero_point;
  int32_t all_finite;
};

template <class T>
__attribute__((always_inline)) inline void numbers_plain(const Job& job, const T* __restrict w, Group& found) {
  int32_t low = 0, high = 0;  // the order of 0.0f: zero belongs to every asymmetric range, and bounds every |w| below
  for (int64_t i = 0; i < job.group_size; i++) {
    const int32_t at = ordered(finite(bits_at(w, i)));
    low = at < low ? at : low;
    high = at > high ? at : high;
  }
  found.all_finite = 0;
  numbers_of(job, low < 0 ? number_of(low) : 0, number_of(high), found.scale, found.zero_point);
}

template <class T>
__attribute__((always_inline)) inline void codes_plain(const Job& job, const T* __restrict w, const Group& group,
                                                       int8_t* __restrict q) {
  // clamp(round(v) + zp, qmin, qmax), in an order that becomes vector code: the bounds are integers, so clamping first
  // changes nothing, and a number below 2^22 is rounded, half to even, by adding 1.5 * 2^23.
  const float s = group.scale, zp = group.zero_point, first = job.qmin - zp, last = job.qmax - zp;
  for (int64_t i = 0; i < job.group_size; i++) {
    float v = float_of(finite(bits_at(w, i))) / s;
    v = v < first ? first : v;
    v = v > last ? last : v;
    v = (v + 12582912.0f) - 12582912.0f;
    q[i] = (int8_t)(int32_t)(v + zp);
  }
}

}  // namespace
}  // namespace qpass

#include "avx2_quantize_weight.h"

namespace qpass {
namespace {

struct Plain {
  template <class T>
  static void numbers(const Job& job, const T* w, int64_t groups, Group* found) {
    for (int64_t g = 0; g < groups; g++) numbers_plain(job, w + g * job.group_size, found[g]);
  }
  template <class T>
  static void codes(const Job& job, const T* w, const Group& group, int8_t* q) {
    codes_plain(job, w, group, q);
  }
};

struct Avx2 {
  template <class T>
  QPASS_AVX2 static void numbers(const Job& job, const T* w, int64_t groups, Group* found) {
    for (int64_t g = 0; g < groups;) {
      const int64_t many = g + 8 <= groups && numbers_8(job, w + g * job.group_size, found + g) ? 8 : 1;
      if (many == 1) numbers_1(job, w + g * job.group_size, found[g]);
      g += many;
    }
  }
  template <class T>
  QPASS_AVX2 static bool numbers_8(const Job& job, const T* w, Group* found) {
    if (sizeof(T) != 2 || job.group_size % 32) return false;
    __m256 least = _mm256_setzero_ps(), most;
    if (!(job.symmetric ? largest_of_8(w, job.group_size, most) : ranges_of_8(w, job.group_size, least, most))) return false;
    float scale[8], zero_point[8];
    numbers_of_8(job, w, least, most, scale, zero_point);
    for (int g = 0; g < 8; g++) found[g] = {scale[g], zero_point[g], 1};
    return true;
  }
  template <class T>
  QPASS_AVX2 static void numbers_1(const Job& job, const T* w, Group& found) {
    if (job.group_size % 32) return numbers_plain(job, w, found);
    bool all_finite;
    float least = 0, most;
    if (job.symmetric)
      most = float_of(largest16(w, job.group_size, all_finite));
    else
      all_finite = range_of(w, job.group_size, least, most);
    if (!all_finite) return numbers_plain(job, w, found);
    found.all_finite = 1;
    numbers_of(job, least, most, found.scale, found.zero_point);
  }
  template <class T>
  QPASS_AVX2 static void codes(const Job& job, const T* w, const Group& group, int8_t* q) {
    if (!group.all_finite) return codes_plain(job, w, group, q);
    codes_of(w, job.group_size, group.scale, group.zero_point, job.qmin, job.qmax, q);
  }
};

// First all scales of the row, then all codes, so that no group waits for its scale.
template <class How, class T>
void quantize_row(const Job& job, const T* w, int64_t groups, int8_t* q, void* scale, int8_t* zero_point, int64_t first,
                  int64_t step, Group* found, bool* finite) {
  How::numbers(job, w, groups, found);
  for (int64_t g = 0; g < groups; g++) {
    store_float(scale, job.dtype, first + g * step, found[g].scale);
    if (zero_point) zero_point[first + g * step] = (int8_t)found[g].zero_point;
  }
  const int64_t K = groups * job.group_size;
  bool known = true;
  for (int64_t g = 0; g < groups; g++) known &= found[g].all_finite != 0;
  if (finite) *finite = known || all_finite(w, K);
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t i = 0; i < job.group_size; i += 64 / (int64_t)sizeof(T))  // the next row, wanted next
      __builtin_prefetch(w + K + g * job.group_size + i);
    How::codes(job, w + g * job.group_size, found[g], q + g * job.group_size);
  }
}

// One row, to q, its scales `step` apart from `first`; `finite`, if not null, whether all its weights are. Throws
// std::bad_alloc.
template <class How>
const Group* row(const Job& job, const void* w, int64_t row, int64_t groups, int8_t* q, void* scale, int8_t* zero_point,
                 int64_t first, int64_t step, bool* finite) {
  const int64_t at = row * groups * job.group_size;
  Group* found = (Group*)scratch(1, groups * (int64_t)sizeof(Group));
  if (job.dtype == DType::f32)
    quantize_row<How>(job, (const float*)w + at, groups, q, scale, zero_point, first, step, found, finite);
  else if (job.dtype == DType::bf16)
    quantize_row<How>(job, (const uint16_t*)w + at, groups, q, scale, zero_point, first, step, found, finite);
  else
    quantize_row<How>(job, (const Half*)w + at, groups, q, scale, zero_point, first, step, found, finite);
  return found;
}

int64_t sum_plain(const int8_t* q, int64_t K) {
  int64_t sum = 0;
  for (int64_t k = 0; k < K; k++) sum += q[k];
  return sum;
}

// The sum of a row's weights as rounded, in double as qpass.kernels.cpu.x86 adds them, for a row of one group.
float sum_of(int64_t sum, int64_t K, const Group& group) {
  return (float)(((double)sum - (double)group.zero_point * (double)K) * (double)group.scale);
}

void pack_any(const int8_t* rows, int64_t stride, int32_t bits, uint8_t* out) { pack_tile(rows, stride, bits, out); }

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
  const auto quantize = machine_runs(1) ? row<Avx2> : row<Plain>;
  const int32_t team = team_size(threads, N);
  int32_t failed = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : failed)
  for (int64_t n = 0; n < N; n++) {
    try {
      quantize(job, w, n, K / group_size, q + n * K, scale, zero_point, n * (K / group_size), 1, nullptr);
    } catch (...) {
      failed++;
    }
  }
  return failed ? fail("quantize_weight: out of memory") : 0;
}

extern "C" int32_t qp_quantize_pack(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K,
                                    int64_t group_size, int32_t bits, int32_t symmetric, int32_t decoded,
                                    uint8_t* packed, int64_t packed_bytes, void* scale, int8_t* zero_point,
                                    float* colsum, int32_t* finite, int32_t threads) {
  if (const char* why = check(w, dtype, w_bytes, N, K, group_size, bits, packed, scale, zero_point, symmetric))
    return fail("quantize_pack: %s", why);
  if (!decoded && bits != 4 && bits != 8) return fail("quantize_pack: bits must be 4 or 8");
  if (colsum && group_size != K) return fail("quantize_pack: sums are of rows of one group");
  const int32_t width = bits <= 4 ? 4 : 8;
  const int64_t blocks = padded(N, 32) / 16, Kp = padded(K, 64), groups = K / group_size;
  if (packed_bytes != blocks * 2 * Kp * width) return fail("quantize_pack: the packed weight has the wrong size");
  const float half = (float)(1 << (bits - 1));
  const Job job = {group_size, -half, half - 1, symmetric != 0, (DType)dtype};
  const auto quantize = machine_runs(1) ? row<Avx2> : row<Plain>;
  const auto tile = machine_runs(1) ? pack_tile_avx2 : pack_any;
  const auto sum = machine_runs(1) ? sum_avx2 : sum_plain;
  const int32_t team = team_size(threads, blocks);
  int32_t failed = 0, rows_not_finite = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : failed, rows_not_finite)
  for (int64_t b = 0; b < blocks; b++) {
    try {
      int8_t* rows = (int8_t*)scratch(0, 16 * Kp);
      for (int64_t r = 0; r < 16; r++) {
        int8_t* q = rows + r * Kp;
        const int64_t n = b * 16 + r, there = n < N ? K : 0;
        if (there) {
          bool row_finite = true;
          const Group* found = quantize(job, w, n, groups, q, scale, zero_point, b * groups * 16 + r, 16,
                                        finite ? &row_finite : nullptr);
          rows_not_finite += !row_finite;
          if (colsum) colsum[n] = sum_of(sum(q, K), K, found[0]);
        } else {
          if (colsum) colsum[n] = 0;
        }
        for (int64_t k = 0; decoded && width == 8 && k < there; k++) q[k] ^= (int8_t)0x80;  // to which packing adds 128
        memset(q + there, 0, (size_t)(Kp - there));
        for (int64_t g = 0; !there && g < groups; g++) {  // outputs that only pad: scale 1, zero point 0
          store_float(scale, job.dtype, (b * groups + g) * 16 + r, 1.0f);
          if (zero_point) zero_point[(b * groups + g) * 16 + r] = 0;
        }
      }
      for (int64_t j = 0; j < Kp / 64; j++) tile(rows + j * 64, Kp, width, packed + (b * (Kp / 64) + j) * width * 128);
    } catch (...) {
      failed++;
    }
  }
  if (finite) *finite = !rows_not_finite;
  return failed ? fail("quantize_pack: out of memory") : 0;
}
