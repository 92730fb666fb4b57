// One tile of a packed weight: 16 outputs x 64 inputs in the order of product.h, four bytes at a time.
#pragma once
#include <cstdint>
#include <cstring>

namespace qpass {

// rows: 16 rows of 64 integers, `stride` apart. Returns false if one does not fit 4 bits.
static inline bool pack_tile(const int8_t* rows, int64_t stride, int32_t bits, uint8_t* out) {
  uint32_t wrong = 0;
  for (int line = 0; line < 2 * bits; line++)
    for (int n = 0; n < 16; n++, out += 4) {
      uint32_t codes, high;
      memcpy(&codes, rows + n * stride + line * 4, 4);
      if (bits == 8) {
        codes ^= 0x80808080u;  // + 128 in each byte
      } else {
        memcpy(&high, rows + n * stride + 32 + line * 4, 4);
        // A byte fits if its upper half repeats the sign of the lower; then + 8 flips that sign.
        wrong |= (codes & 0xf0f0f0f0u) ^ ((codes & 0x08080808u) << 1) * 15;
        wrong |= (high & 0xf0f0f0f0u) ^ ((high & 0x08080808u) << 1) * 15;
        codes = ((codes & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4) ^ 0x88888888u;
      }
      memcpy(out, &codes, 4);
    }
  return wrong == 0;
}

}  // namespace qpass
