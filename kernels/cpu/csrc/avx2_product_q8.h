// AVX2 product of two and more int8 rows with 8-bit weights: four rows at a time meet a stretch of the weights of 16
// outputs that stays in the L1 cache, as bytes (avx2_bytes_q8.h) or, where a row's codes do not allow that, both widened
// to int16. Sums, and the order of groups, are those of avx2_product_q.h.
#pragma once

namespace qpass {
namespace {

constexpr int64_t kByteRows = 2;
constexpr int64_t kManyRows = 8;  // measured: with fewer, widening weights for all of them costs more than it saves

// What four rows and 16 outputs have come to between two stretches of inputs; `total` of the group that is not at its end.
struct alignas(32) Partial {
  int32_t total[4][16];
  float y[4][16];
  const Taken* taken;
};

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

// Lines [0, count) of a widened panel of `all` lines times four rows, added to `total`.
inline __attribute__((always_inline)) void add_widened(const int16_t* panel, int64_t all, const int16_t* x, int64_t count,
                                                       int32_t (&total)[4][16]) {
  for (int h = 0; h < 2; h++) {
    alignas(32) int32_t sum[4][2][8];  // of each row, outputs 0 to 3 and 4 to 7, two sums each
    add_lines(panel + h * all * 32, x, count / 4, sum);
    for (int m = 0; m < 4; m++) {
      __m256i* to = (__m256i*)total[m] + h;
      const __m256i pairs = _mm256_hadd_epi32(*(__m256i*)sum[m][0], *(__m256i*)sum[m][1]);
      *to = _mm256_add_epi32(*to, _mm256_permute4x64_epi64(pairs, 0xd8));
    }
  }
}

// The totals of a group go into y.
inline __attribute__((always_inline)) void end_group(const Weight& w, const Four& f, int64_t block, int64_t group,
                                                     Partial& to) {
  for (int h = 0; h < 2; h++) {
    const __m256 scale = scales8(w, block, group, h);
    const __m256i zero_point = w.zero_point ? zero_points8(w, block, group, h) : _mm256_setzero_si256();
    for (int m = 0; m < 4; m++) {
      __m256i* total = (__m256i*)to.total[m] + h;
      __m256i sum = _mm256_sub_epi32(*total, _mm256_set1_epi32(f.extra[group * 4 + m]));
      if (w.zero_point) sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero_point, _mm256_set1_epi32(f.sums[group * 4 + m])));
      *total = _mm256_setzero_si256();
      float* y = to.y[m] + h * 8;
      _mm256_store_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_load_ps(y)));
    }
  }
}

// All fours times one block of 16 outputs.
void multiply_fours(const Weight& w, const QuantRows& x, const Fours& fours, Partial* partial, const Output& out,
                    int64_t block) {
  const int64_t lines = w.Kp / 4, stretch = fours.widened ? 128 : 256, group_lines = w.group_size / 4;
  const uint8_t* codes = w.q + block * w.Kp * 16;
  int16_t* panel = fours.widened ? (int16_t*)scratch(6, stretch * 128) : nullptr;
  __builtin_memset(partial, 0, (size_t)fours.count * sizeof(Partial));
  for (int64_t i = 0; i < fours.count; i++) partial[i].taken = fours.four[i].taken;
  for (int64_t first = 0; first < lines; first += stretch) {
    const int64_t last = first + stretch < lines ? first + stretch : lines;
    if (panel) widen(codes + first * 64, (last - first) / 16, panel);
    for (int64_t i = 0; i < fours.count; i++) {
      const Four& f = fours.four[i];
      Partial& to = partial[i];
      const char* fetch = (const char*)codes + (last + (last - first) * i / fours.count) * 64;
      for (int64_t at = first, group = first / group_lines; at < last && group < w.groups;) {  // then comes padding
        const int64_t whole = (group + 1) * group_lines, end = whole < last ? whole : last;
        if (!f.lines) add_widened(panel + (at - first) * 32, last - first, (int16_t*)f.x + at * 16, end - at, to.total);
        else to.taken = add_bytes(codes, f, at, end, to.taken, fetch, 128 / fours.count, to.total);
        fetch += (end - at) / 2 * (128 / fours.count);
        if (end == whole) end_group(w, f, block, group++, to);
        at = end;
      }
    }
  }
  for (int64_t m = 0; m < fours.M; m++) {
    const float* y = partial[m / 4].y[m % 4];
    finish_row(w, x, out, fours.m0 + m, block, _mm256_load_ps(y), _mm256_load_ps(y + 8));
  }
}

}  // namespace
}  // namespace qpass
