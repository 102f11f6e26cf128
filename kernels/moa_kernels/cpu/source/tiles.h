// AMX tiles of bfloat16 pairs (Xeons since Sapphire Rapids), or the same in plain C++ to test it elsewhere.
//
// Only on request, -DMOA_AMX: the layout is tested by emulation, but no such processor has run it yet.
#pragma once
#include "vectors.h"

#if (defined(MOA_AMX) && defined(__AMX_BF16__)) || defined(MOA_TILES_EMULATED)
#define MOA_TILES 1
#if !defined(MOA_TILES_EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <string.h>

namespace moa {

#if defined(MOA_TILES_EMULATED)
static thread_local uint8_t emulated[8][16][64];
static thread_local bool emulated_configured = false;
INLINE void tiles_configure() { emulated_configured = true; }
INLINE void tiles_release() { emulated_configured = false; }
INLINE int tiles_allowed() { return 1; }
#define TILE_ZERO(t) memset(emulated[t], 0, 1024)
#define TILE_LOAD(t, from, stride) \
  for (int i_ = 0; i_ < 16; i_++) memcpy(emulated[t][i_], (const char*)(from) + i_ * (stride), 64)
#define TILE_STORE(t, to, stride) \
  for (int i_ = 0; i_ < 16; i_++) memcpy((char*)(to) + i_ * (stride), emulated[t][i_], 64)
static void emulated_multiply(int c, int a, int b) {
  if (!emulated_configured) __builtin_trap();
  auto wide = [](uint16_t x) { return __builtin_bit_cast(float, (uint32_t)x << 16); };
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        float* sum = (float*)emulated[c][m] + n;
        const uint16_t *x = (uint16_t*)emulated[a][m] + 2 * k, *y = (uint16_t*)emulated[b][k] + 2 * n;
        *sum += wide(x[0]) * wide(y[0]) + wide(x[1]) * wide(y[1]);
      }
}
#define TILE_MULTIPLY(c, a, b) emulated_multiply(c, a, b)
#else
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
INLINE void tiles_configure() {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
}
INLINE void tiles_release() { _tile_release(); }
INLINE int tiles_allowed() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

// C[16, N * 16] (+)= A[16, k] B[k, N * 16], k pairs, a multiple of 16; strides in bytes.
template <int N, bool ADD>
INLINE void tiles_multiply(const uint32_t* a, long lda, const uint32_t* b, long ldb, long k, float* c, long ldc) {
  if constexpr (ADD) {
    TILE_LOAD(0, c, ldc);
    if constexpr (N > 1) TILE_LOAD(1, c + 16, ldc);
    if constexpr (N > 2) TILE_LOAD(2, c + 32, ldc);
    if constexpr (N > 3) TILE_LOAD(3, c + 48, ldc);
  } else {
    TILE_ZERO(0);
    if constexpr (N > 1) TILE_ZERO(1);
    if constexpr (N > 2) TILE_ZERO(2);
    if constexpr (N > 3) TILE_ZERO(3);
  }
  for (long i = 0; i < k; i += 16) {
    const char* row = (const char*)b + i * ldb;
    TILE_LOAD(4, a + i, lda);
    TILE_LOAD(5, row, ldb);
    TILE_MULTIPLY(0, 4, 5);
    if constexpr (N > 1) {
      TILE_LOAD(6, row + 64, ldb);
      TILE_MULTIPLY(1, 4, 6);
    }
    if constexpr (N > 2) {
      TILE_LOAD(7, row + 128, ldb);
      TILE_MULTIPLY(2, 4, 7);
    }
    if constexpr (N > 3) {
      TILE_LOAD(5, row + 192, ldb);
      TILE_MULTIPLY(3, 4, 5);
    }
  }
  TILE_STORE(0, c, ldc);
  if constexpr (N > 1) TILE_STORE(1, c + 16, ldc);
  if constexpr (N > 2) TILE_STORE(2, c + 32, ldc);
  if constexpr (N > 3) TILE_STORE(3, c + 48, ldc);
}

}  // namespace moa
#endif
