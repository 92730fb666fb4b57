// Driver: checks what it is given, rounds the activation, and splits the weights' columns over OpenMP threads.
//
// Rows go through in chunks whose work space stays within kWorkspace bytes; neither that nor the number of threads
// changes any result, because every output is computed by one thread from one row and one column.
#include <cstring>
#include <new>

#include "abi.h"
#include "scratch.h"
#include "split_work.h"

namespace qpass {

const Isa* available_isa(int32_t isa);

namespace {

constexpr int32_t kIntegerScales = 3;            // as scale_dtype
constexpr int kTileSlot = 8, kFewSlot = 9;       // of scratch memory
constexpr int64_t kRowsAtOnce = 8;

bool is_dtype(int32_t dtype) { return dtype >= 0 && dtype <= 2; }

struct Job {
  Weight weight;
  Output out;
};

const char* read_weight(const qp_weight& w, int64_t M, int64_t K, int32_t activation, Job& job) {
  if (w.bits != 4 && w.bits != 8) return "bits must be 4 or 8";
  const bool integer = w.scale_dtype == kIntegerScales;
  if ((!integer && !is_dtype(w.scale_dtype)) || !is_dtype(w.bias_dtype) || !is_dtype(w.out_dtype)) return "unknown dtype";
  if (w.N < 1 || w.N > (int64_t(1) << 40) / K) return "the number of outputs is out of range";
  const int64_t Np = padded(w.N, 32), Kp = padded(K, 64), G = w.groups;
  if (G < 1 || G > K || (G > 1 && (K % G != 0 || K / G % 32 != 0)))
    return "groups must divide K into multiples of 32, or be 1";
  if (K / G >= 1 << 17) return "more than 131071 inputs in one group could overflow int32";
  if (integer && (w.bits != 4 || w.zero_point || G < 2)) return "integer scales go with symmetric 4-bit weights in groups";
  if (integer && !activation) return "integer scales need rounded activations";
  if (integer && K >= 1 << 17) return "more than 131071 inputs could overflow int32 with integer scales";
  const int64_t scale_bytes = integer ? 0 : bytes_of((DType)w.scale_dtype), bias_bytes = bytes_of((DType)w.bias_dtype);
  if (!w.q || w.q_bytes != Np * Kp * w.bits / 8) return "qweight has the wrong size";
  if (!w.scale || w.scale_bytes != (integer ? Np * (G + 5) : Np * G * scale_bytes)) return "scale has the wrong size";
  if ((integer || w.scale_dtype == (int32_t)DType::f32) && (uintptr_t)w.scale % 4) return "scale is not aligned";
  if (w.zero_point && w.zero_point_bytes != Np * G) return "zero_point has the wrong size";
  if (activation == 2 && !w.colsum) return "asymmetric activations need colsum";
  if (w.colsum && w.colsum_bytes != Np * 4) return "colsum has the wrong size";
  if (w.bias && w.bias_bytes != w.N * bias_bytes) return "bias has the wrong size";
  if (M > 0 && (!w.out || !holds_rows(w.out_bytes, bytes_of((DType)w.out_dtype), M, w.N, w.out_stride)))
    return "out has the wrong size";
  job.weight = {(const uint8_t*)w.q, w.scale, (const int8_t*)w.zero_point, (const float*)w.colsum, w.N, K, Np, Kp, G,
                G == 1 ? Kp : K / G, w.bits, (DType)w.scale_dtype};
  if (integer) {
    job.weight.scale_dtype = DType::f32;
    job.weight.groups = 1;
    job.weight.group_size = Kp;
    job.weight.multiplier = (const int8_t*)w.scale + Np * 5;
    job.weight.multipliers = G;
  }
  job.out = {w.out, w.out_stride, (DType)w.out_dtype, w.bias, (DType)w.bias_dtype};
  return nullptr;
}

struct Rows {  // work space for rows rounded to int8
  int8_t* q;
  float *scale, *zero_point;
  int32_t* sums;
  Rows(int64_t M, int64_t codes, int64_t Kp)
      : q((int8_t*)scratch(0, codes * Kp)), scale((float*)scratch(1, M * 4)), zero_point((float*)scratch(2, M * 4)),
        sums((int32_t*)scratch(3, M * (Kp / 32) * 4)) {}
};

// Room for the rows as the instruction set arranges them for its products, null where it takes them as they are.
int8_t* tiles_for(const Isa& isa, int64_t M, int64_t Kp) {
  const int64_t bytes = isa.tile_bytes ? isa.tile_bytes(M, Kp) : 0;
  return bytes ? (int8_t*)scratch(kTileSlot, bytes) : nullptr;
}

int32_t read_all(const char* name, const qp_weight* weights, int64_t count, int64_t M, int64_t K, int32_t activation,
                 Job* jobs) {
  for (int64_t i = 0; i < count; i++)
    if (const char* why = read_weight(weights[i], M, K, activation, jobs[i]))
      return fail("%s: weight %d of %d: %s", name, (int)i, (int)count, why);
  return 0;
}

int32_t check_call(const char* name, int32_t isa, int64_t M, int64_t K, const qp_weight* weights, int64_t count) {
  if (!available_isa(isa)) return fail("%s: this machine does not have instruction set %d", name, (int)isa);
  if (M < 0 || K < 1 || M > (int64_t(1) << 40) / K) return fail("%s: sizes are out of range", name);
  if (count < 1 || count > 64 || !weights) return fail("%s: takes 1 to 64 weights, got %d", name, (int)count);
  return 0;
}

// Products of tiles have signed weights: only zero points need the sums of codes then.
bool any_zero_points(const Job* jobs, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; i++) any = any || jobs[i].weight.zero_point;
  return any;
}

void linear(const Isa& isa, const char* x, DType dtype, int64_t M, int64_t K, int32_t activation, const Job* jobs,
            int64_t count, int32_t threads) {
  const int64_t Kp = padded(K, 64), row_bytes = K * bytes_of(dtype), rows = chunk_of(M, activation ? Kp : Kp * 4);
  const bool zeros = any_zero_points(jobs, count);
  for (int64_t m = 0; m < M; m += rows) {
    const int64_t n = M - m < rows ? M - m : rows;
    const char* from = x + m * row_bytes;
    if (activation) {
      int8_t* tiles = tiles_for(isa, n, Kp);
      const Rows space(n, tiles ? 0 : n, Kp);
      const QuantRows q = {space.q, space.scale, activation == 2 ? space.zero_point : nullptr, space.sums, n, Kp, tiles};
      run(jobs, count, n, K, threads, least_units(n, tiles != nullptr), [&](int64_t a, int64_t b) {
        // What is arranged anew is never written as a whole: a few rows at a time, which stay in the first cache.
        int8_t* few = tiles ? (int8_t*)scratch(kFewSlot, kRowsAtOnce * Kp) : nullptr;
        const int64_t step = tiles ? kRowsAtOnce : b - a;
        for (int64_t i = a; i < b; i += step) {
          const int64_t end = i + step < b ? i + step : b;
          int8_t* to = tiles ? few : space.q + i * Kp;
          isa.quantize(from + i * row_bytes, dtype, end - i, K, Kp, activation == 2, to, space.scale + i,
                       space.zero_point + i, tiles && !zeros ? nullptr : space.sums + i * (Kp / 32));
          if (tiles) isa.tile_rows(to, n, Kp, i, end, tiles);
        }
      }, [&](const Job& job, int64_t a, int64_t b) { isa.product_q(job.weight, q, rows_from(job.out, m), a, b); });
    } else {
      const bool ready = isa.any_rows || (dtype == DType::f32 && K == Kp && (uintptr_t)from % 4 == 0);
      float* space = ready ? nullptr : (float*)scratch(0, n * Kp * 4);
      FloatRows f = {ready ? (const float*)from : space, n, Kp, dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3};
      if (isa.any_rows) f.dtype = dtype, f.width = K;
      run(jobs, count, n, K, threads, least_units_of_floats(n), [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b && !ready; i++) {
          for (int64_t k = 0; k < K; k++) space[i * Kp + k] = load_float(from + i * row_bytes, dtype, k);
          memset(space + i * Kp + K, 0, (size_t)(Kp - K) * 4);
        }
      }, [&](const Job& job, int64_t a, int64_t b) { isa.product_f(job.weight, f, rows_from(job.out, m), a, b); });
    }
  }
}

