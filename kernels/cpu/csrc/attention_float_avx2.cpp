// AVX2: attention over float keys and values.
#include "attention_vectors_avx2.h"
#include "attention_chunk.h"

namespace qpass {

const FloatSteps float_attention_avx2 = {begin, chunk, join, finish};

}  // namespace qpass
