// The intrinsics of AVX2, FMA and F16C. <immintrin.h> holds all of AVX512 as well, which takes GCC 1.3 s a file to read: more
// than compiling most files here. Its parts are one file each in every GCC, and ask that it be included first.
#pragma once
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9 && __GNUC__ <= 15 && !defined(_IMMINTRIN_H_INCLUDED)
#define _IMMINTRIN_H_INCLUDED
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <fmaintrin.h>
#include <f16cintrin.h>
#else
#include <immintrin.h>
#endif
