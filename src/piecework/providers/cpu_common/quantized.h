// Products of tokens with quantized weights (ops/linear_quantized.py), packed in blocks of columns (ops/packed.py).
// out[t] = sum over groups g of scale[g] * (x[t] * numbers) + offset[g] * (sum of x[t]) + bias
// A word has four or eight numbers of a column. They are widened in registers for a few tokens; for more, a block is
// widened once and read from a near cache. Numbers have few bits, so they are exact as bfloat16 too, and what comes out
// for a token is the same to the bit whatever other tokens there are; but with matrix units (quantized_amx.h).
#pragma once

#include <type_traits>
#include <vector>

#include "fp8.h"
#include "products.h"
#include "quantized_amx.h"

namespace piecework {

struct QuantizedProduct {
  Product of;             // its matrices are the values, of one head
  const float* scales;    // [W / kColumns blocks, groups, kColumns]
  const float* offsets;   // the same, or null
  int64_t groups;
};

struct Int8 {
  static constexpr int kNumbers = 4;
  template <int I>
  PIECEWORK_INLINE static Floats number(Words word) {
    return __builtin_convertvector((Ints)(word << (24 - 8 * I)) >> 24, Floats);
  }
};

// As `fp8_values`, with fewer steps; NaN, which no weight is, comes out as 480.
struct Fp8 {
  static constexpr int kNumbers = 4;
  template <int I>
  PIECEWORK_INLINE static Floats number(Words word) {
    const Words code = word << (24 - 8 * I);
    const Words normal = ((code >> 4) & 0x07f00000u) + (120u << 23);
    const Floats other = multiply_add<false>(all(-kLeastNormalFp8), normal, (Words)all(2.f));
    return (Floats)((Words)(other < (Floats)normal ? other : (Floats)normal) | (code & 0x80000000u));
  }
};

struct Int4 {
  static constexpr int kNumbers = 8;
  template <int I>
  PIECEWORK_INLINE static Floats number(Words word) {
    constexpr int kBits = 4 * (I / 2) + 16 * (I % 2);
    return __builtin_convertvector((Ints)(word << (28 - kBits)) >> 28, Floats);
  }
};

// Step I of a word's numbers as x is multiplied with them: one as float32, or a pair as bfloat16.
template <class F, class X, int I>
PIECEWORK_INLINE Words widened(Words word) {
  if constexpr (sizeof(X) == 4) {
    return (Words)F::template number<I>(word);
  } else {
#if defined(PIECEWORK_PAIRS) && defined(__AVX512BW__)
    if constexpr (std::is_same_v<F, Int4>) {
      const Words pairs = {0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0, 0xc0e0c100, 0xc0a0c0c0, 0xc040c080, 0xbf80c000,
                           0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0, 0xc0e0c100, 0xc0a0c0c0, 0xc040c080, 0xbf80c000};
      return (Words)_mm512_permutexvar_epi16((__m512i)((word >> (4 * I)) & 0x000f000fu), (__m512i)pairs);
    }
#endif
    const Words low = (Words)F::template number<2 * I>(word), high = (Words)F::template number<2 * I + 1>(word);
    return (low >> 16) | (high & 0xffff0000u);
  }
}

// F: what values are; X: what x is multiplied as; T: what comes out.
template <class F, class X, class T>
struct QuantizedTiles {
  static constexpr int kRows = sizeof(X) == 2 ? 2 : 1, kSteps = F::kNumbers / kRows, kOther = kColumns / 2;
  typedef std::make_integer_sequence<int, kSteps> Steps;

  const QuantizedProduct& call;
  const X* x;           // [tokens, x_token]
  int64_t x_token;
  const float* sums;    // [tokens, groups] of x, where there are offsets

  int64_t rows() const { return call.of.depth / F::kNumbers; }  // of words, in a block

  PIECEWORK_INLINE static Words broadcast(const X* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return all(word);
  }

  PIECEWORK_INLINE static Floats added(Floats sum, Words x, Words matrix) {
    return multiply_add<(sizeof(X) == 2)>(sum, x, matrix);
  }

  template <int N>
  PIECEWORK_INLINE void step(Floats (&sum)[N][2], Words a, Words b, const X* from) const {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Words one = broadcast(from + n * x_token);
      sum[n][0] = added(sum[n][0], one, a);
      sum[n][1] = added(sum[n][1], one, b);
    }
  }

