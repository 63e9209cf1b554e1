// New tokens' latents are normed and their keys rotated, and both are stored.
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

template <class T, class Angle>
void write(const WriteCall& call, int64_t token) {
  const int64_t rank = call.rank, half = call.rope / 2, width = call.rank + call.rope;
  const T* from = (const T*)call.compressed + token * call.compressed_token;
  const T* weight = (const T*)call.norm_weight;
  const Angle* cos = (const Angle*)call.cos + token * call.cos_token;
  const Angle* sin = (const Angle*)call.sin + token * call.sin_token;
  alignas(64) float x[kMaxWidth + kLanes];
  to_floats(from, width, x);
  Floats squares = {};
  int64_t i = 0;
  for (; i + kLanes <= rank; i += kLanes) squares += load(x + i) * load(x + i);
  if (i < rank) squares += load_some(x + i, rank - i) * load_some(x + i, rank - i);
  const float factor = 1 / std::sqrt(sum(squares) / (float)rank + (float)call.eps);
  T* entry = (T*)call.entry + token * width;
  for (i = 0; i < rank; ++i) from_float(rounded<T>(x[i] * factor) * to_float(weight[i]), entry[i]);
  const float* pairs = x + rank;
  for (i = 0; i < half; ++i) {
    const float even = pairs[2 * i], odd = pairs[2 * i + 1], c = to_float(cos[i]), s = to_float(sin[i]);
    from_float(even * c - odd * s, entry[rank + i]);
    from_float(odd * c + even * s, entry[rank + half + i]);
  }
  std::memcpy((T*)call.paged.cache + call.slots[token] * width, entry, width * sizeof(T));
}

}  // namespace piecework
