// AVX2: rows of a float weight to codes and scales, as encode_weight.cpp, whose types these are, has them in plain C: bit
// for bit the same.
#pragma once
#include <cstdint>

#include "avx2_encode_bits.h"
#include "avx2_encode_floats.h"
#include "avx2_largest.h"
#include "avx2_pack_tile.h"

namespace qpass {
namespace {

struct Avx2 {
  // The largest magnitudes of 8 groups that are whole; false if they are not taken, or not finite.
  template <class T>
  QPASS_AVX2 static bool largest_8(const T* w, int64_t size, float* most) {
    if (sizeof(T) != 2 || size % 16) return false;
    __m256 found;
    if (!largest_of_8(w, size, found)) return false;
    _mm256_storeu_ps(most, found);
    return true;
  }
  template <class T>
  QPASS_AVX2 static bool largest(const T* w, int64_t size, float& most) {
    const int64_t whole = size & ~int64_t(15);
    bool all_finite;
    uint32_t found = largest16(w, whole, all_finite);
    if (!all_finite) found = largest_plain(w, whole);
    const uint32_t rest = whole < size ? largest_plain(w + whole, size - whole) : 0;
    most = float_of(rest > found ? rest : found);
    return all_finite;
  }

  QPASS_AVX2 static void powers(const Job& job, const float* most, float* divisor, uint8_t* scale) {
    const int offset = job.element == Element::e4m3 ? 8 : 2, mantissa = job.element == Element::e2m3 ? 3 : 1;
    const __m256i up = _mm256_set1_epi32(1 << (22 - mantissa)), less = _mm256_set1_epi32(offset);
    const __m256i none = _mm256_setzero_si256(), last = _mm256_set1_epi32(254), least = _mm256_set1_epi32(1 << 22);
    for (int64_t g = 0; g < job.groups; g += 8) {
      const __m256i u = _mm256_add_epi32(_mm256_loadu_si256((const __m256i*)(most + g)), up);
      const __m256i e = _mm256_min_epi32(_mm256_max_epi32(_mm256_sub_epi32(_mm256_srli_epi32(u, 23), less), none), last);
      _mm256_storeu_si256((__m256i*)(divisor + g), _mm256_max_epi32(_mm256_slli_epi32(e, 23), least));
      alignas(32) uint32_t bytes[8];
      _mm256_store_si256((__m256i*)bytes, e);
      for (int i = 0; i < 8; i++) scale[(g + i) * 16] = (uint8_t)bytes[i];
    }
  }

  QPASS_AVX2 static void scales(const Job& job, int64_t row, const float* most, float* divisor, void* scale) {
    if (job.groups % 8 || (job.rule != Rule::nested && job.rule != Rule::exponent))
      return scales_plain(job, row, most, divisor, scale);
    if (job.rule == Rule::exponent) return powers(job, most, divisor, (uint8_t*)scale);
    const __m256 shared = _mm256_set1_ps(job.given[0]), six = _mm256_set1_ps(6);
    const __m256i first = _mm256_set1_epi32((128 - 7) << 3), eps = _mm256_set1_epi32(0x20), none = _mm256_setzero_si256();
    for (int64_t g = 0; g < job.groups; g += 8) {
      const __m256 wanted = _mm256_mul_ps(shared, _mm256_div_ps(_mm256_loadu_ps(most + g), six));
      __m256i byte = _mm256_sub_epi32(codes8<Element::e4m3>(wanted), first);
      byte = _mm256_blendv_epi8(byte, eps, _mm256_cmpeq_epi32(byte, none));
      // Its exponent is one of a float divided by 2^120; below 8 it is a number of 2^-9.
      const __m256 normal = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(byte, _mm256_set1_epi32(960)), 20));
      const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(byte), _mm256_set1_ps(0x1p-9f));
      const __m256 is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), byte));
      _mm256_storeu_ps(divisor + g, _mm256_div_ps(_mm256_blendv_ps(normal, small, is_small), shared));
      alignas(32) uint32_t bytes[8];
      _mm256_store_si256((__m256i*)bytes, byte);
      for (int i = 0; i < 8; i++) ((uint8_t*)scale)[(g + i) * 16] = (uint8_t)bytes[i];
    }
  }

  template <class T, Element kElement>
  QPASS_AVX2 static void codes(const Job& job, const T* w, const float* most, const float* divisor, int8_t* q) {
    for (int64_t g = 0, first = 0; g < job.groups; g++, first += job.group_size) {
      const int64_t size = first + job.group_size < job.K ? job.group_size : job.K - first, whole = size & ~int64_t(15);
      for (int64_t ahead = 0; ahead < size; ahead += 64 / (int64_t)sizeof(T))  // the next row, wanted next
        _mm_prefetch((const char*)(w + job.K + first + ahead), _MM_HINT_T0);
      if constexpr (kElement == Element::codebook)
        codes_in_book(job.book, w + first, whole, divisor[g], q + first);
      else if (in_lanes(w) && job.rule == Rule::exponent && divisor[g] > 0x1p-110f && divisor[g] < 0x1p110f)
        codes_by_bits<kElement>(w + first, whole, (int)(bits_of(divisor[g]) >> 23) - 127, q + first);
      else if (kElement == Element::e4m3 && in_lanes(w) && !(bits_of(divisor[g]) & 0xffff) && divisor[g] > 0x1p-100f &&
               divisor[g] < 0x1p100f && most[g] < 500 * divisor[g])
        codes_by_product(w + first, whole, divisor[g], q + first);
      else if (job.rule == Rule::exponent && divisor[g] > 0x1p-120f && divisor[g] < 0x1p120f)
        codes_by<true, T, kElement>(w + first, whole, float_of(0x7f000000u - bits_of(divisor[g])), q + first);
      else
        codes_by<false, T, kElement>(w + first, whole, divisor[g], q + first);
      if (whole < size) codes_plain<T, kElement>(job, w + first + whole, size - whole, divisor[g], q + first + whole);
    }
  }
};

}  // namespace
}  // namespace qpass
