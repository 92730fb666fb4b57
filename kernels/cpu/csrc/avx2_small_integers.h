// AVX2 products of weights whose values are small integers, with rows as integers (decoded.h). Inside a target region only.
//
// A byte of weight less `least` is 0..24 and a digit of x is -128..127: vpmaddubsw multiplies and adds pairs of them, and 4
// such sums, 16 inputs, stay in int16. For 128 values that is 3 look-ups and shifts, 4 ANDs, 12 products and 12 additions for
// each 64 of them; decoding to float takes 28 look-ups and shifts on the two ports that have them.
#pragma once

namespace qpass {
namespace {

// One row of x as integers: digits [3][Kp], a step and the sum of the integers for each run of 16.
void make_digits(const float* x, int64_t Kp, int8_t* digits, float* step, int32_t* whole) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), half = _mm256_set1_epi32(128);
  for (int64_t run = 0; run < Kp / 16; run++) {
    const __m256 a = _mm256_loadu_ps(x + run * 16), b = _mm256_loadu_ps(x + run * 16 + 8);
    const __m256i most = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a), magnitude),
                                          _mm256_and_si256(_mm256_castps_si256(b), magnitude));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    const uint32_t largest = (uint32_t)_mm_cvtsi128_si32(m);
    const bool finite = largest < 0x7f800000u;
    const uint32_t exponent = largest >> 23 < 24 ? 24 : largest >> 23;
    step[run] = float_of(finite ? (exponent - 21) << 23 : 0x7fc00000u);
    const __m256 factor = _mm256_set1_ps(float_of((275 - exponent) << 23));
    __m256i i[2] = {_mm256_cvtps_epi32(_mm256_mul_ps(a, factor)), _mm256_cvtps_epi32(_mm256_mul_ps(b, factor))};
    if (!finite) i[0] = i[1] = _mm256_setzero_si256();
    const __m256i both = _mm256_add_epi32(i[0], i[1]);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    whole[run] = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
    for (int d = 0; d < 3; d++) {
      __m128i pair[2];
      for (int j = 0; j < 2; j++) {
        const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(i[j], 24), 24);
        pair[j] = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
        i[j] = _mm256_srai_epi32(_mm256_add_epi32(i[j], half), 8);
      }
      _mm_storeu_si128((__m128i*)(digits + d * Kp + run * 16), _mm_packs_epi16(pair[0], pair[1]));
    }
  }
}

// sum += w * x in pairs. Written out, because GCC adds products to each other first, for which there are no registers.
inline __attribute__((always_inline)) void add_products(__m256i w, __m256i x, __m256i& sum) {
  __m256i product;
  __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(x));
}

inline __attribute__((always_inline)) __m256i four_digits(const int8_t* at) {
  int32_t four;
  __builtin_memcpy(&four, at, 4);
  return _mm256_set1_epi32(four);
}

inline __attribute__((always_inline)) void set_products(__m256i w, __m256i x, __m256i& sum) {
  sum = _mm256_maddubs_epi16(w, x);
}

// Digits of one register of codes, 4 inputs of 8 outputs, times R rows' digits at `k`, for H halves of the outputs.
template <int R, int H, bool FIRST>
inline __attribute__((always_inline)) void add_digits(const __m256i (&w)[H], const int8_t* const (&x)[R], int64_t Kp,
                                                      int64_t k, __m256i (&sum)[H][R][3]) {
#pragma GCC unroll 2
  for (int m = 0; m < R; m++)
#pragma GCC unroll 3
    for (int d = 0; d < 3; d++) {
      const __m256i four = four_digits(x[m] + d * Kp + k);
#pragma GCC unroll 2
      for (int h = 0; h < H; h++) FIRST ? set_products(w[h], four, sum[h][m][d]) : add_products(w[h], four, sum[h][m][d]);
    }
}

// The sums of the three digits of a run as one float.
inline __attribute__((always_inline)) __m256 value_of(const __m256i (&sum)[3], int32_t offset, float step) {
  const __m256i by256 = _mm256_set1_epi16(256);
  const __m256i high = _mm256_slli_epi32(_mm256_madd_epi16(sum[2], by256), 8);
  const __m256i low = _mm256_add_epi32(_mm256_madd_epi16(sum[1], by256), _mm256_madd_epi16(sum[0], _mm256_set1_epi16(1)));
  const __m256i exact = _mm256_add_epi32(_mm256_add_epi32(high, low), _mm256_set1_epi32(offset));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(exact), _mm256_set1_ps(step));
}

