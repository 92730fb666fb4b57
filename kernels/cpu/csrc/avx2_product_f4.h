// AVX2 product of float rows with 4-bit weights, the rows as integers of three digits of 256. Inside a target region only.
//
// A run of 64 inputs of a row (32 where a group is no multiple of 64) becomes integers of one step, a power of two such
// that the largest has 23 bits. maddubs(code 0..15, digit) adds two products, and a sum of 32 inputs stays in int16: it
// starts at -8 * (sum of the digits), and what comes out is weight * digit, whatever wraps around on the way. So a run is
// exact but for the rounding of x to its step, 2^-22 or less of the run's largest number. Runs are added in ascending
// order within a group, the group's sum times its scale added to the result, whatever the number of rows.
// A row is multiplied in float, by row_direct, if it holds an Inf or a NaN, or 32 digits of -128, the only ones whose sum
// reaches 2^15.
#pragma once

namespace qpass {
namespace {

constexpr int64_t kDigitRows = 128;  // whose digits are made at a time
constexpr int64_t kBytesRows = 6;    // that many and more meet a block of outputs whose codes are unpacked to bytes once

struct Run {
  int32_t start[3];   // of each digit's sums, two int16
  float step;
  int32_t low, high;  // sum of the first two digits and of the third, for zero points of the weight
};

struct DigitRows {
  const int8_t* digits;  // [M][Kp / 64][3][64]
  const Run* runs;       // [M][Kp / size]
  int64_t Kp, runs_a_row;
};

// The sums of 32 or 64 signed bytes in two int16: those of inputs 0 and 1 of each four, and of 2 and 3.
inline __m128i sums_of_pairs(__m256i pairs) {
  __m128i s = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_add_epi16(s, _mm_shuffle_epi32(s, 0xb1));
}

// SIZE inputs to digits [3][64] (of which it fills SIZE) and their run; false if they cannot be multiplied so.
template <int SIZE>
bool make_run(const float* x, int8_t* digits, Run& run) {
  const __m256i half = _mm256_set1_epi32(128);
  bool finite;
  const uint32_t largest = largest16(x, SIZE, finite);
  // Up to 2^23 - 2^16, which three digits hold, the largest has 23 bits; numbers above have 22.
  const uint32_t above = finite ? (largest + 0x20000u) >> 23 : 0, exponent = above < 23 ? 23 : above;
  const uint32_t step = (exponent - 22) << 23, factor = (276 - exponent) << 23;
  __builtin_memcpy(&run.step, &step, 4);
  float by;
  __builtin_memcpy(&by, &factor, 4);
  __m256i pairs[3] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int k = 0; k < SIZE; k += 32) {
    __m256i i[4];
    for (int j = 0; j < 4; j++) {
      i[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + j * 8), _mm256_set1_ps(by)));
      if (!finite) i[j] = _mm256_setzero_si256();
    }
    for (int d = 0; d < 3; d++) {
      __m256i low[4];
      for (int j = 0; j < 4; j++) {
        low[j] = _mm256_srai_epi32(_mm256_slli_epi32(i[j], 24), 24);
        i[j] = _mm256_srai_epi32(_mm256_add_epi32(i[j], half), 8);
      }
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3]));
      const __m256i digit = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256((__m256i*)(digits + d * 64 + k), digit);
      pairs[d] = _mm256_add_epi16(pairs[d], _mm256_maddubs_epi16(_mm256_set1_epi8(1), digit));
    }
  }
  int32_t sum[3];
  bool good = finite;
  for (int d = 0; d < 3; d++) {
    const __m128i s = sums_of_pairs(pairs[d]);
    good &= (_mm_movemask_epi8(_mm_cmpeq_epi16(s, _mm_set1_epi16(-32 * 128))) & 15) == 0;
    run.start[d] = _mm_cvtsi128_si32(_mm_mullo_epi16(s, _mm_set1_epi16(-8)));
    sum[d] = _mm_cvtsi128_si32(_mm_madd_epi16(s, _mm_set1_epi16(1)));
  }
  run.low = sum[0] + 256 * sum[1];
  run.high = sum[2];
  return good;
}

