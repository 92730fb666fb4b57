// AVX512: attention over a quantized cache.
#include "attention_vectors_avx512.h"
#include "attention_head.h"

namespace qpass {

const CacheHead cache_head_avx512 = head_of_any;

}  // namespace qpass
