// AVX2: groups of a float weight to codes of small floats or of a codebook, 16 at a time. The same operations in the same
// precision as code_of and code_in_book of encode_weight.cpp, whose types these are: bit for bit the same.
#pragma once
#include <cstdint>

#include "avx2_largest.h"
#include "avx2_pack_tile.h"
#include "avx2_target.h"

namespace qpass {
namespace {

// 16 weights as floats. Those of bfloat16 are spread within each half of a register, as packing integers to 16 bits puts
// them together again; the others are in order.
QPASS_AVX2_INLINE void floats16(const float* w, __m256 (&v)[2]) {
  for (int j = 0; j < 2; j++) v[j] = _mm256_loadu_ps(w + j * 8);
}
QPASS_AVX2_INLINE void floats16(const Half* w, __m256 (&v)[2]) {
  for (int j = 0; j < 2; j++) v[j] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + j * 8)));
}
QPASS_AVX2_INLINE void floats16(const uint16_t* w, __m256 (&v)[2]) {
  const __m256i none = _mm256_setzero_si256(), u = _mm256_loadu_si256((const __m256i*)w);
  v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, u));
  v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, u));
}

constexpr bool in_lanes(const uint16_t*) { return true; }
constexpr bool in_lanes(const void*) { return false; }

// 16 integers of two registers from floats16, 16 bits each, in order.
QPASS_AVX2_INLINE __m256i joined(const void*, __m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}
QPASS_AVX2_INLINE __m256i joined(const uint16_t*, __m256i a, __m256i b) { return _mm256_packs_epi32(a, b); }

// The sign bits of 16 weights, 0x8000 or 0.
QPASS_AVX2_INLINE __m256i signs16(const float* w) {
  const __m256i a = _mm256_srai_epi32(_mm256_loadu_si256((const __m256i*)w), 31);
  const __m256i b = _mm256_srai_epi32(_mm256_loadu_si256((const __m256i*)(w + 8)), 31);
  return _mm256_and_si256(joined(w, a, b), _mm256_set1_epi16((int16_t)0x8000));
}
QPASS_AVX2_INLINE __m256i signs16_of(const void* w) {
  return _mm256_and_si256(_mm256_loadu_si256((const __m256i*)w), _mm256_set1_epi16((int16_t)0x8000));
}
QPASS_AVX2_INLINE __m256i signs16(const Half* w) { return signs16_of(w); }
QPASS_AVX2_INLINE __m256i signs16(const uint16_t* w) { return signs16_of(w); }

// code_of, of e2m3 before it becomes a byte.
template <Element kElement>
QPASS_AVX2_INLINE __m256i codes8(__m256 size) {
  using N = Numbers<kElement>;
  size = _mm256_min_ps(size, _mm256_set1_ps(N::largest));
  const __m256 least = _mm256_castsi256_ps(_mm256_set1_epi32((128 - N::bias) << 23));
  const __m256 exponent = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
  const __m256 binade = _mm256_and_ps(_mm256_max_ps(size, least), exponent);
  const __m256 next = _mm256_mul_ps(binade, _mm256_set1_ps(1.5f * (1 << (23 - N::mantissa))));
  const __m256i steps = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(size, next)), _mm256_castps_si256(next));
  return _mm256_add_epi32(_mm256_srli_epi32(_mm256_castps_si256(binade), 23 - N::mantissa), steps);
}

struct BookVectors {
  __m256 first, low, high, third, fourth;
};
QPASS_AVX2_INLINE BookVectors vectors_of(const Book& book) {
  return {_mm256_set1_ps(book.bounds[7]), _mm256_set1_ps(book.bounds[3]), _mm256_set1_ps(book.bounds[11]),
          _mm256_loadu_ps(book.third), _mm256_loadu_ps(book.fourth)};
}

