// AVX2: 16 rows of integers to the tiles of product.h.
#pragma once
#include <cstdint>

#include "avx2_target.h"

namespace qpass {
namespace {

// Column i of 8 rows of 8 dwords becomes row i.
QPASS_AVX2_INLINE void transpose8(__m256i (&r)[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      u[4 * i + 2 * j] = _mm256_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      u[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

// pack_tile of pack_tile.h for integers that are known to fit.
QPASS_AVX2 void pack_tile_avx2(const int8_t* rows, int64_t stride, int32_t bits, uint8_t* out) {
  for (int half = 0; half < 2; half++)  // of the 16 outputs
    for (int part = 0; part < (bits == 8 ? 2 : 1); part++) {  // lines 0..7 and 8..15
      __m256i r[8];
      for (int n = 0; n < 8; n++) {
        const int8_t* at = rows + (half * 8 + n) * stride;
        const __m256i low = _mm256_loadu_si256((const __m256i*)(at + part * 32));
        if (bits == 8) {
          r[n] = _mm256_xor_si256(low, _mm256_set1_epi8((char)0x80));
        } else {
          const __m256i high = _mm256_loadu_si256((const __m256i*)(at + 32)), nibble = _mm256_set1_epi8(15);
          const __m256i both = _mm256_or_si256(_mm256_and_si256(low, nibble),
                                               _mm256_slli_epi16(_mm256_and_si256(high, nibble), 4));
          r[n] = _mm256_xor_si256(both, _mm256_set1_epi8((char)0x88));
        }
      }
      transpose8(r);
      for (int line = 0; line < 8; line++)
        _mm256_storeu_si256((__m256i*)(out + (part * 8 + line) * 64 + half * 32), r[line]);
    }
}

// pack_tile: whether all of them fit 4 bits, or 8 do not have to.
QPASS_AVX2 bool pack_tile_checked_avx2(const int8_t* rows, int64_t stride, int32_t bits, uint8_t* out) {
  __m256i beyond = _mm256_setzero_si256();
  for (int n = 0; bits == 4 && n < 16; n++)
    for (int half = 0; half < 64; half += 32)  // + 8 leaves nothing in the upper half of a byte that fits
      beyond = _mm256_or_si256(beyond, _mm256_add_epi8(_mm256_loadu_si256((const __m256i*)(rows + n * stride + half)),
                                                       _mm256_set1_epi8(8)));
  pack_tile_avx2(rows, stride, bits, out);
  return _mm256_testz_si256(beyond, _mm256_set1_epi8((char)0xf0));
}

}  // namespace
}  // namespace qpass
