// Vectors of elements of any type as float32, and back.
#pragma once

#include "elements.h"

namespace piecework {

// As T, and back.
template <class T>
PIECEWORK_INLINE float rounded(float value) {
  T made;
  from_float(value, made);
  return to_float(made);
}

PIECEWORK_INLINE void store_as(Floats value, float* to) { store(value, to); }
PIECEWORK_INLINE Floats load_as(const float* from) { return load(from); }
PIECEWORK_INLINE Floats rounded_as(Floats value, const float*) { return value; }

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

PIECEWORK_INLINE void store_as(Floats value, BFloat16* to) {
#if defined(PIECEWORK_PAIRS)
  const __m256bh made = _mm512_cvtneps_pbh((__m512)value);  // what is less than any normal number becomes 0
  std::memcpy(to, &made, sizeof made);
#else
  store(__builtin_convertvector(joined(value, value) & 0xffffu, Halves), to);
#endif
}
PIECEWORK_INLINE Floats load_as(const BFloat16* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}
PIECEWORK_INLINE Floats rounded_as(Floats value, const BFloat16*) { return high(joined(value, value)); }

#if defined(__FLT16_MAX__)
PIECEWORK_INLINE Halves halves_of(Floats value) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX__) && defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Halves made;
  for (int i = 0; i < kLanes; ++i) {
    const Half half = (Half)value[i];
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    made[i] = bits;
  }
  return made;
#endif
}
PIECEWORK_INLINE Floats floats_of(Halves value) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)value);
#elif defined(__AVX__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)value);
#else
  Floats made;
  for (int i = 0; i < kLanes; ++i) {
    Half half;
    const uint16_t bits = value[i];
    std::memcpy(&half, &bits, sizeof bits);
    made[i] = (float)half;
  }
  return made;
#endif
}
PIECEWORK_INLINE void store_as(Floats value, Half* to) { store(halves_of(value), to); }
PIECEWORK_INLINE Floats load_as(const Half* from) { return floats_of(load<Halves>(from)); }
PIECEWORK_INLINE Floats rounded_as(Floats value, const Half*) { return floats_of(halves_of(value)); }
#endif

template <class T>
PIECEWORK_INLINE void to_floats(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load_as(from + i), to + i);
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Floats times a factor, as T.
template <class T>
PIECEWORK_INLINE void from_floats(const float* from, int64_t count, float factor, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_as(load(from + i) * factor, to + i);
  for (; i < count; ++i) from_float(from[i] * factor, to[i]);
}

}  // namespace piecework
