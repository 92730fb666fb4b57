// AMX tile intrinsics with the configuration checks of the hardware: a wrong shape or palette aborts.
#pragma once
#include "emulated_vector.h"

struct EmulatedTiles {
  bool configured = false;
  int rows[8] = {}, bytes[8] = {};
  uint8_t data[8][16][64] = {};
};

inline thread_local EmulatedTiles emulated_tiles;

inline void _tile_release() { emulated_tiles = EmulatedTiles(); }

inline void _tile_loadconfig(const void* config) {
  const uint8_t* c = (const uint8_t*)config;
  _tile_release();
  if (c[0] == 0) return;
  if (c[0] != 1) emulated_fault("ldtilecfg: the palette must be 0 or 1");
  for (int i = 2; i < 16; i++)
    if (c[i]) emulated_fault("ldtilecfg: a reserved byte is set");
  for (int i = 32; i < 48; i++)
    if (c[i]) emulated_fault("ldtilecfg: bytes per row of a tile that palette 1 lacks");
  for (int i = 56; i < 64; i++)
    if (c[i]) emulated_fault("ldtilecfg: rows of a tile that palette 1 lacks");
  for (int t = 0; t < 8; t++) {
    const int bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
    if (bytes > 64 || rows > 16) emulated_fault("ldtilecfg: a tile has at most 16 rows of 64 bytes");
    if ((bytes == 0) != (rows == 0)) emulated_fault("ldtilecfg: rows and bytes per row must both be zero or neither");
    emulated_tiles.bytes[t] = bytes;
    emulated_tiles.rows[t] = rows;
  }
  emulated_tiles.configured = true;
}

inline void need_tile(int t) {
  if (!emulated_tiles.configured) emulated_fault("a tile instruction without a tile configuration");
  if (t < 0 || t > 7 || emulated_tiles.rows[t] == 0) emulated_fault("a tile that is not configured");
}

inline void _tile_zero(int t) {
  need_tile(t);
  memset(emulated_tiles.data[t], 0, sizeof emulated_tiles.data[t]);
}

inline void _tile_loadd(int t, const void* base, long stride) {
  _tile_zero(t);
  for (int r = 0; r < emulated_tiles.rows[t]; r++)
    memcpy(emulated_tiles.data[t][r], (const char*)base + r * stride, (size_t)emulated_tiles.bytes[t]);
}

inline void _tile_stored(int t, void* base, long stride) {
  need_tile(t);
  for (int r = 0; r < emulated_tiles.rows[t]; r++)
    memcpy((char*)base + r * stride, emulated_tiles.data[t][r], (size_t)emulated_tiles.bytes[t]);
}

inline void need_product(int c, int a, int b) {
  need_tile(c), need_tile(a), need_tile(b);
  const EmulatedTiles& t = emulated_tiles;
  if (c == a || c == b || a == b) emulated_fault("a tile product needs three different tiles");
  if (t.bytes[a] % 4 || t.bytes[b] % 4 || t.bytes[c] % 4) emulated_fault("a tile product needs rows of whole words");
  if (t.rows[c] != t.rows[a] || t.bytes[c] != t.bytes[b] || t.bytes[a] / 4 != t.rows[b])
    emulated_fault("the shapes of a tile product do not fit");
}

// Signed bytes of `a` times bytes of `b` of either kind.
template <typename Byte>
inline void emulated_product(int c, int a, int b) {
  need_product(c, a, b);
  EmulatedTiles& t = emulated_tiles;
  for (int m = 0; m < t.rows[c]; m++) {
    for (int n = 0; n < t.bytes[c] / 4; n++) {
      uint32_t sum;
      memcpy(&sum, t.data[c][m] + 4 * n, 4);
      for (int k = 0; k < t.bytes[a] / 4; k++)
        for (int j = 0; j < 4; j++)
          sum += (uint32_t)((int32_t)(int8_t)t.data[a][m][4 * k + j] * (int32_t)(Byte)t.data[b][k][4 * n + j]);
      memcpy(t.data[c][m] + 4 * n, &sum, 4);
    }
  }
}

inline void _tile_dpbssd(int c, int a, int b) { emulated_product<int8_t>(c, a, b); }
inline void _tile_dpbsud(int c, int a, int b) { emulated_product<uint8_t>(c, a, b); }

// Subnormals count as zero, in and out, whatever MXCSR says.
inline float without_subnormal(float f) { return std::fabs(f) < 1.17549435e-38f ? std::copysign(0.f, f) : f; }

inline float bf16_at(const uint8_t* p) {
  return without_subnormal(same_bits<float>((uint32_t)(p[0] | p[1] << 8) << 16));
}

inline void _tile_dpbf16ps(int c, int a, int b) {
  need_product(c, a, b);
  EmulatedTiles& t = emulated_tiles;
  for (int m = 0; m < t.rows[c]; m++) {
    for (int n = 0; n < t.bytes[c] / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < t.bytes[a] / 4; k++) {
        const uint8_t *x = t.data[a][m] + 4 * k, *w = t.data[b][k] + 4 * n;
        even = without_subnormal(std::fmaf(bf16_at(x), bf16_at(w), even));
        odd = without_subnormal(std::fmaf(bf16_at(x + 2), bf16_at(w + 2), odd));
      }
      memcpy(&sum, t.data[c][m] + 4 * n, 4);
      sum = without_subnormal(without_subnormal(sum) + without_subnormal(even + odd));
      memcpy(t.data[c][m] + 4 * n, &sum, 4);
    }
  }
}