void linear_q(const Isa& isa, const int8_t* xq, const float* scale, const float* zero_point, int64_t M, int64_t K,
              const Job* jobs, int64_t count, int32_t threads) {
  const int64_t Kp = padded(K, 64), rows = chunk_of(M, Kp);
  const bool zeros = any_zero_points(jobs, count);
  for (int64_t m = 0; m < M; m += rows) {
    const int64_t n = M - m < rows ? M - m : rows;
    const int8_t* from = xq + m * K;
    int8_t* copy = K == Kp ? nullptr : (int8_t*)scratch(0, n * Kp);
    int32_t* sums = (int32_t*)scratch(3, n * (Kp / 32) * 4);
    int8_t* tiles = tiles_for(isa, n, Kp);
    const bool summed = zeros || !tiles;
    const QuantRows q = {copy ? copy : from, scale + m, zero_point ? zero_point + m : nullptr, sums, n, Kp, tiles};
    run(jobs, count, n, K, threads, least_units(n, tiles != nullptr), [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; i++) {
        if (copy) {
          memcpy(copy + i * Kp, from + i * K, (size_t)K);
          memset(copy + i * Kp + K, 0, (size_t)(Kp - K));
        }
        if (summed) sum_runs(q.q + i * Kp, Kp, sums + i * (Kp / 32));
        if (tiles) isa.tile_rows(q.q + i * Kp, n, Kp, i, i + 1, tiles);
      }
    }, [&](const Job& job, int64_t a, int64_t b) { isa.product_q(job.weight, q, rows_from(job.out, m), a, b); });
  }
}

}  // namespace
}  // namespace qpass

