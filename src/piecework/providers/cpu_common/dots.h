// Products of a few queries with keys that are read once: words of both are the lanes of vectors.
#pragma once

#include "elements.h"

namespace piecework {

PIECEWORK_INLINE void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// What words after the last whole vector, fewer than kLanes, add to scores: word n * kKeys + k is that of query n and
// key k. Apart, because with it all sums would go through memory.
template <bool Paired, int N>
__attribute__((noinline)) Floats score_rest(const uint32_t* queries, int64_t query_stride, const uint32_t* const* keys,
                                            int64_t first, int64_t count) {
  constexpr int kKeys = kLanes / N;
  Floats sum[kLanes] = {};
  for (int k = 0; k < kKeys; ++k) {
    const Words key = load_some<Words>(keys[k] + first, count);
    for (int n = 0; n < N; ++n)
      sum[n * kKeys + k] = multiply_add<Paired>(Floats{}, load<Words>(queries + n * query_stride + first), key);
  }
  return sums(sum);
}

// Scores of N queries with kLanes / N keys; query n's go to out + n * out_stride. Queries are zero up to a whole
// vector. Meanwhile ahead(k, w) may fetch what comes next, once for every vector of every key.
template <bool Paired, int N, class Ahead>
PIECEWORK_INLINE void score_keys(const uint32_t* queries, int64_t query_stride, const uint32_t* const* keys,
                                 int64_t words, float* out, int64_t out_stride, const Ahead& ahead) {
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
      ahead(k, w);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[n * kKeys + k] = multiply_add<Paired>(sum[n * kKeys + k], q[n], key);
    }
  }
  Floats made = sums(sum);
  if (w < words) made += score_rest<Paired, N>(queries, query_stride, keys, w, words - w);
  for (int n = 0; n < N; ++n) std::memcpy(out + n * out_stride, (const float*)&made + n * kKeys, kKeys * sizeof(float));
}

}  // namespace piecework
