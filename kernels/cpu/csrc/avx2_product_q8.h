// AVX2 product of eight and more int8 rows with 8-bit weights: the codes of 16 outputs are widened to int16 once, a
// stretch of inputs at a time that stays in the L1 cache, and then meet all rows, which lie in fours (the sums of more
// would not fit the registers). Sums, and the order of groups, are those of avx2_product_q.h.
#pragma once

namespace qpass {
namespace {

constexpr int64_t kManyRows = 8;         // measured: with fewer, widening costs more than it saves
constexpr int64_t kPanelInputs = 512;    // 16 KB, half of the L1 cache

// What four rows and 16 outputs have come to between two stretches of inputs; `total` of the group that is not at its end.
struct alignas(32) Partial {
  int32_t total[4][16];
  float y[4][16];
};

// Rows as fours: codes [M/4][Kp/4][4 rows][4], rows beyond the last being 0, and sums of groups [M/4][groups][4 rows].
struct Fours {
  int16_t* x;
  int32_t* sums;
  Partial* partial;
  int64_t count;
};

Fours fours_of(const Weight& w, const QuantRows& x, const int32_t* group_sums, int64_t m0, int64_t M) {
  const int64_t count = (M + 3) / 4;
  Fours f = {(int16_t*)scratch(5, count * 4 * x.Kp * 2), nullptr, nullptr, count};
  f.partial = (Partial*)scratch(7, count * ((int64_t)sizeof(Partial) + w.groups * 16));
  f.sums = (int32_t*)(f.partial + count);
  for (int64_t four = 0; four < count; four++) {
    const int8_t* row[4];
    for (int m = 0; m < 4; m++) {
      const int64_t at = four * 4 + m;
      row[m] = at < M ? x.q + (m0 + at) * x.Kp : nullptr;
      for (int64_t g = 0; g < w.groups; g++)
        f.sums[(four * w.groups + g) * 4 + m] = at < M ? group_sums[(m0 + at) * w.groups + g] : 0;
    }
    __m256i* to = (__m256i*)(f.x + four * 4 * x.Kp);
    for (int64_t k = 0; k < x.Kp; k += 16, to += 4) {
      __m128i r[4];
      for (int m = 0; m < 4; m++) r[m] = row[m] ? _mm_loadu_si128((const __m128i*)(row[m] + k)) : _mm_setzero_si128();
      const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
      const __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
      _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(a, b)));
      _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm_unpackhi_epi64(a, b)));
      _mm256_store_si256(to + 2, _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(c, d)));
      _mm256_store_si256(to + 3, _mm256_cvtepi8_epi16(_mm_unpackhi_epi64(c, d)));
    }
  }
  return f;
}

// The panel is [2 halves][inputs / 4][8 outputs][4].
void widen(const uint8_t* tile, int64_t tiles, int16_t* panel) {
  int16_t* second = panel + tiles * 512;
  for (int64_t line = 0; line < tiles * 16; line++, tile += 64, panel += 32, second += 32)
    for (int i = 0; i < 2; i++) {
      const __m128i* at = (const __m128i*)tile + i;
      _mm256_store_si256((__m256i*)panel + i, _mm256_cvtepu8_epi16(_mm_loadu_si128(at)));
      _mm256_store_si256((__m256i*)second + i, _mm256_cvtepu8_epi16(_mm_loadu_si128(at + 2)));
    }
}

#define QPASS_LINE8(codes, x0, x1, x2, x3) QPASS_LINE("vpbroadcastq", "vpmaddwd", "vpaddd", codes, x0, x1, x2, x3)
#define QPASS_ZERO(a) "vpxor %%xmm" #a ", %%xmm" #a ", %%xmm" #a "\n\t"
#define QPASS_KEEP(at, a) "vmovdqa %%ymm" #a ", " #at "(%3)\n\t"