// Rows [m0, m0 + count) as digits; good[m] says which of them can be multiplied so.
template <int SIZE>
DigitRows make_digits(const FloatRows& x, int64_t m0, int64_t count, bool* good) {
  const int64_t runs = x.Kp / SIZE;
  int8_t* digits = (int8_t*)scratch(6, count * x.Kp * 3);
  Run* made = (Run*)scratch(7, count * runs * (int64_t)sizeof(Run));
  for (int64_t m = 0; m < count; m++) {
    good[m] = true;
    for (int64_t i = 0; i < runs; i++) {
      const int64_t k = i * SIZE;
      int8_t* to = digits + m * x.Kp * 3 + k / 64 * 192 + k % 64;
      good[m] &= make_run<SIZE>(x.x + (m0 + m) * x.Kp + k, to, made[m * runs + i]);
    }
  }
  return {digits, made, x.Kp, runs};
}

// One register of codes, 8 outputs x 4 inputs, times four inputs of a digit, for both halves of the outputs.
inline __attribute__((always_inline)) void add_digit(const __m256i (&codes)[2], const int8_t* at, __m256i (&sum)[2]) {
  int32_t four;
  __builtin_memcpy(&four, at, 4);
  const __m256i x = _mm256_set1_epi32(four);
  multiply_add(codes[0], x, sum[0]);
  multiply_add(codes[1], x, sum[1]);
}

// The codes of 16 outputs as bytes, [Kp / 64][2][8][64]: for each line those of its low nibbles, then of its high ones.
const uint8_t* bytes_of_block(const Weight& w, int64_t block) {
  const int64_t blocks = w.Kp / 64;
  const __m256i nibble = _mm256_set1_epi8(15);
  uint8_t* bytes = (uint8_t*)scratch(4, blocks * 1024);
  const uint8_t* q = w.q + block * blocks * 512;
  for (int64_t kb = 0; kb < blocks; kb++, q += 512)
    for (int i = 0; i < 16; i++) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)(q + i * 32));
      __m256i* to = (__m256i*)(bytes + kb * 1024 + i * 32);
      _mm256_store_si256(to, _mm256_and_si256(both, nibble));
      _mm256_store_si256(to + 16, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
    }
  return bytes;
}

// The first 32 inputs of a block (PARTS & 1), the others (PARTS & 2), or both, times R rows. BYTES: of bytes_of_block.
template <int R, int PARTS, bool BYTES>
inline __attribute__((always_inline)) void add_block(const uint8_t* w, const int8_t* const (&digits)[R], int64_t ahead,
                                                     __m256i (&sum)[R][3][2]) {
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 1
  for (int r = 0; r < 8; r++) {
    const __m256i* line = (const __m256i*)(w + r * 64);
    if (!BYTES && (PARTS & 1)) _mm_prefetch((const char*)line + ahead, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
      if (!(PARTS & (1 << part))) continue;
      __m256i codes[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m256i both = _mm256_loadu_si256(line + (BYTES ? part * 16 : 0) + h);
        codes[h] = BYTES ? both : _mm256_and_si256(part ? _mm256_srli_epi16(both, 4) : both, nibble);
      }
#pragma GCC unroll 2
      for (int m = 0; m < R; m++)
#pragma GCC unroll 3
        for (int d = 0; d < 3; d++) add_digit(codes, digits[m] + d * 64 + part * 32 + r * 4, sum[m][d]);
      if (R > 1) __asm__ volatile("" : "+r"(line));  // keeping both halves of a line would take registers of the sums
    }
  }
}

// The sum of a run, in steps.
template <bool ZP>
inline __attribute__((always_inline)) __m256 value_of(const __m256i& s0, const __m256i& s1, const __m256i& s2,
                                                      const Run& run, __m256i zero_point) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i low = _mm256_add_epi32(_mm256_madd_epi16(s0, one), _mm256_madd_epi16(s1, _mm256_set1_epi16(256)));
  __m256i high = _mm256_madd_epi16(s2, one);
  if (ZP) {
    low = _mm256_sub_epi32(low, _mm256_mullo_epi32(zero_point, _mm256_set1_epi32(run.low)));
    high = _mm256_sub_epi32(high, _mm256_mullo_epi32(zero_point, _mm256_set1_epi32(run.high)));
  }
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(65536), _mm256_cvtepi32_ps(low));
}

