// float8_e4m3fn: a sign, four bits of exponent (bias 7), three of mantissa; no infinities, and NaN is 0x7f or 0xff.
// Scales are powers of two: with them, every value is one of float32 and of bfloat16 as well.
#pragma once

#include "lanes.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace piecework {

constexpr float kMostFp8 = 448.f;
constexpr float kLeastNormalFp8 = 0x1p-6f;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

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

#if defined(__AVX512BW__)

// Codes without their sign as bfloat16.
struct Fp8Values {
  alignas(64) uint16_t of[128];

  constexpr Fp8Values() : of() {
    for (int code = 1; code < 127; ++code) {
      int exponent = code >> 3, mantissa = code & 7;
      if (exponent == 0) {
        exponent = 1;
        while (mantissa < 8) mantissa *= 2, --exponent;
      }
      of[code] = (uint16_t)((exponent + 120) << 7 | (mantissa & 7) << 4);
    }
    of[127] = 0x7fc0;
  }
};
inline constexpr Fp8Values kFp8Values;

// Values of codes times a scale, as bfloat16: looked up 32 at a time in tables that hold the scale already.
struct ScaledFp8 {
  static constexpr int kCodes = 32;
  __m512i parts[4];

  PIECEWORK_INLINE explicit ScaledFp8(float scale) {
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    const __m512i exponent = _mm512_set1_epi16((int16_t)(((bits >> 23) - 127) << 7));
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const __mmask32 finite = p == 0 ? ~__mmask32(1) : (p == 3 ? ~__mmask32(0) >> 1 : ~__mmask32(0));  // and not 0
      const __m512i values = _mm512_load_si512(kFp8Values.of + kCodes * p);
      parts[p] = _mm512_mask_add_epi16(values, finite, values, exponent);
    }
  }

  PIECEWORK_INLINE Words operator()(const uint8_t* codes) const {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
    const __m512i low = _mm512_permutex2var_epi16(parts[0], code, parts[1]);
    const __m512i high = _mm512_permutex2var_epi16(parts[2], code, parts[3]);
    const __m512i value = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40)), high);
    return (Words)value | ((Words)_mm512_slli_epi16(code, 8) & 0x80008000u);
  }

  PIECEWORK_INLINE static void put(Words values, BFloat16* to) { store(values, to); }
  template <class T>
  PIECEWORK_INLINE static void put(Words values, T* to) {
    const auto half = [&](__m256i some) { return (Floats)((Words)_mm512_cvtepu16_epi32(some) << 16); };
    store_as(half(_mm512_castsi512_si256((__m512i)values)), to);
    store_as(half(_mm512_extracti64x4_epi64((__m512i)values, 1)), to + kLanes);
  }
};

#else

struct ScaledFp8 {
  static constexpr int kCodes = kLanes;
  float scale;

  PIECEWORK_INLINE explicit ScaledFp8(float scale) : scale(scale) {}

  PIECEWORK_INLINE Floats operator()(const uint8_t* codes) const {
    return fp8_values(__builtin_convertvector(load<Bytes>(codes), Words)) * scale;
  }

  template <class T>
  PIECEWORK_INLINE static void put(Floats values, T* to) {
    store_as(values, to);
  }
};

#endif

// Values of `count` codes times a scale.
template <class T>
PIECEWORK_INLINE void scale_fp8(const uint8_t* codes, int64_t count, float scale, T* to) {
  const ScaledFp8 values(scale);
  int64_t i = 0;
  for (; i + values.kCodes <= count; i += values.kCodes) values.put(values(codes + i), to + i);
  for (; i < count; ++i) from_float(fp8_value(codes[i]) * scale, to[i]);
}

}  // namespace piecework
