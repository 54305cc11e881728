// linear_bitmap on AVX-512 with VDPBF16PS, which takes two inputs at once: twice the arithmetic of two fused
// multiply-adds on Zen 5. It rounds every pair to nearest and takes subnormal weights and inputs for zero.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512dq,avx512bf16,fma,popcnt,bmi2")

#include "expand_words_vbmi2.h"
#include "linear_bitmap_avx512.h"

namespace sparsekern {
namespace {

struct Bf16ByDot : Bf16Values {
  using X = uint16_t;
  struct Sum {
    __m512 rows;
  };
  static Sum zero() { return {_mm512_setzero_ps()}; }
  using Weights = __m512bh;
  static Weights weights(const __m512i* tile) { return reinterpret_cast<__m512bh>(tile[0]); }
  static void add(Sum& sum, Weights w, const X* x) {
    int both;
    __builtin_memcpy(&both, x, sizeof both);
    sum.rows = _mm512_dpbf16_ps(sum.rows, w, reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)));
  }
  static __m512 total(const Sum& sum) { return sum.rows; }
};

}  // namespace

const LinearBitmapPanels kLinearBitmapAvx512Bf16 = {DType::kBFloat16, linear_any<Bf16ByDot>, expand_any};

}  // namespace sparsekern

#endif
