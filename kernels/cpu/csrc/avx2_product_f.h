// AVX2 product of float rows with 8-bit weights, and of one row with 4-bit ones (avx2_product_f4.h has the others).
//
// Every path adds in one order: a chain of fused multiply-adds over each run of 32 inputs, runs added in ascending order
// within a group, the group's sum times its scale added to the result. So a row's result does not depend on how many
// rows there are. One row takes the weights from registers, more take them from a panel unpacked once for 128 rows.
#pragma once

namespace qpass {
namespace {

constexpr int kPanelBlocks = 4;                                  // 64 inputs each: a panel of 16 KB stays in L1
constexpr int64_t kPanelFloats = kPanelBlocks * 64 * 16, kPanelRows = 128;

// Bytes of 8 outputs x 4 inputs to the 8 integer weights of input j; `v` is two's complement, PART the low or high nibble.
template <int BITS, int PART>
inline __m256i weights8(__m256i v, int j) {
  if (BITS == 8) return _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * j), 24);
  return _mm256_srai_epi32(_mm256_slli_epi32(v, (PART ? 24 : 28) - 8 * j), 28);
}

template <bool ZP>
inline __m256 float_of_weights(__m256i weights, __m256i zero_point) {
  return _mm256_cvtepi32_ps(ZP ? _mm256_sub_epi32(weights, zero_point) : weights);
}

// Line r of run `part` (0 or 1) of a block, 8 outputs, as two's complement.
template <int BITS>
inline __m256i line8(const uint8_t* w, int part, int r, int h) {
  const uint8_t* at = w + (BITS == 8 ? part * 512 : 0) + r * 64 + h * 32;
  return _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)at), _mm256_set1_epi8(BITS == 8 ? (char)0x80 : (char)0x88));
}

template <int R>
struct Runs {  // the sums of two runs of 32 inputs
  __m256 v[2][R][2];
};

template <int BITS, bool ZP>
inline __attribute__((always_inline)) void runs_direct(const uint8_t* w, const float* x, const __m256i (&zp)[2][2],
                                                       Runs<1>& u) {
  __m256 sum[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()}, {_mm256_setzero_ps(), _mm256_setzero_ps()}};
#pragma GCC unroll 1
  for (int r = 0; r < 8; r++) {
    _mm_prefetch((const char*)w + r * 64 + kPrefetch, _MM_HINT_T0);
    if (BITS == 8) _mm_prefetch((const char*)w + 512 + r * 64 + kPrefetch, _MM_HINT_T0);
    __m256i low[2] = {line8<BITS>(w, 0, r, 0), line8<BITS>(w, 0, r, 1)};
    __m256i high[2] = {BITS == 8 ? line8<BITS>(w, 1, r, 0) : low[0], BITS == 8 ? line8<BITS>(w, 1, r, 1) : low[1]};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256 xa = _mm256_set1_ps(x[r * 4 + j]), xb = _mm256_set1_ps(x[32 + r * 4 + j]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        sum[0][h] = _mm256_fmadd_ps(float_of_weights<ZP>(weights8<BITS, 0>(low[h], j), zp[0][h]), xa, sum[0][h]);
        sum[1][h] = _mm256_fmadd_ps(float_of_weights<ZP>(weights8<BITS, 1>(high[h], j), zp[1][h]), xb, sum[1][h]);
      }
    }
  }
  for (int part = 0; part < 2; part++)
    for (int h = 0; h < 2; h++) u.v[part][0][h] = sum[part][h];
}

// `panel` is [2][32][16], x the row's 64 inputs.
template <int R>
inline __attribute__((always_inline)) void runs_panel(const float* panel, const float* x, int64_t ld, Runs<R>& u) {
  for (int part = 0; part < 2; part++) {
    __m256 a[R][2];
    for (int m = 0; m < R; m++) a[m][0] = a[m][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int k = 0; k < 32; k++, panel += 16) {
      __m256 w0 = _mm256_load_ps(panel), w1 = _mm256_load_ps(panel + 8);
#pragma GCC unroll 4
      for (int m = 0; m < R; m++) {
        __m256 xs = _mm256_set1_ps(x[m * ld + part * 32 + k]);
        a[m][0] = _mm256_fmadd_ps(w0, xs, a[m][0]);
        a[m][1] = _mm256_fmadd_ps(w1, xs, a[m][1]);
      }
    }
    for (int m = 0; m < R; m++)
      for (int h = 0; h < 2; h++) u.v[part][m][h] = a[m][h];
  }
}

template <int BITS, bool ZP>
void unpack_block(const uint8_t* w, const __m256i (&zp)[2][2], float* panel) {
  for (int r = 0; r < 8; r++)
    for (int h = 0; h < 2; h++) {
      __m256i low = line8<BITS>(w, 0, r, h), high = BITS == 8 ? line8<BITS>(w, 1, r, h) : low;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        float* at = panel + (r * 4 + j) * 16 + h * 8;
        _mm256_store_ps(at, float_of_weights<ZP>(weights8<BITS, 0>(low, j), zp[0][h]));
        _mm256_store_ps(at + 32 * 16, float_of_weights<ZP>(weights8<BITS, 1>(high, j), zp[1][h]));
      }
    }
}

