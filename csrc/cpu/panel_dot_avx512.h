// A tile of bfloat16 weights by VDPBF16PS. Included by the files that are compiled for AVX512_BF16.
#pragma once

#include "panel_kinds_avx512.h"

namespace sparsekern {
namespace {

// VDPBF16PS takes two inputs at once. It rounds every pair to nearest and takes subnormal numbers for zero.
struct Bf16ByDot : Bf16Values {
  using X = uint16_t;
  struct Sum {
    __m512 rows;
  };
  static Sum zero() { return {_mm512_setzero_ps()}; }
  using Weights = __m512bh;
  static Weights weights(Tile<1> tile) { return reinterpret_cast<__m512bh>(tile.part[0]); }
  static void add(Sum& sum, Weights w, const X* x) {
    int both;
    __builtin_memcpy(&both, x, sizeof both);
    sum.rows = _mm512_dpbf16_ps(sum.rows, w, reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)));
  }
  // each row has its own two inputs, a dword of x
  static void add_each(Sum& sum, Weights w, __m512i x) {
    sum.rows = _mm512_dpbf16_ps(sum.rows, w, reinterpret_cast<__m512bh>(x));
  }
  static __m512 total(const Sum& sum) { return sum.rows; }
};

}  // namespace
}  // namespace sparsekern
