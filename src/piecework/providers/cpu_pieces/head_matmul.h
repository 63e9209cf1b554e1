// Every head's tokens times the head's own matrix: out[t][h] = x[t][h] * weight[h], for few tokens and large matrices,
// which were packed into blocks of columns (ops/head_matmul.py). Few tokens are bound by reading matrices: that is once
// and in order. With more of them, a block stays in a near cache while all tokens go over it, and the next is fetched.
#pragma once

#include <omp.h>

#include "../cpu_common/elements.h"

namespace piecework {

struct HeadMatmul {
  const void *x, *weight;  // [T, H, K], elements of K together; [H, W / kColumns blocks, K, kColumns]
  void* out;               // [T, H, W]
  int64_t x_token, x_head, num_tokens, num_heads, depth, width;
};

constexpr int kColumns = 32;    // in a block
constexpr int kRowWords = 32;   // in a block's row, or in a pair of them
constexpr int kTileTokens = kLanes == 16 ? 8 : 4;  // whose sums stay in registers

// As bfloat16, rounded to nearest, ties to even.
PIECEWORK_INLINE void store_rounded(Floats values, uint16_t* to) {
#if defined(PIECEWORK_PAIRS)
  const __m256bh made = _mm512_cvtneps_pbh((__m512)values);
  std::memcpy(to, &made, sizeof made);
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  const Words bits = (Words)values, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  store(__builtin_convertvector((values != values ? all(0x7fc00000u) : rounded) >> 16, Halves), to);
#endif
}

template <class T>
struct HeadProducts {
  static constexpr bool kWord = sizeof(T) == 2;  // whether a word holds elements of two rows
  static constexpr int kRows = kWord ? 2 : 1;

  const HeadMatmul& call;

  const T* x(int64_t token, int64_t head) const {
    return (const T*)call.x + token * call.x_token + head * call.x_head;
  }
  T* out(int64_t token, int64_t head, int64_t block) const {
    return (T*)call.out + (token * call.num_heads + head) * call.width + block * kColumns;
  }
  int64_t words() const { return call.depth / kRows * kRowWords; }  // in a block

  // Element k of a token, with the next one where a word holds two, in all words.
  PIECEWORK_INLINE static Words broadcast(const T* x, int64_t k) {
    uint32_t word;
    std::memcpy(&word, x + k, sizeof word);
    return all(word);
  }

  PIECEWORK_INLINE static Floats added(Floats sum, Words x, Words weight) {
    if constexpr (kWord && !kPaired<T>)
      return multiply_add<false>(multiply_add<false>(sum, (Words)low(x), (Words)low(weight)), (Words)high(x),
                                 (Words)high(weight));
    else
      return multiply_add<kPaired<T>>(sum, x, weight);
  }

  PIECEWORK_INLINE static void give(Floats sum, T* to) {
    if constexpr (kWord)
      store_rounded(sum, (uint16_t*)to);
    else
      store(sum, to);
  }

  // N tokens from t on, one block; fetches up to `Ahead` lines from `line` on in every step.
  // A machine's vectors are narrower than a block's row at times: then a tile is made in parts.
  template <int N, int Ahead>
  PIECEWORK_INLINE void tile(int64_t t, int64_t head, int64_t block, const uint32_t* words, const char*& line,
                             const char* stop) const {
    constexpr int kOther = kRowWords / 2;  // where the second vector of a part is
    const T* from = x(t, head);
    for (int part = 0; part < kOther; part += kLanes) {
      Floats sum[N][2] = {};
      const uint32_t* at = words + part;
      for (int64_t k = 0; k < call.depth; k += kRows, at += kRowWords) {
        const Words a = load<Words>(at), b = load<Words>(at + kOther);
        if (Ahead && line < stop)
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
        T* to = out(t + n, head, block);
        give(sum[n][0], to + part);
        give(sum[n][1], to + kOther + part);
      }
    }
  }

  template <int Ahead>
  void run(int64_t head, int64_t block) const {
    const int64_t blocks = call.width / kColumns, number = head * blocks + block, count = words();
    const uint32_t* at = (const uint32_t*)call.weight + number * count;
    const bool last = number + 1 == call.num_heads * blocks;
    const char *line = (const char*)(at + count), *stop = line + (last ? 0 : 4 * count);
    int64_t t = 0;
    for (; t + kTileTokens <= call.num_tokens; t += kTileTokens) tile<kTileTokens, Ahead>(t, head, block, at, line, stop);
    if (t + 4 <= call.num_tokens) tile<4, Ahead>(t, head, block, at, line, stop), t += 4;
    if (t + 2 <= call.num_tokens) tile<2, Ahead>(t, head, block, at, line, stop), t += 2;
    if (t < call.num_tokens) tile<1, Ahead>(t, head, block, at, line, stop);
  }
};

template <class T>
void head_matmul(const HeadMatmul& call) {
  const HeadProducts<T> products{call};
  const int64_t blocks = call.width / kColumns;
  if (call.num_tokens == 0) return;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < call.num_heads * blocks; ++i)
    if (call.num_tokens > kTileTokens)
      products.template run<1>(i / blocks, i % blocks);
    else
      products.template run<2>(i / blocks, i % blocks);
}

}  // namespace piecework
