"""The exponential function of bodies and other pieces without weights, in line, where AVX-512 has it call a library.

A good part of a gated activation's time goes into calls of SLEEF's `expf`, before each of which all registers are
saved. The function here has its error (1 unit in the last place) and takes its name, so that the compiler puts it in
its place. Cody and Waite's reduction by ln 2 in two parts, a polynomial of degree 5 on the rest (as Cephes' expf).
"""

from __future__ import annotations

from typing import Final

from piecework.ops.ir.program import Program

_CALLS: Final = frozenset({"aten.silu.default", "aten.sigmoid.default", "aten.exp.default"})

_SOURCE: Final = r"""
#if defined(CPU_CAPABILITY_AVX512)
extern "C" __attribute__((visibility("hidden"))) __m512 Sleef_expf16_u10(__m512 x) {
  const auto all = [](float value) { return _mm512_set1_ps(value); };
  x = _mm512_min_ps(all(90.0f), _mm512_max_ps(all(-105.0f), x));  // NaN stays: it is the second argument
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504088896341f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, all(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), r);
  __m512 p = all(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, all(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, all(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, all(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, all(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, all(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), all(1.0f));
  return _mm512_scalef_ps(p, n);
}
#endif
"""


def exp_source(program: Program) -> str:
    """Return C++ that comes before a piece's own, or ""."""
    return _SOURCE if not program.constants and any(call.target in _CALLS for call in program.calls) else ""
