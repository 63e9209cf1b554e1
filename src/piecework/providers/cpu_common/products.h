// Products of tokens with packed matrices (ops/packed.py): a linear layer's weight, or a matrix of each head.
// out[t][h] = x[t][h] * matrix[h] + bias
// A block of columns is read in order, once for up to kShareTokens tokens, a panel of rows at a time. A few tokens go
// over a panel at once, whose sums stay in registers; meanwhile the next panel is fetched. Elements that the machine
// can't multiply as they are become float32: in registers, or, where more tokens follow, once in a near cache. What
// comes out for a token is the same to the bit whatever other tokens there are.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include <omp.h>

#include "lanes.h"

namespace piecework {

struct Product {
  const void *x, *matrices;  // [T, H, K], elements of K together; [H, W / kColumns blocks, K, kColumns]
  const void* bias;          // [W], of one head; or null
  void* out;                 // [T, H, W], elements of W together
  int64_t x_token, x_head, out_token, out_head, num_tokens, num_heads, depth, width;
  int num_threads;
};

constexpr int kColumns = 32;                      // in a block
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileTokens = 8;  // with two vectors of columns, their sums fit the registers
#else
constexpr int kTileTokens = 6;
#endif
constexpr int kPanelRows = 128;                   // of float32, in the nearest cache
constexpr int kShareTokens = 128;                 // whose sums are kept from panel to panel, near too
constexpr int64_t kChunkTokens = 512;             // of which a turned copy is made at once

// Element types of which there are packed matrices, and what a row of a block is: how many rows of the matrix, in how
// many words.
template <class T>
constexpr bool kPacked = false;
template <>
constexpr bool kPacked<float> = true;
template <>
constexpr bool kPacked<BFloat16> = true;
#if defined(__FLT16_MAX__)
template <>
constexpr bool kPacked<Half> = true;
#endif
template <class T>
constexpr int kBlockRows = 1;
template <>
constexpr int kBlockRows<BFloat16> = 2;
template <class T>
constexpr int kRowWords = kColumns * kBlockRows<T> * sizeof(T) / 4;

// Vector `v` of a block's row, as vectors that are multiplied: of pairs or numbers as they are, or of float32.
template <class T>
constexpr int kParts = kInPlace<T> ? 1 : kBlockRows<T>;

template <class T>
PIECEWORK_INLINE void take(const uint32_t* row, int v, Words (&to)[kParts<T>]) {
  if constexpr (kInPlace<T>) {
    to[0] = load<Words>(row + v * kLanes);
  } else if constexpr (kBlockRows<T> == 2) {
    const Words pairs = load<Words>(row + v * kLanes);
    to[0] = (Words)low(pairs);
    to[1] = (Words)high(pairs);
  } else {
    to[0] = (Words)load_as((const T*)row + v * kLanes);
  }
}

// sums[n][column] += x[row][n] * matrix[row][column], of N tokens and the block's `rows`; fetches what is `Ahead` words
// further on.
template <class T, int N, int V, int Ahead>
void tile(const uint32_t* x, const uint32_t* matrix, int64_t rows, float* sums) {
  constexpr int kPart = kParts<T>;
  for (int part = 0; part < kColumns / kLanes; part += V) {
    Floats sum[N][V];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[n][v] = load(sums + n * kColumns + (part + v) * kLanes);
    const uint32_t *from = x, *row = matrix;
#pragma GCC unroll 2
    for (int64_t k = 0; k < rows; ++k, from += N * kPart, row += kRowWords<T>) {
      Words columns[V][kPart];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) take<T>(row, part + v, columns[v]);
      if constexpr (Ahead > 0) {
#pragma GCC unroll 2
        for (int w = 0; w < kRowWords<T> * V * kLanes / kColumns; w += 16)
          __builtin_prefetch(row + Ahead + part / V * 16 + w, 0, 2);
      }
#pragma GCC unroll 2
      for (int p = 0; p < kPart; ++p)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const Words one = all(from[p * N + n]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[n][v] = multiply_add<kPaired<T>>(sum[n][v], one, columns[v][p]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(sum[n][v], sums + n * kColumns + (part + v) * kLanes);
  }
}

// body<N>() for the least size of a tile that holds `num` tokens.
template <class F>
PIECEWORK_INLINE void sized(int64_t num, const F& body) {
  if (num == 1) return body.template operator()<1>();
  if (num == 2) return body.template operator()<2>();
  if (num <= 4) return body.template operator()<4>();
  body.template operator()<kTileTokens>();
}

// Some of a chunk's tokens, which make tiles of kTileTokens and a smaller one.
template <class T>
struct Products {
  static_assert(kPacked<T>, "there is a layout for it");
  static constexpr bool kPair = kPaired<T>;
  static constexpr int kWord = kPair ? 2 : 1;            // elements of a token in a word of its copy
  static constexpr int kPanel = kPanelRows / kParts<T>;  // rows of a block
  static constexpr int kPanelWords = kPanel * kRowWords<T>;

  const Product& call;
  const int64_t words;  // in a token's copy
  const int64_t rows;   // in a block

  explicit Products(const Product& call) : call(call), words(call.depth / kWord), rows(call.depth / kBlockRows<T>) {}

  T* out(int64_t token, int64_t head, int64_t column) const {
    return (T*)call.out + token * call.out_token + head * call.out_head + column;
  }

  // A tile's copy: word d of all of its tokens, then word d + 1 …
  struct Turn {
    const Products& of;
    int64_t token, head, num;
    uint32_t* to;
    template <int N>
    void operator()() const {
      for (int64_t d = 0; d < of.words; d += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, of.words - d);
        for (int first = 0; first < N; first += kLanes) {
          constexpr int kMost = N < kLanes ? N : kLanes;
          Words block[kLanes] = {};
          for (int i = 0; i < kMost && first + i < num; ++i) block[i] = of.taken(token + first + i, head, d, count);
          if constexpr (N == 1) {
            std::memcpy(to + d, &block[0], 4 * count);
          } else {
            transpose(block);
            const int some = N - first < kMost ? N - first : kMost;
            for (int64_t i = 0; i < count; ++i) std::memcpy(to + (d + i) * N + first, &block[i], 4 * some);
          }
        }
      }
    }
  };

  // Words d to d + count of a token.
  PIECEWORK_INLINE Words taken(int64_t token, int64_t head, int64_t d, int64_t count) const {
    const T* from = (const T*)call.x + token * call.x_token + head * call.x_head + d * kWord;
    alignas(64) T some[kLanes * kWord] = {};
    if (count < kLanes) from = (const T*)std::memcpy(some, from, count * kWord * sizeof(T));
    if constexpr (kInPlace<T>)
      return load<Words>(from);
    else
      return (Words)load_as(from);
  }

  // One tile and one panel: of the matrix as it lies, or of float32.
  struct Multiply {
    const uint32_t *x, *matrix;
    const float* wide;  // or null
    int64_t num;
    float* sums;
    bool ahead;  // whether to fetch the next panel meanwhile
    template <int N>
    void operator()() const {
      constexpr int kVectors = kLanes == 8 && N <= 2 ? 4 : 2;
      if (wide != nullptr)
        tile<float, N, kVectors, 0>(x, (const uint32_t*)wide, num * kParts<T>, sums);
      else if (ahead)
        tile<T, N, kVectors, kPanelWords>(x, matrix, num, sums);
      else if constexpr (kInPlace<T>)
        tile<T, N, kVectors, 0>(x, matrix, num, sums);
    }
  };

  // Tokens t to end, one block; their copy is at `from`.
  void run(int64_t head, int64_t block, int64_t t, int64_t end, const uint32_t* from) const {
    alignas(64) float sums[(kShareTokens + kTileTokens) * kColumns];
    alignas(64) float wide[kInPlace<T> ? 1 : kPanelRows * kColumns];
    const int64_t number = head * (call.width / kColumns) + block, column = block * kColumns;
    const int64_t tiles = (end - t + kTileTokens - 1) / kTileTokens;
    const int64_t lines = kPanelWords / 16 / tiles + 1;  // of the next panel, fetched before each tile
    const uint32_t* at = (const uint32_t*)call.matrices + number * rows * kRowWords<T>;
    begin(column, tiles * kTileTokens, sums);
    for (int64_t row = 0; row < rows; row += kPanel, at += kPanelWords) {
      const int64_t num = std::min<int64_t>(kPanel, rows - row);
      const bool widened = !kInPlace<T> && tiles > 1;
      if (widened) widen(at, num, wide);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t count = std::min<int64_t>(kTileTokens, end - t - i * kTileTokens);
        if (widened)
          for (int64_t l = i * lines; l < (i + 1) * lines; ++l) __builtin_prefetch(at + kPanelWords + 16 * l, 0, 2);
        Multiply multiply{nullptr, at, widened ? wide : nullptr, num, sums + i * kTileTokens * kColumns, i == 0};
        multiply.x = from + i * kTileTokens * words + row * kParts<T> * padded(count);
        sized(count, multiply);
      }
    }
    for (int64_t token = t; token < end; ++token)
      for (int c = 0; c < kColumns; c += kLanes)
        store_as(load(sums + (token - t) * kColumns + c), out(token, head, column) + c);
  }

  // How many tokens a tile for `num` has.
  static int64_t padded(int64_t num) { return num <= 2 ? num : (num <= 4 ? 4 : kTileTokens); }

  void begin(int64_t column, int64_t num, float* sums) const {
    alignas(64) float bias[kColumns] = {};
    if (call.bias != nullptr) to_floats((const T*)call.bias + column, kColumns, bias);
    for (int64_t i = 0; i < num; ++i) std::memcpy(sums + i * kColumns, bias, sizeof bias);
  }

  static void widen(const uint32_t* row, int64_t num, float* to) {
    for (int64_t k = 0; k < num; ++k, row += kRowWords<T>, to += kParts<T> * kColumns)
#pragma GCC unroll 8
      for (int v = 0; v < kColumns / kLanes; ++v) {
        Words made[kParts<T>];
        take<T>(row, v, made);
        for (int p = 0; p < kParts<T>; ++p) store(made[p], to + p * kColumns + v * kLanes);
      }
  }
};

// Tokens first to end, at most kChunkTokens.
template <class T>
void multiply_chunk(const Product& call, int64_t first, int64_t end, uint32_t* copy) {
  const Products<T> products(call);
  const int64_t blocks = call.width / kColumns, all_blocks = call.num_heads * blocks;
  const int64_t tiles = (end - first + kTileTokens - 1) / kTileTokens, size = products.words * kTileTokens;
  // Tokens are divided where they are many, and where there are too few blocks for all threads.
  const int64_t wanted = (4 * call.num_threads + all_blocks - 1) / all_blocks, most = kShareTokens / kTileTokens;
  const int64_t parts = std::max((tiles + most - 1) / most, std::min(wanted, tiles));
  const int64_t share = (tiles + parts - 1) / parts;
#pragma omp parallel num_threads(call.num_threads) if (call.num_threads > 1)
  {
    const auto turn = [&](int64_t i, uint32_t* to) {
      const int64_t token = first + i % tiles * kTileTokens, num = std::min<int64_t>(kTileTokens, end - token);
      sized(num, typename Products<T>::Turn{products, token, i / tiles, num, to});
    };
    uint32_t* from = copy;
    if (tiles * call.num_heads == 1) {  // a copy for each thread: to wait for one takes longer than to make it
      turn(0, from += omp_get_thread_num() * size);
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tiles * call.num_heads; ++i) turn(i, copy + i * size);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < parts * all_blocks; ++i) {
      const int64_t number = i % all_blocks, head = number / blocks, begin = i / all_blocks * share;
      if (begin < tiles)
        products.run(head, number % blocks, first + begin * kTileTokens,
                     std::min(end, first + (begin + share) * kTileTokens), from + (head * tiles + begin) * size);
    }
  }
}

// Returns false where there is no memory.
template <class T>
[[nodiscard]] bool multiply(const Product& call) {
  const int64_t tokens = std::min(call.num_tokens, kChunkTokens) + kTileTokens;
  const int64_t most = std::max<int64_t>(call.num_heads * tokens, call.num_threads * kTileTokens);
  const std::unique_ptr<uint32_t[]> copy(new (std::nothrow) uint32_t[most * call.depth]);
  if (copy == nullptr) return false;
  for (int64_t t = 0; t < call.num_tokens; t += kChunkTokens)
    multiply_chunk<T>(call, t, std::min(call.num_tokens, t + kChunkTokens), copy.get());
  return true;
}

}  // namespace piecework
