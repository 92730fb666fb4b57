// Target attributes and intrinsics of the AVX512 and AMX code, so that one -O3 build without -march serves any machine.
//
// With -DQPASS_EMULATE the attributes are empty and "emulated_intrinsics.h", found through the include path, supplies
// plain C++ for exactly the intrinsics used here: then the same sources run, and are tested, on every machine.
#pragma once

#ifdef QPASS_EMULATE
#include "emulated_intrinsics.h"
#define QPASS_AVX512
#define QPASS_AVX512_INLINE static inline
#define QPASS_AVX512_OUTLINE static inline
#define QPASS_AMX
#define QPASS_AMX_INLINE static inline
#define QPASS_AMX_MEMBER inline
#define QPASS_AMX_OUTLINE static inline
#else
#include <immintrin.h>
// What Cascade Lake and later have: bf16 is converted with integer instructions, because avx512_bf16 came later.
#define QPASS_AVX512_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define QPASS_AVX512 __attribute__((target(QPASS_AVX512_FEATURES)))
#define QPASS_AVX512_INLINE QPASS_AVX512 __attribute__((always_inline)) static inline
#define QPASS_AVX512_OUTLINE QPASS_AVX512 __attribute__((noinline, unused)) static
#define QPASS_AMX __attribute__((target(QPASS_AVX512_FEATURES ",gfni,amx-tile,amx-int8,amx-bf16")))
#define QPASS_AMX_INLINE QPASS_AMX __attribute__((always_inline)) static inline
#define QPASS_AMX_MEMBER QPASS_AMX __attribute__((always_inline)) inline
#define QPASS_AMX_OUTLINE QPASS_AMX __attribute__((noinline, unused)) static
#endif

// The compiler's tile intrinsics do not say that they read memory: stores before them must not sink or vanish
// (GCC 12 drops the stores to the struct that _tile_loadconfig reads).
#define QPASS_STORES_DONE() __asm__ volatile("" ::: "memory")
