// AVX2 function by function, for files that also hold functions for every machine.
#pragma once
#include "avx2_intrinsics.h"

#define QPASS_AVX2 __attribute__((target("avx2,fma,f16c")))
#define QPASS_AVX2_INLINE QPASS_AVX2 __attribute__((always_inline)) static inline