// R rows, the first m0 of the digits and `to` of the output, times a block of 16 outputs, whose codes lie at q.
template <int R, bool ZP, int SIZE, bool BYTES>
__attribute__((noinline)) void multiply_digits(const Weight& w, const DigitRows& x, const Output& out, int64_t m0,
                                               int64_t to, int64_t block, const uint8_t* q, int64_t ahead) {
  const int64_t runs = w.group_size / SIZE;
  const int8_t* digits[R];
  const Run* at[R];
  __m256 y[R][2];
  for (int m = 0; m < R; m++) {
    digits[m] = x.digits + (m0 + m) * x.Kp * 3;
    at[m] = x.runs + (m0 + m) * x.runs_a_row;
    y[m][0] = y[m][1] = _mm256_setzero_ps();
  }
  for (int64_t g = 0, i = 0; g < w.groups; g++) {
    __m256 total[R][2];
    for (int m = 0; m < R; m++) total[m][0] = total[m][1] = _mm256_setzero_ps();
    for (const int64_t end = i + runs; i < end; i++) {
      __m256i sum[R][3][2];
      for (int m = 0; m < R; m++)
        for (int d = 0; d < 3; d++) sum[m][d][0] = sum[m][d][1] = _mm256_set1_epi32(at[m]->start[d]);
      if (SIZE == 64) add_block<R, 3, BYTES>(q, digits, ahead, sum);
      else if (i % 2 == 0) add_block<R, 1, BYTES>(q, digits, ahead, sum);
      else add_block<R, 2, BYTES>(q, digits, ahead, sum);
      for (int h = 0; h < 2; h++) {
        const __m256i zero_point = ZP ? zero_points8(w, block, g, h) : _mm256_setzero_si256();
        for (int m = 0; m < R; m++)
          total[m][h] = _mm256_fmadd_ps(value_of<ZP>(sum[m][0][h], sum[m][1][h], sum[m][2][h], *at[m], zero_point),
                                        _mm256_set1_ps(at[m]->step), total[m][h]);
      }
      const bool last = SIZE == 64 || i % 2;  // of its block
      q += last ? (BYTES ? 1024 : 512) : 0;
      for (int m = 0; m < R; m++) digits[m] += last ? 192 : 0, at[m]++;
    }
    for (int h = 0; h < 2; h++) {
      const __m256 scale = scales8(w, block, g, h);
      for (int m = 0; m < R; m++) y[m][h] = _mm256_fmadd_ps(total[m][h], scale, y[m][h]);
    }
  }
  for (int m = 0; m < R; m++) finish16(out, to + m, block * 16, w.N, y[m][0], y[m][1]);
}

template <bool ZP, int SIZE>
void product_digits(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  for (int64_t m0 = 0; m0 < x.M; m0 += kDigitRows) {
    const int64_t rows = x.M - m0 < kDigitRows ? x.M - m0 : kDigitRows;
    bool good[kDigitRows];
    const DigitRows made = make_digits<SIZE>(x, m0, rows, good);
    for (int64_t block = block_begin; block < block_end; block++) {
      const uint8_t* q = w.q + block * (w.Kp / 64) * 512;
      const uint8_t* bytes = rows >= kBytesRows ? bytes_of_block(w, block) : nullptr;
      int64_t m = 0, ahead = kPrefetch;  // only the first rows read their weights from memory
      for (; m + 2 <= rows; m += 2, ahead = 0) {
        if (bytes) multiply_digits<2, ZP, SIZE, true>(w, made, out, m, m0 + m, block, bytes, 0);
        else multiply_digits<2, ZP, SIZE, false>(w, made, out, m, m0 + m, block, q, ahead);
      }
      if (m < rows) multiply_digits<1, ZP, SIZE, false>(w, made, out, m, m0 + m, block, q, ahead);
      for (m = 0; m < rows; m++)
        if (!good[m]) row_direct<4, ZP>(w, x, out, m0 + m, block);
    }
  }
}

void product_f(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  const int64_t end = block_end * 16 < w.N ? block_end : (w.N + 15) / 16;
  const bool whole = w.group_size % 64 == 0, zp = w.zero_point;
  if (w.bits == 8) (zp ? product_f8<true> : product_f8<false>)(w, x, out, block_begin, end);
  else if (zp) (whole ? product_digits<true, 64> : product_digits<true, 32>)(w, x, out, block_begin, end);
  else (whole ? product_digits<false, 64> : product_digits<false, 32>)(w, x, out, block_begin, end);
}

}  // namespace
}  // namespace qpass
