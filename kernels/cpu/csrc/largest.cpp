// The largest magnitude of any number of weights, which also says whether all are finite.
#include <cstdint>

#include "abi.h"
#include "avx2_largest.h"
#include "weight_numbers.h"

namespace qpass {
namespace {

template <class T>
QPASS_AVX2 uint32_t largest_avx2(const T* w, int64_t size) {
  const int64_t whole = size & ~int64_t(15);
  bool all_finite;
  const uint32_t found = largest16(w, whole, all_finite), rest = largest_plain<true>(w + whole, size - whole);
  return rest > found ? rest : found;
}

template <class T>
uint32_t largest_of(const void* w, int64_t first, int64_t size) {
  return machine_runs(1) ? largest_avx2((const T*)w + first, size) : largest_plain<true>((const T*)w + first, size);
}

}  // namespace
}  // namespace qpass

extern "C" int32_t qp_largest(const void* w, int32_t dtype, int64_t count, float* largest, int32_t threads) {
  using namespace qpass;
  if ((!w && count) || !largest || count < 0 || dtype < 0 || dtype > 2)
    return fail("largest: a null pointer, size or dtype that cannot be");
  constexpr int64_t part = 1 << 16;
  const int64_t parts = (count + part - 1) / part;
  const int32_t team = team_size(threads, parts);
  const auto of = dtype == 0 ? largest_of<float> : dtype == 1 ? largest_of<uint16_t> : largest_of<Half>;
  uint32_t most = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(max : most)
  for (int64_t p = 0; p < parts; p++) {
    const uint32_t found = of(w, p * part, p + 1 < parts ? part : count - p * part);
    most = found > most ? found : most;
  }
  *largest = float_of(most);
  return 0;
}
