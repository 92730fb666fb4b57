// Plain C++ for the AVX512 and AMX intrinsics that kernels/cpu/csrc uses, so that those sources run on any machine.
// Written from the pseudocode of Intel's manual; what faults on hardware (alignment, tile shapes) aborts here.
#pragma once
#include "emulated_vector.h"

#include "emulated_tile.h"
