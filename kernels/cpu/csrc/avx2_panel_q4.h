// AVX2 product of many int8 rows with 4-bit weights: the codes of 16 outputs are unpacked to bytes once, a stretch of
// inputs at a time that stays in the L1 cache, and then meet all rows, four at a time.
//
// An int16 sum starts at -8 * (sum of its inputs), as in avx2_product_q4.h, and takes as many inputs, 32 to 256, as the
// rows at hand cannot overflow it with: 32 of any, 64 unless nearly all are at an end of their range, more of most.
// Sums, and the order of groups, are those of avx2_product_q.h.
#pragma once

namespace qpass {
namespace {

constexpr int64_t kUnpackRows = 12;  // measured: 1.04 times as fast with 12, 1.08 with 16; fewer were not tried
constexpr int64_t kStretch = 1024;   // inputs of a panel: 16 KB, half of the L1 cache

// What four rows and 16 outputs have come to between two stretches; `total` of the group that is not at its end.
struct alignas(32) PanelSums {
  int32_t total[4][16];
  union {
    float y[4][16];
    int32_t whole[4][16];  // with integer scales: totals times multipliers
  };
};

// The weights of 16 outputs and a stretch of inputs: codes as bytes [inputs / 4][16][4], and of each group that has an
// end in it, from `group` on, scales as float (or multipliers), and zero points, [groups][16].
struct alignas(64) Panel {
  uint8_t codes[kStretch * 16];
  float scale[kStretch / 32][16];
  int32_t multiplier[kStretch / 32][16], zero_point[kStretch / 32][16];
};

// Rows [m0, m0 + M) in fours, the last ones filled up with 0: codes [count][Kp / 4][4 rows][4], and of each int16 sum
// where it starts, two int16 as one int32, [count][Kp / run][4]; sums of groups [count][groups][4].
struct PanelRows {
  int8_t* x;
  int32_t *starts, *sums;
  PanelSums* partial;
  int64_t m0, M, count, run;  // inputs of one int16 sum: 32, 64, 128 or 256
};

// Four rows side by side, four inputs of each in turn.
void interleave(const int8_t* const (&row)[4], int64_t Kp, int8_t* to) {
  for (int64_t k = 0; k < Kp; k += 16, to += 64) {
    __m128i r[4];
    for (int m = 0; m < 4; m++) r[m] = row[m] ? _mm_loadu_si128((const __m128i*)(row[m] + k)) : _mm_setzero_si128();
    const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
    const __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
    _mm_store_si128((__m128i*)to, _mm_unpacklo_epi64(a, b));
    _mm_store_si128((__m128i*)to + 1, _mm_unpackhi_epi64(a, b));
    _mm_store_si128((__m128i*)to + 2, _mm_unpacklo_epi64(c, d));
    _mm_store_si128((__m128i*)to + 3, _mm_unpackhi_epi64(c, d));
  }
}

// Where the int16 sum of `run` inputs starts: -8 * (sum of the inputs) of each lane. `most` becomes at least what it can
// come to, over 8: weight * input adds up to 8 * (sum of magnitudes) at most, and sums on the way may wrap around.
inline int32_t start_of(const int8_t* q, int64_t run, __m128i& most) {
  const __m256i one = _mm256_set1_epi8(1);
  __m256i pairs = _mm256_setzero_si256(), sizes = pairs;
  for (int64_t k = 0; k < run; k += 32) {
    const __m256i codes = _mm256_loadu_si256((const __m256i*)(q + k));
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(one, codes));
    sizes = _mm256_add_epi16(sizes, _mm256_maddubs_epi16(_mm256_abs_epi8(codes), one));
  }
  const auto lanes = [](__m256i v) {
    const __m128i s = _mm_add_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i t = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_add_epi16(t, _mm_shuffle_epi32(t, 0xb1));
  };
  most = _mm_max_epi16(most, lanes(sizes));
  return _mm_cvtsi128_si32(_mm_mullo_epi16(lanes(pairs), _mm_set1_epi16(-8)));
}

// group_sums [x.M][groups], or null where nothing needs them.
PanelRows panel_rows(const Weight& w, const QuantRows& x, const int32_t* group_sums, int64_t m0, int64_t M, int64_t run) {
  const int64_t count = (M + 3) / 4, runs = x.Kp / run, groups = inner_groups(w);
  PanelRows p = {(int8_t*)scratch(5, count * 4 * x.Kp), nullptr, nullptr, nullptr, m0, M, count, run};
  p.partial = (PanelSums*)scratch(7, count * ((int64_t)sizeof(PanelSums) + 16 * (runs + groups)));
  p.starts = (int32_t*)(p.partial + count);
  p.sums = p.starts + count * 4 * runs;
  __m128i most = _mm_setzero_si128();
  for (int64_t i = 0; i < count; i++) {
    const int8_t* row[4];
    int32_t *starts = p.starts + i * 4 * runs, *sums = p.sums + i * 4 * groups;
    for (int m = 0; m < 4; m++) {
      const int64_t at = i * 4 + m;
      row[m] = at < M ? x.q + (m0 + at) * x.Kp : nullptr;
      for (int64_t r = 0; r < runs; r++) starts[r * 4 + m] = row[m] ? start_of(row[m] + r * run, run, most) : 0;
      for (int64_t g = 0; g < groups && group_sums; g++)
        sums[g * 4 + m] = row[m] ? group_sums[(m0 + at) * groups + g] : 0;
    }
    interleave(row, x.Kp, p.x + i * 4 * x.Kp);
  }
  const bool fits = !_mm_movemask_epi8(_mm_cmpgt_epi16(most, _mm_set1_epi16(32767 / 8)));
  return fits ? p : panel_rows(w, x, group_sums, m0, M, run / 2);
}

// Inputs [k, k + inputs) of a block; `groups` end among them, of which the first is number `group`.
void unpack_panel(const Weight& w, int64_t block, int64_t k, int64_t inputs, int64_t group, int64_t groups, Panel& panel) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i* from = (const __m256i*)(w.q + (block * w.Kp + k) * 8);
  __m256i* to = (__m256i*)panel.codes;
  for (int64_t tile = 0; tile < inputs / 64; tile++, to += 32)
    for (int r = 0; r < 16; r++, from++) {
      const __m256i both = _mm256_loadu_si256(from);
      _mm256_store_si256(to + r, _mm256_and_si256(both, nibble));
      _mm256_store_si256(to + 16 + r, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
    }
  for (int64_t g = 0; g < groups; g++)
    for (int h = 0; h < 2; h++) {
      if (w.zero_point) _mm256_store_si256((__m256i*)panel.zero_point[g] + h, zero_points8(w, block, group + g, h));
      const int64_t at = (block * inner_groups(w) + group + g) * 16 + h * 8;
      if (!w.multiplier) _mm256_store_ps(panel.scale[g] + h * 8, load8(w.scale, w.scale_dtype, at));
      else _mm256_store_si256((__m256i*)panel.multiplier[g] + h,
                              _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(w.multiplier + at))));
    }
}

