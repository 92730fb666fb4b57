// AVX2: the product for x86 machines of the last decade (needs avx2, fma and f16c).
#include <cstdint>

#include "avx2_intrinsics.h"
#include "avx2_largest.h"
#include "convert.h"
#include "abi.h"
#include "product.h"
#include "scratch.h"

#include "avx2_begin.h"

#include "avx2_vector.h"
#include "avx2_quantize.h"
#include "avx2_four_rows.h"
#include "avx2_product_q4.h"
#include "avx2_panel_q4.h"
#include "avx2_rows_q8.h"
#include "avx2_bytes_q8.h"
#include "avx2_product_q8.h"
#include "avx2_product_q.h"
#include "avx2_product_f.h"
#include "avx2_product_f4.h"

#include "avx2_end.h"

namespace qpass {

const Isa avx2_isa = {"avx2", quantize, product_q, product_f, false};

}  // namespace qpass
