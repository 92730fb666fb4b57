// AVX2: int8 rows in, rows in fours out, made ready for products with 8-bit weights in bytes (avx2_bytes_q8.h).
//
// maddubs(weight + 128, x) saturates where two neighbouring codes of x add up to more than 128 or less than -128, for
// 255 * 128 = 32640 is what fits. 2, 4 or 8 products are added in int16 from -128 * (sum of their inputs) on: what comes
// out is weight * input, which fits if the magnitudes of the inputs add up to 255 at most (128 * 255 = 32640), and sums
// on the way may wrap around. Codes that keep a row from that, one in fifty if they spread like normal numbers, are
// taken out of it, and multiplied on their own. Rows with too many of them are widened to int16.
#pragma once

namespace qpass {
namespace {

// A code that was taken out of the inputs of one line (4 inputs) of a row: these four, the others being 0.
struct Taken {
  int32_t line, row, codes;
};

// Four rows side by side, those beyond the last being 0: codes [Kp / 4][4 rows][4] as bytes, or as int16 if widened.
struct Four {
  int8_t* x;
  int32_t* starts;        // [Kp / 4 / lines][4]: of each int16 sum where it starts, two int16 as one int32
  int32_t *sums, *extra;  // [groups][4]: of all codes; 128 * those whose product is with weight + 128
  Taken *taken, *end;
  int64_t lines;          // of an int16 sum: 2, 4 or 8; 0: widened
};

constexpr int64_t most_taken(int64_t Kp) { return Kp / 5; }  // then widening is as fast

// Sums of the lanes of 2^level lines from those of half as many; 32 inputs in all.
inline __m256i run_sums(__m256i v, int level) {
  if (level == 1) return _mm256_add_epi16(v, _mm256_shuffle_epi32(v, 0xb1));
  if (level == 2) return _mm256_add_epi16(v, _mm256_shuffle_epi32(v, 0x4e));
  return _mm256_add_epi16(v, _mm256_permute2x128_si256(v, v, 1));
}

inline __m256i load_codes(const int8_t* row, int64_t k) {
  return row ? _mm256_loadu_si256((const __m256i*)(row + k)) : _mm256_setzero_si256();
}

inline __m256i pair_sums(__m256i codes) { return _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes); }
inline __m256i pair_sizes(__m256i codes) { return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_set1_epi8(1)); }
inline __m256i above(__m256i v, int16_t most) { return _mm256_cmpgt_epi16(v, _mm256_set1_epi16(most)); }

// The logarithm of how many lines an int16 sum of these rows had best take; 0 to widen them. In tenths of a cycle, a line of
// four rows takes 77 in sums of two, 63 of four, 57 of eight and 126 widened, all measured; a code taken out about 60.
int best_level(const int8_t* const (&row)[4], int64_t Kp) {
  __m256i found[4] = {};  // lanes of pairs, and of sums of 2, 4 and 8 lines, that do not fit
  for (int m = 0; m < 4 && row[m]; m++)
    for (int64_t k = 0; k < Kp; k += 32) {
      const __m256i codes = load_codes(row[m], k);
      __m256i sizes = pair_sizes(codes);
      found[0] = _mm256_sub_epi16(found[0], above(_mm256_abs_epi16(pair_sums(codes)), 128));
#pragma GCC unroll 3
      for (int i = 1; i < 4; i++) {
        sizes = run_sums(sizes, i);
        found[i] = _mm256_sub_epi16(found[i], above(sizes, 255));
      }
    }
  int64_t count[4];
  for (int i = 0; i < 4; i++) {
    alignas(32) int32_t sums[8];
    _mm256_store_si256((__m256i*)sums, _mm256_madd_epi16(found[i], _mm256_set1_epi16(1)));
    count[i] = 0;
    for (int j = 0; j < 8; j++) count[i] += sums[j];
    if (i > 0) count[i] >>= i;  // every line of a run has the run's sum
  }
  const int64_t line[4] = {126, 77, 63, 57};
  int best = 0;
  int64_t least = line[0] * (Kp / 4);
  for (int i = 1; i < 4; i++) {
    const int64_t cost = line[i] * (Kp / 4) + 60 * (count[0] + count[i]);
    if (cost < least) least = cost, best = i;
  }
  return best;
}

// Takes codes out of 32 inputs of row m, from k on: of each pair that has a bit in `pairs`, and of each lane of an int16
// sum that has one in `runs`, where it stands for every pair. False if there are too many.
bool take_codes(Four& f, int m, int64_t k, uint32_t pairs, uint32_t runs, int64_t Kp, int32_t& extra) {
  const int shift = __builtin_ctzll((uint64_t)f.lines) + 2;
  const auto at = [&](int64_t i) -> int8_t& { return f.x[(k + i) / 4 * 16 + m * 4 + i % 4]; };
  const auto size = [&](int64_t i) { return at(i) < 0 ? -at(i) : at(i); };
  const auto take = [&](int64_t i) {
    const int32_t code = at(i);
    int16_t& start = ((int16_t*)f.starts)[(((k + i) >> shift) * 4 + m) * 2 + (i >> 1 & 1)];
    start = (int16_t)(start + 128 * code), extra += 128 * code, at(i) = 0;
    *f.end++ = {(int32_t)((k + i) / 4), m, (int32_t)((uint32_t)(code & 255) << (i % 4 * 8))};
  };
  for (; pairs; pairs &= pairs - 1) {
    const int i = __builtin_ctz(pairs) * 2;
    take(size(i) < size(i + 1) ? i + 1 : i);
  }
  for (int64_t first = 0; first < 32 && runs >> first / 2; first += int64_t(1) << shift) {
    const int64_t end = first + (int64_t(1) << shift);
    for (int64_t lane = first; lane < first + 4; lane += 2)
      while (runs >> lane / 2 & 1) {
        int64_t sum = 0, largest = lane;
        for (int64_t i = lane; i < end; i += i & 1 ? 3 : 1) sum += size(i), largest = size(i) > size(largest) ? i : largest;
        if (sum <= 255) break;
        take(largest);
      }
  }
  return f.end - f.taken <= most_taken(Kp);
}

