// AVX512: attention over float keys and values.
#include "attention_vectors_avx512.h"
#include "attention_chunk.h"

namespace qpass {

const FloatSteps float_attention_avx512 = {begin, chunk, join, finish};

}  // namespace qpass