#define QPASS_RUN                                                                                  \
  QPASS_BEGIN(0, 0, 1) QPASS_BEGIN(4, 2, 3) QPASS_BEGIN(8, 4, 5) QPASS_BEGIN(12, 6, 7)             \
  "1:\n\t" QPASS_LINES4 "add $256, %0\n\tadd $64, %1\n\tdec %2\n\tjnz 1b\n\t"                        \
  "vpcmpeqw %%ymm14, %%ymm14, %%ymm14\n\tvpabsw %%ymm14, %%ymm14\n\t"
#define QPASS_CHANGED                                                                                       \
  "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14"

// The products of a run of inputs, added to `total`.
inline __attribute__((always_inline)) void add_run(const uint8_t* codes, const int8_t* x, const int32_t* starts,
                                                   int64_t run, int32_t (&total)[4][16]) {
  int64_t turns = run / 16;
  __asm__ volatile(QPASS_RUN QPASS_ALL(QPASS_END)
                   : "+r"(codes), "+r"(x), "+r"(turns) : "r"(starts), "r"(total) : QPASS_CHANGED);
}

// The products of a run that is a whole group, times its scales, added to y, with no way through memory between.
inline __attribute__((always_inline)) void add_group(const uint8_t* codes, const int8_t* x, const int32_t* starts,
                                                     int64_t run, const float (&scale)[16], float (&y)[4][16]) {
  int64_t turns = run / 16;
  __asm__ volatile(QPASS_RUN "vmovaps (%5), %%ymm12\n\tvmovaps 32(%5), %%ymm13\n\t"
                   QPASS_END_SCALED(0, 0, 12) QPASS_END_SCALED(32, 1, 13) QPASS_END_SCALED(64, 2, 12)
                   QPASS_END_SCALED(96, 3, 13) QPASS_END_SCALED(128, 4, 12) QPASS_END_SCALED(160, 5, 13)
                   QPASS_END_SCALED(192, 6, 12) QPASS_END_SCALED(224, 7, 13)
                   : "+r"(codes), "+r"(x), "+r"(turns) : "r"(starts), "r"(y), "r"(scale) : QPASS_CHANGED);
}

