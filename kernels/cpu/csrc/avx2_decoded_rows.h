// AVX2 product of float rows with the weights of decoded.h. Inside a target region only.
//
// One and two rows take the weights from registers; more take them from a panel decoded once for 128 rows. Both add in
// the order of decoded.h, so a row's result does not depend on how many rows there are.
#pragma once

namespace qpass {
namespace {

constexpr int64_t kAheadBytes = 3072;                            // about what DRAM delivers in its own latency
constexpr int kPanelBlocks = 4;                                  // 64 inputs each: a panel of 16 KB stays in L1
constexpr int64_t kPanelFloats = kPanelBlocks * 64 * 16, kPanelRows = 128;

template <int R>
struct Sums {  // of the 4 runs of 16 inputs of a block
  __m256 v[4][R][2];
};

// Where R rows of one block of 16 outputs stand: results so far, and the sum of the group that is under way.
template <int R>
struct Standing {
  __m256 y[R][2], total[R][2];
  int64_t group, left;

  void start(const Decoded& w) {
    for (int m = 0; m < R; m++)
      for (int h = 0; h < 2; h++) y[m][h] = total[m][h] = _mm256_setzero_ps();
    group = 0;
    left = w.group_size / 16;
  }

  // The same as `add` for one row in groups of RUNS * 16 without shifts, scales of kE8m0, kE4m3 or f32: no call in it.
  template <DType SCALE, int RUNS>
  inline __attribute__((always_inline)) void add_small(const Decoded& w, int64_t block, const Sums<R>& s) {
    for (int run = 0; run < 4 && group < w.groups; run += RUNS, group++)
      for (int h = 0; h < 2; h++) {
        const int64_t at = (block * w.groups + group) * 16 + h * 8;
        __m256 sum = s.v[run][0][h];
        for (int i = 1; i < RUNS; i++) sum = _mm256_add_ps(sum, s.v[run + i][0][h]);
        const __m256 scale = SCALE == DType::f32 ? _mm256_loadu_ps((const float*)w.scale + at)
                                                 : scales_of<SCALE>((const uint8_t*)w.scale + at);
        y[0][h] = _mm256_fmadd_ps(sum, scale, y[0][h]);
      }
  }

  inline __attribute__((always_inline)) void add(const Decoded& w, int64_t block, const Sums<R>& s, const float* const (&sums)[R]) {
    for (int run = 0; run < 4 && group < w.groups; run++) {
      for (int m = 0; m < R; m++)
        for (int h = 0; h < 2; h++) total[m][h] = _mm256_add_ps(total[m][h], s.v[run][m][h]);
      if (--left == 0) close(w, block, sums);
    }
  }

  // Scales the group's sum, and adds what the group's shift makes of the sum of x.
  __attribute__((noinline)) void close(const Decoded& w, int64_t block, const float* const (&sums)[R]) {
    for (int h = 0; h < 2; h++) {
      const int64_t at = (block * w.groups + group) * 16 + h * 8;
      const __m256 scale = load8_any(w.scale, w.scale_dtype, at);
      for (int m = 0; m < R; m++) {
        y[m][h] = _mm256_fmadd_ps(total[m][h], scale, y[m][h]);
        total[m][h] = _mm256_setzero_ps();
      }
      if (!w.third) continue;
      const __m256 third = load8_any(w.third, w.third_dtype, at);
      const __m256 shift = w.kind == Third::offset ? third : _mm256_fnmadd_ps(third, scale, _mm256_setzero_ps());
      for (int m = 0; m < R; m++)
        y[m][h] = _mm256_fmadd_ps(shift, _mm256_set1_ps(sums[m][group]), y[m][h]);
    }
    left = w.group_size / 16;
    group++;
  }

