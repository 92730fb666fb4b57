// Opens a region whose functions may use AVX2, FMA and F16C; avx2_end.h closes it. What other files share is included
// before it: a function that is compiled here must not be the one that the linker keeps for them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