// The totals of group g of the panel go into y, or times multipliers into `whole`; sums [4] are those of its inputs.
inline __attribute__((always_inline)) void end_group(const Weight& w, const Panel& panel, int64_t g, const int32_t* sums,
                                                     PanelSums& to) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i total[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    total[i] = _mm256_load_si256((const __m256i*)to.total + i);
    _mm256_store_si256((__m256i*)to.total + i, zero);
  }
  if (w.multiplier) {
    for (int i = 0; i < 8; i++) {
      __m256i* whole = (__m256i*)to.whole + i;
      *whole = _mm256_add_epi32(*whole, _mm256_mullo_epi32(total[i], ((const __m256i*)panel.multiplier[g])[i % 2]));
    }
    return;
  }
  if (w.zero_point) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const __m256i off = _mm256_mullo_epi32(((const __m256i*)panel.zero_point[g])[i % 2], _mm256_set1_epi32(sums[i / 2]));
      total[i] = _mm256_sub_epi32(total[i], off);
    }
  }
  const __m256 scale[2] = {_mm256_load_ps(panel.scale[g]), _mm256_load_ps(panel.scale[g] + 8)};
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    float* y = to.y[0] + i * 8;
    _mm256_store_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[i]), scale[i % 2], _mm256_load_ps(y)));
  }
}

// All rows times one block of 16 outputs. While a panel is multiplied, the weights of the next one are fetched.
void multiply_panels(const Weight& w, const QuantRows& x, const PanelRows& rows, const Output& out, int64_t block) {
  Panel& panel = *(Panel*)scratch(6, sizeof(Panel));
  const int64_t run = rows.run, groups = inner_groups(w), per = inner_size(w) / run, all = groups * per;
  const bool at_once = per == 1 && !w.multiplier && !w.zero_point;
  for (int64_t k = 0; k < w.Kp; k += kStretch) {
    const int64_t inputs = w.Kp - k < kStretch ? w.Kp - k : kStretch, first = k / run;
    const int64_t last = (k + inputs) / run < all ? (k + inputs) / run : all;  // after the last group it is padding
    unpack_panel(w, block, k, inputs, first / per, last / per - first / per, panel);
    const uint8_t* ahead = w.q + (block * w.Kp + k + inputs) * 8;
    const int64_t lines = kStretch / 8, steps = rows.count * (last - first), each = (lines + steps - 1) / steps;
    int64_t left_lines = lines;
    for (int64_t i = 0; i < rows.count; i++) {
      const int8_t* codes = rows.x + (i * w.Kp + k) * 4;
      const int32_t* starts = rows.starts + (i * w.Kp / run + first) * 4;
      PanelSums& to = rows.partial[i];
      if (k == 0) __builtin_memset(&to, 0, sizeof to);
      for (int64_t r = first, left = per - first % per, g = 0; r < last; r++, starts += 4, codes += run * 4) {
        for (int64_t n = 0; n < each && left_lines > 0; n++, left_lines--, ahead += 64)
          _mm_prefetch((const char*)ahead, _MM_HINT_T0);
        const uint8_t* lines16 = panel.codes + (r - first) * run * 16;
        if (at_once) {
          add_group(lines16, codes, starts, run, panel.scale[r - first], to.y);
          continue;
        }
        add_run(lines16, codes, starts, run, to.total);
        if (--left) continue;
        end_group(w, panel, g, rows.sums + (i * groups + first / per + g) * 4, to);
        left = per, g++;
      }
    }
  }
  for (int64_t m = 0; m < rows.M; m++) {
    const PanelSums& sums = rows.partial[m / 4];
    __m256 y[2];
    for (int h = 0; h < 2; h++) {
      y[h] = _mm256_load_ps(sums.y[m % 4] + h * 8);
      if (w.multiplier)
        y[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(y[h])), scales8(w, block, 0, h), _mm256_setzero_ps());
    }
    finish_row(w, x, out, rows.m0 + m, block, y[0], y[1]);
  }
}

void product_panels(const Weight& w, const QuantRows& x, const Output& out, const int32_t* group_sums,
                    int64_t block_begin, int64_t block_end) {
  // Equal parts of the rows, so that each stays in the L2 cache while every block of weights passes by.
  const int64_t fit = (256 << 10) / x.Kp, parts = fit < kUnpackRows ? x.M / kUnpackRows : (x.M + fit - 1) / fit;
  const int64_t step = padded((x.M + parts - 1) / parts, 4);
  int64_t run = 256;
  while (inner_size(w) % run) run /= 2;
  for (int64_t m0 = 0; m0 < x.M; m0 += step) {
    const PanelRows rows = panel_rows(w, x, group_sums, m0, x.M - m0 < step ? x.M - m0 : step, run);
    for (int64_t block = block_begin; block < block_end; block++) multiply_panels(w, x, rows, out, block);
  }
}

}  // namespace
}  // namespace qpass
