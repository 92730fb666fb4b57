// Split work: the columns of several weights cut into equal runs, one for each thread of a team.
#pragma once
#include <omp.h>

#include <cstdint>
#include <new>

#include "abi.h"
#include "convert.h"
#include "work_shares.h"

namespace qpass {
namespace {

constexpr int64_t kWorkspace = 32 << 20;
constexpr int64_t kUnit = 32;                    // columns: what the threads share out
constexpr int64_t kMinWork = 1 << 15;            // multiply-adds that are worth a thread
constexpr int64_t kWholeShare = int64_t(1) << 40;  // of units: a thread's in one piece
constexpr int64_t kFewRows = 8;
constexpr int64_t kSerialElements = 16 << 10;    // below this, making x ready costs less than a barrier

// How many rows go through at once, so that their work space stays within kWorkspace.
inline int64_t chunk_of(int64_t M, int64_t bytes_a_row) {
  const int64_t fit = kWorkspace / bytes_a_row, rows = fit < 64 ? 64 : fit & ~int64_t(63);
  return M < rows ? M : rows;
}

// Units [begin, end) of all weights in one line.
template <typename Job, typename Multiply>
void multiply_units(const Job* jobs, int64_t count, int64_t begin, int64_t end, const Multiply& multiply) {
  for (int64_t i = 0, first = 0; i < count && first < end; i++) {
    const int64_t here = jobs[i].weight.Np / kUnit, last = first + here;
    const int64_t from = begin > first ? begin : first, to = end < last ? end : last;
    if (from < to) multiply(jobs[i], (from - first) * 2, (to - first) * 2);
    first = last;
  }
}

// `prepare(row_begin, row_end)` fills the work space, `multiply(job, block_begin, block_end)` uses it, `least` units at
// a time or more.
template <typename Job, typename Prepare, typename Multiply>
void run(const Job* jobs, int64_t count, int64_t M, int64_t K, int32_t threads, int64_t least, const Prepare& prepare,
         const Multiply& multiply) {
  int64_t units = 0, work = 0;
  for (int64_t i = 0; i < count; i++) units += jobs[i].weight.Np / kUnit, work += M * K * jobs[i].weight.Np;
  const int64_t worth = work / kMinWork + 1;
  const int64_t most = units < worth ? units : worth;
  const int64_t team = team_size(threads, most < WorkShares::kMost ? most : WorkShares::kMost);
  const bool serial = team == 1 || M * K <= kSerialElements;
  if (serial) prepare(0, M);
  if (team == 1) return multiply_units(jobs, count, 0, units, multiply);
  WorkShares shares(units, team);
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
      for (int64_t begin, end; !give_up && shares.take(t, least, begin, end);)
        multiply_units(jobs, count, begin, end, multiply);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      no_memory = true;
    }
  }
  if (no_memory) throw std::bad_alloc();
}

// Units that are worth a call: many rows are read again in each, and prepared again too unless all were at once.
inline int64_t least_units(int64_t M, bool prepared) { return M <= kFewRows ? 1 : prepared ? 4 : kWholeShare; }

// The same for rows of floats: one is taken as it is, more are packed anew in each call.
inline int64_t least_units_of_floats(int64_t M) { return M == 1 ? 1 : kWholeShare; }

inline Output rows_from(const Output& out, int64_t m) {
  Output moved = out;
  moved.data = (char*)out.data + m * out.ld * bytes_of(out.dtype);
  return moved;
}

}  // namespace
}  // namespace qpass