inline __m256i look_up(const Decoded& w) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)w.small.above_least));
}

// One block of 64 inputs. With one row the sums of both halves of 16 outputs are under way, with two rows those of one.
template <int R>
inline __attribute__((always_inline)) void sums_small(const uint8_t* q, const RowsAt<R>& x, int64_t Kp, int64_t kb,
                                                      __m256i table, Sums<R>& s) {
  constexpr int H = R == 1 ? 2 : 1;
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int h0 = 0; h0 < 2; h0 += H)
    for (int half = 0; half < 2; half++) {
      __m256i low[H][R][3], high[H][R][3];
      for (int h = 0; h < H; h++)
        for (int m = 0; m < R; m++)
          for (int d = 0; d < 3; d++) low[h][m][d] = high[h][m][d] = _mm256_setzero_si256();
#pragma GCC unroll 1
      for (int line = half * 4; line < half * 4 + 4; line++) {
        __m256i both[H], w[H];
        if (h0 == 0) _mm_prefetch((const char*)q + line * 64 + kAheadBytes, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int h = 0; h < H; h++) {
          both[h] = _mm256_loadu_si256((const __m256i*)(q + line * 64 + (h0 + h) * 32));
          w[h] = _mm256_shuffle_epi8(table, _mm256_and_si256(both[h], nibble));
        }
        add_digits<R, H, false>(w, x.digits, Kp, kb * 64 + line * 4, low);
#pragma GCC unroll 2
        for (int h = 0; h < H; h++)
          w[h] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both[h], 4), nibble));
        add_digits<R, H, false>(w, x.digits, Kp, kb * 64 + 32 + line * 4, high);
      }
      for (int h = 0; h < H; h++)
        for (int m = 0; m < R; m++)
          for (int part = 0; part < 2; part++) {
            const int64_t run = kb * 4 + part * 2 + half;
            s.v[part * 2 + half][m][h0 + h] = value_of(part ? high[h][m] : low[h][m], x.offset[m][run], x.step[m][run]);
          }
    }
}

constexpr int64_t kBytePanelBlocks = 16;  // 64 inputs each: 16 KB of bytes

// The codes of a block of 64 inputs as bytes: 16 lines of 16 outputs x 4 inputs.
inline void decode_small(const uint8_t* q, __m256i table, uint8_t* panel) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int i = 0; i < 16; i++) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(q + i * 32));
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(both, nibble));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
    _mm256_store_si256((__m256i*)(panel + i * 32), low);
    _mm256_store_si256((__m256i*)(panel + 512 + i * 32), high);
  }
}

