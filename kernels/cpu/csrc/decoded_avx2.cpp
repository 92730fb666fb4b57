// AVX2: the product with weights of decoded.h (needs avx2, fma and f16c), which machines with AVX512 and AMX run too.
#include <immintrin.h>

#include <cstdint>

#include "decoded.h"
#include "scratch.h"

// Only what follows may use the instruction set; everything that other files share is included above.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "avx2_vector.h"
#include "avx2_decode.h"
#include "avx2_decoded_rows.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qpass {

const DecodedProduct decoded_avx2 = decoded_product;

}  // namespace qpass
