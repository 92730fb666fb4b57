// Plain C++ for the AVX512 and AMX intrinsics that kernels/cpu/csrc uses, so that those sources run on any machine.
// Written from the pseudocode of Intel's manual; what faults on hardware (alignment, tile shapes) aborts here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// The intrinsics are optimized even where the kernels around them are not: inlining them everywhere takes half a minute
// to compile, and leaving them as written makes the tests slow.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O2")
#endif

#include "emulated_vector.h"

#include "emulated_attention.h"
#include "emulated_rounding.h"
#include "emulated_tile.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
