// The types of queries, keys and values, and their conversion to floats and back.
#pragma once
#include "vectors.h"

namespace moa {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

INLINE F widen_bf16(H h) {
#if defined(MOA_AVX512)
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (F)(__builtin_convertvector(h, U) << 16);
#endif
}
INLINE H narrow_bf16(F v) {  // to the nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__) && defined(MOA_AVX512)
  return (H)_mm512_cvtneps_pbh((__m512)v);
#else
  U u = (U)v;
  U rounded = (u + (((u >> 16) & 1u) + 0x7fffu)) >> 16;
  I nan = v != v;
  rounded = nan ? (U)splat_int(0x7fc0) : rounded;
  return __builtin_convertvector(rounded, H);
#endif
}

INLINE F widen_fp16(H h) {
#if defined(MOA_AVX512)
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__) && defined(__F16C__)
  return (F)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent and mantissa move as they are; a product moves the bias, denormals included.
  U word = __builtin_convertvector(h, U), magnitude = word & 0x7fffu;
  F value = (F)(magnitude << 13) * splat(0x1p112f);
  I special = (I)magnitude >= splat_int(0x7c00);  // infinity and NaN
  U bits = special ? (magnitude << 13) | 0x7f800000u : (U)value;
  return (F)(bits | ((word & 0x8000u) << 16));
#endif
}
INLINE H narrow_fp16(F v) {
#if defined(MOA_AVX512)
  return (H)_mm512_cvtps_ph((__m512)v, 0);
#elif defined(__AVX2__) && defined(__F16C__)
  return (H)_mm256_cvtps_ph((__m256)v, 0);
#else
  U word = (U)v, sign = (word >> 16) & 0x8000u;
  F magnitude = (F)(word & 0x7fffffffu);
  // Large enough numbers: move the bias, then round the mantissa to nearest even.
  U moved = (U)magnitude - 0x38000000u;
  U normal = (moved + (((moved >> 13) & 1u) + 0xfffu)) >> 13;
  // Denormals: adding one half aligns the mantissa, and the processor rounds.
  U denormal = (U)(magnitude + splat(0.5f)) - 0x3f000000u;
  I is_small = magnitude < splat(0x1p-14f), is_large = magnitude >= splat(65520.f), is_nan = v != v;
  U bits = is_small ? denormal : normal;
  bits = is_large ? (U)splat_int(0x7c00) : bits;
  bits = is_nan ? (U)splat_int(0x7e00) : bits;
  return __builtin_convertvector(bits | sign, H);
#endif
}

INLINE F load_wide(const float* p) { return load<F>(p); }
INLINE F load_wide(const bf16* p) { return widen_bf16(load<H>(p)); }
INLINE F load_wide(const fp16* p) { return widen_fp16(load<H>(p)); }

INLINE void store_narrow(float* p, F v) { store(p, v); }
INLINE void store_narrow(bf16* p, F v) { store(p, narrow_bf16(v)); }
INLINE void store_narrow(fp16* p, F v) { store(p, narrow_fp16(v)); }

// The first `count` numbers of a row of any width, as floats, and zeros up to a multiple of L.
template <class T>
INLINE void load_row(const T* from, int64_t count, float* to) {
  int64_t d = 0;
  for (; d + L <= count; d += L) store(to + d, load_wide(from + d));
  if (d < count) {
    T rest[L] = {};
    __builtin_memcpy(rest, from + d, (count - d) * sizeof(T));
    store(to + d, load_wide(rest));
  }
}
template <class T>
INLINE void store_part(T* to, F v, int64_t count) {
  if (count >= L) return store_narrow(to, v);
  T rest[L];
  store_narrow(rest, v);
  __builtin_memcpy(to, rest, count * sizeof(T));
}

}  // namespace moa
