// A zero for the instructions that expand and compress. Included after the target pragma.
#pragma once

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// the intrinsics' own headers, https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace sparsekern {
namespace {

// Expansion waits for the register it overwrites, zero-masked or not (seen on Zen 5: 1.7 ns a mask, not 0.6): give it a
// fresh one, and hide from the compiler that it is zero.
inline __m512i fresh_zero() {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  return zero;
}

}  // namespace
}  // namespace sparsekern
