// Runtime: last error, scratch memory, size of a thread team, and which instruction sets this machine can run.
// Every library has its own copy.
#include <cpuid.h>
#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "abi.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int64_t kLargePage = 2 << 20;

thread_local char last_error[256] = "";
bool forked = false;

struct Buffers {
  void* data[10] = {};
  int64_t size[10] = {};
  ~Buffers() {
    for (void* p : data) free(p);
  }
};
thread_local Buffers buffers;

const bool watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;

bool has_avx2() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// The kernel grants the 8 KB of tile state only to a process that asks for it; asking again changes nothing.
bool has_amx() {
  unsigned a, b, c, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25, all = amx_bf16 | amx_tile | amx_int8;
  if (!has_vnni() || !__builtin_cpu_supports("gfni") || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

int32_t fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return -1;
}

int32_t team_size(int32_t threads, int64_t parts) {
  if (forked || omp_in_parallel() || threads < 1) return 1;
  return (int32_t)(threads < parts ? threads : parts < 1 ? 1 : parts);
}

void* scratch(int slot, int64_t bytes) {
  if (buffers.size[slot] < bytes) {
    free(buffers.data[slot]);
    buffers.size[slot] = 0;
    const int64_t unit = bytes < kLargePage ? 64 : kLargePage, size = padded(bytes, unit);
    buffers.data[slot] = aligned_alloc((size_t)unit, (size_t)size);
    if (!buffers.data[slot]) throw std::bad_alloc();
    if (unit == kLargePage) madvise(buffers.data[slot], (size_t)size, MADV_HUGEPAGE);  // a wish: refusal changes nothing
    buffers.size[slot] = size;
  }
  return buffers.data[slot];
}

bool machine_runs(int32_t isa) {
  static const bool runs[] = {true, has_avx2(), has_vnni(), has_amx()};
  return isa >= 0 && isa < 4 && runs[isa];
}

}  // namespace qpass

extern "C" const char* qp_last_error() { return qpass::last_error; }
