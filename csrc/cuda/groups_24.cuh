// The four bits that say which two of a group of four weights are kept, as formats/semi_structured.py has them.
#pragma once

#include "ptx.cuh"

namespace sparsekern::cuda {

// Whether the two positions of some of eight groups do not rise: 4 + second - first - 1 keeps bit 2 where they do, and
// borrows from no neighbour.
__device__ __forceinline__ bool falls(uint32_t positions) {
  return ((((positions >> 2 & 0x33333333) | 0x44444444) - (positions & 0x33333333) - 0x11111111) & 0x44444444) !=
         0x44444444;
}

// For a group's bits: two selectors of prmt that put its kept 2-byte weights in their places, the lower one for weights 0
// and 1; byte 4 is of the second operand, which is zero.
__device__ __forceinline__ uint32_t places_of(unsigned positions) {
  const unsigned first = positions & 3, second = positions >> 2;
  uint32_t selectors = 0;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) selectors |= (i == first ? 0x10u : i == second ? 0x32u : 0x44u) << 8 * i;
  return selectors;
}

}  // namespace sparsekern::cuda
