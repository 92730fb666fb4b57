// AVX2: bytes of a packed weight to float32, exactly, 8 outputs x 4 inputs at a time. Inside a target region only.
//
// What it costs, in instructions for 8 values without the fma: a table 3, fp8 4 or 8, integers 4. A code of a table is
// looked up a byte of the float at a time (vpshufb finds 32 at once), and the bytes are put side by side.
#pragma once

namespace qpass {
namespace {

enum class How { table, e4m3, e5m2, integer };

inline How how_of(const Decoded& w) {
  if (w.code == Code::table) return How::table;
  return w.code == Code::e4m3 ? How::e4m3 : w.code == Code::e5m2 ? How::e5m2 : How::integer;
}

// Byte i of each of the 16 floats of a table, in both halves of a register; or the bits of a sign-extended byte to keep.
struct Tables {
  __m256i byte[4], kept;
  explicit Tables(const Decoded& w) : kept(_mm256_set1_epi32(w.code == Code::uint8 ? 255 : -1)) {
    alignas(16) uint8_t bytes[4][16] = {};
    for (int c = 0; c < 16 && w.code == Code::table; c++)
      for (int i = 0; i < 4; i++) bytes[i][c] = (uint8_t)(bits_of(w.table[c]) >> 8 * i);
    for (int i = 0; i < 4; i++) byte[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[i]));
  }
};

// The codes of one line, 8 outputs (half h) x 4 inputs: those of inputs 0..31 of a block, and of inputs 32..63.
struct Line {
  __m256i part[2];
};

template <How HOW>
inline __attribute__((always_inline)) Line line_of(const uint8_t* block, int r, int h) {
  const uint8_t* at = block + r * 64 + h * 32;
  const __m256i low = _mm256_loadu_si256((const __m256i*)at);
  if (HOW != How::table) return {{low, _mm256_loadu_si256((const __m256i*)(at + 512))}};
  // From output-major to input-major bytes, within 4 outputs.
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i nibble = _mm256_set1_epi8(15), codes = _mm256_shuffle_epi8(low, order);
  return {{_mm256_and_si256(codes, nibble), _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)}};
}

inline __attribute__((always_inline)) __m256 as_floats(__m256i v) { return _mm256_castsi256_ps(v); }

// The values of 8 outputs at each of 4 inputs.
template <How HOW>
inline __attribute__((always_inline)) void values_of(__m256i codes, const Tables& t, __m256 (&value)[4]) {
  if (HOW == How::table) {
    const __m256i a = _mm256_shuffle_epi8(t.byte[0], codes), b = _mm256_shuffle_epi8(t.byte[1], codes);
    const __m256i c = _mm256_shuffle_epi8(t.byte[2], codes), d = _mm256_shuffle_epi8(t.byte[3], codes);
    const __m256i low01 = _mm256_unpacklo_epi8(a, b), low23 = _mm256_unpackhi_epi8(a, b);
    const __m256i high01 = _mm256_unpacklo_epi8(c, d), high23 = _mm256_unpackhi_epi8(c, d);
    value[0] = as_floats(_mm256_unpacklo_epi16(low01, high01));
    value[1] = as_floats(_mm256_unpackhi_epi16(low01, high01));
    value[2] = as_floats(_mm256_unpacklo_epi16(low23, high23));
    value[3] = as_floats(_mm256_unpackhi_epi16(low23, high23));
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m256i top = _mm256_slli_epi32(codes, 24 - 8 * j);
    if (HOW == How::integer) {
      value[j] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srai_epi32(top, 24), t.kept));
    } else if (HOW == How::e4m3) {  // its exponent and fraction at their places, then the difference of the biases;
      // the product with a power of two makes normal numbers of subnormal ones. NaN is for `gain` to say.
      const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(top, 4), _mm256_set1_epi32((int)0x87f00000));
      value[j] = _mm256_mul_ps(as_floats(bits), _mm256_set1_ps(0x1p120f));
    } else {
      const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(top, 3), _mm256_set1_epi32((int)0x8fe00000));
      const __m256 scaled = _mm256_mul_ps(as_floats(bits), _mm256_set1_ps(0x1p112f));
      const __m256i largest = _mm256_set1_epi32(0x0f7fffff);  // above: Inf and NaN, whose exponent is all ones
      const __m256i special = _mm256_cmpgt_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x0fe00000)), largest);
      const __m256i exponent = _mm256_and_si256(special, _mm256_set1_epi32(0x7f800000));
      value[j] = _mm256_or_ps(scaled, as_floats(exponent));
    }
  }
}

// 8 scales of a byte each: kInt8, kE4m3 or kE8m0.
template <DType SCALE>
inline __attribute__((always_inline)) __m256 scales_of(const uint8_t* at) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)at);
  if (SCALE == kInt8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  if (SCALE == kE4m3) {
    const __m256i top = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 24);
    const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(top, 4), _mm256_set1_epi32((int)0x87f00000));
    return _mm256_mul_ps(as_floats(bits), _mm256_set1_ps(0x1p120f));
  }
  const __m256i s = _mm256_cvtepu8_epi32(bytes), zero = _mm256_cmpeq_epi32(s, _mm256_setzero_si256());
  const __m256i nan = _mm256_cmpeq_epi32(s, _mm256_set1_epi32(255));
  const __m256i small = _mm256_and_si256(zero, _mm256_set1_epi32(1 << 22));  // 2^-127 is subnormal
  return as_floats(_mm256_or_si256(_mm256_or_si256(_mm256_slli_epi32(s, 23), small), _mm256_srli_epi32(nan, 1)));
}

// 8 scales or offsets of any dtype that decoded.h has for them.
inline __m256 load8_any(const void* p, DType dtype, int64_t i) {
  if ((int32_t)dtype <= 2) return load8(p, dtype, i);
  const uint8_t* at = (const uint8_t*)p + i;
  return dtype == kInt8 ? scales_of<kInt8>(at) : dtype == kE4m3 ? scales_of<kE4m3>(at) : scales_of<kE8m0>(at);
}

}  // namespace
}  // namespace qpass
