// Sixteen bfloat16 from memory as float32, and back, on AVX-512. Included after the target pragma.
#pragma once

#include <cstdint>

#include "fresh_zero.h"

namespace sparsekern {
namespace {

inline __m512 load_bf16(const uint16_t* source, __mmask16 lanes) {
  const __m512i words = _mm512_maskz_cvtepu16_epi32(lanes, _mm256_maskz_loadu_epi16(lanes, source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

inline void store_bf16(uint16_t* target, __m512 wide, __mmask16 lanes) {
  // to nearest, ties to even; rounding up the bits of a NaN could make it infinite
  const __m512i bits = _mm512_castps_si512(wide);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
  _mm256_mask_storeu_epi16(target, lanes, _mm512_cvtepi32_epi16(high));
}

}  // namespace
}  // namespace sparsekern
