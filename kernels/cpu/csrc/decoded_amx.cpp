// AMX: the product with weights of decoded.h, as bf16 tiles, for those that need no shifts.
#include "amx_decode.h"
#include "amx_float_product.h"

namespace qpass {
namespace {

// Whether all 16 values are 0, or of moderate size and exact with `bits` bits.
bool few_bits(const float* table, int bits) {
  for (int c = 0; c < 16; c++) {
    const uint32_t u = bits_of(table[c]), exponent = u >> 23 & 255;
    if (u << 1 != 0 && (u << (8 + bits) != 0 || exponent < 67 || exponent > 187)) return false;
  }
  return true;
}

bool takes(const Decoded& w) {
  if (w.third || w.code == Code::e5m2) return false;
  if (w.groups == 1 || w.group_size % 32 == 0) return true;
  return w.code == Code::table && w.scale_dtype == kE4m3 && w.group_size == 16 && few_bits(w.table, 4);
}

template <int PARTS>
bool sum_of(const Decoded& w) {
  uint16_t tables[PARTS][32];
  return split_table(w.table, PARTS, tables);
}

void product(const Decoded& w, const FloatRows& x, const Output& out, int64_t begin, int64_t end) {
  const bool powers = w.scale_dtype == kE8m0 && w.groups > 1 && w.group_size == 32;
  if (w.code == Code::e4m3) {
    if (powers) return product_of(PowerE4m3Source(w), x, out, begin, end);
    return product_of(E4m3Source(w), x, out, begin, end);
  }
  if (w.code != Code::table) return product_of(ByteSource(w), x, out, begin, end);
  if (w.scale_dtype == kE4m3 && w.groups > 1 && w.group_size == 16) return product_of(ProductSource(w), x, out, begin, end);
  if (powers && few_bits(w.table, 8)) return product_of(PowerTableSource(w), x, out, begin, end);
  if (sum_of<1>(w)) return product_of(TableSource<1>(w), x, out, begin, end);
  // Two parts leave 2^-17 of a value at most, where rows, and results, were rounded to 2^-9 of theirs.
  if (sum_of<2>(w) || x.bf16_parts == 1) return product_of(TableSource<2>(w), x, out, begin, end);
  product_of(TableSource<3>(w), x, out, begin, end);
}

}  // namespace

extern const DecodedTiles decoded_amx;
const DecodedTiles decoded_amx = {takes, product};

}  // namespace qpass