// Minus how many bounds lie below each number.
QPASS_AVX2_INLINE __m256i ranks8(const BookVectors& book, __m256 v) {
  const __m256 above = _mm256_cmp_ps(v, book.first, _CMP_GT_OQ);
  __m256i n = _mm256_castps_si256(above);
  n = _mm256_add_epi32(_mm256_add_epi32(n, n), _mm256_castps_si256(_mm256_cmp_ps(
                                                   v, _mm256_blendv_ps(book.low, book.high, above), _CMP_GT_OQ)));
  n = _mm256_add_epi32(_mm256_add_epi32(n, n), _mm256_castps_si256(_mm256_cmp_ps(
                                                   v, _mm256_permutevar8x32_ps(book.third, n), _CMP_GT_OQ)));
  return _mm256_add_epi32(_mm256_add_epi32(n, n), _mm256_castps_si256(_mm256_cmp_ps(
                                                      v, _mm256_permutevar8x32_ps(book.fourth, n), _CMP_GT_OQ)));
}

// What a row's buffer holds of 16 codes of 16 bits.
QPASS_AVX2_INLINE void put16(__m256i codes, __m128i flip, int8_t* q) {
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storeu_si128((__m128i*)q, _mm_xor_si128(bytes, flip));
}

// 16 codes with their signs, 16 bits each. kInverse: `scale` is the inverse of a power of two, and a product is the quotient.
template <bool kInverse, class T, Element kElement>
QPASS_AVX2_INLINE __m256i codes16(const T* w, __m256 scale) {
  using N = Numbers<kElement>;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i first = _mm256_set1_epi16((128 - N::bias) << N::mantissa);
  __m256 v[2];
  __m256i code[2];
  floats16(w, v);
  for (int j = 0; j < 2; j++) {
    const __m256 at = _mm256_and_ps(v[j], magnitude);
    code[j] = codes8<kElement>(kInverse ? _mm256_mul_ps(at, scale) : _mm256_div_ps(at, scale));
  }
  __m256i codes = _mm256_sub_epi16(joined(w, code[0], code[1]), first);
  if (kElement == Element::e2m3) {
    const __m256i small = _mm256_broadcastsi128_si256(_mm_loadl_epi64((const __m128i*)kSmallSixes));
    const __m256i is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), codes);
    codes = _mm256_blendv_epi8(_mm256_add_epi16(codes, _mm256_set1_epi16(48)), _mm256_shuffle_epi8(small, codes),
                               is_small);
  }
  return _mm256_or_si256(codes, _mm256_srli_epi16(signs16(w), kElement == Element::e2m1 ? 12 : 8));
}

// `size` is a multiple of 16.
template <bool kInverse, class T, Element kElement>
QPASS_AVX2_INLINE void codes_by(const T* w, int64_t size, float by, int8_t* q) {
  const __m256 scale = _mm256_set1_ps(by);
  const __m128i flip = _mm_set1_epi8((char)(kElement == Element::e2m1 ? 8 : 128));
  for (int64_t i = 0; i < size; i += 16) put16(codes16<kInverse, T, kElement>(w + i, scale), flip, q + i);
}

// What a row's buffer holds of 32 bfloat16 whose magnitudes have the codes a and b; `sign` of a code, which packing adds.
QPASS_AVX2_INLINE void put32(const uint16_t* w, __m256i a, __m256i b, int8_t sign, int8_t* q) {
  const __m256i low = _mm256_loadu_si256((const __m256i*)w), high = _mm256_loadu_si256((const __m256i*)(w + 16));
  const __m256i negative = _mm256_packs_epi16(_mm256_srai_epi16(low, 15), _mm256_srai_epi16(high, 15));
  const __m256i bytes = _mm256_or_si256(_mm256_packus_epi16(a, b), _mm256_andnot_si256(negative, _mm256_set1_epi8(sign)));
  _mm256_storeu_si256((__m256i*)q, _mm256_permute4x64_epi64(bytes, 0xd8));
}

