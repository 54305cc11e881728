// Sixteen-bit words to where a mask's bits are, zeros between them, by the instruction of VBMI2. Included after the
// target pragma and before linear_bitmap_avx512.h.
#pragma once

#include <cstdint>

#include "fresh_zero.h"

namespace sparsekern {
namespace {

inline __m512i expand_words(uint32_t mask, const uint16_t* words) {
  return _mm512_mask_expand_epi16(fresh_zero(), mask, _mm512_loadu_si512(words));
}

}  // namespace
}  // namespace sparsekern
