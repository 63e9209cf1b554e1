// Several new tokens of one sequence and one key/value head, all keys. Query rows (a token and one of the heads that
// share the key/value head) are the lanes of vectors, so that keys are broadcast from where they lie, the softmax needs
// nothing across lanes, and only queries and results are transposed.
#pragma once

#include <algorithm>
#include <cmath>

#include "../cpu_common/tiles.h"
#include "call.h"

namespace piecework {

// Rows first … first + count - 1 of those of one sequence and key/value head, at most V * kLanes.
template <class T, int V>
struct Rows {
  static constexpr bool kPair = kPaired<T>;
  static constexpr int kRows = V * kLanes;

  const Call& call;
  const int64_t seq, kv_head, first, count;
  const int64_t depth;  // words in a key

  alignas(64) uint32_t queries[(kPair ? kMaxHeadDim / 2 : kMaxHeadDim) * kRows];
  alignas(64) float scores[(kTileKeys + 1) * kRows];  // and then weights
  alignas(64) float out[kMaxHeadDim * kRows];
  alignas(64) float converted[kInPlace<T> ? 1 : 2 * kTileKeys * kMaxHeadDim];
  alignas(64) uint32_t pairs[kPair ? kTileKeys / 2 * kMaxHeadDim : 1];
  int64_t offsets[kTileKeys];
  const uint32_t *keys[kTileKeys], *values[kTileKeys];
  Ints positions[V], first_keys[V];
  const float* biases[kRows];  // of each row's head
  Floats own_bias[V];          // at each row's position
  Floats top[V], total[V], decay[V];  // largest score, sum of weights, and what becomes of earlier weights

  Rows(const Call& call, int64_t seq, int64_t kv_head, int64_t first, int64_t count)
      : call(call), seq(seq), kv_head(kv_head), first(first), count(count),
        depth(kPair ? call.head_dim / 2 : call.head_dim) {}

  void run() {
    const int64_t begin = call.lens[seq] - call.num_new(seq);
    const int64_t first_position = begin + first / call.groups();
    const int64_t last_position = begin + (first + count - 1) / call.groups();
    take_queries();
    for (int v = 0; v < V; ++v) {
      top[v] = all(kNone);
      total[v] = Floats{};
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = std::min(first + v * kLanes + i, first + count - 1);
        const int64_t position = begin + row / call.groups();
        positions[v][i] = position;
        if (call.key_bias != nullptr) {
          biases[v * kLanes + i] = call.biases(head_of(row));
          own_bias[v][i] = biases[v * kLanes + i][position];
        }
        first_keys[v][i] = call.first_key(position);
      }
    }
    std::fill_n(out, call.head_dim * kRows, 0.f);
    for (int64_t key = call.first_key(first_position); key <= last_position; key += kTileKeys) {
      const int64_t num = std::min<int64_t>(kTileKeys, last_position + 1 - key);
      const bool masked = key + num - 1 > first_position || key < call.first_key(last_position);
      take_keys(key, num);
      in_steps(num, ScoreStep<kPair, V>{queries, keys, depth, scores});
      soften(key, num, masked);
      const int64_t words = take_values(num);
      in_steps(call.head_dim, WeighStep<kPair, V>{(const uint32_t*)scores, values, words, decay, out});
    }
    give();
  }

  const T* query_row(int64_t row) const {
    return (const T*)call.query + token_of(row) * call.query_token + head_of(row) * call.query_head;
  }

  int64_t token_of(int64_t row) const { return call.starts[seq] + row / call.groups(); }
  int64_t head_of(int64_t row) const { return kv_head * call.groups() + row % call.groups(); }

