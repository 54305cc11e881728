// linear_bitmap without the arithmetic of the zeros: what its instruction sets share.
#pragma once

#include "linear_bitmap.h"
#include "nonzero_product.h"

namespace sparsekern {

// x packed: [token blocks], of each [steps, its tokens], a step being 32 bits of every token, and one step more at the
// end. Steps and tokens that do not exist are zeros.
struct NonzeroX {
  const void* x;  // [tokens, in_features]
  int64_t in_features;
  uint32_t* packed;
};

// Of all weights, those that are kept.
inline double kept_share(const BitmapWeight& weight) {
  const double weights = static_cast<double>(weight.out_features) * static_cast<double>(weight.in_features);
  return static_cast<double>(weight.panel_offsets[panel_count(weight)]) / weights;
}

// One instruction set.
struct LinearBitmapNonzero {
  int64_t tile_inputs;
  // tiles first_tile to end_tile - 1 of all token blocks. Returns false when an input of x there is not finite.
  bool (*pack)(const NonzeroX& x, DType dtype, const TokenBlocks& blocks, int64_t first_tile, int64_t end_tile);
  // the work of one thread: panels first_panel to end_panel - 1
  void (*linear)(const BitmapWeight& weight, const uint32_t* x, const TokenBlocks& blocks, const void* bias, void* y,
                 int64_t first_panel, int64_t end_panel, NonzeroScratch& scratch);
};

#if defined(__x86_64__)
extern const LinearBitmapNonzero kLinearBitmapNonzeroAvx512;      // of all dtypes
extern const LinearBitmapNonzero kLinearBitmapNonzeroAvx512Bf16;  // of bfloat16
extern const LinearBitmapNonzero kLinearBitmapNonzeroAvx512Bw;    // of all dtypes
#endif

// That of an instruction set of kLinearBitmapSets; null when it has none.
const LinearBitmapNonzero* nonzero_kernel(int set, DType dtype);

// Whether it is faster than to multiply the zeros.
bool is_worth_nonzero(const LinearBitmapNonzero& kernel, const BitmapWeight& weight, int64_t tokens);

enum class Nonzero { kDone, kNotFinite, kNoMemory };

// All of linear_bitmap, of an x without NaN and infinity: a zero times these is NaN, which leaving it out would lose.
// With such an x, and without memory, nothing is written. Needs in_features > 0.
Nonzero linear_bitmap_nonzero(const LinearBitmapNonzero& kernel, const BitmapWeight& weight, const void* x,
                              const void* bias, void* y, int64_t tokens, int threads);

}  // namespace sparsekern
