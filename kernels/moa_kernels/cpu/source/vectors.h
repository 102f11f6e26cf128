// Vectors of L floats in the compiler's own notation (GCC and Clang): one source serves AVX-512, AVX2, NEON and SSE2.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MOA_AVX512 1
#endif

namespace moa {

// A micro kernel holds some rows by NR vectors of sums in registers.
#if defined(MOA_AVX512)
constexpr int L = 16, NR = 4;
#elif defined(__AVX2__)
constexpr int L = 8, NR = 2;
#else
constexpr int L = 4, NR = 4;
#endif
constexpr int PANEL = L * NR;  // columns of a packed panel

// may_alias: they are loaded from memory of other types, which the optimiser would otherwise reorder.
typedef float F __attribute__((vector_size(4 * L), may_alias));
typedef int32_t I __attribute__((vector_size(4 * L), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * L), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * L), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return most(low, least(x, high)); }
INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class V>
INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}
INLINE F splat(float x) { return x - F{}; }
INLINE I splat_int(int32_t x) { return x - I{}; }
INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }
INLINE F max(F a, F b) {
#if defined(MOA_AVX512)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE I iota() {
  I v;
  for (int i = 0; i < L; i++) v[i] = i;
  return v;
}
INLINE float sum(F v) {
#if defined(MOA_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < L; i++) s += v[i];
  return s;
#endif
}
INLINE float top(F v) {
#if defined(MOA_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < L; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// 2 ** x for x <= 0 or small; 0 far below. Relative error 8e-8, or 3e-6 where bfloat16 rounds it anyway.
template <bool ROUGH>
INLINE F exp2(F x) {
#if defined(MOA_AVX512)
  F whole = (F)_mm512_roundscale_ps((__m512)x, 0x08);
  F f = x - whole;
#else
  x = max(x, splat(-127.f));
  const F magic = splat(12582912.f);  // 1.5 * 2 ** 23: adding it rounds to an integer
  F shifted = x + magic;
  F f = x - (shifted - magic);
#endif
  F p;
  if (ROUGH) {
    p = splat(0x1.3997d4p-7f);
    p = p * f + splat(0x1.ca1442p-5f);
    p = p * f + splat(0x1.ec06dap-3f);
    p = p * f + splat(0x1.62e0dcp-1f);
    p = p * f + splat(0x1.ffffe8p-1f);
  } else {
    p = splat(0x1.5c08e4p-10f);
    p = p * f + splat(0x1.3d0c54p-7f);
    p = p * f + splat(0x1.c6b6e4p-5f);
    p = p * f + splat(0x1.ebf918p-3f);
    p = p * f + splat(0x1.62e428p-1f);
    p = p * f + splat(1.f);
  }
#if defined(MOA_AVX512)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  F scaled = (F)((I)p + ((I)shifted << 23));
  return select(x > splat(-126.f), scaled, F{});
#endif
}

// Relative error 1e-7: small ones by an odd polynomial (Cephes), since 1 - 2 / (e + 1) cancels there.
INLINE F tanh(F x) {
  x = select(x > splat(10.f), splat(10.f), select(x < splat(-10.f), splat(-10.f), x));
  const F z = x * x;
  F p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  const F e = exp2<false>(x * splat(2 * LOG2_E));
  return select(z < splat(0.625f * 0.625f), p * z * x + x, splat(1.f) - splat(2.f) / (e + splat(1.f)));
}

// Transposes L vectors of L words in place.
template <int S>
INLINE void transpose_step(U* v) {
  U low, high;
  for (int i = 0; i < L; i++) {
    // Out of (a, b), S apart: a's words where bit S of the index is 0, b's where it's 1.
    low[i] = (i & S) ? L + i - S : i;
    high[i] = (i & S) ? L + i : i + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; i++)
    if (!(i & S)) {
      U a = v[i], b = v[i + S];
#if defined(__clang__)
      for (int w = 0; w < L; w++) {
        v[i][w] = (w & S) ? b[w - S] : a[w];
        v[i + S][w] = (w & S) ? b[w] : a[w + S];
      }
#else
      v[i] = __builtin_shuffle(a, b, low);
      v[i + S] = __builtin_shuffle(a, b, high);
#endif
    }
}
INLINE void transpose(U* v) {
  if (L > 8) transpose_step<(L > 8 ? 8 : 1)>(v);
  if (L > 4) transpose_step<(L > 4 ? 4 : 1)>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// Sums of L vectors, one per lane.
INLINE F row_sums(const F* vectors) {
  U words[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) words[i] = (U)vectors[i];
  transpose(words);
  F v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) v[i] = (F)words[i];
#pragma GCC unroll 8
  for (int s = L / 2; s; s /= 2)
    for (int i = 0; i < s; i++) v[i] += v[i + s];
  return v[0];
}

}  // namespace moa