// Codes of bfloat16 by `code`, which takes 16 magnitudes and says of each in `hard` if it is none for it. Those are for
// `slow`, which takes 16 weights, as is what is left of `size`, a multiple of 16.
template <class Code, class Slow>
QPASS_AVX2_INLINE void codes_of(const uint16_t* w, int64_t size, int8_t sign, int8_t* q, Code code, Slow slow) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  const __m128i flip = _mm_set1_epi8(sign);
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    __m256i hard = _mm256_setzero_si256();
    const __m256i a = code(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)(w + i)), magnitude), hard);
    const __m256i b = code(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)(w + i + 16)), magnitude), hard);
    if (__builtin_expect(_mm256_testz_si256(hard, hard), 1)) {
      put32(w + i, a, b, sign, q + i);
    } else {
      put16(slow(w + i), flip, q + i);
      put16(slow(w + i + 16), flip, q + i + 16);
    }
  }
  if (i < size) put16(slow(w + i), flip, q + i);
}

// RNE(steps / 2^kShift), numbers of 16 bits without sign.
template <int kShift>
QPASS_AVX2_INLINE __m256i rounded16(__m256i steps) {
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(steps, kShift), _mm256_set1_epi16(1));
  const __m256i up = _mm256_add_epi16(steps, _mm256_set1_epi16((1 << (kShift - 1)) - 1));
  return _mm256_srli_epi16(_mm256_add_epi16(up, odd), kShift);
}

// e4m3 codes of bfloat16 divided by what has 16 bits too, with its inverse; no quotient is 500 or more. One is a tie of
// the rounding to 3 bits after the point or lies 2^-12 of its power of two or more from every tie. The product, off by
// 2^-22, is cut to 12 bits after the point, and made larger by 2^-13 of itself before, so that ties are found and nothing
// else becomes one. 16 bits hold that and the exponents of normal numbers, counted from 2^-7; what is below them is hard.
QPASS_AVX2_INLINE void codes_by_product(const uint16_t* w, int64_t size, float divisor, int8_t* q) {
  const __m256 inverse = _mm256_set1_ps((1 / divisor) * 1.0001220703125f), by = _mm256_set1_ps(divisor);
  const __m256i least = _mm256_set1_epi16((int16_t)(bits_of(divisor * 0.0156860352f) >> 16));  // a little more than 2^-6
  const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000), start = _mm256_set1_epi16((int16_t)(120 << 12 & 0xffff));
  codes_of(
      w, size, (int8_t)128, q,
      [&](__m256i size16, __m256i& hard) QPASS_AVX2 {
        const __m256 even = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(size16, 16)), inverse);
        const __m256 odd = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(size16, upper)), inverse);
        const __m256i steps = _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 11),
                                                 _mm256_slli_epi32(_mm256_castps_si256(odd), 5), 0xaa);
        hard = _mm256_or_si256(hard, _mm256_cmpgt_epi16(least, size16));
        return rounded16<9>(_mm256_sub_epi16(steps, start));
      },
      [&](const uint16_t* at) QPASS_AVX2 { return codes16<false, uint16_t, Element::e4m3>(at, by); });
}

