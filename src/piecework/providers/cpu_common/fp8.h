// float8_e4m3fn: a sign, four bits of exponent (bias 7), three of mantissa; no infinities, and NaN is 0x7f or 0xff.
#pragma once

#include "lanes.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace piecework {

constexpr float kMostFp8 = 448.f;
constexpr float kLeastNormalFp8 = 0x1p-6f;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef int16_t SignedHalves __attribute__((vector_size(2 * kLanes)));

// The values of codes, one in each word. As float32 with its exponent set right, a code below the least normal number
// has a leading one that it lacks; twice that less the least normal number is what it means, and is less only there.
PIECEWORK_INLINE Floats fp8_values(Words codes) {
  const Words magnitude = codes & 0x7fu;
  const Floats normal = (Floats)((magnitude << 20) + (120u << 23)), other = normal + normal - kLeastNormalFp8;
  const Words value = (Words)(other < normal ? other : normal) | ((codes & 0x80u) << 24);
  return (Floats)(magnitude == 0x7fu ? all(0x7fc00000u) : value);
}

PIECEWORK_INLINE float fp8_value(uint8_t code) { return fp8_values(all((uint32_t)code))[0]; }

// The codes nearest to values of at most 448, or NaN; ties go to the even one.
PIECEWORK_INLINE Words fp8_codes(Floats values) {
  const Words bits = (Words)values, magnitude = bits & 0x7fffffffu;
  const Words normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  const float magic = 16384.f;  // added, it leaves multiples of 2^-9 in the lowest bits
  const Words small = (Words)((Floats)magnitude + magic) - (Words)all(magic);
  const Words code = (Floats)magnitude < all(kLeastNormalFp8) ? small : normal;
  return (values != values ? all(0x7fu) : code) | ((bits >> 24) & 0x80u);
}

PIECEWORK_INLINE void store_fp8(Floats values, uint8_t* to) {
  store(__builtin_convertvector(fp8_codes(values), Bytes), to);
}

// Values of codes times a scale, kCodes at a time, as T has them.
template <class T>
struct ScaledFp8 {
  static constexpr int kCodes = kLanes;
  float scale;

  PIECEWORK_INLINE explicit ScaledFp8(float scale) : scale(scale) {}

  PIECEWORK_INLINE void operator()(const uint8_t* codes, T* to) const {
#if defined(__AVX512F__)
    // The same bits are a float16 of 2^-8 times the value, below the least normal one too; but not NaN.
    const SignedHalves wide = __builtin_convertvector(load<SignedBytes>(codes), SignedHalves);
    const SignedHalves halves = (SignedHalves)((Halves)wide << 7) & (int16_t)0xbfff;
    const SignedHalves none = (halves & (int16_t)0x7fff) == (int16_t)(0x7f << 7);
    store_as((Floats)_mm512_cvtph_ps((__m256i)(halves | none)) * (scale * 256.f), to);
#else
    store_as(fp8_values(__builtin_convertvector(load<Bytes>(codes), Words)) * scale, to);
#endif
  }
};

#if defined(PIECEWORK_PAIRS) && defined(__AVX512BW__)

// The values of codes without their sign.
struct Fp8Values {
  alignas(64) float of[128];

  constexpr Fp8Values() : of() {
    for (int code = 0; code < 127; ++code) {
      float value = code < 8 ? code : 8 + code % 8;
      for (int i = 1; i < code / 8; ++i) value *= 2;
      of[code] = value * 0x1p-9f;
    }
    of[127] = __builtin_nanf("");
  }
};
inline constexpr Fp8Values kFp8Values;

// Looked up in tables of values that are scaled already, of which the lower seven bits of a code choose.
template <>
struct ScaledFp8<BFloat16> {
  static constexpr int kCodes = 32;
  __m512i parts[4];

  PIECEWORK_INLINE explicit ScaledFp8(float scale) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const float* from = kFp8Values.of + kCodes * p;
      parts[p] = (__m512i)_mm512_cvtne2ps_pbh((__m512)(load(from + 16) * scale), (__m512)(load(from) * scale));
    }
  }

  PIECEWORK_INLINE void operator()(const uint8_t* codes, BFloat16* to) const {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
    const __m512i low = _mm512_permutex2var_epi16(parts[0], code, parts[1]);
    const __m512i high = _mm512_permutex2var_epi16(parts[2], code, parts[3]);
    const __m512i value = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40)), high);
    store((Words)value | ((Words)_mm512_slli_epi16(code, 8) & 0x80008000u), to);
  }
};

#endif

// Values of `count` codes times a scale.
template <class T>
PIECEWORK_INLINE void scale_fp8(const uint8_t* codes, int64_t count, float scale, T* to) {
  const ScaledFp8<T> values(scale);
  int64_t i = 0;
  for (; i + values.kCodes <= count; i += values.kCodes) values(codes + i, to + i);
  for (; i < count; ++i) from_float(fp8_value(codes[i]) * scale, to[i]);
}

}  // namespace piecework
