// The vpdpbusd kernel: up to 8 rows of codes times a range of 16-output blocks, over all of K.
#pragma once
#include "avx512_vector.h"

namespace qpass {
namespace {

// How far ahead each line of a weight is asked for, in bytes: `near` into the first cache, `far` into the second.
struct Ahead {
  int64_t near, far;
};

// Four places of 4 bits ask for enough by themselves.
constexpr Ahead ahead_of(int bits, int streams) { return {1024, bits == 4 && streams > 1 ? 0 : 4096}; }

template <int BITS, int STREAMS>
QPASS_AVX512_INLINE void prefetch(const uint8_t* line) {
  constexpr Ahead ahead = ahead_of(BITS, STREAMS);
  _mm_prefetch((const char*)line + ahead.near, _MM_HINT_T0);
  if (ahead.far) _mm_prefetch((const char*)line + ahead.far, _MM_HINT_T1);
}

// What one block of 16 outputs holds while K passes over it.
template <int ROWS>
struct VnniSums {
  __m512 acc[ROWS];
  __m512i low[ROWS], high[ROWS], whole[ROWS];
};

// One 64-input block of each stream: inputs 0..31 of it go to `low`, inputs 32..63 to `high` (4 bits: 16 times too large).
template <int BITS, int ROWS, int STREAMS>
QPASS_AVX512_INLINE void vnni_block(const uint8_t* (&q)[STREAMS], const int8_t* x, int64_t ld,
                                    VnniSums<ROWS> (&of)[STREAMS]) {
  constexpr int kLines = 8 / STREAMS;  // written out: eight products, whatever the streams
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 1
  for (int first = 0; first < 8; first += kLines) {
#pragma GCC unroll 8
    for (int r = first; r < first + kLines; r++) {
#pragma GCC unroll 4
      for (int s = 0; s < STREAMS; s++) {
        const uint8_t* line = q[s] + r * 64;
        __m512i lower = _mm512_loadu_si512(line), upper;
        prefetch<BITS, STREAMS>(line);
        if (BITS == 4) {
          upper = _mm512_andnot_si512(nibble, lower);
          lower = _mm512_and_si512(lower, nibble);
        } else {
          upper = _mm512_loadu_si512(line + 512);
          prefetch<BITS, STREAMS>(line + 512);
        }
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
          const int8_t* codes = x + m * ld + r * 4;
          of[s].low[m] = _mm512_dpbusd_epi32(of[s].low[m], lower, _mm512_set1_epi32(four_codes(codes)));
          of[s].high[m] = _mm512_dpbusd_epi32(of[s].high[m], upper, _mm512_set1_epi32(four_codes(codes + 32)));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < STREAMS; s++) q[s] += BITS * 128;
}

// Adds `high` to `low` and empties it.
template <int BITS, int ROWS>
QPASS_AVX512_INLINE void join(__m512i (&low)[ROWS], __m512i (&high)[ROWS]) {
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    low[m] = _mm512_add_epi32(low[m], BITS == 4 ? _mm512_srai_epi32(high[m], 4) : high[m]);
    high[m] = _mm512_setzero_si512();
  }
}

// Ends a group: takes the weights' offset (and zero points) out of the sums and adds them, scaled, to `acc`.
template <int BITS, int ROWS>
QPASS_AVX512_INLINE void vnni_close(const Weight& w, int64_t block, int64_t group, const int32_t* sums,
                                    const __m512i (&total)[ROWS], __m512 (&acc)[ROWS]) {
  constexpr int32_t kOffset = BITS == 4 ? 8 : 128;
  const __m512 scale = group_scales(w, block, group);
  if (w.zero_point) {
    const __m512i zero = _mm512_add_epi32(group_zero_points(w, block, group), _mm512_set1_epi32(kOffset));
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      __m512i offset = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sums[m * w.groups + group]));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(total[m], offset)), scale, acc[m]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    __m512i offset = _mm512_set1_epi32(kOffset * sums[m * w.groups + group]);
    acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(total[m], offset)), scale, acc[m]);
  }
}

// Ends a run of inputs that share a multiplier: its sum, without the offset, times the multiplier.
template <int ROWS>
QPASS_AVX512_INLINE void vnni_close_run(const Weight& w, int64_t block, int64_t run, const int32_t* sums,
                                        const __m512i (&total)[ROWS], __m512i (&whole)[ROWS]) {
  const int8_t* at = w.multiplier + (block * w.multipliers + run) * 16;
  const __m512i multiplier = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    const __m512i offset = _mm512_set1_epi32(8 * sums[m * w.multipliers + run]);
    whole[m] = _mm512_add_epi32(whole[m], _mm512_mullo_epi32(_mm512_sub_epi32(total[m], offset), multiplier));
  }
}