  void take_queries() {
    alignas(64) float floats[kLanes][kInPlace<T> ? 1 : kMaxHeadDim];
    for (int v = 0; v < V; ++v) {
      const uint32_t* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* row = query_row(std::min<int64_t>(first + v * kLanes + i, first + count - 1));
        if constexpr (kInPlace<T>) {
          rows[i] = (const uint32_t*)row;
        } else {
          to_floats(row, call.head_dim, floats[i]);
          rows[i] = (const uint32_t*)floats[i];
        }
      }
      take_rows<V>(rows, depth, queries + v * kLanes);
    }
  }

  void take_keys(int64_t key, int64_t num) {
    call.locate(seq, key, num, offsets);
    const T* from = (const T*)call.cache + kv_head * call.head_dim;
    for (int64_t i = 0; i < num; ++i) {
      if constexpr (kInPlace<T>) {
        keys[i] = (const uint32_t*)(from + offsets[i]);
      } else {
        float* row = converted + i * call.head_dim;
        to_floats(from + offsets[i], call.head_dim, row);
        keys[i] = (const uint32_t*)row;
      }
    }
  }

  // Returns how many words each dimension has: one per key, or per pair of keys.
  int64_t take_values(int64_t num) {
    const T* from = (const T*)call.cache + call.values() + kv_head * call.head_dim;
    const int64_t dim = call.head_dim;
    if constexpr (kPair) {
      for (int64_t i = 0; i < num; i += 2) {
        const uint16_t* a = (const uint16_t*)(from + offsets[i]);
        const uint16_t* b = i + 1 < num ? (const uint16_t*)(from + offsets[i + 1]) : nullptr;
        pair_rows(a, b, dim, pairs + i / 2 * dim);
        values[i / 2] = pairs + i / 2 * dim;
      }
      return (num + 1) / 2;
    } else {
      for (int64_t i = 0; i < num; ++i) {
        if constexpr (kInPlace<T>) {
          values[i] = (const uint32_t*)(from + offsets[i]);
        } else {
          float* row = converted + (kTileKeys + i) * dim;
          to_floats(from + offsets[i], dim, row);
          values[i] = (const uint32_t*)row;
        }
      }
      return num;
    }
  }

  // Makes weights of scores; pairs of keys, where they are paired, share a word.
  void soften(int64_t key, int64_t num, bool masked) {
    const Floats scale = all((float)call.scale);
    Floats most[V];
    for (int v = 0; v < V; ++v) most[v] = top[v];
    for (int64_t k = 0; k < num; ++k) {
      for (int v = 0; v < V; ++v) {
        float* at = scores + (k * V + v) * kLanes;
        Floats s = load(at) * scale;
        if (call.softcap != 0) s = hyperbolic_tangent(s * (float)(1 / call.softcap)) * (float)call.softcap;
        if (call.key_bias != nullptr) {
          Floats bias;
          for (int i = 0; i < kLanes; ++i) bias[i] = biases[v * kLanes + i][key + k];
          s += bias - own_bias[v];
        }
        if (masked) {
          const Ints at_key = Ints{} + (int32_t)(key + k);
          s = (at_key <= positions[v]) & (at_key >= first_keys[v]) ? s : all(-INFINITY);
        }
        most[v] = larger(s, most[v]);
        store(s, at);
      }
    }
    make_weights<kPair, V>(scores, num, most, top, total, decay);
  }

  void give() {
    const int64_t dim = call.head_dim;
    for (int v = 0; v < V && v * kLanes < count; ++v) {
      const int64_t row = first + v * kLanes, num_rows = std::min<int64_t>(kLanes, count - v * kLanes);
      const Floats factor = factors(v);
      T* rows[kLanes];
      for (int64_t i = 0; i < num_rows; ++i)
        rows[i] = (T*)call.out + (token_of(row + i) * call.num_heads + head_of(row + i)) * dim;
      give_rows<V, kMaxHeadDim>(out + v * kLanes, dim, factor, rows, num_rows);
    }
  }

  // What to multiply sums with: one over the weights' sum, to which the sink counts.
  Floats factors(int v) const {
    if (call.sinks == nullptr) return 1.f / total[v];
    Floats sink;
    for (int i = 0; i < kLanes; ++i) sink[i] = to_float(((const T*)call.sinks)[head_of(first + v * kLanes + i)]);
    const Floats most = larger(sink, top[v]), factor = exponential(top[v] - most);
    return factor / (total[v] * factor + exponential(sink - most));
  }
};

constexpr int kTileRows = kRowVectors * kLanes;

template <class T>
void prefill(const Call& call, int64_t seq, int64_t kv_head, int64_t first, int64_t count) {
  if (count <= kLanes) return Rows<T, 1>(call, seq, kv_head, first, count).run();
  Rows<T, kRowVectors>(call, seq, kv_head, first, count).run();
}

}  // namespace piecework
