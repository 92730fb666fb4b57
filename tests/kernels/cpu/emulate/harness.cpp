// C ABI over the emulated kernels, for ctypes: the tables of product.h by number, scratch memory of exact size, and what
// experts.cpp and attention need of the library around them.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "abi.h"
#include "decoded.h"
#include "product.h"
#include "scratch.h"

#include "emulated_intrinsics.h"

namespace qpass {

// Fresh memory for every request, exactly as long as asked and full of 0xa5: reading what was not written, or beyond
// the end (with a sanitizer), shows.
void* scratch(int slot, int64_t bytes) {
  static thread_local struct Slots {
    void* data[8] = {};
    ~Slots() {
      for (void* p : data) free(p);
    }
  } slots;
  if (slot < 0 || slot > 7) abort();
  free(slots.data[slot]);
  slots.data[slot] = nullptr;
  if (posix_memalign(&slots.data[slot], 64, (size_t)(bytes > 0 ? bytes : 1))) throw std::bad_alloc();
  return memset(slots.data[slot], 0xa5, (size_t)bytes);
}

extern const DecodedTiles decoded_amx;

static const Isa& table(int isa) { return isa == 0 ? vnni_isa : amx_isa; }

const Isa* available_isa(int32_t isa) { return &table(isa); }

bool machine_runs(int32_t isa) { return isa == 2; }

int32_t team_size(int32_t, int64_t) { return 1; }

int32_t fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  return -1;
}

}  // namespace qpass

using namespace qpass;

extern "C" {

void emulated_quantize(int isa, const void* x, int dtype, int64_t M, int64_t K, int64_t Kp, int asymmetric, int8_t* q,
                       float* scale, float* zero_point, int32_t* sums) {
  table(isa).quantize(x, (DType)dtype, M, K, Kp, asymmetric != 0, q, scale, zero_point, sums);
}

void emulated_product_q(int isa, const Weight* w, const QuantRows* x, const Output* out, int64_t begin, int64_t end) {
  table(isa).product_q(*w, *x, *out, begin, end);
}

void emulated_product_f(int isa, const Weight* w, const FloatRows* x, const Output* out, int64_t begin, int64_t end) {
  table(isa).product_f(*w, *x, *out, begin, end);
}

// Whether AMX takes a weight of decoded.h, which it then multiplies with.
int emulated_decoded(const Decoded* w, const FloatRows* x, const Output* out, int64_t begin, int64_t end) {
  if (!decoded_amx.takes(*w)) return 0;
  decoded_amx.product(*w, *x, *out, begin, end);
  return 1;
}

// Whether this thread still holds a tile configuration, which would disturb other users of AMX.
int emulated_tiles_configured() { return emulated_tiles.configured; }

// Misuse that the emulation must refuse, by number; returns only if it does not.
void emulated_misuse(int which) {
  alignas(64) unsigned char bytes[1024] = {};
  if (which == 0) _tile_zero(0);
  bytes[0] = 1, bytes[16] = 64, bytes[48] = which == 1 ? 17 : 16;
  if (which == 2) bytes[0] = 2;
  if (which == 3) bytes[5] = 1;
  _tile_loadconfig(bytes);
  if (which == 4) _tile_loadd(1, bytes, 64);
  if (which == 5) _tile_dpbssd(0, 0, 0);
  if (which == 6) _mm512_load_si512(bytes + 4);
}

}  // extern "C"
