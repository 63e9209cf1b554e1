// One new token of one sequence, all heads, some of its cached entries, which are keys and, but for their last part,
// values of all heads. The cache is read once, a few entries at a time, while the next few are fetched.
#pragma once

#include <algorithm>
#include <cmath>

#include "../cpu_common/dots.h"
#include "../cpu_common/tiles.h"
#include "calls.h"
#include "entries.h"
#include "write.h"

namespace piecework {

constexpr int kChunk = 64;  // entries in one go
constexpr int kAhead = kLanes * kLanes / 16 > 0 ? kLanes * kLanes / 16 : 1;  // lines for every vector of a key
constexpr int kBlockHeads = 16, kBlockWords = 8 * kLanes;
static_assert(kChunk % kLanes == 0, "scores are whole vectors");

PIECEWORK_INLINE int64_t in_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// What is known after some of the entries: per head the largest score, the sum of weights, the weighted sum of latents.
// Where types are paired, that holds even dimensions and odd ones in turns, kLanes of each.
struct Partial {
  float *top, *total, *sums;  // [H], [H], [H, padded(call)]

  Partial(const DecodeCall& call, float* at)
      : top(at + call.num_heads * padded(call)), total(top + call.num_heads), sums(at) {}

  static int64_t padded(const DecodeCall& call) {
    return (call.rank + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  }
  static int64_t size(const DecodeCall& call) { return (call.num_heads * (padded(call) + 2) + 15) / 16 * 16; }
};

// sums = sums * decay + weights of values, of N heads and V vectors of words from `at` on.
// Paired, weights and values are of two entries each, and `num` counts pairs.
template <bool Paired, int N, int V>
PIECEWORK_INLINE void weigh_latents(const uint32_t* weights, int64_t weights_stride, const uint32_t* const* values,
                                    int64_t num, int64_t at, int64_t some, const float* decay, float* sums,
                                    int64_t padded) {
  constexpr int kParts = Paired ? 2 : 1;
  Floats made[N][V][kParts];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) made[n][v][p] = load(sums + n * padded + (kParts * v + p) * kLanes) * decay[n];
  for (int64_t k = 0; k < num; ++k) {
    Words words[V][kParts];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (Paired) {
        const uint32_t *first = values[2 * k] + at + v * kLanes, *second = values[2 * k + 1] + at + v * kLanes;
        const Words a = some ? load_some<Words>(first, some) : load<Words>(first);
        const Words b = some ? load_some<Words>(second, some) : load<Words>(second);
        words[v][0] = (a & 0xffffu) | (b << 16);
        words[v][1] = (a >> 16) | (b & 0xffff0000u);
      } else {
        const uint32_t* first = values[k] + at + v * kLanes;
        words[v][0] = some ? load_some<Words>(first, some) : load<Words>(first);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Words weight = all(weights[n * weights_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) made[n][v][p] = multiply_add<Paired>(made[n][v][p], weight, words[v][p]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) store(made[n][v][p], sums + n * padded + (kParts * v + p) * kLanes);
}

template <class T>
struct Decode {
  static constexpr bool kPair = kPaired<T>;
  static constexpr int kParts = kPair ? 2 : 1;

  const DecodeCall& call;
  const int64_t seq, width, padded;
  const int64_t words, value_words;  // in an entry as it is read, and in its latent
  const int64_t query_stride;
  const Partial into;
  // Memory that the caller gives, of `room` words.
  uint32_t* queries;   // [H, query_stride]
  float* scores;       // [H, kChunk]; then weights, or pairs of them
  float* decay;        // [H]
  Item<T>* converted;  // [kChunk, width], where entries aren't read in place

  const uint32_t* entries[kChunk];
  const char *here[kChunk], *next[kChunk];  // in the cache
  int64_t bytes_ahead;                      // of kLanes entries there; 0 where none are fetched ahead
  void (Decode::*convert)(int64_t first, int64_t last);  // or null, where entries are read in place

  static int64_t room(const DecodeCall& call) {
    const int64_t width = call.rank + call.rope;
    const bool in_place = kInPlace<T> && !call.paged.fp8;
    return in_vectors(call.num_heads * (in_vectors(width) + kChunk + 1)) + (in_place ? 0 : kChunk * width);
  }

  Decode(const DecodeCall& call, int64_t seq, Partial into, float* memory)
      : call(call), seq(seq), width(call.rank + call.rope), padded(Partial::padded(call)),
        words(kPair ? width / 2 : width), value_words(kPair ? call.rank / 2 : call.rank),
        query_stride(in_vectors(words)), into(into), queries((uint32_t*)memory),
        scores(memory + call.num_heads * query_stride), decay(scores + call.num_heads * kChunk),
        converted((Item<T>*)(memory + in_vectors(call.num_heads * (in_vectors(width) + kChunk + 1)))) {}

  // Entries are E.
  template <class E>
  void run(int64_t begin, int64_t end) {
    std::fill_n(into.top, call.num_heads, kNone);
    std::fill_n(into.total, call.num_heads, 0.f);
    std::fill_n(into.sums, call.num_heads * padded, 0.f);
    take_queries();
    int64_t slots[kChunk];
    const char* cache = (const char*)call.paged.cache;
    const int64_t bytes = E::bytes(call.rank, call.rope);
    bytes_ahead = kInPlace<T> ? kLanes * bytes : 0;
    convert = kInPlace<T> && !E::kFp8 ? nullptr : &Decode::take<E>;
    const auto find = [&](int64_t first, int64_t num) {
      call.paged.locate(seq, first, num, slots);
      for (int64_t i = 0; i < num; ++i) next[i] = cache + slots[i] * bytes;
    };
    find(begin, std::min<int64_t>(kChunk, end - begin));
    for (int64_t at = begin; at < end; at += kChunk) {
      const int64_t num = std::min<int64_t>(kChunk, end - at), num_next = std::min<int64_t>(kChunk, end - at - num);
      for (int64_t i = 0; i < num; ++i) {
        here[i] = next[i];
        entries[i] = convert ? (const uint32_t*)(converted + i * width) : (const uint32_t*)next[i];
      }
      for (int64_t i = num; i < kChunk; ++i) entries[i] = entries[num - 1];  // their scores are not used
      find(at + num, num_next);
      for (int64_t i = num_next; i < kChunk; ++i) next[i] = (const char*)entries[num - 1];
      score(num);
      for (int64_t h = 0; h < call.num_heads; ++h) soften(h, num);
      weigh(num);
    }
  }

  void take_queries() {
    const T* latent = (const T*)call.q_latent + seq * call.latent_token;
    const T* pe = (const T*)call.q_pe + seq * call.pe_token;
    for (int64_t h = 0; h < call.num_heads; ++h, latent += call.latent_head, pe += call.pe_head) {
      uint32_t* to = queries + h * query_stride;
      T turned[kMaxWidth];
      const T* rotary = call.angles.cos != nullptr ? turned : pe;
      if (call.angles.cos != nullptr) rotate(call.angles, seq, pe, call.rope, turned);
      if constexpr (kInPlace<T>) {
        std::memcpy(to, latent, call.rank * sizeof(T));
        std::memcpy((T*)to + call.rank, rotary, call.rope * sizeof(T));
      } else {
        to_floats(latent, call.rank, (float*)to);
        to_floats(rotary, call.rope, (float*)to + call.rank);
      }
      std::fill(to + words, to + query_stride, 0);
    }
  }

  template <class E>
  void take(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Item<T>* to = converted + i * width;
      E::read(here[i], call.rank, call.rope, to, to + call.rank);
    }
  }

  // A block of entries and one of heads stay in the nearest cache while all of their scores are made.
  void score(int64_t num) {
    const int64_t tiles = call.num_heads / 4 * 4 + call.num_heads % 4 / 2 * 2 + call.num_heads % 2;
    for (int64_t first = 0; first < call.num_heads; first += kBlockHeads) {
      const int64_t last = std::min<int64_t>(first + kBlockHeads, call.num_heads);
      for (int64_t k = 0; k < num; k += kLanes) {
        if (convert && first == 0) (this->*convert)(k, std::min(k + kLanes, num));
        if (bytes_ahead == 0 || first > 0)
          score_heads<0>(first, last, k);
        else if (tiles >= kAhead)
          score_heads<1>(first, last, k);
        else if (2 * tiles >= kAhead)
          score_heads<2>(first, last, k);
        else if (3 * tiles >= kAhead)
          score_heads<3>(first, last, k);
        else if (4 * tiles >= kAhead)
          score_heads<4>(first, last, k);
        else
          score_heads<kAhead>(first, last, k);
      }
    }
  }

  // Fetches `Ahead` lines of the entries that come next in every step; they lie together, but for a block's end.
  template <int Ahead>
  PIECEWORK_INLINE void score_heads(int64_t h, int64_t last, int64_t key) {
    const char *line = next[key], *end = line + bytes_ahead;
    for (; h + 4 <= last; h += 4) line = score_some<4, Ahead>(h, key, line, end);
    if (h + 2 <= last) line = score_some<2, Ahead>(h, key, line, end), h += 2;
    if (h < last) score_some<1, Ahead>(h, key, line, end);
  }

  template <int N, int Ahead>
  PIECEWORK_INLINE const char* score_some(int64_t h, int64_t key, const char* line, const char* end) {
    const auto scored = [&](int64_t k, const auto& ahead) {
      score_keys<kPair, N>(queries + h * query_stride, query_stride, entries + k, words, scores + h * kChunk + k,
                           kChunk, ahead);
    };
    for (int64_t k = key; k < key + kLanes; k += kLanes / N) {
      if (Ahead && line < end) {
        scored(k, [&](int i, int64_t) {
          if (i) return;
          for (int j = 0; j < Ahead; ++j, line += 64) fetch(line);
        });
      } else {
        scored(k, [](int, int64_t) {});
      }
    }
    return line;
  }

  // Makes weights of a head's scores; pairs of entries, where they are paired, share a word.
  void soften(int64_t h, int64_t num) {
    float* at = scores + h * kChunk;
    const int vectors = (num + kLanes - 1) / kLanes;
    Floats most = all(into.top[h]), made[kChunk / kLanes], added = {};
    for (int i = 0; i < vectors; ++i) made[i] = load(at + i * kLanes) * (float)call.scale;
    if (num < vectors * kLanes) {
      Floats& last = made[vectors - 1];
      for (int64_t i = num % kLanes; i < kLanes; ++i) last[i] = -INFINITY;
    }
    for (int i = 0; i < vectors; ++i) most = larger(made[i], most);
    const float top = largest(most);
    decay[h] = into.top[h] == top ? 1.f : exponential(all(into.top[h] - top))[0];
    into.top[h] = top;
    for (int i = 0; i < vectors; ++i) {
      made[i] = exponential(made[i] - top);
      added += made[i];
      if constexpr (kPair)
        store_halves(made[i], (uint16_t*)at + i * kLanes);
      else
        store(made[i], at + i * kLanes);
    }
    into.total[h] = into.total[h] * decay[h] + sum(added);
  }

  // As bfloat16, rounded to nearest, ties up.
  PIECEWORK_INLINE static void store_halves(Floats weights, uint16_t* to) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    store(__builtin_convertvector(((Words)weights + 0x8000u) >> 16, Halves), to);
  }

  // So do a block of dimensions of all entries.
  void weigh(int64_t num) {
    const int64_t steps = (num + kParts - 1) / kParts;
    for (int64_t first = 0; first < value_words; first += kBlockWords) {
      const int64_t last = std::min<int64_t>(first + kBlockWords, value_words);
      for (int64_t h = 0; h < call.num_heads;) {
        const int64_t left = call.num_heads - h;
        if (left >= 8)
          weigh_some<8, 2>(h, steps, first, last), h += 8;
        else if (left >= 6)
          weigh_some<6, 2>(h, steps, first, last), h += 6;
        else if (left >= 4)
          weigh_some<4, 4>(h, steps, first, last), h += 4;
        else if (left >= 2)
          weigh_some<2, 8>(h, steps, first, last), h += 2;
        else
          weigh_some<1, 8>(h, steps, first, last), h += 1;
      }
    }
  }

  template <int N, int V>
  PIECEWORK_INLINE void weigh_some(int64_t h, int64_t steps, int64_t first, int64_t last) {
    constexpr int kVectors = V / kParts;
    const uint32_t* weights = (const uint32_t*)(scores + h * kChunk);
    float* sums = into.sums + h * padded;
    int64_t w = first;
    for (; w + kVectors * kLanes <= last; w += kVectors * kLanes)
      weigh_latents<kPair, N, kVectors>(weights, kChunk, entries, steps, w, 0, decay + h, sums + kParts * w, padded);
    for (; w < last; w += kLanes)
      weigh_latents<kPair, N, 1>(weights, kChunk, entries, steps, w, last - w < kLanes ? last - w : 0, decay + h,
                                 sums + kParts * w, padded);
  }
};

// Brings the parts of one head together, and writes the head's row.
template <class T>
void finish(const DecodeCall& call, int64_t seq, int64_t head, float* parts, int64_t num_parts) {
  const int64_t padded = Partial::padded(call), size = Partial::size(call);
  float top = kNone, total = 0;
  for (int64_t i = 0; i < num_parts; ++i) top = std::max(top, Partial(call, parts + i * size).top[head]);
  alignas(64) float out[kMaxWidth + 2 * kLanes];
  for (int64_t i = 0; i < num_parts; ++i) {
    const Partial part(call, parts + i * size);
    const float factor = std::exp(part.top[head] - top), *sums = part.sums + head * padded;
    total += part.total[head] * factor;
    for (int64_t d = 0; d < padded; d += kLanes)
      store(load(sums + d) * factor + (i ? load(out + d) : Floats{}), out + d);
  }
  T* to = (T*)call.out + (seq * call.num_heads + head) * call.rank;
  const float factor = 1 / total;
  if constexpr (kPaired<T>) {
    for (int64_t d = 0; d < call.rank; d += 2 * kLanes) {
      const Words pairs = joined(load(out + d) * factor, load(out + d + kLanes) * factor);
      std::memcpy(to + d, &pairs, std::min<int64_t>(2 * kLanes, call.rank - d) * sizeof(T));
    }
  } else {
    from_floats(out, call.rank, factor, to);
  }
}

}  // namespace piecework
