// Element types, and how their products are summed: as float32, or bfloat16 in pairs where the machine can do that.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define PIECEWORK_PAIRS
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "vectors.h"

namespace piecework {

struct BFloat16 {
  uint16_t bits;
};

PIECEWORK_INLINE float to_float(float value) { return value; }

PIECEWORK_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float made;
  std::memcpy(&made, &bits, 4);
  return made;
}

PIECEWORK_INLINE void from_float(float value, float& to) { to = value; }

PIECEWORK_INLINE void from_float(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__FLT16_MAX__)
#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif
PIECEWORK_INLINE float to_float(Half value) { return (float)value; }
PIECEWORK_INLINE void from_float(float value, Half& to) { to = (Half)value; }
#endif

// Whether a word holds two T, whose products are summed without converting them.
template <class T>
constexpr bool kPaired = false;
#if defined(PIECEWORK_PAIRS)
template <>
constexpr bool kPaired<BFloat16> = true;
#endif

// Whether the cache is read where it lies; else keys and values are converted to float32, a few at a time.
template <class T>
constexpr bool kInPlace = kPaired<T>;
template <>
constexpr bool kInPlace<float> = true;

template <bool Paired>
PIECEWORK_INLINE Floats multiply_add(Floats to, Words a, Words b) {
#if defined(PIECEWORK_PAIRS)
  if constexpr (Paired) return (Floats)_mm512_dpbf16_ps((__m512)to, (__m512bh)a, (__m512bh)b);
#endif
  // Where compilers may not contract, and for no others: they do more with a sum than with an instruction.
#if defined(PIECEWORK_WRITTEN_FMA) && defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)to);
#elif defined(PIECEWORK_WRITTEN_FMA) && defined(__AVX__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)to);
#elif defined(PIECEWORK_WRITTEN_FMA) && defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)to, (float32x4_t)a, (float32x4_t)b);
#else
  return to + (Floats)a * (Floats)b;
#endif
}

// The two bfloat16 of every word, as float32.
PIECEWORK_INLINE Floats low(Words pairs) { return (Floats)(pairs << 16); }
PIECEWORK_INLINE Floats high(Words pairs) { return (Floats)(pairs & 0xffff0000u); }

// Pairs of bfloat16, as `from_float` makes them.
PIECEWORK_INLINE Words joined(Floats low, Floats high) {
  const auto rounded = [](Floats value) {
    const Words bits = (Words)value;
    return value != value ? all(0x7fc00000u) : bits + 0x7fffu + ((bits >> 16) & 1u);
  };
  return (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
}

// Weights, from 0 to 1 or NaN, as pairs of bfloat16: rounded to nearest, ties up.
PIECEWORK_INLINE Words pairs_of(Floats a, Floats b) {
  return (((Words)a + 0x8000u) >> 16) | (((Words)b + 0x8000u) & 0xffff0000u);
}

}  // namespace piecework
