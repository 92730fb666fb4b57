// Range search: groups of a float weight in; of the ranges tried, the scale and zero point with the least error out.
//
// kernels/reference/range_search.py says what is computed, and everything but sums is computed as there. A group is summed
// in 8 parts, in the same order on every machine.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "lanes.h"
#include "scratch.h"
#include "weight_numbers.h"

namespace qpass {
namespace {

struct Search {
  int64_t size, steps;  // of a group; with zeros up to a multiple of 8, in Lanes
  float qmin, qmax, bias_weight;
  bool symmetric, with_sign, compensated;
  const float *tried, *importance;  // importance is null if all errors count alike
  int64_t count;
  DType dtype;
};

// A group: its weights, the weights of their errors, and both multiplied; the sum of w * w, weighed.
struct Group {
  Lanes *w, *importance, *weighed;
  float energy;
};

// What is summed of one way to round a group.
struct Sums {
  Lanes along, square;
};

QPASS_INLINE void add(const Search& search, const Group& group, int64_t i, const Lanes& q, const Lanes& scale, Sums& sums) {
  if (search.compensated) {
    const Lanes e = q * scale - group.w[i];
    sums.square += e * e * group.importance[i];
  } else {
    sums.along += q * group.weighed[i];
    sums.square += q * q * group.importance[i];
  }
}

QPASS_INLINE float error(const Search& search, const Group& group, float scale, const Sums& sums) {
  const float square = total(sums.square);
  if (search.compensated) return square;
  const float along = scale * total(sums.along), off = along - group.energy;
  return scale * scale * square - 2 * along + group.energy + search.bias_weight * (off * off) / group.energy;
}

// A negative scale rounds as the positive one does on the grid turned over, so both signs share what is slow.
QPASS_INLINE void symmetric(const Search& search, const Group& group, float amax, bool toward_positive, float& found) {
  const Lanes low = all(search.qmin), high = all(search.qmax);
  float best = INFINITY;
  found = 1;
  for (int64_t t = 0; t < search.count; t++) {
    const float s = storable(amax / search.tried[t], search.dtype);
    const Lanes scale = all(s);
    Sums sums[2] = {};
    for (int64_t i = 0; i < search.steps; i++) {
      const Lanes near = rounded(group.w[i] / scale);
      add(search, group, i, clamp(near, low, high), scale, sums[0]);
      if (search.with_sign) add(search, group, i, clamp(near, -high, -low), scale, sums[1]);
    }
    const int first = search.with_sign && toward_positive;  // the sign that turns the longer end to the largest weight
    for (int sign = first, left = search.with_sign ? 2 : 1; left > 0; left--, sign = 1 - sign) {
      const float e = error(search, group, s, sums[sign]);
      if (e < best) best = e, found = sign ? -s : s;
    }
  }
}

QPASS_INLINE void asymmetric(const Search& search, const Group& group, float least, float most, float& found,
                             float& zero_point) {
  const float span = most - least > 1.17549435e-38f ? most - least : 1.17549435e-38f;
  float best = INFINITY;
  found = 1, zero_point = 0;
  for (int64_t t = 0; t < search.count; t++) {
    const float s = storable(span * search.tried[t] / (search.qmax - search.qmin), search.dtype);
    const float middle = (search.qmin + search.qmax) / 2 - (least + most) / 2 / s;
    const Lanes scale = all(s);
    float zero[2] = {floorf(middle), ceilf(middle)};
    for (float& z : zero) z = z < search.qmin ? search.qmin : z > search.qmax ? search.qmax : z;
    Sums sums[2] = {};
    for (int64_t i = 0; i < search.steps; i++) {
      const Lanes near = rounded(group.w[i] / scale);
      for (int z = 0; z < 2; z++)
        add(search, group, i, clamp(near, all(search.qmin - zero[z]), all(search.qmax - zero[z])), scale, sums[z]);
    }
    for (int z = 0; z < 2; z++) {
      const float e = error(search, group, s, sums[z]);
      if (e < best) best = e, found = s, zero_point = zero[z];
    }
  }
}

QPASS_INLINE void search_group(const Search& search, const float* w, const float* importance, const Group& room,
                               float& scale, float& zero_point) {
  Group group = room;
  float *weights = (float*)group.w, *factors = (float*)group.importance;
  float least = 0, most = 0;
  for (int64_t i = 0; i < search.size; i++) {
    weights[i] = w[i];
    factors[i] = importance ? importance[i] : 1.0f;
    least = w[i] < least ? w[i] : least;
    most = w[i] > most ? w[i] : most;
  }
  Lanes sum = {};
  for (int64_t i = 0; i < search.steps; i++) {
    group.weighed[i] = group.w[i] * group.importance[i];
    sum += group.weighed[i] * group.w[i];
  }
  group.energy = total(sum) > 1e-30f ? total(sum) : 1e-30f;
  if (search.symmetric) {
    bool positive = most > -least;
    if (most == -least)  // the first of the largest decides
      for (int64_t i = 0; i < search.size; i++)
        if (fabsf(w[i]) == most) {
          positive = w[i] > 0;
          break;
        }
    symmetric(search, group, most > -least ? most : -least, positive, scale);
  } else {
    asymmetric(search, group, least, most, scale, zero_point);
  }
  if (most == least) scale = eps_of(search.dtype);
}

QPASS_INLINE void search_row(const Search& search, const float* w, int64_t groups, float* scale, float* zero_point) {
  const int64_t bytes = search.steps * (int64_t)sizeof(Lanes);
  char* room = (char*)scratch(0, 3 * bytes);
  memset(room, 0, (size_t)(3 * bytes));
  const Group group = {(Lanes*)room, (Lanes*)(room + bytes), (Lanes*)(room + 2 * bytes), 0};
  for (int64_t g = 0; g < groups; g++) {
    float none;
    search_group(search, w + g * search.size, search.importance ? search.importance + g * search.size : nullptr, group,
                 scale[g], zero_point ? zero_point[g] : none);
  }
}

void row_plain(const Search& search, const float* w, int64_t groups, float* scale, float* zero_point) {
  search_row(search, w, groups, scale, zero_point);
}
__attribute__((target("avx2,fma,f16c"))) void row_avx2(const Search& search, const float* w, int64_t groups,
                                                       float* scale, float* zero_point) {
  search_row(search, w, groups, scale, zero_point);
}

}  // namespace
}  // namespace qpass

