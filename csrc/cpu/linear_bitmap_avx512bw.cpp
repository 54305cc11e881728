// linear_bitmap on AVX-512 without VBMI2, as Skylake-X and Cascade Lake have it: 16 values at a time are widened, then
// expanded as float32 are.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,popcnt,bmi2")

#include "expand_words_avx512.h"
#include "linear_bitmap_avx512.h"

namespace sparsekern {
namespace {

// A register has half of the rows and both inputs, as with float32, but its dwords end with the bfloat16.
struct Bf16ByDwords : Float32ByFma {
  using Value = uint16_t;

  static Weights weights(Tile<2> tile) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(tile.part[0], 16)),
            _mm512_castsi512_ps(_mm512_slli_epi32(tile.part[1], 16))};
  }
  static void store(void* y, int64_t offset, __m512 sums, __mmask16 rows) { Bf16Values::store(y, offset, sums, rows); }
  static __m512 load_bias(const void* bias, int64_t row, __mmask16 rows) {
    return Bf16Values::load_bias(bias, row, rows);
  }
};

inline Tile<2> expand_mask(Bf16ByDwords, uint32_t mask, const uint16_t* values) {
  const auto low = static_cast<__mmask16>(mask);
  return {{expand_to_dwords(low, values),
           expand_to_dwords(static_cast<__mmask16>(mask >> 16), values + __builtin_popcount(low))}};
}

}  // namespace

const LinearBitmapPanels kLinearBitmapAvx512Bw = {DType::kFloat32, linear_any<Bf16ByDwords>, expand_any};

}  // namespace sparsekern

#endif
