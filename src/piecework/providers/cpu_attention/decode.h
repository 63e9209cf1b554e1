// One new token of one sequence, all heads, some of its keys. That is bound by reading the cache: it is read once, where
// it lies and in the order it lies in, all heads of a few keys at a time, while the next few are fetched.
#pragma once

#include <algorithm>
#include <cmath>

#include "../cpu_common/dots.h"
#include "../cpu_common/tiles.h"
#include "call.h"

namespace piecework {

constexpr int kChunk = 16;  // keys in one go, of all heads; more would be fetched before there is room for them
constexpr int kHeads = 8;   // query heads in one go, of those that share a key/value head
constexpr int kQueryWords = kMaxHeadDim;
static_assert(kChunk % kLanes == 0, "scores are whole vectors");

// What is known after some of the keys: per head the largest score, the sum of weights, the weighted sum of values.
// Where types are paired, that holds even dimensions and odd ones in turns, kLanes of each.
struct Partial {
  float *top, *total, *sums;  // [H], [H], [H, padded(call)]

  Partial(const Call& call, float* at)
      : top(at + call.num_heads * padded(call)), total(top + call.num_heads), sums(at) {}

  static int64_t padded(const Call& call) {
    return (call.head_dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  }
  static int64_t size(const Call& call) { return (call.num_heads * (padded(call) + 2) + 15) / 16 * 16; }
};

// sums = sums * decay + weights of values, of N heads and V vectors of words from `at` on.
template <bool Paired, int N, int V>
PIECEWORK_INLINE void weigh_values(const float* weights, const uint32_t* const* values, const uint32_t* const* ahead,
                                   int64_t num, int64_t at, int64_t some, const float* decay, float* sums, int64_t head) {
  constexpr int kParts = Paired ? 2 : 1;
  Floats made[N][V][kParts];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) made[n][v][p] = load(sums + n * head + (kParts * v + p) * kLanes) * decay[n];
  for (int64_t k = 0; k < num; ++k) {
    const uint32_t* from = values[k] + at;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Words words = some ? load_some<Words>(from, some) : load<Words>(from + v * kLanes);
      fetch(ahead[k] + at + v * kLanes);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Floats weight = all(weights[n * kChunk + k]);
        made[n][v][0] += weight * (Paired ? low(words) : (Floats)words);
        if constexpr (Paired) made[n][v][1] += weight * high(words);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) store(made[n][v][p], sums + n * head + (kParts * v + p) * kLanes);
}

// Makes weights of scores; returns what becomes of earlier weights. What is added to scores, less `own`, is at `biases`.
inline float soften(const Call& call, float* scores, int64_t num, const float* biases, float own, float& top,
                    float& total) {
  Floats most = all(top);
  for (int64_t i = 0; i < num; i += kLanes) {
    Floats s = load(scores + i) * (float)call.scale;
    if (call.softcap != 0) s = hyperbolic_tangent(s * (float)(1 / call.softcap)) * (float)call.softcap;
    if (biases != nullptr) s += load_some(biases + i, std::min<int64_t>(kLanes, num - i)) - own;
    store(s, scores + i);
    if (i + kLanes > num) {
      std::fill(scores + num, scores + i + kLanes, -INFINITY);
      s = load(scores + i);
    }
    most = larger(s, most);
  }
  const float before = top;
  top = largest(most);
  const float decay = top == before ? 1.f : exponential(all(before - top))[0];
  Floats added = {};
  for (int64_t i = 0; i < num; i += kLanes) {
    const Floats weight = exponential(load(scores + i) - top);
    added += weight;
    store(weight, scores + i);
  }
  total = total * decay + sum(added);
  return decay;
}

template <class T>
struct Decode {
  static constexpr bool kPair = kPaired<T>;
  static constexpr int kParts = kPair ? 2 : 1;

  const Call& call;
  const int64_t seq, dim, padded;
  const int64_t words;  // in a key
  const Partial into;

  alignas(64) uint32_t queries[kHeads * kQueryWords];
  alignas(64) float scores[kHeads * kChunk];
  alignas(64) float converted[kInPlace<T> ? 1 : 2 * kChunk * kMaxHeadDim];
  float decay[kHeads];
  int64_t offsets[2][kChunk];  // of these keys and the next, in turns
  const uint32_t *keys[kChunk], *values[kChunk], *next_keys[kChunk] = {}, *next_values[kChunk] = {};

  Decode(const Call& call, int64_t seq, Partial into)
      : call(call), seq(seq), dim(call.head_dim), padded(Partial::padded(call)), words(kPair ? dim / 2 : dim),
        into(into) {}

  void run(int64_t begin, int64_t end) {
    std::fill_n(into.top, call.num_heads, kNone);
    std::fill_n(into.total, call.num_heads, 0.f);
    std::fill_n(into.sums, call.num_heads * padded, 0.f);
    call.locate(seq, begin, std::min<int64_t>(kChunk, end - begin), offsets[0]);
    for (int64_t key = begin, turn = 0; key < end; key += kChunk, turn ^= 1) {
      const int64_t num = std::min<int64_t>(kChunk, end - key);
      const int64_t num_next = std::max<int64_t>(0, std::min<int64_t>(kChunk, end - key - kChunk));
      call.locate(seq, key + kChunk, num_next, offsets[turn ^ 1]);
      for (int64_t kv_head = 0; kv_head < call.num_kv_heads; ++kv_head) {
        take((const T*)call.cache + kv_head * dim, num, num_next, turn);
        const int64_t first = kv_head * call.groups(), last = first + call.groups();
        for (int64_t head = first; head < last; head += kHeads)
          heads(head, std::min<int64_t>(kHeads, last - head), key, num);
      }
    }
  }