  void finish(const Decoded& w, const Output& out, int64_t m0, int64_t block, const float* const (&sums)[R], int rows) {
    if (group < w.groups) close(w, block, sums);  // the last group was cut short by the row's end
    for (int m = 0; m < rows; m++) {
      for (int h = 0; h < 2 && w.gain; h++)
        y[m][h] = _mm256_mul_ps(y[m][h], _mm256_loadu_ps(w.gain + block * 16 + h * 8));
      finish16(out, m0 + m, block * 16, w.N, y[m][0], y[m][1]);
    }
  }
};

// One block of 64 inputs. A fused multiply-add takes 4 cycles and two can start in each, so 8 sums are under way at once:
// with one row those of 2 halves of the outputs x 4 runs, with two rows 4 runs each.
template <How HOW, int R>
inline __attribute__((always_inline)) void sums_direct(const uint8_t* q, const float* const (&x)[R], int64_t k0,
                                                       const Tables& tables, Sums<R>& s) {
  constexpr int H = R == 1 ? 2 : 1, S = 2;
  const Tables t = tables;
  for (int h0 = 0; h0 < 2; h0 += H)
    for (int half = 0; half < 2; half += S) {
      __m256 acc[H][S][2][R];
      for (int h = 0; h < H; h++)
        for (int i = 0; i < S; i++)
          for (int part = 0; part < 2; part++)
            for (int m = 0; m < R; m++) acc[h][i][part][m] = _mm256_setzero_ps();
#pragma GCC unroll 1
      for (int r = 0; r < 4; r++) {
#pragma GCC unroll 2
        for (int i = 0; i < S; i++) {
          const int line = (half + i) * 4 + r;
          if (h0 == 0) _mm_prefetch((const char*)q + line * 64 + kAheadBytes, _MM_HINT_T0);
          if (h0 == 0 && HOW != How::table) _mm_prefetch((const char*)q + 512 + line * 64 + kAheadBytes, _MM_HINT_T0);
#pragma GCC unroll 2
          for (int h = 0; h < H; h++) {
            const Line codes = line_of<HOW>(q, line, h0 + h);
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
              __m256 value[4];
              values_of<HOW>(codes.part[part], t, value);
#pragma GCC unroll 4
              for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
                for (int m = 0; m < R; m++)
                  acc[h][i][part][m] = _mm256_fmadd_ps(value[j], _mm256_set1_ps(x[m][k0 + part * 32 + line * 4 + j]),
                                                       acc[h][i][part][m]);
            }
            __asm__ volatile("" ::: "memory");  // x is read again for the other half: keeping it would spill registers
          }
        }
      }
      for (int h = 0; h < H; h++)
        for (int i = 0; i < S; i++)
          for (int part = 0; part < 2; part++)
            for (int m = 0; m < R; m++) s.v[part * 2 + half + i][m][h0 + h] = acc[h][i][part][m];
    }
}

// R rows from m0 on, of which `rows` exist: the others repeat the last one.
template <int R>
struct RowsAt {
  const float* x[R];
  const float* sums[R];
  const int8_t* digits[R];
  const float* step[R];
  const int32_t* offset[R];
  RowsAt(const DecodedRows& all, int64_t m0, int64_t groups, int rows) {
    for (int m = 0; m < R; m++) {
      const int64_t at = m0 + (m < rows ? m : rows - 1);
      x[m] = all.x + at * all.Kp;
      sums[m] = all.sums ? all.sums + at * groups : nullptr;
      digits[m] = all.digits ? all.digits + at * all.Kp * 3 : nullptr;
      step[m] = all.digits ? all.step + at * (all.Kp / 16) : nullptr;
      offset[m] = all.digits ? all.offset + at * (all.Kp / 16) : nullptr;
    }
  }
};

template <How HOW, int R, DType SCALE = DType::f32, int RUNS = 0>
void rows_direct(const Decoded& w, const DecodedRows& x, const Output& out, int64_t block, const Tables& t) {
  constexpr int64_t kBytes = HOW == How::table ? 512 : 1024;
  const RowsAt<R> rows(x, 0, w.groups, (int)x.M);
  Standing<R> p;
  p.start(w);
  Sums<R> s;
  const uint8_t* q = w.q + block * (w.Kp / 64) * kBytes;
  for (int64_t kb = 0; kb < w.Kp / 64; kb++, q += kBytes) {
    sums_direct<HOW, R>(q, rows.x, kb * 64, t, s);
    if (RUNS) p.template add_small<SCALE, RUNS ? RUNS : 1>(w, block, s);
    else p.add(w, block, s, rows.sums);
  }
  p.finish(w, out, 0, block, rows.sums, (int)x.M);
}

// panel [64][16] of a block.
template <How HOW>
void decode_block(const uint8_t* q, const Tables& t, float* panel) {
  for (int r = 0; r < 8; r++)
    for (int h = 0; h < 2; h++) {
      const Line line = line_of<HOW>(q, r, h);
      for (int part = 0; part < 2; part++) {
        __m256 value[4];
        values_of<HOW>(line.part[part], t, value);
        for (int j = 0; j < 4; j++) _mm256_store_ps(panel + (part * 32 + r * 4 + j) * 16 + h * 8, value[j]);
      }
    }
}

void decode(How how, const uint8_t* q, const Tables& t, float* panel) {
  switch (how) {
    case How::table: return decode_block<How::table>(q, t, panel);
    case How::e4m3: return decode_block<How::e4m3>(q, t, panel);
    case How::e5m2: return decode_block<How::e5m2>(q, t, panel);
    case How::integer: return decode_block<How::integer>(q, t, panel);
  }
}

__attribute__((noinline)) void panel_product(const Decoded& w, const float* panel, const RowsAt<4>& rows, int64_t k0,
                                             int64_t block, int64_t blocks, Standing<4>& p) {
  Sums<4> s;
  for (int64_t kb = 0; kb < blocks; kb++) {
    for (int run = 0; run < 4; run++, k0 += 16) {
      __m256 a[4][2];
      for (int m = 0; m < 4; m++) a[m][0] = a[m][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
      for (int k = 0; k < 16; k++, panel += 16) {
        const __m256 w0 = _mm256_load_ps(panel), w1 = _mm256_load_ps(panel + 8);
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
          const __m256 value = _mm256_set1_ps(rows.x[m][k0 + k]);
          a[m][0] = _mm256_fmadd_ps(w0, value, a[m][0]);
          a[m][1] = _mm256_fmadd_ps(w1, value, a[m][1]);
        }
      }
      for (int m = 0; m < 4; m++)
        for (int h = 0; h < 2; h++) s.v[run][m][h] = a[m][h];
    }
    p.add(w, block, s, rows.sums);
  }
}

void rows_by_panel(const Decoded& w, const DecodedRows& x, const Output& out, int64_t block, How how, const Tables& t) {
  float* panel = (float*)scratch(4, kPanelFloats * 4);
  Standing<4>* standing = (Standing<4>*)scratch(5, (kPanelRows / 4) * (int64_t)sizeof(Standing<4>));
  const int64_t all = w.Kp / 64, bytes = w.code == Code::table ? 512 : 1024;
  for (int64_t m0 = 0; m0 < x.M; m0 += kPanelRows) {
    const int64_t rows = x.M - m0 < kPanelRows ? x.M - m0 : kPanelRows, fours = (rows + 3) / 4;
    const auto there = [&](int64_t i) { return (int)(rows - i * 4 < 4 ? rows - i * 4 : 4); };
    for (int64_t i = 0; i < fours; i++) standing[i].start(w);
    for (int64_t kb = 0; kb < all; kb += kPanelBlocks) {
      const int64_t blocks = kb + kPanelBlocks < all ? kPanelBlocks : all - kb;
      for (int64_t i = 0; i < blocks; i++) decode(how, w.q + (block * all + kb + i) * bytes, t, panel + i * 64 * 16);
      for (int64_t i = 0; i < fours; i++)
        panel_product(w, panel, RowsAt<4>(x, m0 + i * 4, w.groups, there(i)), kb * 64, block, blocks, standing[i]);
    }
    for (int64_t i = 0; i < fours; i++)
      standing[i].finish(w, out, m0 + i * 4, block, RowsAt<4>(x, m0 + i * 4, w.groups, there(i)).sums, there(i));
  }
}

}  // namespace
}  // namespace qpass
