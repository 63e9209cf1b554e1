// Products of a block of query rows with keys, and of their weights with values. Rows are the lanes of vectors, so that
// keys and values are broadcast from where they lie, and a softmax needs nothing across lanes.
#pragma once

#include "lanes.h"

namespace piecework {

constexpr int kStep = 6;         // keys, or dimensions, in one go: kStep * kRowVectors sums stay in registers
constexpr int kTileKeys = 96;    // keys whose scores are held at once; a multiple of kStep
constexpr float kNone = -1e30f;  // less than any score, and yet finite: masked scores less it are -infinity

// out[k][row] = sum of queries[d][row] * keys[k][d]
template <bool Paired, int V, int N>
PIECEWORK_INLINE void score(const uint32_t* queries, const uint32_t* const* keys, int64_t depth, float* out) {
  Floats sum[N][V] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Words q[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) q[v] = load<Words>(queries + (d * V + v) * kLanes);
#pragma GCC unroll 6
    for (int k = 0; k < N; ++k) {
      const Words one = all(keys[k][d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[k][v] = multiply_add<Paired>(sum[k][v], q[v], one);
    }
  }
#pragma GCC unroll 6
  for (int k = 0; k < N; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sum[k][v], out + (k * V + v) * kLanes);
}

// out[d][row] = out[d][row] * decay[row] + sum of weights[k][row] * values[k][first + d]
template <bool Paired, int V, int N>
PIECEWORK_INLINE void weigh(const uint32_t* weights, const uint32_t* const* values, int64_t depth, int64_t first,
                            const Floats* decay, float* out) {
  Floats sum[N][V];
#pragma GCC unroll 6
  for (int d = 0; d < N; ++d)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[d][v] = load(out + (d * V + v) * kLanes) * decay[v];
  for (int64_t k = 0; k < depth; ++k) {
    Words w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load<Words>(weights + (k * V + v) * kLanes);
    const uint32_t* row = values[k] + first;
#pragma GCC unroll 6
    for (int d = 0; d < N; ++d) {
      const Words one = all(row[d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[d][v] = multiply_add<Paired>(sum[d][v], w[v], one);
    }
  }
#pragma GCC unroll 6
  for (int d = 0; d < N; ++d)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sum[d][v], out + (d * V + v) * kLanes);
}

// Turns kLanes rows of `depth` words about, for `score`: out[d * V] holds word d of each.
template <int V>
PIECEWORK_INLINE void take_rows(const uint32_t* const* rows, int64_t depth, uint32_t* out) {
  for (int64_t d = 0; d < depth; d += kLanes) {
    const int64_t num = depth - d < kLanes ? depth - d : kLanes;
    Words block[kLanes];
    for (int i = 0; i < kLanes; ++i)
      block[i] = num == kLanes ? load<Words>(rows[i] + d) : load_some<Words>(rows[i] + d, num);
    transpose(block);
    for (int64_t i = 0; i < num; ++i) store(block[i], out + (d + i) * V * kLanes);
  }
}

// Turns the results of kLanes rows about again: rows[i][d] is what out[d * V] holds of row i, times its factor. Rows
// are often some power of two apart, so that a near cache holds few of them: each is written in one go.
template <int V, int Most, class T>
PIECEWORK_INLINE void give_rows(const float* out, int64_t dim, Floats factor, T* const* rows, int64_t num_rows) {
  alignas(64) T made[kLanes][Most + kLanes];
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t num = dim - d < kLanes ? dim - d : kLanes;
    Words block[kLanes] = {};
    for (int64_t i = 0; i < num; ++i) block[i] = (Words)(load(out + (d + i) * V * kLanes) * factor);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_as((Floats)block[i], made[i] + d);
  }
  for (int64_t i = 0; i < num_rows; ++i) std::memcpy(rows[i], made[i], dim * sizeof(T));
}

// Makes weights of the scores of `num` keys, of which none is more than `most`; where keys are paired, two share a
// word. What earlier weights become is `decay`; there is room for the scores of one key more.
template <bool Paired, int V>
PIECEWORK_INLINE void make_weights(float* scores, int64_t num, const Floats* most, Floats* top, Floats* total,
                                   Floats* decay) {
  for (int v = 0; v < V; ++v) {
    decay[v] = exponential(top[v] - most[v]);
    top[v] = most[v];
    total[v] *= decay[v];
  }
  if constexpr (Paired) {
    if (num % 2)
      for (int v = 0; v < V; ++v) store(all(-__builtin_inff()), scores + (num * V + v) * kLanes);
    for (int64_t k = 0; k < num; k += 2) {
      for (int v = 0; v < V; ++v) {
        const Floats a = exponential(load(scores + (k * V + v) * kLanes) - most[v]);
        const Floats b = exponential(load(scores + ((k + 1) * V + v) * kLanes) - most[v]);
        total[v] += a + b;
        store(pairs_of(a, b), scores + (k / 2 * V + v) * kLanes);
      }
    }
  } else {
    for (int64_t k = 0; k < num; ++k) {
      for (int v = 0; v < V; ++v) {
        float* at = scores + (k * V + v) * kLanes;
        const Floats a = exponential(load(at) - most[v]);
        total[v] += a;
        store(a, at);
      }
    }
  }
}

// Words of which each holds element d of a and of b; b may be null.
inline void pair_rows(const uint16_t* a, const uint16_t* b, int64_t dim, uint32_t* to) {
  if (b != nullptr)
    for (int64_t d = 0; d < dim; ++d) to[d] = (uint32_t)a[d] | (uint32_t)b[d] << 16;
  else
    for (int64_t d = 0; d < dim; ++d) to[d] = a[d];
}

// body<N>(at) for `count` in steps of kStep, and one for the rest.
template <class F>
PIECEWORK_INLINE void in_steps(int64_t count, const F& body) {
  static_assert(kStep == 6, "a case for every rest");
  int64_t at = 0;
  for (; at + kStep <= count; at += kStep) body.template operator()<kStep>(at);
  switch (count - at) {
    case 1: return body.template operator()<1>(at);
    case 2: return body.template operator()<2>(at);
    case 3: return body.template operator()<3>(at);
    case 4: return body.template operator()<4>(at);
    case 5: return body.template operator()<5>(at);
  }
}

template <bool Paired, int V>
struct ScoreStep {
  const uint32_t* queries;
  const uint32_t* const* keys;
  int64_t depth;
  float* out;
  template <int N>
  void operator()(int64_t at) const { score<Paired, V, N>(queries, keys + at, depth, out + at * V * kLanes); }
};

template <bool Paired, int V>
struct WeighStep {
  const uint32_t* weights;
  const uint32_t* const* values;
  int64_t depth;
  const Floats* decay;
  float* out;
  template <int N>
  void operator()(int64_t at) const {
    weigh<Paired, V, N>(weights, values, depth, at, decay, out + at * V * kLanes);
  }
};

}  // namespace piecework
