// Every head's tokens times the head's own matrix: out[t][h] = x[t][h] * weight[h], for few tokens and large matrices.
// Few tokens are bound by reading matrices: whole rows in order, each once. With more of them, a head's matrix is
// brought into blocks of columns first, which stay in a near cache while all tokens go over them; meanwhile the next
// head's matrix is fetched.
#pragma once

#include <algorithm>
#include <cstdlib>

#include <omp.h>

#include "../cpu_common/elements.h"

namespace piecework {

struct HeadMatmul {
  const void *x, *weight;  // [T, H, K], elements of K together; [H, K, W]
  void* out;               // [T, H, W]
  int64_t x_token, x_head, num_tokens, num_heads, depth, width;
};

constexpr int kBlock = 2 * kLanes;  // columns: two vectors of sums
constexpr int kFewTokens = 4, kTileTokens = 8;

template <class T>
struct HeadProducts {
  static constexpr bool kPair = kPaired<T>;
  static constexpr int kRows = kPair ? 2 : 1;  // of a matrix, in one word

  const HeadMatmul& call;

  const T* x(int64_t token, int64_t head) const {
    return (const T*)call.x + token * call.x_token + head * call.x_head;
  }
  const T* weight(int64_t head, int64_t column) const {
    return (const T*)call.weight + head * call.depth * call.width + column;
  }
  T* out(int64_t token, int64_t head, int64_t column) const {
    return (T*)call.out + (token * call.num_heads + head) * call.width + column;
  }

  // A block's columns of kRows rows. Paired, the first vector has the even columns, the second the odd ones.
  PIECEWORK_INLINE void take(const T* row, Words (&words)[2]) const {
    if constexpr (kPair) {
      const Words a = load<Words>(row), b = load<Words>(row + call.width);
      words[0] = (a & 0xffffu) | (b << 16);
      words[1] = (a >> 16) | (b & 0xffff0000u);
    } else {
      words[0] = load<Words>(row);
      words[1] = load<Words>(row + kLanes);
    }
  }

  PIECEWORK_INLINE static void give(const Floats (&sums)[2], T* to) {
    if constexpr (kPair) {
      store(joined(sums[0], sums[1]), to);
    } else {
      store(sums[0], to);
      store(sums[1], to + kLanes);
    }
  }

  // Element k of a token, with the next one where they are paired, in all words.
  PIECEWORK_INLINE static Words broadcast(const T* x, int64_t k) {
    uint32_t word;
    std::memcpy(&word, x + k, sizeof word);
    return all(word);
  }

