// Decoded: checks what it is given, makes x float32, and splits the columns of the weights of decoded.h over threads.
#include "decoded.h"

#include <cstring>
#include <new>

#include "scratch.h"
#include "split_work.h"

namespace qpass {

extern const DecodedTiles decoded_amx __attribute__((weak));  // a library built where it is used may lack it

namespace {

constexpr int32_t kAmx = 3;

struct Job {
  Decoded weight;
  Output out;
  bool tiles = false;  // multiplied on AMX
};

bool is_float(int32_t dtype) { return dtype >= 0 && dtype <= 2; }
bool is_scale(int32_t dtype) { return is_float(dtype) || dtype == (int32_t)kE8m0 || dtype == (int32_t)kE4m3; }
int64_t bytes_of_any(DType dtype) { return (int32_t)dtype > 2 ? 1 : bytes_of(dtype); }
bool aligned(const void* p, DType dtype) { return (uintptr_t)p % (uintptr_t)bytes_of_any(dtype) == 0; }

// Whether the values are integers of one power of two, no further than 24 from each other and from 0.
SmallIntegers small_integers(const float* table) {
  SmallIntegers s = {};
  uint32_t most = 0;
  for (int c = 0; c < 16; c++) {
    const uint32_t u = bits_of(table[c]) & 0x7fffffffu;
    most = u > most ? u : most;
  }
  const int32_t exponent = (int32_t)(most >> 23);
  if (exponent < 64 || exponent > 190) return s;  // zero, or so large or small that its unit could be no float
  for (int32_t digits = 0; digits <= 4; digits++) {
    s.unit = float_of((uint32_t)(exponent - digits) << 23);
    int32_t low = 0, high = 0;
    bool whole = true;
    for (int c = 0; c < 16; c++) {
      const float t = table[c] / s.unit;
      whole = whole && t >= -24 && t <= 24 && t == (float)(int32_t)t;
      if (!whole) break;
      low = (int32_t)t < low ? (int32_t)t : low;
      high = (int32_t)t > high ? (int32_t)t : high;
    }
    if (!whole || high - low > 24) continue;
    s.there = true;
    s.least = low;
    for (int c = 0; c < 16; c++) s.above_least[c] = (uint8_t)((int32_t)(table[c] / s.unit) - low);
    return s;
  }
  return s;
}

const char* read_weight(const qp_decoded_weight& w, int64_t M, int64_t K, Job& job) {
  if (w.code < 0 || w.code > (int32_t)Code::uint8 || w.kind < 0 || w.kind > (int32_t)Third::zero) return "unknown codes";
  if (!is_scale(w.scale_dtype) || !is_float(w.bias_dtype) || !is_float(w.out_dtype)) return "unknown dtype";
  if (w.kind && !is_float(w.third_dtype) && w.third_dtype != (int32_t)kInt8) return "unknown dtype of the offset";
  if (w.N < 1 || w.N > (int64_t(1) << 40) / K) return "the number of outputs is out of range";
  const bool table = w.code == (int32_t)Code::table;
  const int64_t Np = padded(w.N, 32), Kp = padded(K, 64);
  if (w.group_size < 1 || (w.group_size < K && w.group_size % 16)) return "groups must be multiples of 16, or the row";
  const int64_t G = w.group_size >= K ? 1 : (K + w.group_size - 1) / w.group_size;
  const DType scale = (DType)w.scale_dtype, third = (DType)w.third_dtype;
  if (!w.q || w.q_bytes != Np * Kp / (table ? 2 : 1)) return "qweight has the wrong size";
  if (!w.scale || w.scale_bytes != Np * G * bytes_of_any(scale)) return "scale has the wrong size";
  if (w.kind && (!w.third || w.third_bytes != Np * G * bytes_of_any(third))) return "offset has the wrong size";
  if (table && (!w.table || w.table_bytes != 64)) return "the table must hold 16 floats";
  if (w.gain && w.gain_bytes != Np * 4) return "gain has the wrong size";
  if (!aligned(w.scale, scale) || (w.kind && !aligned(w.third, third)) || (uintptr_t)w.table % 4 || (uintptr_t)w.gain % 4)
    return "a tensor is not aligned";
  if (w.bias && w.bias_bytes != w.N * bytes_of((DType)w.bias_dtype)) return "bias has the wrong size";
  if (M > 0 && (!w.out || !holds_rows(w.out_bytes, bytes_of((DType)w.out_dtype), M, w.N, w.out_stride)))
    return "out has the wrong size";
  job.weight = {(const uint8_t*)w.q, w.scale, w.kind ? w.third : nullptr, (const float*)w.table, (const float*)w.gain,
                w.N, K, Np, Kp, G, G == 1 ? Kp : w.group_size, (Code)w.code, (Third)w.kind, scale, third, table ? small_integers((const float*)w.table) : SmallIntegers{}};
  job.out = {w.out, w.out_stride, (DType)w.out_dtype, w.bias, (DType)w.bias_dtype};
  return nullptr;
}

// The sums of x over each group, eight partial sums added pairwise: one order, whatever the rows.
const float* group_sums(const Decoded& w, const float* x, int64_t M) {
  float* sums = (float*)scratch(1, M * w.groups * 4);
  for (int64_t m = 0; m < M; m++)
    for (int64_t g = 0; g < w.groups; g++) {
      const int64_t end = (g + 1) * w.group_size < w.Kp ? (g + 1) * w.group_size : w.Kp;
      float part[8] = {};
      for (int64_t k = g * w.group_size; k < end; k += 8)
        for (int j = 0; j < 8; j++) part[j] += x[m * w.Kp + k + j];
      sums[m * w.groups + g] = ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
    }
  return sums;
}

// x as integers, for the weights that take it so.
struct Integers {
  int8_t* digits;
  float* step;
  int32_t* whole;
  Integers(int64_t M, int64_t Kp) : digits((int8_t*)scratch(2, M * Kp * 4)) {
    step = (float*)(digits + M * Kp * 3);  // Kp / 16 steps of 4 bytes, and as many sums
    whole = (int32_t*)(step + M * (Kp / 16));
  }
};

// `x` as one weight sees it: the steps with its unit, the sums with what its least value is.
DecodedRows rows_for(const Decoded& w, const float* x, int64_t M, int64_t Kp, const Integers* integers) {
  DecodedRows rows = {x, w.third ? group_sums(w, x, M) : nullptr, M, Kp, nullptr, nullptr, nullptr};
  if (!integers || !w.small.there) return rows;
  const int64_t runs = M * (Kp / 16);
  float* step = (float*)scratch(3, runs * 8);
  int32_t* offset = (int32_t*)(step + runs);
  for (int64_t i = 0; i < runs; i++) {
    step[i] = integers->step[i] * w.small.unit;
    offset[i] = integers->whole[i] * w.small.least;
  }
  rows.digits = integers->digits;
  rows.step = step;
  rows.offset = offset;
  return rows;
}

void decoded(DecodedProduct product, MakeDigits digits, const char* x, DType dtype, int64_t M, int64_t K, const Job* jobs,
             int64_t count, int32_t threads) {
  bool all_tiles = true;
  for (int64_t i = 0; i < count; i++) all_tiles = all_tiles && jobs[i].tiles;
  const int64_t Kp = padded(K, 64), row_bytes = K * bytes_of(dtype), rows = chunk_of(M, Kp * 8);
  bool small = false;
  for (int64_t i = 0; i < count; i++) small = small || (digits && jobs[i].weight.small.there && !jobs[i].tiles);
  for (int64_t m = 0; m < M; m += rows) {
    const int64_t n = M - m < rows ? M - m : rows;
    const char* from = x + m * row_bytes;
    const bool ready = all_tiles || (dtype == DType::f32 && K == Kp && (uintptr_t)from % 4 == 0);
    float* space = ready ? nullptr : (float*)scratch(0, n * Kp * 4);
    const float* floats = ready ? (const float*)from : space;
    const Integers integers(small ? n : 0, Kp);
    run(jobs, count, n, K, threads, least_units_of_floats(n), [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b && !ready; i++) {
        for (int64_t k = 0; k < K; k++) space[i * Kp + k] = load_float(from + i * row_bytes, dtype, k);
        memset(space + i * Kp + K, 0, (size_t)(Kp - K) * 4);
      }
      for (int64_t i = a; i < b && small; i++)
        digits(floats + i * Kp, Kp, integers.digits + i * Kp * 3, integers.step + i * (Kp / 16),
               integers.whole + i * (Kp / 16));
    }, [&](const Job& job, int64_t a, int64_t b) {
      if (job.tiles) {
        const int32_t parts = dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3;
        return decoded_amx.product(job.weight, {nullptr, n, Kp, parts, from, dtype, K}, rows_from(job.out, m), a, b);
      }
      product(job.weight, rows_for(job.weight, floats, n, Kp, small ? &integers : nullptr), rows_from(job.out, m), a, b);
    });
  }
}

}  // namespace
}  // namespace qpass