  template <int N, int... I>
  PIECEWORK_INLINE void row(Floats (&sum)[N][2], Words a, Words b, const X* from,
                            std::integer_sequence<int, I...>) const {
    (step(sum, widened<F, X, I>(a), widened<F, X, I>(b), from + I * kRows), ...);
  }

  // N tokens from t on, a block; `words` are its values, or (if not `Packed`) what they were widened to.
  template <int N, bool Packed>
  void tile(int64_t t, int64_t block, const uint32_t* words) const {
    constexpr int kStride = Packed ? F::kNumbers : kRows;
    const int64_t column = block * kColumns, size = call.of.depth / call.groups;
    const float *scales = call.scales + block * call.groups * kColumns, *offsets = nullptr;
    if (call.offsets != nullptr) offsets = call.offsets + block * call.groups * kColumns;
    for (int part = 0; part < kOther; part += kLanes) {
      const uint32_t* at = words + part;
      const X* from = x + t * x_token;
      Floats total[N][2] = {};
      for (int64_t g = 0; g < call.groups; ++g) {
        Floats sum[N][2] = {};
        for (int64_t k = 0; k < size; k += kStride, at += kColumns, from += kStride) {
          const Words a = load<Words>(at), b = load<Words>(at + kOther);
          if constexpr (Packed) {
            __builtin_prefetch((const char*)at + 2048, 0, 2);
            __builtin_prefetch((const char*)(at + kOther) + 2048, 0, 2);
            row(sum, a, b, from, Steps());
          } else {
            step(sum, a, b, from);
          }
        }
        for (int i = 0; i < 2; ++i) {
          const int64_t number = g * kColumns + part + i * kOther;
          const Words scale = load<Words>(scales + number);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) total[n][i] = multiply_add<false>(total[n][i], (Words)sum[n][i], scale);
          if (offsets == nullptr) continue;
          const Words offset = load<Words>(offsets + number);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n)
            total[n][i] = multiply_add<false>(total[n][i], (Words)all(sums[(t + n) * call.groups + g]), offset);
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) give(total[n][i], t + n, column + part + i * kOther);
    }
  }

  PIECEWORK_INLINE void give(Floats total, int64_t token, int64_t column) const {
    if (call.of.bias != nullptr) total += load_as((const T*)call.of.bias + column);
    store_as(total, (T*)call.of.out + token * call.of.out_token + column);
  }

  template <int... I>
  PIECEWORK_INLINE static void widen_row(Words word, uint32_t* to, std::integer_sequence<int, I...>) {
    (store(widened<F, X, I>(word), to + I * kColumns), ...);
  }

  void widen(const uint32_t* words, uint32_t* to) const {
    for (int64_t r = 0; r < rows(); ++r, words += kColumns, to += kSteps * kColumns)
      for (int c = 0; c < kColumns; c += kLanes) widen_row(load<Words>(words + c), to + c, Steps());
  }

#if defined(PIECEWORK_MATRIX_UNITS)
  // Pairs of numbers times their scales, with their offsets, rounded.
  template <int... I>
  PIECEWORK_INLINE static void scale_row(Words word, Floats scale, Floats offset, uint32_t* to,
                                         std::integer_sequence<int, I...>) {
    const auto scaled = [&](Floats number) { return multiply_add<false>(offset, (Words)number, (Words)scale); };
    (store(pairs_of(scaled(F::template number<2 * I>(word)), scaled(F::template number<2 * I + 1>(word))),
           to + I * kColumns),
     ...);
  }

  void widen_scaled(int64_t block, const uint32_t* words, uint32_t* to) const {
    const int64_t first = block * call.groups * kColumns;
    for (int64_t g = 0; g < call.groups; ++g)
      for (int64_t r = 0; r < rows() / call.groups; ++r, words += kColumns, to += kSteps * kColumns)
        for (int c = 0; c < kColumns; c += kLanes) {
          const int64_t number = first + g * kColumns + c;
          const Floats offset = call.offsets ? load(call.offsets + number) : Floats{};
          scale_row(load<Words>(words + c), load(call.scales + number), offset, to + c, Steps());
        }
  }

  void run_units(int64_t block, int64_t t, int64_t end, const uint32_t* words, uint32_t* wide) const {
    const bool scaled = call.groups > 1;
    if (scaled)
      widen_scaled(block, words, wide);
    else
      widen(words, wide);
    constexpr int kTokens = 2 * kUnitRows;
    alignas(64) float made[kTokens][kColumns];
    UnitShapes shapes;
    for (; t < end; t += kTokens) {
      const int64_t count = std::min<int64_t>(kTokens, end - t);
      multiply_units((const BFloat16*)x + t * x_token, x_token, count, wide, call.of.depth, made, shapes);
      for (int64_t n = 0; n < count; ++n)
        for (int c = 0; c < kColumns; c += kLanes) {
          Floats total = load(made[n] + c);
          const int64_t number = block * kColumns + c;
          if (!scaled) total *= load(call.scales + number);
          if (!scaled && call.offsets) total += sums[t + n] * load(call.offsets + number);
          give(total, t + n, number);
        }
    }
  }
