// What the instruction sets of linear_bitmap share. See ops.h for the layout of the weight.
#pragma once

#include "panel_product.h"

namespace sparsekern {

constexpr int64_t panel_count(const BitmapWeight& weight) { return panel_count(weight.out_features); }

constexpr int64_t block_count(const BitmapWeight& weight) {
  return (weight.in_features + kBlockInputs - 1) / kBlockInputs;
}

// What panels first to end - 1 make a thread read.
int64_t panel_bytes(const BitmapWeight& weight, int64_t first, int64_t end);

// The first panel of a part, when `parts` parts shall read as many bytes each.
int64_t first_panel_of(const BitmapWeight& weight, int64_t first, int64_t end, int part, int parts);

// The work of one thread: panels first_panel to end_panel - 1.
//   x     packed, see packed_x.h, in x_type when the weight is bfloat16, else float32
//   bias, y, dense  as in ops.h; dense starts with the first row of first_panel
struct LinearBitmapPanels {
  DType x_type;
  void (*linear)(const BitmapWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                 int64_t first_panel, int64_t end_panel);
  void (*expand)(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel);
};

extern const LinearBitmapPanels kLinearBitmapPortable;
#if defined(__x86_64__)
extern const LinearBitmapPanels kLinearBitmapAvx512;
extern const LinearBitmapPanels kLinearBitmapAvx512Bf16;
extern const LinearBitmapPanels kLinearBitmapAvx512Bw;
extern const LinearBitmapPanels kLinearBitmapAvx2;
#endif

}  // namespace sparsekern
