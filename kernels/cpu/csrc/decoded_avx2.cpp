// AVX2: the product with weights of decoded.h (needs avx2, fma and f16c), which machines with AVX512 and AMX run too.
#include <cstdint>

#include "avx2_intrinsics.h"
#include "decoded.h"
#include "scratch.h"

#include "avx2_begin.h"

#include "avx2_vector.h"
#include "avx2_decode.h"
#include "avx2_decoded_rows.h"
#include "avx2_small_integers.h"
#include "avx2_decoded_product.h"

#include "avx2_end.h"

namespace qpass {

const DecodedProduct decoded_avx2 = decoded_product;
const MakeDigits digits_avx2 = make_digits;

}  // namespace qpass
