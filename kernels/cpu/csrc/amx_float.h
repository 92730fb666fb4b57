// The product of float rows on AMX, in a file of its own (amx_float.cpp).
#pragma once
#include "product.h"

namespace qpass {

void product_f_amx(const Weight& w, const FloatRows& x, const Output& out, int64_t block_begin, int64_t block_end);

}  // namespace qpass
