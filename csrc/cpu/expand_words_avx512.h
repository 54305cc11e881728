// Sixteen-bit words to where a mask's bits are, zeros between them, without VBMI2: widened to dwords, which AVX-512 F
// expands. Included after the target pragma and before linear_bitmap_avx512.h.
#pragma once

#include <cstdint>

#include "fresh_zero.h"

namespace sparsekern {
namespace {

// The next `popcount(mask)` words, a dword each.
inline __m512i expand_to_dwords(__mmask16 mask, const uint16_t* words) {
  const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return _mm512_mask_expand_epi32(fresh_zero(), mask, _mm512_cvtepu16_epi32(next));
}

inline __m512i expand_words(uint32_t mask, const uint16_t* words) {
  const auto low = static_cast<__mmask16>(mask);
  const __m512i first = expand_to_dwords(low, words);
  const __m512i second = expand_to_dwords(static_cast<__mmask16>(mask >> 16), words + __builtin_popcount(low));
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)), _mm512_cvtepi32_epi16(second), 1);
}

}  // namespace
}  // namespace sparsekern
