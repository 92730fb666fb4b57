// AVX2 product of int8 rows with 4-bit or 8-bit weights, exact in int32 within a group.
//
// 4 bits: maddubs(code 0..15, x) adds two products, at most 2 * 15 * 128 = 3840, so the 8 lines of a block can be added
// in int16 (30720) before they are widened; a line's low nibbles are 32 inputs, its high nibbles the next 32.
// Groups of 64 inputs and their multiples have a faster way, avx2_product_q4.h, and many rows another, avx2_panel_q4.h.
// 8 bits: codes 0..255 and x are widened to int16 and go through madd_epi16, which no value of x overflows. Two and more
// rows have a faster way, avx2_product_q8.h.
// Integer scales: a run's sum, its offset taken off, times the run's multiplier, adds up in int32 over the whole row.
// Codes carry an offset (8 or 128) plus the weight's zero point: offset * sum(x) is taken off once a group.
#pragma once

namespace qpass {
namespace {

// Sums of 32 inputs, of R rows and 16 outputs (two halves of 8).
template <int R>
struct Sums {
  __m256i v[R][2];
};

// H = 2 reads whole lines; four rows of 16 outputs would not fit the registers, so they take half lines, twice.
template <int R, int H>
inline __attribute__((always_inline)) void lines4(const uint8_t* w, const int8_t* x, int64_t ld, int h0, Sums<R>& low,
                                                  Sums<R>& high) {
  const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256i a[R][H], b[R][H];
  for (int m = 0; m < R; m++)
    for (int h = 0; h < H; h++) a[m][h] = b[m][h] = _mm256_setzero_si256();
#pragma GCC unroll 1  // unrolled, GCC moves every load to the front and runs out of registers
  for (int r = 0; r < 8; r++) {
    if (R == 1) _mm_prefetch((const char*)w + r * 64 + kPrefetch, _MM_HINT_T0);
    __m256i u[H], v[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; h++) {
      __m256i both = _mm256_loadu_si256((const __m256i*)(w + r * 64 + (h0 + h) * 32));
      u[h] = _mm256_and_si256(both, nibble);
      v[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    }
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
      int32_t p, s;
      __builtin_memcpy(&p, x + m * ld + r * 4, 4);
      __builtin_memcpy(&s, x + m * ld + 32 + r * 4, 4);
      __m256i xp = _mm256_set1_epi32(p), xs = _mm256_set1_epi32(s);
#pragma GCC unroll 2
      for (int h = 0; h < H; h++) {
        a[m][h] = _mm256_add_epi16(a[m][h], _mm256_maddubs_epi16(u[h], xp));
        b[m][h] = _mm256_add_epi16(b[m][h], _mm256_maddubs_epi16(v[h], xs));
      }
    }
  }
  for (int m = 0; m < R; m++)
    for (int h = 0; h < H; h++) {
      low.v[m][h0 + h] = _mm256_madd_epi16(a[m][h], one);
      high.v[m][h0 + h] = _mm256_madd_epi16(b[m][h], one);
    }
}

template <int R>
inline __attribute__((always_inline)) void sums64(const uint8_t* w, const int8_t* x, int64_t ld, Sums<R> (&part)[2]) {
  constexpr int H = R <= 2 ? 2 : 1;
#pragma GCC unroll 1
  for (int h = 0; h < 2; h += H) lines4<R, H>(w, x, ld, h, part[0], part[1]);
}

template <int R>
inline __attribute__((always_inline)) void lines8(const uint8_t* w, const int16_t* x, int64_t ld, int h, Sums<R>& sums) {
  __m256i a[R], b[R];
  for (int m = 0; m < R; m++) a[m] = b[m] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int r = 0; r < 8; r++) {
    if (R == 1 && h == 0) _mm_prefetch((const char*)w + r * 64 + kPrefetch, _MM_HINT_T0);
    const __m128i* at = (const __m128i*)(w + r * 64 + h * 32);
    __m256i u = _mm256_cvtepu8_epi16(_mm_loadu_si128(at)), v = _mm256_cvtepu8_epi16(_mm_loadu_si128(at + 1));
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
      long long four;
      __builtin_memcpy(&four, x + m * ld + r * 4, 8);
      __m256i xs = _mm256_set1_epi64x(four);
      a[m] = _mm256_add_epi32(a[m], _mm256_madd_epi16(u, xs));
      b[m] = _mm256_add_epi32(b[m], _mm256_madd_epi16(v, xs));
    }
  }
  for (int m = 0; m < R; m++)  // a holds outputs 0 to 3, b 4 to 7, two sums each
    sums.v[m][h] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a[m], b[m]), 0xd8);
}