#endif

  // Tokens t to end, one block.
  void run(int64_t block, int64_t t, int64_t end, std::vector<uint32_t>& room) const {
    const uint32_t* words = (const uint32_t*)call.of.matrices + block * rows() * kColumns;
#if defined(PIECEWORK_MATRIX_UNITS)
    if constexpr (std::is_same_v<X, BFloat16>) {
      if (end - t >= kTileTokens && call.of.depth % (2 * kUnitRows) == 0 && matrix_units()) {
        room.resize(rows() * kSteps * kColumns);
        return run_units(block, t, end, words, room.data());
      }
    }
#endif
    if (end - t >= kTileTokens) {
      room.resize(rows() * kSteps * kColumns);
      widen(words, room.data());
      for (; t + kTileTokens <= end; t += kTileTokens) tile<kTileTokens, false>(t, block, room.data());
    }
    if constexpr (kTileTokens > 4)
      if (t + 4 <= end) tile<4, true>(t, block, words), t += 4;
    if (t + 2 <= end) tile<2, true>(t, block, words), t += 2;
    if (t < end) tile<1, true>(t, block, words);
  }
};

// Sums of each group's elements of each token.
template <class X>
std::vector<float> group_sums(const QuantizedProduct& call, const X* x, int64_t x_token) {
  const int64_t size = call.of.depth / call.groups;
  std::vector<float> made(call.of.num_tokens * call.groups);
  for (int64_t t = 0; t < call.of.num_tokens; ++t)
    for (int64_t g = 0; g < call.groups; ++g) {
      float sum = 0;
      for (int64_t k = 0; k < size; ++k) sum += to_float(x[t * x_token + g * size + k]);
      made[t * call.groups + g] = sum;
    }
  return made;
}

template <class F, class X, class T>
void multiply_as(const QuantizedProduct& call, const X* x, int64_t x_token) {
  const Product& of = call.of;
  const std::vector<float> sums = call.offsets ? group_sums(call, x, x_token) : std::vector<float>();
  const QuantizedTiles<F, X, T> tiles_of{call, x, x_token, sums.data()};
  // Tokens are divided where they are many, and where there are too few blocks for all threads.
  const int64_t blocks = of.width / kColumns, wanted = (4 * of.num_threads + blocks - 1) / blocks;
  const int64_t tiles = (of.num_tokens + kTileTokens - 1) / kTileTokens;
  const int64_t parts = std::max((of.num_tokens + kChunkTokens - 1) / kChunkTokens, std::min(wanted, tiles));
  const int64_t share = (tiles + parts - 1) / parts * kTileTokens;
#pragma omp parallel num_threads(of.num_threads)
  {
    std::vector<uint32_t> room;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < parts * blocks; ++i) {
      const int64_t t = i / blocks * share;
      tiles_of.run(i % blocks, t, std::min(of.num_tokens, t + share), room);
    }
  }
}

// Rows of x lie together. Where the machine doesn't multiply T as it is, they are converted first.
template <class F, class T>
void multiply_quantized(const QuantizedProduct& call) {
  const Product& of = call.of;
  if (of.num_tokens == 0) return;
  if constexpr (sizeof(T) == 4 || kPaired<T>) {
    multiply_as<F, T, T>(call, (const T*)of.x, of.x_token);
  } else {
    std::vector<float> rows(of.num_tokens * of.depth);
    for (int64_t t = 0; t < of.num_tokens; ++t)
      to_floats((const T*)of.x + t * of.x_token, of.depth, rows.data() + t * of.depth);
    multiply_as<F, float, T>(call, rows.data(), of.depth);
  }
}

}  // namespace piecework