using namespace qpass;

extern "C" int32_t qp_decoded(int32_t isa, const void* x, int32_t x_dtype, int64_t M, int64_t K,
                              const qp_decoded_weight* weights, int64_t count, int32_t threads) {
  Job jobs[64];
  if (!machine_runs(isa)) return fail("decoded: this machine does not have instruction set %d", (int)isa);
  if (M < 0 || K < 1 || M > (int64_t(1) << 40) / K) return fail("decoded: sizes are out of range");
  if (count < 1 || count > 64 || !weights) return fail("decoded: takes 1 to 64 weights, got %d", (int)count);
  if (!is_float(x_dtype) || (!x && M > 0)) return fail("decoded: x is null or of an unknown dtype");
  for (int64_t i = 0; i < count; i++)
    if (const char* why = read_weight(weights[i], M, K, jobs[i]))
      return fail("decoded: weight %d of %d: %s", (int)i, (int)count, why);
  for (int64_t i = 0; i < count; i++) jobs[i].tiles = isa == kAmx && &decoded_amx && decoded_amx.takes(jobs[i].weight);
  try {
    decoded(isa ? decoded_avx2 : decoded_plain, isa ? digits_avx2 : nullptr, (const char*)x, (DType)x_dtype, M, K, jobs, count, threads);
  } catch (const std::bad_alloc&) {
    return fail("decoded: out of memory for the work space");
  }
  return 0;
}
