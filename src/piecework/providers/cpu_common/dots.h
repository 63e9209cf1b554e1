// Products of a few queries with keys that are read once: words of both are the lanes of vectors.
#pragma once

#include "elements.h"

namespace piecework {

PIECEWORK_INLINE void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// Scores of N queries with kLanes / N keys; keys that come next are fetched meanwhile, if `Fetch`.
// Queries are zero up to a whole vector. Query n's scores go to out + n * out_stride.
template <bool Paired, int N, bool Fetch = true>
PIECEWORK_INLINE void score_keys(const uint32_t* queries, int64_t query_stride, const uint32_t* const* keys,
                                 const uint32_t* const* ahead, int64_t words, float* out, int64_t out_stride) {
  constexpr int kKeys = kLanes / N;
  Floats sum[kLanes] = {};
  int64_t w = 0;
  for (; w + kLanes <= words; w += kLanes) {
    Words q[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) q[n] = load<Words>(queries + n * query_stride + w);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      const Words key = load<Words>(keys[k] + w);
      if constexpr (Fetch) fetch(ahead[k] + w);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[n * kKeys + k] = multiply_add<Paired>(sum[n * kKeys + k], q[n], key);
    }
  }
  if (w < words) {
    for (int k = 0; k < kKeys; ++k) {
      const Words key = load_some<Words>(keys[k] + w, words - w);
      for (int n = 0; n < N; ++n)
        sum[n * kKeys + k] = multiply_add<Paired>(sum[n * kKeys + k], load<Words>(queries + n * query_stride + w), key);
    }
  }
  const Floats made = sums(sum);
  for (int n = 0; n < N; ++n) std::memcpy(out + n * out_stride, (const float*)&made + n * kKeys, kKeys * sizeof(float));
}

}  // namespace piecework
