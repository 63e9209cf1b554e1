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

template <class T>
PIECEWORK_INLINE void store_as(Floats value, T* to) {
  for (int i = 0; i < kLanes; ++i) from_float(value[i], to[i]);
}
template <class T>
PIECEWORK_INLINE Floats load_as(const T* from) {
  Floats made;
  for (int i = 0; i < kLanes; ++i) made[i] = to_float(from[i]);
  return made;
}
template <class T>
PIECEWORK_INLINE Floats rounded_as(Floats value, const T*) {
  for (int i = 0; i < kLanes; ++i) value[i] = rounded<T>(value[i]);
  return value;
}

}  // namespace piecework
