// AVX2: which of the products of avx2_decoded_rows.h and avx2_small_integers.h a weight takes. Inside a target region only.
#pragma once

namespace qpass {
namespace {

using DirectRows = void (*)(const Decoded&, const DecodedRows&, const Output&, int64_t, const Tables&);

template <How HOW>
DirectRows direct_of(int64_t rows) {
  return rows == 1 ? rows_direct<HOW, 1> : rows == 2 ? rows_direct<HOW, 2> : nullptr;
}

DirectRows direct_for(const Decoded& w, How how, int64_t rows) {
  if (rows == 1 && !w.third && w.K % w.group_size == 0) {  // the small groups of MX formats and of nf4
    if (w.scale_dtype == kE8m0 && w.group_size == 32 && how == How::e4m3) return rows_direct<How::e4m3, 1, kE8m0, 2>;
    if (w.scale_dtype == DType::f32 && w.group_size == 64 && how == How::table)
      return rows_direct<How::table, 1, DType::f32, 4>;
  }
  switch (how) {
    case How::table: return direct_of<How::table>(rows);
    case How::e4m3: return direct_of<How::e4m3>(rows);
    case How::integer: return direct_of<How::integer>(rows);
    case How::e5m2: return nullptr;  // rare: a panel serves it
  }
  return nullptr;
}

void decoded_product(const Decoded& w, const DecodedRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  if (x.digits) {
    const SmallRows product = small_for(w, x.M);
    for (int64_t block = block_begin; block < block_end && block * 16 < w.N; block++) product(w, x, out, block);
    return;
  }
  const How how = how_of(w);
  const Tables tables(w);
  const DirectRows direct = direct_for(w, how, x.M);
  for (int64_t block = block_begin; block < block_end && block * 16 < w.N; block++) {
    if (direct) direct(w, x, out, block, tables);
    else rows_by_panel(w, x, out, block, how, tables);
  }
}

}  // namespace
}  // namespace qpass
