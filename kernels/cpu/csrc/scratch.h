// Scratch memory of the calling thread: 64-byte aligned, grown when asked, kept for the next call.
#pragma once
#include <cstdint>

namespace qpass {

// Slots 0 to 3, 8 and 9 belong to the driver, 4 to 7 to the instruction sets. Throws std::bad_alloc.
void* scratch(int slot, int64_t bytes);

}  // namespace qpass
