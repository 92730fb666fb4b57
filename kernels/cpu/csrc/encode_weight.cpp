// Weight encoding: a float weight [N, K] in; codes of small floats or of a codebook, packed as decoded.h says, and their
// scales out. The same operations in the same precision as qpass/codecs, so codes and scales agree bit for bit.
#include <cstdint>
#include <cstring>

#include "decoded.h"
#include "encode_numbers.h"
#include "pack_tile.h"
#include "scratch.h"
#include "weight_numbers.h"

namespace qpass {
namespace {

template <class T, Element kElement>
void codes_plain(const Job& job, const T* w, int64_t size, float by, int8_t* q) {
  constexpr uint32_t sign = kElement == Element::e2m1 ? 8 : 128;
  for (int64_t i = 0; i < size; i++) {
    const uint32_t u = finite(bits_at(w, i));
    if constexpr (kElement == Element::codebook)
      q[i] = as_packed(kElement, code_in_book(job.book, float_of(u) * by));
    else
      q[i] = as_packed(kElement, code_of<kElement>(float_of(u & 0x7fffffffu) / by) | (u >> 31) * sign);
  }
}

// From the largest magnitudes of a row's groups, their scales to `scale`, 16 apart, and what weights are divided by; of
// a codebook, what they are multiplied by.
void scales_plain(const Job& job, int64_t row, const float* most, float* divisor, void* scale) {
  const int64_t groups = job.groups;
  switch (job.rule) {
    case Rule::exponent: {
      const int offset = job.element == Element::e4m3 ? 8 : 2, mantissa = job.element == Element::e2m3 ? 3 : 1;
      for (int64_t g = 0; g < groups; g++) {
        int e = (int)((bits_of(most[g]) + (1u << (22 - mantissa))) >> 23) - offset;
        e = e < 0 ? 0 : e > 254 ? 254 : e;
        ((uint8_t*)scale)[g * 16] = (uint8_t)e;
        divisor[g] = float_of(e ? (uint32_t)e << 23 : 1u << 22);
      }
      return;
    }
    case Rule::nested:
      for (int64_t g = 0; g < groups; g++) {
        uint32_t byte = code_of<Element::e4m3>(job.given[0] * (most[g] / 6.0f));
        byte = byte ? byte : 0x20;  // e4m3's eps, 0.125
        ((uint8_t*)scale)[g * 16] = (uint8_t)byte;
        divisor[g] = from_e4m3(byte) / job.given[0];
      }
      return;
    case Rule::amax:
    case Rule::block:
      for (int64_t g = 0; g < groups; g++) {
        const float s = rounded_to(most[g] / 448.0f, job.dtype);
        divisor[g] = s != 0 ? s : eps_of(job.dtype);
        store_float(scale, job.dtype, g * 16, divisor[g]);
      }
      return;
    case Rule::given:
      for (int64_t g = 0; g < groups; g++) {
        divisor[g] = job.given[row * groups + g];
        store_float(scale, job.dtype, g * 16, divisor[g]);
      }
      return;
    case Rule::absmax:
      for (int64_t g = 0; g < groups; g++) {
        ((float*)scale)[g * 16] = most[g];
        divisor[g] = 1 / (most[g] > 1e-38f ? most[g] : 1e-38f);
      }
  }
}

template <class T, Element kElement>
void codes_row(const Job& job, const T* w, const float* divisor, int8_t* q) {
  for (int64_t g = 0, first = 0; g < job.groups; g++, first += job.group_size)
    codes_plain<T, kElement>(job, w + first, first + job.group_size < job.K ? job.group_size : job.K - first, divisor[g],
                             q + first);
}

// The scale of an output that only pads.
inline void pad_scale(const Job& job, void* scale, int64_t at) {
  if (job.rule == Rule::exponent || job.rule == Rule::nested)
    ((uint8_t*)scale)[at] = job.rule == Rule::exponent;
  else
    store_float(scale, job.rule == Rule::absmax ? DType::f32 : job.dtype, at, 1.0f);
}

struct Plain {
  template <class T>
  static bool largest_8(const T*, int64_t, float*) {
    return false;
  }
  // The largest magnitude of a group; false if one of its weights is NaN or Inf, or nobody looked.
  template <class T>
  static bool largest(const T* w, int64_t size, float& most) {
    most = float_of(largest_plain(w, size));
    return false;
  }
  static void scales(const Job& job, int64_t row, const float* most, float* divisor, void* scale) {
    scales_plain(job, row, most, divisor, scale);
  }
  template <class T, Element kElement>
  static void codes(const Job& job, const T* w, const float*, const float* divisor, int8_t* q) {
    codes_row<T, kElement>(job, w, divisor, q);
  }
};

}  // namespace
}  // namespace qpass

