// New tokens of one sequence and one head, over expanded keys and values: of context, then of the new tokens. Query
// rows are the lanes of vectors. Keys of a tile are brought together with what all heads share of them, and because those
// of one head lie far apart at times; a few tiles of rows share that.
#pragma once

#include <algorithm>
#include <cmath>

#include "../cpu_common/tiles.h"
#include "calls.h"
#include "entries.h"
#include "write.h"

namespace piecework {

constexpr int kTileRows = kRowVectors * kLanes;
constexpr int kGroup = 4;  // tiles of rows that share what is done for a tile of keys

// Keys and values of one head, a tile of them: keys brought together, values as `weigh` wants them.
template <class T>
struct Keys {
  static constexpr bool kPair = kPaired<T>;

  alignas(64) Item<T> keys[kTileKeys * kMaxHeadDim];
  alignas(64) uint32_t pairs[kPair ? kTileKeys / 2 * kMaxHeadDim : 1];
  alignas(64) float converted[kInPlace<T> ? 1 : kTileKeys * kMaxHeadDim];
  const uint32_t *rows[kTileKeys], *values[kTileKeys];

  void take(const PrefillCall& call, const T* kv, int64_t kv_stride, const T* pe, int64_t pe_stride, int64_t num) {
    const int64_t width = call.nope + call.rope;
    for (int64_t i = 0; i < num; ++i) {
      Item<T>* to = keys + i * width;
      convert(kv + i * kv_stride, call.nope, to);
      convert(pe + i * pe_stride, call.rope, to + call.nope);
      rows[i] = (const uint32_t*)to;
    }
    take_values(kv + call.nope, kv_stride, call.value, num);
  }

  void take_values(const T* from, int64_t stride, int64_t dim, int64_t num) {
    if constexpr (kPair) {
      for (int64_t i = 0; i < num; i += 2) {
        const uint16_t *a = (const uint16_t*)(from + i * stride), *b = i + 1 < num ? a + stride : nullptr;
        pair_rows(a, b, dim, pairs + i / 2 * dim);
        values[i / 2] = pairs + i / 2 * dim;
      }
    } else {
      for (int64_t i = 0; i < num; ++i) {
        if constexpr (kInPlace<T>) {
          values[i] = (const uint32_t*)(from + i * stride);
        } else {
          to_floats(from + i * stride, dim, converted + i * dim);
          values[i] = (const uint32_t*)(converted + i * dim);
        }
      }
    }
  }
};

// Rows of a prompt's new tokens, `first` and on, at most V * kLanes, and what is known after some of the keys.
template <class T, int V>
struct Tile {
  static constexpr bool kPair = kPaired<T>;
  static constexpr int kRows = V * kLanes;

  alignas(64) uint32_t queries[(kPair ? kMaxHeadDim / 2 : kMaxHeadDim) * kRows];
  alignas(64) float out[kMaxHeadDim * kRows];
  Floats top[V], total[V];  // largest score and sum of weights
  int64_t first, count;

  void begin(const PrefillCall& call, const Prompt& prompt, int64_t head) {
    take_queries(call, call.starts[prompt.seq] + first, head);
    if (prompt.resumed) return resume(call, prompt, head);
    for (int v = 0; v < V; ++v) top[v] = all(kNone), total[v] = Floats{};
    std::fill_n(out, call.value * kRows, 0.f);
  }

  void take_queries(const PrefillCall& call, int64_t token, int64_t head) {
    const int64_t width = call.nope + call.rope;
    alignas(64) Item<T> joined[kLanes * kMaxHeadDim];
    for (int v = 0; v < V; ++v) {
      const uint32_t* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t from = token + std::min<int64_t>(v * kLanes + i, count - 1);
        Item<T>* to = joined + i * width;
        convert((const T*)call.q_nope + from * call.nope_token + head * call.nope_head, call.nope, to);
        const T* pe = (const T*)call.q_pe + from * call.pe_token + head * call.pe_head;
        T turned[kMaxHeadDim];
        if (call.angles.cos != nullptr) rotate(call.angles, from, pe, call.rope, turned), pe = turned;
        convert(pe, call.rope, to + call.nope);
        rows[i] = (const uint32_t*)to;
      }
      take_rows<V>(rows, kPair ? width / 2 : width, queries + v * kLanes);
    }
  }

  // Row 0 sees keys up to `visible`, and each row one more than the row before.
  void attend(const PrefillCall& call, const Keys<T>& keys, int64_t num, int64_t visible) {
    alignas(64) float scores[(kTileKeys + 1) * kRows];  // and then weights
    const int64_t width = call.nope + call.rope;
    in_steps(num, ScoreStep<kPair, V>{queries, keys.rows, kPair ? width / 2 : width, scores});
    Floats decay[V], most[V];
    Ints last[V] = {};  // the last key that each row sees
    const Floats scale = all((float)call.scale);
    const bool masked = visible < num - 1;
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
    const int64_t words = kPair ? (num + 1) / 2 : num;
    in_steps(call.value, WeighStep<kPair, V>{(const uint32_t*)scores, keys.values, words, decay, out});
  }