  // Finds one key/value head's keys and values, and those that come next.
  void take(const T* from, int64_t num, int64_t num_next, int64_t turn) {
    for (int64_t i = 0; i < num; ++i) {
      const T *k = from + offsets[turn][i], *v = k + call.values();
      if constexpr (kInPlace<T>) {
        keys[i] = (const uint32_t*)k;
        values[i] = (const uint32_t*)v;
      } else {
        to_floats(k, dim, converted + 2 * i * dim);
        to_floats(v, dim, converted + (2 * i + 1) * dim);
        keys[i] = (const uint32_t*)(converted + 2 * i * dim);
        values[i] = (const uint32_t*)(converted + (2 * i + 1) * dim);
      }
    }
    for (int64_t i = num; i % kLanes; ++i) keys[i] = keys[num - 1];  // their scores are not used
    for (int64_t i = 0; i < num_next; ++i) {
      next_keys[i] = (const uint32_t*)(from + offsets[turn ^ 1][i]);
      next_values[i] = (const uint32_t*)(from + offsets[turn ^ 1][i] + call.values());
    }
  }

  void heads(int64_t first, int64_t count, int64_t key, int64_t num) {
    const T* query = (const T*)call.query + call.starts[seq] * call.query_token + first * call.query_head;
    for (int64_t h = 0; h < count; ++h) {
      uint32_t* to = queries + h * kQueryWords;
      if constexpr (kInPlace<T>)
        std::memcpy(to, query + h * call.query_head, dim * sizeof(T));
      else
        to_floats(query + h * call.query_head, dim, (float*)to);
      for (int64_t w = words; w % kLanes; ++w) to[w] = 0;
    }
    for (int64_t i = 0; i < num; i += kLanes) {
      int64_t h = 0;
      for (; h + 4 <= count; h += 4) score_some<4>(h, i);
      if (h + 2 <= count) score_some<2>(h, i), h += 2;
      if (h < count) score_some<1>(h, i);
    }
    for (int64_t h = 0; h < count; ++h) {
      const float* row = call.key_bias == nullptr ? nullptr : call.biases(first + h);
      decay[h] = soften(call, scores + h * kChunk, num, row == nullptr ? nullptr : row + key,
                        row == nullptr ? 0.f : row[call.lens[seq] - 1], into.top[first + h], into.total[first + h]);
    }
    int64_t h = 0;
    for (; h + 4 <= count; h += 4) weigh_some<4, 2 / kParts>(first, h, num);
    if (h + 2 <= count) weigh_some<2, 4 / kParts>(first, h, num), h += 2;
    if (h < count) weigh_some<1, 4>(first, h, num);
  }

  template <int N>
  PIECEWORK_INLINE void score_some(int64_t h, int64_t key) {
    for (int64_t k = key; k < key + kLanes; k += kLanes / N)
      score_keys<kPair, N>(queries + h * kQueryWords, kQueryWords, keys + k, words, scores + h * kChunk + k, kChunk,
                           [&, k](int i, int64_t w) { fetch(next_keys[k + i] + w); });
  }

  template <int N, int V>
  PIECEWORK_INLINE void weigh_some(int64_t first, int64_t h, int64_t num) {
    float* sums = into.sums + (first + h) * padded;
    const float* weights = scores + h * kChunk;
    int64_t w = 0;
    for (; w + V * kLanes <= words; w += V * kLanes)
      weigh_values<kPair, N, V>(weights, values, next_values, num, w, 0, decay + h, sums + kParts * w, padded);
    for (; w < words; w += kLanes)
      weigh_values<kPair, N, 1>(weights, values, next_values, num, w, words - w < kLanes ? words - w : 0, decay + h,
                                sums + kParts * w, padded);
  }
};

// Brings the parts of one head together, adds the sink, and writes the head's row.
template <class T>
void finish(const Call& call, int64_t seq, int64_t head, float* parts, int64_t num_parts) {
  const int64_t dim = call.head_dim, padded = Partial::padded(call), size = Partial::size(call);
  float top = kNone, total = 0;
  for (int64_t i = 0; i < num_parts; ++i) top = std::max(top, Partial(call, parts + i * size).top[head]);
  if (call.sinks != nullptr) {
    const float sink = to_float(((const T*)call.sinks)[head]);
    top = std::max(top, sink);
    total = std::exp(sink - top);
  }
  alignas(64) float out[kMaxHeadDim + 2 * kLanes] = {};
  for (int64_t i = 0; i < num_parts; ++i) {
    const Partial part(call, parts + i * size);
    const float factor = std::exp(part.top[head] - top);
    total += part.total[head] * factor;
    for (int64_t d = 0; d < padded; ++d) out[d] += part.sums[head * padded + d] * factor;
  }
  T* to = (T*)call.out + (call.starts[seq] * call.num_heads + head) * dim;
  const float factor = 1 / total;
  if constexpr (kPaired<T>) {
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t unit = d / (2 * kLanes), inside = d % (2 * kLanes);
      from_float(out[(2 * unit + inside % 2) * kLanes + inside / 2] * factor, to[d]);
    }
  } else {
    from_floats(out, dim, factor, to);
  }
}

}  // namespace piecework
