// What the instruction sets of bitmap_panels share. See ops.h for both layouts.
#pragma once

#include "../ops.h"
#include "linear_bitmap.h"

namespace sparsekern {

// Where the bitmap of panels_to_bitmap goes.
struct RowsOut {
  void* values;
  uint8_t* bitmap;
  int64_t* row_offsets;
};

// The work of one thread: panels first to end - 1. Both return the first row or panel that is wrong, or kNoRow, and
// neither read nor write the values of a panel whose bits were not counted.
struct BitmapPanelsKernel {
  int64_t (*to_panels)(const BitmapRows& packed, uint32_t* masks, void* values, int64_t first, int64_t end);
  int64_t (*to_rows)(const BitmapWeight& weight, const RowsOut& rows, int64_t first, int64_t end);
};

extern const BitmapPanelsKernel kBitmapPanelsPortable;
#if defined(__x86_64__)
extern const BitmapPanelsKernel kBitmapPanelsAvx512;
#endif

constexpr int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace sparsekern
