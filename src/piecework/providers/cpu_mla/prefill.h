// New tokens of one sequence and one head, over expanded keys and values: of context, then of the new tokens. Query
// rows are the lanes of vectors. Keys of a tile are brought together, because those of one head lie far apart.
#pragma once

#include <algorithm>
#include <cmath>

#include "../cpu_common/tiles.h"
#include "calls.h"

namespace piecework {

constexpr int kTileRows = kRowVectors * kLanes;

// Rows first … first + count - 1 of a sequence's new tokens, at most V * kLanes.
template <class T, int V>
struct Rows {
  static constexpr bool kPair = kPaired<T>;
  static constexpr int kRows = V * kLanes;
  using Item = typename std::conditional<kInPlace<T>, T, float>::type;  // of keys that were brought together

  const PrefillCall& call;
  const Prompt& prompt;
  const int64_t head, first, count;
  const int64_t token;                     // the first row's
  const int64_t width, depth, value, row;  // of a key: elements and words; of a value; of a token's keys and values

  alignas(64) uint32_t queries[(kPair ? kMaxHeadDim / 2 : kMaxHeadDim) * kRows];
  alignas(64) float scores[(kTileKeys + 1) * kRows];  // and then weights
  alignas(64) float out[kMaxHeadDim * kRows];
  alignas(64) Item keys[kTileKeys * kMaxHeadDim];
  alignas(64) uint32_t pairs[kPair ? kTileKeys / 2 * kMaxHeadDim : 1];
  alignas(64) float converted[kInPlace<T> ? 1 : kTileKeys * kMaxHeadDim];
  const uint32_t *key_rows[kTileKeys], *values[kTileKeys];
  Floats top[V], total[V], decay[V];  // largest score, sum of weights, and what becomes of earlier weights

  Rows(const PrefillCall& call, const Prompt& prompt, int64_t head, int64_t first, int64_t count)
      : call(call), prompt(prompt), head(head), first(first), count(count), token(call.starts[prompt.seq] + first),
        width(call.nope + call.rope), depth(kPair ? width / 2 : width), value(call.value),
        row(call.num_heads * (call.nope + call.value)) {}

  void run() {
    take_queries();
    for (int64_t i = 0; i < kTileKeys; ++i) key_rows[i] = (const uint32_t*)(keys + i * width);
    if (prompt.resumed)
      resume();
    else
      begin();
    const int64_t at = prompt.begin;
    attend((const T*)call.old_kv + at * row, row, (const T*)call.old_keys + at * call.rope, call.rope, prompt.count,
           INT64_MAX / 2);
    if (prompt.paused) return pause();
    const int64_t start = call.starts[prompt.seq];
    attend((const T*)call.kv + (start - call.num_decoded) * call.kv_token, call.kv_token,
           (const T*)call.keys + start * call.keys_token, call.keys_token, first + count, first);
    give();
  }

  // The first of `num` keys that row 0 does not see is visible + 1; each row sees one more than the row before.
  void attend(const T* kv, int64_t kv_stride, const T* pe, int64_t pe_stride, int64_t num, int64_t visible) {
    kv += head * (call.nope + value);
    for (int64_t key = 0; key < num; key += kTileKeys, kv += kTileKeys * kv_stride, pe += kTileKeys * pe_stride) {
      const int64_t some = std::min<int64_t>(kTileKeys, num - key);
      take_keys(kv, kv_stride, pe, pe_stride, some);
      in_steps(some, ScoreStep<kPair, V>{queries, key_rows, depth, scores});
      soften(some, visible - key);
      const int64_t words = take_values(kv + call.nope, kv_stride, some);
      in_steps(value, WeighStep<kPair, V>{(const uint32_t*)scores, values, words, decay, out});
    }
  }

  void take_queries() {
    alignas(64) Item joined[kLanes * kMaxHeadDim];
    for (int v = 0; v < V; ++v) {
      const uint32_t* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t from = token + std::min<int64_t>(v * kLanes + i, count - 1);
        Item* to = joined + i * width;
        copy((const T*)call.q_nope + from * call.nope_token + head * call.nope_head, call.nope, to);
        copy((const T*)call.q_pe + from * call.pe_token + head * call.pe_head, call.rope, to + call.nope);
        rows[i] = (const uint32_t*)to;
      }
      take_rows<V>(rows, depth, queries + v * kLanes);
    }
  }

