// Work shares: a line of units cut into a run for each thread of a team, and what is left of each to whoever is free.
#pragma once
#include <atomic>
#include <cstdint>

namespace qpass {
namespace {

// A thread takes from the front of its own run, so that it reads one stretch of memory and the same one in every call.
// When that is done it takes from the back of the run with most left: cores of a virtual machine, or with other work on
// them, are not equally fast, and everybody waits for the last one.
class WorkShares {
 public:
  static constexpr int64_t kMost = 256;  // threads

  WorkShares(int64_t units, int64_t team) : team_(team) {
    for (int64_t t = 0; t < team; t++) left_[t].run.store(pack(units * t / team, units * (t + 1) / team), kRelaxed);
  }

  // The next units [begin, end) for thread t, at least `least` where as many are left; false if nothing is.
  bool take(int64_t t, int64_t least, int64_t& begin, int64_t& end) {
    for (uint64_t run = left_[t].run.load(kRelaxed); count(run) > 0;) {
      const int64_t step = part(run, least);
      if (!left_[t].run.compare_exchange_weak(run, pack(first(run) + step, last(run)), kRelaxed)) continue;
      begin = first(run), end = begin + step;
      return true;
    }
    for (;;) {
      int64_t most = 0;
      for (int64_t i = 1; i < team_; i++)
        if (count(left_[i].run.load(kRelaxed)) > count(left_[most].run.load(kRelaxed))) most = i;
      uint64_t run = left_[most].run.load(kRelaxed);
      if (count(run) == 0) return false;
      const int64_t step = part(run, least);
      if (!left_[most].run.compare_exchange_weak(run, pack(first(run), last(run) - step), kRelaxed)) continue;
      end = last(run), begin = end - step;
      return true;
    }
  }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;  // what is shared by it was written before the team began

  static uint64_t pack(int64_t first, int64_t last) { return (uint64_t)first << 32 | (uint64_t)last; }
  static int64_t first(uint64_t run) { return (int64_t)(run >> 32); }
  static int64_t last(uint64_t run) { return (int64_t)(run & 0xffffffff); }
  static int64_t count(uint64_t run) { return last(run) - first(run); }
  static int64_t part(uint64_t run, int64_t least) {
    const int64_t most = count(run) * 3 / 4;  // few pieces: each begins with a wait for memory
    return most > least ? most : least < count(run) ? least : count(run);
  }

  struct alignas(64) Left {
    std::atomic<uint64_t> run;
  };
  Left left_[kMost];
  int64_t team_;
};

}  // namespace
}  // namespace qpass
