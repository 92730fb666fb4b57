// The product of more than 4 rows of codes on AMX, in a file of its own (amx_codes.cpp), and the tiles it reads rows from.
#pragma once
#include "product.h"

namespace qpass {

void product_q_amx(const Weight& w, const QuantRows& x, const Output& out, int64_t block_begin, int64_t block_end);
void tile_rows_amx(const int8_t* q, int64_t M, int64_t Kp, int64_t begin, int64_t end, int8_t* tiles);
int64_t tile_bytes_amx(int64_t M, int64_t Kp);

}  // namespace qpass
