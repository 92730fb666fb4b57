// AMX: products of float rows with integer weights. A weight minus its zero point is an integer that bf16 has exactly.
//
// One row of bf16, as in decoding, is multiplied without tiles, with the same bits (amx_float_row.h).
// Whoever calls this has asked the kernel for the use of tile data (runtime.cpp).
#include "amx_float.h"

#include "amx_float_product.h"
#include "amx_float_row.h"

namespace qpass {
namespace {

template <Codes CODES>
struct Integers {
  static constexpr int64_t kBytes = CODES == Codes::bytes ? 1024 : 512;
  static constexpr int kParts = 1;
  const Weight& w;
  const uint8_t* q;
  const float* gain = nullptr;
  int64_t N, blocks, total, runs;  // runs of 32 inputs, in all and of a group

  explicit Integers(const Weight& w)
      : w(w), q(w.q), N(w.N), blocks(w.Kp / 64), total((w.K + 31) / 32), runs(w.group_size / 32) {}
  QPASS_AMX_MEMBER void choose(int64_t) {}
  QPASS_AMX_MEMBER void piece(int64_t block, int64_t k, const uint8_t* ahead, int8_t* tiles) const {
    unpack_block<CODES>(w, block, k, ahead, tiles);
  }
  QPASS_AMX_MEMBER __m512 scales(int64_t block, int64_t group) const { return group_scales(w, block, group); }
};

}  // namespace

void product_f_amx(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  if (x.M == 1 && x.bf16_parts == 1) {
    if (w.bits == 8) return row_product<Decode::byte_zero>(w, x, out, block_begin, block_end);
    if (w.zero_point) return row_product<Decode::nibble_zero>(w, x, out, block_begin, block_end);
    return row_product<Decode::nibble_table>(w, x, out, block_begin, block_end);
  }
  if (w.bits == 8) return product_of(Integers<Codes::bytes>(w), x, out, block_begin, block_end);
  if (w.zero_point) return product_of(Integers<Codes::differences>(w), x, out, block_begin, block_end);
  product_of(Integers<Codes::nibbles>(w), x, out, block_begin, block_end);
}

}  // namespace qpass