// Two rows times a panel. RUNS is how many runs of 16 inputs a group has, all groups are whole, there are no shifts, and
// `scales` are those of the panel's groups [][16]; or 0.
template <int RUNS>
__attribute__((noinline)) void panel_product_small(const Decoded& w, const uint8_t* panel, const float* scales,
                                                   const RowsAt<2>& x, int64_t Kp, int64_t kb0, int64_t blocks,
                                                   int64_t block, Standing<2>& p) {
  Sums<2> s;
  for (int64_t kb = kb0; kb < kb0 + blocks; kb++) {
    for (int run = 0; run < 4; run++, panel += 256) {
      __m256i sum[2][2][3];
#pragma GCC unroll 4
      for (int line = 0; line < 4; line++) {
        const __m256i* at = (const __m256i*)(panel + line * 64);
        const __m256i both[2] = {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
        const int64_t k = kb * 64 + run * 16 + line * 4;
        if (line == 0) add_digits<2, 2, true>(both, x.digits, Kp, k, sum);
        else add_digits<2, 2, false>(both, x.digits, Kp, k, sum);
      }
#pragma GCC unroll 2
      for (int m = 0; m < 2; m++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
          s.v[run][m][h] = value_of(sum[h][m], x.offset[m][kb * 4 + run], x.step[m][kb * 4 + run]);
      if (!RUNS || run % (RUNS ? RUNS : 1) != RUNS - 1 || p.group == w.groups) continue;
      for (int m = 0; m < 2; m++)
        for (int h = 0; h < 2; h++) {
          __m256 total = s.v[run + 1 - RUNS][m][h];
          for (int i = 2 - RUNS; i <= 0; i++) total = _mm256_add_ps(total, s.v[run + i][m][h]);
          p.y[m][h] = _mm256_fmadd_ps(total, _mm256_load_ps(scales + h * 8), p.y[m][h]);
        }
      scales += 16;
      p.group++;
    }
    if (!RUNS) p.add(w, block, s, x.sums);
  }
}

void small_by_panel(const Decoded& w, const DecodedRows& x, const Output& out, int64_t block) {
  const __m256i table = look_up(w);
  uint8_t* panel = (uint8_t*)scratch(4, kBytePanelBlocks * (1024 + 4 * 64));
  float* scales = (float*)(panel + kBytePanelBlocks * 1024);
  const bool whole = !w.third && w.K % w.group_size == 0;
  const int64_t runs = whole && w.group_size <= 32 ? w.group_size / 16 : 0;
  const auto product = runs == 1 ? panel_product_small<1> : runs == 2 ? panel_product_small<2> : panel_product_small<0>;
  Standing<2>* standing = (Standing<2>*)scratch(5, (kPanelRows / 2) * (int64_t)sizeof(Standing<2>));
  const int64_t all = w.Kp / 64;
  for (int64_t m0 = 0; m0 < x.M; m0 += kPanelRows) {
    const int64_t rows = x.M - m0 < kPanelRows ? x.M - m0 : kPanelRows, twos = (rows + 1) / 2;
    const auto there = [&](int64_t i) { return (int)(rows - i * 2 < 2 ? rows - i * 2 : 2); };
    for (int64_t i = 0; i < twos; i++) standing[i].start(w);
    for (int64_t kb = 0; kb < all; kb += kBytePanelBlocks) {
      const int64_t blocks = kb + kBytePanelBlocks < all ? kBytePanelBlocks : all - kb;
      for (int64_t i = 0; i < blocks; i++) decode_small(w.q + (block * all + kb + i) * 512, table, panel + i * 1024);
      for (int64_t g = 0, first = runs ? kb * 4 / runs : 0; runs && g < blocks * 4 / runs && first + g < w.groups; g++)
        for (int h = 0; h < 2; h++)
          _mm256_store_ps(scales + g * 16 + h * 8,
                          load8_any(w.scale, w.scale_dtype, (block * w.groups + first + g) * 16 + h * 8));
      for (int64_t i = 0; i < twos; i++)
        product(w, panel, scales, RowsAt<2>(x, m0 + i * 2, w.groups, there(i)), w.Kp, kb, blocks, block, standing[i]);
    }
    for (int64_t i = 0; i < twos; i++)
      standing[i].finish(w, out, m0 + i * 2, block, RowsAt<2>(x, m0 + i * 2, w.groups, there(i)).sums, there(i));
  }
}

template <int R, DType SCALE = DType::f32, int RUNS = 0>
void small_direct(const Decoded& w, const DecodedRows& x, const Output& out, int64_t block) {
  const RowsAt<R> rows(x, 0, w.groups, (int)x.M);
  const __m256i table = look_up(w);
  Standing<R> p;
  p.start(w);
  Sums<R> s;
  const uint8_t* q = w.q + block * (w.Kp / 64) * 512;
  for (int64_t kb = 0; kb < w.Kp / 64; kb++, q += 512) {
    sums_small<R>(q, rows, w.Kp, kb, table, s);
    if (RUNS) p.template add_small<SCALE, RUNS ? RUNS : 1>(w, block, s);
    else p.add(w, block, s, rows.sums);
  }
  p.finish(w, out, 0, block, rows.sums, (int)x.M);
}

using SmallRows = void (*)(const Decoded&, const DecodedRows&, const Output&, int64_t);

SmallRows small_for(const Decoded& w, int64_t rows) {
  if (rows > 2) return small_by_panel;
  if (rows == 2) return small_direct<2>;
  const bool whole = !w.third && w.K % w.group_size == 0;  // the small groups of MX and NV formats
  if (whole && w.scale_dtype == kE8m0 && w.group_size == 32) return small_direct<1, kE8m0, 2>;
  if (whole && w.scale_dtype == kE4m3 && w.group_size == 16) return small_direct<1, kE4m3, 1>;
  return small_direct<1>;
}

}  // namespace
}  // namespace qpass
