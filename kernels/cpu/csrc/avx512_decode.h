// Integer weights to float32 on AVX512, (q - zero_point) without the scale, exactly, 16 outputs at a time.
#pragma once
#include "avx512_vector.h"

namespace qpass {
namespace {

// How a byte or nibble becomes (q - zero_point) in float32.
enum class Decode { nibble_table, nibble_zero, byte_zero };

// A float of 2^23 has its integer in the low mantissa bits: or in the code, subtract 2^23 + offset + zero point, exactly.
constexpr float kMagic = 8388608.f;

struct Decoder {
  __m512 table, offset;  // symmetric 4 bits: one permute looks the value up; else: what to subtract
};

QPASS_AVX512_INLINE Decoder decoder_of(const Weight& w, int64_t block, int64_t group) {
  Decoder d;
  d.table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  d.offset = _mm512_set1_ps(kMagic + (w.bits == 4 ? 8.f : 128.f));
  if (w.zero_point) d.offset = _mm512_add_ps(d.offset, _mm512_cvtepi32_ps(group_zero_points(w, block, group)));
  return d;
}

// 16 outputs' weights at input j (0..3) of a line; `upper` takes the high nibble.
template <Decode DECODE>
QPASS_AVX512_INLINE __m512 decoded(__m512i line, int j, bool upper, const Decoder& d) {
  const __m512i shifted = _mm512_srli_epi32(line, (unsigned)(j * 8 + (DECODE != Decode::byte_zero && upper ? 4 : 0)));
  if (DECODE == Decode::nibble_table) return _mm512_permutexvar_ps(shifted, d.table);  // reads 4 bits of each lane
  const __m512i field = _mm512_set1_epi32(DECODE == Decode::byte_zero ? 255 : 15);
  const __m512i magic = _mm512_castps_si512(_mm512_set1_ps(kMagic));
  const __m512i bits = _mm512_ternarylogic_epi32(shifted, field, magic, 0xEA);  // (shifted & field) | magic
  return _mm512_sub_ps(_mm512_castsi512_ps(bits), d.offset);
}

// The 8 lines that hold inputs [32 * run, 32 * run + 32) of a block of outputs.
inline const uint8_t* run_lines(const Weight& w, int64_t block, int64_t run) {
  const uint8_t* at = w.q + (block * (w.Kp / 64) + run / 2) * (w.bits * 128);
  return w.bits == 8 && run % 2 ? at + 512 : at;
}

}  // namespace
}  // namespace qpass
