// How entries lie in a cache: as T has them, or latents as fp8. What it means is written in piecework/ops/mla/cache.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../cpu_common/fp8.h"

namespace piecework {

// What scores are made of: T where two of it share a word or it is float, else float.
template <class T>
using Item = typename std::conditional<kInPlace<T>, T, float>::type;

template <class T, class O>
PIECEWORK_INLINE void convert(const T* from, int64_t count, O* to) {
  if constexpr (std::is_same<T, O>::value)
    std::memcpy(to, from, count * sizeof(T));
  else
    to_floats(from, count, to);
}

template <class T>
struct PlainEntries {
  static constexpr bool kFp8 = false;

  static int64_t bytes(int64_t rank, int64_t rope) { return (rank + rope) * sizeof(T); }

  // As O: T, or float.
  template <class O>
  PIECEWORK_INLINE static void read(const char* entry, int64_t rank, int64_t rope, O* latent, O* key) {
    convert((const T*)entry, rank, latent);
    convert((const T*)entry + rank, rope, key);
  }
};

template <class T>
struct Fp8Entries {
  static constexpr bool kFp8 = true;
  static constexpr int64_t kTile = 128;
  static_assert(kTile % kLanes == 0, "scales are those of whole vectors");

  static int64_t num_scales(int64_t rank) { return (rank + kTile - 1) / kTile; }
  static int64_t scales_at(int64_t rank) { return (rank + 3) / 4 * 4; }
  static int64_t key_at(int64_t rank) { return scales_at(rank) + 4 * num_scales(rank); }
  static int64_t bytes(int64_t rank, int64_t rope) { return (key_at(rank) + rope * sizeof(T) + 3) / 4 * 4; }

  template <class O>
  PIECEWORK_INLINE static void read(const char* entry, int64_t rank, int64_t rope, O* latent, O* key) {
    const uint8_t* codes = (const uint8_t*)entry;
    for (int64_t first = 0; first < rank; first += kTile) {
      float scale;
      std::memcpy(&scale, entry + scales_at(rank) + first / kTile * 4, 4);
      scale_fp8(codes + first, std::min(kTile, rank - first), scale, latent + first);
    }
    convert((const T*)(entry + key_at(rank)), rope, key);
  }

  static void write(const T* latent, const T* key, int64_t rank, int64_t rope, char* entry) {
    std::memset(entry, 0, bytes(rank, rope));
    uint8_t* codes = (uint8_t*)entry;
    for (int64_t first = 0; first < rank; first += kTile) {
      const int64_t last = std::min(first + kTile, rank);
      const float scale = scale_of(latent + first, last - first);
      std::memcpy(entry + scales_at(rank) + first / kTile * 4, &scale, 4);
      int64_t i = first;
      for (; i + kLanes <= last; i += kLanes) store_fp8(load_as(latent + i) / scale, codes + i);
      for (; i < last; ++i) codes[i] = (uint8_t)fp8_codes(all(to_float(latent[i]) / scale))[0];
    }
    std::memcpy(entry + key_at(rank), key, rope * sizeof(T));
  }

  // NaN where any number is NaN or infinite.
  static float scale_of(const T* latent, int64_t count) {
    Floats most = all(1e-10f), none = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Floats value = load_as(latent + i);
      most = larger((Floats)((Words)value & 0x7fffffffu), most);
      none += value * 0.f;
    }
    float top = largest(most), rest = sum(none);
    for (; i < count; ++i) {
      const float value = to_float(latent[i]);
      top = std::max(top, std::fabs(value));
      rest += value * 0.f;
    }
    return top / kMostFp8 + rest;
  }
};

}  // namespace piecework
