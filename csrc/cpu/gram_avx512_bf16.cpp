// gram on AVX-512 with VDPBF16PS, which multiplies two tokens at once: twice the arithmetic of fused multiply-adds on
// Zen 5. It rounds every pair to nearest and takes subnormal inputs for zero.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

#include "product_avx512.h"

namespace sparsekern {
namespace {

struct Dot {
  static __m512 add(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

// Two tokens a step, the first in the low half.
struct Bf16Pairs {
  using Source = uint16_t;
  static constexpr int64_t kTokens = 2;
  static __m512 load(const Source* x, int64_t to_second, bool second, __mmask16 inside) {
    const __m512i low = load_words(x, inside);
    const __m512i high = load_words(x + to_second, second ? inside : 0);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

void pack_gram(const void* x, DType, int64_t tokens, int64_t in_features, int64_t first_panel, int64_t end_panel,
               float* a, float* b) {
  pack_gram_of<Bf16Pairs>(x, tokens, in_features, first_panel, end_panel, a, b);
}

}  // namespace

const Product kProductAvx512Bf16 = {2, multiply<Dot>, pack_gram, nullptr, nullptr};

bool has_product_avx512_bf16() { return has_product_avx512() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace sparsekern

#endif
