// What the instruction sets of linear_dense share. See ops.h for the layout of the weight.
#pragma once

#include "panel_product.h"

namespace sparsekern {

// The work of one thread: panels first_panel to end_panel - 1.
//   x_type  of the packed x when the weight is bfloat16, else float32
struct LinearDensePanels {
  DType x_type;
  void (*linear)(const DenseWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                 int64_t first_panel, int64_t end_panel);
};

extern const LinearDensePanels kLinearDensePortable;
#if defined(__x86_64__)
extern const LinearDensePanels kLinearDenseAvx512;
extern const LinearDensePanels kLinearDenseAvx512Bf16;
extern const LinearDensePanels kLinearDenseAvx512Bw;
extern const LinearDensePanels kLinearDenseAvx2;
#endif

}  // namespace sparsekern
