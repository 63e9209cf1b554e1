// Vectors of 32-bit words as wide as the machine's registers, in the notation that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace piecework {

// kRowVectors: how many vectors of query rows, times kStep sums each (prefill.h), the registers hold.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRowVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRowVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRowVectors = 4;
#else
constexpr int kLanes = 4, kRowVectors = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

#define PIECEWORK_INLINE inline __attribute__((always_inline))

template <class V = Floats, class E>
PIECEWORK_INLINE V load(const E* from) {
  V made;
  std::memcpy(&made, from, sizeof made);
  return made;
}

// The first `count` words, and zeros.
template <class V = Floats, class E>
PIECEWORK_INLINE V load_some(const E* from, int64_t count) {
  V made = {};
  std::memcpy(&made, from, 4 * count);
  return made;
}

template <class V, class E>
PIECEWORK_INLINE void store(V value, E* to) {
  std::memcpy(to, &value, sizeof value);
}

PIECEWORK_INLINE Floats all(float value) { return value - Floats{}; }  // a sum would not fold: -0 + 0 is 0
PIECEWORK_INLINE Words all(uint32_t value) { return value | Words{}; }
PIECEWORK_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Word j of what is made is word I[j] of a and b, b's being counted from kLanes on.
template <int... I>
PIECEWORK_INLINE Words pick(Words a, Words b) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Words{uint32_t(I)...});
#endif
}

typedef std::make_integer_sequence<int, kLanes> Each;

// Words j of a where j lacks the bit S, and words j - S of b where it has it.
template <int S, int... J>
PIECEWORK_INLINE Words lower(Words a, Words b, std::integer_sequence<int, J...>) {
  return pick<(J & S ? kLanes + J - S : J)...>(a, b);
}

// Words j + S of a where j lacks the bit S, and words j of b where it has it.
template <int S, int... J>
PIECEWORK_INLINE Words upper(Words a, Words b, std::integer_sequence<int, J...>) {
  return pick<(J & S ? kLanes + J : J + S)...>(a, b);
}

template <int S, int... J>
PIECEWORK_INLINE Floats exchanged(Floats a, std::integer_sequence<int, J...>) {
  return (Floats)pick<(J ^ S)...>((Words)a, (Words)a);
}

// Words j of a where j lacks the bit S (or has it, if `Has`), and of b elsewhere.
template <int S, bool Has, int... J>
PIECEWORK_INLINE Words mixed(Words a, Words b, std::integer_sequence<int, J...>) {
  return pick<(bool(J & S) == Has ? J : kLanes + J)...>(a, b);
}

// Turns kLanes vectors about their diagonal.
template <int S = 1>
PIECEWORK_INLINE void transpose(Words (&rows)[kLanes]) {
  if constexpr (S < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & S) continue;
      const Words a = rows[i], b = rows[i + S];
      rows[i] = lower<S>(a, b, Each());
      rows[i + S] = upper<S>(a, b, Each());
    }
    transpose<2 * S>(rows);
  }
}

// The sums of each of kLanes vectors; they are used up.
template <int S = 1>
PIECEWORK_INLINE Floats sums(Floats (&rows)[kLanes]) {
  if constexpr (S < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * S) {
      const Words a = (Words)rows[i], b = (Words)rows[i + S];
      rows[i] = (Floats)mixed<S, false>(a, b, Each()) + exchanged<S>((Floats)mixed<S, true>(a, b, Each()), Each());
    }
    return sums<2 * S>(rows);
  }
  return rows[0];
}

template <int S = kLanes / 2>
PIECEWORK_INLINE float largest(Floats a) {
  if constexpr (S > 0) return largest<S / 2>(larger(a, exchanged<S>(a, Each())));
  return a[0];
}

template <int S = kLanes / 2>
PIECEWORK_INLINE float sum(Floats a) {
  if constexpr (S > 0) return sum<S / 2>(a + exchanged<S>(a, Each()));
  return a[0];
}

// e to the power of x, for x up to 88, to about one unit in the last place; exactly 0 for x below -87, and so for
// -infinity. NaN stays NaN.
PIECEWORK_INLINE Floats exponential(Floats x) {
  const Floats least = all(-87.f);
  const float magic = 12582912.f;  // added, it leaves the nearest integer in the lowest bits
  const Floats bounded = x < least ? least : x;
  Floats n = bounded * 1.44269504088896341f + magic;
  const Words power = ((Words)n + 127u) << 23;
  n -= magic;
  const Floats r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return x < least ? Floats{} : p * (Floats)power;
}

PIECEWORK_INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats most = all(20.f);
  const Floats bounded = x > most ? most : (x < -most ? -most : x);
  return 1.f - 2.f / (exponential(2.f * bounded) + 1.f);
}

}  // namespace piecework