// `sums` are already there. False if more codes must be taken out than there is room for.
template <int LEVEL>
bool lay_bytes(const int8_t* const (&row)[4], int64_t Kp, int64_t group_size, int64_t groups, Four& f) {
  f.lines = 1 << LEVEL;
  f.end = f.taken;
  for (int64_t i = 0; i < groups * 4; i++) f.extra[i] = 0;
  interleave(row, Kp, f.x);
  __m128i* to = (__m128i*)f.starts;
  for (int64_t k = 0; k < Kp; k += 32) {
    __m256i starts[4], wrong[4], all = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
      const __m256i codes = load_codes(row[m], k), pairs = pair_sums(codes);
      __m256i sums = pairs, sizes = pair_sizes(codes);
#pragma GCC unroll 3
      for (int i = 1; i <= LEVEL; i++) sums = run_sums(sums, i), sizes = run_sums(sizes, i);
      starts[m] = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), sums), 7);
      wrong[m] = _mm256_packs_epi16(above(_mm256_abs_epi16(pairs), 128), above(sizes, 255));
      all = _mm256_or_si256(all, wrong[m]);
    }
    const __m256i even = _mm256_unpacklo_epi64(_mm256_unpacklo_epi32(starts[0], starts[1]),
                                               _mm256_unpacklo_epi32(starts[2], starts[3]));
    const __m256i odd = _mm256_unpacklo_epi64(_mm256_unpackhi_epi32(starts[0], starts[1]),
                                              _mm256_unpackhi_epi32(starts[2], starts[3]));
    _mm_store_si128(to++, _mm256_castsi256_si128(even));
    if (LEVEL == 1) _mm_store_si128(to++, _mm256_castsi256_si128(odd));
    if (LEVEL <= 2) _mm_store_si128(to++, _mm256_extracti128_si256(even, 1));
    if (LEVEL == 1) _mm_store_si128(to++, _mm256_extracti128_si256(odd, 1));
    if (_mm256_testz_si256(all, all)) continue;
    const int64_t group = k / group_size < groups ? k / group_size : groups - 1;  // what is beyond is padding
    for (int m = 0; m < 4; m++) {
      // Each half holds 8 pairs' bytes, then 8 of their runs.
      const uint32_t bits = (uint32_t)_mm256_movemask_epi8(wrong[m]);
      if (bits && !take_codes(f, m, k, (bits & 255) | (bits >> 8 & 0xff00), (bits >> 8 & 255) | (bits >> 16 & 0xff00), Kp,
                              f.extra[group * 4 + m]))
        return false;
    }
  }
  return true;
}

bool lay_bytes(const int8_t* const (&row)[4], int64_t Kp, int64_t group_size, int64_t groups, int level, Four& f) {
  if (level == 1) return lay_bytes<1>(row, Kp, group_size, groups, f);
  if (level == 2) return lay_bytes<2>(row, Kp, group_size, groups, f);
  return level == 3 && lay_bytes<3>(row, Kp, group_size, groups, f);
}

void lay_widened(const int8_t* const (&row)[4], int64_t Kp, int64_t groups, Four& f) {
  f.lines = 0;
  f.end = f.taken;
  interleave(row, Kp, f.x);
  for (int64_t i = Kp * 4 - 16; i >= 0; i -= 16) {  // from the end, so that each moves to where nothing is needed
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(f.x + i)));
    _mm256_store_si256((__m256i*)(f.x + i * 2), wide);
  }
  for (int64_t i = 0; i < groups * 4; i++) f.extra[i] = 128 * f.sums[i];
}

// Rows [m0, m0 + M) as fours; group_sums [x.M][groups].
struct Fours {
  Four* four;
  int64_t m0, M, count;
  bool widened = false;  // one of them

  Fours(const Weight& w, const QuantRows& x, const int32_t* group_sums, int64_t first, int64_t rows)
      : m0(first), M(rows), count((rows + 3) / 4) {
    const int64_t Kp = x.Kp, groups = w.groups, room = most_taken(Kp) + 32;  // one call of take_codes beyond
    const int64_t bytes = padded(Kp * 8 + Kp * 2 + groups * 32 + room * (int64_t)sizeof(Taken), 64);
    four = (Four*)scratch(7, padded(count * (int64_t)sizeof(Four), 64) + count * bytes);
    char* at = (char*)four + padded(count * (int64_t)sizeof(Four), 64);
    for (int64_t i = 0; i < count; i++, at += bytes) {
      Four& f = four[i];
      f = {(int8_t*)at, (int32_t*)(at + Kp * 8), (int32_t*)(at + Kp * 10), nullptr, nullptr, nullptr, 0};
      f.extra = f.sums + groups * 4;
      f.taken = (Taken*)(f.extra + groups * 4);
      const int8_t* row[4];
      for (int m = 0; m < 4; m++) {
        const int64_t r = i * 4 + m;
        row[m] = r < M ? x.q + (m0 + r) * Kp : nullptr;
        for (int64_t g = 0; g < groups; g++) f.sums[g * 4 + m] = r < M ? group_sums[(m0 + r) * groups + g] : 0;
      }
      if (lay_bytes(row, Kp, w.group_size, groups, best_level(row, Kp), f)) continue;
      lay_widened(row, Kp, groups, f);
      widened = true;
    }
  }
};

}  // namespace
}  // namespace qpass
