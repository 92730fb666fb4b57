// Packing: int8 weights [N, K] into the layout of product.h, and back; bounds and value ranges are checked first.
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "avx2_pack_tile.h"
#include "pack_tile.h"

namespace qpass {
namespace {

const char* check(const void* q, int64_t q_bytes, int64_t N, int64_t K, int32_t bits, const void* packed,
                  int64_t packed_bytes) {
  if (!q || !packed) return "a null pointer was given";
  if (bits != 4 && bits != 8) return "bits must be 4 or 8";
  if (N < 1 || K < 1 || N > (int64_t(1) << 40) / K) return "sizes must be positive and reasonable";
  if (q_bytes != N * K) return "the integer weight does not hold N * K bytes";
  if (packed_bytes != padded(N, 32) * padded(K, 64) * bits / 8) return "the packed weight has the wrong size";
  return nullptr;
}

// One block of 16 outputs x 64 inputs, outputs beyond N and inputs beyond K as weight 0; returns false if a weight
// does not fit 4 bits.
bool pack_block(const int8_t* q, int64_t N, int64_t K, int32_t bits, int64_t n0, int64_t k0, bool avx2, uint8_t* out) {
  if (avx2 && n0 + 16 <= N && k0 + 64 <= K) return pack_tile_checked_avx2(q + n0 * K + k0, K, bits, out);
  int8_t tile[16][64];
  for (int64_t n = 0; n < 16; n++) {
    const int64_t there = n0 + n < N ? (k0 + 64 <= K ? 64 : K - k0) : 0;
    memset(tile[n], 0, 64);
    if (there > 0) memcpy(tile[n], q + (n0 + n) * K + k0, (size_t)there);
  }
  return pack_tile(tile[0], 64, bits, out);
}

void unpack_block(const uint8_t* in, int64_t N, int64_t K, int32_t bits, int64_t n0, int64_t k0, int8_t* q) {
  for (int64_t n = n0; n < n0 + 16 && n < N; n++)
    for (int64_t k = k0; k < k0 + 64 && k < K; k++) {
      const int64_t line = (k - k0) / 4, byte = (n - n0) * 4 + k % 4;
      if (bits == 8) {
        q[n * K + k] = (int8_t)(in[line * 64 + byte] - 128);
      } else {
        const uint8_t both = in[line % 8 * 64 + byte];
        q[n * K + k] = (int8_t)((line < 8 ? both & 15 : both >> 4) - 8);
      }
    }
}

}  // namespace
}  // namespace qpass

using namespace qpass;

extern "C" int32_t qp_pack(const int8_t* q, int64_t q_bytes, int64_t N, int64_t K, int32_t bits, uint8_t* packed,
                           int64_t packed_bytes, int32_t threads) {
  if (const char* why = check(q, q_bytes, N, K, bits, packed, packed_bytes)) return fail("pack: %s", why);
  const int64_t outer = padded(N, 32) / 16, inner = padded(K, 64) / 64, bytes = bits * 128;
  int32_t misfits = 0;
  const bool avx2 = machine_runs(1);
  const int32_t team = team_size(threads, outer);
#pragma omp parallel for num_threads(team) if (team > 1) reduction(+ : misfits)
  for (int64_t i = 0; i < outer; i++)
    for (int64_t j = 0; j < inner; j++)
      misfits += !pack_block(q, N, K, bits, i * 16, j * 64, avx2, packed + (i * inner + j) * bytes);
  return misfits ? fail("pack: a weight lies outside -8..7 and does not fit 4 bits") : 0;
}

extern "C" int32_t qp_unpack(const uint8_t* packed, int64_t packed_bytes, int64_t N, int64_t K, int32_t bits, int8_t* q,
                             int64_t q_bytes, int32_t threads) {
  if (const char* why = check(q, q_bytes, N, K, bits, packed, packed_bytes)) return fail("unpack: %s", why);
  const int64_t outer = padded(N, 32) / 16, inner = padded(K, 64) / 64, bytes = bits * 128;
  const int32_t team = team_size(threads, outer);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t i = 0; i < outer; i++)
    for (int64_t j = 0; j < inner; j++)
      unpack_block(packed + (i * inner + j) * bytes, N, K, bits, i * 16, j * 64, q);
  return 0;
}
