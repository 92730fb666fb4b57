// Split work: the columns of several weights cut into equal runs, one for each thread of a team.
#pragma once
#include <omp.h>

#include <cstdint>
#include <new>

#include "abi.h"
#include "convert.h"

namespace qpass {
namespace {

constexpr int64_t kWorkspace = 32 << 20;
constexpr int64_t kUnit = 32;                    // columns: what the threads share out
constexpr int64_t kMinWork = 1 << 15;            // multiply-adds that are worth a thread
constexpr int64_t kSerialElements = 16 << 10;    // below this, making x ready costs less than a barrier

// How many rows go through at once, so that their work space stays within kWorkspace.
inline int64_t chunk_of(int64_t M, int64_t bytes_a_row) {
  const int64_t fit = kWorkspace / bytes_a_row, rows = fit < 64 ? 64 : fit & ~int64_t(63);
  return M < rows ? M : rows;
}

// The share of thread t: units of all weights in one line, cut into equal runs.
template <typename Job, typename Multiply>
void share(const Job* jobs, int64_t count, int64_t units, int64_t t, int64_t team, const Multiply& multiply) {
  const int64_t begin = units * t / team, end = units * (t + 1) / team;
  for (int64_t i = 0, first = 0; i < count && first < end; i++) {
    const int64_t here = jobs[i].weight.Np / kUnit, last = first + here;
    const int64_t from = begin > first ? begin : first, to = end < last ? end : last;
    if (from < to) multiply(jobs[i], (from - first) * 2, (to - first) * 2);
    first = last;
  }
}

// `prepare(row_begin, row_end)` fills the work space, `multiply(job, block_begin, block_end)` uses it.
template <typename Job, typename Prepare, typename Multiply>
void run(const Job* jobs, int64_t count, int64_t M, int64_t K, int32_t threads, const Prepare& prepare,
         const Multiply& multiply) {
  int64_t units = 0, work = 0;
  for (int64_t i = 0; i < count; i++) units += jobs[i].weight.Np / kUnit, work += M * K * jobs[i].weight.Np;
  const int64_t worth = work / kMinWork + 1;
  const int64_t team = team_size(threads, units < worth ? units : worth);
  const bool serial = team == 1 || M * K <= kSerialElements;
  if (serial) prepare(0, M);
  if (team == 1) return share(jobs, count, units, 0, 1, multiply);
  bool no_memory = false;  // an exception must not leave a parallel region
#pragma omp parallel num_threads((int)team)
  {
    const int64_t t = omp_get_thread_num(), all = omp_get_num_threads();  // the runtime may give fewer
    if (!serial) {
      try {
        prepare(M * t / all, M * (t + 1) / all);
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        no_memory = true;
      }
#pragma omp barrier
    }
    bool give_up;  // rows that were not prepared are not multiplied
#pragma omp atomic read
    give_up = no_memory;
    try {
      if (!give_up) share(jobs, count, units, t, all, multiply);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      no_memory = true;
    }
  }
  if (no_memory) throw std::bad_alloc();
}

inline Output rows_from(const Output& out, int64_t m) {
  Output moved = out;
  moved.data = (char*)out.data + m * out.ld * bytes_of(out.dtype);
  return moved;
}

}  // namespace
}  // namespace qpass