  PIECEWORK_INLINE static void copy(const T* from, int64_t num, Item* to) {
    if constexpr (kInPlace<T>)
      std::memcpy(to, from, num * sizeof(T));
    else
      to_floats(from, num, to);
  }

  void take_keys(const T* kv, int64_t kv_stride, const T* pe, int64_t pe_stride, int64_t num) {
    for (int64_t i = 0; i < num; ++i) {
      copy(kv + i * kv_stride, call.nope, keys + i * width);
      copy(pe + i * pe_stride, call.rope, keys + i * width + call.nope);
    }
  }

  // Returns how many words each dimension has: one per key, or per pair of keys.
  int64_t take_values(const T* from, int64_t stride, int64_t num) {
    if constexpr (kPair) {
      for (int64_t i = 0; i < num; i += 2) {
        const uint16_t *a = (const uint16_t*)(from + i * stride), *b = i + 1 < num ? a + stride : nullptr;
        pair_rows(a, b, value, pairs + i / 2 * value);
        values[i / 2] = pairs + i / 2 * value;
      }
      return (num + 1) / 2;
    } else {
      for (int64_t i = 0; i < num; ++i) {
        if constexpr (kInPlace<T>) {
          values[i] = (const uint32_t*)(from + i * stride);
        } else {
          to_floats(from + i * stride, value, converted + i * value);
          values[i] = (const uint32_t*)(converted + i * value);
        }
      }
      return num;
    }
  }

  void soften(int64_t num, int64_t visible) {
    const Floats scale = all((float)call.scale);
    const bool masked = visible < num - 1;
    Floats most[V];
    Ints last[V] = {};  // the last key that each row sees
    for (int v = 0; v < V; ++v) {
      most[v] = top[v];
      if (masked)
        for (int i = 0; i < kLanes; ++i) last[v][i] = (int32_t)(visible + v * kLanes + i);
    }
    for (int64_t k = 0; k < num; ++k) {
      for (int v = 0; v < V; ++v) {
        float* at = scores + (k * V + v) * kLanes;
        Floats s = load(at) * scale;
        if (masked) s = last[v] >= (int32_t)k ? s : all(-INFINITY);
        most[v] = larger(s, most[v]);
        store(s, at);
      }
    }
    make_weights<kPair, V>(scores, num, most, top, total, decay);
  }

  void begin() {
    for (int v = 0; v < V; ++v) top[v] = all(kNone), total[v] = Floats{};
    std::fill_n(out, value * kRows, 0.f);
  }

  // A tile's state: results so far [value, kRows], then the largest scores and the sums of weights.
  float* state() const {
    const int64_t unit = value + 2;
    return call.state + ((prompt.state + first) * call.num_heads + head * kTileRows) * unit;
  }

  void resume() {
    const float* from = state();
    std::memcpy(out, from, value * kRows * sizeof(float));
    for (int v = 0; v < V; ++v) {
      top[v] = load(from + (value * V + v) * kLanes);
      total[v] = load(from + ((value + 1) * V + v) * kLanes);
    }
  }

  void pause() {
    float* to = state();
    std::memcpy(to, out, value * kRows * sizeof(float));
    for (int v = 0; v < V; ++v) {
      store(top[v], to + (value * V + v) * kLanes);
      store(total[v], to + ((value + 1) * V + v) * kLanes);
    }
  }

  void give() {
    const int64_t stride = call.num_heads * value;
    for (int v = 0; v < V && v * kLanes < count; ++v) {
      const int64_t num_rows = std::min<int64_t>(kLanes, count - v * kLanes);
      T* rows[kLanes];
      for (int64_t i = 0; i < num_rows; ++i)
        rows[i] = (T*)call.out + (token + v * kLanes + i) * stride + head * value;
      give_rows<V>(out + v * kLanes, value, 1.f / total[v], rows, num_rows);
    }
  }
};

template <class T>
void prefill(const PrefillCall& call, const Prompt& prompt, int64_t head, int64_t first, int64_t count) {
  if (count <= kLanes) return Rows<T, 1>(call, prompt, head, first, count).run();
  if (count <= 2 * kLanes) return Rows<T, 2>(call, prompt, head, first, count).run();
  if constexpr (kRowVectors > 2) Rows<T, kRowVectors>(call, prompt, head, first, count).run();
}

}  // namespace piecework