  // The tile's kept state: results so far [value, kRows], then the largest scores and the sums of weights.
  float* state(const PrefillCall& call, const Prompt& prompt, int64_t head) const {
    return call.state + ((prompt.state + first) * call.num_heads + head * kTileRows) * (call.value + 2);
  }

  void resume(const PrefillCall& call, const Prompt& prompt, int64_t head) {
    const float* from = state(call, prompt, head);
    std::memcpy(out, from, call.value * kRows * sizeof(float));
    for (int v = 0; v < V; ++v) {
      top[v] = load(from + (call.value * V + v) * kLanes);
      total[v] = load(from + ((call.value + 1) * V + v) * kLanes);
    }
  }

  void pause(const PrefillCall& call, const Prompt& prompt, int64_t head) const {
    float* to = state(call, prompt, head);
    std::memcpy(to, out, call.value * kRows * sizeof(float));
    for (int v = 0; v < V; ++v) {
      store(top[v], to + (call.value * V + v) * kLanes);
      store(total[v], to + ((call.value + 1) * V + v) * kLanes);
    }
  }

  void give(const PrefillCall& call, int64_t token, int64_t head) const {
    for (int v = 0; v < V && v * kLanes < count; ++v) {
      const int64_t num_rows = std::min<int64_t>(kLanes, count - v * kLanes);
      T* rows[kLanes];
      for (int64_t i = 0; i < num_rows; ++i)
        rows[i] = (T*)call.out + ((token + v * kLanes + i) * call.num_heads + head) * call.value;
      give_rows<V, kMaxHeadDim>(out + v * kLanes, call.value, 1.f / total[v], rows, num_rows);
    }
  }
};

template <class T, int V>
struct Group {
  Keys<T> keys;
  Tile<T, V> tiles[V == kRowVectors ? kGroup : 1];
  int64_t num_tiles;

  void run(const PrefillCall& call, const Prompt& prompt, int64_t head, int64_t first, int64_t count) {
    num_tiles = (count + V * kLanes - 1) / (V * kLanes);
    for (int64_t t = 0; t < num_tiles; ++t) {
      tiles[t].first = first + t * V * kLanes;
      tiles[t].count = std::min<int64_t>(V * kLanes, count - t * V * kLanes);
      tiles[t].begin(call, prompt, head);
    }
    const int64_t start = call.starts[prompt.seq], kv = (start - call.num_decoded) * call.kv_token;
    attend(call, (const T*)call.old_kv + prompt.begin * call.old_token + head * call.old_head, call.old_token,
           (const T*)call.old_keys + prompt.begin * call.rope, call.rope, prompt.count, false);
    if (!prompt.paused)
      attend(call, (const T*)call.kv + kv + head * (call.nope + call.value), call.kv_token,
             (const T*)call.keys + start * call.keys_token, call.keys_token, first + count, true);
    for (int64_t t = 0; t < num_tiles; ++t) {
      if (prompt.paused)
        tiles[t].pause(call, prompt, head);
      else
        tiles[t].give(call, start + tiles[t].first, head);
    }
  }

  // If `causal`, the keys are those of the new tokens.
  void attend(const PrefillCall& call, const T* kv, int64_t kv_stride, const T* pe, int64_t pe_stride, int64_t num,
              bool causal) {
    for (int64_t key = 0; key < num; key += kTileKeys) {
      const int64_t some = std::min<int64_t>(kTileKeys, num - key);
      keys.take(call, kv + key * kv_stride, kv_stride, pe + key * pe_stride, pe_stride, some);
      for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t visible = causal ? tiles[t].first - key : kTileKeys;
        const int64_t seen = causal ? std::min(some, visible + tiles[t].count) : some;
        if (seen > 0) tiles[t].attend(call, keys, seen, visible);
      }
    }
  }
};

// Rows first … first + count - 1, at most kGroup * kTileRows.
template <class T>
void prefill(const PrefillCall& call, const Prompt& prompt, int64_t head, int64_t first, int64_t count) {
  const auto run = [&](auto vectors) {
    Group<T, vectors> group;
    group.run(call, prompt, head, first, count);
  };
  if (count <= kLanes) return run(std::integral_constant<int, 1>());
  if (count <= 2 * kLanes || kRowVectors == 2) return run(std::integral_constant<int, 2>());
  return run(std::integral_constant<int, kRowVectors>());
}

}  // namespace piecework