// Codes of bfloat16 divided by 2^exponent, which is far from the ends, so that it is taken from their bits.
template <Element kElement>
QPASS_AVX2_INLINE void codes_by_bits(const uint16_t* w, int64_t size, int exponent, int8_t* q) {
  const __m256 inverse = _mm256_set1_ps(float_of((uint32_t)(127 - exponent) << 23));
  const auto slow = [&](const uint16_t* at) QPASS_AVX2 { return codes16<true, uint16_t, kElement>(at, inverse); };
  if constexpr (kElement == Element::e2m1) {
    // Bits count from 2^-1. From 1 on they are rounded to one after the point; below, the middles between values are
    // counted, of which 1/4 belongs to the value below it and 3/4 to the one above.
    const __m256i start = _mm256_set1_epi16((int16_t)((exponent + 126) * 128)), most = _mm256_set1_epi16(7 << 6);
    const __m256i quarter = _mm256_set1_epi16(-128), below = _mm256_set1_epi16(63), one = _mm256_set1_epi16(1);
    codes_of(
        w, size, 8, q,
        [&](__m256i size16, __m256i&) QPASS_AVX2 {
          const __m256i at = _mm256_min_epi16(_mm256_sub_epi16(size16, start), most);
          const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(at, 6), one);
          const __m256i above = _mm256_srai_epi16(_mm256_add_epi16(_mm256_add_epi16(at, _mm256_set1_epi16(31)), odd), 6);
          const __m256i few = _mm256_add_epi16(_mm256_cmpgt_epi16(at, quarter), _mm256_cmpgt_epi16(at, below));
          return _mm256_max_epi16(above, _mm256_abs_epi16(few));
        },
        slow);
  } else {  // e4m3, and e2m3, whose bytes are e4m3's: normal numbers are rounded to three bits after the point
    constexpr bool six = kElement == Element::e2m3;
    const __m256i start = _mm256_set1_epi16((int16_t)((exponent + 120) * 128));
    const __m256i most = _mm256_set1_epi16((six ? 0x4f : 0x7e) << 4), least = _mm256_set1_epi16((six ? 0x38 : 8) << 4);
    const __m256 eighths = _mm256_set1_ps(float_of((uint32_t)(127 + 3 - exponent) << 23));
    const __m256i small = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kSmallSixes));
    const __m256i none = _mm256_setzero_si256();
    codes_of(
        w, size, (int8_t)128, q,
        [&](__m256i size16, __m256i& hard) QPASS_AVX2 {
          const __m256i at = _mm256_min_epi16(_mm256_sub_epi16(size16, start), most), below = _mm256_cmpgt_epi16(least, at);
          const __m256i normal = rounded16<4>(at);
          if constexpr (!six) {
            hard = _mm256_or_si256(hard, below);
            return normal;
          } else {  // below 1 they are eighths, of which 8 are 1
            const __m256 low = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, size16));
            const __m256 high = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, size16));
            const __m256i count = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(low, eighths)),
                                                     _mm256_cvtps_epi32(_mm256_mul_ps(high, eighths)));
            return _mm256_blendv_epi8(normal, _mm256_shuffle_epi8(small, count), below);
          }
        },
        slow);
  }
}
template <Element kElement>
QPASS_AVX2_INLINE void codes_by_bits(const void*, int64_t, int, int8_t*) {}
QPASS_AVX2_INLINE void codes_by_product(const void*, int64_t, float, int8_t*) {}

template <class T>
QPASS_AVX2_INLINE void codes_in_book(const Book& book, const T* w, int64_t size, float divisor, int8_t* q) {
  const BookVectors found = vectors_of(book);
  const __m256 scale = _mm256_set1_ps(divisor);
  const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)book.backwards));
  const __m256i low = _mm256_set1_epi16(15);
  for (int64_t i = 0; i < size; i += 16) {
    __m256 v[2];
    floats16(w + i, v);
    const __m256i a = ranks8(found, _mm256_div_ps(v[0], scale)), b = ranks8(found, _mm256_div_ps(v[1], scale));
    const __m256i of_rank = _mm256_shuffle_epi8(codes, _mm256_and_si256(joined(w, a, b), low));
    put16(_mm256_and_si256(of_rank, low), _mm_set1_epi8(8), q + i);
  }
}

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

  template <class T>
  QPASS_AVX2 static uint32_t magnitude(const T* w, int64_t size) {
    const int64_t whole = size & ~int64_t(15);
    bool all_finite;
    const uint32_t found = largest16(w, whole, all_finite), rest = magnitude_plain(w + whole, size - whole);
    return rest > found ? rest : found;
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