using namespace qpass;

extern "C" int32_t qp_linear(int32_t isa, const void* x, int32_t x_dtype, int64_t M, int64_t K, int32_t activation,
                             const qp_weight* weights, int64_t count, int32_t threads) {
  Job jobs[64];
  if (int32_t bad = check_call("linear", isa, M, K, weights, count)) return bad;
  if (!is_dtype(x_dtype) || activation < 0 || activation > 2) return fail("linear: unknown dtype or activation");
  if (!x && M > 0) return fail("linear: x is null");
  if (int32_t bad = read_all("linear", weights, count, M, K, activation, jobs)) return bad;
  try {
    linear(*available_isa(isa), (const char*)x, (DType)x_dtype, M, K, activation, jobs, count, threads);
  } catch (const std::bad_alloc&) {
    return fail("linear: out of memory for the work space");
  }
  return 0;
}

extern "C" int32_t qp_linear_q(int32_t isa, const int8_t* xq, const float* x_scale, const float* x_zero_point, int64_t M,
                               int64_t K, const qp_weight* weights, int64_t count, int32_t threads) {
  Job jobs[64];
  if (int32_t bad = check_call("linear_q", isa, M, K, weights, count)) return bad;
  if ((!xq || !x_scale) && M > 0) return fail("linear_q: a null pointer was given");
  if (int32_t bad = read_all("linear_q", weights, count, M, K, x_zero_point ? 2 : 1, jobs)) return bad;
  try {
    linear_q(*available_isa(isa), xq, x_scale, x_zero_point, M, K, jobs, count, threads);
  } catch (const std::bad_alloc&) {
    return fail("linear_q: out of memory for the work space");
  }
  return 0;
}

extern "C" int32_t qp_quantize(int32_t isa, const void* x, int32_t x_dtype, int64_t M, int64_t K, int8_t* q, float* scale,
                               float* zero_point) {
  if (!available_isa(isa) || !is_dtype(x_dtype) || M < 0 || K < 1 || M > (int64_t(1) << 40) / K)
    return fail("quantize: unknown instruction set or dtype, or sizes out of range");
  if (M > 0 && (!x || !q || !scale)) return fail("quantize: a null pointer was given");
  const int64_t Kp = padded(K, 64), row_bytes = K * bytes_of((DType)x_dtype);
  try {
    const Rows space(1, 1, Kp);
    for (int64_t m = 0; m < M; m++) {
      available_isa(isa)->quantize((const char*)x + m * row_bytes, (DType)x_dtype, 1, K, Kp, zero_point != nullptr,
                                   space.q, space.scale, space.zero_point, space.sums);
      memcpy(q + m * K, space.q, (size_t)K);
      scale[m] = *space.scale;
      if (zero_point) zero_point[m] = *space.zero_point;
    }
  } catch (const std::bad_alloc&) {
    return fail("quantize: out of memory for the work space");
  }
  return 0;
}
