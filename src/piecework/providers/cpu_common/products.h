// Products of tokens with packed matrices (ops/packed.py): a linear layer's weight, or a matrix of each head.
// out[t][h] = x[t][h] * matrix[h] + bias
// A block of columns is read in order, once for up to kChunkTokens tokens; they go over it, a few at a time whose sums
// stay in registers, while it is in a near cache and the next block is fetched. What comes out for a token is the same
// to the bit whatever other tokens there are.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace piecework {

struct Product {
  const void *x, *matrices;  // [T, H, K], elements of K together; [H, W / kColumns blocks, K, kColumns]
  const void* bias;          // [W], of one head; or null
  void* out;                 // [T, H, W], elements of W together
  int64_t x_token, x_head, out_token, out_head, num_tokens, num_heads, depth, width;
  int num_threads;
};

constexpr int kColumns = 32;    // in a block
constexpr int kRowWords = 32;   // in a block's row, or in a pair of them
constexpr int kTileTokens = kLanes == 16 ? 8 : 4;
constexpr int64_t kChunkTokens = 256;  // whose rows stay in a near cache from block to block

template <class T>
constexpr bool kPacked = false;
template <>
constexpr bool kPacked<float> = true;
template <>
constexpr bool kPacked<BFloat16> = true;

template <class T>
struct Products {
  static_assert(kPacked<T>, "there is a layout for it");
  static constexpr bool kWord = sizeof(T) == 2;  // whether a word holds elements of two rows
  static constexpr int kRows = kWord ? 2 : 1;

  const Product& call;

  const T* x(int64_t token, int64_t head) const {
    return (const T*)call.x + token * call.x_token + head * call.x_head;
  }
  T* out(int64_t token, int64_t head, int64_t column) const {
    return (T*)call.out + token * call.out_token + head * call.out_head + column;
  }
  int64_t words() const { return call.depth / kRows * kRowWords; }  // in a block

  // Element k of a token, with the next one where a word holds two, in all words.
  PIECEWORK_INLINE static Words broadcast(const T* x, int64_t k) {
    uint32_t word;
    std::memcpy(&word, x + k, sizeof word);
    return all(word);
  }

  PIECEWORK_INLINE static Floats added(Floats sum, Words x, Words matrix) {
    if constexpr (kWord && !kPaired<T>)
      return multiply_add<false>(multiply_add<false>(sum, (Words)low(x), (Words)low(matrix)), (Words)high(x),
                                 (Words)high(matrix));
    else
      return multiply_add<kPaired<T>>(sum, x, matrix);
  }

  PIECEWORK_INLINE Floats first(int64_t column) const {
    Floats made = {};
    if (call.bias != nullptr)
      for (int i = 0; i < kLanes; ++i) made[i] = to_float(((const T*)call.bias)[column + i]);
    return made;
  }

  // N tokens from t on, one block; fetches up to `Ahead` lines from `line` on in every step.
  // A machine's vectors are narrower than a block's row at times: then a tile is made in parts.
  template <int N, int Ahead>
  PIECEWORK_INLINE void tile(int64_t t, int64_t head, int64_t column, const uint32_t* words, const char*& line,
                             const char* stop) const {
    constexpr int kOther = kRowWords / 2;  // where the second vector of a part is
    const T* from = x(t, head);
    for (int part = 0; part < kOther; part += kLanes) {
      const Floats a0 = first(column + part), b0 = first(column + kOther + part);
      Floats sum[N][2];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[n][0] = a0, sum[n][1] = b0;
      const uint32_t* at = words + part;
      for (int64_t k = 0; k < call.depth; k += kRows, at += kRowWords) {
        const Words a = load<Words>(at), b = load<Words>(at + kOther);
        if (line < stop)
          for (int j = 0; j < Ahead; ++j, line += 64) __builtin_prefetch(line, 0, 2);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const Words one = broadcast(from + n * call.x_token, k);
          sum[n][0] = added(sum[n][0], one, a);
          sum[n][1] = added(sum[n][1], one, b);
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        T* to = out(t + n, head, column + part);
        store_as(sum[n][0], to);
        store_as(sum[n][1], to + kOther);
      }
    }
  }

  // Tokens t to end, one block.
  template <int Ahead>
  void run(int64_t head, int64_t block, int64_t t, int64_t end) const {
    const int64_t blocks = call.width / kColumns, number = head * blocks + block, column = block * kColumns;
    const uint32_t* at = (const uint32_t*)call.matrices + number * words();
    const bool last = number + 1 == call.num_heads * blocks;
    const char *line = (const char*)(at + words()), *stop = line + (last ? 0 : 4 * words());
    for (; t + kTileTokens <= end; t += kTileTokens) tile<kTileTokens, Ahead>(t, head, column, at, line, stop);
    if (t + 4 <= end) tile<4, Ahead>(t, head, column, at, line, stop), t += 4;
    if (t + 2 <= end) tile<2, Ahead>(t, head, column, at, line, stop), t += 2;
    if (t < end) tile<1, Ahead>(t, head, column, at, line, stop);
  }
};

template <class T>
void multiply(const Product& call) {
  if (call.num_tokens == 0) return;
  const Products<T> products{call};
  const int64_t blocks = call.width / kColumns, all_blocks = call.num_heads * blocks;
  // Tokens are divided where they are many, and where there are too few blocks for all threads.
  const int64_t wanted = (4 * call.num_threads + all_blocks - 1) / all_blocks;
  const int64_t tiles = (call.num_tokens + kTileTokens - 1) / kTileTokens;
  const int64_t parts = std::max((call.num_tokens + kChunkTokens - 1) / kChunkTokens, std::min(wanted, tiles));
  const int64_t share = (tiles + parts - 1) / parts * kTileTokens;
#pragma omp parallel for schedule(static) num_threads(call.num_threads)
  for (int64_t i = 0; i < parts * all_blocks; ++i) {
    const int64_t number = i % all_blocks, t = i / all_blocks * share, end = std::min(call.num_tokens, t + share);
    if (share > kTileTokens)
      products.template run<1>(number / blocks, number % blocks, t, end);
    else
      products.template run<2>(number / blocks, number % blocks, t, end);
  }
}

}  // namespace piecework
