// Products of matrices: what a sum is made of, packed operands, and the micro kernel that holds sums in registers.
#pragma once
#include "numbers.h"
#include "tiles.h"

namespace moa {

// A packed operand holds units of PER numbers. Inputs are multiplied as pairs of bfloat16 where they are that and the
// processor can, else as floats. ROWS is what a micro kernel takes of the left operand; STEP, of which k is a multiple.
struct Floats {
  typedef float Unit;
  typedef F Vector;
  static constexpr int PER = 1, ROWS = 6, STEP = L;
  static constexpr bool TILES = false;
  INLINE F fma(F sum, float a, F b) { return sum + a * b; }
};
#if defined(MOA_TILES)
struct Pairs {
  typedef uint32_t Unit;
  typedef U Vector;
  static constexpr int PER = 2, ROWS = 16, STEP = 2 * L;
  static constexpr bool TILES = true;
  INLINE F fma(F sum, uint32_t, U) { return sum; }
};
#elif defined(__AVX512BF16__) && defined(MOA_AVX512)
struct Pairs {
  typedef uint32_t Unit;
  typedef U Vector;
  static constexpr int PER = 2, ROWS = 6, STEP = 2 * L;
  static constexpr bool TILES = false;
  INLINE F fma(F sum, uint32_t a, U b) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
};
#else
typedef Floats Pairs;
#endif
constexpr int MOST_ROWS = 16;

template <class T>
struct ProductOf {
  typedef Floats Kind;
};
template <>
struct ProductOf<bf16> {
  typedef Pairs Kind;
};

// C[ROWS, N * L] = (ADD ? C * factor : 0) + A[ROWS, k] B[k, N * L], where B is part of one packed panel and k counts
// units; `factor` has one number per row.
template <class P, int N, bool ADD>
INLINE void micro_kernel(const typename P::Unit* a, long lda, const typename P::Unit* b, long k, float* c, long ldc,
                         const float* factor) {
  constexpr int MR = P::ROWS;
#if defined(MOA_TILES)
  if constexpr (P::TILES) {
    if (ADD)
      for (int m = 0; m < MR; m++)
        if (factor[m] != 1)
          for (int n = 0; n < N; n++) store(c + m * ldc + n * L, load<F>(c + m * ldc + n * L) * factor[m]);
    tiles_multiply<N, ADD>(a, lda * 4, b, PANEL * 4, k, c, ldc * 4);
    return;
  }
#endif
  F sums[MR][N];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sums[m][n] = ADD ? load<F>(c + m * ldc + n * L) * factor[m] : F{};
  for (long i = 0; i < k; i++) {
    typename P::Vector row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) row[n] = load<typename P::Vector>(b + i * PANEL + n * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[m][n] = P::fma(sums[m][n], a[m * lda + i], row[n]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(c + m * ldc + n * L, sums[m][n]);
}
template <class P, bool ADD>
INLINE void micro_kernel(int vectors, const typename P::Unit* a, long lda, const typename P::Unit* b, long k, float* c,
                         long ldc, const float* factor) {
  switch (vectors) {
    case 1: return micro_kernel<P, 1, ADD>(a, lda, b, k, c, ldc, factor);
    case 2: return micro_kernel<P, 2, ADD>(a, lda, b, k, c, ldc, factor);
    case 3: return micro_kernel<P, (NR > 2 ? 3 : 1), ADD>(a, lda, b, k, c, ldc, factor);
    default: return micro_kernel<P, NR, ADD>(a, lda, b, k, c, ldc, factor);
  }
}

// C[ROWS, from..until] = A[ROWS, k] B[k, from..until] for a packed B of panels [columns / PANEL][k][PANEL].
template <class P>
INLINE void multiply_columns(const typename P::Unit* a, long lda, const typename P::Unit* b, long k, int from,
                             int until, float* c, long ldc) {
  for (int at = from; at < until;) {
    const int vectors = (int)least(until - at, PANEL - at % PANEL) / L;
    micro_kernel<P, false>(vectors, a, lda, b + (at / PANEL) * k * PANEL + at % PANEL, k, c + at, ldc, nullptr);
    at += vectors * L;
  }
}

constexpr int TILE_KEYS = 128;  // keys that are packed at once

// Rows of `width` numbers -> a left operand [rows][units]; `count` of them are real, the others 0.
template <class P, class T>
INLINE void pack_row(const T* from, int64_t count, int64_t width, typename P::Unit* to) {
  if constexpr (P::PER == 2) {
    __builtin_memcpy(to, from, count * sizeof(T));
    __builtin_memset((char*)to + count * sizeof(T), 0, (width - count) * sizeof(T));
  } else {
    load_row(from, count, (float*)to);
  }
}

// Rows [count][width] -> panels of their transpose [count / PANEL][width units][PANEL]; count is a multiple of STEP.
template <class P, class T>
INLINE void pack_transposed(const T* const* rows, int count, int width, typename P::Unit* to) {
  const int units = width / P::PER;
  for (int j = 0; j < count; j += L) {
    typename P::Unit* panel = to + (j / PANEL) * (long)units * PANEL + j % PANEL;
    for (int d = 0; d < units; d += L) {
      U v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        if constexpr (P::PER == 2)
          v[i] = load<U>((const uint32_t*)rows[j + i] + d);
        else
          v[i] = (U)load_wide(rows[j + i] + d);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store(panel + (d + i) * PANEL, v[i]);
    }
  }
}
// Rows [count][width] -> panels [width / PANEL][TILE_KEYS units][PANEL].
template <class P, class T>
INLINE void pack_straight(const T* const* rows, int count, int width, typename P::Unit* to) {
  const int units = TILE_KEYS / P::PER;
  for (int j = 0; j < count; j += P::PER)
    for (int d = 0; d < width; d += L) {
      typename P::Unit* at = to + (d / PANEL) * (long)units * PANEL + (j / P::PER) * PANEL + d % PANEL;
      if constexpr (P::PER == 2)
        store(at, __builtin_convertvector(load<H>(rows[j] + d), U) |
                      __builtin_convertvector(load<H>(rows[j + 1] + d), U) << 16);
      else
        store(at, load_wide(rows[j] + d));
    }
}

// Rows of another width than the packing wants are copied and filled up with zeros first.
template <class T>
INLINE void widen_rows(const T** rows, int count, int64_t dim, int64_t width, T* room) {
  for (int j = 0; j < count; j++) {
    T* to = room + j * width;
    __builtin_memcpy(to, rows[j], dim * sizeof(T));
    __builtin_memset(to + dim, 0, (width - dim) * sizeof(T));
    rows[j] = to;
  }
}

}  // namespace moa
