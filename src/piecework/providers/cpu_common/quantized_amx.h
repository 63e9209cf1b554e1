// The same for many tokens on machines with matrix units (AMX): a block of columns is widened to bfloat16 as the units
// read it, and 32 tokens are multiplied with it at a time. Where a row has several scales they are applied while it is
// widened, and rounded to bfloat16 with it; else to the sums, which are exact then.
#pragma once

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define PIECEWORK_MATRIX_UNITS

#include "elements.h"

namespace piecework {

constexpr int kUnitRows = 16, kUnitWords = 16;  // of a unit's registers: tokens, or pairs of rows; and words

// Whether the system lets this process use the units; it is asked once.
inline bool matrix_units() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

// The shapes of the units' registers while it lives; then, as other code may count on it, what they were before.
class UnitShapes {
 public:
  UnitShapes() { _tile_storeconfig(&before_); }
  ~UnitShapes() { _tile_loadconfig(&before_); }
  UnitShapes(const UnitShapes&) = delete;
  UnitShapes& operator=(const UnitShapes&) = delete;

  // Registers 0 to 3 are sums of two times two, 4 and 5 tokens, 6 and 7 columns.
  void set(int first, int second) {
    if (first == rows_[0] && second == rows_[1]) return;
    rows_[0] = first, rows_[1] = second;
    Config made = {};
    made.palette = 1;
    const int rows[8] = {first, first, second, second, first, second, kUnitRows, kUnitRows};
    for (int i = 0; i < 8; ++i) made.rows[i] = (uint8_t)(rows[i] ? rows[i] : 1), made.bytes[i] = 4 * kUnitWords;
    _tile_loadconfig(&made);
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config before_;
  int rows_[2] = {-1, -1};
};

// sums[token][column] of up to 32 tokens, from x on, with a block of 32 columns: words of pairs of rows.
inline void multiply_units(const BFloat16* x, int64_t x_token, int64_t tokens, const uint32_t* words, int64_t depth,
                           float (*sums)[2 * kUnitWords], UnitShapes& shapes) {
  const int first = tokens < kUnitRows ? (int)tokens : kUnitRows, second = (int)tokens - first;
  shapes.set(first, second);
  const int64_t row = x_token * (int64_t)sizeof *x, pitch = 2 * kUnitWords * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += 2 * kUnitRows, words += kUnitRows * 2 * kUnitWords) {
    _tile_loadd(4, x + k, row);
    _tile_loadd(6, words, pitch);
    _tile_loadd(7, words + kUnitWords, pitch);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (second == 0) continue;
    _tile_loadd(5, x + kUnitRows * x_token + k, row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], pitch);
  _tile_stored(1, sums[0] + kUnitWords, pitch);
  if (second == 0) return;
  _tile_stored(2, sums[kUnitRows], pitch);
  _tile_stored(3, sums[kUnitRows] + kUnitWords, pitch);
}

}  // namespace piecework
#endif
