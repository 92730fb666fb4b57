// AVX2: the product for x86 machines of the last decade (needs avx2, fma and f16c).
#include <immintrin.h>

#include <cstdint>

#include "convert.h"
#include "product.h"
#include "scratch.h"

// Only what follows may use the instruction set; everything that other files share is included above.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "avx2_vector.h"
#include "avx2_quantize.h"
#include "avx2_product_q4.h"
#include "avx2_product_q8.h"
#include "avx2_product_q.h"
#include "avx2_product_f.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qpass {

const Isa avx2_isa = {"avx2", quantize, product_q, product_f};

}  // namespace qpass