extern "C" int32_t qp_search_ranges(const float* w, int64_t count, int64_t N, int64_t groups, int64_t size,
                                    const float* importance, int64_t importance_count, int32_t bits, int32_t symmetric,
                                    int32_t with_sign, int32_t compensated, float bias_weight, const float* tried,
                                    int64_t tried_count, int32_t dtype, float* scale, float* zero_point,
                                    int32_t threads) {
  using namespace qpass;
  if (!w || !scale || (!symmetric && !zero_point) || !tried || tried_count < 1) return fail("search_ranges: a null pointer");
  if (N < 1 || groups < 1 || size < 1 || groups > (int64_t(1) << 40) / size || N > (int64_t(1) << 40) / (groups * size) ||
      count != N * groups * size || (importance && importance_count != groups * size))
    return fail("search_ranges: sizes that do not fit");
  if (bits < 2 || bits > 8 || dtype < 0 || dtype > 2) return fail("search_ranges: unknown numbers");
  const float half = (float)(1 << (bits - 1));
  const Search search = {size, padded(size, 8) / 8, -half, half - 1, bias_weight, symmetric != 0, with_sign != 0,
                         compensated != 0, tried, importance, tried_count, (DType)dtype};
  const auto row = machine_runs(1) ? row_avx2 : row_plain;
  const int32_t team = team_size(threads, N);
  int32_t failed = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : failed)
  for (int64_t n = 0; n < N; n++) {
    try {
      row(search, w + n * groups * size, groups, scale + n * groups, symmetric ? nullptr : zero_point + n * groups);
    } catch (...) {
      failed++;
    }
  }
  return failed ? fail("search_ranges: out of memory") : 0;
}
