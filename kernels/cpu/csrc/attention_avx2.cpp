// AVX2: attention over a quantized cache.
#include "attention_vectors_avx2.h"
#include "attention_head.h"

namespace qpass {

const CacheHead cache_head_avx2 = head_of_any;

}  // namespace qpass