#include "avx2_encode_weight.h"

namespace qpass {
namespace {

// The largest magnitudes of a row's groups; false if one of its weights is NaN or Inf, or nobody looked.
template <class How, class T>
bool largest_of_row(const Job& job, const T* w, float* most) {
  bool finite = true;
  for (int64_t g = 0; g < job.groups;) {
    const int64_t first = g * job.group_size, left = job.K - first;
    if (left >= 8 * job.group_size && How::largest_8(w + first, job.group_size, most + g)) {
      g += 8;
      continue;
    }
    finite &= How::largest(w + first, job.group_size < left ? job.group_size : left, most[g]);
    g++;
  }
  return finite;
}

// One row: first all scales, then all codes, so that no group waits for its scale. Whether all its weights are finite.
// `shared` are the largest magnitudes of the groups of a block of rows, if those count.
template <class How, class T, Element kElement>
bool encode_row(const Job& job, const T* w, int64_t row, const float* shared, int8_t* q, void* scale) {
  float *most = (float*)scratch(1, 2 * job.groups * 4), *divisor = most + job.groups;
  const bool finite = largest_of_row<How>(job, w, most);
  if (shared) memcpy(most, shared, (size_t)job.groups * 4);
  How::scales(job, row, most, divisor, scale);
  if (finite)
    How::template codes<T, kElement>(job, w, most, divisor, q);
  else
    codes_row<T, kElement>(job, w, divisor, q);
  return finite || all_finite(w, job.K);
}

template <class How, class T>
bool encode_as(const Job& job, const T* w, int64_t row, const float* shared, int8_t* q, void* scale) {
  w += row * job.K;
  switch (job.element) {
    case Element::e2m1: return encode_row<How, T, Element::e2m1>(job, w, row, shared, q, scale);
    case Element::e4m3: return encode_row<How, T, Element::e4m3>(job, w, row, shared, q, scale);
    case Element::e2m3: return encode_row<How, T, Element::e2m3>(job, w, row, shared, q, scale);
    case Element::codebook: return encode_row<How, T, Element::codebook>(job, w, row, shared, q, scale);
  }
  return false;
}

template <class How>
bool encode(const Job& job, const void* w, int64_t row, const float* shared, int8_t* q, void* scale) {
  if (job.dtype == DType::f32) return encode_as<How>(job, (const float*)w, row, shared, q, scale);
  if (job.dtype == DType::bf16) return encode_as<How>(job, (const uint16_t*)w, row, shared, q, scale);
  return encode_as<How>(job, (const Half*)w, row, shared, q, scale);
}

// The largest magnitudes of the groups of a block of rows.
template <class How>
void largest_of_block(const Job& job, const void* w, int64_t first, int64_t rows, float* most) {
  float* one = (float*)scratch(1, 2 * job.groups * 4);
  memset(most, 0, (size_t)job.groups * 4);
  for (int64_t n = first; n < first + rows; n++) {
    if (job.dtype == DType::f32)
      largest_of_row<How>(job, (const float*)w + n * job.K, one);
    else if (job.dtype == DType::bf16)
      largest_of_row<How>(job, (const uint16_t*)w + n * job.K, one);
    else
      largest_of_row<How>(job, (const Half*)w + n * job.K, one);
    for (int64_t g = 0; g < job.groups; g++) most[g] = one[g] > most[g] ? one[g] : most[g];
  }
}

void pack_any(const int8_t* rows, int64_t stride, int32_t bits, uint8_t* out) { pack_tile(rows, stride, bits, out); }

const char* check_sizes(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K, int64_t group_size) {
  if (!w) return "a null pointer was given";
  if (dtype < 0 || dtype > 2) return "the weight must be float32, bfloat16 or float16";
  if (N < 1 || K < 1 || N > (int64_t(1) << 40) / K) return "sizes must be positive and reasonable";
  if (w_bytes != N * K * bytes_of((DType)dtype)) return "the weight does not hold N * K numbers";
  if (group_size < 1 || group_size > K) return "groups must be of 1 to K weights";
  return nullptr;
}

}  // namespace
}  // namespace qpass

using namespace qpass;