// Where R rows of one block of 16 outputs stand: results so far, and the sum of the group that is under way.
template <int R>
struct Progress {
  __m256 y[R][2], total[R][2];
  int64_t group, left;

  void start(const Weight& w) {
    for (int m = 0; m < R; m++)
      for (int h = 0; h < 2; h++) y[m][h] = total[m][h] = _mm256_setzero_ps();
    group = 0;
    left = w.group_size / 32;
  }

  inline __attribute__((always_inline)) void add(const Weight& w, int64_t block, const Runs<R>& u) {
    for (int part = 0; part < 2 && group < w.groups; part++) {
      for (int m = 0; m < R; m++)
        for (int h = 0; h < 2; h++) total[m][h] = _mm256_add_ps(total[m][h], u.v[part][m][h]);
      if (--left) continue;
      for (int h = 0; h < 2; h++) {
        const __m256 scale = scales8(w, block, group, h);
        for (int m = 0; m < R; m++) {
          y[m][h] = _mm256_fmadd_ps(total[m][h], scale, y[m][h]);
          total[m][h] = _mm256_setzero_ps();
        }
      }
      left = w.group_size / 32;
      group++;
    }
  }

  void finish(const Weight& w, const Output& out, int64_t m0, int64_t block, int rows) const {
    for (int m = 0; m < rows; m++) finish16(out, m0 + m, block * 16, w.N, y[m][0], y[m][1]);
  }
};

// The zero points of the two runs of block kb: a run never crosses a group.
inline void zero_points_of(const Weight& w, int64_t block, int64_t kb, __m256i (&zp)[2][2]) {
  for (int part = 0; part < 2; part++) {
    int64_t g = (kb * 64 + part * 32) / w.group_size;
    if (g >= w.groups) g = w.groups - 1;  // padding: its inputs are 0
    for (int h = 0; h < 2; h++) zp[part][h] = w.zero_point ? zero_points8(w, block, g, h) : _mm256_setzero_si256();
  }
}

template <int BITS, bool ZP>
void row_direct(const Weight& w, const FloatRows& x, const Output& out, int64_t m, int64_t block) {
  Progress<1> p;
  p.start(w);
  Runs<1> u;
  __m256i zp[2][2] = {};
  const uint8_t* line = w.q + block * (w.Kp / 64) * BITS * 128;
  for (int64_t kb = 0; kb < w.Kp / 64; kb++, line += BITS * 128) {
    if (ZP) zero_points_of(w, block, kb, zp);
    runs_direct<BITS, ZP>(line, x.x + m * x.Kp + kb * 64, zp, u);
    p.add(w, block, u);
  }
  p.finish(w, out, m, block, 1);
}

template <int R>
__attribute__((noinline)) void panel_rows(const Weight& w, const float* panel, const float* x, int64_t ld, int64_t block,
                                          int64_t blocks, Progress<R>& p) {
  Runs<R> u;
  for (int64_t kb = 0; kb < blocks; kb++) {
    runs_panel<R>(panel + kb * 64 * 16, x + kb * 64, ld, u);
    p.add(w, block, u);
  }
}

template <int BITS, bool ZP>
void rows_by_panel(const Weight& w, const FloatRows& x, const Output& out, int64_t block) {
  float* panel = (float*)scratch(4, kPanelFloats * 4);
  Progress<4>* fours = (Progress<4>*)scratch(5, (kPanelRows / 4) * (int64_t)sizeof(Progress<4>));
  const int64_t all = w.Kp / 64;
  for (int64_t m0 = 0; m0 < x.M; m0 += kPanelRows) {
    const int64_t rows = x.M - m0 < kPanelRows ? x.M - m0 : kPanelRows, whole = rows / 4, rest = rows % 4;
    Progress<1> ones[3];
    for (int64_t i = 0; i < whole; i++) fours[i].start(w);
    for (int64_t i = 0; i < rest; i++) ones[i].start(w);
    for (int64_t kb = 0; kb < all; kb += kPanelBlocks) {
      const int64_t blocks = kb + kPanelBlocks < all ? kPanelBlocks : all - kb;
      for (int64_t i = 0; i < blocks; i++) {
        __m256i zp[2][2] = {};
        if (ZP) zero_points_of(w, block, kb + i, zp);
        unpack_block<BITS, ZP>(w.q + (block * all + kb + i) * BITS * 128, zp, panel + i * 64 * 16);
      }
      const float* from = x.x + m0 * x.Kp + kb * 64;
      for (int64_t i = 0; i < whole; i++) panel_rows<4>(w, panel, from + i * 4 * x.Kp, x.Kp, block, blocks, fours[i]);
      for (int64_t i = 0; i < rest; i++)
        panel_rows<1>(w, panel, from + (whole * 4 + i) * x.Kp, x.Kp, block, blocks, ones[i]);
    }
    for (int64_t i = 0; i < whole; i++) fours[i].finish(w, out, m0 + i * 4, block, 4);
    for (int64_t i = 0; i < rest; i++) ones[i].finish(w, out, m0 + whole * 4 + i, block, 1);
  }
}

template <bool ZP>
void product_f8(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; block++) {
    if (x.M == 1) row_direct<8, ZP>(w, x, out, 0, block);
    else rows_by_panel<8, ZP>(w, x, out, block);
  }
}

}  // namespace
}  // namespace qpass
