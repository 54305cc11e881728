// What the instruction sets of linear_bitmap share. See ops.h for the layout of the weight.
#pragma once

#include "../ops.h"

namespace sparsekern {

constexpr int64_t kMaskInputs = kBlockInputs / kBlockMasks;  // inputs a mask covers: 2

// x is packed before the work starts: tokens in groups of kMaxGroup, within a group input pairs, [blocks * 16, group, 2],
// so that a kernel reads one stream. The last group is as small as group_size allows; tokens and inputs that do not
// exist are zeros.
constexpr int64_t kMaxGroup = 16;

constexpr int64_t group_size(int64_t tokens) {
  return tokens <= 4 ? tokens : tokens <= 6 ? 6 : tokens <= 8 ? 8 : tokens <= 12 ? 12 : kMaxGroup;
}

constexpr int64_t panel_count(const BitmapWeight& weight) { return (weight.out_features + kPanelRows - 1) / kPanelRows; }

constexpr int64_t block_count(const BitmapWeight& weight) {
  return (weight.in_features + kBlockInputs - 1) / kBlockInputs;
}

// The work of one thread: panels first_panel to end_panel - 1.
//   x     packed, in x_type when the weight is bfloat16, else float32
//   bias, y, dense  as in ops.h; dense starts with the first row of first_panel
struct LinearBitmapPanels {
  DType x_type;
  void (*linear)(const BitmapWeight& weight, const void* x, const void* bias, void* y, int64_t tokens,
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