template <int R>
inline __attribute__((always_inline)) void sums64(const uint8_t* w, const int16_t* x, int64_t ld, Sums<R> (&part)[2]) {
#pragma GCC unroll 1
  for (int i = 0; i < 4; i++) lines8<R>(w + i / 2 * 512, x + i / 2 * 32, ld, i & 1, part[i / 2]);
}

// R rows times one block of 16 outputs. `group_sums` is [R][inner_groups]; X is int8_t for 4 bits and int16_t for 8.
template <int R, typename X, bool INTEGER>
struct Columns {
  const Weight& w;
  const int32_t* group_sums;
  int64_t block, group = 0;
  const int64_t groups = inner_groups(w);
  Sums<R> total, whole;
  __m256 y[R][2];

  Columns(const Weight& weight, const int32_t* sums, int64_t nb) : w(weight), group_sums(sums), block(nb) {
    for (int m = 0; m < R; m++)
      for (int h = 0; h < 2; h++) {
        y[m][h] = _mm256_setzero_ps();
        total.v[m][h] = whole.v[m][h] = _mm256_setzero_si256();
      }
  }

  inline __attribute__((always_inline)) void add(const Sums<R>& part) {
    for (int m = 0; m < R; m++)
      for (int h = 0; h < 2; h++) total.v[m][h] = _mm256_add_epi32(total.v[m][h], part.v[m][h]);
  }

  inline __attribute__((always_inline)) void end_run() {
    for (int h = 0; h < 2; h++) {
      const __m128i* at = (const __m128i*)(w.multiplier + (block * groups + group) * 16 + h * 8);
      const __m256i multiplier = _mm256_cvtepi8_epi32(_mm_loadl_epi64(at));
      for (int m = 0; m < R; m++) {
        __m256i sum = _mm256_sub_epi32(total.v[m][h], _mm256_set1_epi32(8 * group_sums[m * groups + group]));
        whole.v[m][h] = _mm256_add_epi32(whole.v[m][h], _mm256_mullo_epi32(sum, multiplier));
        total.v[m][h] = _mm256_setzero_si256();
      }
    }
    group++;
  }

  inline __attribute__((always_inline)) void scale_rows() {
    for (int h = 0; h < 2; h++)
      for (int m = 0; m < R; m++)
        y[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole.v[m][h]), scales8(w, block, 0, h), _mm256_setzero_ps());
  }

  inline __attribute__((always_inline)) void end_group() {
    for (int h = 0; h < 2; h++) {
      const __m256 scale = scales8(w, block, group, h);
      __m256i offset = _mm256_set1_epi32(w.bits == 4 ? 8 : 128);
      if (w.zero_point) offset = _mm256_add_epi32(offset, zero_points8(w, block, group, h));
      for (int m = 0; m < R; m++) {
        __m256i off = _mm256_mullo_epi32(offset, _mm256_set1_epi32(group_sums[m * w.groups + group]));
        __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(total.v[m][h], off));
        y[m][h] = _mm256_fmadd_ps(sum, scale, y[m][h]);
        total.v[m][h] = _mm256_setzero_si256();
      }
    }
    group++;
  }

  inline __attribute__((always_inline)) void run(const X* x, int64_t ld) {
    const int64_t runs = inner_size(w) / 32, block_bytes = w.bits * 128;
    const uint8_t* line = w.q + block * (w.Kp / 64) * block_bytes;
    Sums<R> part[2];
    int64_t left = runs;
    for (int64_t kb = 0; kb < w.Kp / 64; kb++, line += block_bytes, x += 64) {
      sums64<R>(line, x, ld, part);
      for (int i = 0; i < 2 && group < groups; i++) {  // after the last group the rest of the block is padding
        add(part[i]);
        if (--left) continue;
        if (INTEGER) end_run();
        else end_group();
        left = runs;
      }
    }
    if (INTEGER) scale_rows();
  }
};