  // N tokens, B blocks.
  template <int N, int B>
  PIECEWORK_INLINE void direct(int64_t head, int64_t column) const {
    const int64_t ahead = 8 * kRows * call.width;
    const T *rows = weight(head, column), *from = x(0, head);
    Floats sum[N][B][2] = {};
    for (int64_t k = 0; k < call.depth; k += kRows, rows += kRows * call.width) {
      Words words[B][2];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        take(rows + b * kBlock, words[b]);
        __builtin_prefetch(rows + b * kBlock + ahead);
        __builtin_prefetch(rows + b * kBlock + (kPair ? call.width : kLanes) + ahead);
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Words one = broadcast(from + n * call.x_token, k);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          sum[n][b][0] = multiply_add<kPair>(sum[n][b][0], one, words[b][0]);
          sum[n][b][1] = multiply_add<kPair>(sum[n][b][1], one, words[b][1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) give(sum[n][b], out(n, head, column + b * kBlock));
  }

  template <int N, int B>
  void few(int64_t head, int64_t column, int64_t end) const {
    for (; column + B * kBlock <= end; column += B * kBlock) direct<N, B>(head, column);
    for (; column < end; column += kBlock) direct<N, 1>(head, column);
  }

  // N tokens from t on, one block; fetches `Ahead` lines from `line` on in every step.
  template <int N, int Ahead>
  PIECEWORK_INLINE void tile(int64_t t, int64_t head, int64_t column, const uint32_t* block, const char*& line) const {
    const T* from = x(t, head);
    Floats sum[N][2] = {};
    for (int64_t k = 0; k < call.depth; k += kRows, block += 2 * kLanes) {
      const Words a = load<Words>(block), b = load<Words>(block + kLanes);
      for (int j = 0; j < Ahead; ++j, line += 64) __builtin_prefetch(line, 0, 2);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Words one = broadcast(from + n * call.x_token, k);
        sum[n][0] = multiply_add<kPair>(sum[n][0], one, a);
        sum[n][1] = multiply_add<kPair>(sum[n][1], one, b);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) give(sum[n], out(t + n, head, column));
  }

  template <int Ahead>
  void many(int64_t head, int64_t column, int64_t end, uint32_t* blocks, const char* line) const {
    pack(head, column, end, blocks);
    for (; column < end; column += kBlock, blocks += words(1)) {
      int64_t t = 0;
      for (; t + kTileTokens <= call.num_tokens; t += kTileTokens)
        tile<kTileTokens, Ahead>(t, head, column, blocks, line);
      for (; t + 4 <= call.num_tokens; t += 4) tile<4, Ahead>(t, head, column, blocks, line);
      for (; t + 2 <= call.num_tokens; t += 2) tile<2, Ahead>(t, head, column, blocks, line);
      if (t < call.num_tokens) tile<1, Ahead>(t, head, column, blocks, line);
    }
  }

  // Words that so many blocks take. A vector between them keeps their beginnings apart in a cache's sets.
  int64_t words(int64_t num_blocks) const { return num_blocks * (call.depth / kRows * 2 + 1) * kLanes; }

  void pack(int64_t head, int64_t column, int64_t end, uint32_t* to) const {
    const T* row = weight(head, column);
    for (int64_t k = 0; k < call.depth; k += kRows, row += kRows * call.width, to += 2 * kLanes) {
      uint32_t* at = to;
      for (int64_t c = 0; c < end - column; c += kBlock, at += words(1)) {
        Words made[2];
        take(row + c, made);
        store(made[0], at);
        store(made[1], at + kLanes);
      }
    }
  }

  void run(int64_t head, int64_t column, int64_t end, uint32_t* blocks) const {
    const char* next = (const char*)weight(head + 1, 0);
    switch (call.num_tokens) {
      case 1: return few<1, 4>(head, column, end);
      case 2: return few<2, 4>(head, column, end);
      case 3: return few<3, 2>(head, column, end);
      case 4: return few<4, 2>(head, column, end);
      default:
        return call.num_tokens > kTileTokens ? many<1>(head, column, end, blocks, next)
                                             : many<2>(head, column, end, blocks, next);
    }
  }
};

// Whether `head_matmul<T>` can do it here.
template <class T>
constexpr bool fits(const HeadMatmul& call) {
  return (kPaired<T> || sizeof(T) == 4) && call.depth % HeadProducts<T>::kRows == 0 && call.width % kBlock == 0;
}

// Memory that a thread keeps from call to call, because fresh memory costs more than what is done with it.
class Scratch {
 public:
  ~Scratch() { std::free(at_); }
  uint32_t* of(int64_t words) {
    if (words > words_) {
      std::free(at_);
      at_ = (uint32_t*)std::aligned_alloc(64, (words * sizeof(uint32_t) + 4095) / 4096 * 4096);
      words_ = at_ == nullptr ? 0 : words;
    }
    return at_;
  }

 private:
  uint32_t* at_ = nullptr;
  int64_t words_ = 0;
};

// Returns false where there is no memory.
template <class T>
bool head_matmul(const HeadMatmul& call) {
  if (call.num_tokens == 0 || call.num_heads == 0) return true;
  const HeadProducts<T> products{call};
  const int64_t blocks = call.width / kBlock, threads = omp_get_max_threads();
  const int64_t wanted = (threads + call.num_heads - 1) / call.num_heads;  // parts of a head
  const int64_t share = (blocks + wanted - 1) / wanted, parts = (blocks + share - 1) / share;
  bool failed = false;
#pragma omp parallel
  {
    static thread_local Scratch scratch;
    uint32_t* const kept = call.num_tokens > kFewTokens ? scratch.of(products.words(share)) : nullptr;
    const bool able = kept != nullptr || call.num_tokens <= kFewTokens;
    if (!able) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < call.num_heads * parts; ++i) {
      const int64_t column = i % parts * share * kBlock;
      if (able) products.run(i / parts, column, std::min(call.width, column + share * kBlock), kept);
    }
  }
  return !failed;
}

template <class T>
bool try_head_matmul(const HeadMatmul& call) {
  return fits<T>(call) && head_matmul<T>(call);
}

}  // namespace piecework
