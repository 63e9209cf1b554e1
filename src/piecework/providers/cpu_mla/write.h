// New tokens' latents are normed and their keys rotated, and both are stored. Queries are rotated likewise.
#pragma once

#include <cmath>

#include "../cpu_common/elements.h"
#include "calls.h"

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
  store(__builtin_convertvector(joined(value, value) & 0xffffu, Halves), to);
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

template <int... J>
PIECEWORK_INLINE Floats evens(Floats a, Floats b, std::integer_sequence<int, J...>) {
  return (Floats)pick<(2 * J)...>((Words)a, (Words)b);
}
template <int... J>
PIECEWORK_INLINE Floats odds(Floats a, Floats b, std::integer_sequence<int, J...>) {
  return (Floats)pick<(2 * J + 1)...>((Words)a, (Words)b);
}

// Rotates `half` pairs that lie together; all firsts come out before all seconds.
template <class T, class Angle>
PIECEWORK_INLINE void rotate(const T* pairs, const Angle* cos, const Angle* sin, int64_t half, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Floats a = load_as(pairs + 2 * i), b = load_as(pairs + 2 * i + kLanes);
    const Floats even = evens(a, b, Each()), odd = odds(a, b, Each()), c = load_as(cos + i), s = load_as(sin + i);
    store_as(even * c - odd * s, to + i);
    store_as(odd * c + even * s, to + half + i);
  }
  for (; i < half; ++i) {
    const float even = to_float(pairs[2 * i]), odd = to_float(pairs[2 * i + 1]);
    const float c = to_float(cos[i]), s = to_float(sin[i]);
    from_float(even * c - odd * s, to[i]);
    from_float(odd * c + even * s, to[half + i]);
  }
}

// By the angles of a call's token, of either type.
template <class T>
PIECEWORK_INLINE void rotate(const WriteCall& call, int64_t token, const T* pairs, T* to) {
  const int64_t half = call.rope / 2, at_cos = token * call.cos_token, at_sin = token * call.sin_token;
  if (call.plain_angles)
    rotate(pairs, (const float*)call.cos + at_cos, (const float*)call.sin + at_sin, half, to);
  else
    rotate(pairs, (const T*)call.cos + at_cos, (const T*)call.sin + at_sin, half, to);
}

template <class T>
void write(const WriteCall& call, int64_t token) {
  const int64_t rank = call.rank, width = call.rank + call.rope;
  const T* from = (const T*)call.compressed + token * call.compressed_token;
  const T* weight = (const T*)call.norm_weight;
  T* stored = (T*)call.paged.cache + call.slots[token] * width;
  Floats squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= rank; i += kLanes) squares += load_as(from + i) * load_as(from + i);
  for (; i < rank; ++i) rest += to_float(from[i]) * to_float(from[i]);
  const float factor = 1 / std::sqrt((sum(squares) + rest) / (float)rank + (float)call.eps);
  for (i = 0; i + kLanes <= rank; i += kLanes)
    store_as(rounded_as(load_as(from + i) * factor, from) * load_as(weight + i), stored + i);
  for (; i < rank; ++i) from_float(rounded<T>(to_float(from[i]) * factor) * to_float(weight[i]), stored[i]);
  rotate(call, token, from + rank, stored + rank);
  if (call.entry != nullptr) std::memcpy((T*)call.entry + token * width, stored, width * sizeof(T));
}

}  // namespace piecework
