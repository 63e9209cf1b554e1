// New tokens' latents are normed and their keys rotated, and both are stored. Queries are rotated likewise.
#pragma once

#include <cmath>

#include "calls.h"
#include "entries.h"

namespace piecework {

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

// By the angles of a token, of either type.
template <class T>
PIECEWORK_INLINE void rotate(const Angles& angles, int64_t token, const T* pairs, int64_t rope, T* to) {
  const int64_t at_cos = token * angles.cos_token, at_sin = token * angles.sin_token;
  if (angles.plain)
    rotate(pairs, (const float*)angles.cos + at_cos, (const float*)angles.sin + at_sin, rope / 2, to);
  else
    rotate(pairs, (const T*)angles.cos + at_cos, (const T*)angles.sin + at_sin, rope / 2, to);
}

// Entries are E.
template <class T, class E>
void write(const WriteCall& call, int64_t token) {
  const int64_t rank = call.rank, rope = call.rope, width = rank + rope;
  const T* from = (const T*)call.compressed + token * call.compressed_token;
  const T* weight = (const T*)call.norm_weight;
  char* entry = (char*)call.paged.cache + call.slots[token] * E::bytes(rank, rope);
  T exact[E::kFp8 ? kMaxWidth : 1];
  T* made = E::kFp8 ? exact : (T*)entry;
  Floats squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= rank; i += kLanes) squares += load_as(from + i) * load_as(from + i);
  for (; i < rank; ++i) rest += to_float(from[i]) * to_float(from[i]);
  const float factor = 1 / std::sqrt((sum(squares) + rest) / (float)rank + (float)call.eps);
  for (i = 0; i + kLanes <= rank; i += kLanes)
    store_as(rounded_as(load_as(from + i) * factor, from) * load_as(weight + i), made + i);
  for (; i < rank; ++i) from_float(rounded<T>(to_float(from[i]) * factor) * to_float(weight[i]), made[i]);
  rotate(call.angles, token, from + rank, rope, made + rank);
  if constexpr (E::kFp8) E::write(made, made + rank, rank, rope, entry);
  T* stored = (T*)call.entry + token * width;
  if (call.entry != nullptr) E::read(entry, rank, rope, stored, stored + rank);
}

}  // namespace piecework