template <int R, bool INTEGER, typename X>
__attribute__((noinline)) void multiply(const Weight& w, const QuantRows& x, const X* rows, const int32_t* group_sums,
                                        const Output& out, int64_t m0, int64_t block) {
  Columns<R, X, INTEGER> c(w, group_sums + m0 * inner_groups(w), block);
  c.run(rows, x.Kp);
  for (int m = 0; m < R; m++) finish_row(w, x, out, m0 + m, block, c.y[m][0], c.y[m][1]);
}

template <bool INTEGER, typename X>
void multiply_rows(const Weight& w, const QuantRows& x, const X* rows, const int32_t* group_sums, const Output& out,
                   int64_t m0, int64_t m1, int64_t block) {
  int64_t m = m0;
  for (; m + 4 <= m1; m += 4) multiply<4, INTEGER>(w, x, rows + (m - m0) * x.Kp, group_sums, out, m, block);
  if (m + 2 <= m1) {
    multiply<2, INTEGER>(w, x, rows + (m - m0) * x.Kp, group_sums, out, m, block);
    m += 2;
  }
  if (m < m1) multiply<1, INTEGER>(w, x, rows + (m - m0) * x.Kp, group_sums, out, m, block);
}

const int32_t* sums_of_groups(const Weight& w, const QuantRows& x) {
  const int64_t runs = inner_size(w) / 32, groups = inner_groups(w);
  if (runs == 1 && groups == x.Kp / 32) return x.sums;
  int32_t* sums = (int32_t*)scratch(4, x.M * groups * 4);
  for (int64_t m = 0; m < x.M; m++)
    for (int64_t g = 0; g < groups; g++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < runs; i++) sum += x.sums[m * (x.Kp / 32) + g * runs + i];
      sums[m * groups + g] = sum;
    }
  return sums;
}

const int16_t* widened(const QuantRows& x, int64_t m0, int64_t m1) {
  const int8_t* from = x.q + m0 * x.Kp;
  const int64_t count = (m1 - m0) * x.Kp;
  int16_t* wide = (int16_t*)scratch(5, count * 2);
  for (int64_t i = 0; i < count; i += 16)
    _mm256_storeu_si256((__m256i*)(wide + i), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + i))));
  return wide;
}

void product_q(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  const int64_t end = block_end * 16 < w.N ? block_end : (w.N + 15) / 16;
  if (w.bits == 4 && x.M >= kUnpackRows)
    return product_panels(w, x, out, w.zero_point ? sums_of_groups(w, x) : nullptr, block_begin, end);
  const bool whole = w.bits == 4 && (inner_groups(w) == 1 || inner_size(w) % 64 == 0);
  const int32_t* starts = whole ? starts_of(x) : nullptr;
  const int32_t* group_sums = starts && !w.zero_point ? nullptr : sums_of_groups(w, x);
  // Rows at a time so that they stay in the L2 cache while every block of weights passes by.
  const int64_t element = w.bits == 4 ? 1 : 2, fit = (256 << 10) / (x.Kp * element), step = fit < 8 ? 8 : fit & ~3;
  for (int64_t m0 = 0; m0 < x.M; m0 += step) {
    const int64_t m1 = m0 + step < x.M ? m0 + step : x.M;
    if (w.bits == 8 && m1 - m0 >= kByteRows) {
      const Fours fours(w, x, group_sums, m0, m1 - m0);
      if (!fours.widened || m1 - m0 >= kManyRows) {
        Partial* partial = (Partial*)scratch(5, fours.count * (int64_t)sizeof(Partial));
        for (int64_t block = block_begin; block < end; block++) multiply_fours(w, x, fours, partial, out, block);
        continue;
      }
    }
    const int16_t* wide = w.bits == 8 ? widened(x, m0, m1) : nullptr;
    for (int64_t block = block_begin; block < end; block++) {
      if (starts) multiply_rows64(w, x, starts, group_sums, out, m0, m1, block);
      else if (wide) multiply_rows<false>(w, x, wide, group_sums, out, m0, m1, block);
      else if (w.multiplier) multiply_rows<true>(w, x, x.q + m0 * x.Kp, group_sums, out, m0, m1, block);
      else multiply_rows<false>(w, x, x.q + m0 * x.Kp, group_sums, out, m0, m1, block);
    }
  }
}

}  // namespace
}  // namespace qpass