template <int BITS, int ROWS, bool INTEGER>
QPASS_AVX512_INLINE void close_group(VnniSums<ROWS>& of, const Weight& w, int64_t block, int64_t group,
                                     const int32_t* sums) {
  if (INTEGER) vnni_close_run<ROWS>(w, block, group, sums, of.low, of.whole);
  else vnni_close<BITS, ROWS>(w, block, group, sums, of.low, of.acc);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) of.low[m] = _mm512_setzero_si512();
}

// What a block has added up, as floats to be scaled by row.
template <int ROWS, bool INTEGER>
QPASS_AVX512_INLINE void take_sums(const VnniSums<ROWS>& of, const Weight& w, int64_t block, __m512* sums) {
  const __m512 scale = INTEGER ? group_scales(w, block, 0) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
    sums[m] = INTEGER ? _mm512_fmadd_ps(_mm512_cvtepi32_ps(of.whole[m]), scale, of.acc[m]) : of.acc[m];
}

// One function for any number of rows: it is long, and stands at the end of many loops.
QPASS_AVX512 inline void write_block(const Weight& w, const QuantRows& x, const Output& out, int64_t block, int64_t m0,
                                     const __m512* sums, int rows) {
  const Columns columns = columns_of(w, out, block, 1.f);
  for (int m = 0; m < rows; m++) finish(columns, x, out, m0 + m, sums[m], 1.f);
}

// Blocks of up to 4 rows are taken four at a time, from four places of the weight; more rows leave no registers for that.
constexpr int streams_of(int rows) { return rows <= 4 ? 4 : 1; }

// Rows m0 .. m0 + ROWS times blocks [block_begin, block_end); `first` is where the weights of block_begin lie.
// `group_sums` [M][inner_groups] are sums of codes.
// Groups are runs of 32 inputs; one that ends inside a 64-input block closes on `low`, and `high` opens the next.
template <int BITS, int ROWS, bool INTEGER>
QPASS_AVX512 void vnni_rows(const Weight& w, const QuantRows& x, const Output& out, const int32_t* group_sums,
                            const uint8_t* first, int64_t m0, int64_t block_begin, int64_t block_end) {
  constexpr int STREAMS = streams_of(ROWS);
  const int64_t groups = INTEGER ? w.multipliers : w.groups, block_bytes = w.Kp / 64 * BITS * 128;
  const int64_t runs = (INTEGER ? inner_size(w) : w.group_size) / 32, ld = x.Kp;
  const int32_t* sums = group_sums + m0 * groups;
  const int64_t count = (block_end - block_begin + STREAMS - 1) / STREAMS;
  for (int64_t i = 0; i < count; i++) {
    int64_t block[STREAMS];
    const uint8_t* q[STREAMS];
    blocks_at(block_begin, block_end, i, block);
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++) q[s] = first + (block[s] - block_begin) * block_bytes;
    const int8_t* codes = x.q + m0 * ld;
    VnniSums<ROWS> of[STREAMS];
    __m512 done[STREAMS][ROWS];
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++) {
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) {
        of[s].acc[m] = _mm512_setzero_ps();
        of[s].low[m] = of[s].high[m] = of[s].whole[m] = _mm512_setzero_si512();
      }
    }
    int64_t run = 0;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t end = (g + 1) * runs;
      bool inside = false;
      for (; run < end; run += 2, codes += 64) {
        inside = run + 1 == end;
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS && inside; s++) join<BITS>(of[s].low, of[s].high);
        vnni_block<BITS, ROWS, STREAMS>(q, codes, ld, of);
      }
#pragma GCC unroll 4
      for (int s = 0; s < STREAMS; s++) {
        if (!inside) join<BITS>(of[s].low, of[s].high);
        close_group<BITS, ROWS, INTEGER>(of[s], w, block[s], g, sums);
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++) take_sums<ROWS, INTEGER>(of[s], w, block[s], done[s]);
    for (int s = 0; s < STREAMS; s++) write_block(w, x, out, block[s], m0, done[s], ROWS);
  }
}

}  // namespace
}  // namespace qpass