extern "C" int32_t qp_encode_pack(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K,
                                  int64_t group_size, int32_t element, int32_t rule, const float* given,
                                  int64_t given_count, uint8_t* packed, int64_t packed_bytes, void* scale,
                                  int64_t scale_bytes, int32_t* finite, int32_t threads) {
  if (const char* why = check_sizes(w, dtype, w_bytes, N, K, group_size)) return fail("encode_pack: %s", why);
  if (element < 0 || element > (int32_t)Element::codebook || rule < 0 || rule > (int32_t)Rule::block ||
      (element == (int32_t)Element::codebook) != (rule == (int32_t)Rule::absmax))
    return fail("encode_pack: unknown numbers");
  const bool square = rule == (int32_t)Rule::block;
  if (square && group_size % 16) return fail("encode_pack: blocks must have a multiple of 16 rows");
  Job job = {K, group_size, (K + group_size - 1) / group_size, (DType)dtype, (Element)element, (Rule)rule, given, {}};
  const int32_t bits = job.element == Element::e2m1 || job.element == Element::codebook ? 4 : 8;
  const int64_t blocks = padded(N, 32) / 16, Kp = padded(K, 64);
  const int64_t wanted[] = {0, 1, 0, N * job.groups, 31, 0};  // what each rule is given
  const int64_t scale_size = job.rule <= Rule::nested ? 1 : job.rule == Rule::absmax ? 4 : bytes_of(job.dtype);
  if (given_count != wanted[rule] || (given_count && !given)) return fail("encode_pack: wrong numbers were given");
  if (!packed || packed_bytes != blocks * 2 * Kp * bits) return fail("encode_pack: the packed weight has the wrong size");
  if (!scale || scale_bytes != blocks * 16 * job.groups * scale_size) return fail("encode_pack: scale has the wrong size");
  if (job.rule == Rule::absmax) read_book(given, job.book);
  const bool avx2 = machine_runs(1);
  const auto one = avx2 ? encode<Avx2> : encode<Plain>;
  const auto tile = avx2 ? pack_tile_avx2 : pack_any;
  const auto look = avx2 ? largest_of_block<Avx2> : largest_of_block<Plain>;
  const int64_t tall = square ? group_size / 16 : 1;  // blocks of 16 rows that share their scales
  const int32_t team = team_size(threads, (blocks + tall - 1) / tall);
  int32_t failed = 0, rows_not_finite = 0;
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : failed, rows_not_finite)
  for (int64_t first = 0; first < blocks; first += tall) {
    try {
      float* shared = square ? (float*)scratch(2, job.groups * 4) : nullptr;
      if (square) look(job, w, first * 16, (first + tall) * 16 < N ? tall * 16 : N > first * 16 ? N - first * 16 : 0, shared);
      int8_t* rows = (int8_t*)scratch(0, 16 * Kp);
      for (int64_t b = first; b < first + tall && b < blocks; b++) {
      for (int64_t r = 0; r < 16; r++) {
        const int64_t n = b * 16 + r, at = b * job.groups * 16 + r, there = n < N ? K : 0;
        if (there) rows_not_finite += !one(job, w, n, shared, rows + r * Kp, (char*)scale + at * scale_size);
        for (int64_t g = 0; !there && g < job.groups; g++) pad_scale(job, scale, at + g * 16);
        memset(rows + r * Kp + there, 0, (size_t)(Kp - there));
      }
      for (int64_t j = 0; j < Kp / 64; j++) tile(rows + j * 64, Kp, bits, packed + (b * (Kp / 64) + j) * bits * 128);
      }
    } catch (...) {
      failed++;
    }
  }
  if (finite) *finite = !rows_not_finite;
  return failed ? fail("encode_pack: out of memory") : 0;
}

extern "C" int32_t qp_amax(const void* w, int32_t dtype, int64_t w_bytes, int64_t N, int64_t K, int64_t group_size,
                           float* amax, int32_t threads) {
  if (const char* why = check_sizes(w, dtype, w_bytes, N, K, group_size)) return fail("amax: %s", why);
  if (!amax) return fail("amax: a null pointer was given");
  const bool avx2 = machine_runs(1);
  const auto largest = [avx2](const auto* w, int64_t size, float& most) {
    avx2 ? Avx2::largest(w, size, most) : Plain::largest(w, size, most);
  };
  const int64_t groups = (K + group_size - 1) / group_size;
  const int32_t team = team_size(threads, N);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t n = 0; n < N; n++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = n * K + g * group_size, size = (g + 1) * group_size < K ? group_size : K - g * group_size;
      float most;
      if (dtype == 0)
        largest((const float*)w + first, size, most);
      else if (dtype == 1)
        largest((const uint16_t*)w + first, size, most);
      else
        largest((const Half*)w + first, size, most);
      amax[n * groups + g] = most;
    }
  return 0;
}
