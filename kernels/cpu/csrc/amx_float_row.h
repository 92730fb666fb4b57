// One row of bf16 times integer weights on AVX512, with the bits that tiles give: one row leaves tiles fifteen parts in
// sixteen empty, and what is unpacked for them goes to memory and back.
//
// A tile product adds up, of each run of 32 inputs, the products of even and of odd places of pairs (amx_floats.h) each by
// fma, adds the two sums, and adds that to what was there. The same is done here, 16 outputs at a time in four blocks, read
// from four places of the weight (vnni.cpp says why). Tiles take subnormal numbers as 0; here the mode of the processor
// that does so is on, for the scales too.
#pragma once
#include "avx512_decode.h"
#include "scratch.h"

namespace qpass {
namespace {

constexpr int kRowStreams = 4;
constexpr int64_t kRowAhead = 1024;  // bytes, of each stream

// Subnormal numbers are 0 as long as this lives.
class NoSubnormals {
 public:
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before_); }
  NoSubnormals(const NoSubnormals&) = delete;
  NoSubnormals& operator=(const NoSubnormals&) = delete;

 private:
  const unsigned before_;
};

// A run of 32 inputs of four blocks, added to `sums`; UPPER says which half of a 64-input block it is.
template <Decode DECODE, bool UPPER>
QPASS_AVX512_INLINE void add_run(const Weight& w, const float* x, const int64_t (&block)[kRowStreams],
                                 const Decoder (&decoder)[kRowStreams], int64_t run, __m512 (&sums)[kRowStreams]) {
  constexpr bool kFirstSight = DECODE == Decode::byte_zero || !UPPER;  // both runs of nibbles read the same lines
  const uint8_t* q[kRowStreams];
  __m512 even[kRowStreams], odd[kRowStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kRowStreams; s++) {
    q[s] = run_lines(w, block[s], run);
    even[s] = odd[s] = _mm512_setzero_ps();
  }
#pragma GCC unroll 1
  for (int r = 0; r < 8; r++, x += 4) {
#pragma GCC unroll 4
    for (int s = 0; s < kRowStreams; s++) {
      const __m512i line = _mm512_loadu_si512(q[s] + r * 64);
      if (kFirstSight) _mm_prefetch((const char*)q[s] + r * 64 + kRowAhead, _MM_HINT_T0);
      even[s] = _mm512_fmadd_ps(_mm512_set1_ps(x[0]), decoded<DECODE>(line, 0, UPPER, decoder[s]), even[s]);
      odd[s] = _mm512_fmadd_ps(_mm512_set1_ps(x[2]), decoded<DECODE>(line, 2, UPPER, decoder[s]), odd[s]);
      even[s] = _mm512_fmadd_ps(_mm512_set1_ps(x[1]), decoded<DECODE>(line, 1, UPPER, decoder[s]), even[s]);
      odd[s] = _mm512_fmadd_ps(_mm512_set1_ps(x[3]), decoded<DECODE>(line, 3, UPPER, decoder[s]), odd[s]);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kRowStreams; s++) sums[s] = _mm512_add_ps(sums[s], _mm512_add_ps(even[s], odd[s]));
}

template <Decode DECODE>
QPASS_AVX512 void row_product(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin,
                              int64_t block_end) {
  const NoSubnormals mode;
  float* row = (float*)scratch(5, w.Kp * 4);
  for (int64_t k = 0; k < w.Kp; k += 16)
    _mm512_store_ps(row + k, load_floats(x.raw, x.dtype, k, first_lanes(x.width - k)));
  const int64_t total = (w.K + 31) / 32, runs = w.group_size / 32;
  const int64_t count = (block_end - block_begin + kRowStreams - 1) / kRowStreams;
  for (int64_t i = 0; i < count; i++) {
    int64_t block[kRowStreams];
    __m512 acc[kRowStreams];
    blocks_at(block_begin, block_end, i, block);
#pragma GCC unroll 4
    for (int s = 0; s < kRowStreams; s++) acc[s] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.groups; g++) {
      const int64_t end = (g + 1) * runs < total ? (g + 1) * runs : total;
      Decoder decoder[kRowStreams];
      __m512 sums[kRowStreams];
#pragma GCC unroll 4
      for (int s = 0; s < kRowStreams; s++) {
        decoder[s] = decoder_of(w, block[s], g);
        sums[s] = _mm512_setzero_ps();
      }
      for (int64_t run = g * runs; run < end; run++) {
        if (run % 2) add_run<DECODE, true>(w, row + run * 32, block, decoder, run, sums);
        else add_run<DECODE, false>(w, row + run * 32, block, decoder, run, sums);
      }
#pragma GCC unroll 4
      for (int s = 0; s < kRowStreams; s++) acc[s] = _mm512_fmadd_ps(sums[s], group_scales(w, block[s], g), acc[s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kRowStreams; s++) {
      const Columns columns = columns_of(w, out, block[s], 1.f);
      store_any(out.data, out.dtype, columns.first, columns.mask, _mm512_add_ps(acc[s], columns.bias));
    }
  }
}

}  // namespace
}  // namespace qpass
