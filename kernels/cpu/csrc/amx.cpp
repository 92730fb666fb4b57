// AMX: integer products for more than 4 rows in int8 tiles (amx_codes.cpp), float products in bf16 tiles (amx_float.cpp).
//
// Up to 4 rows of codes run on VNNI, where they are faster, with the same bits as results: exact int32 sums, the same fma
// per group in the same order. Whoever calls this has asked the kernel for the use of tile data (runtime.cpp).
#include "amx_codes.h"
#include "amx_float.h"

namespace qpass {
namespace {

void quantize(const void* x, DType dtype, int64_t M, int64_t K, int64_t Kp, bool asymmetric, int8_t* q, float* scale,
              float* zero_point, int32_t* sums) {
  vnni_isa.quantize(x, dtype, M, K, Kp, asymmetric, q, scale, zero_point, sums);
}

void product_q(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin, int64_t block_end) {
  (x.M <= 4 ? vnni_isa.product_q : product_q_amx)(w, x, out, block_begin, block_end);
}

}  // namespace

const Isa amx_isa = {"amx", quantize, product_q, product_f_amx, true, tile_rows_amx, tile_bytes_amx};

}  // namespace qpass
