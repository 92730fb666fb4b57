// AVX2: lines of 8-bit weights, as they lie packed, times four rows of bytes (avx2_rows_q8.h), added to int32 totals.
//
// From registers and the L1 cache, on one thread, Zen 3 gets to 214 GOPS with int16 sums of two lines, 259 of four, 289
// of eight; to 200 with each product widened to int32 by itself, and to 160 with inputs of int16 (avx2_product_q8.h).
#pragma once

namespace qpass {
namespace {

#define QPASS_LOAD(at, a) "vmovdqa " #at "(%4), %%ymm" #a "\n\t"
#define QPASS_STORE(at, a) "vmovdqa %%ymm" #a ", " #at "(%4)\n\t"

// A row times two lines, which are in ymm12 to 15: its inputs are at x and next, its int16 sums start at x of the starts.
#define QPASS_TWO(x, next, a, b)                                                                                       \
  "vpbroadcastd " #x "(%3), %%ymm11\n\t" QPASS_MULTIPLY("vpbroadcastd", "vpmaddubsw", x, 8, 9)                         \
  QPASS_ADD("vpaddw", 11, 11, 8, 9) "vpbroadcastd " #next "(%1), %%ymm11\n\t"                                          \
  "vpmaddubsw %%ymm11, %%ymm14, %%ymm10\n\tvpmaddubsw %%ymm11, %%ymm15, %%ymm11\n\t" QPASS_ADD("vpaddw", 10, 11, 8, 9) \
  "vpmaddwd (%6), %%ymm8, %%ymm8\n\tvpmaddwd (%6), %%ymm9, %%ymm9\n\t" QPASS_ADD("vpaddd", 8, 9, a, b)

// `turns` times two lines in int16 sums of two. `fetch` is read ahead of its use, `step` bytes further each time.
inline __attribute__((always_inline)) void add_twos(const uint8_t* codes, const int8_t* x, const int32_t* starts,
                                                    int64_t turns, const char* fetch, int64_t step,
                                                    int32_t (&total)[4][16]) {
  alignas(32) static const int16_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  int32_t(*to)[16] = total;
  __asm__ volatile(
      QPASS_ALL(QPASS_LOAD)
      "1:\n\tvmovdqu (%0), %%ymm12\n\tvmovdqu 32(%0), %%ymm13\n\tvmovdqu 64(%0), %%ymm14\n\tvmovdqu 96(%0), %%ymm15\n\t"
      "prefetcht0 (%5)\n\tprefetcht0 64(%5)\n\tadd %7, %5\n\t"
      QPASS_TWO(0, 16, 0, 1) QPASS_TWO(4, 20, 2, 3) QPASS_TWO(8, 24, 4, 5) QPASS_TWO(12, 28, 6, 7)
      "sub $-128, %0\n\tadd $32, %1\n\tadd $16, %3\n\tdec %2\n\tjnz 1b\n\t" QPASS_ALL(QPASS_STORE)
      : "+r"(codes), "+r"(x), "+r"(turns), "+r"(starts), "+r"(to), "+r"(fetch) : "r"(ones), "r"(step)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

#undef QPASS_LOAD
#undef QPASS_STORE
#undef QPASS_TWO

// Lines [line, end) of a block, which begins at `codes`, times four rows. The codes that were taken out of these lines, of
// which `taken` is the first, come after the others; returns the first of the lines behind.
inline __attribute__((always_inline)) const Taken* add_bytes(const uint8_t* codes, const Four& f, int64_t line,
                                                             int64_t end, const Taken* taken, const char* fetch,
                                                             int64_t step, int32_t (&total)[4][16]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int32_t* starts = f.starts + line / f.lines * 4;
  if (f.lines == 2) add_twos(codes + line * 64, f.x + line * 16, starts, (end - line) / 2, fetch, step, total);
  else
    for (int64_t at = line; at < end; at += f.lines, starts += 4) {
      for (int64_t i = 0; i < step * f.lines / 2; i += 64) _mm_prefetch(fetch + i, _MM_HINT_T0);
      fetch += step * f.lines / 2;
      add_run(codes + at * 64, f.x + at * 16, starts, f.lines * 4, total);
    }
  for (; taken < f.end && taken->line < end; taken++) {
    const __m256i* at = (const __m256i*)(codes + taken->line * 64);
    const __m256i x = _mm256_set1_epi32(taken->codes);
    __m256i* to = (__m256i*)total[taken->row];
    for (int h = 0; h < 2; h++) {
      const __m256i product = _mm256_maddubs_epi16(_mm256_loadu_si256(at + h), x);
      to[h] = _mm256_add_epi32(to[h], _mm256_madd_epi16(product, ones));
    }
  }
  return taken;
}

}  // namespace
}  // namespace qpass