// Four rows times 4 lines of 8 outputs and 4 inputs, `turns` times.
inline __attribute__((always_inline)) void add_lines(const int16_t* lines, const int16_t* x, int64_t turns,
                                                     int32_t (&sum)[4][2][8]) {
  __asm__ volatile(
      QPASS_ZERO(0) QPASS_ZERO(1) QPASS_ZERO(2) QPASS_ZERO(3) QPASS_ZERO(4) QPASS_ZERO(5) QPASS_ZERO(6) QPASS_ZERO(7)
      "1:\n\t" QPASS_LINE8(0, 0, 8, 16, 24) QPASS_LINE8(64, 32, 40, 48, 56) QPASS_LINE8(128, 64, 72, 80, 88)
      QPASS_LINE8(192, 96, 104, 112, 120) "add $256, %0\n\tsub $-128, %1\n\tdec %2\n\tjnz 1b\n\t"
      QPASS_KEEP(0, 0) QPASS_KEEP(32, 1) QPASS_KEEP(64, 2) QPASS_KEEP(96, 3)
      QPASS_KEEP(128, 4) QPASS_KEEP(160, 5) QPASS_KEEP(192, 6) QPASS_KEEP(224, 7)
      : "+r"(lines), "+r"(x), "+r"(turns) : "r"(sum)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm12", "xmm13");
}

#undef QPASS_LINE8
#undef QPASS_ZERO
#undef QPASS_KEEP

// Four rows times a panel of `runs` times 32 inputs, of which the first is run `first` of the row.
__attribute__((noinline)) void multiply_four(const Weight& w, int64_t block, const int16_t* panel, int64_t first,
                                             int64_t runs, const int16_t* x, const int32_t* sums, Partial& to) {
  const int64_t each = w.group_size / 32;
  for (int h = 0; h < 2; h++) {
    int64_t group = first / each, left = each - first % each;
    const int16_t *lines = panel + h * runs * 256, *from = x;
    for (int64_t run = 0; run < runs && group < w.groups;) {  // after the last group the rest is padding
      const int64_t now = left < runs - run ? left : runs - run;
      alignas(32) int32_t sum[4][2][8];  // of each row, outputs 0 to 3 and 4 to 7, two sums each
      add_lines(lines, from, now * 2, sum);
      lines += now * 256, from += now * 128;
      __m256i total[4];
      run += now;
      left -= now;
      for (int m = 0; m < 4; m++) {
        __m256i* held = (__m256i*)(to.total[m] + h * 8);
        const __m256i pairs = _mm256_hadd_epi32(*(__m256i*)sum[m][0], *(__m256i*)sum[m][1]);
        total[m] = _mm256_add_epi32(*held, _mm256_permute4x64_epi64(pairs, 0xd8));
        *held = left ? total[m] : _mm256_setzero_si256();
      }
      if (left) continue;
      const __m256 scale = scales8(w, block, group, h);
      __m256i offset = _mm256_set1_epi32(128);
      if (w.zero_point) offset = _mm256_add_epi32(offset, zero_points8(w, block, group, h));
      for (int m = 0; m < 4; m++) {
        const __m256i off = _mm256_mullo_epi32(offset, _mm256_set1_epi32(sums[group * 4 + m]));
        float* y = to.y[m] + h * 8;
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(total[m], off));
        _mm256_store_ps(y, _mm256_fmadd_ps(sum, scale, _mm256_load_ps(y)));
      }
      left = each, group++;
    }
  }
}

// All rows of `fours`, the first of which is row m0 and of which there are M, times one block of 16 outputs.
void multiply_fours(const Weight& w, const QuantRows& x, const Fours& fours, const Output& out, int64_t m0, int64_t M,
                    int64_t block) {
  int16_t* panel = (int16_t*)scratch(6, kPanelInputs * 32);
  __builtin_memset(fours.partial, 0, (size_t)fours.count * sizeof(Partial));
  for (int64_t k = 0; k < w.Kp; k += kPanelInputs) {
    const int64_t inputs = w.Kp - k < kPanelInputs ? w.Kp - k : kPanelInputs;
    widen(w.q + (block * w.Kp + k) * 16, inputs / 64, panel);
    for (int64_t i = 0; i < fours.count; i++)
      multiply_four(w, block, panel, k / 32, inputs / 32, fours.x + (i * w.Kp + k) * 4, fours.sums + i * w.groups * 4,
                    fours.partial[i]);
  }
  for (int64_t m = 0; m < M; m++) {
    const float* y = fours.partial[m / 4].y[m % 4];
    finish_row(w, x, out, m0 + m, block, _mm256_load_ps(y), _mm256_load_ps(y + 8));
  }
}

}  // namespace
}  // namespace qpass
